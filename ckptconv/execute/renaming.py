"""Renames that either happen or do not: into a free name, and in exchange for what stands there.

Linux does both in one call, renameat2(2). Where the kernel or the filesystem does not know it, the next best way is taken and told.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2
_UNKNOWN = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY})


def rename_new(old: Path, new: Path) -> None:
    """Renames ``old`` to ``new``; raises :class:`FileExistsError` where that name is taken, whenever it was."""
    if _renameat2(old, new, _NOREPLACE):
        return
    if not old.is_dir():
        # A link fails where a name exists, so nothing that appeared meanwhile is overwritten.
        try:
            os.link(old, new)
        except FileExistsError:
            raise
        except OSError:  # a filesystem without links
            pass
        else:
            os.unlink(old)
            return
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
    os.rename(old, new)


def exchange(left: Path, right: Path) -> bool:
    """Swaps two names at one stroke. False, and nothing done, where the system cannot."""
    return _renameat2(left, right, _EXCHANGE)


def _renameat2(old: Path, new: Path, flags: int) -> bool:
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(old), None, str(new))
