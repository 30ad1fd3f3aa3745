"""The ablation section of the paper, from the aggregation and a Jinja template.

The template chooses its sentences by the verdict of each interval, so the text claims nothing
that was not measured. Every text from outside is escaped; a number must pass through one of the
filters below, which give it the same form everywhere.
"""

from collections.abc import Callable
from pathlib import Path

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


class Tex(str):
    """Text that is LaTeX already."""

    __slots__ = ()


def escape(text: str) -> Tex:
    """LaTeX that prints `text`; what pdfLaTeX cannot print appears as its code point."""
    # Spaces are joined because a line break would end a caption or a comment in the middle.
    return Tex(" ".join("".join(map(_character, word)) for word in text.split()))


def breakable(text: str) -> Tex:
    """As `escape`, and long words may be broken."""
    return Tex(
        " ".join(
            (r"\allowbreak{}" if len(word) > WIDE else "").join(map(_character, word))
            for word in text.split()
        )
    )


def render(ablation: Ablation, template: Path) -> str:
    """The LaTeX of the ablation section.

    Raises:
        ResultError: the template is missing, is not valid, or uses a name that does not exist.
    """
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
        finalize=_finalize,
    )
    environment.filters |= {
        "breakable": breakable,
        "change": _change,
        "certified": _certified,
        "count": _count,
        "identifier": Tex,
        "interval": _interval,
        "size": _size,
        "logit": _logit,
        "range": _range,
        "ratio": _ratio,
        "share": _share,
        "stacked": _stacked,
        "tuning": _tuning,
    }
    configurations = ablation.configurations
    try:
        return environment.get_template(template.name).render(
            ablation=ablation,
            setting=ablation.setting,
            facts=ablation.facts,
            candidates=ablation.candidates,
            marks=lambda table: _marks(ablation, table),
            backward=BACKWARD,
            commits=sorted({_commit(facts) for facts in configurations}),
            gap=max(facts.largest_gap or 0.0 for facts in configurations),
            outputs=len(configurations) * ablation.setting.prompts,
            threads=sorted({facts.threads for facts in configurations}),
            unequal=sum(facts.unequal_prompts for facts in configurations),
        )
    except TemplateError as error:
        raise ResultError(
            f"{template}: {type(error).__name__}: {error}; fix the template"
        ) from None


def _character(character: str) -> str:
    if character in _SPECIAL:
        return _SPECIAL[character]
    if " " <= character <= "~" or character in _LETTERS:
        return character
    return f"U+{ord(character):04X}"


def _finalize(value: object) -> str:
    """What `<< value >>` prints; a float without a form is a mistake in the template."""
    if isinstance(value, Tex):
        return value
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, int):
        return str(value)
    raise TemplateRuntimeError(f"no form for {value}: pass it through a filter")


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
    return Tex(f"${_brackets(estimate.interval, form)}$")


def _stacked(estimate: Estimate | None, form: str) -> Tex:
    """A table cell: the value, and below it the interval in small print."""
    if estimate is None:
        return Tex("--")
    lines = [f"${_FORMS[form](estimate.value)}$"]
    if estimate.interval is not None:
        lines.append(rf"{{\scriptsize ${_brackets(estimate.interval, form)}$}}")
    return Tex(r"\begin{tabular}[t]{@{}r@{}}" + r"\\".join(lines) + r"\end{tabular}")


def _brackets(interval: Interval, form: str) -> str:
    return f"[{_FORMS[form](interval.low)}, {_FORMS[form](interval.high)}]"


_FORMS: dict[str, Callable[[float], Tex]] = {"rate": _rate, "ratio": _ratio, "change": _signed}


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


def _marks(ablation: Ablation, table: Table) -> dict[str, Tex]:
    """A footnote mark for each different tuning in `table`."""
    tunings = [_tuning(ablation.facts(row.configuration).overrides) for row in table.rows]
    symbols = (r"\dagger", r"\ddagger", r"\S", r"\P")
    return {
        tuning: Tex(f"$^{{{symbols[index % 4] * (index // 4 + 1)}}}$")
        for index, tuning in enumerate(dict.fromkeys(filter(None, tunings)))
    }


def _commit(facts: ConfigurationFacts) -> str:
    if facts.commit is None:
        return "an unknown commit"
    return facts.commit + (" with uncommitted changes" if facts.dirty else "")
