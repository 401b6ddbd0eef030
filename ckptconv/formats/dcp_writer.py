"""Folders of torch.distributed.checkpoint, laid out from a manifest alone.

A ``.distcp`` file is a row of archives as ``torch.save`` writes them, one for each tensor and for each value that is none; every archive
starts at a multiple of 64. The pickle ``.metadata`` says what there is and where; nothing of torch is imported to write it. Layout and
names: ``torch/distributed/checkpoint/metadata.py`` and ``filesystem.py``. The names of a tie mean one archive.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from ckptconv.errors import Refusal, printable
from ckptconv.formats import torch_archive, zip_layout
from ckptconv.formats.base import Converted, FileLayout, Kept, Slot
from ckptconv.formats.pickle_writer import Called, Instance, Named, Pairs, emit_value
from ckptconv.formats.sharded import Folder, plan_shards
from ckptconv.formats.torch_zip_writer import refused_names
from ckptconv.spec import DType, Manifest, TensorSpec

METADATA_FILE = ".metadata"
VERSION = "1.0.0"  #: of the metadata, as torch 2.13 writes it; older ones do not look
_MODULE = "torch.distributed.checkpoint.metadata"
_PLACE = Named("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_SIZE = Named("torch", "Size")
_LAYOUT = Called(Named("torch.serialization", "_get_layout"), ("torch.strided",))
_MEMORY_FORMAT = Called(Named(_MODULE, "_MEM_FORMAT_ENCODING"), (0,))  # contiguous

Path = tuple[str | int, ...]


class _Entry(Struct, frozen=True):
    """One entry of the flattened state_dict."""

    path: Path  #: the keys that lead to it
    value: Any  #: a tensor as Kept, or plain data
    name: str = ""  #: of a tensor of the manifest
    at: int = 0  #: its place among all

    @property
    def fqn(self) -> str:
        """What torch calls it: the keys with dots between them."""
        return ".".join(map(str, self.path))


class _Blob(Struct, frozen=True):
    """An archive, and the entries that it is: more than one where names are tied."""

    entries: tuple[_Entry, ...]
    archive: torch_archive.Archive


class DcpWriter:
    """Lays the files of a torch.distributed.checkpoint folder out. Each tensor is one contiguous chunk with an archive of its own."""

    name = "dcp"

    def refuse(self, manifest: Manifest) -> list[Refusal]:
        """Names that should not be written (CK209). The format holds every dtype."""
        return refused_names(manifest)

    def lay_out(
        self, file_name: str, manifest: Manifest, *, metadata: Mapping[str, str], tree: Any = None,
        module_versions: Mapping[str, Mapping[str, Any]] | None = None,  # noqa: ARG002  (the format has no place for them)
        phases: Mapping[str, int] | None = None,
    ) -> FileLayout:  # fmt: skip
        """Place everything in one file; :func:`index` says then what ``.metadata`` holds.

        Raises :class:`~ckptconv.errors.Refusal` CK209 for entries whose dotted names are the same.
        """
        return _lay_out_file(file_name, _grouped(_entries(manifest, tree), manifest), manifest, metadata, phases)

    def lay_out_folder(
        self, manifest: Manifest, shard_nbytes: int | None, together: Iterable[Sequence[str]] = (), **options: Any
    ) -> Folder:
        """``__0_0.distcp``, ``__1_0.distcp`` and so on, as if each came from a rank of its own, and ``.metadata``."""
        entries = _entries(manifest, options.get("tree"))
        kept = {entry.value.name: entry.value.spec for entry in entries if isinstance(entry.value, Kept) and not entry.name}
        tensors = Manifest({**manifest.tensors, **kept}, manifest.ties)
        parts = [part for _, part in plan_shards(tensors, "safetensors", shard_nbytes, "", together)]  # its names are another format's
        shard_of = {name: at for at, part in enumerate(parts) for name in part}
        shards: list[list[tuple[_Entry, ...]]] = [[] for _ in parts]
        at = 0
        for group in _grouped(entries, manifest):
            value = group[0].value
            at = shard_of[value.name] if isinstance(value, Kept) else at  # what is no tensor lies by the one before it
            shards[at].append(group)
        files = tuple(
            _lay_out_file(f"__{at}_0.distcp", groups, _part(manifest, groups), options["metadata"], options.get("phases"))
            for at, groups in enumerate(shards)
        )
        return files, (METADATA_FILE, index(files))

    def seal(self, layout: FileLayout, crc32: Mapping[str, int], metadata: Mapping[str, str]) -> list[tuple[int, bytes]]:
        """All bytes outside the slots: those of each archive, and the zeros between two. Raises as the torch writer's does."""
        pieces: list[tuple[int, bytes]] = []
        at, pending = 0, bytearray()
        for number, blob in enumerate(layout.detail):
            pending += bytes(blob.archive.base - at - len(pending))
            for offset, data in torch_archive.seal(blob.archive, crc32, metadata if number == 0 else {}):
                if offset != at + len(pending):
                    pieces.append((at, bytes(pending)))
                    at, pending = offset, bytearray()
                pending += data
        return [*pieces, (at, bytes(pending))] if pending else pieces


WRITER = DcpWriter()


