"""The format of torch before 1.6: five pickles one after the other, then the storages, each with its count before it."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptconv.errors import Refusal, printable
from ckptconv.formats.base import Contents, Storage
from ckptconv.formats.containers import contents_from_tree
from ckptconv.formats.pickle_machine import MAX_PICKLE, run
from ckptconv.formats.rebuilding import StorageRef, storage_dtype
from ckptconv.formats.strict import allowance, opened, read_at

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
_FIRST_LOOK = 16 << 20


def _bad(what: str, *, code: str = "CK302", found: str = "", try_: str = "") -> Refusal:
    return Refusal(what, code=code, found=found, try_=try_)


def read(path: Path) -> Contents:
    """The contents of a legacy torch file.

    Raises :class:`~ckptconv.errors.Refusal`: CK301 where it is none, CK302 where it is cut off, CK303 to CK306 for what stands in it;
    ``OSError`` when the file cannot be opened.
    """
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        look = min(size, _FIRST_LOOK)
        while True:
            raw = read_at(descriptor, look, 0)
            try:
                return _parsed(path, descriptor, raw, size)
            except Refusal as refusal:
                # The pickles may be longer than the first look; only a pickle that ended early is worth another.
                if refusal.what != "the pickle ends early" or look >= min(size, MAX_PICKLE * allowance(size)):
                    raise
            look = min(size, MAX_PICKLE * allowance(size), look * 4)


def _parsed(path: Path, descriptor: int, raw: bytes, size: int) -> Contents:
    none, times = _Declared(), allowance(size)
    magic, at = run(raw, none.resolve)
    if magic != MAGIC:
        raise _bad("this is a pickle, but not a torch checkpoint", code="CK301", try_="only files of torch.save are read")
    protocol, at = run(raw, none.resolve, at)
    if protocol != PROTOCOL:
        raise _bad("the legacy format has another version", code="CK301", found=printable(protocol))
    system, at = run(raw, none.resolve, at)
    if not isinstance(system, Mapping) or type(system.get("little_endian")) is not bool:
        raise _bad("the file does not say its byte order", code="CK306")
    body = at
    declared = _Declared()
    _, at = run(raw, declared.resolve, body, times=times)
    keys, at = run(raw, none.resolve, at, times=times)
    if not isinstance(keys, list) or any(type(key) not in (str, int) for key in keys):
        raise _bad("the list of storages is no list of keys", code="CK306")
    places = _places(descriptor, [str(key) for key in keys], declared.sizes, at, size, not system["little_endian"])
    tree, _ = run(raw, _Placing(places).resolve, body, times=times)
    return contents_from_tree("torch-legacy", (path,), tree)


class _Declared:
    """First pass: which storages there are; where they lie is known only after all the pickles."""

    def __init__(self) -> None:
        self.sizes: dict[str, tuple[str, int]] = {}

    def resolve(self, kind: str, key: str, count: int, view: Any) -> StorageRef:
        dtype, width, quantised = storage_dtype(kind)
        if self.sizes.setdefault(key, (kind, count)) != (kind, count):
            raise _bad(f"storage {printable(key)!r} is declared in two ways", code="CK306")
        return _viewed(StorageRef(dtype, Storage(0, 0, count * width), count * width, quantised), view, width)


class _Placing:
    """Second pass: the same storages, where they are."""

    def __init__(self, places: Mapping[str, Storage]) -> None:
        self.places = places

    def resolve(self, kind: str, key: str, count: int, view: Any) -> StorageRef:  # noqa: ARG002  (both passes have one signature)
        dtype, width, quantised = storage_dtype(kind)
        storage = self.places[key]
        return _viewed(StorageRef(dtype, storage, storage.nbytes, quantised), view, width)


def _viewed(whole: StorageRef, view: Any, width: int) -> StorageRef:
    """The part of a storage that an old file's ``(key, offset, size)`` names."""
    if view is None:
        return whole
    if not isinstance(view, tuple) or len(view) != 3 or any(type(number) is not int or number < 0 for number in view[1:]):
        raise _bad("a storage view that is none", code="CK306")
    _, offset, count = view
    if (offset + count) * width > whole.nbytes:
        raise _bad(
            "a storage view reaches past its storage", code="CK305", found=f"{offset + count:,} elements of {whole.nbytes // width:,}"
        )
    part = Storage(whole.storage.file, whole.storage.offset + offset * width, count * width, None, whole.storage.big_endian)
    return StorageRef(whole.dtype, part, count * width, whole.quantised)


def _places(
    descriptor: int, keys: list[str], declared: Mapping[str, tuple[str, int]], at: int, size: int, big_endian: bool
) -> dict[str, Storage]:
    listed = set(keys)
    missing = [key for key in declared if key not in listed]
    if missing:
        raise _bad(f"storage {printable(missing[0])!r} is declared and not there", code="CK302")
    if len(listed) != len(keys):
        raise _bad("a storage stands twice in the list", code="CK306")
    places: dict[str, Storage] = {}
    for key in keys:
        if key not in declared:
            raise _bad(f"storage {printable(key)!r} is there, and no tensor declares it", code="CK306")
        kind, count = declared[key]
        _, width, _ = storage_dtype(kind)
        head = read_at(descriptor, min(8, size - at), at)
        if len(head) < 8:
            raise _bad(f"the file ends before storage {printable(key)!r}", code="CK302")
        (stored,) = struct.unpack(">q" if big_endian else "<q", head)
        if stored != count:
            raise _bad(
                f"storage {printable(key)!r} has another size than declared", code="CK306", found=f"{count:,} declared, {stored:,} stored"
            )
        at += 8
        if at + count * width > size:
            raise _bad(
                f"the file ends inside storage {printable(key)!r}",
                code="CK302",
                found=f"{size - at:,} of {count * width:,} bytes",
                try_="fetch the file again",
            )
        places[key] = Storage(0, at, count * width, None, big_endian)
        at += count * width
    if at != size:
        raise _bad("bytes follow the last storage", code="CK306", found=f"{size - at:,} bytes")
    return places
