"""The texts of the paper, from measured facts and Jinja templates.

The templates choose their sentences by the verdict of each interval, so the text claims nothing
that was not measured. Every text from outside is escaped; a number must pass through one of the
filters below, which give it the same form everywhere, and must know the place of a result file
that it comes from (`dynatree.trace`). A page lists these places beside its text.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import (
    Environment,
    FileSystemLoader,
    StrictUndefined,
    TemplateError,
    TemplateRuntimeError,
)

from dynatree.ablation import (
    BACKWARD,
    Ablation,
    ConfigurationFacts,
    Estimate,
    Interval,
    Override,
    PositionRounds,
    Table,
)
from dynatree.errors import ResultError
from dynatree.experiments import Experiment, PointFacts, axis_words, place_words, value_words
from dynatree.experiments import Value as GridValue
from dynatree.facts import Fact
from dynatree.trace import (
    Source,
    TracedText,
    counted,
    distinct,
    located,
    sources_of,
    traced,
)

WIDE = 14
"""A longer word of unknown text may be broken anywhere, so that no name overflows its column."""

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # At the start of a table row these would be read as arguments of the row break before it.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{GREEK SMALL LETTER MU}": r"$\mu$",
    "\N{MICRO SIGN}": r"$\mu$",
    "\N{LESS-THAN OR EQUAL TO}": r"$\leq$",
    "\N{GREATER-THAN OR EQUAL TO}": r"$\geq$",
    "\N{EN DASH}": "--",
    "\N{EM DASH}": "---",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
}

# Letters that pdfLaTeX prints in its default encoding.
_LETTERS = frozenset("ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝßàáâãäåæçèéêëìíîïñòóôõöøùúûüýÿ")


# Around what a template prints, while it is rendered; `escape` lets none of these through.
_BEGIN, _PRINTED, _END = "\ue000", "\ue001", "\ue002"
_MARKED = re.compile(f"{_BEGIN}(\\d+){_PRINTED}(.*?){_END}", re.DOTALL)


class Tex(TracedText):
    """Text that is LaTeX already."""


class Shown(Fact):
    """What a page prints at `line` and `column` (from 1), and the places that it comes from."""

    line: int
    column: int
    text: str
    sources: list[Source]


class Page(NamedTuple):
    """A rendered text, and every value in it in order."""

    text: str
    shown: list[Shown]


def escape(text: str) -> Tex:
    """LaTeX that prints `text`; what pdfLaTeX cannot print appears as its code point."""
    # Spaces are joined because a line break would end a caption or a comment in the middle.
    escaped = " ".join("".join(map(_character, word)) for word in text.split())
    return traced(Tex(escaped), sources_of(text))


def breakable(text: str) -> Tex:
    """As `escape`, and long words may be broken, though not before their last character."""
    words = []
    for word in text.split():
        characters = [_character(character) for character in word]
        if len(word.rstrip(",.;:")) > WIDE:
            characters[:-2] = [f"{part}\\allowbreak{{}}" for part in characters[:-2]]
        words.append("".join(characters))
    return traced(Tex(" ".join(words)), sources_of(text))


def render(ablation: Ablation, template: Path, file: str) -> Page:
    """A section of the paper: tables and sentences about one aggregation.

    Args:
        file: the result file that `ablation` was read from.

    Raises:
        ResultError: as `fill`.
    """
    ablation = located(ablation, file)
    configurations = ablation.configurations
    outputs = counted(configurations) * ablation.setting.prompts

    def candidates(sweep: str) -> list[ConfigurationFacts]:
        best_of = next(entry.best_of for entry in ablation.sweeps if entry.name == sweep)
        return traced(ablation.candidates(sweep), sources_of(best_of))

    return fill(
        template,
        {
            "ablation": ablation,
            "setting": ablation.setting,
            "file": Path(file).name,
            "facts": ablation.facts,
            "candidates": candidates,
            "marks": lambda table: _marks(ablation, table),
            "backward": BACKWARD,
            "commits": distinct(commit(facts) for facts in configurations),
            "gap": max(facts.largest_gap or 0.0 for facts in configurations),
            "outputs": outputs,
            "threads": distinct(facts.threads for facts in configurations),
            "unequal": sum(facts.unequal_prompts for facts in configurations),
        },
    )


def render_experiment(experiment: Experiment, template: Path, file: str) -> Page:
    """What the paper says of an experiment; see `render`."""
    experiment = located(experiment, file)
    points, measured = experiment.shown, experiment.points

    def many(found: Sequence[PointFacts]) -> int:
        return counted(found, *(point.name for point in found))

    def of(verdict: str, found: Sequence[PointFacts]) -> int:
        """How many of the changes have this verdict, which all of them decide."""
        fitting = [point for point in found if point.change and point.change.against(0) == verdict]
        return traced(len(fitting), sources_of(*(point.change for point in found)))

    def largest(found: Sequence[PointFacts]) -> PointFacts:
        return max(found, key=lambda point: point.speedup.value)

    def errors(found: Sequence[PointFacts]) -> list[float]:
        """How far each prediction is from the measured speedup, relative to it."""
        return [
            abs(point.predicted.speedup / point.speedup.value - 1)
            for point in found
            if point.predicted
        ]

    return fill(
        template,
        {
            "experiment": experiment,
            "file": Path(file).name,
            "points": points,
            "places": [found for _, found in experiment.places],
            "rows": experiment.rows,
            "many": many,
            "of": of,
            "distinct": lambda found, name: distinct(getattr(point, name) for point in found),
            "having": lambda found, axis: [point for point in found if axis in point.values],
            "largest": largest,
            "fastest": largest(points),
            "slowest": min(points, key=lambda point: point.speedup.value),
            "foretold_best": lambda found: max(found, key=lambda point: point.predicted.speedup),
            "mean_error": lambda found: sum(errors(found)) / len(found),
            "largest_error": lambda found: traced(max(errors(found)), sources_of(*errors(found))),
            "commits": distinct(commit(facts) for facts in measured),
            "outputs": sum(facts.prompts for facts in measured),
            "unequal": sum(facts.unequal_prompts for facts in measured),
            "single": all(point.prompts == 1 for point in points),
        },
    )


def fill(template: Path, names: Mapping[str, object]) -> Page:
    """Renders a template.

    Args:
        names: what the template may use; `located` facts, so that values know their places.

    Raises:
        ResultError: the template is missing, is not valid, uses a name that does not exist, or
            prints a number without a form or without a source.
    """
    printed: list[tuple[Source, ...]] = []

    def finalize(value: object) -> str:
        text = _printed(value)
        if not text.sources:
            return text
        printed.append(text.sources)
        return f"{_BEGIN}{len(printed) - 1}{_PRINTED}{text}{_END}"

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        finalize=finalize,
    )
    environment.filters |= {name: _tracing(form) for name, form in _FILTERS.items()}
    environment.filters["counted"] = counted
    try:
        return _page(environment.get_template(template.name).render(names), printed)
    except TemplateError as error:
        raise ResultError(
            f"{template}: {type(error).__name__}: {error}; fix the template"
        ) from None


def commit(facts: ConfigurationFacts) -> str:
    """The commit that measured a configuration, in words."""
    if facts.commit is None:
        return "an unknown commit"
    text = facts.commit + (" with uncommitted changes" if facts.dirty else "")
    return traced(text, sources_of(facts.commit))


def _page(marked: str, printed: list[tuple[Source, ...]]) -> Page:
    """The text without its marks, and what stood between them."""
    text, shown, end = "", [], 0
    for match in _MARKED.finditer(marked):
        text += marked[end : match.start()]
        end = match.end()
        line, column = text.count("\n") + 1, len(text) - text.rfind("\n")
        sources = list(printed[int(match[1])])
        shown.append(Shown(line=line, column=column, text=match[2], sources=sources))
        text += match[2]
    return Page(text + marked[end:], shown)


def _tracing(form: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose result has the places of its arguments, unless it has its own."""

    @wraps(form)
    def filtered(*arguments: Any) -> Any:
        result = form(*arguments)
        return result if sources_of(result) else traced(result, sources_of(*arguments))

    return filtered


