"""Truth values of a source: bytes that are neither 0 nor 1 mean something else to every library that computes with them."""

from __future__ import annotations

from collections.abc import Mapping

from ckptconv.errors import InputError, Problem, printable
from ckptconv.execute.sources import Sources
from ckptconv.formats.base import Placed
from ckptconv.spec import DType

_BLOCK = 1 << 20


def check_truth_values(sources: Sources, placed: Mapping[str, Placed]) -> None:
    """Reads every bool tensor once; they are small, or there are none. Raises :class:`~ckptconv.errors.InputError` CK306 for a byte that
    is no truth value."""
    seen: set[tuple[int, int, int]] = set()
    for name, place in placed.items():
        if place.spec.dtype is not DType.bool or not place.spec.numel:
            continue
        start = place.storage.offset + place.offset
        span = 1 + sum((size - 1) * stride for size, stride in zip(place.spec.shape, place.strides, strict=True))
        if (place.storage.file, start, span) in seen:
            continue
        seen.add((place.storage.file, start, span))
        buffer = memoryview(bytearray(min(span, _BLOCK)))
        for at in range(0, span, _BLOCK):
            part = buffer[: min(_BLOCK, span - at)]
            sources.read_into(place.storage.file, start + at, part)
            others = bytes(part).translate(None, b"\0\1")
            if others:
                raise InputError(
                    Problem("CK306", f"{printable(name)}: a truth value is neither 0 nor 1", where=printable(sources.files[place.storage.file]),
                            found=f"the byte {others[0]:#04x} at offset {start + at + bytes(part).index(others[0]):,}")
                )  # fmt: skip
