"""What every format gives and takes: the contents of a checkpoint as data, and the layout of an output file.

A reader looks at headers only. It says which tensors there are and where their bytes lie; it never makes a tensor, never imports
torch and never runs anything that a file asks for. A writer lays a file out from the manifest alone: every byte offset is known
before the first weight is read, so that anyone may fill any tensor's bytes, in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct, field

from ckptconv.errors import Refusal
from ckptconv.spec import Box, Manifest, TensorSpec, is_contiguous

INDEX_SUFFIX = ".index.json"  #: of the file that says which shard holds which tensor


class Storage(Struct, frozen=True, gc=False):
    """A run of bytes in one of a checkpoint's files, on which one or more tensors are views."""

    file: int  #: index into ``Contents.files``
    offset: int  #: absolute, in bytes
    nbytes: int
    crc32: int | None = None  #: of all its bytes, where the container records one
    big_endian: bool = False


class Placed(Struct, frozen=True, gc=False):
    """One tensor of a source: its spec, and the view on its storage. Bounds were checked by the reader."""

    spec: TensorSpec
    storage: Storage
    offset: int  #: of the first element, in bytes from the storage's start
    strides: tuple[int, ...]  #: in elements
    requires_grad: bool = False

    @property
    def contiguous(self) -> bool:
        """True when the tensor is one range of bytes, so that copying it needs no tensor."""
        return is_contiguous(self.spec.shape, self.strides) and not self.storage.big_endian


class Foreign(Struct, eq=False):
    """An object of a class that ckptconv does not know: never built, only named. ``state`` and ``arguments`` are plain data.

    The one thing here that is not frozen: a pickle makes an object first and gives it its state later.
    """

    name: str  #: ``argparse.Namespace``
    state: Any = None
    arguments: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return f"<{self.name}>"  # and nothing of its state, which may have no end


class Keyed(Struct, frozen=True):
    """The entry of a dict whose key is an object: it stands under a text of our own, and remembers its key."""

    key: Foreign
    value: Any

    def __repr__(self) -> str:
        return repr(self.key)  # and nothing of its value, for the same reason


class Unsupported(Struct, frozen=True):
    """A tensor of a kind that cannot be converted (sparse, quantised, …): it is named, and its state_dict is refused."""

    kind: str


class Composite(Struct, frozen=True):
    """A tensor that is stored as several: sparse, quantised, or in chunks. Only its parts have bytes; the plan puts it together.

    ``kind`` and its parts: ``coo`` (indices, values), ``csr`` (row pointers, columns, values), ``int8`` (numbers, scales, zero points;
    a part may be a plain number), ``chunks`` (boxes of it, at ``boxes``), ``flat`` (ranges of its elements, one after the other).
    """

    kind: str
    spec: TensorSpec  #: of the whole
    parts: Mapping[str, Placed | float | int]
    boxes: tuple[Box, ...] = ()
    axis: int | None = None


class Converted(Struct, frozen=True):
    """Stands in an output's tree where the converted state_dict goes."""


class Kept(Struct, frozen=True):
    """Stands in an output's tree for a tensor that is carried along beside the state_dict (an optimizer's moment, say)."""

    name: str  #: of its slot; never a name of the state_dict
    spec: TensorSpec


class Container(Struct, frozen=True):
    """One candidate state_dict of a file: flat names to placed tensors, in order."""

    path: str  #: dotted way to it (``state_dict``, ``model.ema``), ``.`` for the file's top
    tensors: Mapping[str, Placed]
    #: ``state_dict._metadata``: module path -> ``{"version": 2}`` and the like
    module_versions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: entries beside the tensors that are not carried: path -> what it is
    skipped: Mapping[str, str] = field(default_factory=dict)
    #: names whose tensors are stored in parts; a part is called ``name::part`` where tensors are read
    composites: Mapping[str, Composite] = field(default_factory=dict)
    #: tensors that are there, but of a kind that cannot be converted: name -> kind
    unsupported: Mapping[str, str] = field(default_factory=dict)

    @property
    def manifest(self) -> Manifest:
        """Names and specs; names that view the same elements of the same storage are tied."""
        whole: dict[str, Placed | Composite] = {**self.tensors, **self.composites}
        return Manifest({name: stored.spec for name, stored in whole.items()}, self._ties(self.tensors))

    @property
    def stored(self) -> Mapping[str, Placed]:
        """Everything that has bytes: the plain tensors, and the parts of the others under names of their own."""
        parts: dict[str, Placed] = {}
        seen: set[int] = set()
        for name, composite in self.composites.items():
            if id(composite) in seen:  # a tied name
                continue
            seen.add(id(composite))
            parts.update((f"{name}::{part}", placed) for part, placed in composite.parts.items() if isinstance(placed, Placed))
        return {**self.tensors, **parts}

    @property
    def stored_manifest(self) -> Manifest:
        """The manifest of what has bytes: the source of a plan."""
        stored = self.stored
        return Manifest({name: placed.spec for name, placed in stored.items()}, self._ties(stored))

    @staticmethod
    def _ties(tensors: Mapping[str, Placed]) -> tuple[tuple[str, ...], ...]:
        firsts: dict[tuple[Any, ...], str] = {}
        ties: dict[str, list[str]] = {}
        for name, placed in tensors.items():
            storage = placed.storage
            first = firsts.setdefault((storage.file, storage.offset, placed.offset, placed.strides, placed.spec), name)
            if first is not name and placed.spec.numel:
                ties.setdefault(first, [first]).append(name)
        return tuple(map(tuple, ties.values()))


