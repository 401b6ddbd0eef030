"""Ranges shared with the source instead of copied, where the filesystem can (Btrfs, XFS, bcachefs): no byte moves, no space is taken.

Blocks are shared, so a range must lie equally in its block in both files; layouts see to that for large tensors. The shared blocks become
the output's own as soon as anybody writes to either file.
"""

from __future__ import annotations

import struct
import sys

BLOCK = 4096
_LEAST = 1 << 20  # below, a system call is saved by copying
_FICLONERANGE = 0x4020940D


def clone(source: int, offset: int, destination: int, to: int, nbytes: int) -> tuple[int, int]:
    """Shares what can be shared of ``nbytes`` at ``offset``, given and taken as descriptors. Gives back the part of the range that is done,
    as (begin, end) within it; an empty one where the offsets do not allow it.

    Raises ``OSError`` where the kernel or the filesystems cannot do it (another filesystem, none that shares, not Linux).
    """
    begin = -offset % BLOCK
    end = nbytes - (offset + nbytes) % BLOCK
    if (offset - to) % BLOCK or end - begin < _LEAST:
        return 0, 0
    if not sys.platform.startswith("linux"):
        raise OSError("only Linux shares ranges")
    from fcntl import ioctl

    ioctl(destination, _FICLONERANGE, struct.pack("<qQQQ", source, offset + begin, end - begin, to + begin))
    return begin, end
