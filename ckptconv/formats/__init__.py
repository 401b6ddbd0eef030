"""The formats that ckptconv reads and writes. A reader or a writer is one file here and one line in a table below."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ckptconv.errors import Refusal
from ckptconv.formats.base import INDEX_SUFFIX, Contents, Writer
from ckptconv.formats.sniff import kind_of
from ckptconv.lazy import Lazy

__all__ = ["READERS", "WRITERS", "Contents", "Writer", "kind_of", "read"]

#: What a file's bytes say it is -> how it is read.
READERS: Mapping[str, Callable[[Path], Contents]] = Lazy({
    "torch-zip": "ckptconv.formats.torch_zip_reader:read",
    "torch-legacy": "ckptconv.formats.torch_legacy:read",
    "safetensors": "ckptconv.formats.safetensors:read",
})  # fmt: skip

WRITERS: Mapping[str, Writer] = Lazy({
    "torch": "ckptconv.formats.torch_zip_writer:WRITER",
    "safetensors": "ckptconv.formats.safetensors:WRITER",
    "dcp": "ckptconv.formats.dcp_writer:WRITER",
})  # fmt: skip


def read(path: Path, format: str | None = None) -> Contents:  # noqa: A002  (the field's own word)
    """What the checkpoint at ``path`` holds: a file, a shard index, or a folder (shards, tensor-parallel ranks, DCP, DeepSpeed ZeRO).

    The kind of a file is told from its bytes. ``format`` (``torch`` or ``safetensors``) chooses where a folder holds both, and is
    checked for a file. Raises :class:`~ckptconv.errors.Refusal` for what is malformed, ``OSError`` for what cannot be opened.
    """
    if path.is_dir():
        return _read_folder(path, format)
    if path.name.endswith(INDEX_SUFFIX):
        from ckptconv.formats import sharded

        return sharded.read_index(path)
    kind = kind_of(path)
    if format is not None and not kind.startswith(format):
        raise Refusal(f"the file is {kind}, not {format}", code="CK301", try_="leave --format out")
    return READERS[kind](path)


def _read_folder(folder: Path, format: str | None) -> Contents:  # noqa: A002
    """A folder is told by what lies in it."""
    from ckptconv.formats import dcp, deepspeed, rank_shards, ranks, sharded

    if (folder / dcp.METADATA).is_file():
        return dcp.read(folder)
    step = deepspeed.folder_of(folder)
    if step is not None:
        return deepspeed.read(step, read)
    parallel = ranks.found(folder)
    if parallel:
        return ranks.read(parallel, read)
    shares = rank_shards.found(folder) if format in (None, "safetensors") else []
    return rank_shards.read(folder, shares) if shares else sharded.read_folder(folder, format)
