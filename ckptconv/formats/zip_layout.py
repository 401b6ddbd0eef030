"""Geometry of the zip files that torch writes: stored records at multiples of 64, each followed by a data descriptor.

Layouts are those of miniz as torch drives it (``caffe2/serialize/inline_container.cc``); field names follow PKWARE's APPNOTE.TXT.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

ALIGNMENT = 64
PAGE = 4096
_LIMIT = 0xFFFFFFFF  # the value that sends a reader to the zip64 field
_DESCRIPTOR_FOLLOWS, _UTF8 = 0x0008, 0x0800


class Record(Struct, frozen=True):
    """One stored file of an archive, and where it lies."""

    name: bytes  #: with the archive's name in front
    nbytes: int
    header_at: int
    data_at: int

    @property
    def zip64(self) -> bool:
        """True when its size or its place needs more than 32 bits."""
        return self.nbytes >= _LIMIT or self.header_at >= _LIMIT

    @property
    def end(self) -> int:
        """Behind the descriptor; an empty record has none."""
        return self.data_at + self.nbytes + ((24 if self.zip64 else 16) if self.nbytes else 0)

    @property
    def flags(self) -> int:
        """General purpose bit flags."""
        return _UTF8 | (_DESCRIPTOR_FOLLOWS if self.nbytes else 0)


def place(records: Iterable[tuple[str, int]], phases: Mapping[str, int] | None = None) -> tuple[Record, ...]:
    """Records one after the other, from (name, size in bytes), the data of each at a multiple of :data:`ALIGNMENT`.

    ``phases`` asks for places within a page: record name -> offset of its data modulo :data:`PAGE`, where that is such a multiple.

    >>> [(record.header_at, record.data_at) for record in place([("archive/data.pkl", 100), ("archive/version", 2)])]
    [(0, 64), (180, 256)]
    """
    placed, at = [], 0
    for name, nbytes in records:
        raw = name.encode("utf-8")
        extra = len(_zip64_field(nbytes, at, local=True))
        start = at + 30 + len(raw) + extra + 4
        phase = (phases or {}).get(name)
        padding = -start % ALIGNMENT if phase is None or phase % ALIGNMENT else (phase - start) % PAGE
        record = Record(raw, nbytes, at, start + padding)
        placed.append(record)
        at = record.end
    return tuple(placed)


def _zip64_field(nbytes: int, header_at: int, *, local: bool) -> bytes:
    """The zip64 extra field, with only those numbers that do not fit their 32 bits."""
    numbers = []
    if nbytes >= _LIMIT:
        # In a local header, as in torch's: the packed size is not known yet there, the descriptor has it.
        numbers += [nbytes, 0 if local else nbytes]
    if header_at >= _LIMIT:
        numbers.append(header_at)
    return struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


def local_header(record: Record) -> bytes:
    """Everything between ``record.header_at`` and ``record.data_at``. CRC and sizes follow in the descriptor."""
    zip64 = _zip64_field(record.nbytes, record.header_at, local=True)
    padding = record.data_at - record.header_at - 30 - len(record.name) - len(zip64) - 4
    extra = zip64 + b"FB" + struct.pack("<H", padding) + b"Z" * padding
    return struct.pack("<4s5H3I2H", b"PK\3\4", 0, record.flags, 0, 0, 0, 0, 0, 0, len(record.name), len(extra)) + record.name + extra


def descriptor(record: Record, crc32: int) -> bytes:
    """What follows the record's data; nothing for an empty one."""
    if not record.nbytes:
        return b""
    return struct.pack("<4sIQQ" if record.zip64 else "<4sIII", b"PK\7\x08", crc32, record.nbytes, record.nbytes)


def directory(records: Sequence[Record], crc32: Sequence[int]) -> bytes:
    """The central directory and the end records, zip64 ones included, for an archive of ``records``."""
    entries = []
    for record, crc in zip(records, crc32, strict=True):
        extra = _zip64_field(record.nbytes, record.header_at, local=False)
        size = min(record.nbytes, _LIMIT)
        entries.append(struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, record.flags, 0, 0, 0, crc, size, size, len(record.name), len(extra),
                                   0, 0, 0, 0, min(record.header_at, _LIMIT)) + record.name + extra)  # fmt: skip
    central = b"".join(entries)
    start, count = records[-1].end, len(records)
    few = min(count, 0xFFFF)
    return b"".join((
        central,
        struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, len(central), start),
        struct.pack("<4sIQI", b"PK\6\7", 0, start + len(central), 1),
        struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, few, few, min(len(central), _LIMIT), min(start, _LIMIT), 0),
    ))  # fmt: skip
