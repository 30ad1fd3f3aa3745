"""Compiles what the GPU kernels' launches need, for a GPU that is not there; a command of its own.

Triton's interpreter takes what its compiler refuses, and knows nothing of shared memory. Everything
but the launch itself is Triton's own: the launchers are called with tensors on the CPU.

    python tests/compiled_kernels.py CAPABILITY

prints a line of JSON for each launch: the kernel's name and the bytes of shared memory.
"""

import json
import sys
from typing import ClassVar

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel

PYTHIA = (
    (2560, 10240, 32, ((1, False), (16, False), (32, False), (64, False), (100, True))),
    (512, 2048, 8, ((2, False), (64, False), (100, True))),
)
"""Width, width of the MLP, heads and rows, whether the living ones are counted: of Pythia-2.8B and
Pythia-70M."""


class Absent:
    """A driver of a GPU that nothing is launched on."""

    capability: ClassVar[int]

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def report(kernel):
    print(json.dumps([kernel.metadata.name, kernel.metadata.shared]))
    return lambda *launch: None


def main(capability):
    Absent.capability = capability
    triton.runtime.driver.set_active(Absent())
    CompiledKernel._init_handles = lambda self: None
    CompiledKernel.launch_metadata = lambda *launch: None
    CompiledKernel.run = property(report)
    CompiledKernel.function = None

    from dynatree import cuda_kernels as kernels
    from dynatree import gpu

    gpu.capability = lambda device: divmod(capability, 10)
    workspace = kernels.Workspace(torch.device("cpu"))
    kind = {"dtype": torch.bfloat16}
    for width, inner, heads, counts in PYTHIA:
        norms = [nn.LayerNorm(width, **kind) for _ in range(2)]
        enters = [nn.Linear(width, 3 * width, **kind), nn.Linear(width, inner, **kind)]
        leaves = [nn.Linear(width, width, **kind), nn.Linear(inner, width, **kind)]
        cache = torch.zeros(2, 1, heads, 1032, width // heads, **kind)
        tables = (torch.zeros(2048, width // heads // 4, **kind),) * 2
        for rows, counted in counts:
            living = torch.ones(1, dtype=torch.int32) if counted else None
            at = torch.arange(rows)
            hidden = kernels.select_rows(torch.zeros(100, width, **kind), at)
            mask = kernels.select_columns(
                torch.ones(rows, 300, dtype=torch.bool), at.new_zeros(1024)
            )
            around = kernels.surroundings(mask, at, at, tables, living)
            states, active = kernels.enter(hidden, norms, enters, living)
            attended = kernels.attend(states, at, around, *cache, workspace, living)
            kernels.leave(hidden, attended, active, leaves, workspace, living)
            kernels.norm(hidden, norms[:1], living)
            kernels.best(torch.zeros(rows, 50304, **kind), 2, workspace, True, living)
    kernels.best(torch.zeros(1, 50304, **kind), 1, workspace, log_probs=False)
    kernels.move_slots(cache, torch.arange(8), torch.arange(8))
    tree = (
        *(torch.zeros(256, dtype=torch.long) for _ in range(3)),
        torch.zeros(256),
        torch.zeros(256, 257, dtype=torch.bool),
    )
    values = torch.zeros(4, 2)
    living = torch.ones(1, dtype=torch.int32)
    kernels.grow(values, values.long(), values[:, 0], 3, 7, -4.6, 8, tree, living)
    kernels.compact(tree, 255, 64, tree)
    one = torch.zeros(1, dtype=torch.long)
    kernels.begin(tree[0], one, tree[0][:2], torch.zeros(8, 64, dtype=torch.long), one, 257, 1024)
    for rows in (16, 256):
        path, chosen, count = kernels.walk(tree, torch.zeros(rows, dtype=torch.long), 8)
        kernels.commit(path, chosen, count, tree[0], tree[0], one, (path, one))
    kernels.survey(tree[3], tree[2], one, one, one)
    kernels.any_nan(tree[3], one)


if __name__ == "__main__":
    with torch.no_grad():
        main(int(sys.argv[1]))
