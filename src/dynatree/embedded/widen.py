"""A trained GPT-NeoX model in a larger geometry that computes the same function.

How fast a model runs depends on its shape, what it writes on its training. A machine without a hub
can train small models only; widened, they read as much memory and multiply as much as a published
model of that geometry, and write what the small model writes. (Function-preserving growth: Chen,
Goodfellow and Shlens, 2016, arXiv:1511.05641.)
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

from dynatree.recipes import Transformer


@torch.no_grad()
def widen(
    model: PreTrainedModel, geometry: Transformer, vocab_size: int, context: int
) -> PreTrainedModel:
    """Carries `model` over to `geometry`; equal logits but for the order of floating-point sums.

    - Width: hidden state, heads and MLP features [n] become `times` copies side by side
      [times * n]. The mean and variance that LayerNorm takes are those of one copy. A matrix reads
      every copy and is divided by `times`, which is exact for a power of two. The projection
      `query_key_value` is ordered by head, then by query, key and value, so whole copies of its
      rows are whole heads, and the head size, hence the attention's scale and rotary
      dimensions, stays.
    - Depth: an added layer has the weights of a trained one, but its two output projections are
      zero: it costs what a layer costs, and adds 0 to the hidden state.
    - Vocabulary: the hidden state's last feature is made constant behind the final LayerNorm (gain
      0, bias 1), and the same feature's copy before it counts twice instead. An added row of
      the output matrix reads only that constant, so its logit is one and the same number for
      every input, and so far below every logit that a trained row can have that it is never
      among the first k while k trained rows exist, and its probability is 0 in float32. An added
      embedding is a copy of a trained one, so that any id can be read.
    - Context: rotary positions have no weights.

    Args:
        model: a GPTNeoXForCausalLM with untied embeddings. Its dtype and device are the result's;
            beside `model`, memory holds one copy of the result.
        geometry: a power of two times the width and the heads of `model`, and as many layers or
            more; the MLP grows with the width.
        vocab_size: rows of the two embeddings, as many as in `model` or more.
        context: `max_position_embeddings`, as much as in `model` or more.

    Returns:
        A new GPTNeoXForCausalLM in eval mode.

    Raises:
        ValueError: `model` is of another architecture or ties its embeddings, or does not fit into
            the geometry; the message says which value is wrong.
    """
    old = model.config
    if old.model_type != "gpt_neox" or old.tie_word_embeddings:
        raise ValueError(
            f"only a gpt_neox model with untied embeddings can be widened, got {old.model_type} "
            f"with tie_word_embeddings {old.tie_word_embeddings}"
        )
    if vocab_size < old.vocab_size or context < old.max_position_embeddings:
        raise ValueError(
            f"vocab_size {vocab_size} and context {context} must not be less than the model's "
            f"{old.vocab_size} and {old.max_position_embeddings}"
        )
    times = geometry.times(
        Transformer(
            layers=old.num_hidden_layers, width=old.hidden_size, heads=old.num_attention_heads
        )
    )
    wide = _empty(
        model,
        hidden_size=geometry.width,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        intermediate_size=times * old.intermediate_size,
        vocab_size=vocab_size,
        max_position_embeddings=context,
    )

    ids = torch.arange(vocab_size, device=model.device) % old.vocab_size
    embedding = wide.gpt_neox.embed_in.weight.unflatten(1, (times, old.hidden_size))
    embedding.copy_(model.gpt_neox.embed_in.weight[ids].unsqueeze(1))

    for index, layer in enumerate(wide.gpt_neox.layers):
        trained = model.gpt_neox.layers[index % old.num_hidden_layers]
        for name, weight in layer.named_parameters():
            _repeat(weight, trained.get_parameter(name))
        if index >= old.num_hidden_layers:
            for weight in (
                *layer.attention.dense.parameters(),
                *layer.mlp.dense_4h_to_h.parameters(),
            ):
                weight.zero_()

    norm, head = wide.gpt_neox.final_layer_norm, wide.lm_head.weight
    _repeat(norm.weight, model.gpt_neox.final_layer_norm.weight)
    _repeat(norm.bias, model.gpt_neox.final_layer_norm.bias)
    norm.weight[-1], norm.bias[-1] = 0, 1
    _repeat(head[: old.vocab_size], model.lm_head.weight)
    head[:, -1 - old.hidden_size] *= 2
    head[:, -1] = 0
    head[old.vocab_size :] = 0
    head[old.vocab_size :, -1] = _floor(model)
    result: PreTrainedModel = wide.eval()
    return result


def _empty(model: PreTrainedModel, **changes: Any) -> Any:
    """A model like `model` with `changes` in its configuration and weights of any value."""
    config = type(model.config).from_dict(model.config.to_dict() | changes)
    # Random initial weights would take longer than all the rest.
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    empty.to_empty(device=model.device)
    # The rotary frequencies are no weights: they are computed, and always in float32.
    empty.gpt_neox.rotary_emb = GPTNeoXRotaryEmbedding(config).to(model.device)
    return empty


def _repeat(wide: Tensor, trained: Tensor) -> None:
    """Fills `wide` [a * n] with a copies of `trained` [n], or [a * n, b * m] with [n, m] / b."""
    if trained.ndim == 1:
        wide.unflatten(0, (-1, len(trained))).copy_(trained)
    else:
        rows, columns = trained.shape
        blocks = wide.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        blocks.copy_((trained / blocks.shape[2]).unsqueeze(1))


def _floor(model: PreTrainedModel) -> Tensor:
    """A logit at least 128 below every logit of `model`: exp(-128) is 0 in float32.

    The vector that LayerNorm scales has at most the length sqrt(width), so that the inequality of
    Cauchy and Schwarz bounds each logit. A power of two is exact in every dtype.
    """
    norm, head = model.gpt_neox.final_layer_norm, model.lm_head.weight.double()
    spread = (head * norm.weight).norm(dim=1) * model.config.hidden_size**0.5
    bound = (spread + (head @ norm.bias.double()).abs()).max().clamp(min=128.0)
    return -torch.exp2(torch.log2(2 * bound).ceil())
