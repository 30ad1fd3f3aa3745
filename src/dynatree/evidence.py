"""The result files that a paper is written from, read once, each value with its place."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynatree.ablation import Ablation, ConfigurationFacts, read_ablation
from dynatree.experiments import Experiment, read_experiment
from dynatree.files import digest_of
from dynatree.results import RunResult, read_result
from dynatree.trace import located


@dataclass(frozen=True)
class Evidence:
    """What was measured.

    Attributes:
        sections: the aggregates by section, in the order of the paper.
        experiments: those of the paper by name, in its order.
        runs: the results by run, which for a section is a configuration; what these say of models,
            machine, versions and memory knows its place.
        files: the aggregate of each section and of each experiment.
        run_files: the result file of each run.
        digests: SHA-256 (hex) of each file.
    """

    sections: dict[str, Ablation]
    experiments: dict[str, Experiment]
    runs: dict[str, RunResult]
    files: dict[str, str]
    run_files: dict[str, str]
    digests: dict[str, str]

    @property
    def configurations(self) -> dict[str, ConfigurationFacts]:
        """Every configuration that stands in a table, by name, in order of first use."""
        found: dict[str, ConfigurationFacts] = {}
        for ablation in self.sections.values():
            for facts in ablation.shown:
                found.setdefault(facts.name, facts)
        return found


def read_evidence(
    folder: Path, sections: Sequence[str], experiments: Sequence[str], runs_folder: Path
) -> Evidence:
    """Reads `<section>.json` and `experiments/<experiment>.json` in `folder`, and of what these
    speak `<pair>/<run>.json` in `runs_folder`.

    Raises:
        ResultError: a file is missing or damaged.
    """
    files = {section: (folder / f"{section}.json").as_posix() for section in sections}
    files |= {name: (folder / f"experiments/{name}.json").as_posix() for name in experiments}
    aggregates = {
        section: located(read_ablation(Path(files[section])), files[section])
        for section in sections
    }
    grids = {name: located(read_experiment(Path(files[name])), files[name]) for name in experiments}
    runs: dict[str, RunResult] = {}
    run_files: dict[str, str] = {}
    for pair, run in [
        *(
            (part.setting.pair, facts.name)
            for part in aggregates.values()
            for facts in part.configurations
        ),
        *((grid.setting.pair, point.run) for grid in grids.values() for point in grid.points),
    ]:
        path = runs_folder / pair / f"{run}.json"
        name = str(run)
        if name not in runs:
            run_files[name] = path.as_posix()
            runs[name] = _located_run(read_result(path), run_files[name])
    digests = {file: digest_of(Path(file)) for file in [*files.values(), *run_files.values()]}
    return Evidence(aggregates, grids, runs, files, run_files, digests)


def _located_run(result: RunResult, file: str) -> RunResult:
    # Not the records, of which there are thousands: the paper shows what the aggregate makes of
    # them.
    return result.model_copy(
        update={
            name: located(getattr(result, name), file, f"$.{name}")
            for name in ("runtimes", "peak_memory_bytes", "provenance")
        }
    )
