"""The zip files of ``torch.save``, read by their directory and pickle alone.

Every record must lie where the directory says, under the name that its own header says, stored as it is, and touch no other: whatever two
zip readers could understand differently is refused.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from msgspec import Struct

from ckptconv.errors import Refusal, printable
from ckptconv.formats.base import Contents, Storage
from ckptconv.formats.containers import contents_from_tree
from ckptconv.formats.pickle_machine import MAX_PICKLE, run
from ckptconv.formats.rebuilding import StorageRef, storage_dtype
from ckptconv.formats.strict import allowance, opened, parse_json, read_at, read_up_to
from ckptconv.places.presence import announce, keeper_of

#: docs/limits.md; both grow with the file as the pickle's limits do.
MAX_RECORDS = 200_000
MAX_DIRECTORY = 64 << 20  #: bytes
MAX_SMALL = 1 << 20
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LIMIT = 0xFFFFFFFF
_KNOWN = frozenset({"data.pkl", "byteorder", "version", ".format_version", ".storage_alignment", ".data/serialization_id", "ckptconv.json"})
VERSIONS = (b"3", b"2", b"1", b"4", b"5", b"6", b"7", b"8", b"9", b"10")


class Record(Struct, frozen=True, gc=False):
    """One stored file of the archive: where its bytes are."""

    name: str  #: without the archive's own name
    header: int
    offset: int
    nbytes: int
    crc32: int


def _bad(what: str, *, code: str = "CK302", found: str = "", try_: str = "") -> Refusal:
    return Refusal(what, code=code, found=found, try_=try_)


def read(path: Path) -> Contents:
    """The contents of a torch zip file.

    Raises :class:`~ckptconv.errors.Refusal`: CK301 for a TorchScript archive, CK302 for a damaged file, CK303 to CK306 for what stands in
    it; ``OSError`` when the file cannot be opened.
    """
    with opened(path) as descriptor:
        records = directory(descriptor)
        if "data.pkl" not in records:
            raise _bad("the archive has no data.pkl: it was not written by torch.save", code="CK301")
        big_endian = _byte_order(descriptor, records)
        _version(descriptor, records)
        pickle, times = records["data.pkl"], allowance(os.fstat(descriptor).st_size)
        if pickle.nbytes > MAX_PICKLE * times:
            raise _bad(f"data.pkl has {pickle.nbytes:,} bytes; at most {MAX_PICKLE * times:,} are read", code="CK304")
        raw = read_at(descriptor, pickle.nbytes, pickle.offset)
        metadata = _own_metadata(descriptor, records)
    storages = _Storages(records, big_endian)
    tree, _ = run(raw, storages.resolve, times=times)
    scripted = "constants.pkl" in records
    spare = [name for name in records if name not in _KNOWN and name.removeprefix("data/") not in storages.seen]
    if scripted:
        spare = [name for name in spare if not name.startswith(("code/", "constants")) and name != "attributes.pkl"]
    warnings: tuple[str, ...] = (
        (f"{len(spare)} records belong to no tensor ({printable(', '.join(spare[:3]))}); they are left behind",) if spare else ()
    )
    if scripted:
        warnings += ("a TorchScript archive: its tensors are read, its code is neither run nor carried along",)
    return contents_from_tree("torch", (path,), tree, metadata=metadata, warnings=warnings)


_NEAR = 4096


class _Storages:
    """Storage keys to records; each key is declared in one way only."""

    def __init__(self, records: Mapping[str, Record], big_endian: bool, file: int = 0) -> None:
        self.records, self.big_endian, self.file = records, big_endian, file
        self.seen: dict[str, tuple[str, int, StorageRef]] = {}

    def resolve(self, kind: str, key: str, count: int, view: Any) -> StorageRef:
        known = self.seen.get(key)
        if known is not None:
            if known[:2] != (kind, count):
                raise _bad(
                    f"storage {printable(key)!r} is declared in two ways",
                    code="CK306",
                    found=f"{known[1]:,} {known[0]} and {count:,} {kind}",
                )
            return known[2]
        if "/" in key or "\\" in key or view is not None:
            raise _bad(f"a storage with the impossible key {printable(key)!r}", code="CK306")
        record = self.records.get(f"data/{key}")
        if record is None:
            raise _bad(f"storage {printable(key)!r} is declared and not there", code="CK302")
        dtype, width, quantised = storage_dtype(kind)
        if record.nbytes != count * width:
            raise _bad(
                f"storage {printable(key)!r} has another size than declared",
                code="CK306",
                found=f"{count * width:,} bytes declared, {record.nbytes:,} stored",
            )
        placed = Storage(self.file, record.offset, record.nbytes, record.crc32, self.big_endian)
        made = StorageRef(dtype, placed, record.nbytes, quantised, kind if quantised else "")
        self.seen[key] = (kind, count, made)
        return made


def _byte_order(descriptor: int, records: Mapping[str, Record]) -> bool:
    if "byteorder" not in records:
        return False
    order = read_at(descriptor, min(records["byteorder"].nbytes, 64), records["byteorder"].offset)
    if order not in (b"little", b"big"):
        raise _bad("the byte order is neither little nor big", code="CK306", found=printable(order))
    return order == b"big"


def _version(descriptor: int, records: Mapping[str, Record]) -> None:
    if "version" not in records:
        raise _bad("the archive has no version: it was not written by torch.save", code="CK301")
    version = read_at(descriptor, min(records["version"].nbytes, 64), records["version"].offset).strip()
    if version not in VERSIONS:
        raise _bad("the archive has a version that no torch writes", code="CK301", found=printable(version))


def _own_metadata(descriptor: int, records: Mapping[str, Record]) -> dict[str, str]:
    record = records.get("ckptconv.json")
    if record is None or record.nbytes > MAX_SMALL:
        return {}
    data = parse_json(read_at(descriptor, record.nbytes, record.offset), code="CK306")
    if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
        raise _bad("ckptconv.json must map text to text", code="CK306")
    return data


def read_embedded(path: Path, descriptor: int, file: int, base: int, nbytes: int) -> tuple[Any, dict[str, str]]:
    """The object of a torch zip that lies inside another file, at ``base``, and what ckptconv wrote beside it.

    Its tensors are placed in file number ``file``.
    """
    if not 0 <= base <= base + nbytes <= os.fstat(descriptor).st_size:
        raise _bad("an archive inside the file reaches past its end", code="CK302", found=printable(path.name))
    records = directory(descriptor, base, nbytes)
    if "data.pkl" not in records or records["data.pkl"].nbytes > MAX_PICKLE:
        raise _bad("an archive inside the file was not written by torch.save", code="CK301", found=printable(path.name))
    storages = _Storages(records, _byte_order(descriptor, records), file)
    found, _ = run(read_at(descriptor, records["data.pkl"].nbytes, records["data.pkl"].offset), storages.resolve)
    return found, _own_metadata(descriptor, records)


def directory(descriptor: int, base: int = 0, size: int | None = None) -> dict[str, Record]:
    """Every record by its name without the archive's, all of them checked against their own headers and each other.

    The archive is the whole file, or ``size`` bytes of it from ``base``; offsets of records count from the file's start.
    """
    size = os.fstat(descriptor).st_size if size is None else size
    count, length, start, end = _end_records(descriptor, base, size)
    times = allowance(size)
    if count > MAX_RECORDS * times:
        raise _bad(f"the archive has {count:,} records; at most {MAX_RECORDS * times:,} are read", code="CK304")
    if start + length > size:
        raise _bad("the archive's directory reaches past its end", code="CK302")
    if length > MAX_DIRECTORY * times:
        raise _bad(f"the archive's directory has {length:,} bytes; at most {MAX_DIRECTORY * times:,} are read", code="CK304")
    central = read_at(descriptor, length, base + start)
    if start + length > end:
        raise _bad("the archive's directory reaches past its end", code="CK302")
    found: dict[str, Record] = {}
    prefix, at = None, 0
    spans: list[tuple[int, int, str]] = []
    window = _Window(descriptor)
    announce(((descriptor, base + at, nbytes) for at, nbytes in _headers(central, count)), once=True)
    for _ in range(count):
        if at + _CENTRAL.size > length:
            raise _bad("the archive's directory is cut off", code="CK302")
        magic, _, _, flags, method, _, _, crc, packed, plain, name_n, extra_n, comment_n, disk, _, _, header = _CENTRAL.unpack_from(
            central, at
        )
        if magic != b"PK\1\2":
            raise _bad("the archive's directory is damaged", code="CK302", found=f"at byte {start + at:,}")
        at += _CENTRAL.size
        raw_name, extra = central[at : at + name_n], central[at + name_n : at + name_n + extra_n]
        at += name_n + extra_n + comment_n
        packed, plain, header = _wide(extra, packed, plain, header)
        whole = _name(raw_name)
        top, slash, name = whole.partition("/")
        if method in (0, 8) and name.startswith("code/"):  # of a TorchScript archive: it lies there, and is never looked at
            plain = packed
        elif method or packed != plain:
            raise _bad(f"record {printable(whole)!r} is compressed; torch stores records as they are", code="CK306")
        if flags & 0x41 or disk:
            raise _bad(f"record {printable(whole)!r} is encrypted, or on another disk", code="CK306")
        if not slash or (prefix is not None and top != prefix):
            raise _bad("the records do not lie in one folder", code="CK306", found=printable(whole))
        prefix = top
        if name in found:
            raise _bad(f"record {printable(name)!r} occurs twice", code="CK306")
        offset = _data_offset(window, base, header, raw_name, size, name)
        if offset + plain > start:
            raise _bad(f"record {printable(name)!r} reaches past the end of the data", code="CK302")
        found[name] = Record(name, base + header, base + offset, plain, crc)
        spans.append((header, offset + plain, name))
    if at != length:
        raise _bad("the archive's directory has bytes that belong to no record", code="CK306")
    spans.sort()
    if spans and spans[0][0] != 0:
        raise _bad("bytes stand before the archive", code="CK306", found=f"{spans[0][0]:,} bytes")
    for (_, before, name), (after, _, other) in pairwise(spans):
        if after < before:
            raise _bad(f"records {printable(name)!r} and {printable(other)!r} overlap", code="CK306")
    return found


def _end_records(descriptor: int, base: int, size: int) -> tuple[int, int, int, int]:
    """(records, bytes of the directory, where it starts, where it must have ended)."""
    tail_at = max(0, size - 22 - 20 - 56)
    tail = read_at(descriptor, size - tail_at, base + tail_at)
    if len(tail) < 22 or tail[-22:-18] != b"PK\5\6":
        longer_at = max(0, size - 65_600)
        longer = read_at(descriptor, size - longer_at, base + longer_at)
        end_at = longer.rfind(b"PK\5\6")
        if 0 <= end_at <= len(longer) - 22:
            raise _bad("bytes follow the end of the archive", code="CK306", try_="the file was appended to, or cut in the wrong place")
        raise _bad("the archive's end is missing: the file is cut off", code="CK302", found=f"{size:,} bytes", try_="fetch the file again")
    disk, start_disk, here, count, length, start, comment = struct.unpack_from("<4H2IH", tail, len(tail) - 18)
    if disk not in (0, 0xFFFF) or start_disk not in (0, 0xFFFF) or here != count or comment:
        raise _bad("the archive spans several disks, or carries a comment", code="CK306")
    end = size - 22
    if len(tail) >= 42 and tail[-42:-38] == b"PK\6\7":
        _, wide_at, disks = struct.unpack_from("<IQI", tail, len(tail) - 38)
        if disks > 1 or wide_at + 56 > size - 42:
            raise _bad("the archive's 64-bit end record is damaged", code="CK302")
        wide = read_at(descriptor, 56, base + wide_at)
        if wide[:4] != b"PK\6\6":
            raise _bad("the archive's 64-bit end record is damaged", code="CK302")
        wide_here, wide_count, wide_length, wide_start = struct.unpack_from("<4Q", wide, 24)
        narrow = ((count, wide_count, 0xFFFF), (length, wide_length, _LIMIT), (start, wide_start, _LIMIT))
        if wide_here != wide_count or any(small not in (large, limit) for small, large, limit in narrow):
            raise _bad("the archive's two end records contradict each other", code="CK306")
        count, length, start, end = wide_count, wide_length, wide_start, wide_at
    if start + length != end:
        raise _bad("the archive's directory does not end where its end begins", code="CK306")
    return count, length, start, end


def _wide(extra: bytes, packed: int, plain: int, header: int) -> tuple[int, int, int]:
    """Sizes and offset with the 64-bit field read where the 32-bit ones say so."""
    if _LIMIT not in (packed, plain, header):
        return packed, plain, header
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            there = min(length, len(extra) - at - 4) // 8
            values = struct.unpack_from(f"<{there}Q", extra, at + 4)
            wanted = [field for field in (plain, packed, header) if field == _LIMIT]
            if len(values) < len(wanted):
                break
            take = iter(values)
            plain = next(take) if plain == _LIMIT else plain
            packed = next(take) if packed == _LIMIT else packed
            header = next(take) if header == _LIMIT else header
            return packed, plain, header
        at += 4 + length
    raise _bad("a record's 64-bit sizes are missing", code="CK302")


def _name(raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _bad("a record's name is not UTF-8", code="CK306", found=printable(raw)) from None
    parts = name.split("/")
    if (
        not name
        or name.startswith("/")
        or ".." in parts
        or "" in parts
        or "\\" in name
        or "\0" in name
        or (len(parts[0]) == 2 and parts[0][1] == ":")  # C:/; not a:b/, which torch.save makes of a:b.pth
    ):
        raise _bad(f"the record name {printable(name)!r} is unsafe", code="CK306")
    return name


def _headers(central: bytes, count: int) -> Iterator[tuple[int, int]]:
    """Where the records' own headers are, as far as the directory can be believed: from a store they come many at a time."""
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(central):
            return
        *_, packed, plain, name_n, extra_n, comment_n, _, _, _, header = _CENTRAL.unpack_from(central, at)
        at += _CENTRAL.size + name_n
        try:
            yield _wide(central[at : at + extra_n], packed, plain, header)[2], 30 + name_n
        except Refusal:
            return  # whoever reads the directory says why
        at += extra_n + comment_n


