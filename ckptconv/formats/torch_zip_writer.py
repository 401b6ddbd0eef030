"""The zip file that ``torch.save`` writes, laid out from a manifest alone.

Records in torch 2.13's order: ``data.pkl``, ``.format_version``, ``.storage_alignment``, ``byteorder``, ``data/0`` and so on,
``version``, ``.data/serialization_id``; then, where there is metadata, ``ckptconv.json``, which torch does not look at. Plain
``torch.load`` reads the file, with ``weights_only=True`` and with ``mmap=True``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckptconv.errors import Refusal, printable
from ckptconv.formats import torch_archive
from ckptconv.formats.base import Converted, FileLayout
from ckptconv.formats.pickle_writer import emit
from ckptconv.formats.sharded import Folder, lay_out_folder
from ckptconv.names import unusable
from ckptconv.spec import Manifest


class TorchZipWriter:
    """Lays torch files out. Every tensor is contiguous and has a storage record of its own; the names of a tie share one."""

    name = "torch"

    def refuse(self, manifest: Manifest) -> list[Refusal]:
        """Names that should not be written (CK209). Torch's format holds every dtype."""
        return refused_names(manifest)

    def lay_out(
        self, file_name: str, manifest: Manifest, *, metadata: Mapping[str, str], tree: Any = None,
        module_versions: Mapping[str, Mapping[str, Any]] | None = None, phases: Mapping[str, int] | None = None,
    ) -> FileLayout:  # fmt: skip
        """Place every record. Raises ``ValueError`` for a tree that is not plain data around one state_dict."""
        pickle, storages = emit(Converted() if tree is None else tree, manifest, module_versions)
        archive = torch_archive.lay_out(pickle, storages, metadata=metadata, phases=phases)
        return FileLayout(file_name, self.name, archive.nbytes, archive.slots, manifest, dict(metadata), needs_crc=True, detail=archive)

    def lay_out_folder(
        self, manifest: Manifest, shard_nbytes: int | None, together: Iterable[Sequence[str]] = (), **options: Any
    ) -> Folder:
        """``pytorch_model.bin``, or its shards and their index."""
        return lay_out_folder(self, "pytorch_model", manifest, shard_nbytes, together, options)

    def seal(self, layout: FileLayout, crc32: Mapping[str, int], metadata: Mapping[str, str]) -> list[tuple[int, bytes]]:
        """As :func:`ckptconv.formats.torch_archive.seal`."""
        return torch_archive.seal(layout.detail, crc32, metadata)


WRITER = TorchZipWriter()


def refused_names(manifest: Manifest) -> list[Refusal]:
    """Names that should not be written (CK209), in a format of torch's."""
    reasons = ((name, unusable(name)) for name in manifest if name != "__metadata__")  # which only safetensors reserves
    return [Refusal(reason, code="CK209", found=printable(name)) for name, reason in reasons if reason is not None]
