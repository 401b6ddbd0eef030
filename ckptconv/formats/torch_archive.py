"""One archive of ``torch.save``: its records laid out around the slots, and sealed once their CRC-32s are known.

It is a file of its own, or lies inside another one, from ``base`` on: torch.distributed.checkpoint keeps one archive for each tensor.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping

from msgspec import Struct

from ckptconv.formats import zip_layout
from ckptconv.formats.base import Slot

ARCHIVE = "archive"
METADATA_RECORD = "ckptconv.json"
SERIALIZATION_ID = ".data/serialization_id"
_ID_DIGITS = 40


class Archive(Struct, frozen=True):
    """What is known beforehand: all records in order, and the contents of those that are not slots."""

    records: tuple[zip_layout.Record, ...]  #: places count from ``base``
    #: one per record: a slot's name, or the bytes; None where they are known only in the end
    contents: tuple[str | bytes | None, ...]
    base: int
    nbytes: int

    @property
    def slots(self) -> dict[str, Slot]:
        """Where in the file each slot is."""
        return {
            content: Slot(self.base + record.data_at, record.nbytes)
            for record, content in zip(self.records, self.contents, strict=True)
            if isinstance(content, str)
        }


def lay_out(
    pickle: bytes, storages: Mapping[str, int], *, metadata: Mapping[str, str], phases: Mapping[str, int] | None = None, base: int = 0,
    bare: bool = False,
) -> Archive:  # fmt: skip
    """The archive of a pickle and its storages (slot name to size in bytes), from ``base`` on, which is a multiple of 64.

    Records in torch 2.13's order. ``bare`` leaves out those that nothing needs. ``phases`` as a writer's ``lay_out`` takes them.
    """
    contents: list[tuple[str, int, str | bytes | None]] = [
        ("data.pkl", len(pickle), pickle),
        *(() if bare else ((".format_version", 1, b"1"), (".storage_alignment", 2, str(zip_layout.ALIGNMENT).encode()))),
        ("byteorder", 6, b"little"),
        *((f"data/{key}", nbytes, slot) for key, (slot, nbytes) in enumerate(storages.items())),
        ("version", 2, b"3\n"),
        *(() if bare else ((SERIALIZATION_ID, _ID_DIGITS, None),)),
    ]
    if metadata:
        contents.append((METADATA_RECORD, len(_metadata_json(metadata)), None))
    wanted = {}
    if phases:
        wanted = {
            f"{ARCHIVE}/{name}": (phases[slot] - base) % zip_layout.PAGE
            for name, _, slot in contents
            if isinstance(slot, str) and slot in phases
        }
    records = zip_layout.place(((f"{ARCHIVE}/{name}", nbytes) for name, nbytes, _ in contents), wanted)
    nbytes = records[-1].end + len(zip_layout.directory(records, [0] * len(records)))
    return Archive(records, tuple(content for _, _, content in contents), base, nbytes)


def seal(archive: Archive, crc32: Mapping[str, int], metadata: Mapping[str, str]) -> list[tuple[int, bytes]]:
    """Headers, descriptors, small records and the directory: one piece for each gap between slots.

    Raises ``ValueError`` when metadata of another length than the layout's is given, ``KeyError`` for a slot without CRC-32.
    """
    digest = hashlib.sha256()
    checksums: list[int] = []
    pieces: list[tuple[int, bytes]] = []
    at, pending = archive.base, bytearray()
    for record, content in zip(archive.records, archive.contents, strict=True):
        pending += zip_layout.local_header(record)
        if isinstance(content, str):
            crc = crc32[content] if record.nbytes else 0
            if record.nbytes:
                pieces.append((at, bytes(pending)))
                at, pending = archive.base + record.data_at + record.nbytes, bytearray()
        else:
            data = content if content is not None else _late(record, digest.digest(), metadata)
            crc = zlib.crc32(data)
            pending += data
        pending += zip_layout.descriptor(record, crc)
        checksums.append(crc)
        digest.update(b"%s %d %d\n" % (record.name, record.nbytes, crc))
    pieces.append((at, bytes(pending + zip_layout.directory(archive.records, checksums))))
    return pieces


def _late(record: zip_layout.Record, digest: bytes, metadata: Mapping[str, str]) -> bytes:
    """The records that are known only now. The serialization id is torch's name for this content: here a digest, not a random number."""
    if record.name.endswith(SERIALIZATION_ID.encode()):
        halves = (int.from_bytes(digest[at : at + 8], "little") for at in (0, 8))
        return b"".join(b"%020d" % half for half in halves)
    data = _metadata_json(metadata)
    if len(data) != record.nbytes:
        raise ValueError(f"the metadata has {len(data)} bytes, {record.nbytes} were laid out: it must keep its keys and lengths")
    return data


def _metadata_json(metadata: Mapping[str, str]) -> bytes:
    return json.dumps(dict(metadata), separators=(",", ":")).encode("ascii")
