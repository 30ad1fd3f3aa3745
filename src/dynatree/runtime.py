"""How forwards run: eagerly, compiled, or as replayed CUDA graphs; and which shapes they have."""

import gc
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor
from transformers import Cache, PreTrainedModel

from dynatree import fused
from dynatree.errors import DecodeError
from dynatree.schema import RuntimeMode

SLOT_BUCKETS = {True: 256, False: 64}
"""Attention reads a multiple of this many KV slots, where shapes are static and where not."""


_INDUCTOR: dict[str, str | int | bool | Callable[..., Any]] = {
    # The code that Inductor generates for a CPU brings an OpenMP runtime of its own. With threads,
    # its waiting ones would spin on the cores that PyTorch's matrix products want.
    "cpp.threads": 1,
    # Some 200 checks of a call's shapes take as long as a tenth of it; all calls have one form.
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,
}


@dataclass
class Preparation:
    """What had to be done before timing: seconds, graphs captured, bytes that they hold."""

    seconds: float = 0.0
    graphs: int = 0
    graph_bytes: int = 0


class Runtime:
    """Runs the phases of decoding on one device.

    A phase is a function of preallocated tensors that reads and changes them in place, so that
    running it is the same as replaying what was captured of it.

    Attributes:
        mode: `eager`, `compiled` (`torch.compile` of the models' forward) or `cudagraph` (that, or
            `dynatree.fused` where it serves, captured with all that lies between two forwards).
        static: shapes depend on the strategy alone and are rounded up to buckets, and the host
            reads one tensor per round: for devices where a read waits for all work in flight. On a
            CPU reads are free, and every forward holds exactly the living nodes.
        preparation: what `prepare` of the decoder cost.
    """

    def __init__(self, mode: RuntimeMode, device: torch.device, static: bool | None = None) -> None:
        """Resolves `auto`; `static` is for tests of the static shapes on a CPU.

        Raises:
            DecodeError: CUDA graphs on another device.
        """
        cuda = device.type == "cuda"
        if mode == "cudagraph" and not cuda:
            raise DecodeError(
                f"runtime: 'cudagraph' needs a CUDA device, the models are on {device}; use auto, "
                "eager or compiled"
            )
        resolved = "cudagraph" if cuda else "eager"
        self.mode = resolved if mode == "auto" else mode
        self.static = device.type != "cpu" if static is None else static
        self.device = device
        self.preparation = Preparation()
        self._graphs: dict[tuple[object, ...], Any] = {}
        self._pool: Any = None

    def rows(self, count: int) -> int:
        """Rows of a forward that has to hold `count` nodes: the next power of two, if static."""
        return 1 << (count - 1).bit_length() if self.static else count

    def visible(self, slots: int) -> int:
        """KV slots that attention reads, and the mask may hide, where `slots` are in use."""
        bucket = SLOT_BUCKETS[self.static]
        return -(-slots // bucket) * bucket

    def capacity(self, slots: int) -> int:
        """KV slots to allocate where up to `slots` are in use."""
        # Never a number that `visible` returns: torch.compile takes equal sizes for one size, and
        # would compile once more for the forward that sees all slots.
        return self.visible(slots) + 8

    def callable(self, model: PreTrainedModel) -> Callable[..., Tensor]:
        """The forward of `model`, from its inputs to its logits [1, n, vocabulary], as this runtime
        calls it, with shapes left open."""
        if self.mode == "eager":
            on_cpu = self.device.type == "cpu" and model.dtype == torch.float32
            return partial(_without_onednn if on_cpu else forward, model)
        if self.mode == "cudagraph" and fused.serves(model):
            return fused.Forward(model)
        # Once: a model finds out its dtype and device by walking over its parameters.
        return partial(_compiled, model, (model.dtype, model.device))

    def run(self, key: tuple[object, ...], phase: Callable[[], None]) -> None:
        """Runs `phase`, or replays what was captured under `key`."""
        graph = self._graphs.get(key)
        if graph is None:
            phase()
        else:
            graph.replay()

    def prepare(
        self, phases: dict[tuple[object, ...], Callable[[], None]], reset: Callable[[], object]
    ) -> None:
        """Runs every phase, so that all is compiled, and captures it where graphs are used.

        Graphs share one memory pool: they run one after the other, and what one leaves for the
        next lies in tensors that were there before.

        Args:
            phases: each by the key that `run` is given.
            reset: makes a state that every phase can start from; called before each run.

        Raises:
            DecodeError: the graphs of another decoder are here; `run` would replay them.
        """
        if self._graphs:
            raise DecodeError(
                "this runtime holds the graphs of another decoder; make a Runtime for each Decoder"
            )
        if self.mode == "cudagraph":
            # Blocks that are free but kept would hide what the graphs take.
            torch.cuda.empty_cache()
        begin, before = time.perf_counter(), self._reserved()
        for key, phase in phases.items():
            reset()
            phase()
            if self.mode == "cudagraph":
                self._graphs[key] = self._capture(phase, reset)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - begin
        if self.mode == "cudagraph":
            # Nor are those that compiling and the runs before the captures left.
            torch.cuda.empty_cache()
        self.preparation = Preparation(
            seconds=seconds,
            graphs=len(self._graphs),
            graph_bytes=max(0, self._reserved() - before) if self._graphs else 0,
        )

    def _capture(self, phase: Callable[[], None], reset: Callable[[], object]) -> Any:
        # Libraries allocate their workspaces on a stream's first use, which cannot be captured.
        side = _side_stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            reset()
            phase()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # The collector may find another decoder's graphs, and to free these breaks a capture.
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                phase()
        finally:
            if collects:
                gc.enable()
        return graph

    def _reserved(self) -> int:
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0


def forward(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor,
    past_key_values: Cache,
) -> Tensor:
    """Logits [1, n, vocabulary] of one forward over n tokens; see `ModelRunner.forward`."""
    # The logits alone: compiled code would fill in the whole output object at every call.
    logits: Tensor = model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        use_cache=True,
    ).logits
    return logits