class Contents(Struct, frozen=True):
    """Everything that a checkpoint holds, without its weights."""

    format: str  #: ``torch``, ``torch-legacy``, ``safetensors``
    files: tuple[Path, ...]
    containers: Mapping[str, Container]  #: by path, best candidate first
    tree: Any = None  #: the file's own structure: dict, list, tuple, scalars, Placed, Foreign, Unsupported
    metadata: Mapping[str, str] = field(default_factory=dict)  #: text that the file carries about itself
    skipped: Mapping[str, str] = field(default_factory=dict)  #: path -> class name of what is not plain data
    warnings: tuple[str, ...] = ()
    neighbours: tuple[Path, ...] = ()  #: other files of a folder (config.json, tokenizer)
    identities: Mapping[Path, tuple[int, int, int, int]] = field(default_factory=dict)  #: of the files, from before their headers were read


class Slot(Struct, frozen=True):
    """Where one tensor's bytes go in an output file."""

    offset: int
    nbytes: int


class FileLayout(Struct, frozen=True):
    """One output file, laid out: its size, the place of every tensor, and the bytes that are known beforehand."""

    name: str  #: relative to the destination's folder
    format: str
    nbytes: int
    slots: Mapping[str, Slot]  #: by tensor name; aliases have none
    manifest: Manifest
    metadata: Mapping[str, str]
    needs_crc: bool  #: the writer's ``seal`` wants the CRC-32 of every slot
    detail: Any = None  #: the writer's own notes


class Writer(Protocol):
    """Lays files out, and closes them once every slot is filled."""

    name: str

    def refuse(self, manifest: Manifest) -> list[Refusal]:
        """What of this manifest the format cannot hold (dtypes, names), all of it; empty when it fits."""
        ...

    def lay_out(
        self, file_name: str, manifest: Manifest, *, metadata: Mapping[str, str], tree: Any = None,
        module_versions: Mapping[str, Mapping[str, Any]] | None = None, phases: Mapping[str, int] | None = None,
    ) -> FileLayout:  # fmt: skip
        """Place every tensor. Pure: equal arguments give an equal layout.

        ``tree`` is the structure to write around the state_dict: plain data with one :class:`Converted` in it, and :class:`Kept`
        tensors that get slots of their own. None: the state_dict is the whole file. ``phases`` says where in a page of 4,096 bytes the
        bytes of a tensor lie now: put at the like place, they can be shared with their source by a filesystem that does so.
        """
        ...

    def lay_out_folder(
        self, manifest: Manifest, shard_nbytes: int | None, together: Iterable[Sequence[str]] = (), **options: Any
    ) -> tuple[tuple[FileLayout, ...], tuple[str, bytes] | None]:
        """The files of a folder, each of at most ``shard_nbytes`` where no single tensor passes that; ``options`` as for :meth:`lay_out`.

        The tensors of each group in ``together`` stay in one file where they fit into one.

        With them the folder's index (file name and contents) where it has one: it is written last.
        """
        ...

    def seal(self, layout: FileLayout, crc32: Mapping[str, int], metadata: Mapping[str, str]) -> list[tuple[int, bytes]]:
        """All bytes outside the slots, as (offset, bytes). May be called again with other metadata of the same keys and lengths."""
        ...


def damaged(what: str, *, code: str = "CK302", found: str = "", try_: str = "") -> Refusal:
    """A reader's refusal."""
    return Refusal(what, code=code, found=found, try_=try_)
