"""The README's tables of measured results, so that no number in it is typed by hand."""

import re
from pathlib import Path

from dynatree.ablation import Ablation, Estimate, read_ablation
from dynatree.errors import ResultError

REFERENCE = re.compile(
    r"(<!-- reference:(?P<name>[\w-]+) -->\n).*?(<!-- reference:end -->)", re.DOTALL
)
"""What stands between these markers is made from the section of that name."""

BENCHMARK = re.compile(r"(<!-- bench:(?P<name>[\w./-]+) -->\n).*?(<!-- bench:end -->)", re.DOTALL)
"""What stands between these markers is the Markdown that a benchmark wrote under that path."""


def with_reference(readme: str, folder: Path) -> str:
    """`readme` with the text between its markers made from the aggregates in `folder`.

    Raises:
        ResultError: there are no markers, or a named section has no aggregate.
    """
    if not REFERENCE.search(readme):
        raise ResultError("README.md: has no <!-- reference:ablation --> marker; put it back")

    def section(match: re.Match[str]) -> str:
        name = match["name"]
        text = reference(read_ablation(folder / f"{name}.json"), f"{folder.as_posix()}/{name}.png")
        return f"{match[1]}{text}\n{match[3]}"

    return REFERENCE.sub(section, readme)


def reference(ablation: Ablation, figure: str) -> str:
    """The measured table in Markdown, and its figure, which lies beside the aggregate."""
    folder = figure.rpartition("/")[0]
    setting = ablation.setting
    threads = sorted({facts.threads for facts in ablation.configurations})
    unequal = sum(facts.unequal_prompts for facts in ablation.configurations)
    outputs = setting.prompts * len(ablation.configurations)
    labels: dict[str, list[str]] = {}
    for table in ablation.tables:
        for row in table.rows:
            names = labels.setdefault(row.configuration, [])
            if row.label not in names:
                names.append(row.label)
    lines = [
        "| configuration | strategy | tokens/s | speedup over AR | tokens per round |",
        "|---|---|---|---|---|",
    ]
    for facts in ablation.configurations:
        called = f" ({'; '.join(labels[facts.name])})" if facts.name in labels else ""
        lines.append(
            f"| `{facts.name}`{called} | {facts.description} "
            f"| {facts.throughput.value:.0f} | {_with_interval(facts.speedup)} "
            f"| {facts.tokens_per_round:.2f} |"
        )
    lines += [
        "",
        f"Pair `{setting.pair}` in {setting.dtype} on {setting.device}, "
        f"{' or '.join(map(str, threads))} threads; {setting.prompts} prompts, "
        f"{setting.runs} timed runs, {setting.max_new_tokens} new tokens; medians, speedups with "
        f"95 % intervals over prompts. {unequal} of {outputs} outputs differ from autoregressive "
        f"decoding. Results and provenance: [`{folder}/`]({folder}).",
        "",
        f"![Throughput and speedup of each configuration]({figure})",
    ]
    return "\n".join(lines)


def with_benchmarks(readme: str, folder: Path) -> str:
    """`readme` with the tables of the benchmarks that it names, from their files in `folder`.

    Raises:
        ResultError: a named benchmark has no file.
    """

    def table(match: re.Match[str]) -> str:
        path = folder / f"{match['name']}.md"
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ResultError(f"README.md shows {path}, which cannot be read: {error}") from None
        return f"{match[1]}{text}{match[3]}"

    return BENCHMARK.sub(table, readme)


def update(readme: Path, reference: Path, benchmarks: Path) -> str:
    """The text that `readme` should have, from the results in the two folders."""
    text = with_reference(readme.read_text(encoding="utf-8"), reference)
    return with_benchmarks(text, benchmarks)


def _with_interval(estimate: Estimate) -> str:
    text = f"{estimate.value:.2f}"
    if estimate.interval is not None:
        text += f" [{estimate.interval.low:.2f}, {estimate.interval.high:.2f}]"
    return text
