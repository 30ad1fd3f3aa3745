"""Where prompts come from, as data: written out, or chosen from a file, a dataset or the corpus.

`dynatree.workloads` chooses them, where the tokenizer is.
"""

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from dynatree.embedded.corpus import language_reference
from dynatree.errors import ConfigError
from dynatree.files import digest_of
from dynatree.schema import Count, OneOrMore, Section, Text, digest

RECORD_FILES = (".jsonl", ".parquet")
"""Files of records with fields; every other file is plain text."""


class TextSource(Section):
    """A text, and how many prompts of what length are chosen from it; see `dynatree.workloads`.

    Attributes:
        file: of this machine: plain text, or records (`.jsonl`, `.parquet`).
        dataset: id on the Hugging Face hub; `name`, `split` and `revision` say which part of it.
        corpus: text that comes with every CPython.
        field: of a record, where its text is; `turns.0` is the first entry of the list `turns`.
        where: fields of a record, and the value or values that they must have for it to count.
        count: prompts chosen, by the seed of the measurement.
        prompt_tokens: exact length of each prompt; without it, a record or a line is a prompt.
    """

    file: Text | None = None
    dataset: Text | None = None
    name: Text | None = None
    split: Text | None = None
    revision: Text | None = None
    corpus: Literal["python_reference"] | None = None
    field: Text = "text"
    where: dict[Text, OneOrMore] = {}
    count: Count | None = None
    prompt_tokens: Count | None = None

    @property
    def has_records(self) -> bool:
        """Whether the text lies in fields of records."""
        return self.dataset is not None or Path(self.file or "").suffix in RECORD_FILES

    @model_validator(mode="after")
    def _options_fit_the_source(self) -> Self:
        options = ("name", "split", "revision") if self.dataset is None else ()
        for option in (*options, *(() if self.has_records else ("field", "where"))):
            if option in self.model_fields_set:
                belongs = "a dataset" if option in options else "a dataset or a .jsonl or .parquet"
                raise ValueError(f"{option} belongs to {belongs}; remove it")
        if self.dataset is not None and self.split is None:
            raise ValueError("a dataset needs its split, such as split: test; add it")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Only what was given: a workload of inline prompts is nothing but these.
        return {key: value for key, value in serialise(self).items() if key in self.used}

    @property
    def used(self) -> set[str]:
        """The fields that say something about this source."""
        records = {"field", "where"} if self.has_records else set()
        return records | {
            key
            for key in type(self).model_fields
            if key not in ("field", "where") and getattr(self, key) is not None
        }


class Selection(TextSource):
    """Prompts that are chosen where the tokenizer is, as far as a specification can say it.

    Attributes:
        count: prompts chosen; of two selections that differ in it, one begins as the other.
        seed: which are chosen.
        sha256: digest (hex) of the text where it lies on this machine; None for a dataset.
    """

    count: Count
    seed: int
    sha256: str | None = None

    def __len__(self) -> int:
        return self.count


class Workload(TextSource):
    """The prompts that every configuration decodes: written out, or chosen from a text."""

    prompts: Annotated[list[Text], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = (self.prompts, self.file, self.dataset, self.corpus)
        if sum(source is not None for source in sources) != 1:
            raise ValueError("give exactly one of prompts (a list), file, dataset and corpus")
        if self.prompts is None and self.count is None:
            raise ValueError("count is missing: add how many prompts are chosen from the text")
        for option in ("count", "prompt_tokens"):
            if self.prompts is not None and getattr(self, option) is not None:
                raise ValueError(
                    f"{option} does not go with prompts, which are decoded as they are; remove it, "
                    "or use a workload with a file, a dataset or a corpus"
                )
        return self

    def chosen(self, key: str, seed: int) -> list[str] | Selection:
        """What a specification says about the prompts; reads a local file for its digest.

        Args:
            key: of this workload in the configuration, for messages.

        Raises:
            ConfigError: the file cannot be read.
        """
        if self.prompts is not None:
            return self.prompts
        sha256 = None
        if self.corpus is not None:
            sha256 = digest(language_reference())
        elif self.file is not None:
            try:
                sha256 = file_digest(Path(self.file))
            except OSError as error:
                raise ConfigError(
                    f"{key}.file: {self.file!r} cannot be read ({error.strerror}); correct the "
                    "path, which counts from the project's folder, or put the file there"
                ) from None
        return Selection.model_validate({**self.model_dump(), "seed": seed, "sha256": sha256})


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of the file's content; read again only when its time or size has changed."""
    facts = path.stat()
    return _file_digest(path, facts.st_mtime_ns, facts.st_size)


@cache
def _file_digest(path: Path, modified: int, size: int) -> str:
    return digest_of(path)
