"""What is said of jobs and of parameters that changed; `tests/test_workflow.py` has real plans."""

import json
from types import SimpleNamespace

import pytest

from dynatree.plan import Job, lines, parameter_changes


def changes(before, now):
    """The lines for parameters, given by name, as Snakemake records them: without names."""
    old = {repr(value) for value in before.values()}
    new = {repr(value) for value in now.values()}
    present = {name: repr(value) for name, value in now.items()}
    return parameter_changes(SimpleNamespace(only_old=old - new, only_new=new - old), present)


ONE, TWO = "a" * 64, "b" * 64


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({"spec": "x"}, {"spec": "x"}, []),
        (
            {"spec": json.dumps({"a": {"b": [1, 2]}, "c": 3})},
            {"spec": json.dumps({"a": {"b": [1, 4]}, "c": 3})},
            ["a.b.1: before 2, now 4"],
        ),
        (
            {"study": json.dumps({"rows": {"x": 1, "y": 2}})},
            {"study": json.dumps({"rows": {"y": 2, "x": 1}})},
            ["study: in another order"],
        ),
        ({"digest": ONE, "runs": "a"}, {"digest": TWO, "runs": "a"}, ["digest: other code"]),
        (
            {"recipe": json.dumps({"seed": 0}), "device": "cpu"},
            {"recipe": json.dumps({"seed": 1}), "device": "cuda"},
            ["device: before 'cpu', now 'cuda'", "seed: before 0, now 1"],
        ),
        (
            {"specs": [json.dumps({"name": "a", "depth": 2})]},
            {"specs": [json.dumps({"name": "a", "depth": 3})]},
            ["specs.0.depth: before 2, now 3"],
        ),
        (
            {"specs": [json.dumps({"name": "a"})]},
            {"specs": [json.dumps({"name": "a"}), json.dumps({"name": "b"})]},
            ["specs: before 1 entries, now 2"],
        ),
        ({}, {"runs": "results/runs"}, ["runs: now 'results/runs'"]),
        ({"runs": "results/runs"}, {}, ["no longer a parameter: 'results/runs'"]),
    ],
)
def test_changed_fields_are_named_with_both_values(before, now, expected):
    assert changes(before, now) == expected


def test_jobs_with_the_same_reasons_are_told_together():
    stale = ("changed: src/dynatree/tree.py",)
    jobs = [
        Job("measure", "p/a", stale, 30.0),
        Job("measure", "p/b", stale, 40.4),
        Job("measure", "p/c", ("its output is missing",), None),
        Job("aggregate", "", ("follows measure",), 2.0),
    ]
    assert lines(jobs) == [
        "4 jobs, about 1 min 12 s as last time, and 1 that never ran here",
        "measure p/a, p/b, about 1 min 10 s as last time",
        "    changed: src/dynatree/tree.py",
        "measure p/c",
        "    its output is missing",
        "aggregate, about 2 s as last time",
        "    follows measure",
    ]
