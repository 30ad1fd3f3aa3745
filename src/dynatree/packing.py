"""Linear layers of a float32 model on reordered weights, for decoding on a CPU.

A verification multiplies a few rows by each weight matrix. From the weight's plain layout MKL
reorders it anew at every call, which for a few rows costs as much as the product. Two layouts can
be made once instead: oneDNN's blocked one, and MKL's own. Which is the fastest depends on the
processor, on the shape and on the number of rows, so all are timed, and each shape of layer has
what is fastest here. `bench/forwards.py` measures them in whole forwards.
"""

import copy
import math
import operator
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as plain_linear
from transformers import PreTrainedModel

MIN_WEIGHTS = 2**14 + 1
"""Smaller matrices stay as they are: there the call costs more than the product."""

MANY = 6
"""Rows from which on they are many. A layer has one layout for fewer rows and one for many."""

ROWS = {False: ((1, 4), (12,)), True: ((1, 4, 12),)}
"""Eager and compiled: the row counts that a layout is timed with and has to gain for. A compiled
forward has one layout for all, for it would have to be compiled for each otherwise."""

SAMPLE_WEIGHTS = 2**24
"""Weights whose layers are timed, more than what caches near a core hold, and of each shape one."""

ROUNDS = 3
WARM_UP_PASSES = 3
TIMED_PASSES = 4
"""Each layout is timed several times in each of some rounds, when what the one before it has left
in the caches is gone."""

CALL_SECONDS = {False: 4e-6, True: 8e-6}
"""What the call of a packed layer costs in a decoding beside what it costs back to back, eager and
compiled: its code has left the caches, and compiled code calls it through Python. From decodings on
an Intel Xeon with all layers packed, or none."""

Multiply = Callable[[Tensor], Tensor]
"""[1, n, in] to [1, n, out], by the weight and bias of one layer."""


def _plain(linear: nn.Linear) -> Multiply:
    return partial(plain_linear, weight=linear.weight.detach(), bias=_bias(linear))


def _bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach()


def _onednn(linear: nn.Linear) -> Multiply:
    bias = _bias(linear)
    packed = torch.ops.mkldnn._reorder_linear_weight.default(linear.weight.detach())
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda states: cast(Tensor, multiply(states, packed, bias, "none", [], ""))


def _mkl(linear: nn.Linear) -> Multiply:
    bias = _bias(linear)
    weight = linear.weight.detach()
    # MKL asks for the rows to come; what it makes of the weight serves any number of them.
    packed = torch.ops.mkl._mkl_reorder_linear_weight.default(weight, MANY)
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
        layouts: names in `LAYOUTS` of what multiplies few rows, and many; None is the plain layout.
    """

    def __init__(self, linear: nn.Linear, few: str | None, many: str | None) -> None:
        super().__init__()
        self.out_features = linear.out_features
        self.layouts = few, many
        made = {name: LAYOUTS[name](linear) if name else _plain(linear) for name in {few, many}}
        self._few, self._many = made[few], made[many]
        # torch.compile cannot take a reordered weight as an input, but it can carry a number.
        self.handle = id(self)
        _BY_HANDLE[self.handle] = self

    def forward(self, states: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return cast(
                Tensor, torch.ops.dynatree.packed_linear(states, self.handle, self.out_features)
            )
        return self.multiply(states)

    def multiply(self, states: Tensor) -> Tensor:
        """[1, n, in] to [1, n, out]."""
        return (self._few if states.shape[-2] < MANY else self._many)(states)


_BY_HANDLE: weakref.WeakValueDictionary[int, PackedLinear] = weakref.WeakValueDictionary()
# None: no layer gains.
_PACKED: weakref.WeakKeyDictionary[
    PreTrainedModel, dict[bool, tuple[tuple[int, ...], PreTrainedModel | None]]
] = weakref.WeakKeyDictionary()


_library = torch.library.Library("dynatree", "DEF")
_library.define("packed_linear(Tensor states, int handle, int out_features) -> Tensor")
_library.impl("packed_linear", lambda states, handle, _: _BY_HANDLE[handle].multiply(states), "CPU")


torch.library.register_fake(
    "dynatree::packed_linear",
    lambda states, _, out_features: states.new_empty((*states.shape[:-1], out_features)),
    lib=_library,
)


def packed(model: PreTrainedModel, compiled: bool = False) -> PreTrainedModel:
    """A model like `model` that shares its tensors, with those linear layers packed that gain.

    Returns `model` itself where there is nothing to gain: not on a CPU, not in float32, no library
    that packs, only small layers, or none that is faster. What was found is kept for the next call;
    a change of the originals in place is noticed, and packs anew.

    Args:
        compiled: for compiled forwards.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.weight.numel() >= MIN_WEIGHTS
    }
    if not linears or model.device.type != "cpu" or model.dtype != torch.float32:
        return model
    state = (
        *(linear.weight.data_ptr() for linear in linears.values()),
        *(linear.weight._version for linear in linears.values()),
    )
    known = _PACKED.setdefault(model, {})
    if compiled in known and known[compiled][0] == state:
        return known[compiled][1] or model
    layouts = _fastest(list(linears.values()), compiled)
    replacements = {
        name: PackedLinear(linear, *layouts[linear.weight.shape])
        for name, linear in linears.items()
        if layouts[linear.weight.shape] != (None, None)
    }
    twin: PreTrainedModel | None = None
    if replacements:
        # With every tensor in the memo, a deep copy is a second set of modules over the same ones.
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        twin = copy.deepcopy(model, shared)
        for name, layer in replacements.items():
            twin.set_submodule(name, layer)
    known[compiled] = (state, twin)
    return twin or model


