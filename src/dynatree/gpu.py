"""Which devices the Triton kernels run on."""

import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch

from dynatree.kernel import KernelWarning


@cache
def kernels(device: torch.device) -> ModuleType | None:
    """`dynatree.cuda_kernels` for tensors on `device`; None where PyTorch's operators serve.

    They need an NVIDIA GPU of compute capability 8.0 or later, and Triton, which PyTorch brings;
    where that cannot be imported, a warning says so.
    """
    if capability(device) < (8, 0):
        return None
    try:
        from dynatree import cuda_kernels
    except ImportError as error:
        warnings.warn(
            f"the GPU kernels could not be imported ({error}); decoding goes on without them, more "
            f"slowly. Install the Triton that PyTorch {torch.__version__} asks for",
            KernelWarning,
            stacklevel=2,
        )
        return None
    return cuda_kernels


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU, (9, 0) for Hopper; (0, 0) of what is none."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


@cache
def workspace(device: torch.device) -> Any:
    """One for all kernels on `device`, which run one after the other."""
    found = kernels(device)
    assert found is not None
    return found.Workspace(device)
