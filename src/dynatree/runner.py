"""A forward of n tokens of one unmodified Transformers model over its slot cache."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynatree.cache import SlotCache
from dynatree.errors import DecodeError
from dynatree.fused import Forward
from dynatree.packing import packed
from dynatree.recipes import CALIBRATION
from dynatree.runtime import Runtime

_ATTENTION = ("sdpa", "eager")


class ModelRunner:
    """One model and its KV cache."""

    def __init__(self, model: PreTrainedModel, capacity: int, runtime: Runtime) -> None:
        """Prepares `model` (batch 1) with `capacity` KV slots.

        Raises:
            DecodeError: the model's attention takes no tree mask, or not all of its layers are
                full attention.
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
        self.device = model.device
        self.dtype = model.dtype
        # Positions that the model was made for; None when its configuration names no limit.
        self.context: int | None = getattr(text_config, "max_position_embeddings", None)
        self.calibration: float = getattr(text_config, CALIBRATION, 1.0)
        # Rows of the output layer.
        self.vocab_size = int(text_config.vocab_size)
        self.cache = SlotCache(text_config.num_hidden_layers, capacity)
        self._model = packed(model)
        self._call = runtime.callable(self._model)
        # Whether a forward can be spared the tokens that only fill a static shape.
        self.counts = isinstance(self._call, Forward)
        # The eager implementation adds its mask to the scores. SDPA takes booleans too, but on a
        # CPU turns them into numbers in every layer anew.
        used = self._model.config.get_text_config()._attn_implementation
        self._additive = used == "eager" or (used == "sdpa" and self.device.type == "cpu")
        self._shown = torch.zeros((), dtype=self.dtype, device=self.device)
        self._hidden = torch.full_like(self._shown, torch.finfo(self.dtype).min)
        # Padding rows may stand beyond the context, where there is no embedding to look up.
        pads = runtime.static and not self.counts
        self._last = self.context - 1 if self.context is not None and pads else None

    def prefill(self, tokens: Tensor) -> Tensor:
        """Reads `tokens` [n] into the emptied cache.

        Returns:
            Logits [1, vocabulary] after the last of them.

        Raises:
            DecodeError: the cache has fewer slots.
        """
        slots = torch.arange(len(tokens), device=self.device)
        self.cache.place(slots, len(tokens))
        # Without a mask of ours, Transformers takes its fast causal path.
        output = self._model(
            input_ids=tokens[None],
            position_ids=slots[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[0]
        return logits

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        mask: Tensor,
        living: Tensor | None = None,
    ) -> Tensor:
        """One forward over `tokens` [n] at `positions` [n], stored in `slots` [n].

        Args:
            mask: bool [n, visible]: which of the first `visible` slots each token attends to.
            living: int32 [1], how many of the first tokens are wanted, where the runner `counts`;
                of the others nothing is stored, and the logits are arbitrary.

        Returns:
            Logits [n, vocabulary] in the model's dtype.

        Raises:
            DecodeError: the cache has fewer slots than the mask.
        """
        self.cache.place(slots, mask.shape[-1])
        mask = mask.view(1, 1, *mask.shape)
        if self._additive:
            mask = torch.where(mask, self._shown, self._hidden)
        if self._last is not None:
            positions = positions.clamp(max=self._last)
        inputs = {"living": living} if living is not None else {}
        logits = self._call(
            input_ids=tokens[None],
            position_ids=positions[None],
            attention_mask=mask,
            past_key_values=self.cache,
            **inputs,
        )
        return logits[0]
