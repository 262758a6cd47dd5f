"""Memory of this process as numpy arrays, without copying."""

import ctypes
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

_POPULATE_WRITE = 23  # madvise(2), Linux 5.14
_libc = ctypes.CDLL(None, use_errno=True)  # a CDLL call releases the GIL, mmap.madvise does not


def bytes_at(address: int, size: int) -> npt.NDArray[np.uint8]:
    """A writable view of `size` bytes. The caller keeps the memory alive."""
    raw: Any = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(raw, dtype=np.uint8)


def bytes_of(area: mmap.mmap) -> npt.NDArray[np.uint8]:
    """A writable view of a mapping, which lives at least as long."""
    return np.frombuffer(area, dtype=np.uint8)


def map_pages(view: npt.NDArray[np.uint8], start: int, end: int) -> bool:
    """Enter memory that already exists into this process's page tables, so that the first copy does not pay for it."""
    address = view.ctypes.data + start
    return bool(_libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(end - start), _POPULATE_WRITE) == 0)
