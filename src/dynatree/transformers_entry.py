"""Decoding through Transformers' own `generate`, by its `custom_generate` argument."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from dynatree.decode import generate
from dynatree.errors import DecodeError
from dynatree.sampling import SamplingMode
from dynatree.strategies import StrategyBase


def custom_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    strategy: StrategyBase,
    assistant_model: PreTrainedModel | None = None,
    logits_processor: Sequence[object] = (),
    stopping_criteria: Sequence[object] = (),
    seed: int | None = None,
    sampling: SamplingMode = "coupled",
    **model_kwargs: Any,
) -> Tensor:
    """The Transformers-native entry: `model.generate(ids, custom_generate=custom_generate, ...)`.

    Pass `assistant_model=draft` and `strategy=`; the length limit, the end-of-sequence tokens and,
    with `do_sample=True`, temperature, top_k and top_p come from what Transformers prepared.
    `sampling` is as in `dynatree.generate`, and so is `seed`; by default it is drawn from PyTorch's
    generator, which `torch.manual_seed` seeds, so that calls differ as they do without us.

    Returns:
        [1, L + new] int64: the prompt and the new tokens, as `generate` returns them.

    Raises:
        DecodeError: the call asks for something other than decoding one whole prompt, greedily or
            by temperature, top_k and top_p.
    """
    if assistant_model is None:
        assistant_model = _assistant_of_caller()
    if (generation_config.num_beams or 1) > 1:
        raise DecodeError("DynaTree decodes one sequence: pass num_beams=1")
    warping = _warping(logits_processor, bool(generation_config.do_sample))
    if warping:
        warping["seed"] = int(torch.randint(2**62, ())) if seed is None else seed
    others = [
        type(criterion).__name__
        for criterion in stopping_criteria
        if not isinstance(criterion, MaxLengthCriteria | EosTokenCriteria)
    ]
    if others:
        raise DecodeError(f"only length and EOS end decoding, got {', '.join(others)}; unset them")
    if generation_config.return_dict_in_generate:
        raise DecodeError("return_dict_in_generate is not supported; use dynatree.generate")
    # Not a parameter by name: `generate` would then pass it twice.
    attention_mask = model_kwargs.get("attention_mask")
    if attention_mask is not None and not attention_mask.all():
        raise DecodeError("the attention_mask hides tokens of the prompt; pass it without padding")
    generation = generate(
        model,
        assistant_model,
        input_ids,
        strategy,
        max_new_tokens=generation_config.max_length - input_ids.shape[-1],
        eos_token_id=generation_config.eos_token_id,
        sampling=sampling,
        **warping,
    )
    new = torch.tensor([generation.tokens], dtype=torch.long, device=input_ids.device)
    return torch.cat((input_ids, new), dim=-1)


def _warping(processors: Sequence[object], sample: bool) -> dict[str, Any]:
    """`temperature`, `top_k` and `top_p` for `generate` of what Transformers made of its options.

    Raises:
        DecodeError: there are processors besides.
    """
    fields = {
        TemperatureLogitsWarper: "temperature",
        TopKLogitsWarper: "top_k",
        TopPLogitsWarper: "top_p",
    }
    kinds = [type(processor) for processor in processors]
    # In this order, and each of them once.
    if not sample or kinds != [kind for kind in fields if kind in kinds]:
        if processors:
            names = ", ".join(kind.__name__ for kind in kinds)
            raise DecodeError(
                "logits processors other than temperature, top_k and top_p of do_sample=True are "
                f"not supported, got {names}; unset their options"
            )
        return {}
    given = {
        fields[kind]: getattr(processor, fields[kind])
        for kind, processor in zip(kinds, processors, strict=True)
    }
    return {"temperature": 1.0, **given}


def _assistant_of_caller() -> PreTrainedModel | None:
    """The `assistant_model` that `model.generate` was given.

    `generate` names that argument in its own signature and then passes a custom callable only
    its *unnamed* keyword arguments (transformers 5.17 to 5.23, `_extract_generation_mode_kwargs`),
    so the draft is lost on the way. Its frame is the one place where it still is.
    """
    frame = sys._getframe(2)
    if frame.f_code.co_name != "generate":
        return None
    return frame.f_locals.get("assistant_model")
