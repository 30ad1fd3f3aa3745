"""Values know their place, and what is computed from them knows all of its places."""

import json

import pytest
import synthetic

from dynatree.ablation import write_ablation
from dynatree.errors import ResultError
from dynatree.trace import (
    Source,
    TracedFloat,
    TracedInt,
    counted,
    distinct,
    located,
    lookup,
    sources_of,
    traced,
    watched,
)

ONE, TWO = Source("r.json", "$.one"), Source("r.json", "$.two")


def leaves(data):
    if isinstance(data, dict | list):
        entries = data.values() if isinstance(data, dict) else data
        return [leaf for entry in entries for leaf in leaves(entry)]
    return [data]


@pytest.fixture
def ablation(tmp_path):
    return synthetic.ablation(tmp_path, speedups={"tree": [1.0, 1.5, 2.0, 2.5]})


def test_every_value_knows_where_it_stands_in_its_file(ablation, tmp_path):
    write_ablation(tmp_path / "ablation.json", ablation)
    data = json.loads((tmp_path / "ablation.json").read_text())
    known = located(ablation, "ablation.json")
    assert known == ablation
    found = leaves(known.model_dump())
    assert sum(bool(sources_of(leaf)) for leaf in found) > 200
    for leaf in found:
        for source in sources_of(leaf):
            assert source.file == "ablation.json"
            assert lookup(data, source.path) == leaf
        assert sources_of(leaf) or leaf is None or isinstance(leaf, bool)


def test_methods_and_properties_lead_to_the_same_places(ablation):
    known = located(ablation, "r.json")
    tree = known.facts("tree")
    assert tree.speedup.value.sources == (Source("r.json", "$.configurations[2].speedup.value"),)
    paths = [source.path for source in sources_of(tree.accepted_length)]
    assert paths == [
        *(f"$.configurations[2].acceptance_by_depth[{depth}].accepted" for depth in range(4)),
        "$.configurations[2].rounds",
    ]


@pytest.mark.parametrize(
    ("compute", "value"),
    [
        (lambda a, b: a + b, 5.5), (lambda a, b: a - b, -0.5), (lambda a, b: a * b, 7.5),
        (lambda a, b: a / b, 2.5 / 3), (lambda a, b: sum([a, b]), 5.5),
        (lambda a, b: 1 - -abs(a) + 0 * b, 3.5), (lambda a, b: 100 * a / (1 + b), 62.5),
    ],
)  # fmt: skip
def test_a_computed_number_has_the_places_of_all_operands(compute, value):
    result = compute(traced(2.5, [ONE]), traced(3, [TWO]))
    assert result == value
    assert sources_of(result) == (ONE, TWO)
    assert isinstance(compute(traced(2, [ONE]), traced(3, [TWO])), TracedInt | TracedFloat)


def test_counting_and_comparing_keep_the_places():
    values = traced([1, 2], [ONE])
    assert counted(values) == 2
    assert sources_of(counted(values)) == (ONE,)
    different = distinct([traced("b", [ONE]), traced("a", [TWO]), traced("b", [TWO])])
    assert different == ["a", "b"]
    assert [sources_of(entry) for entry in different] == [(TWO,), (ONE, TWO)]


def test_keys_that_are_no_names_are_quoted():
    place = located({"tree-a": [1.5]}, "r.json", "$.x")["tree-a"][0].sources[0]
    assert place.path == "$.x['tree-a'][0]"
    assert lookup({"x": {"tree-a": [1.5]}}, place.path) == 1.5


def test_a_place_that_is_not_there_is_named():
    with pytest.raises(ResultError, match=r"\$\.a\[3\]: there is no such place"):
        lookup({"a": [1]}, "$.a[3]")


def test_reading_is_noticed_through_methods_properties_and_lists(ablation):
    seen = []
    reader = watched(located(ablation, "r.json"), lambda source: seen.append(source.path))
    assert seen == []
    assert reader.tables[0].rows[1].label == "linear"
    assert seen.pop() == "$.tables[0].rows[1].label"
    assert reader.facts("tree").speedup.against(1) == "gain"
    assert seen[-2:] == ["$.configurations[2].name", "$.configurations[2].speedup.interval.low"]
    seen.clear()
    assert reader.facts("tree").accepted_length == 1.0
    assert "$.configurations[2].acceptance_by_depth[3].accepted" in seen
    assert not any("throughput" in path for path in seen)
    with pytest.raises(AttributeError):
        _ = reader.pear
