"""A float32 model as decoding on a CPU wants it: rearranged weights, attention for tree masks,
rotary angles from a table.

A verification multiplies a few rows by each weight matrix, and reading the weights is what takes
time. A library's product rearranges them at every call; here that is done once, and `kernel` reads
them at the speed of the memory. `bench/forwards.py` measures both in whole forwards.
"""

import copy
import warnings
import weakref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynatree import attention, kernel, memory
from dynatree.rotary import can_be_tabulated, tabulate


class PackedLinear(nn.Module):
    """`nn.Linear` on a rearranged copy of its weight [out, in]; the original is left alone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features = linear.out_features
        with torch.no_grad():
            weight, bias = kernel.panels(linear.weight, linear.bias)
        # torch.compile takes the shapes of a parameter as known, and those of other tensors not.
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        return kernel.multiply_rows(states, self.weight, self.bias, self.out_features)


_State = tuple[int, int, int]

_PACKED: weakref.WeakKeyDictionary[PreTrainedModel, tuple[tuple[_State, ...], PreTrainedModel]] = (
    weakref.WeakKeyDictionary()
)


def _state(tensor: Tensor) -> _State:
    """Differs after a change of `tensor`. What is written through `.data`, as adapters
    are merged, raises no version, and a tensor of inference mode has none: so the bits count."""
    version = -1 if tensor.is_inference() else tensor._version
    bits = torch.int32 if tensor.element_size() == 4 else torch.uint8
    with torch.no_grad():
        return tensor.data_ptr(), version, int(tensor.view(bits).sum())


def hooked(model: PreTrainedModel) -> bool:
    """Whether a forward of `model` calls hooks, which only its own modules do."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def packed(model: PreTrainedModel) -> PreTrainedModel:
    """A model like `model` that shares its other tensors, with its linear layers packed.

    Where Transformers lets attention be exchanged, its `sdpa` is, for `attention.attend`; rotary
    embeddings are tabulated where they can be.

    Returns `model` itself where nothing can be packed: not on a CPU, no linear layer in float32, no
    kernel, no memory for the copies, or a hook, which would be lost. What was made is kept for the
    next call; a change of the originals in place is noticed, and packs anew.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.weight.dtype == torch.float32
    }
    if not linears or hooked(model) or not kernel.serves(model.device):
        return model
    rotaries = {name: module for name, module in model.named_modules() if can_be_tabulated(module)}
    copied = [tensor for linear in linears.values() for tensor in linear.parameters()]
    read = [*copied, *(tensor for rotary in rotaries.values() for tensor in rotary.buffers())]
    state = tuple(map(_state, read))
    known = _PACKED.get(model)
    if known is not None and known[0] == state:
        return known[1]
    needed, free = sum(each.nbytes for each in copied), memory.available(model.device).free
    if needed > free:
        warnings.warn(
            f"no memory for rearranged weights of {type(model).__name__}: {memory.gib(needed)} "
            f"needed, {memory.gib(free)} free; decoding goes on without them, more slowly",
            kernel.KernelWarning,
            stacklevel=2,
        )
        return model
    # With every tensor in the memo, a deep copy is a second set of modules over the same ones.
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin: PreTrainedModel = copy.deepcopy(model, shared)
    for name, linear in linears.items():
        twin.set_submodule(name, PackedLinear(linear))
    for name in rotaries:
        tabulate(twin.get_submodule(name))
    for name, module in model.named_modules():
        # Calling what does nothing takes a thirtieth of an eager forward.
        if type(module) is nn.Dropout and not module.training:
            twin.set_submodule(name, nn.Identity())
    if twin._supports_attention_backend and twin.config._attn_implementation == "sdpa":
        twin.set_attn_implementation(attention.NAME)
    _PACKED[model] = state, twin
    return twin