class _Window:
    """Reads headers that lie close together in one go: those of a file of many small tensors."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._at, self._held, self._last = 0, b"", -_NEAR
        self._is_here = keeper_of(descriptor) is None  # from a store, the headers come alone

    def read(self, nbytes: int, offset: int) -> bytes:
        """What there is of ``nbytes`` at ``offset``."""
        if not self._at <= offset <= offset + nbytes <= self._at + len(self._held):
            near = self._is_here and 0 <= offset - self._last < _NEAR
            self._at, self._held = offset, read_up_to(self._descriptor, max(nbytes, 64 * _NEAR if near else 0), offset)
        self._last = offset
        start = offset - self._at
        return self._held[start : start + nbytes]


def _data_offset(window: _Window, base: int, header: int, raw_name: bytes, size: int, name: str) -> int:
    """Where the record's bytes start, after its own header; which must say the same name."""
    if not 0 <= header <= size - 30:
        raise _bad(f"record {printable(name)!r} starts outside the file", code="CK302")
    local = window.read(30 + len(raw_name), base + header)
    if len(local) != 30 + len(raw_name) or local[:4] != b"PK\3\4":
        raise _bad(f"record {printable(name)!r} has no header where the directory points", code="CK302")
    name_n, extra_n = struct.unpack_from("<HH", local, 26)
    if local[30:] != raw_name or name_n != len(raw_name):
        raise _bad(f"record {printable(name)!r} has another name in its own header", code="CK306")
    return int(header + 30 + name_n + extra_n)
