"""The forward of an unmodified GPT-NeoX model on CUDA by kernels of our own.

Of up to 64 rows a layer is four launches, three where it is narrow (see `cuda_kernels.enter`); of
more, the library's products and our attention.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from dynatree import gpu
from dynatree.cache import SlotCache
from dynatree.packing import hooked

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def serves(model: PreTrainedModel) -> bool:
    """Whether `Forward` computes what `model` does, on its device."""
    return (
        type(model) is GPTNeoXForCausalLM
        and gpu.kernels(model.device) is not None
        and not model.training
        and _is_plain(model)
        and _is_of_known_kind(model.config)
        and {weight.dtype for weight in model.parameters()} == {model.dtype}
        and model.dtype in DTYPES
        # Before Hopper tiles of 32-bit numbers may not fit a processor's shared memory.
        and not (model.dtype == torch.float32 and gpu.capability(model.device)[0] == 8)
    )


def _is_of_known_kind(config: GPTNeoXConfig) -> bool:
    return bool(
        config._attn_implementation == "sdpa"
        and config.hidden_act == "gelu"
        and config.use_parallel_residual
        and config.attention_bias
        and config.rope_parameters["rope_type"] == "default"
        and config.hidden_size % 16 == 0
        and config.intermediate_size % config.hidden_size == 0
        and config.hidden_size // config.num_attention_heads <= 128
    )


def _is_plain(model: GPTNeoXForCausalLM) -> bool:
    """Whether its modules are as Transformers made them: an adapter, a quantised layer or a hook
    computes something else from what looks like the same weights."""
    base = model.gpt_neox
    kinds: list[tuple[nn.Module, type[nn.Module]]] = [
        (base.embed_in, nn.Embedding),
        (base.final_layer_norm, nn.LayerNorm),
    ]
    for layer in base.layers:
        kinds += [
            (layer.input_layernorm, nn.LayerNorm),
            (layer.post_attention_layernorm, nn.LayerNorm),
            (layer.attention.query_key_value, nn.Linear),
            (layer.attention.dense, nn.Linear),
            (layer.mlp.dense_h_to_4h, nn.Linear),
            (layer.mlp.dense_4h_to_h, nn.Linear),
        ]
    return all(type(module) is kind for module, kind in kinds) and not hooked(model)


class Forward:
    """Calls like `runtime.forward`, for one model."""

    def __init__(self, model: GPTNeoXForCausalLM) -> None:
        kernels = gpu.kernels(model.device)
        assert kernels is not None
        self._kernels = kernels
        self._model = model
        base = model.gpt_neox
        positions = torch.arange(model.config.max_position_embeddings, device=model.device)
        with torch.inference_mode():
            cosines, sines = base.rotary_emb(base.embed_in.weight[:1], positions[None])
            self._tables = cosines[0].contiguous(), sines[0].contiguous()
        self._workspace = gpu.workspace(model.device)

    def __call__(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: SlotCache,
        living: Tensor | None = None,
    ) -> Tensor:
        """Logits [1, n, vocabulary]; arguments as `runtime.forward`, whose mask is of booleans.

        Args:
            living: int32 [1], how many of the first tokens are wanted: nothing of the others is
                stored, and their logits are arbitrary. None for all.
        """
        kernels, base, workspace = self._kernels, self._model.gpt_neox, self._workspace
        slots = past_key_values.slots
        around = kernels.surroundings(
            attention_mask[0, 0], slots, position_ids[0], self._tables, living
        )
        hidden = kernels.select_rows(base.embed_in.weight, input_ids[0])
        few = len(hidden) <= kernels.MOST_ROWS or living is not None
        for layer, (keys, values) in zip(base.layers, past_key_values.parts, strict=True):
            attention, mlp = layer.attention, layer.mlp
            norms = [layer.input_layernorm, layer.post_attention_layernorm]
            if few:
                states, active = kernels.enter(
                    hidden, norms, [attention.query_key_value, mlp.dense_h_to_4h], living
                )
            else:
                states = attention.query_key_value(norms[0](hidden))
                active = F.gelu(mlp.dense_h_to_4h(norms[1](hidden)))
            attended = kernels.attend(states, slots, around, keys, values, workspace, living)
            if few:
                linears = [attention.dense, mlp.dense_4h_to_h]
                hidden = kernels.leave(hidden, attended, active, linears, workspace, living)
            else:
                hidden = mlp.dense_4h_to_h(active) + attention.dense(attended) + hidden
        (hidden,) = kernels.norm(hidden, [base.final_layer_norm], living)
        logits: Tensor = self._model.get_output_embeddings()(hidden)
        return logits[None]
