"""Results with chosen numbers, as a measuring job would have written them."""

from datetime import UTC, datetime
from pathlib import Path

from dynatree.ablation import Ablation
from dynatree.aggregate import aggregate
from dynatree.certificate import (
    Certificate,
    ConfigurationCheck,
    Control,
    Departure,
    GreedyCheck,
    OutputCheck,
    SampledCheck,
    noise_limit,
    write_certificate,
)
from dynatree.config import Config, parse_config
from dynatree.results import (
    Divergence,
    Method,
    Output,
    RoundRecord,
    RunRecord,
    RunResult,
    records_digest,
    repeated_8grams,
    totals,
    write_result,
)
from dynatree.specs import RunSpec

SOURCE = "5" * 64
CERTIFYING = "6" * 64
WEIGHTS = "a" * 64
PROVENANCE = {
    "device": {"type": "cpu", "name": "Test CPU", "threads": 2},
    "git": {"commit": "c" * 40, "dirty": False},
}
AUTOREGRESSIVE_RATE = 100.0


def config(
    prompts=4,
    runs=3,
    tables=None,
    labels=None,
    overrides=None,
    dtype="float32",
    sweeps=None,
    devices=None,
    experiments=None,
):
    """A study of the configurations `ar`, `linear` and `tree`; `linear2` is in no table."""
    labels = labels or {}
    configs = {
        "ar": {"strategy": "autoregressive"},
        "linear": {"strategy": "linear", "num_draft_tokens": 6},
        "linear2": {"strategy": "linear", "num_draft_tokens": 2},
        "tree": {"strategy": "tree", "depth": 4, "branch_factor": 8},
    }
    for name, label in labels.items():
        configs[name]["labels"] = {"forward": label, "backward": label}
    return parse_config(
        {
            "pair": "micro",
            "pairs": {
                "micro": {
                    "target": {"path": "/models/target"},
                    "draft": {"path": "/models/draft"},
                    "dtype": dtype,
                    "strategies": overrides or {},
                }
            },
            "workloads": {"words": {"prompts": [f"prompt {index}" for index in range(prompts)]}},
            "measure": {"workload": "words", "runs": runs, "max_new_tokens": 13},
            "configs": configs,
            "sweeps": sweeps or {},
            "devices": devices or {},
            "experiments": experiments or {},
            "tables": tables or {"forward": ["ar", "linear", "tree"], "backward": ["tree", "ar"]},
        }
    )


def result(spec: RunSpec, speedups=None, rounds=None, **changes) -> RunResult:
    """A result in which prompt `p` is decoded `speedups[p]` times as fast as autoregressively.

    `speedups` may also give a list for each prompt, with one entry for each run; `rounds[p]` are
    the rounds of every run of the strategy, each (nodes, depth, accepted).
    """
    prompts, runs = len(spec.prompts), spec.measure.runs
    speedups = speedups or [1.0] * prompts
    if not isinstance(speedups, list):
        speedups = [speedups] * prompts
    records = []
    for prompt in range(prompts):
        for run in range(runs):
            speedup = speedups[prompt]
            speedup = speedup[run] if isinstance(speedup, list) else speedup
            # The machine is slower in later runs; pairing must cancel that.
            rate = AUTOREGRESSIVE_RATE / (1 + run)
            records.append(record(spec, prompt, run, "autoregressive", rate))
            given = rounds and rounds[prompt]
            records.append(record(spec, prompt, run, "strategy", rate * speedup, given))
    return RunResult.model_validate(
        {
            "spec": spec,
            "spec_digest": spec.digest,
            "source_digest": SOURCE,
            "prompts_digest": "b" * 64,
            "pair_digest": WEIGHTS,
            "runtimes": {
                method: {"mode": "eager", "seconds": 0.0, "graphs": 0, "graph_bytes": 0}
                for method in ("autoregressive", "strategy")
            },
            "records": records,
            "records_digest": records_digest(records),
            "outputs": [output(prompt) for prompt in range(prompts)],
            "totals": totals([entry for entry in records if entry.method == "strategy"]),
            "peak_memory_bytes": 1_000_000,
            "provenance": PROVENANCE,
            "started": datetime(2026, 1, 1, tzinfo=UTC),
            "finished": datetime(2026, 1, 2, tzinfo=UTC),
            **changes,
        }
    )


