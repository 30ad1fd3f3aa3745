"""From the description of a workload to the tokens of its prompts, where the tokenizer is.

A text is a sequence of lines: those of a plain text file, or of the records of a `.jsonl` or
`.parquet` file or of a dataset, one after the other. With `prompt_tokens`, a prompt begins at a
line that is not blank, goes on over the lines that follow, and is cut at exactly that many tokens;
no two prompts share a line. Without, each record, or each line of a plain text that is not blank,
is a prompt as it is.

Which are chosen follows from the seed alone: candidates are taken in the order of the SHA-256 of
seed and place, which is the same for every version of Python and library. Fewer prompts are the
first of more. White space at the end of lines is dropped, so that WikiText is the same text as a
file and as a dataset.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynatree.embedded.corpus import language_reference
from dynatree.errors import DecodeError, WorkloadError
from dynatree.pairs import Pair
from dynatree.specs import Spec
from dynatree.texts import Selection, file_digest

Encode = Callable[[str], list[int]]
"""The tokens of a text, with those that the tokenizer adds by itself."""

SHOWN_VALUES = 12


def encode_prompts(spec: Spec, pair: Pair) -> list[Tensor]:
    """The prompts of `spec` as int64 [L] on the pair's device.

    Raises:
        DecodeError: a prompt has no tokens.
        WorkloadError: the text cannot be had, or holds too few prompts.
    """

    def encode(text: str) -> list[int]:
        # verbose: a text that is about to be cut may be longer than the model's context.
        ids: list[int] = pair.tokenizer(text, verbose=False).input_ids
        return ids

    if isinstance(spec.prompts, Selection):
        encoded = select(spec.prompts, encode)
    else:
        encoded = [encode(text) for text in spec.prompts]
        for index, (text, ids) in enumerate(zip(spec.prompts, encoded, strict=True)):
            if not ids:
                raise DecodeError(f"prompt {index} ({text!r}) has no tokens; give it some text")
    return [torch.tensor(ids, dtype=torch.long, device=pair.target.device) for ids in encoded]


def select(selection: Selection, encode: Encode) -> list[list[int]]:
    """The tokens of the chosen prompts; raises WorkloadError as `encode_prompts`."""
    texts = _texts(selection)
    if selection.prompt_tokens is not None:
        return _cut(selection, texts, selection.prompt_tokens, encode)
    candidates = texts if selection.has_records else _lines(texts)
    candidates = [text.strip() for text in candidates if text.strip()]
    chosen = []
    for place in _order(len(candidates), selection.seed):
        tokens = encode(candidates[place])
        if tokens:
            chosen.append(tokens)
        if len(chosen) == selection.count:
            return chosen
    raise WorkloadError(
        f"{_origin(selection)}: {selection.count} prompts wanted, {len(chosen)} there; lower count"
    )


def _cut(
    selection: Selection, texts: Iterable[str], length: int, encode: Encode
) -> list[list[int]]:
    """Stretches of lines that no two share, each cut at `length` tokens."""
    lines = _lines(texts)
    taken = [False] * len(lines)
    chosen: list[list[int]] = []
    for start in _order(len(lines), selection.seed):
        if taken[start] or not lines[start]:
            continue
        stop, characters = start, 0
        tokens: list[int] = []
        while len(tokens) < length and stop < len(lines) and not taken[stop]:
            # Tokens are rarely shorter than two characters: few texts are encoded in vain.
            wanted = characters + 2 * length
            while characters < wanted and stop < len(lines) and not taken[stop]:
                characters += len(lines[stop]) + 1
                stop += 1
            tokens = encode("\n".join(lines[start:stop]))
        if len(tokens) < length:
            continue
        taken[start:stop] = [True] * (stop - start)
        chosen.append(tokens[:length])
        if len(chosen) == selection.count:
            return chosen
    raise WorkloadError(
        f"{_origin(selection)}: {selection.count} prompts of {length} tokens wanted, the text gave "
        f"{len(chosen)}; lower count or prompt_tokens, or give it more text"
    )


def _order(places: int, seed: int) -> list[int]:
    def key(place: int) -> bytes:
        return hashlib.sha256(f"{seed}:{place}".encode()).digest()

    return sorted(range(places), key=key)


def _lines(texts: Iterable[str]) -> list[str]:
    return [line.rstrip() for text in texts for line in text.removesuffix("\n").split("\n")]


def _texts(selection: Selection) -> list[str]:
    """The plain text, or the texts of the records that count."""
    if selection.corpus is not None:
        return language_reference()
    if selection.file is not None:
        path = Path(selection.file)
        try:
            if file_digest(path) != selection.sha256:
                raise WorkloadError(
                    f"{path}: changed while the job was waiting; run snakemake again"
                )
            if not selection.has_records:
                return [path.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise WorkloadError(
                f"{path}: cannot be read: {error}; give a file of UTF-8 text"
            ) from None
    fields = {selection.field, *selection.where}
    texts = []
    seen: dict[str, set[str]] = {field: set() for field in selection.where}
    for number, record in enumerate(_records(selection), start=1):
        values = {field: _field(selection, record, number, field) for field in fields}
        for field, found in seen.items():
            found.add(repr(values[field]))
        if not all(_matches(values[field], wanted) for field, wanted in selection.where.items()):
            continue
        text = values[selection.field]
        if not isinstance(text, str):
            raise WorkloadError(
                f"{_origin(selection)}: field {selection.field!r} of record {number} is no text "
                f"but {type(text).__name__}; name a field with text (a list's first is field.0)"
            )
        texts.append(text)
    if not texts:
        found_values = "; ".join(
            f"{field} has {', '.join(sorted(values)[:SHOWN_VALUES])}"
            for field, values in seen.items()
        )
        raise WorkloadError(
            f"{_origin(selection)}: no record fits where: {dict(selection.where)}; {found_values}"
        )
    return texts


def _matches(value: object, wanted: object) -> bool:
    return value in wanted if isinstance(wanted, list) else value == wanted


def _field(selection: Selection, record: Mapping[str, Any], number: int, field: str) -> object:
    """The value at a path such as `turns.0`."""
    value: Any = record
    for part in field.split("."):
        try:
            value = value[int(part) if isinstance(value, list) else part]
        except (KeyError, IndexError, TypeError, ValueError):
            raise WorkloadError(
                f"{_origin(selection)}: record {number} has no field {field!r}; it has "
                f"{', '.join(map(str, record)) or 'none'}"
            ) from None
    return value


def _records(selection: Selection) -> Iterator[Mapping[str, Any]]:
    if selection.dataset is not None:
        yield from _dataset(selection)
        return
    assert selection.file is not None
    path = Path(selection.file)
    if path.suffix == ".parquet":
        yield from _parquet(path, selection)
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise WorkloadError(
                    f"{path}: line {number} is not JSON ({error}); correct it"
                ) from None
            if not isinstance(record, dict):
                raise WorkloadError(f"{path}: line {number} is not a JSON object; correct it")
            yield record


def _parquet(path: Path, selection: Selection) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise _without_extra(f"{path}: reading .parquet") from None
    wanted = {field.split(".")[0] for field in (selection.field, *selection.where)}
    try:
        with parquet.ParquetFile(path) as file:
            # A column that is missing is named when its field is looked for.
            columns = [name for name in file.schema_arrow.names if name in wanted]
            for batch in file.iter_batches(columns=columns):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise WorkloadError(f"{path}: cannot be read as parquet: {error}") from None


def _dataset(selection: Selection) -> Iterator[Mapping[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise _without_extra(f"dataset {selection.dataset!r}") from None
    try:
        loaded = load_dataset(
            selection.dataset, selection.name, split=selection.split, revision=selection.revision
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WorkloadError(
            f"dataset {selection.dataset!r}: cannot be had: {error}; check dataset, name, split "
            "and revision, or give the same data as a file"
        ) from None
    yield from loaded


def _without_extra(what: str) -> WorkloadError:
    return WorkloadError(f"{what} needs the extra datasets; run: pip install 'dynatree[datasets]'")


def _origin(selection: Selection) -> str:
    if selection.dataset is not None:
        return f"dataset {selection.dataset!r}"
    return selection.file or f"corpus {selection.corpus!r}"
