"""`paper/manifest.json`: where every value of the paper comes from.

It is made by rendering everything again from the result files, with values that know their places,
and only if that gives the files that are there, byte for byte.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Self

from matplotlib.figure import Figure
from pydantic import model_validator

from dynatree.config import TEXTS
from dynatree.drawing import save
from dynatree.errors import ResultError
from dynatree.evidence import Evidence, read_evidence
from dynatree.experiment_figures import draw
from dynatree.facts import AnyFact, Fact, read_facts, write_facts
from dynatree.figures import bars
from dynatree.files import digest_of
from dynatree.numbers import text
from dynatree.render import Page, Shown, render, render_experiment
from dynatree.trace import Source, lookup, watched

FORMATS = (".pdf", ".png")


class ResultFile(Fact):
    """A file that values come from.

    Attributes:
        sha256: of its bytes (hex).
        runs: of an aggregate, the result file that each of its `configurations` or `points` was
            made from, in their order; empty for such a result file.
    """

    sha256: str
    runs: list[str]


class Text(Fact):
    """A LaTeX file of the paper, the SHA-256 (hex) of its bytes and the values that it prints."""

    sha256: str
    shown: list[Shown]


class Drawing(Fact):
    """A figure: the SHA-256 (hex) of its file in each format, and all places read to draw it."""

    sha256: dict[str, str]
    sources: list[Source]


class Manifest(Fact):
    """Where all that the paper shows comes from; texts and figures by the name of their file, which
    for an experiment begins with `experiments/`.
    """

    schema_version: Literal[1] = 1
    results: dict[str, ResultFile]
    texts: dict[str, Text]
    figures: dict[str, Drawing]

    @model_validator(mode="after")
    def _sources_are_listed(self) -> Self:
        shown = [
            source
            for text in self.texts.values()
            for entry in text.shown
            for source in entry.sources
        ]
        drawn = [source for figure in self.figures.values() for source in figure.sources]
        for source in (*shown, *drawn):
            if source.file not in self.results:
                raise ValueError(f"{source.file} is not among the results")
        return self


def make_manifest(
    results: Path,
    sections: Sequence[str],
    experiments: Sequence[str],
    runs: Path,
    templates: Path,
    paper: Path,
    figures: Path,
) -> Manifest:
    """Renders the paper again and says where its values come from.

    Args:
        results: holds the aggregates.
        runs: holds `<pair>/<run>.json`.
        paper: holds the rendered texts.
        figures: holds `<section>.pdf` and `.png`, or one of them, and the same of the experiments
            in a folder `experiments`.

    Raises:
        ResultError: a result is missing or damaged, or a file is not what the results render to.
    """
    evidence = read_evidence(results, sections, experiments, runs)
    texts = {
        name: _checked(paper / name, page) for name, page in pages(evidence, templates).items()
    }
    drawings = {
        name: _drawn_again(bars, ablation, figures / name)
        for name, ablation in evidence.sections.items()
    } | {
        f"experiments/{name}": _drawn_again(draw, experiment, figures / "experiments" / name)
        for name, experiment in evidence.experiments.items()
    }
    parts = {
        section: [facts.name for facts in ablation.configurations]
        for section, ablation in evidence.sections.items()
    } | {
        name: [point.run for point in experiment.points]
        for name, experiment in evidence.experiments.items()
    }
    aggregates = {
        evidence.files[name]: ResultFile(
            sha256=evidence.digests[evidence.files[name]],
            runs=[evidence.run_files[run] for run in found],
        )
        for name, found in parts.items()
    }
    measured = {
        file: ResultFile(sha256=evidence.digests[file], runs=[])
        for file in evidence.run_files.values()
    }
    return Manifest(results=aggregates | measured, texts=texts, figures=drawings)


def pages(evidence: Evidence, templates: Path) -> dict[str, Page]:
    """Every text of the paper, by the name of its file."""
    section, grid = templates / "ablation.tex.j2", templates / "experiment.tex.j2"
    return (
        {
            f"{name}.tex": render(ablation, section, evidence.files[name])
            for name, ablation in evidence.sections.items()
        }
        | {
            f"experiments/{name}.tex": render_experiment(experiment, grid, evidence.files[name])
            for name, experiment in evidence.experiments.items()
        }
        | {f"{name}.tex": text(evidence, templates / f"{name}.tex.j2") for name in TEXTS}
    )


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes `manifest` to `path`, all or nothing."""
    write_facts(path, manifest)


def read_manifest(path: Path) -> Manifest:
    """Reads and validates a manifest; raises as `read_facts`."""
    return read_facts(path, Manifest, "manifest")


