"""Sends pages to the disk while others are still being made, so that the fsync before the rename finds little left to do.

It is a hint and no promise: durability comes from the fsync alone, and where the call does not exist nothing is lost but time.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

_WRITE = 2  # SYNC_FILE_RANGE_WRITE: start the writing, wait for nothing


def start(descriptor: int, offset: int, nbytes: int) -> None:
    """Starts the writing of a range that is in the page cache."""
    call = _call()
    if call is not None:
        call(descriptor, offset, nbytes, _WRITE)


@cache
def _call() -> Any:
    """glibc's and musl's ``sync_file_range``; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    try:
        found = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    found.restype = ctypes.c_int
    return found