def _character(character: str) -> str:
    if character in _SPECIAL:
        return _SPECIAL[character]
    if " " <= character <= "~" or character in _LETTERS:
        return character
    return f"U+{ord(character):04X}"


def _printed(value: object) -> Tex:
    """What `<< value >>` prints; a number without a form or a source is the template's mistake."""
    if isinstance(value, Tex):
        return value
    if isinstance(value, str):
        return escape(value)
    if not isinstance(value, int):
        raise TemplateRuntimeError(f"no form for {value}: pass it through a filter")
    if not sources_of(value):
        raise TemplateRuntimeError(
            f"no source for {value}: print numbers of results, or pass it through layout"
        )
    return traced(Tex(int(value)), sources_of(value))


def _rate(value: float) -> Tex:
    """Tokens per second."""
    return Tex(f"{value:.1f}")


def _ratio(value: float | None) -> Tex:
    return Tex("--" if value is None else f"{value:.2f}")


def _share(value: float | None) -> Tex:
    """Per cent without the sign, which stands in a column's head or behind the number."""
    return Tex("--" if value is None else f"{100 * value:.1f}")


def _range(part: PositionRounds) -> Tex:
    """A range of output positions in as few characters as a column's head has room for."""
    if part.stop is None:
        return Tex(rf"$\geq{part.start}$")
    return Tex(f"{part.start}--{part.stop - 1}" if part.start else f"$<{part.stop}$")


def _logit(value: float) -> Tex:
    return Tex(f"{value:.3f}")


