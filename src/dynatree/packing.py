"""Linear layers of a float32 model on oneDNN's blocked weights, for decoding on a CPU.

A verification multiplies a few rows by each weight matrix. PyTorch hands that to MKL in the
weight's plain layout. On an AMD processor the first few rows more then cost much more than the
reading of the weights that they share, and on weights reordered once into oneDNN's blocked layout
they cost little. On an Intel processor MKL is the faster of the two. So both are timed, and each
shape of layer has what is faster here. `bench/forwards.py` measures both in whole forwards.
"""

import copy
import weakref
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynatree.clock import median_seconds

MIN_WEIGHTS = 2**17 + 1
"""Smaller matrices stay as they are: there the call into oneDNN costs more than it saves."""

ROWS = (1, 8)
"""What both layouts are timed with: a token, and a small tree."""


class PackedLinear(nn.Module):
    """`nn.Linear` on a reordered copy of its weight [out, in]; the original is left alone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features = linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()
        # torch.compile cannot take a blocked weight as an input, but it can carry a number.
        self.handle = id(self)
        _BY_HANDLE[self.handle] = self

    def forward(self, states: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return cast(
                Tensor, torch.ops.dynatree.packed_linear(states, self.handle, self.out_features)
            )
        return self.multiply(states)

    def multiply(self, states: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return cast(
            Tensor,
            torch.ops.mkldnn._linear_pointwise(states, self.packed, self.bias, "none", [], ""),
        )


_BY_HANDLE: weakref.WeakValueDictionary[int, PackedLinear] = weakref.WeakValueDictionary()
# None: no layer gains.
_PACKED: weakref.WeakKeyDictionary[PreTrainedModel, tuple[list[int], PreTrainedModel | None]] = (
    weakref.WeakKeyDictionary()
)


_library = torch.library.Library("dynatree", "DEF")
_library.define("packed_linear(Tensor states, int handle, int out_features) -> Tensor")
_library.impl("packed_linear", lambda states, handle, _: _BY_HANDLE[handle].multiply(states), "CPU")


torch.library.register_fake(
    "dynatree::packed_linear",
    lambda states, _, out_features: states.new_empty((*states.shape[:-1], out_features)),
    lib=_library,
)


def packed(model: PreTrainedModel) -> PreTrainedModel:
    """A model like `model` that shares its tensors, with those linear layers packed that gain.

    Returns `model` itself where there is nothing to gain: not on a CPU, not in float32, no oneDNN,
    only small layers, or none that is faster. What was found is kept for the next call; a change
    of the originals in place is noticed, and packs anew.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.weight.numel() >= MIN_WEIGHTS
    }
    if (
        not linears
        or model.device.type != "cpu"
        or model.dtype != torch.float32
        or not torch.backends.mkldnn.is_available()
    ):
        return model
    state = [
        number
        for linear in linears.values()
        for number in (linear.weight.data_ptr(), linear.weight._version)
    ]
    if model in _PACKED and _PACKED[model][0] == state:
        return _PACKED[model][1] or model
    alike = defaultdict(list)
    for name, linear in linears.items():
        alike[linear.weight.shape].append(name)
    replacements: dict[str, PackedLinear] = {}
    for names in alike.values():
        plain = [linears[name] for name in names]
        layers = [PackedLinear(linear) for linear in plain]
        if _faster(layers, plain):
            replacements |= zip(names, layers, strict=True)
    twin: PreTrainedModel | None = None
    if replacements:
        # With every tensor in the memo, a deep copy is a second set of modules over the same ones.
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        twin = copy.deepcopy(model, shared)
        for name, layer in replacements.items():
            twin.set_submodule(name, layer)
    _PACKED[model] = (state, twin)
    return twin or model


def _faster(layers: Sequence[nn.Module], plain: Sequence[nn.Linear]) -> bool:
    """Whether one pass through `layers` takes at least a twentieth less than through `plain`.

    All have one shape. A pass goes through every layer, so that weights come from where they come
    from in a forward.
    """

    def run(modules: Sequence[nn.Module], states: Tensor) -> None:
        for module in modules:
            module(states)

    inputs = [torch.zeros(1, rows, plain[0].in_features) for rows in ROWS]
    calls = [partial(run, modules, states) for states in inputs for modules in (layers, plain)]
    with torch.inference_mode():
        seconds = median_seconds(calls, lambda: None, lambda: None)
    return sum(seconds[::2]) < 0.95 * sum(seconds[1::2])
