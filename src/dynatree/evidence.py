"""The result files that a paper is written from, read once, each value with its place."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynatree.ablation import Ablation, ConfigurationFacts, read_ablation
from dynatree.files import digest_of
from dynatree.results import RunResult, read_result
from dynatree.trace import located


@dataclass(frozen=True)
class Evidence:
    """What was measured.

    Attributes:
        sections: the aggregates by section, in the order of the paper.
        runs: the results by configuration; what these say of models, machine, versions and memory
            knows its place.
        files: the aggregate of each section.
        run_files: the result file of each configuration.
        digests: SHA-256 (hex) of each file.
    """

    sections: dict[str, Ablation]
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


def read_evidence(folder: Path, sections: Sequence[str], runs_folder: Path) -> Evidence:
    """Reads `<section>.json` in `folder` and `<pair>/<configuration>.json` in `runs_folder`.

    Raises:
        ResultError: a file is missing or damaged.
    """
    aggregates: dict[str, Ablation] = {}
    runs: dict[str, RunResult] = {}
    files = {section: (folder / f"{section}.json").as_posix() for section in sections}
    run_files: dict[str, str] = {}
    for section, file in files.items():
        aggregates[section] = located(read_ablation(Path(file)), file)
        for facts in aggregates[section].configurations:
            path = runs_folder / aggregates[section].setting.pair / f"{facts.name}.json"
            name, run_file = str(facts.name), path.as_posix()
            if name not in runs:
                runs[name] = _located_run(read_result(path), run_file)
                run_files[name] = run_file
    digests = {file: digest_of(Path(file)) for file in [*files.values(), *run_files.values()]}
    return Evidence(aggregates, runs, files, run_files, digests)


def _located_run(result: RunResult, file: str) -> RunResult:
    # Not the records, of which there are thousands: the paper shows what the aggregate makes of
    # them.
    return result.model_copy(
        update={
            name: located(getattr(result, name), file, f"$.{name}")
            for name in ("runtimes", "peak_memory_bytes", "provenance")
        }
    )
