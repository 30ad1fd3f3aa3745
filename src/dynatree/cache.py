"""Preallocated KV slots on the Transformers cache interface.

A slot is where a token's keys and values are stored; a position is what the rotary or learned
embedding sees. For a committed token the two agree. The nodes of a draft tree lie in consecutive
slots whatever their depth, and the entries of the accepted path are gathered down afterwards.
"""

from torch import Tensor
from transformers import Cache, StaticLayer

from dynatree.errors import DecodeError


class SlotLayer(StaticLayer):
    """One layer's view of the storage that its `SlotCache` owns for all layers."""

    def __init__(self, cache: "SlotCache", index: int) -> None:
        super().__init__(max_cache_len=cache.capacity)
        self.cache = cache
        self.index = index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        storage = self.cache.allocate(key_states, value_states)
        self.keys, self.values = storage[self.index, 0], storage[self.index, 1]
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Stores [1, heads, n, head_size] at the current slots; returns all visible slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, stop = self.cache.start, self.cache.stop
        self.keys[:, :, start:stop] = key_states
        self.values[:, :, start:stop] = value_states
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.stop, 0

    def get_seq_length(self) -> int:
        return self.cache.start


class SlotCache(Cache):
    """A static KV cache for one sequence, with explicit write slots.

    The next forward writes its n tokens to the slots `start .. stop` and attends to the slots
    before `stop`; `place` sets both. All layers share one storage tensor of shape
    [layers, 2, 1, kv_heads, capacity, head_size], so that a gather is one operation.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.start = 0
        self.stop = 0
        self.storage: Tensor | None = None
        super().__init__(layers=[SlotLayer(self, index) for index in range(num_layers)])

    def allocate(self, key_states: Tensor, value_states: Tensor) -> Tensor:
        """Returns the shared storage, made on first use to fit [1, heads, n, head_size] states.

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
        if self.storage.shape != shape or value_states.shape != key_states.shape:
            raise DecodeError(
                "keys and values must have one shape in all layers, got keys "
                f"{tuple(key_states.shape)} and values {tuple(value_states.shape)} beside storage "
                f"{tuple(self.storage.shape)}: this model's KV layout is not supported"
            )
        return self.storage

    def place(self, start: int, count: int) -> None:
        """Lets the next forward write `count` tokens from slot `start` on.

        Raises:
            DecodeError: the slots end beyond the capacity.
        """
        if start + count > self.capacity:
            raise DecodeError(
                f"the KV cache holds {self.capacity} slots, {start + count} are needed; make the "
                "decoder with a larger max_length"
            )
        self.start, self.stop = start, start + count

    def gather(self, slots: Tensor, start: int) -> None:
        """Moves the entries of `slots` [k] to the slots from `start` on, in every layer."""
        if self.storage is not None and len(slots):
            # Indexing with a tensor copies, so overlapping slots are safe.
            self.storage[..., start : start + len(slots), :] = self.storage[..., slots, :]
