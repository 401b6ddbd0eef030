"""A torch.distributed.checkpoint folder as a state_dict of mapped tensors, by torch's own classes and without running its pickle."""

from __future__ import annotations

import mmap
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ckptconv.formats import dcp
from ckptconv.formats.base import Composite, Placed
from ckptconv.spec import Box

if TYPE_CHECKING:
    from torch import Tensor

_METADATA = "torch.distributed.checkpoint.metadata"
#: All that an honest ``.metadata`` names, beside element types. None of these does more than hold what it is given.
_NAMES = frozenset({
    *((_METADATA, name) for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout"),
})  # fmt: skip
_PATHS = ("pathlib", "pathlib._local")  #: the second is what Python 3.13 calls it


class _Listed(pickle.Unpickler):
    """Unpickles what is on the list and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) in _NAMES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if module in _PATHS and name in ("PosixPath", "WindowsPath"):
            return PurePath  # where it was saved: on another system, maybe
        raise pickle.UnpicklingError(f".metadata asks for {module}.{name}")


def mapped_state(folder: Path, container: str) -> OrderedDict[str, Tensor]:
    """The tensors of the state_dict at ``container``, named without it.

    torch's own metadata says what there is and where, and its ``torch.load`` opens every archive on the meta device; the values are mapped
    from where our reader finds them. Raises ``ValueError`` where the two do not agree.
    """
    import torch
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.utils import _create_file_view

    with (folder / dcp.METADATA).open("rb") as stream:
        metadata = _Listed(stream).load()
    contents = dcp.read(folder)
    found = contents.containers[container]
    prefix = "" if container == "." else container + "."
    state: OrderedDict[str, Tensor] = OrderedDict()
    maps = [_map(path) for path in contents.files]
    everything: dict[str, Placed | Composite] = {**found.tensors, **found.composites}
    for name, stored in everything.items():
        described = metadata.state_dict_metadata[prefix + name]
        pieces = list(_pieces(stored))
        for box, placed in pieces:
            place = metadata.storage_data[MetadataIndex(prefix + name, box.start)]
            with (folder / place.relative_path).open("rb") as file:
                archive = _create_file_view(file, place.offset, place.length)
                opened = torch.load(archive, map_location="meta", weights_only=True)  # type: ignore[arg-type]  # as torch itself calls it
            if tuple(opened.shape) != placed.spec.shape or opened.dtype != described.properties.dtype:
                raise ValueError(f"{name} is {opened.dtype} {list(opened.shape)}, and its metadata says otherwise")
        if len(pieces) == 1 and pieces[0][1].spec.shape == tuple(described.size):
            state[name] = _mapped(maps, pieces[0][1])
            continue
        whole = state[name] = torch.empty(described.size, dtype=described.properties.dtype)
        for box, placed in pieces:
            spans = tuple(slice(start, start + size) for start, size in zip(box.start, box.size, strict=True))
            whole[spans] = _mapped(maps, placed)
    return state


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _pieces(stored: Placed | Composite) -> Iterable[tuple[Box, Placed]]:
    if isinstance(stored, Placed):
        return [(Box.whole(stored.spec.shape), stored)]
    return [(box, part) for box, part in zip(stored.boxes, stored.parts.values(), strict=True) if isinstance(part, Placed)]


def _mapped(maps: list[mmap.mmap], placed: Placed) -> Tensor:
    import torch

    spec, dtype = placed.spec, getattr(torch, placed.spec.dtype.value)
    if not spec.numel:
        return torch.empty(spec.shape, dtype=dtype)
    start = placed.storage.offset + placed.offset
    nbytes = (1 + sum((size - 1) * stride for size, stride in zip(spec.shape, placed.strides, strict=True))) * spec.dtype.nbytes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of buffers that it may not write to
        raw = torch.frombuffer(maps[placed.storage.file], dtype=torch.uint8, count=nbytes, offset=start)
    aligned = raw if raw.data_ptr() % spec.dtype.nbytes == 0 else raw.clone()
    return aligned.view(dtype).as_strided(spec.shape, placed.strides)
