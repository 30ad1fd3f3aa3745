"""A forward of n tokens of one unmodified Transformers model over its slot cache."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynatree.cache import SlotCache
from dynatree.errors import DecodeError

_ATTENTION = ("sdpa", "eager")


class ModelRunner:
    """One model, its KV cache, and how many tokens of the sequence that cache holds.

    Attributes:
        length: committed tokens in the cache: slots and positions `0 .. length - 1`.
        forwards: forwards run since the last `reset`.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        """Prepares `model` (batch 1) with `capacity` KV slots.

        Raises:
            DecodeError: the model's attention cannot take a tree mask.
        """
        text_config = model.config.get_text_config()
        attention = text_config._attn_implementation
        if attention not in _ATTENTION:
            raise DecodeError(
                f"attention implementation {attention!r} takes no tree mask; load the model with "
                f"attn_implementation='sdpa' (or one of {', '.join(_ATTENTION)})"
            )
        kinds = set(getattr(text_config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise DecodeError(
                f"{type(model).__name__} has layers of kind {', '.join(sorted(kinds))}; DynaTree "
                "decodes models whose layers are all full_attention"
            )
        self.model = model
        self.device = model.device
        self.cache = SlotCache(text_config.num_hidden_layers, capacity)
        self.length = 0
        self.forwards = 0
        # The eager implementation adds its mask to the scores, SDPA takes booleans as they are.
        self._additive = model.dtype if attention == "eager" else None

    @property
    def context(self) -> int | None:
        """Positions the model was made for; None when its configuration names no limit."""
        text_config = self.model.config.get_text_config()
        return getattr(text_config, "max_position_embeddings", None)

    @property
    def vocab_size(self) -> int:
        """Rows of the model's output layer."""
        return int(self.model.config.get_text_config().vocab_size)

    def reset(self) -> None:
        """Forgets the sequence; the slots are kept."""
        self.length = 0
        self.forwards = 0

    def append(self, tokens: Tensor) -> Tensor:
        """Reads `tokens` [n] as the next committed tokens.

        Returns:
            Logits [1, vocabulary] after the last of them.
        """
        count = len(tokens)
        positions = torch.arange(self.length, self.length + count, device=self.device)
        mask = None
        if self.length > 0 and count > 1:
            visible = torch.arange(self.length + count, device=self.device)
            mask = visible <= positions[:, None]
        elif self.length > 0:
            mask = torch.ones(1, self.length + 1, dtype=torch.bool, device=self.device)
        # An empty cache needs no mask of ours: Transformers takes its fast causal path.
        logits = self.forward(tokens, positions, self.length, mask, logits_to_keep=1)
        self.length += count
        return logits

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        slot: int,
        mask: Tensor | None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """One forward over `tokens` [n] at `positions` [n], stored from `slot` on.

        Args:
            mask: bool [n, slot + n], or None for a causal mask over an empty cache.
            logits_to_keep: how many of the last tokens need logits; 0 is all.

        Returns:
            Logits [n or logits_to_keep, vocabulary] in the model's dtype.
        """
        self.cache.place(slot, len(tokens))
        if mask is not None:
            mask = mask[None, None]
            if self._additive is not None:
                lowest = torch.finfo(self._additive).min
                mask = torch.zeros_like(mask, dtype=self._additive).masked_fill_(~mask, lowest)
        output = self.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        )
        self.forwards += 1
        logits: Tensor = output.logits[0]
        return logits

    def keep(self, slots: list[int]) -> None:
        """Commits the tokens stored at the ascending `slots`, after those committed already."""
        if slots != list(range(self.length, self.length + len(slots))):
            self.cache.gather(torch.tensor(slots, device=self.device), self.length)
        self.length += len(slots)
