"""The allocator of this process, asked for what a run would ask it for."""

from __future__ import annotations

import ctypes

ALIGNMENT = 64  # of torch's tensors on a CPU
PROBE = 64 * 2**20


class Heap:
    """Asks for blocks and never touches them: they take addresses and no memory, and lie where
    those of a run would, holes between them included. To be used after
    `cores.keep_freed_memory`; as it comes, glibc maps large blocks one by one and leaves no holes.

    Attributes:
        grown: bytes from where the heap ended to the end of the last block, at most.
    """

    def __init__(self) -> None:
        self.grown = 0
        self._library = ctypes.CDLL(None)
        self._library.free.argtypes = [ctypes.c_void_p]
        self._library.posix_memalign.argtypes = [
            ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t,
        ]  # fmt: skip
        self._blocks: dict[int, int] = {}
        self._end = 0
        self.take(0, PROBE)  # too large for the holes that there are, so it lies at the end
        self._end, self.grown = self._end + self.grown, 0

    def take(self, key: int, size: int) -> None:
        """Ask for a block. One that the system refuses, larger than all memory, is left out."""
        place = ctypes.c_void_p()
        if self._library.posix_memalign(ctypes.byref(place), ALIGNMENT, size) == 0 and place.value:
            self._blocks[key] = place.value
            self.grown = max(self.grown, place.value + size - self._end)

    def give(self, key: int) -> None:
        """Hand a block back."""
        self._library.free(self._blocks.pop(key, None))

    def close(self) -> None:
        """Hand all blocks back."""
        for key in list(self._blocks):
            self.give(key)
