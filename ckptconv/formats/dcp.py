"""torch.distributed.checkpoint folders, read without a process group and without running anything of their pickle.

``.metadata`` says which tensors there are, how each is cut into chunks, and where in the ``.distcp`` files every chunk lies as a torch
zip of its own. A tensor of one chunk is placed as it is; one of several is a composite of boxes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from ckptconv.errors import Refusal, printable
from ckptconv.formats.base import Composite, Contents, Foreign, Keyed, Placed
from ckptconv.formats.chunks import joined
from ckptconv.formats.containers import MAX_DEPTH, contents_from_tree, with_top
from ckptconv.formats.pickle_machine import MAX_PICKLE, run
from ckptconv.formats.sharded import beside
from ckptconv.formats.strict import allowance, opened, read_at
from ckptconv.formats.torch_zip_reader import read_embedded
from ckptconv.places.presence import announce
from ckptconv.spec import Box

METADATA = ".metadata"
MAX_VALUES = 50_000  #: entries that are no tensors and are looked into (docs/limits.md); it grows with the checkpoint
MAX_OPEN = 16  #: files at a time
_END = 2048  # bytes
_CHUNK = "torch.distributed.checkpoint.metadata.ChunkStorageMetadata"


def _bad(what: str, found: str = "") -> Refusal:
    return Refusal(what, code="CK302", found=found, try_="save the checkpoint again with torch.distributed.checkpoint")


class _Place(Struct, frozen=True, order=True):
    """Where one chunk lies: which file, from which byte, how many."""

    file: str
    offset: int
    nbytes: int


def read(folder: Path) -> Contents:
    """The contents of a torch.distributed.checkpoint folder, as the tree of dicts that was saved.

    Raises :class:`~ckptconv.errors.Refusal` CK302 for a folder whose parts do not fit each other, and for chunks that were transformed.
    """
    with opened(folder / METADATA) as descriptor:
        size = os.fstat(descriptor).st_size
        times = allowance(size + sum(path.lstat().st_size for path in folder.glob("*.distcp")))
        if size > MAX_PICKLE * times:
            raise _bad(f".metadata has {size:,} bytes; at most {MAX_PICKLE * times:,} are read")
        raw = read_at(descriptor, size, 0)
    metadata, _ = run(raw, _no_storage, times=times)
    state = _state(metadata, "torch.distributed.checkpoint.metadata.Metadata")
    entries, storage = state.get("state_dict_metadata"), state.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        raise _bad(".metadata names no tensors, or not where they are")
    places = _places(storage)
    _refuse_overlaps({place for found in places.values() for place in found.values()})
    names = sorted({place.file for found in places.values() for place in found.values()})
    for name in names:
        if "/" in name or "\\" in name or name in ("", ".", "..") or (folder / name).is_symlink() or not (folder / name).is_file():
            raise _bad("a data file is missing, or no plain file of the folder", printable(name))
    announce(_ends(folder, places), once=True)
    flat: dict[str, Any] = {}
    own: dict[str, str] = {}
    values, nbytes, unread = 0, 0, 0
    with closing(_Files(folder, {name: at for at, name in enumerate(names)}, own)) as files:
        for name, entry in entries.items():
            if not isinstance(name, str):
                raise _bad("a tensor without a name", printable(name))
            found = places.get(name, {})
            if isinstance(entry, Foreign) and entry.name.endswith(".TensorStorageMetadata") and isinstance(entry.state, dict):
                flat[name] = _tensor(name, entry.state, found, files)
            else:
                place = found.get(None)
                values, nbytes = values + 1, nbytes + (place.nbytes if place is not None else 0)
                read = place is not None and values <= MAX_VALUES * times and nbytes <= MAX_PICKLE * times
                flat[name] = _value(entry, place, files) if place is not None and read else entry
                unread += place is not None and not read
    warnings = (f"{unread:,} entries that are no tensors were not read; they are left behind",) if unread else ()
    tree = _unflattened(flat, state.get("planner_data"))
    contents = contents_from_tree("torch-distributed", tuple(folder / name for name in names), tree, metadata=own, warnings=warnings)
    neighbours, _ = beside(folder, {METADATA, *names})
    return with_top(replace(contents, neighbours=neighbours))


class _Files(Struct, frozen=True):
    """The data files by name and number; a few of them are open, for there may be one from each of a thousand ranks."""

    folder: Path
    numbers: Mapping[str, int]
    metadata: dict[str, str]  #: what ckptconv wrote about itself, as it is found
    known: dict[_Place, Any] = field(default_factory=dict)
    stacks: dict[str, ExitStack] = field(default_factory=dict)  #: of the open files, the longest open first
    descriptors: dict[str, int] = field(default_factory=dict)

    def object_at(self, place: _Place) -> Any:
        """What lies there. However many names ask for it, it is read once, and is one tensor."""
        if place not in self.known:
            descriptor, number = self._descriptor(place.file), self.numbers[place.file]
            self.known[place], own = read_embedded(self.folder / place.file, descriptor, number, place.offset, place.nbytes)
            self.metadata.update(own)
        return self.known[place]

    def _descriptor(self, name: str) -> int:
        if name not in self.descriptors:
            if len(self.stacks) >= MAX_OPEN:
                oldest = next(iter(self.stacks))
                del self.descriptors[oldest]
                self.stacks.pop(oldest).close()
            stack = self.stacks[name] = ExitStack()
            self.descriptors[name] = stack.enter_context(opened(self.folder / name))
        return self.descriptors[name]

    def close(self) -> None:
        """Closes what is open."""
        for stack in self.stacks.values():
            stack.close()


def _no_storage(kind: str, key: str, count: int, view: Any) -> Any:  # noqa: ARG001  (the signature of a resolver)
    raise _bad(".metadata refers to a storage")


def _state(value: Any, kind: str) -> Mapping[str, Any]:
    if not isinstance(value, Foreign) or value.name != kind or not isinstance(value.state, dict):
        raise _bad(f".metadata holds something else than a {kind.rsplit('.', 1)[-1]}", printable(type(value).__name__))
    return value.state


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or any(type(size) is not int or size < 0 for size in value):
        raise _bad("a row of sizes in .metadata is none", printable(value))
    return tuple(value)


def _places(storage: Mapping[Any, Any]) -> dict[str, dict[tuple[int, ...] | None, _Place]]:
    """Tensor -> offsets of a chunk -> where it lies."""
    found: dict[str, dict[tuple[int, ...] | None, _Place]] = {}
    for entry in storage.values():
        if not isinstance(entry, Keyed):
            raise _bad(".metadata says in an unknown way where the chunks are")
        key = _state(entry.key, "torch.distributed.checkpoint.metadata.MetadataIndex")
        place = _state(entry.value, "torch.distributed.checkpoint.filesystem._StorageInfo")
        if place.get("transform_descriptors"):
            raise _bad("the chunks were transformed when they were saved (compressed, say)", printable(place["transform_descriptors"]))
        name, offset = key.get("fqn"), key.get("offset")
        numbers = place.get("offset"), place.get("length")
        if (
            not isinstance(name, str)
            or not isinstance(place.get("relative_path"), str)
            or any(type(number) is not int for number in numbers)
        ):
            raise _bad(".metadata says in an unknown way where the chunks are")
        at = None if offset is None else _sizes(offset)
        if at in found.setdefault(name, {}):
            raise _bad(f".metadata says twice where a chunk of {printable(name)} is")
        found[name][at] = _Place(place["relative_path"], place["offset"], place["length"])
    return found


def _ends(folder: Path, places: Mapping[str, Mapping[Any, _Place]]) -> Iterator[tuple[Path, int, int]]:
    """Where the chunks' own pickles and directories are: at their starts and ends."""
    for place in (place for found in places.values() for place in found.values()):
        yield folder / place.file, max(place.offset, 0), _END
        yield folder / place.file, max(place.offset + place.nbytes - _END, 0), _END


