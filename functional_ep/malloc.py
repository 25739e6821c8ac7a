"""Telling malloc to keep memory that is freed, as CUDA's allocator does."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Whether this process now keeps freed memory for its next large tensor; for whole programs.

    A step frees and takes the same large temporaries again and again. glibc gives them back to the
    system in between, and every page of a fresh one costs a fault: about a twentieth of a step on
    CPU. Other libraries than glibc are left as they are.

    >>> keep_freed_memory() in (True, False)
    True
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(M_TRIM_THRESHOLD, MOST))