def index(files: Sequence[FileLayout]) -> bytes:
    """The contents of ``.metadata`` for these files."""
    described: list[tuple[Any, Any]] = []
    places: list[tuple[Any, Any]] = []
    paths: dict[str, Path] = {}
    stored = [(entry, file.name, blob.archive) for file in files for blob in file.detail for entry in blob.entries]
    for entry, file_name, archive in sorted(stored, key=lambda each: each[0].at):
        fqn = entry.fqn
        where = {"fqn": fqn, "index": None}
        if isinstance(entry.value, Kept):
            offset = _size((0,) * len(entry.value.spec.shape))
            where |= {"index": 0, "offset": offset}
            described.append((fqn, _tensor_metadata(entry.value.spec, offset)))
        else:
            described.append((fqn, Instance(Named(_MODULE, "BytesStorageMetadata"), None)))
        place = {"relative_path": file_name, "offset": archive.base, "length": archive.nbytes}
        places.append((Instance(Named(_MODULE, "MetadataIndex"), where), Instance(_PLACE, place)))
        paths[fqn] = entry.path
    state = {
        "state_dict_metadata": Pairs(described), "planner_data": paths, "storage_data": Pairs(places), "storage_meta": None,
        "version": VERSION,
    }  # fmt: skip
    return emit_value(Instance(Named(_MODULE, "Metadata"), state))[0]


@lru_cache(4096)
def _size(shape: tuple[int, ...]) -> Called:
    """One object for each shape: a pickle says it once."""
    return Called(_SIZE, (shape,))


@cache
def _properties(dtype: DType) -> Instance:
    # dtype, layout, requires_grad, memory format, pin_memory
    return Instance(Named(_MODULE, "TensorProperties"), (Named("torch", dtype.value), _LAYOUT, False, _MEMORY_FORMAT, False))


def _tensor_metadata(spec: TensorSpec, offset: Called) -> Instance:
    size = _size(spec.shape)
    chunk = Instance(Named(_MODULE, "ChunkStorageMetadata"), {"offsets": offset, "sizes": size})
    return Instance(Named(_MODULE, "TensorStorageMetadata"), {"properties": _properties(spec.dtype), "size": size, "chunks": [chunk]})


def _lay_out_file(
    file_name: str, groups: Sequence[tuple[_Entry, ...]], manifest: Manifest, metadata: Mapping[str, str], phases: Mapping[str, int] | None
) -> FileLayout:
    at = 0
    blobs: list[_Blob] = []
    slots: dict[str, Slot] = {}
    for group in groups:
        base = at + -at % zip_layout.ALIGNMENT
        pickle, storages = emit_value(group[0].value)
        # The file's own metadata lies beside the first tensor, where torch does not look.
        archive = torch_archive.lay_out(pickle, storages, metadata={} if blobs else metadata, phases=phases, base=base, bare=True)
        blobs.append(_Blob(group, archive))
        slots.update(archive.slots)
        at = base + archive.nbytes
    return FileLayout(file_name, WRITER.name, at, slots, manifest, dict(metadata), needs_crc=True, detail=tuple(blobs))


def _entries(manifest: Manifest, tree: Any) -> list[_Entry]:
    """Everything that stands in the tree, in its order, with the manifest's tensors where the state_dict goes."""
    walked = _walk(Converted() if tree is None else tree, (), manifest)
    found = [replace(entry, at=at) for at, entry in enumerate(walked)]
    seen: set[str] = set()
    for entry in found:
        if entry.fqn in seen:
            raise Refusal(f"two entries would be called {printable(entry.fqn)!r}", code="CK209",
                          found="torch.distributed.checkpoint joins the keys of nested dicts with dots", try_="rename one of them")  # fmt: skip
        seen.add(entry.fqn)
    if sum(bool(entry.name) for entry in found) != len(manifest):
        raise ValueError("the tree must hold one place for the state_dict")
    return found


def _walk(value: Any, path: Path, manifest: Manifest) -> Iterator[_Entry]:
    """As ``traverse_state_dict`` of torch: through dicts, and through lists with tensors or dicts in them; the rest is values."""
    if isinstance(value, Converted):
        aliases = manifest.aliases
        for name, spec in manifest.tensors.items():
            yield _Entry((*path, name), Kept(aliases.get(name, name), spec), name)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            # A state_dict under itself stands among the others.
            yield from _walk(item, path if isinstance(key, Converted) else (*path, str(key)), manifest)
    elif isinstance(value, list) and not _is_leaf(value):
        for at, item in enumerate(value):
            yield from _walk(item, (*path, at), manifest)
    elif not path:
        raise ValueError(f"{type(value).__name__} is no state_dict")
    else:
        yield _Entry(path, value)


def _is_leaf(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_leaf(item) for item in value)
    return not isinstance(value, (Mapping, Kept, Converted))


def _grouped(entries: Sequence[_Entry], manifest: Manifest) -> list[tuple[_Entry, ...]]:
    """The entries by the archive that they get: the names of a tie together, everything else alone."""
    aliases = manifest.aliases
    groups: dict[Any, list[_Entry]] = {}
    for entry in entries:
        groups.setdefault(aliases.get(entry.name, entry.name) or entry.at, []).append(entry)
    return [tuple(group) for group in groups.values()]


def _part(manifest: Manifest, groups: Sequence[tuple[_Entry, ...]]) -> Manifest:
    """What of the manifest these groups hold."""
    held = sorted((entry.at, entry.name) for group in groups for entry in group if entry.name)
    tensors = {name: manifest[name] for _, name in held}
    return Manifest(tensors, tuple(group for group in manifest.ties if group[0] in tensors), manifest.buffers & tensors.keys())
