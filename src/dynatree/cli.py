"""The `dynatree` command: decode, measure, certify, compare results and trace values."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dynatree.config import load_config, parse_config
from dynatree.devices import flagged
from dynatree.errors import reporting
from dynatree.jobs import running
from dynatree.progress import Progress, certifying, measuring
from dynatree.specs import RunSpec

typer_app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

ConfigFile = Annotated[Path, typer.Option("--config", help="The configuration file.")]
PairName = Annotated[str | None, typer.Option("--pair", help="A pair; default: the file's.")]
ConfigName = Annotated[str, typer.Option("--name", help="A configuration of the file.")]
Depth = Annotated[int | None, typer.Option(help="Tree depth, instead of the configuration's.")]
Branch = Annotated[int | None, typer.Option(help="Branch factor, likewise.")]
Threshold = Annotated[float | None, typer.Option(help="Prune threshold in [0, 1), likewise.")]
Budget = Annotated[int | None, typer.Option(help="Node budget, likewise.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")]


def app() -> None:
    """Entry point of the `dynatree` command."""
    reporting(lambda: typer_app(standalone_mode=False))


@typer_app.command()
def generate(
    prompt: str,
    name: ConfigName = "dynatree",
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 200,
    config: ConfigFile = Path("config.yaml"),
    pair: PairName = None,
    depth: Depth = None,
    branch: Branch = None,
    threshold: Threshold = None,
    budget: Budget = None,
    threads: Threads = None,
    temperature: Annotated[float, typer.Option(help="Sample at this; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this much probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    sampling: Annotated[str, typer.Option(help="Mode: coupled or rejection.")] = "coupled",
) -> None:
    """Decodes PROMPT and streams the text as rounds commit it."""
    spec = _spec(config, pair, name, depth, branch, threshold, budget, max_new_tokens=tokens)
    spec = spec.model_copy(update={"prompts": [prompt]})
    # torch and Transformers take seconds to import; a wrong option should not wait for them.
    from dynatree.decode import Decoder, Stats
    from dynatree.pairs import load_models
    from dynatree.sampling import Sampling
    from dynatree.workloads import encode_prompts

    how = Sampling.checked(
        temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, mode=sampling
    )
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    models = load_models(spec.pair, spec.models)
    ids = encode_prompts(spec, models)[0]
    length = len(ids) + tokens
    decoder = Decoder(models.target, models.draft, spec.strategy, length, spec.models.runtime, how)
    stats, generated, shown = Stats(), [], ""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(prompt, end="", style="bold")
    for chunk in decoder.stream(ids, tokens, models.tokenizer.eos_token_id, stats):
        generated += chunk
        # Bytes of one character may be split over tokens: text is shown once it is whole.
        text = models.tokenizer.decode(generated, skip_special_tokens=True)
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        console.print(whole[len(shown) :], end="")
        shown = whole
    rounds = len(stats.rounds)
    console.print(
        f"\n\n{len(generated)} tokens in {sum(stats.seconds.values()):.2f} s, {rounds} rounds, "
        f"{(len(generated) - 1) / rounds if rounds else 0:.2f} tokens per round",
        style="dim",
    )


@typer_app.command()
def measure(
    name: ConfigName = "dynatree",
    tokens: Annotated[int | None, typer.Option(help="New tokens per prompt.")] = None,
    runs: Annotated[int | None, typer.Option(help="Timed passes over the prompts.")] = None,
    config: ConfigFile = Path("config.yaml"),
    pair: PairName = None,
    depth: Depth = None,
    branch: Branch = None,
    threshold: Threshold = None,
    budget: Budget = None,
    threads: Threads = None,
    out: Annotated[Path | None, typer.Option(help="Also write the result file here.")] = None,
) -> None:
    """Measures one configuration against autoregressive decoding and prints the outcome."""
    spec = _spec(
        config, pair, name, depth, branch, threshold, budget, max_new_tokens=tokens, runs=runs
    )
    console = Console()
    with running(spec.models.device, threads, f"measure {name}") as lease:
        # Only now: what loads models also looks for GPUs.
        from dynatree.measure import measure as measure_spec
        from dynatree.pairs import load_models
        from dynatree.results import write_result

        models = load_models(spec.pair, spec.models)
        with Progress(name, "generations") as shown:
            result = measure_spec(spec, models, measuring(shown, spec.measure))
        facts = flagged(result.provenance, lease.shared_with())
    result = result.model_copy(update={"provenance": facts})
    speeds = {
        method: sum(record.tokens for record in result.of(method))
        / sum(record.seconds for record in result.of(method))
        for method in ("autoregressive", "strategy")
    }
    table = Table("", "", show_header=False)
    table.add_row("strategy", spec.strategy.describe())
    table.add_row("tokens/s", f"{speeds['strategy']:.1f}")
    table.add_row("autoregressive tokens/s", f"{speeds['autoregressive']:.1f}")
    table.add_row("speedup", f"{speeds['strategy'] / speeds['autoregressive']:.2f}")
    table.add_row("tokens per round", f"{result.totals.tokens_per_round:.2f}")
    equal = sum(output.equal for output in result.outputs)
    table.add_row("outputs equal to AR", f"{equal} of {len(result.outputs)}")
    console.print(table)
    if out is not None:
        write_result(out, result)
        console.print(f"written to {out}")


@typer_app.command()
def certify(
    configs: Annotated[
        str | None, typer.Option(help="Configurations, with commas; default: those of all tables.")
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="Compare the first prompts only.")] = None,
    tokens: Annotated[int | None, typer.Option(help="New tokens per prompt.")] = None,
    config: ConfigFile = Path("config.yaml"),
    pair: PairName = None,
    threads: Threads = None,
    out: Annotated[Path, typer.Option(help="Where the certificate goes.")] = Path(
        "results/certificate.json"
    ),
) -> None:
    """Compares configurations with plain `generate`; fails where a difference is no rounding."""
    data: dict[str, Any] = load_config(config).model_dump()
    data["pair"] = pair or data["pair"]
    data["certificate"] |= _given({"prompts": prompts, "max_new_tokens": tokens})
    study = parse_config(data, "command line")
    names = study.measured if configs is None else configs.split(",")
    spec = study.certificate_spec(names)
    with running(spec.models.device, threads, "certify"):
        from dynatree.certificate import write_certificate
        from dynatree.certify import certify as certify_spec
        from dynatree.pairs import load_models

        models = load_models(spec.pair, spec.models)
        with Progress("certificate", "configurations") as shown:
            certificate = certify_spec(spec, models, certifying(shown, spec))
    write_certificate(out, certificate)
    certificate.require()
    typer.echo(f"lossless; certificate written to {out}")


@typer_app.command()
def trace(
    file: Annotated[Path, typer.Argument(help="A text or figure, such as paper/ablation.tex.")],
) -> None:
    """Says for every value in FILE which place of which result file it comes from."""
    from dynatree.manifest import describe

    for line in describe(file):
        typer.echo(line)


@typer_app.command()
def compare(
    one: Annotated[Path, typer.Argument(help="A run result, or an aggregation.", metavar="A")],
    other: Annotated[Path, typer.Argument(help="Another of that kind.", metavar="B")],
) -> None:
    """Says whether two results, of two machines or commits, differ beyond noise."""
    # pandas and scipy take a moment to import as well.
    from dynatree.compare import compare_files

    for line in compare_files(one, other).lines():
        typer.echo(line)


@typer_app.command()
def doctor(
    config: ConfigFile = Path("config.yaml"),
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for a program.")] = False,
) -> None:
    """Shows what a bug report needs and finds common trouble; exits with 1 if a run would fail."""
    from dynatree.doctor import diagnose, lines

    report = diagnose(config, Path.cwd())
    typer.echo(report.model_dump_json(indent=1) if as_json else "\n".join(lines(report)))
    if not report.healthy:
        raise SystemExit(1)


@typer_app.command()
def plan(
    targets: Annotated[list[str] | None, typer.Argument(help="Files or rules to make.")] = None,
) -> None:
    """Says which jobs `snakemake TARGETS` would run, why, and for how long."""
    # Snakemake takes a second to import.
    from dynatree.plan import lines, planned

    for line in lines(planned(targets or [])):
        typer.echo(line)


def _spec(
    path: Path,
    pair: str | None,
    name: str,
    depth: int | None,
    branch: int | None,
    threshold: float | None,
    budget: int | None,
    **measure: int | None,
) -> RunSpec:
    """The spec of configuration `name` with the values given on the command line in place."""
    strategy = {
        "depth": depth,
        "branch_factor": branch,
        "prune_threshold": threshold,
        "node_budget": budget,
    }
    data: dict[str, Any] = load_config(path).model_dump()
    data["pair"] = pair or data["pair"]
    settings = data["pairs"].get(data["pair"])
    if settings is not None:
        # The command line is the last word: over the file, and over the pair's own values.
        settings["measure"] |= _given(measure)
        settings["strategies"].setdefault(name, {}).update(_given(strategy))
        if not settings["strategies"][name]:
            del settings["strategies"][name]
    return parse_config(data, "command line").spec(name)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