@torch.inference_mode()
def _fastest(
    linears: Sequence[nn.Linear], compiled: bool
) -> dict[torch.Size, tuple[str | None, str | None]]:
    """By shape of a weight, the fastest layout for few rows, and for many; None is the plain one.

    Another has to be faster for every row count, and to save a twentieth of their sum.
    """
    sample: list[nn.Linear] = []
    counts: Counter[torch.Size] = Counter()
    weights = 0
    for linear in linears:
        if weights < SAMPLE_WEIGHTS or linear.weight.shape not in counts:
            sample.append(linear)
            counts[linear.weight.shape] += 1
            weights += linear.weight.numel()
    layers = {name: [pack(linear) for linear in sample] for name, pack in LAYOUTS.items()}
    fastest: dict[torch.Size, list[str | None]] = {shape: [] for shape in counts}
    for group in ROWS[compiled]:
        seconds = [_seconds(sample, layers, rows) for rows in group]
        for shape, layouts in fastest.items():
            usual = [each[None, shape] for each in seconds]
            calls = counts[shape] * CALL_SECONDS[compiled]
            costs: dict[str | None, float] = {None: 0.95 * sum(usual)}
            for name in layers:
                mine = [each[name, shape] + calls for each in seconds]
                if all(map(operator.lt, mine, usual)):
                    costs[name] = sum(mine)
            layouts.append(min(costs, key=costs.__getitem__))
    return {shape: (layouts[0], layouts[-1]) for shape, layouts in fastest.items()}


def _seconds(
    sample: Sequence[nn.Linear], layers: Mapping[str, Sequence[Multiply]], rows: int
) -> dict[tuple[str | None, torch.Size], float]:
    """Median seconds that `sample` takes with `rows` rows, by layout and shape; None is plain.

    A pass goes through all layers, and a few go before those that are timed, so that weights come
    from where they come from in a decoding. Infinite for a layout that computes something else.
    """
    passes: dict[str | None, Sequence[Multiply]] = {None: [_plain(linear) for linear in sample]}
    passes.update(layers)
    inputs = [
        torch.linspace(-1, 1, rows * linear.in_features).view(1, rows, -1) for linear in sample
    ]
    shapes = [linear.weight.shape for linear in sample]
    runs: dict[tuple[str | None, torch.Size], list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for layout, multiplies in passes.items():
            for repetition in range(WARM_UP_PASSES + TIMED_PASSES):
                spent: dict[torch.Size, float] = defaultdict(float)
                for shape, multiply, states in zip(shapes, multiplies, inputs, strict=True):
                    begin = time.perf_counter()
                    multiply(states)
                    spent[shape] += time.perf_counter() - begin
                if repetition >= WARM_UP_PASSES:
                    for shape, seconds in spent.items():
                        runs[layout, shape].append(seconds)
    medians = {key: median(values) for key, values in runs.items()}
    for layout, multiplies in layers.items():
        for linear, multiply, states in zip(sample, multiplies, inputs, strict=True):
            if not torch.allclose(multiply(states), linear(states), rtol=1e-4, atol=1e-4):
                medians[layout, linear.weight.shape] = math.inf
    return medians
