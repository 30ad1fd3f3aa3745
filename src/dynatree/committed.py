"""Results that were measured elsewhere, taken to a machine that shall measure nothing.

Tables and figures may be made from them where they are what the configuration asks for. That other
code measured them is no fault, since a later commit rarely measures anew, but it must be said.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dynatree.certificate import read_certificate
from dynatree.config import Config
from dynatree.differences import differences
from dynatree.errors import ResultError
from dynatree.files import short_digest, weights_digest
from dynatree.results import RunResult, read_result
from dynatree.sources import PACKAGE, source_digest
from dynatree.specs import RunSpec
from dynatree.texts import Selection

SHOWN = 4
"""Names that a message lists before it counts the rest."""


@dataclass(frozen=True)
class Committed:
    """A folder of results that fits the configuration.

    Attributes:
        sections: of the paper, those of which every result is there.
        experiments: the same; those on a text that comes with Python only where it is the same one.
        source_digest: of the code that measured them (hex).
        certifying_digest: of the code that made the certificate (hex).
        remarks: what a reader of the tables should know, one line each.
    """

    sections: list[str]
    experiments: list[str]
    source_digest: str
    certifying_digest: str
    remarks: list[str]


def committed(config: Config, folder: Path, pairs: Path) -> Committed:
    """Checks the results `runs/<pair>/<name>.json` and `certificate.json` in `folder`.

    Args:
        config: the study.
        pairs: where trained pairs are, if there are any; their weights are compared.

    Raises:
        ResultError: no section is complete, a file is damaged, or the results do not fit the
            configuration or each other; every misfit is named.
    """
    certificate_path = folder / "certificate.json"
    grids = {name: config.point_runs(name) for name in config.paper.experiments}
    files = {
        name: folder / "runs" / config.pair / f"{name}.json"
        for name in [*config.measured, *(run for runs in grids.values() for run in runs)]
    }
    missing = {
        section: [
            str(path)
            for path in (
                certificate_path,
                *map(files.__getitem__, config.section(section).measured),
            )
            if not path.is_file()
        ]
        for section in config.sections
    }
    sections = [section for section, paths in missing.items() if not paths]
    if not sections:
        raise ResultError(
            f"{folder}: no section is complete; missing: "
            + "; ".join(f"{section}: {_listed(paths)}" for section, paths in missing.items())
            + ". Give the folder that holds runs/ and certificate.json, or correct pair "
            f"({config.pair!r}) in config.yaml"
        )
    names = list(
        dict.fromkeys(name for section in sections for name in config.section(section).measured)
    )
    absent = {
        name: [str(files[run]) for run in runs if not files[run].is_file()]
        for name, runs in grids.items()
    }
    experiments = [name for name, paths in absent.items() if not paths]
    taken = list(dict.fromkeys([*names, *(run for name in experiments for run in grids[name])]))
    try:
        results = {name: read_result(files[name]) for name in taken}
        certificate = read_certificate(certificate_path)
    except ResultError as error:
        reason = str(error).partition("; remove it")[0]
        raise ResultError(f"{reason}; take the file again from where it was measured") from None

    other_text = {
        name for name, result in results.items() if _of_other_python(result, config.spec(name))
    }
    foreign = [name for name in experiments if other_text & set(grids[name])]
    experiments = [name for name in experiments if name not in foreign]
    kept = {*names, *(run for name in experiments for run in grids[name])}
    results = {name: result for name, result in results.items() if name in kept}

    misfits: dict[str, list[str]] = {}
    for name, result in results.items():
        for line in differences(
            result.spec.model_dump(mode="json"), config.spec(name).model_dump(mode="json")
        ):
            misfits.setdefault(line, []).append(name)
    made = certificate.spec.only(names)
    for line in differences(
        made.model_dump(mode="json"), config.certificate_spec(names).model_dump(mode="json")
    ):
        misfits.setdefault(line, []).append("certificate.json")
    problems = [f"{line} ({_listed(who)})" for line, who in misfits.items()]
    codes = _grouped((result.source_digest, name) for name, result in results.items())
    weights = _grouped(
        [
            *((result.pair_digest, name) for name, result in results.items()),
            (certificate.pair_digest, "certificate.json"),
        ]
    )
    for what, groups in (("by different code", codes), ("with different weights", weights)):
        if len(groups) > 1:
            parts = "; ".join(
                f"{short_digest(digest)}: {_listed(who)}" for digest, who in groups.items()
            )
            problems.append(f"measured {what} ({parts})")
    if problems:
        raise ResultError(
            f"{folder} does not fit the configuration:\n"
            + "\n".join(f"  {line}" for line in problems)
            + "\nset config.yaml to what was measured, or leave out --config results to measure"
        )
    code, weight = next(iter(codes)), next(iter(weights))
    remarks = [
        f"{kind} {name} is left out; missing: {_listed(paths)}"
        for kind, lacking in (("section", missing), ("experiment", absent))
        for name, paths in lacking.items()
        if paths
    ]
    if foreign:
        remarks.append(
            f"experiments left out, measured on the text of another Python than this one: "
            f"{_listed(foreign)}"
        )
    for what, script, found in (
        ("the results were measured", "measure.py", code),
        ("the certificate was made", "certify.py", certificate.source_digest),
    ):
        here = source_digest(PACKAGE / script)
        if found != here:
            remarks.append(
                f"{what} by other code than this checkout's (source digest {found[:12]}, here "
                f"{here[:12]}); the numbers are that code's"
            )
    return Committed(
        sections,
        experiments,
        code,
        certificate.source_digest,
        [f"{folder}: {remark}" for remark in (*remarks, *_other_weights(config, weight, pairs))],
    )


def _of_other_python(result: RunResult, spec: RunSpec) -> bool:
    """Whether the prompts are of a text that comes with Python, and not of this one's."""
    here, there = spec.prompts, result.spec.prompts
    if not isinstance(here, Selection) or not isinstance(there, Selection):
        return False
    return here.corpus is not None and here.sha256 != there.sha256


def _other_weights(config: Config, digest: str, pairs: Path) -> list[str]:
    """Which models of the pair lie here with other weights than `digest` names."""
    remarks = []
    for role, measured in zip(("target", "draft"), digest.split(":"), strict=False):
        source = getattr(config.pair_spec, role)
        if source is not None and source.path is None:
            continue
        model = Path(source.path) if source is not None else pairs / config.pair / role
        if not (model / "config.json").is_file():
            continue
        here = weights_digest(model)
        if here != measured:
            remarks.append(
                f"measured with other weights than those in {model} (digest {measured[:12]}, here "
                f"{here[:12]})"
            )
    return remarks


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, name in pairs:
        groups.setdefault(key, []).append(name)
    return groups


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