def _without_onednn(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """`forward` in float32 on a CPU, where all that PyTorch gives to oneDNN is GELU. It is set up
    anew at every call, which for a few rows takes longer than PyTorch's own."""
    with _ONEDNN_OFF:
        return forward(model, **inputs)


class _OnednnOff:
    """Switches oneDNN off while it is entered: a switch of the whole process, so the last of
    several threads to leave puts it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._enabled: Any = True

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._enabled = torch.backends.mkldnn.enabled
                torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch.backends.mkldnn.enabled = self._enabled


_ONEDNN_OFF = _OnednnOff()


_COMPILED: weakref.WeakKeyDictionary[
    PreTrainedModel, dict[tuple[object, ...], Callable[..., Tensor]]
] = weakref.WeakKeyDictionary()


def _compiled(
    model: PreTrainedModel, kind: tuple[object, ...], *, input_ids: Tensor, **inputs: Any
) -> Tensor:
    """The compiled forward of `model`; compiled on first use for one token, and for several.

    What torch.compile would check before every call, a tenth of a target's forward and a third of
    a small draft's, is settled here instead: all calls have the same form, the number of tokens,
    the visible slots and the capacity are left open, and the key, with the dtype and device that
    `kind` holds, names what else can change.
    Unchecked code must be found by nobody else, so each has a code object of its own.
    """
    variants = _COMPILED.setdefault(model, {})
    one = input_ids.shape[1] == 1
    key = (one, *kind, model.training)
    if key in variants:
        return variants[key](model, input_ids, **inputs)
    code = forward.__code__.replace(co_name=f"forward_{'one' if one else 'several'}")
    compiled: Any = torch.compile(
        FunctionType(code, forward.__globals__),
        dynamic=True,
        fullgraph=True,
        options={**_INDUCTOR, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
    )
    with (
        # Two tokens and two heads are not the same two, and stay apart.
        torch.fx.experimental._config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
        # A model's numbers are its own.
        torch._dynamo.config.patch(specialize_float=True),
    ):
        if input_ids.device.type == "cpu":
            # What surrounds the compiled code at every call is a fifth of a small draft's forward.
            compiled = compiled.aot_compile(((model, input_ids), inputs))
            compiled.disable_guard_check()
        variants[key] = compiled
        return variants[key](model, input_ids, **inputs)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for every stream that it ever ran on."""
    return torch.cuda.Stream(device)
