"""Checksums of bytes while they pass: CRC-32, which zip files record, and xxh3-128, by which tensors are compared.

``isal`` computes the CRC many times faster than most builds of zlib; where it is not installed, zlib gives the same numbers.
"""

from __future__ import annotations

from typing import Any

import xxhash

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["Checksums", "crc32"]


class Checksums:
    """The checksums that are wanted of one run of bytes, fed piece by piece.

    >>> sums = Checksums(crc=True, digest=True)
    >>> sums.update(b"abc")
    >>> hex(sums.crc), sums.digest
    ('0x352441c2', '06b05ab6733a618578af5f94892f3950')
    """

    __slots__ = ("_digest", "_wants_crc", "crc")

    def __init__(self, *, crc: bool, digest: bool) -> None:
        self._wants_crc, self._digest = crc, xxhash.xxh3_128() if digest else None
        self.crc = 0  #: of nothing, where it is not wanted

    def update(self, data: Any) -> None:
        """The next bytes: anything with a buffer."""
        if self._digest is not None:
            self._digest.update(data)
        if self._wants_crc:
            self.crc = crc32(data, self.crc)

    @property
    def digest(self) -> str:
        """xxh3_128 in hex; empty where it is not wanted."""
        return self._digest.hexdigest() if self._digest is not None else ""
