"""The safetensors format, written and mapped without a second copy of anything.

8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, the data without
holes: the files are ordinary ones that the safetensors package reads. We write them ourselves to
stream and hash tensor by tensor, and map them ourselves because whoever owns the mapping can give
its pages back (`Mapping.release`).

The mapping stays valid when the file is renamed or unlinked, as saving over it does. A file that
somebody else truncates in place while a model runs from it kills the process; don't.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fxquant.runtime.fields import Field, parse

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PAIRS = {torch.complex128: torch.float64, torch.complex32: torch.float16}  # as [..., 2]
_HEADER_LIMIT = 16 << 20
_NAME = re.compile(r"[\x20-\x7e]{1,4000}")
_WIDTH = 8  # bytes of the header's length; the data begins at a multiple of it


def storable(value: Tensor) -> Tensor:
    """A tensor as a file holds it: complex numbers that the format lacks are pairs of real ones."""
    return torch.view_as_real(value.resolve_conj()) if value.dtype in _PAIRS else value


def stored_form(dtype: torch.dtype, shape: list[int]) -> tuple[torch.dtype, list[int]]:
    """Dtype and shape of `storable` of such a tensor."""
    return (_PAIRS[dtype], [*shape, 2]) if dtype in _PAIRS else (dtype, shape)


def restored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `storable`."""
    return torch.view_as_complex(value) if dtype in _PAIRS else value


def stream(tensors: Mapping[str, Tensor]) -> Iterator[memoryview | bytes]:
    """The bytes of a safetensors file, tensor by tensor: wide dtypes first, so all are aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        value = tensors[name]
        start, end = end, end + value.numel() * value.element_size()
        header[name] = {
            "dtype": _NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _WIDTH)
    yield len(text).to_bytes(_WIDTH, "little")
    yield text
    for name in order:
        yield _bytes_of(tensors[name])


def _bytes_of(value: Tensor) -> memoryview:
    """A tensor's bytes in C order; a copy only where its memory has another order."""
    flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array) if flat.numel() else memoryview(b"")


class MappedTensors:
    """A safetensors file in memory, page by page as it is read.

    Attributes:
        entries: dtype and shape by name.

    Raises:
        ArtifactError: the header is not that of a safetensors file of this size.
    """

    def __init__(self, descriptor: int, size: int, file: str):
        whole = Field(None, file)
        if size < _WIDTH:
            whole.fail("is too short for a header")
        self._map = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
        length = int.from_bytes(self._map[:_WIDTH], "little")
        if length > min(_HEADER_LIMIT, size - _WIDTH):
            whole.fail(f"says that its header has {length} bytes, of {size} in all")
        self._start = _WIDTH + length
        header = parse(self._map[_WIDTH : self._start], file)
        self._places: dict[str, tuple[torch.dtype, list[int], int, int]] = {}
        for name, field in header.members().items():
            self._places[name] = _place(name, field)
        self._check_layout(size - self._start, whole)

    @property
    def entries(self) -> dict[str, tuple[torch.dtype, list[int]]]:
        return {name: (dtype, shape) for name, (dtype, shape, _, _) in self._places.items()}

    def _check_layout(self, size: int, whole: Field) -> None:
        """The tensors follow each other without gaps and fill the file."""
        end = 0
        for dtype, _, start, stop in sorted(self._places.values(), key=lambda place: place[2:]):
            if start != end or (self._start + start) % dtype.itemsize:
                whole.fail(f"has a tensor at byte {start}, where {end} was expected")
            end = stop
        if end != size:
            whole.fail(f"has {size} bytes of data, its header describes {end}")

    def view(self, name: str) -> Tensor:
        """A tensor over the mapped file. It must not be written to."""
        dtype, shape, start, stop = self._places[name]
        count = (stop - start) // dtype.itemsize
        if not count:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._start + start)
        return flat.view(shape)

    def copy(self, name: str) -> Tensor:
        """A tensor in memory of its own, aligned as torch aligns: float kernels care."""
        return self.view(name).clone()

    def release(self, names: Iterable[str]) -> None:
        """Give back the memory of these tensors; it is read again from the file if needed.

        Only whole pages go: what a neighbour shares stays.
        """
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        page = mmap.PAGESIZE
        for name in names:
            _, _, start, stop = self._places[name]
            first = -(-(self._start + start) // page) * page
            last = (self._start + stop) // page * page
            if last > first:
                self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


def _place(name: str, field: Field) -> tuple[torch.dtype, list[int], int, int]:
    if not _NAME.fullmatch(name):
        field.fail("is not a tensor name")
    entry = field.record(("dtype", "shape", "data_offsets"))
    dtype = _DTYPES[entry["dtype"].one_of(_DTYPES)]
    shape = [size.integer(0, 2**31 - 1) for size in entry["shape"].items(8)]
    start, stop = (o.integer(0) for o in entry["data_offsets"].items(count=2))
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    if stop - start != size:
        entry["data_offsets"].fail(f"spans {stop - start} bytes, {dtype} {shape} has {size}")
    return dtype, shape, start, stop