def _size(change: Estimate) -> Tex:
    """How large a change is, for sentences that say its direction in words."""
    if change.interval is None:
        raise TemplateRuntimeError("a change without interval has no direction to put in words")
    low, high = sorted((abs(change.interval.low), abs(change.interval.high)))
    return Tex(rf"{100 * abs(change.value):.1f}\,\% $[{100 * low:.1f}, {100 * high:.1f}]$")


def _change(value: float) -> Tex:
    """A relative change with its sign."""
    return Tex(rf"${_signed(value)}$\,\%")


def _signed(value: float) -> Tex:
    percent = round(100 * value, 1)
    # A change that rounds to nothing has no sign.
    return Tex(f"{percent:+.1f}" if percent else "0.0")


def _interval(estimate: Estimate, form: str) -> Tex:
    """The interval in brackets, in the unit of its value, or that there is none."""
    if estimate.interval is None:
        return Tex("(a single prompt, no interval)")
    return traced(Tex(f"${_brackets(estimate.interval, form)}$"), sources_of(estimate.interval))


def _stacked(estimate: Estimate | None, form: str) -> Tex:
    r"""A table cell: the value, and below it the interval in small print (`\measured`)."""
    if estimate is None:
        return Tex("--")
    value = _FORMS[form](estimate.value)
    if estimate.interval is None:
        return Tex(f"${value}$")
    return Tex(rf"\measured{{{value}}}{{{_brackets(estimate.interval, form)}}}")


def _brackets(interval: Interval, form: str) -> str:
    return f"[{_FORMS[form](interval.low)}, {_FORMS[form](interval.high)}]"


def _milliseconds(value: float | None) -> Tex:
    return Tex("--" if value is None else f"{1000 * value:.1f}")


def _mebibytes(value: int) -> Tex:
    return Tex(f"{value / 2**20:.0f}")


def _minutes(seconds: float) -> Tex:
    return Tex(f"{seconds / 60:.0f}")


def _parameters(value: int) -> Tex:
    """A number of parameters in words."""
    if value >= 10**9:
        return Tex(f"{value / 10**9:.1f} billion")
    return Tex(f"{value / 10**6:.1f} million" if value >= 10**5 else f"{value}")


def _listed(values: list[str]) -> str:
    """Texts that may differ from run to run: `2.13.0`, `2.13.0 or 2.12.1`."""
    return " or ".join(values)


_FORMS: dict[str, Callable[[float], Tex]] = {
    "rate": _rate,
    "ratio": _ratio,
    "change": _signed,
    "milliseconds": _milliseconds,
}


def _count(numbers: int | list[int], noun: str) -> str:
    """`1 prompt`, `8 prompts`, `2 or 4 threads`."""
    listed = [numbers] if isinstance(numbers, int) else numbers
    return f"{' or '.join(map(str, listed))} {noun}{'' if listed == [1] else 's'}"


def _certified(lossless: str | None) -> str:
    """A table cell: what the certificate found; see `dynatree.certificate`."""
    return {"equal": "exact", "noise": "rounding", None: "--"}[lossless]


def _tuning(overrides: list[Override]) -> str:
    """What the pair changed, in words; empty when nothing."""
    return ", ".join(
        f"{entry.key.replace('_', ' ')} {entry.value}"
        + (f" instead of {entry.instead_of}" if entry.instead_of is not None else "")
        for entry in overrides
    )


def _axis(name: str) -> Tex:
    """A field of a grid in words."""
    return escape(axis_words(name))


def _value(value: GridValue) -> Tex:
    """A value of a field of a grid."""
    return traced(breakable(value_words(value)), sources_of(value))


def _place(values: dict[str, GridValue]) -> Tex:
    """A place in a grid in words."""
    return traced(breakable(place_words(values)), sources_of(*values.values()))


def _marks(ablation: Ablation, table: Table) -> dict[str, Tex]:
    """A footnote mark for each different tuning in `table`."""
    overrides = [ablation.facts(row.configuration).overrides for row in table.rows]
    tunings = [traced(_tuning(entry), sources_of(entry)) for entry in overrides]
    symbols = (r"\dagger", r"\ddagger", r"\S", r"\P")
    return {
        tuning: Tex(f"$^{{{symbols[index % 4] * (index // 4 + 1)}}}$")
        for index, tuning in enumerate(dict.fromkeys(filter(None, tunings)))
    }


_FILTERS: dict[str, Callable[..., Any]] = {
    "axis": _axis,
    "breakable": breakable,
    "change": _change,
    "certified": _certified,
    "count": _count,
    "interval": _interval,
    # What is no value: labels, names of macros and files, numbers of rows and columns.
    "layout": lambda value: Tex(value),
    "listed": _listed,
    "logit": _logit,
    "mebibytes": _mebibytes,
    "milliseconds": _milliseconds,
    "minutes": _minutes,
    "parameters": _parameters,
    "place": _place,
    "range": _range,
    "rate": _rate,
    "ratio": _ratio,
    "share": _share,
    "signed": _signed,
    "size": _size,
    "stacked": _stacked,
    "tuning": _tuning,
    "value": _value,
}