def _refuse_overlaps(places: set[_Place]) -> None:
    """Archives lie one after the other: read once each, they cost no more than their file is long."""
    for one, other in pairwise(sorted(places)):
        if one.file == other.file and one.offset + one.nbytes > other.offset:
            raise _bad("archives overlap", f"at bytes {one.offset:,} and {other.offset:,} of {printable(one.file)}")


def _value(entry: Any, place: _Place, files: _Files) -> Any:
    """The plain data of an entry that is no tensor; the entry itself where it is something else. What is in it is never run."""
    try:
        return files.object_at(place)
    except Refusal:  # a stranger's object: it is named, and left behind
        return entry


def _tensor(name: str, state: Mapping[str, Any], places: Mapping[tuple[int, ...] | None, _Place], files: _Files) -> Placed | Composite:
    """The tensor called ``name``, or the chunks that it is."""
    shape, chunks = _sizes(state.get("size")), state.get("chunks")
    if not isinstance(chunks, list) or not chunks:
        raise _bad(f"{printable(name)} has no chunks")
    found: dict[Box, Placed] = {}
    for chunk in chunks:
        fields = _state(chunk, _CHUNK)
        start, size = _sizes(fields.get("offsets")), _sizes(fields.get("sizes"))
        box = Box(start, size)
        if box in found or (0 in size and 0 not in shape):
            continue  # a copy of the same chunk, or the share of a rank that got nothing
        place = places.get(start)
        if place is None or not len(start) == len(size) == len(shape) or any(a + n > s for a, n, s in zip(start, size, shape, strict=True)):
            raise _bad(f"a chunk of {printable(name)} is missing, or outside of it", f"{list(start)} + {list(size)} of {list(shape)}")
        placed = files.object_at(place)
        if not isinstance(placed, Placed) or placed.spec.shape != size:
            raise _bad(f"a chunk of {printable(name)} is not the tensor that .metadata says", f"{list(size)} wanted")
        found[box] = placed
    return joined(name, shape, found, _bad)


class _Node(dict[Any, Any]):
    """A dict or list that paths lead through; what stands at their ends is none, even where it is a dict."""


def _unflattened(flat: Mapping[str, Any], paths: Any) -> dict[Any, Any]:
    """What was saved: ``paths`` (the planner's) says where each entry stood. Without it, one flat dict."""
    tree = _Node()
    for name, value in flat.items():
        path = paths.get(name) if isinstance(paths, dict) else None
        keys = path if isinstance(path, (tuple, list)) and path and all(type(key) in (str, int) for key in path) else (name,)
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, _Node())
            if not isinstance(node, _Node):
                raise _bad("the paths in .metadata contradict each other", printable(name))
        if keys[-1] in node or len(keys) > MAX_DEPTH:
            raise _bad("the paths in .metadata contradict each other, or have no end", printable(name))
        node[keys[-1]] = value
    return {key: _grown(value) for key, value in tree.items()}


def _grown(value: Any) -> Any:
    """A node as the list that it was, where its keys count from 0 (those of a dict are text in such paths), else as a dict."""
    if not isinstance(value, _Node):
        return value
    inner = {key: _grown(item) for key, item in value.items()}
    counted = all(type(key) is int for key in inner) and min(inner) == 0 and max(inner) == len(inner) - 1
    return [inner[at] for at in range(len(inner))] if counted else inner
