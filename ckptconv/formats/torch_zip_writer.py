"""The zip file that ``torch.save`` writes, laid out from a manifest alone.

Records in torch 2.13's order: ``data.pkl``, ``.format_version``, ``.storage_alignment``, ``byteorder``, ``data/0`` and so on,
``version``, ``.data/serialization_id``; then, where there is metadata, ``ckptconv.json``, which torch does not look at. Plain
``torch.load`` reads the file, with ``weights_only=True`` and with ``mmap=True``.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptconv.errors import Refusal, printable
from ckptconv.formats import zip_layout
from ckptconv.formats.base import Converted, FileLayout, Slot
from ckptconv.formats.pickle_writer import emit
from ckptconv.names import unusable
from ckptconv.spec import Manifest

ARCHIVE = "archive"
METADATA_RECORD = "ckptconv.json"
_SERIALIZATION_ID = ".data/serialization_id"
_ID_DIGITS = 40


@dataclass(frozen=True)
class _Archive:
    """What a layout knows beforehand: all records in file order, and the contents of those that are not slots."""

    records: tuple[zip_layout.Record, ...]
    #: one per record: a slot's name, or the bytes; None where they are known only in the end
    contents: tuple[str | bytes | None, ...]


class TorchZipWriter:
    """Lays torch files out. Every tensor is contiguous and has a storage record of its own; the names of a tie share one."""

    name = "torch"

    def refuse(self, manifest: Manifest) -> list[Refusal]:
        """Names that should not be written (CK209). Torch's format holds every dtype."""
        reasons = ((name, unusable(name)) for name in manifest if name != "__metadata__")  # which only safetensors reserves
        return [Refusal(reason, code="CK209", found=printable(name)) for name, reason in reasons if reason is not None]

    def lay_out(
        self, file_name: str, manifest: Manifest, *, metadata: Mapping[str, str], tree: Any = None,
        module_versions: Mapping[str, Mapping[str, Any]] | None = None, phases: Mapping[str, int] | None = None,
    ) -> FileLayout:  # fmt: skip
        """Place every record. Raises ``ValueError`` for a tree that is not plain data around one state_dict."""
        pickle, storages = emit(Converted() if tree is None else tree, manifest, module_versions)
        contents: list[tuple[str, int, str | bytes | None]] = [
            ("data.pkl", len(pickle), pickle),
            (".format_version", 1, b"1"),
            (".storage_alignment", 2, str(zip_layout.ALIGNMENT).encode()),
            ("byteorder", 6, b"little"),
            *((f"data/{key}", nbytes, slot) for key, (slot, nbytes) in enumerate(storages.items())),
            ("version", 2, b"3\n"),
            (_SERIALIZATION_ID, _ID_DIGITS, None),
        ]
        if metadata:
            contents.append((METADATA_RECORD, len(_metadata_json(metadata)), None))
        wanted = (
            {f"{ARCHIVE}/{name}": phases[slot] for name, _, slot in contents if isinstance(slot, str) and slot in phases} if phases else {}
        )
        records = zip_layout.place(((f"{ARCHIVE}/{name}", nbytes) for name, nbytes, _ in contents), wanted)
        archive = _Archive(records, tuple(content for _, _, content in contents))
        slots = {
            content: Slot(record.data_at, record.nbytes)
            for record, content in zip(records, archive.contents, strict=True)
            if isinstance(content, str)
        }
        nbytes = records[-1].end + len(zip_layout.directory(records, [0] * len(records)))
        return FileLayout(file_name, self.name, nbytes, slots, manifest, dict(metadata), needs_crc=True, detail=archive)

    def seal(self, layout: FileLayout, crc32: Mapping[str, int], metadata: Mapping[str, str]) -> list[tuple[int, bytes]]:
        """Headers, descriptors, small records and the directory: one piece for each gap between slots.

        Raises ``ValueError`` when metadata of another length than the layout's is given, ``KeyError`` for a slot without CRC-32.
        """
        archive: _Archive = layout.detail
        digest = hashlib.sha256()
        checksums: list[int] = []
        pieces: list[tuple[int, bytes]] = []
        at, pending = 0, bytearray()
        for record, content in zip(archive.records, archive.contents, strict=True):
            pending += zip_layout.local_header(record)
            if isinstance(content, str):
                crc = crc32[content] if record.nbytes else 0
                if record.nbytes:
                    pieces.append((at, bytes(pending)))
                    at, pending = record.data_at + record.nbytes, bytearray()
            else:
                data = content if content is not None else self._late(record, digest.digest(), metadata)
                crc = zlib.crc32(data)
                pending += data
            pending += zip_layout.descriptor(record, crc)
            checksums.append(crc)
            digest.update(b"%s %d %d\n" % (record.name, record.nbytes, crc))
        pieces.append((at, bytes(pending + zip_layout.directory(archive.records, checksums))))
        return pieces

    def _late(self, record: zip_layout.Record, digest: bytes, metadata: Mapping[str, str]) -> bytes:
        """The records that are known only now. The serialization id is torch's name for this content: here a digest, not a random number."""
        if record.name.endswith(_SERIALIZATION_ID.encode()):
            halves = (int.from_bytes(digest[at : at + 8], "little") for at in (0, 8))
            return b"".join(b"%020d" % half for half in halves)
        data = _metadata_json(metadata)
        if len(data) != record.nbytes:
            raise ValueError(f"the metadata has {len(data)} bytes, {record.nbytes} were laid out: it must keep its keys and lengths")
        return data


WRITER = TorchZipWriter()


def _metadata_json(metadata: Mapping[str, str]) -> bytes:
    return json.dumps(dict(metadata), separators=(",", ":")).encode("ascii")
