"""The C library's memory: a run on a CPU keeps what it frees.

Every step frees its activations, and glibc returns the free end of its heap to the system as soon as this has twice the
size of a block that it maps by itself (at most 64 MiB). The next step gets the same memory back page by page, each
zeroed by the system: 3 to 8 % of a step. Blocks of 32 MiB and more are mapped by themselves, and always returned.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc itself raises it so far, and no further
_USER_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")

_keeping = False


@contextmanager
def kept_memory() -> Iterator[None]:
    """In this context, freed memory stays with the process; at its end, it is returned to the system.

    Nothing is changed with another C library, or if one of the user's variables of the environment rules it.
    """
    global _keeping
    library = ctypes.CDLL(None)
    glibc = hasattr(library, "mallopt") and hasattr(library, "malloc_trim")
    if not glibc or _keeping or any(map(os.environ.get, _USER_SETTINGS)):
        yield
        return
    _keeping = True
    library.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)  # else setting the other one fixes it at 128 KiB
    library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        _keeping = False
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
        library.malloc_trim(0)
