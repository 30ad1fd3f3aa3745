"""The result files of a study: read, or refused where they are not what is configured."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from pydantic import BaseModel, PositiveInt, ValidationError

from dynatree.ablation import (
    PairSetting,
)
from dynatree.certificate import Lossless, read_certificate
from dynatree.config import Config
from dynatree.differences import differences, shown
from dynatree.errors import ResultError
from dynatree.facts import first_problem
from dynatree.failures import failure_reason
from dynatree.files import short_digest
from dynatree.recipes import Transformer
from dynatree.results import RunResult, read_result
from dynatree.specs import Models, ModelSource, RunSpec, Spec


class _Device(BaseModel):
    type: str
    name: str
    threads: PositiveInt
    shared_with: list[str] = []


class _Git(BaseModel):
    commit: str | None
    dirty: bool | None


class Origin(BaseModel):
    """The part of a result's provenance that the paper states."""

    device: _Device
    git: _Git


def read_runs(
    config: Config,
    names: Sequence[str],
    results_dir: Path,
    source_digest: str,
    mark_missing: bool = False,
) -> tuple[dict[str, RunResult], dict[str, Origin], dict[str, str]]:
    """The current results of the runs `names`, where they come from, and why others are missing.

    Raises:
        ResultError: one is missing or not current, unless `mark_missing`; or see `aggregate`.
    """
    paths = {name: results_dir / config.pair / f"{name}.json" for name in names}
    results: dict[str, RunResult] = {}
    origins: dict[str, Origin] = {}
    reasons: dict[str, str] = {}
    for name, path in paths.items():
        spec = config.spec(name)
        try:
            result = _current(path, spec, source_digest)
            origins[name] = _origin(path, result.provenance)
        except ResultError as error:
            if not mark_missing:
                raise
            unknown = without_cure(error) if path.exists() else "not measured"
            reasons[name] = failure_reason(path, spec.digest) or unknown
        else:
            results[name] = result
    if results:
        _same_weights(results, paths)
    if config.devices.mixed == "refuse":
        _same_device(origins, paths)
    return results, origins, reasons


def without_cure(error: ResultError) -> str:
    """What is wrong, without what to do: a reader of the table can do nothing about it."""
    text = str(error).partition("; remove it")[0].partition("; run: ")[0]
    return text.partition(": ")[2] or text


def _current(path: Path, spec: RunSpec, source_digest: str) -> RunResult:
    result = read_result(path)
    _same_spec(path, result.spec, spec)
    _same_code(path, result.source_digest, source_digest)
    return result


def read_certified(
    config: Config,
    origins: Mapping[str, Origin],
    path: Path,
    source_digest: str,
    pair_digest: str,
) -> dict[str, Lossless]:
    """What a certificate of this study, code and weights found of the configurations in `origins`.

    On another device other kernels run, in other shapes: it says nothing of a result from there.
    """
    certificate = read_certificate(path)
    names = list(origins)
    made = certificate.spec.only(names)
    _same_spec(path, made, config.certificate_spec(names))
    _same_code(path, certificate.source_digest, source_digest)
    if certificate.pair_digest != pair_digest:
        raise ResultError(
            f"{path}: measured with other model weights (pair digest "
            f"{certificate.pair_digest[:12]}) than the results ({pair_digest[:12]}); remove it and "
            f"run: snakemake {path}"
        )
    device = _origin(path, certificate.provenance).device.name
    elsewhere = [name for name, origin in origins.items() if origin.device.name != device]
    if elsewhere and (config.devices.mixed == "refuse" or len(elsewhere) == len(origins)):
        raise ResultError(
            f"{path}: made on {device!r}, but {elsewhere[0]} was measured on "
            f"{origins[elsewhere[0]].device.name!r}; remove it and run: snakemake {path}"
        )
    certificate.require()
    return {
        check.name: check.verdict
        for check in certificate.configurations
        if check.verdict != "failed" and check.name not in elsewhere
    }


def _same_spec(path: Path, measured: Spec, configured: Spec) -> None:
    if measured.digest == configured.digest:
        return
    found = differences(measured.model_dump(mode="json"), configured.model_dump(mode="json"))
    raise ResultError(
        f"{path}: measured with another configuration ({shown(found)}); remove it and run: "
        f"snakemake {path}"
    )


