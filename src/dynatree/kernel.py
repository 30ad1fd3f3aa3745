"""C++ for what a decoder does on a CPU: compiled on first use, and loaded.

`kernel.cpp` says what it does. Its functions become operators of PyTorch, which compiled forwards
call without going through Python.
"""

import hashlib
import os
import warnings
from functools import cache
from pathlib import Path
from textwrap import shorten

import torch
from filelock import FileLock
from torch import Tensor

SOURCE = Path(__file__).with_name("kernel.cpp")

_INSTRUCTIONS = {
    "AVX512": ("avx512f", "avx512dq", "avx512bw", "avx512vl", "fma"),
    "AVX2": ("avx2", "fma"),
}
FLAGS = {
    capability: (
        "-O3",
        *(f"-m{part}" for part in parts),
        "-fopenmp",
        f"-DCPU_CAPABILITY={capability}",
        f"-DCPU_CAPABILITY_{capability}",
    )
    for capability, parts in _INSTRUCTIONS.items()
}
"""How to compile for a processor, by what PyTorch calls its instructions."""

WIDTH = {"AVX512": 32, "AVX2": 16}
"""Outputs of a panel: two vectors."""


class KernelWarning(UserWarning):
    """Decoding stays as slow as with PyTorch's operators, for want of the kernel."""


def loaded() -> bool:
    """Whether this process has compiled or found the kernel, and loaded it."""
    return hasattr(torch.ops.dynatree, "multiply_rows")


@cache
def available() -> bool:
    """Whether the operators can be called; compiles them where this machine has not yet.

    That takes some 10 seconds, once per version of the kernel and of PyTorch; what was made is kept
    in PyTorch's folder of extensions (TORCH_EXTENSIONS_DIR). Where it cannot be compiled, a warning
    says why.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in FLAGS:
        return False
    try:
        _load(capability)
    except Exception as error:  # PyTorch passes on what Ninja, the compiler or the disk says
        reason = shorten(str(error) or type(error).__name__, 200)
        warnings.warn(
            f"the CPU kernel could not be compiled ({reason}); decoding goes on without it, more "
            "slowly. It needs g++ (Debian: g++) and a folder to write to, TORCH_EXTENSIONS_DIR",
            KernelWarning,
            stacklevel=2,
        )
        return False
    torch.library.register_fake(
        "dynatree::multiply_rows",
        lambda states, weight, bias, outputs: states.new_empty((*states.shape[:-1], outputs)),
    )
    torch.library.register_fake(
        "dynatree::attend",
        lambda queries, keys, values, mask, scale: queries.transpose(1, 2).contiguous(),
    )
    return True


def serves(device: torch.device) -> bool:
    """Whether tensors on `device` can be given to the operators; see `available`."""
    return device.type == "cpu" and available()


def _load(capability: str) -> None:
    # Costs half a second, and only a CPU needs it.
    import ninja
    from torch.utils import cpp_extension

    flags = FLAGS[capability]
    made_of = (SOURCE.read_text(encoding="utf-8"), " ".join(flags), torch.__version__)
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:12]
    name = f"dynatree_{capability.lower()}_{digest}"
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    with FileLock(folder.with_suffix(".lock")):
        # PyTorch's own lock is a file that outlives a process that was killed, and would be waited
        # for without end. Whoever is here is alone.
        (folder / "lock").unlink(missing_ok=True)
        # Where an environment is not activated, its commands are not found.
        path = os.environ.get("PATH", "")
        os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, path))
        try:
            cpp_extension.load(
                name,
                [str(SOURCE)],
                extra_cflags=list(flags),
                extra_ldflags=["-fopenmp"],
                build_directory=str(folder),
                is_python_module=False,
            )
        finally:
            os.environ["PATH"] = path


def panels(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """A weight [out, in] and its bias [out] as `multiply_rows` reads them, float32.

    Returns:
        The weight as [panels, in, width] and the bias as [panels, width], filled up with zeros.
    """
    width = WIDTH[torch.backends.cpu.get_cpu_capability()]
    outputs, inputs = weight.shape
    count = -(-outputs // width)
    rows = weight.new_zeros(count * width, inputs)
    rows[:outputs] = weight
    added = weight.new_zeros(count * width)
    if bias is not None:
        added[:outputs] = bias
    return rows.view(count, width, inputs).transpose(1, 2).contiguous(), added.view(count, width)


def multiply_rows(states: Tensor, weight: Tensor, bias: Tensor, outputs: int) -> Tensor:
    """`states` [..., n, in] by what `panels` made of a weight and bias: [..., n, outputs]."""
    product: Tensor = torch.ops.dynatree.multiply_rows.default(states, weight, bias, outputs)
    return product


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of n tokens to those of m slots that `mask` [1, 1, n, m] shows each of them.

    Args:
        queries: float32 [1, heads, n, head_size].
        keys, values: float32 [1, kv_heads, m, head_size].

    Returns:
        [1, n, heads, head_size]; not a number where a token is shown nothing.
    """
    attended: Tensor = torch.ops.dynatree.attend.default(queries, keys, values, mask, scale)
    return attended


def grow_level(
    logits: Tensor,
    chosen: Tensor | None,
    first: int,
    size: int,
    count: int,
    least: float,
    width: int,
    budget: int,
    tree: tuple[Tensor, ...],
) -> int:
    """Appends the most probable continuations of a level's nodes to a tree.

    Those below `least` are left out, and those that a selection of the `budget` most probable
    nodes would leave out; what is not a number stays.

    Args:
        logits: [w, vocabulary], the draft's after each node.
        chosen: int64 [w], which of the level's nodes these are; None for its first w.
        first: index of the level's first node.
        size: nodes of the tree.
        count: continuations of each node.
        least: lowest cumulative log-probability.
        width: most nodes to append.
        tree: the tensors of a `DraftTree`, see `DraftTree.tensors`.

    Returns:
        Nodes appended.
    """
    appended: int = torch.ops.dynatree.grow_level.default(
        logits, chosen, first, size, count, least, width, budget, *tree
    )
    return appended


def walk(tokens: Tensor, parents: Tensor, choices: Tensor) -> Tensor:
    """The nodes of a tree that the target takes from the root on, as [m]; node 0 is the root.

    Args:
        tokens, parents: int64 [n] or more; a parent comes before its children.
        choices: int64 [n], the target's choice after each node.
    """
    path: Tensor = torch.ops.dynatree.walk.default(tokens, parents, choices)
    return path


def move_slots(storage: Tensor, sources: Tensor, destinations: Tensor) -> None:
    """Copies `storage` [..., slots, size] at the slots `sources` [k] to `destinations` [k]."""
    torch.ops.dynatree.move_slots.default(storage, sources, destinations)
