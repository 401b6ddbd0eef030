"""What a cause is, and what a recogniser of causes looks at: a file's facts, and the two sides that do not fit each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from ckptconv.compare import Allow, Comparison, compare
from ckptconv.names import collapse
from ckptconv.spec import DType, Manifest, TensorSpec

Shape = tuple[int, ...]


class Cause(Struct, frozen=True, dict=True):
    """One reason for what differs, in words."""

    kind: str  #: a word for programs: wrapper, head, depth, …
    sentence: str
    names: tuple[str, ...] = ()  #: of either side, that this explains
    try_: str = ""
    fatal: bool = False  #: no renaming can help
    soft: bool = False  #: what is left may be left: the rest converts, and this stays as the model was made

    @cached_property
    def templates(self) -> tuple[str, ...]:
        return tuple(map(str, collapse(self.names)))

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "sentence": self.sentence,
            "templates": list(self.templates),
            "tensors": len(self.names),
            "try": self.try_,
        }


class Part(Struct, frozen=True):
    """One state_dict of a file."""

    path: str
    manifest: Manifest
    is_module: bool = False  #: a whole module was pickled
    composites: Mapping[str, str] = field(default_factory=dict)  #: name -> kind of what is stored in parts
    unsupported: Mapping[str, str] = field(default_factory=dict)


class FileFacts(Struct, frozen=True):
    """What a file is, as far as its headers tell."""

    path: str
    format: str
    nbytes: int
    files: int = 1
    parts: tuple[Part, ...] = ()
    beside: tuple[str, ...] = ()  #: other entries of its top: epoch, optimizer, …
    strangers: Mapping[str, str] = field(default_factory=dict)  #: where objects of unknown classes stand -> their class
    optimizer: tuple[int, int] | None = None  #: parameters and groups of an optimizer's state, where the file is nothing else
    metadata: Mapping[str, str] = field(default_factory=dict)


class Sides(Struct, frozen=True, dict=True):
    """What is there and what is wanted. Of the names in ``unknown`` only the names are known (from a pasted error)."""

    found: Manifest
    wanted: Manifest
    comparison: Comparison
    unknown: frozenset[str] = frozenset()

    @property
    def missing(self) -> tuple[str, ...]:
        return self.comparison.missing

    @property
    def unexpected(self) -> tuple[str, ...]:
        return self.comparison.unexpected

    @cached_property
    def sizes(self) -> tuple[tuple[str, Shape, Shape], ...]:
        """(name, shape that is there, shape that is wanted) of every size mismatch."""
        return tuple((name, found.shape, wanted.shape) for name, found, wanted in self.comparison.shapes)

    def shape(self, name: str, of: Manifest) -> Shape | None:
        """The shape of ``name``, or None where only its name is known."""
        return None if name in self.unknown or name not in of else of[name].shape

    def without(self, names: Iterable[str]) -> Sides:
        """The same sides with these differences taken as explained."""
        gone = frozenset(names)
        if not gone:
            return self
        c = self.comparison

        def keep(names: Iterable[str]) -> tuple[str, ...]:
            return tuple(name for name in names if name not in gone)

        shapes = tuple(item for item in c.shapes if item[0] not in gone)
        dtypes = tuple(item for item in c.dtypes if item[0] not in gone)
        left = replace(c, missing=keep(c.missing), unexpected=keep(c.unexpected), shapes=shapes, dtypes=dtypes)
        return Sides(self.found, self.wanted, left, self.unknown)


def sides(found: Manifest, wanted: Manifest, unknown: frozenset[str] = frozenset(), allow: Allow | None = None) -> Sides:
    """Both compared; sizes and dtypes of what is unknown are never a difference."""
    base = allow or Allow()
    both = Allow(
        base.missing, base.unexpected, lambda name: name in unknown or base.shape(name), lambda name: name in unknown or base.dtype(name)
    )
    return Sides(found, wanted, compare(found, wanted, both), unknown)


def only_names(names: Iterable[str]) -> dict[str, TensorSpec]:
    """Stand-ins for tensors of which nothing but the name is known."""
    return {name: TensorSpec((), DType.float32) for name in names}


def count_of(count: int, noun: str, verb: str = "") -> str:
    """A number with its noun, and with what these do: ``be`` or ``have``.

    >>> count_of(1, "key", "be"), count_of(2000, "key", "have"), count_of(2, "tensor")
    ('1 key is', '2,000 keys have', '2 tensors')
    """
    one, many = {"": ("", ""), "be": (" is", " are"), "have": (" has", " have")}[verb]
    return f"{count:,} {noun}{one}" if count == 1 else f"{count:,} {noun}s{many}"