def describe(path: Path) -> Iterator[str]:
    """Lines that say where each value of a text or figure comes from.

    A value stands with its line and column, then each of its places: the result file, the JSON
    path, what stands there, and of an aggregate's configuration or point the run that measured it.
    The digests of the files named follow.

    Raises:
        ResultError: there is no manifest beside the file, it does not speak of it, or the file or
            a result file is not what it was.
    """
    manifest, found = _manifest_of(path)
    # Figures may lie in a folder of their own, beside the texts.
    name = path.relative_to(manifest.parent).as_posix().removeprefix("figures/")
    entry = found.texts.get(name) or found.figures.get(name.removesuffix(path.suffix))
    if entry is None:
        known = ", ".join([*found.texts, *found.figures])
        raise ResultError(f"{manifest}: does not speak of {name!r}, but of {known}")
    recorded = entry.sha256 if isinstance(entry, Text) else entry.sha256.get(path.suffix)
    _unchanged(path, recorded, manifest)
    places = _Places(found, manifest)
    if isinstance(entry, Text):
        for shown in entry.shown:
            yield f"{shown.line}:{shown.column}  {shown.text}"
            for source in shown.sources:
                yield f"    {places.describe(source)}"
    else:
        for source in entry.sources:
            yield places.describe(source)
    yield ""
    for file in places.files:
        yield f"{file}  sha256 {found.results[file].sha256}"


class _Places:
    """Looks up places in result files, which must be what the manifest says; notes their names."""

    def __init__(self, manifest: Manifest, path: Path) -> None:
        self.files: dict[str, object] = {}
        self._manifest, self._path = manifest, path

    def describe(self, source: Source) -> str:
        value = lookup(self._parsed(source.file), source.path)
        line = f"{source.file} {source.path} = {_short(value)}"
        runs = self._manifest.results[source.file].runs
        found = re.match(r"\$\.(?:configurations|points)\[(\d+)\]", source.path)
        if runs and found:
            run = runs[int(found[1])]
            self._parsed(run)
            line += f"  (measured in {run})"
        return line

    def _parsed(self, file: str) -> object:
        if file not in self.files:
            _unchanged(Path(file), self._manifest.results[file].sha256, self._path)
            self.files[file] = json.loads(Path(file).read_bytes())
        return self.files[file]


def _short(value: object) -> str:
    return f"{len(value)} entries" if isinstance(value, list | dict) else json.dumps(value)


def _manifest_of(path: Path) -> tuple[Path, Manifest]:
    for folder in list(path.parents)[:3]:
        candidate = folder / "manifest.json"
        if candidate.is_file():
            return candidate, read_manifest(candidate)
    raise ResultError(
        f"{path}: no manifest.json beside it; run: snakemake {path.parent / 'manifest.json'}"
    )


def _unchanged(path: Path, recorded: str | None, manifest: Path) -> None:
    try:
        same = digest_of(path) == recorded
    except OSError as error:
        raise ResultError(f"{path}: cannot be read: {error}") from None
    if not same:
        raise ResultError(
            f"{path}: is not the file that {manifest} was made with; run: snakemake {manifest}"
        )


def _checked(path: Path, page: Page) -> Text:
    """The entry of a text that is what it was rendered to."""
    try:
        there = path.read_bytes()
    except OSError as error:
        raise ResultError(f"{path}: cannot be read: {error}; run: snakemake {path}") from None
    again = page.text.encode()
    if there != again:
        lines = zip(there.splitlines(), again.splitlines(), strict=False)
        differing = (at for at, (one, other) in enumerate(lines, start=1) if one != other)
        number = next(differing, min(there.count(b"\n"), again.count(b"\n")) + 1)
        raise ResultError(
            f"{path}: line {number} is not what the results render to; remove it and run: "
            f"snakemake {path}"
        )
    return Text(sha256=digest_of(path), shown=page.shown)


def _drawn_again(build: Callable[[AnyFact], Figure], facts: AnyFact, figure: Path) -> Drawing:
    """The entry of a figure that is what `build` draws; `figure` is its path without suffix."""
    sources: dict[Source, None] = {}
    files = [path for path in map(figure.with_suffix, FORMATS) if path.is_file()]
    if not files:
        raise ResultError(f"{figure}: no such figure; run: snakemake {figure}.pdf")
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / "figure"
        save(
            build(watched(facts, lambda source: sources.setdefault(source))),
            again.with_suffix(".pdf"),
            again.with_suffix(".png"),
        )
        for path in files:
            if path.read_bytes() != again.with_suffix(path.suffix).read_bytes():
                raise ResultError(
                    f"{path}: is not what the results are drawn to; remove it and run: "
                    f"snakemake {path}"
                )
    return Drawing(sha256={path.suffix: digest_of(path) for path in files}, sources=list(sources))