def _same_code(path: Path, measured: str, current: str) -> None:
    if measured != current:
        raise ResultError(
            f"{path}: measured by other code (source digest {measured[:12]}, now "
            f"{current[:12]}); remove it and run: snakemake {path}"
        )


def _origin(path: Path, provenance: Mapping[str, object]) -> Origin:
    try:
        return Origin.model_validate(provenance)
    except ValidationError as error:
        problem = first_problem(error, "provenance")
        raise ResultError(f"{path}: {problem}; remove it and run: snakemake {path}") from None


def _same_weights(results: dict[str, RunResult], paths: dict[str, Path]) -> None:
    # The newest result has the weights of today; any that differs from it is the stale one.
    newest = max(results, key=lambda name: results[name].started)
    for name, result in results.items():
        if result.pair_digest != results[newest].pair_digest:
            raise ResultError(
                f"{paths[name]}: measured with other model weights (pair digest "
                f"{short_digest(result.pair_digest)}) than the newer {paths[newest]} "
                f"({short_digest(results[newest].pair_digest)}); remove it and run: snakemake "
                f"{paths[name]}"
            )


def _same_device(origins: dict[str, Origin], paths: dict[str, Path]) -> None:
    for one, other in combinations(origins, 2):
        if origins[one].device.name != origins[other].device.name:
            raise ResultError(
                f"{paths[other]}: measured on {origins[other].device.name!r}, but {paths[one]} on "
                f"{origins[one].device.name!r}; remove the one that is not of this machine and "
                f"run: snakemake {paths[one]} {paths[other]}, or set devices.mixed: group"
            )


def devices_of(origins: Mapping[str, Origin]) -> list[str]:
    """The devices that results come from, in order of first use."""
    return list(dict.fromkeys(origin.device.name for origin in origins.values()))


def device_of(name: str, origins: Mapping[str, Origin]) -> str | None:
    """What run `name` was measured on, where that is not the same for all runs."""
    return origins[name].device.name if len(devices_of(origins)) > 1 else None


def require_one_device(what: str, candidates: Sequence[str], origins: Mapping[str, Origin]) -> None:
    """Refuses to choose the fastest among speedups of different devices."""
    devices = devices_of({name: origins[name] for name in candidates})
    if len(devices) > 1:
        raise ResultError(
            f"{what}: its candidates were measured on different devices ({', '.join(devices)}), "
            f"of which the fastest means nothing; measure {', '.join(candidates)} on one"
        )


def notes_of(origins: dict[str, Origin]) -> list[str]:
    """What a reader must know of how the runs were measured."""
    notes = []
    threads = {name: origin.device.threads for name, origin in origins.items()}
    if len(set(threads.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in threads.items())
        notes.append(
            f"The rows were measured with different numbers of threads ({listed}): each speedup is "
            "paired within its own row and remains valid, throughputs do not compare between rows, "
            "and changes between rows include the effect of the threads."
        )
    devices = devices_of(origins)
    if len(devices) > 1:
        groups: dict[str, list[str]] = {device: [] for device in devices}
        for name, origin in origins.items():
            groups[origin.device.name].append(name)
        listed = "; ".join(f"{device}: {', '.join(names)}" for device, names in groups.items())
        notes.append(
            f"The rows were measured on different devices ({listed}): each speedup is "
            "paired within its own row and remains valid, and rows of different devices are not "
            "compared."
        )
    flagged = [name for name, origin in origins.items() if origin.device.shared_with]
    if flagged:
        notes.append(
            f"Other programs used the GPU while {', '.join(flagged)} was measured: these "
            "throughputs and speedups may be disturbed."
        )
    return notes


def pair_setting(config: Config, origins: Mapping[str, Origin]) -> PairSetting:
    """The models and the devices that all runs share."""
    device = next(iter(origins.values())).device
    return PairSetting(
        pair=config.pair,
        note=config.pair_spec.note,
        target=_model(config.pair_spec, "target"),
        draft=_model(config.pair_spec, "draft"),
        dtype=config.pair_spec.dtype,
        device_type=device.type,
        device=" and ".join(devices_of(origins)),
    )


def _model(models: Models, role: str) -> str:
    """Where a model of the pair comes from, in words."""
    source = getattr(models, role) if models.recipe is None else getattr(models.recipe, role)
    if isinstance(source, Transformer):
        return f"{source.layers}-layer GPT-NeoX of width {source.width}"
    assert isinstance(source, ModelSource)
    return str(source.path or f"{source.hub} ({source.revision})")
