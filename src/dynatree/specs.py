"""What one job depends on, and nothing else: the strings that Snakemake compares and scripts get.

Apart from `dynatree.config`, so that a new key of the configuration makes no measurement stale.
"""

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dynatree.recipes import Recipe
from dynatree.schema import (
    Count,
    Name,
    RuntimeMode,
    Section,
    Text,
    canonical,
    digest,
    parse_json,
)
from dynatree.strategies import Strategy
from dynatree.texts import Selection


class ModelSource(Section):
    """Where one model comes from: a hub repository with a revision, or a local directory."""

    hub: Text | None = None
    revision: Text = "main"
    path: Text | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.hub is None) == (self.path is None):
            raise ValueError("give exactly one of hub (a repository id) and path (a directory)")
        return self


class Measure(Section):
    """What one measuring job does; `runs` counts timed passes over the workload."""

    workload: Name
    runs: Count = 5
    warmup: Annotated[int, Field(ge=0)] = 1
    max_new_tokens: Count = 500
    seed: int = 0


class Models(Section):
    """A target and a draft model: two sources, or the recipe that trains both."""

    target: ModelSource | None = None
    draft: ModelSource | None = None
    recipe: Recipe | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")] = "auto"
    runtime: RuntimeMode = "auto"

    @model_validator(mode="after")
    def _models_or_recipe(self) -> Self:
        sources = [self.target, self.draft]
        if (None not in sources) == (self.recipe is not None) or len({*map(type, sources)}) > 1:
            raise ValueError("give either both target and draft, or a recipe that trains them")
        return self


class Spec(Section):
    """Everything that a job depends on, and nothing else: when it changes, the outcome is stale."""

    pair: Name
    models: Models
    prompts: Annotated[list[Text], Field(min_length=1)] | Selection

    def first(self, count: int) -> Self:
        """The specification with the first `count` prompts at most."""
        prompts = self.prompts
        fewer = (
            prompts.model_copy(update={"count": min(count, prompts.count)})
            if isinstance(prompts, Selection)
            else prompts[:count]
        )
        return self.model_copy(update={"prompts": fewer})

    def canonical(self) -> str:
        """One JSON text for equal specs."""
        return canonical(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON."""
        return digest(self.model_dump(mode="json"))


class RunSpec(Spec):
    """What the measurement of one configuration depends on."""

    name: Name
    strategy: Strategy
    measure: Measure


class CertificateSpec(Spec):
    """What the losslessness certificate of some configurations depends on."""

    strategies: Annotated[dict[Name, Strategy], Field(min_length=1)]
    max_new_tokens: Count

    def only(self, names: Iterable[str]) -> Self:
        """The same of those configurations alone: a certificate may hold other sections' too."""
        kept = {name: self.strategies[name] for name in names if name in self.strategies}
        return self.model_copy(update={"strategies": kept})


class TreesSpec(Spec):
    """What the recorded draft trees of one configuration depend on."""

    name: Name
    strategy: Strategy
    max_new_tokens: Count


def parse_spec(text: str) -> RunSpec:
    """Reads back the canonical JSON of a spec.

    Raises:
        ConfigError: with the path of each wrong key, its value and the fix.
    """
    return parse_json(RunSpec, text, "run specification")


def parse_certificate_spec(text: str) -> CertificateSpec:
    """Reads back the canonical JSON of a certificate's spec; raises as `parse_spec`."""
    return parse_json(CertificateSpec, text, "certificate specification")


def parse_trees_spec(text: str) -> TreesSpec:
    """Reads back the canonical JSON of a spec of recorded trees; raises as `parse_spec`."""
    return parse_json(TreesSpec, text, "specification of recorded trees")
