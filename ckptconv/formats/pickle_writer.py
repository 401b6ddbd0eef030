"""The pickles of torch, emitted by hand: the opcodes that its own ``state_dict`` pickles consist of, protocol 2.

Nothing is imported and nothing is called to write it, so no torch is needed. The bytes are those that ``torch.save`` gives for the
same objects. Format: https://docs.python.org/3/library/pickletools.html and ``torch/_utils.py``.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from msgspec import Struct, field

from ckptconv.formats.base import Converted, Kept
from ckptconv.formats.dtypes import DTYPE_STORAGES
from ckptconv.spec import Manifest, TensorSpec, contiguous_strides

_BATCH = 1000  # items between two marks, as Python's pickler does it
_SHORT_TUPLES = (b")", b"\x85", b"\x86", b"\x87")
_UINT32 = struct.Struct("<I").pack


def emit(tree: Any, manifest: Manifest, module_versions: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[bytes, dict[str, int]]:
    """The pickle of ``tree`` with the state_dict in the place of its :class:`~ckptconv.formats.base.Converted`.

    Gives back the bytes, and the storages by slot name in the order of their keys: ``data/0`` is the first; the value is its size in
    bytes. A file of its own for what goes along beside a state_dict has none, and no manifest. Raises ``ValueError`` for a tree without exactly
    one ``Converted`` otherwise, or with leaves that are not plain data.
    """
    emitter = _Emitter(manifest, module_versions or {})
    emitter.value(tree)
    if emitter.converted != 1 and (emitter.converted or len(manifest)):
        raise ValueError(f"the tree holds {emitter.converted} places for the state_dict, not one")
    return bytes(emitter.out + b"."), emitter.storages


def emit_value(value: Any) -> tuple[bytes, dict[str, int]]:
    """The pickle of plain data, and the storages of the :class:`~ckptconv.formats.base.Kept` tensors in it, as :func:`emit` gives them.

    >>> emit_value({"lr": 0.5})[0]
    b'\\x80\\x02}q\\x00X\\x02\\x00\\x00\\x00lrq\\x01G?\\xe0\\x00\\x00\\x00\\x00\\x00\\x00s.'
    """
    emitter = _Emitter(Manifest({}), {})
    emitter.value(value)
    if emitter.converted:
        raise ValueError("a value with a place for the state_dict in it")
    return bytes(emitter.out + b"."), emitter.storages


class Named(Struct, frozen=True):
    """Something that a module holds under this name: ``torch.float32``."""

    module: str
    name: str


class Called(Struct, frozen=True):
    """What calling ``function`` with ``arguments`` gives."""

    function: Named
    arguments: tuple[Any, ...]


class Instance(Struct, frozen=True):
    """An object of the class ``kind`` that is given ``state``; its ``__init__`` is not called."""

    kind: Named
    state: Any


class Pairs(Struct, frozen=True):
    """A dict whose keys may be objects."""

    items: Sequence[tuple[Any, Any]]


class _Tensor(Struct, frozen=True):
    """A tensor of the state_dict, under the name of its slot."""

    name: str
    spec: TensorSpec


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K%c" % value
    if 0 <= value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    # Two's complement in as few bytes as hold the sign.
    size = (value if value >= 0 else ~value).bit_length() // 8 + 1
    head = b"\x8a%c" % size if size < 256 else b"\x8b" + struct.pack("<i", size)
    return head + value.to_bytes(size, "little", signed=True)


@lru_cache(4096)
def _sizes(sizes: tuple[int, ...]) -> bytes:
    """A tuple of integers, which still has to be memoised unless it is empty. Models repeat few shapes many times."""
    items = b"".join(map(_integer, sizes))
    return b"(" + items + b"t" if len(sizes) > 3 else items + _SHORT_TUPLES[len(sizes)]


class _Emitter(Struct):
    manifest: Manifest
    module_versions: Mapping[str, Mapping[str, Any]]
    out: bytearray = field(default_factory=lambda: bytearray(b"\x80\x02"))
    #: texts, and globals as (module, name), that were written before -> their place in the memo
    known: dict[str | tuple[str, str], int] = field(default_factory=dict)
    #: what was called or made before, by its identity: the object, so that no other one gets it, and its place in the memo
    objects: dict[int, tuple[Any, int]] = field(default_factory=dict)
    memoised: int = 0
    storages: dict[str, int] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # slot name -> storage key
    converted: int = 0

    def put(self) -> int:
        """Memoise the top of the stack; its place in the memo."""
        at = self.memoised
        self.out += b"q%c" % at if at < 256 else b"r" + _UINT32(at)
        self.memoised = at + 1
        return at

    def fetch(self, at: int) -> None:
        self.out += b"h%c" % at if at < 256 else b"j" + _UINT32(at)

    def text(self, value: str) -> None:
        at = self.known.get(value)
        if at is not None:
            self.fetch(at)
            return
        raw = value.encode("utf-8", "surrogatepass")
        self.out += b"X" + _UINT32(len(raw)) + raw
        self.known[value] = self.put()

    def reference(self, module: str, name: str) -> None:
        at = self.known.get((module, name))
        if at is not None:
            self.fetch(at)
            return
        self.out += f"c{module}\n{name}\n".encode("ascii")
        self.known[module, name] = self.put()

    def value(self, value: Any) -> None:
        if value is None:
            self.out += b"N"
        elif isinstance(value, bool):
            self.out += b"\x88" if value else b"\x89"
        elif isinstance(value, str):
            self.text(value)
        elif isinstance(value, int):
            self.out += _integer(value)
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, bytes):
            # Protocol 2 has no bytes: Python spells them as text, encoded back when loaded.
            self.reference("_codecs", "encode")
            self.text(value.decode("latin-1"))
            self.text("latin1")
            self.out += b"\x86"
            self.put()
            self.out += b"R"
            self.put()
        elif isinstance(value, tuple):
            self.pack_tuple(value)
        elif isinstance(value, list):
            self.pack_list(value)
        elif isinstance(value, Mapping):
            self.mapping(value)
        elif isinstance(value, _Tensor):
            self.tensor(value.name, value.spec)
        elif isinstance(value, Kept):
            if value.name in self.manifest or value.name in self.keys:
                raise ValueError(f"the slot name {value.name!r} is taken")
            self.tensor(value.name, value.spec)
        elif isinstance(value, Converted):
            self.converted += 1
            self.state_dict()
        elif isinstance(value, Named):
            self.reference(value.module, value.name)
        elif isinstance(value, (Called, Instance)) and id(value) in self.objects:
            self.fetch(self.objects[id(value)][1])
        elif isinstance(value, Called):
            self.value(value.function)
            self.pack_tuple(value.arguments)
            self.out += b"R"
            self.objects[id(value)] = value, self.put()
        elif isinstance(value, Instance):
            self.value(value.kind)
            self.out += b")\x81"
            self.objects[id(value)] = value, self.put()
            if value.state:
                self.value(value.state)
                self.out += b"b"
        elif isinstance(value, Pairs):
            self.out += b"}"
            self.put()
            self.items(value.items, len(value.items))
        else:
            raise ValueError(f"{type(value).__name__} is not plain data")

    def pack_tuple(self, values: Sequence[Any]) -> None:
        if not values:
            self.out += b")"
            return
        if len(values) > 3:
            self.out += b"("
        for value in values:
            self.value(value)
        self.out += b"t" if len(values) > 3 else _SHORT_TUPLES[len(values)]
        self.put()

    def pack_list(self, values: Sequence[Any]) -> None:
        self.out += b"]"
        self.put()
        for at in range(0, len(values), _BATCH):
            batch = values[at : at + _BATCH]
            if len(batch) > 1:
                self.out += b"("
            for value in batch:
                self.value(value)
            self.out += b"e" if len(batch) > 1 else b"a"

    def mapping(self, value: Mapping[Any, Any]) -> None:
        if isinstance(value, OrderedDict):
            self.empty_ordered_dict()
        else:
            self.out += b"}"
        self.put()
        self.items(value.items(), len(value))

    def items(self, items: Iterable[tuple[Any, Any]], count: int) -> None:
        pairs = iter(items)
        for at in range(0, count, _BATCH):
            size = min(_BATCH, count - at)
            if size > 1:
                self.out += b"("
            for _ in range(size):
                key, value = next(pairs)
                self.value(key)
                self.value(value)
            self.out += b"u" if size > 1 else b"s"

    def empty_ordered_dict(self) -> None:
        self.reference("collections", "OrderedDict")
        self.out += b")R"

    def state_dict(self) -> None:
        """An ``OrderedDict`` of tensors, with the attribute ``_metadata`` where module versions are known."""
        aliases = self.manifest.aliases
        self.empty_ordered_dict()
        self.put()
        tensors = ((name, _Tensor(aliases.get(name, name), spec)) for name, spec in self.manifest.tensors.items())
        self.items(tensors, len(self.manifest))
        if self.module_versions:
            self.mapping({"_metadata": OrderedDict((module, dict(versions)) for module, versions in self.module_versions.items())})
            self.out += b"b"

    def tensor(self, slot: str, spec: TensorSpec) -> None:
        """A contiguous tensor that is the whole of the storage ``slot``."""
        key = self.keys.setdefault(slot, str(len(self.keys)))
        self.storages[slot] = spec.nbytes
        typed = DTYPE_STORAGES.get(spec.dtype)
        self.reference("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self.out += b"(("
        self.text("storage")
        self.reference(*(("torch", typed) if typed else ("torch.storage", "UntypedStorage")))
        self.text(key)
        self.text("cpu")
        self.out += _integer(spec.numel if typed else spec.nbytes) + b"t"
        self.put()
        self.out += b"QK\x00"
        for sizes in (spec.shape, contiguous_strides(spec.shape)):
            self.out += _sizes(sizes)
            if sizes:
                self.put()
        self.out += b"\x89"
        self.empty_ordered_dict()
        self.put()
        if not typed:
            self.reference("torch", spec.dtype.value)
        self.out += b"t"
        self.put()
        self.out += b"R"
        self.put()
