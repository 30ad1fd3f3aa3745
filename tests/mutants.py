"""Mutants of configurations and results: what an editor, a disk or an attacker makes of a file."""

import json
import pickle
import random
from datetime import date

NUMBERS = (
    *(0, 1, -1, 2, -0.0, 0.5, -0.5, 1.0, 1e308, -1e308, 5e-324, 3.4e38, 2**31, 2**63, -(2**63)),
    *(2**64, 10**30, -(10**30), 10**400, float("inf"), float("-inf"), float("nan")),
)
TEXTS = (
    *("", " ", "\0", "\n", "a\nb", "../../etc/passwd", "/etc/passwd", "a/b", "..", ".", "-", "--x"),
    *("$(touch owned)", "`id`", "; rm -rf x", "'\"", "{name}", "{}", "%s", "\\input{/etc/passwd}"),
    *("&%_#~$^{}\\", "</script><script>", "\ud800", "\udfff", "\u202e\u200b", "e\u0301" * 40),
    *(
        "\N{FULLWIDTH SOLIDUS}",
        "\N{ONE DOT LEADER}" * 2,
        "\N{ARABIC-INDIC DIGIT THREE}",
        "x" * 5000,
    ),
    *("null", "true", "1", "1e3", "NaN", "~", "auto", "cuda:0", "autoregressive", "embedded"),
)
TOKENS = (
    *(b"&a ", b"*a", b"<<: *a", b"!!python/object/apply:os.system [id]", b"!!bool x", b"!!int ''"),
    *(
        b"!!timestamp x",
        b"!!binary =",
        b"!!set {a, a}",
        b"!!float z",
        b"---\n",
        b"...\n",
        b"%YAML 9",
    ),
    *(
        b"\t",
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"'",
        b":",
        b"- ",
        b"? ",
        b"| ",
        b"> ",
        b"#",
        b"@",
        b"`",
    ),
    *(
        b",",
        b"\\",
        b"\x00",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\r\n",
        b"\xe2\x80\xa8",
    ),
    *(b"null", b"true", b"-", b"1e999", b"NaN", b"-Infinity", b"0x" + b"f" * 6000, b"9" * 5000),
    *(b"\\ud800", b"\\u0000", b"[" * 3000, b"{a: " * 300, b"a: &b [*b]\n", b"yes", b"1:60:60"),
)


class Mutator:
    """Makes mutants of parsed data and of text, each from its own number: the same every time.

    Attributes:
        data: what mutants are made of: dicts, lists, texts, numbers, None.
    """

    def __init__(self, data):
        self.data = data
        self._pickled = pickle.dumps(data)

    def structural(self, seed):
        """The data with one to three changes at random places."""
        rng = random.Random(seed)
        data = pickle.loads(self._pickled)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            places = list(_places(data))
            if not places:
                break
            container, key = rng.choice(places)
            rng.choice(CHANGES)(rng, container, key, places)
        return data

    @staticmethod
    def text(whole, seed):
        """The bytes `whole` with one to three changes."""
        rng = random.Random(seed)
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            at = rng.randrange(len(data) + 1)
            end = min(len(data), at + rng.choice((1, 2, 5, 40, 200)))
            match rng.randrange(7):
                case 0 if at < len(data):
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    del data[at:end]
                case 2:
                    data[at:at] = data[at:end]
                case 3:
                    del data[at:]
                case 4:
                    data[at:end] = rng.choice(TOKENS)
                case 5:
                    lines = data.split(b"\n")
                    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
                    lines[one], lines[other] = lines[other], lines[one]
                    data[:] = b"\n".join(lines)
                case _:
                    data[at:at] = rng.choice(TOKENS)
        return bytes(data)


def bombs():
    """YAML of a few lines that stands for more than memory holds, or for itself."""
    for opening, closing, entry in (("[", "]", "{}"), ("{", "}", "k{}: {}")):
        lines = [f"a0: &a0 {opening}{'x: y' if opening == '{' else 'x'}{closing}"]
        for level in range(1, 30):
            parts = (
                entry.format(*([f"*a{level - 1}"] if opening == "[" else [at, f"*a{level - 1}"]))
                for at in range(9)
            )
            lines.append(f"a{level}: &a{level} {opening}{', '.join(parts)}{closing}")
        for key in ("pairs", "configs", "tables", "workloads", "measure", "experiments", "a30"):
            yield "\n".join([*lines, f"{key}: *a29"])
    yield "pairs: &a {a: *a}"
    yield "tables: &a [*a]"
    yield "configs: &a {x: {labels: *a, strategy: tree}}"
    yield "pair: " + "[" * 100_000
    yield "pair: " + "{a: " * 300 + "1" + "}" * 300


def _places(data):
    """Every (container, key) below `data`."""
    stack = [data]
    while stack:
        container = stack.pop()
        keys = container.keys() if isinstance(container, dict) else range(len(container))
        for key in keys:
            yield container, key
            if isinstance(container[key], dict | list):
                stack.append(container[key])


def _value(rng):
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(TEXTS)
    return rng.choice(
        (None, True, False, [], {}, [[]], [None], {"a": 1}, date(2026, 1, 1), [{}] * 3)
    )


def _replace(rng, container, key, places):
    container[key] = _value(rng)


def _delete(rng, container, key, places):
    if isinstance(container, dict):
        container.pop(key, None)
    elif key < len(container):
        del container[key]


def _rename(rng, container, key, places):
    if isinstance(container, dict) and key in container:
        other = rng.choice((*TEXTS, None, 1, True, *map(str, container)))
        container[other] = container.pop(key)
    else:
        _replace(rng, container, key, places)


def _repeat(rng, container, key, places):
    if isinstance(container, list):
        container.extend(container[:1] * rng.choice((1, 2, 60)))
    else:
        container[rng.choice(TEXTS)] = container.get(key)


def _exchange(rng, container, key, places):
    other, at = rng.choice(places)
    # Neither inside of the other: a copy, so that no cycle comes of it.
    try:
        one, two = pickle.dumps(container[key]), pickle.dumps(other[at])
    except (KeyError, IndexError):
        return
    container[key], other[at] = pickle.loads(two), pickle.loads(one)


def _wrap(rng, container, key, places):
    if key in (container if isinstance(container, dict) else range(len(container))):
        value = container[key]
        container[key] = rng.choice(([value], {"a": value}, [value] * 3, {str(key): value}))


def _retype(rng, container, key, places):
    if key not in (container if isinstance(container, dict) else range(len(container))):
        return
    value = container[key]
    match value:
        case bool():
            container[key] = rng.choice((int(value), str(value), not value))
        case int() | float():
            options = [str(value), -value, value + 1, value * 2, value + 0.5, bool(value), [value]]
            container[key] = rng.choice(options)
        case str():
            container[key] = rng.choice(
                (value[:-1], value + "x", value.upper(), [value], len(value))
            )
        case dict():
            container[key] = rng.choice((list(value), list(value.values()), str(value)))
        case list():
            container[key] = rng.choice(
                (value[::-1], value[:-1], dict(enumerate(value)), str(value))
            )


CHANGES = (_replace, _replace, _replace, _delete, _rename, _repeat, _exchange, _wrap, _retype)


def as_json(data):
    """JSON of a mutant, keys made to text; whatever has no JSON is written as its text."""

    def plain(value):
        if isinstance(value, dict):
            return {str(key): plain(entry) for key, entry in value.items()}
        return [plain(entry) for entry in value] if isinstance(value, list) else value

    return json.dumps(plain(data), indent=1, default=str)
