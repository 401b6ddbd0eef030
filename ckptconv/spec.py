"""The words that every part of ckptconv speaks: dtypes, tensor specs, manifests.

A *manifest* (names -> shape and dtype, in order, with ties) is the currency of the program. A source, a plan's outputs, a target
model and a written file are all manifests, and every check compares two of them. Standard library only: torch is never needed to
talk about a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import lru_cache
from math import prod
from types import MappingProxyType
from typing import Any

from msgspec import Struct
from msgspec.structs import force_setattr

MAX_RANK = 64
MAX_ELEMENTS = 2**63 - 1


class DType(str, Enum):
    """An element type, under torch's own name: ``getattr(torch, dtype.value)`` is the same type.

    >>> DType("bfloat16").bits, DType.float8_e4m3fn.kind
    (16, 'float')
    """

    float64 = "float64"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float8_e4m3fn = "float8_e4m3fn"
    float8_e5m2 = "float8_e5m2"
    float8_e4m3fnuz = "float8_e4m3fnuz"
    float8_e5m2fnuz = "float8_e5m2fnuz"
    float8_e8m0fnu = "float8_e8m0fnu"
    float4_e2m1fn_x2 = "float4_e2m1fn_x2"
    complex32 = "complex32"
    complex64 = "complex64"
    complex128 = "complex128"
    int64 = "int64"
    int32 = "int32"
    int16 = "int16"
    int8 = "int8"
    uint64 = "uint64"
    uint32 = "uint32"
    uint16 = "uint16"
    uint8 = "uint8"
    bool = "bool"

    __hash__ = str.__hash__  # a name and its value are one text; Enum's own hash is a function of Python

    def __str__(self) -> str:
        return self.value

    def __format__(self, format_spec: str) -> str:
        return self.value.__format__(format_spec)

    @property
    def bits(self) -> int:
        """Size of one element in bits. One element of ``float4_e2m1fn_x2`` is a pair of 4-bit numbers, as in torch."""
        return _BITS[self]

    @property
    def nbytes(self) -> int:
        """Size of one element in bytes."""
        return _BITS[self] // 8

    @property
    def kind(self) -> str:
        """``float``, ``complex``, ``int``, ``uint`` or ``bool``."""
        return _KIND[self]


_BITS: Mapping[DType, int] = {
    DType.float64: 64, DType.float32: 32, DType.float16: 16, DType.bfloat16: 16,
    DType.float8_e4m3fn: 8, DType.float8_e5m2: 8, DType.float8_e4m3fnuz: 8, DType.float8_e5m2fnuz: 8,
    DType.float8_e8m0fnu: 8, DType.float4_e2m1fn_x2: 8,
    DType.complex32: 32, DType.complex64: 64, DType.complex128: 128,
    DType.int64: 64, DType.int32: 32, DType.int16: 16, DType.int8: 8,
    DType.uint64: 64, DType.uint32: 32, DType.uint16: 16, DType.uint8: 8, DType.bool: 8,
}  # fmt: skip
_KIND: Mapping[DType, str] = {
    dtype: "bool" if dtype.value == "bool" else next(kind for kind in ("float", "complex", "uint", "int") if kind in dtype.value)
    for dtype in DType
}
# What each float type can hold exactly: (largest exponent, smallest normal exponent, significand bits). From IEEE 754 and the OCP FP8
# and MX specifications; used to tell a widening cast from one that can lose something.
_RANGE: Mapping[DType, tuple[int, int, int]] = {
    DType.float64: (1023, -1022, 53), DType.float32: (127, -126, 24), DType.float16: (15, -14, 11), DType.bfloat16: (127, -126, 8),
    DType.float8_e4m3fn: (8, -6, 4), DType.float8_e5m2: (15, -14, 3), DType.float8_e4m3fnuz: (7, -7, 4),
    DType.float8_e5m2fnuz: (15, -15, 3),
}  # fmt: skip


def widens(source: DType, to: DType) -> bool:
    """True when every value of ``source`` is a value of ``to``, so that a cast loses nothing.

    >>> widens(DType.bfloat16, DType.float32), widens(DType.float16, DType.bfloat16), widens(DType.int64, DType.float32)
    (True, False, False)
    """
    if source == to:
        return True
    if source in _RANGE and to in _RANGE:
        (high, low, digits), (to_high, to_low, to_digits) = _RANGE[source], _RANGE[to]
        # `low - digits` is the smallest subnormal's exponent: it has to be there in the wider type too.
        return to_high >= high and to_low - to_digits <= low - digits and to_digits >= digits
    if source is DType.bool:
        return to is not DType.float8_e8m0fnu  # which has no zero
    if source.kind in ("int", "uint") and to.kind in ("int", "uint"):
        signed_cost = int(source.kind == "uint" and to.kind == "int")
        return not (source.kind == "int" and to.kind == "uint") and to.bits >= source.bits + signed_cost
    if source.kind in ("int", "uint") and to in _RANGE:
        return source.bits - int(source.kind == "int") <= _RANGE[to][2]
    if source.kind == "complex" and to.kind == "complex":
        return to.bits >= source.bits
    return False


class TensorSpec(Struct, frozen=True, gc=False):
    """Shape and dtype of one tensor.

    >>> TensorSpec((768, 768), DType.bfloat16).nbytes
    1179648
    """

    shape: tuple[int, ...]
    dtype: DType

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _BITS[self.dtype] // 8

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype.value}"


class Box(Struct, frozen=True):
    """An axis-aligned region of a tensor: where it starts and how far it goes, one number per axis."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @staticmethod
    def whole(shape: tuple[int, ...]) -> Box:
        return Box((0,) * len(shape), tuple(shape))


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a row-major tensor, as torch gives them.

    >>> contiguous_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@lru_cache(maxsize=65536)
