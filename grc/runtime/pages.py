"""Pages: those of memory-mapped weights are mapped ahead of their first use, and those that a request freed are kept."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable

import torch

POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14: map what is there, read what is not
CHUNK = 64 << 20  # bytes a call: each call ends soon, so that a process that exits does not wait
SMALL = 8 << 20  # bytes: smaller tensors are mapped by their first use
PAGE = 4096
# Of malloc.h: the parameters of mallopt
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
KEPT = 2**31 - 1  # bytes


def keep_freed_memory() -> None:
    """Let this process keep up to 2 GB of freed memory for the next request, from whichever thread that comes.

    glibc gives large blocks back to the system as soon as they are free, and a thread's own heap with them: each request
    then faults the pages of its intermediate results in again. Other C libraries are left alone.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        for parameter, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, KEPT), (ARENA_MAX, 1)):
            libc.mallopt(parameter, value)


def map_ahead(tensors: Iterable[torch.Tensor]) -> threading.Thread | None:
    """Start a thread that maps the pages of large tensors; None where all are small.

    A page that is read for the first time costs a page fault even when the file is in memory: a batch of look-ups all over
    a table would pay one a row. Kernels before 5.14 refuse the advice, and pages are then mapped by their first use.
    """
    large = [t for t in tensors if t.nbytes >= SMALL]
    if not large:
        return None
    thread = threading.Thread(target=populate, args=(large,), name="grc-map-ahead", daemon=True)
    thread.start()
    return thread


def populate(tensors: list[torch.Tensor]) -> None:
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for tensor in tensors:
        start = tensor.data_ptr() // PAGE * PAGE
        end = tensor.data_ptr() + tensor.nbytes
        for address in range(start, end, CHUNK):
            if advise(address, min(CHUNK, end - address), POPULATE_READ) != 0:
                return