def record(
    spec: RunSpec, prompt: int, run: int, method: Method, rate: float, given=None
) -> RunRecord:
    """One generation of 13 tokens, or of those of the `given` rounds, at `rate` per second."""
    drafts = method == "strategy" and spec.strategy.max_depth > 0
    # Six rounds of which each commits two tokens, or twelve of one token.
    rounds = (
        [RoundRecord(nodes=5, depth=4, accepted=1)] * 6
        if drafts
        else [RoundRecord(nodes=0, depth=0, accepted=0)] * 12
    )
    if given is not None:
        rounds = [
            RoundRecord(nodes=nodes, depth=depth, accepted=accepted)
            for nodes, depth, accepted in given
        ]
    tokens = 1 + sum(entry.accepted + 1 for entry in rounds)
    return RunRecord(
        prompt=prompt,
        run=run,
        method=method,
        first=(run + prompt) % 2 == (method == "strategy"),
        tokens=tokens,
        seconds=tokens / rate,
        first_token_seconds=0.01,
        phases={"prefill": 1.0, "draft": 1.0 * drafts, "verify": 2.0, "other": 0.0},
        target_forwards=len(rounds) + 1,
        draft_forwards=24 * drafts,
        rounds=rounds,
    )


def output(prompt: int, tokens=(1,) * 13, divergence=None) -> Output:
    """An output that equals autoregressive decoding unless a `divergence` is given."""
    return Output(
        prompt=prompt,
        prompt_tokens=3,
        tokens=list(tokens),
        repeated_8grams=repeated_8grams(tokens),
        equal=divergence is None,
        divergence=divergence,
    )


def unequal(prompt: int, gap: float) -> Output:
    """An output that leaves autoregressive decoding at its third token."""
    return output(prompt, divergence=Divergence(index=2, gap=gap))


def write(study: Config, folder: Path, speedups=None, changes=None) -> None:
    """Writes a result for every configuration; both mappings are by configuration name."""
    for name in study.measured:
        write_result(
            folder / study.pair / f"{name}.json",
            result(study.spec(name), (speedups or {}).get(name), **(changes or {}).get(name, {})),
        )


def certificate(study: Config, departures=None, names=None, **changes) -> Certificate:
    """A certificate in which output 0 of each configuration has the `departures` of its name.

    In 16 bits the noise of every control is 0.1.
    """
    spec = study.certificate_spec(names or study.measured)
    prompts = range(len(spec.prompts))
    exact = spec.models.dtype == "float32"
    controls = [
        Control(prompt=prompt, rows=5, noise=0.1, departure=None)
        for prompt in ([] if exact else prompts)
    ]
    checks = []
    for name in spec.strategies:
        outputs = [
            OutputCheck(prompt=prompt, end_tokens=[], tokens=13, departures=[])
            for prompt in prompts
        ]
        outputs[0] = outputs[0].model_copy(update={"departures": (departures or {}).get(name, [])})
        greedy = GreedyCheck(outputs=outputs, controls=controls, limit=noise_limit(controls))
        sampled = SampledCheck(temperature=1.0, top_p=1.0, outputs=len(prompts), departures=[])
        checks.append(ConfigurationCheck.of(name, greedy, sampled if exact else None))
    return Certificate.model_validate(
        {
            "passed": all(check.verdict != "failed" for check in checks),
            "spec": spec,
            "source_digest": CERTIFYING,
            "pair_digest": WEIGHTS,
            "configurations": checks,
            "provenance": PROVENANCE,
            "started": datetime(2026, 1, 1, tzinfo=UTC),
            "finished": datetime(2026, 1, 2, tzinfo=UTC),
            **changes,
        }
    )


def departure(shortfall: float) -> Departure:
    """A departure at the third token."""
    return Departure(index=2, gap=shortfall, shortfall=shortfall)


def ablation(folder: Path, study=None, speedups=None, changes=None, certified=None) -> Ablation:
    """The aggregation of synthetic results, and of the certificate `certified` if one is given."""
    study = study or config()
    write(study, folder, speedups, changes)
    if certified is None:
        return aggregate(study, folder, SOURCE)
    write_certificate(folder / "certificate.json", certified)
    return aggregate(study, folder, SOURCE, (folder / "certificate.json", CERTIFYING))
