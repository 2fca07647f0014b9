"""Memory that is used again at the same addresses."""

from __future__ import annotations

import ctypes
import weakref
from bisect import bisect_left, insort
from collections.abc import Iterable

import torch
from torch import Tensor

_ALIGNMENT = 64
_CHUNK = 16 * 2**20


class Arena:
    """Gives tensors memory of its own, and takes it back when their storage is freed.

    Memory stays the arena's, and in its place, as long as the arena lives. Not for several threads.

    Attributes:
        size: bytes in all, used or not.
    """

    def __init__(self) -> None:
        self.size = 0
        self._chunks: list[Tensor] = []
        self._free: list[tuple[int, int]] = []  # address, bytes; by address, never adjacent

    def empty_like(self, tensor: Tensor) -> Tensor:
        """A tensor with the shape, strides and dtype of ``tensor``, on the CPU."""
        if tensor.numel() == 0:
            return torch.empty_like(tensor)
        nbytes = _aligned(_extent(tensor) * tensor.element_size())
        address = self._take(nbytes)
        # The storage holds the block, however many views of it there are.
        block = (ctypes.c_byte * nbytes).from_address(address)
        weakref.finalize(block, self._give_back, address, nbytes).atexit = False
        return _tensor(block, tensor)

    def borrowed(self, tensor: Tensor) -> Tensor:
        """``tensor``, but if it lies here a tensor that does not keep its memory from being used
        again: for who knows when it is."""
        if tensor.layout == torch.strided and tensor.numel() == 0:
            return torch.empty_like(tensor)  # nothing says where it lies
        if tensor.layout != torch.strided or not self._holds(tensor.data_ptr()):
            return tensor
        nbytes = _extent(tensor) * tensor.element_size()
        return _tensor((ctypes.c_byte * nbytes).from_address(tensor.data_ptr()), tensor)

    @property
    def taken(self) -> int:
        """Bytes in blocks that some tensor still holds."""
        return self.size - sum(size for _, size in self._free)

    def taken_by(self, tensors: Iterable[Tensor]) -> int:
        """Those that these tensors hold."""
        here = (t for t in tensors if t.layout == torch.strided and self._holds(t.data_ptr()))
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in here)}
        return sum(map(_aligned, storages.values()))

    def _holds(self, address: int) -> bool:
        return any(0 <= address - chunk.data_ptr() < chunk.numel() for chunk in self._chunks)

    def _take(self, nbytes: int) -> int:
        for i, (address, size) in enumerate(self._free):
            if size >= nbytes:
                left = [(address + nbytes, size - nbytes)] if size > nbytes else []
                self._free[i : i + 1] = left
                return address
        size = max(nbytes, _CHUNK)
        chunk = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
        self._chunks.append(chunk)
        self.size += size
        address = -(-chunk.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        if size > nbytes:
            insort(self._free, (address + nbytes, size - nbytes))
        return address

    def _give_back(self, address: int, nbytes: int) -> None:
        """Add a block to the free ones, in one piece with those beside it."""
        i = bisect_left(self._free, (address, 0))
        end = address + nbytes
        if i < len(self._free) and self._free[i][0] == end:
            end += self._free.pop(i)[1]
        if i and sum(self._free[i - 1]) == address:
            i -= 1
            address = self._free.pop(i)[0]
        self._free.insert(i, (address, end - address))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last in memory."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * step for size, step in steps)


def _tensor(memory: ctypes.Array[ctypes.c_byte], like: Tensor) -> Tensor:
    flat = torch.frombuffer(memory, dtype=like.dtype, count=_extent(like))
    return flat.as_strided(like.shape, like.stride())
