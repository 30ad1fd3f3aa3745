"""Tree attention on a CPU, as an attention implementation of Transformers.

PyTorch's own is made for many rows and for masks that it adds to the scores: it takes a boolean
mask as numbers, and multiplies also by what the mask hides.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dynatree import kernel

NAME = "dynatree"
"""What models call it in their configuration."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What Transformers calls in every layer; the same values as its `sdpa`.

    It is that where there is no boolean mask, as in a prefill, an option that changes what is
    attended to, or another dtype than float32.

    Args:
        query: [1, heads, n, head_size].
        key, value: [1, kv_heads, m, head_size].
        attention_mask: [1, 1, n, m].
    """
    changed = any(options.get(name) for name in ("dropout", "softcap"))
    changed = changed or options.get("position_bias") is not None
    # Linear layers may be in float32 where the model is not.
    changed = changed or query.dtype != torch.float32
    if attention_mask is None or attention_mask.dtype != torch.bool or changed:
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return attended
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return kernel.attend(query, key, value, attention_mask, scale), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
