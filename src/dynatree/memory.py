"""What a job needs of its device's memory at least, against what is free there.

Counted are the weights, and the KV slots of each decoder that the job keeps; what a forward needs
beside them is not. So a job of which even this does not fit is refused before it loads anything,
and one that fits may still run out: it then says the same two numbers.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dynatree.devices import DeviceError
from dynatree.pairs import resolve_device, sources
from dynatree.specs import Models, ModelSource
from dynatree.strategies import StrategyBase

EXHAUSTED: Final = ("out of memory", "can't allocate memory", "_STATUS_ALLOC_FAILED")
"""What errors without a class of their own say of memory: of CUDA, its libraries, Triton, a CPU."""


@dataclass(frozen=True)
class Need:
    """Bytes that a job needs at least."""

    weights: int
    caches: int

    def __str__(self) -> str:
        total = gib(self.weights + self.caches)
        return f"at least {total} (weights {gib(self.weights)}, caches {gib(self.caches)})"


class Free(NamedTuple):
    """Bytes free on a device, those that it has, and what it is called."""

    free: int
    total: int
    device: str


@contextmanager
def fitting(
    what: str, pair: str, models: Models, decoders: Iterable[StrategyBase], length: int
) -> Iterator[None]:
    """Refuses a job that cannot fit, and explains when one runs out of memory after all.

    Args:
        what: what the job does.
        decoders: the strategies that are prepared at the same time.
        length: tokens that each decodes at least.

    Raises:
        DeviceError: the device's memory is too small; with need and free memory in GiB.
        PairError: the pair is not trained, or there is no CUDA device.
    """
    need, there = needed(pair, models, decoders, length), available(resolve_device(models.device))
    message = (
        f"{what}: out of memory on {there.device}: pairs.{pair} needs "
        f"{need or 'an unknown amount'}, and {gib(there.free)} of {gib(there.total)} were free; "
        "free memory there, take a device with more, or lower max_new_tokens, node_budget, or the "
        "pair's size or dtype"
    )
    if need is not None and need.weights + need.caches > there.free:
        raise DeviceError(message)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DeviceError(f"{message} ({first})") from error


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: by its class, or else in words."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in text for words in EXHAUSTED
    )


def needed(pair: str, models: Models, decoders: Iterable[StrategyBase], length: int) -> Need | None:
    """What the weights and the caches of `decoders` take; None if a model's size is not known.

    Raises:
        PairError: the pair is not trained.
    """
    size = getattr(torch, models.dtype).itemsize
    target, draft = (_configuration(source) for source in sources(pair, models))
    if target is None or draft is None:
        # Loading will say what is wrong with it.
        return None
    caches = 0
    for strategy in decoders:
        slots = length + strategy.max_depth + strategy.max_drafted
        caches += slots * (_slot(target) + (_slot(draft) if strategy.max_depth else 0))
    return Need((_parameters(target) + _parameters(draft)) * size, caches * size)


def available(device: torch.device) -> Free:
    """The memory of a device, or for a CPU that of the host.

    Raises:
        DeviceError: a GPU is too full to be asked.
    """
    if device.type == "cuda":
        try:
            return Free(*torch.cuda.mem_get_info(device), torch.cuda.get_device_name(device))
        except RuntimeError as error:
            if not ran_out(error):
                raise
            raise DeviceError(
                f"{device} is full: not even CUDA itself finds memory there ({error}); see with "
                "nvidia-smi who holds it, free it, or take another device"
            ) from error
    memory = psutil.virtual_memory()
    return Free(memory.available, memory.total, "the host")


def gib(size: int) -> str:
    """Bytes as messages show them."""
    return f"{size / 2**30:.2f} GiB"


def _configuration(source: ModelSource) -> Any:
    where: dict[str, Any] = (
        {"local_files_only": True} if source.path is not None else {"revision": source.revision}
    )
    try:
        return AutoConfig.from_pretrained(
            source.path or source.hub, trust_remote_code=False, **where
        )
    except (OSError, ValueError):
        return None


def _parameters(config: Any) -> int:
    # On this device tensors have shapes and no memory.
    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(config).num_parameters())


def _slot(config: Any) -> int:
    """Numbers that one KV slot holds over all layers, keys and values."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = getattr(text, "num_key_value_heads", None) or heads
    return int(text.num_hidden_layers * 2 * kept * size)