def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """True when the elements lie one after the other in row-major order; axes of size 1 may have any stride."""
    if 0 in shape:
        return True
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


class Manifest(Struct, frozen=True):
    """Names with their specs, in order, and which of them are one tensor under several names (*ties*).

    >>> m = Manifest({"a.weight": TensorSpec((2, 3), DType.float32)})
    >>> m.nbytes, m.numel, "a.weight" in m
    (24, 6, True)
    """

    tensors: Mapping[str, TensorSpec]
    ties: tuple[tuple[str, ...], ...] = ()
    #: Names that ``state_dict`` holds but the optimizer does not train (running statistics and the like); only targets know them.
    buffers: frozenset[str] = frozenset()
    #: What a reader should know and the names do not tell (an extra state that is no tensor, say); only targets have them.
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        force_setattr(self, "tensors", MappingProxyType(dict(self.tensors)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.tensors == other.tensors and self.ties == other.ties

    __hash__ = None  # type: ignore[assignment]  # typeshed calls it a method; a manifest holds a mapping, and has none

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> TensorSpec:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def aliases(self) -> dict[str, str]:
        """Every name of a tie but the first, mapped to the first."""
        return {name: group[0] for group in self.ties for name in group[1:]}

    @property
    def stored(self) -> Mapping[str, TensorSpec]:
        """What has bytes of its own: all names but the aliases."""
        aliases = self.aliases
        return self.tensors if not aliases else {name: spec for name, spec in self.tensors.items() if name not in aliases}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, a tie counted once."""
        return sum(count * spec.nbytes for spec, count in Counter(self.stored.values()).items())

    @property
    def numel(self) -> int:
        """Elements of all tensors, a tie counted once."""
        return sum(count * spec.numel for spec, count in Counter(self.stored.values()).items())

    @property
    def fingerprint(self) -> str:
        """A digest of names, shapes, dtypes, order and ties; equal manifests have equal fingerprints."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:32]

    def to_json(self) -> dict[str, Any]:
        return {
            "ckptconv_manifest": 1,
            "tensors": {name: [spec.dtype.value, *spec.shape] for name, spec in self.tensors.items()},
            "order": list(self.tensors),
            "ties": [list(group) for group in self.ties],
            "buffers": sorted(self.buffers),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Manifest:
        """The manifest that :meth:`to_json` described. Raises ``ValueError`` for anything else."""
        try:
            return Manifest._from_json(data)
        except TypeError as error:  # a list where a name should be, a number where a list should be
            raise ValueError(f"not a saved manifest: {error}") from None

    @staticmethod
    def _from_json(data: Mapping[str, Any]) -> Manifest:
        if not isinstance(data, Mapping) or data.get("ckptconv_manifest") != 1:
            raise ValueError('not a saved manifest: it has no "ckptconv_manifest": 1')
        entries, order = data.get("tensors"), data.get("order")
        if not isinstance(entries, Mapping) or not isinstance(order, list) or set(order) != set(entries) or len(order) != len(entries):
            raise ValueError('not a saved manifest: "order" and "tensors" must hold the same names')
        tensors = {}
        for name in order:
            entry = entries[name]
            if not isinstance(entry, list) or not entry or any(type(size) is not int or size < 0 for size in entry[1:]):
                raise ValueError(f"{name!r}: want [dtype, size, size, …]")
            try:
                tensors[name] = TensorSpec(tuple(entry[1:]), DType(entry[0]))
            except ValueError:
                raise ValueError(f"{name!r}: unknown dtype {entry[0]!r}") from None
        ties = tuple(tuple(group) for group in data.get("ties", []))
        if any(name not in tensors for group in ties for name in group):
            raise ValueError("a tie names a tensor that is not there")
        return Manifest(tensors, ties, frozenset(data.get("buffers", ())))
