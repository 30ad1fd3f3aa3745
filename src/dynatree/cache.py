"""Preallocated KV slots on the Transformers cache interface.

A slot is where a token's keys and values are stored; a position is what the rotary or learned
embedding sees. For a committed token the two agree. The nodes of a draft tree lie in consecutive
slots whatever their depth, and the entries of the accepted path are gathered down afterwards.
"""

from torch import Tensor
from torch.utils.dlpack import from_dlpack
from transformers import Cache, StaticLayer

from dynatree import gpu, kernel
from dynatree.errors import DecodeError


class SlotLayer(StaticLayer):
    """One layer's view of the storage that its `SlotCache` owns for all layers."""

    def __init__(self, cache: "SlotCache", index: int) -> None:
        super().__init__(max_cache_len=cache.capacity)
        self.cache = cache
        self.index = index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.cache.allocate(key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def show(self, visible: int) -> None:
        """Makes the first `visible` slots the ones that this layer attends to."""
        keys, values = self.cache.parts[self.index]
        self.keys, self.values = keys[:, :, :visible], values[:, :, :visible]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Stores [1, heads, n, head_size] at the placed slots; returns all visible slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # A tensor of slots, not a Python number: a compiled or captured forward is replayed with
        # other slots.
        self.keys.index_copy_(2, self.cache.slots, key_states)
        self.values.index_copy_(2, self.cache.slots, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.visible, 0

    def get_seq_length(self) -> int:
        # Asked for only when Transformers makes the mask itself: in the prefill of an empty cache.
        return 0


class SlotCache(Cache):
    """A static KV cache for one sequence, with explicit write slots.

    The next forward writes its n tokens to `slots` [n] and attends to the first `visible` slots,
    as far as its mask allows; `place` sets both. All layers share one storage tensor of shape
    [layers, 2, 1, kv_heads, capacity, head_size], so that a gather is one operation.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.visible = 0
        self.slots: Tensor
        self.storage: Tensor | None = None
        self.parts: list[tuple[Tensor, Tensor]] = []
        super().__init__(layers=[SlotLayer(self, index) for index in range(num_layers)])

    def allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the shared storage on first use, to fit [1, heads, n, head_size] states.

        Raises:
            DecodeError: a batch, or layers of unequal shape: one storage cannot hold them.
        """
        batch, heads, _, size = key_states.shape
        if batch != 1:
            raise DecodeError(f"DynaTree decodes one sequence at a time, got a batch of {batch}")
        shape = (len(self.layers), 2, 1, heads, self.capacity, size)
        if self.storage is None:
            # Zeros: an unwritten slot that a mask hides must still not hold a NaN.
            self.storage = key_states.new_zeros(shape)
            # The same memory as tensors with storages of their own: torch.compile spends minutes
            # on the question whether views of one storage, written to, overlap.
            self.parts = [(from_dlpack(layer[0]), from_dlpack(layer[1])) for layer in self.storage]
            self._show()
        if self.storage.shape != shape or value_states.shape != key_states.shape:
            raise DecodeError(
                "keys and values must have one shape in all layers, got keys "
                f"{tuple(key_states.shape)} and values {tuple(value_states.shape)} beside storage "
                f"{tuple(self.storage.shape)}: this model's KV layout is not supported"
            )

    def place(self, slots: Tensor, visible: int) -> None:
        """Lets the next forward write its tokens to `slots` [n] and see `visible` slots.

        Raises:
            DecodeError: there are fewer slots.
        """
        if visible > self.capacity:
            raise DecodeError(
                f"the KV cache holds {self.capacity} slots, {visible} are needed; make the "
                "decoder with a larger max_length"
            )
        self.slots = slots
        if visible != self.visible:
            self.visible = visible
            self._show()

    def _show(self) -> None:
        if self.storage is not None:
            for layer in self.layers:
                layer.show(self.visible)

    def gather(self, sources: Tensor, destinations: Tensor) -> None:
        """Moves the entries of the slots `sources` [k] to `destinations` [k], in every layer."""
        if self.storage is None:
            return
        kernels = gpu.kernels(self.storage.device)
        if kernels is not None:
            kernels.move_slots(self.storage, sources, destinations)
        elif kernel.serves(self.storage.device):
            kernel.move_slots(self.storage, sources, destinations)
        else:
            # The selection copies, so overlapping slots are safe.
            moved = self.storage.index_select(-2, sources)
            self.storage.index_copy_(-2, destinations, moved)
