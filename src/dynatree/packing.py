"""Linear layers of a float32 model on reordered weights, for decoding on a CPU.

A verification multiplies a few rows by each weight matrix. From the weight's plain layout MKL
reorders it anew at every call, which for a few rows costs as much as the product. Two layouts can
be made once instead: oneDNN's blocked one, and MKL's own. Which is the fastest depends on the
processor, on the shape and on the number of rows, so all are timed, and each shape of layer has,
for each class of row counts, what is fastest here. `bench/forwards.py` measures them in whole
forwards.
"""

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as plain_linear
from transformers import PreTrainedModel

from dynatree.clock import median_seconds

MIN_WEIGHTS = 2**14 + 1
"""Smaller matrices stay as they are: there the call costs more than the product."""

MANY = 6
"""Rows from which on a tree is many: fewer are one class (a chain), one row is another."""

ROWS = (1, 4, 12)
"""What stands for a class of row counts when layouts are timed, in the order of `row_class`."""

SAMPLE = 8
"""Layers of one shape that are timed, more than what the caches next to the cores hold."""

Multiply = Callable[[Tensor], Tensor]
"""[1, n, in] to [1, n, out], by the weight and bias of one layer."""


def row_class(rows: int) -> int:
    """The class that a forward of `rows` rows belongs to: 0 for one, 1 for a few, 2 for many."""
    if rows == 1:
        return 0
    return 1 if rows < MANY else 2


def _onednn(linear: nn.Linear) -> Multiply:
    bias = None if linear.bias is None else linear.bias.detach()
    packed = torch.ops.mkldnn._reorder_linear_weight.default(linear.weight.detach())
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda states: cast(Tensor, multiply(states, packed, bias, "none", [], ""))


def _mkl(linear: nn.Linear) -> Multiply:
    bias = None if linear.bias is None else linear.bias.detach()
    weight = linear.weight.detach()
    # MKL asks for the rows to come; what it makes of the weight serves any number of them.
    packed = torch.ops.mkl._mkl_reorder_linear_weight.default(weight, ROWS[-1])
    multiply = torch.ops.mkl._mkl_linear.default
    return lambda states: cast(Tensor, multiply(states, packed, weight, bias, states.shape[-2]))


LAYOUTS: dict[str, Callable[[nn.Linear], Multiply]] = {}
"""How a layer can be packed; the plain layout is none of them."""

if torch.backends.mkldnn.is_available():
    LAYOUTS["onednn"] = _onednn
if torch.backends.mkl.is_available():
    LAYOUTS["mkl"] = _mkl


class PackedLinear(nn.Module):
    """`nn.Linear` on reordered copies of its weight [out, in]; the original is left alone.

    Attributes:
        layouts: names in `LAYOUTS` of what multiplies, by class of row counts; None is the plain
            layout.
    """

    def __init__(self, linear: nn.Linear, layouts: Sequence[str | None]) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.out_features = linear.out_features
        self.layouts = tuple(layouts)
        self.register_buffer("weight", linear.weight.detach(), persistent=False)
        bias = None if linear.bias is None else linear.bias.detach()
        self.register_buffer("bias", bias, persistent=False)
        made = {name: LAYOUTS[name](linear) for name in layouts if name is not None}
        self.multiply = [None if name is None else made[name] for name in layouts]
        # torch.compile cannot take a reordered weight as an input, but it can carry a number.
        self.handle = id(self)
        _BY_HANDLE[self.handle] = self

    def forward(self, states: Tensor) -> Tensor:
        multiply = self.multiply[row_class(states.shape[-2])]
        if multiply is None:
            return plain_linear(states, self.weight, self.bias)
        if torch.compiler.is_compiling():
            return cast(
                Tensor, torch.ops.dynatree.packed_linear(states, self.handle, self.out_features)
            )
        return multiply(states)


_BY_HANDLE: weakref.WeakValueDictionary[int, PackedLinear] = weakref.WeakValueDictionary()
# None: no layer gains.
_PACKED: weakref.WeakKeyDictionary[PreTrainedModel, tuple[list[int], PreTrainedModel | None]] = (
    weakref.WeakKeyDictionary()
)


_library = torch.library.Library("dynatree", "DEF")
_library.define("packed_linear(Tensor states, int handle, int out_features) -> Tensor")
_library.impl("packed_linear", lambda states, handle, _: _BY_HANDLE[handle](states), "CPU")


torch.library.register_fake(
    "dynatree::packed_linear",
    lambda states, _, out_features: states.new_empty((*states.shape[:-1], out_features)),
    lib=_library,
)


def packed(model: PreTrainedModel) -> PreTrainedModel:
    """A model like `model` that shares its tensors, with those linear layers packed that gain.

    Returns `model` itself where there is nothing to gain: not on a CPU, not in float32, no library
    that packs, only small layers, or none that is faster. What was found is kept for the next call;
    a change of the originals in place is noticed, and packs anew.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.weight.numel() >= MIN_WEIGHTS
    }
    if not linears or model.device.type != "cpu" or model.dtype != torch.float32:
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
        layouts = _fastest([linears[name] for name in names[:SAMPLE]])
        if any(layouts):
            replacements |= {name: PackedLinear(linears[name], layouts) for name in names}
    twin: PreTrainedModel | None = None
    if replacements:
        # With every tensor in the memo, a deep copy is a second set of modules over the same ones.
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        twin = copy.deepcopy(model, shared)
        for name, layer in replacements.items():
            twin.set_submodule(name, layer)
    _PACKED[model] = (state, twin)
    return twin or model


@torch.inference_mode()
def _fastest(plain: Sequence[nn.Linear]) -> list[str | None]:
    """The fastest layout for each class of row counts; None where none saves a twentieth.

    All layers have one shape. A pass goes through every layer, so that weights come from where they
    come from in a forward. A layout whose products are others is not taken.
    """
    layers: Mapping[str, list[Multiply]] = {
        name: [pack(linear) for linear in plain] for name, pack in LAYOUTS.items()
    }

    def run(multiplies: Sequence[Multiply], states: Tensor) -> None:
        for multiply in multiplies:
            multiply(states)

    fastest: list[str | None] = []
    for rows in ROWS:
        states = torch.linspace(-1, 1, rows * plain[0].in_features).view(1, rows, -1)
        expected = plain[0](states)
        right = [
            name
            for name, (multiply, *_) in layers.items()
            if torch.allclose(multiply(states), expected, rtol=1e-4, atol=1e-4)
        ]
        passes: list[Sequence[Multiply]] = [plain, *(layers[name] for name in right)]
        calls = [partial(run, multiplies, states) for multiplies in passes]
        usual, *seconds = median_seconds(calls, lambda: None, lambda: None)
        best, layout = min(zip(seconds, right, strict=True), default=(usual, None))
        fastest.append(layout if best < 0.95 * usual else None)
    return fastest
