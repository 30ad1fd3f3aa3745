"""How the embedded pair is trained, as data; `dynatree.embedded` follows it."""

from typing import Annotated, Any, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from dynatree.schema import Count, Positive, Section, parse_json

CALIBRATION = "calibration_temperature"
"""Where a model's configuration says what its logits were divided by so that their probabilities
are those with which greedy verification accepts; see `embedded.train.calibrate`."""


class Transformer(Section):
    """Geometry of a GPT-NeoX model that a recipe trains."""

    layers: Count
    width: Count
    heads: Count

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"width {self.width} must be heads ({self.heads}) times an even head size"
            )
        return self

    def times(self, trained: "Transformer") -> int:
        """How many copies of the features and heads of `trained` this geometry holds.

        Raises:
            ValueError: no model of this geometry repeats `trained`; see `dynatree.embedded.widen`.
        """
        times = self.width // trained.width
        # Only powers of two divide weights without rounding.
        if self.width % trained.width or times < 2 or times & (times - 1):
            raise ValueError(
                f"width {self.width} must be 2, 4, 8 or another power of two times the trained "
                f"width {trained.width}; correct one of the two"
            )
        if self.heads != times * trained.heads:
            raise ValueError(
                f"heads {self.heads} must be {times * trained.heads}, {times} times the trained "
                f"{trained.heads} as the width is, so that the head size stays "
                f"{trained.width // trained.heads}"
            )
        if self.layers < trained.layers:
            raise ValueError(
                f"layers {self.layers} must be at least the trained {trained.layers}; raise it"
            )
        return times


class Widen(Section):
    """Geometry that a recipe's trained models are carried over to, with what they have learnt."""

    target: Transformer
    draft: Transformer
    vocab_size: Count
    context: Count


class Recipe(Section):
    """How the embedded pair is trained; see `dynatree.embedded`.

    Attributes:
        seed: of the weights and of what they are shown.
        corpus_characters: text of the Python documentation that is trained on, from its beginning.
        vocab_size: tokens of the byte-pair tokenizer, which is trained on that text.
        context: tokens that both models hold.
        sequence: tokens of each piece of text that is trained on.
        batch: such pieces per step of the target.
        target_steps, target_learning_rate: of the target; AdamW's largest, a fifth of Muon's.
        rollouts: greedy continuations by the target that the draft learns from, as it will have to
            guess them.
        rollout_prompt, rollout_tokens: tokens of text before each, and of the continuation.
        draft_steps, draft_batch, draft_learning_rate: of the draft.
        widen: a larger geometry that computes the same; see `dynatree.embedded.widen`.
    """

    seed: int = 0
    corpus_characters: Annotated[int, Field(ge=2_000)] = 465_000
    vocab_size: Annotated[int, Field(ge=300, le=65_536)] = 1024
    context: Annotated[int, Field(ge=16)] = 512
    target: Transformer
    draft: Transformer
    sequence: Annotated[int, Field(ge=8)] = 128
    batch: Count = 16
    target_steps: Count
    target_learning_rate: Positive = 4e-3
    rollouts: Count
    rollout_prompt: Count = 24
    rollout_tokens: Count = 96
    draft_steps: Count
    draft_batch: Count = 32
    draft_learning_rate: Positive = 4e-3
    widen: Widen | None = None

    @model_validator(mode="after")
    def _fits_context(self) -> Self:
        longest = max(self.sequence, self.rollout_prompt + self.rollout_tokens)
        if longest > self.context:
            raise ValueError(
                f"context {self.context} is shorter than the {longest} tokens trained on; raise "
                "context or lower sequence, rollout_prompt or rollout_tokens"
            )
        return self

    @model_validator(mode="after")
    def _can_be_widened(self) -> Self:
        if self.widen is None:
            return self
        for role in ("target", "draft"):
            try:
                getattr(self.widen, role).times(getattr(self, role))
            except ValueError as error:
                raise ValueError(f"widen.{role}: {error}") from None
        for name in ("vocab_size", "context"):
            wide, trained = getattr(self.widen, name), getattr(self, name)
            if wide < trained:
                raise ValueError(
                    f"widen.{name}: {wide} must be at least the trained {trained}; raise it"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_absent(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A recipe that does not widen is the recipe, with the digest, that it was before.
        return {key: value for key, value in serialise(self).items() if value is not None}


def parse_recipe(text: str) -> Recipe:
    """Reads back the canonical JSON of a recipe; raises as `parse_spec`."""
    return parse_json(Recipe, text, "recipe")
