"""Axes split, permuted, joined: einops notation, and the arrow turned round for the way back."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, ClassVar, Union

from ckptconv.errors import Refusal
from ckptconv.spec import Box, DType, TensorSpec
from ckptconv.transforms.base import Example, Piece, Transform, checked_result, misfit, only
from ckptconv.transforms.kernels import moved

if TYPE_CHECKING:
    from torch import Tensor

MAX_PATTERN = 500
Group = tuple[str, ...]  #: axes joined into one, outermost first; empty for `1`
Side = tuple[Union[Group, None], ...]  #: None is `...`


@lru_cache(maxsize=4096)
def sides(pattern: str) -> tuple[Side, Side]:
    """Both sides of an arrow. Raises :class:`~ckptconv.errors.Refusal` CK206 for what is no rearrangement."""
    if len(pattern) > MAX_PATTERN:
        raise Refusal(f"a pattern has at most {MAX_PATTERN} characters", code="CK206", found=f"{len(pattern)} characters")
    parts = pattern.split("->")
    if len(parts) != 2:
        raise Refusal(f"{pattern!r} wants one arrow", code="CK206", try_="i o -> o i")
    left, right = _side(parts[0], pattern), _side(parts[1], pattern)
    named = [[axis for group in side if group is not None for axis in group] for side in (left, right)]
    for axes in named:
        twice = next((axis for axis in axes if axes.count(axis) > 1), None)
        if twice:
            raise Refusal(f"{pattern!r}: axis {twice!r} stands twice on one side", code="CK206")
    alone = sorted(set(named[0]) ^ set(named[1]))
    if alone:
        raise Refusal(f"{pattern!r}: {', '.join(alone)} stands on one side only", code="CK206", try_="a rearrangement keeps every axis")
    if left.count(None) > 1 or left.count(None) != right.count(None):
        raise Refusal(f"{pattern!r}: `...` must stand once on each side, or on none", code="CK206")
    return left, right


def _side(text: str, pattern: str) -> Side:
    groups: list[Union[Group, None]] = []
    inside: list[str] | None = None
    for word in text.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(" and inside is None:
            inside = []
        elif word == ")" and inside is not None:
            groups.append(tuple(inside))
            inside = None
        elif word == "..." and inside is None:
            groups.append(None)
        elif word == "1":
            if inside is None:
                groups.append(())
        elif word.isidentifier() and not word.startswith("_") and not word.endswith("_"):
            if inside is None:
                groups.append((word,))
            else:
                inside.append(word)
        else:
            raise Refusal(f"{pattern!r}: {word!r} cannot stand there", code="CK206", try_="names, 1, ..., and ( ) without nesting")
    if inside is not None:
        raise Refusal(f"{pattern!r}: a `(` is never closed", code="CK206")
    return tuple(groups)


class Rearrange(Transform, frozen=True):
    """An einops pattern with the sizes that the shape alone does not tell.

    >>> rotary = Rearrange(pattern="(h d two) ... -> (h two d) ...", sizes=(("h", 4), ("two", 2)))
    >>> str(rotary.infer(TensorSpec((64, 32), DType.bfloat16)))
    '[64, 32] bfloat16'
    """

    pattern: str
    sizes: tuple[tuple[str, int], ...] = ()

    stops_moments: ClassVar[str] = ""

    def _solve(self, spec: TensorSpec) -> tuple[dict[str, int], tuple[int, ...]]:
        """Size of every axis, and the sizes that `...` stands for."""
        left, _ = sides(self.pattern)
        known = dict(self.sizes)
        wanted = len(left) - left.count(None)
        rank = len(spec.shape)
        if rank < wanted or (rank != wanted and None not in left):
            raise misfit(f"{self.pattern!r} names {wanted} axes, the tensor has {rank}", spec)
        at = left.index(None) if None in left else len(left)
        hidden = spec.shape[at : at + rank - wanted]
        shown = spec.shape[:at] + spec.shape[at + rank - wanted :]
        for group, size in zip((group for group in left if group is not None), shown, strict=True):
            free = [axis for axis in group if axis not in known]
            have = prod(known[axis] for axis in group if axis in known)
            if len(free) > 1:
                raise misfit(f"{self.pattern!r}: the sizes of {', '.join(free)} are open; give all but one", spec)
            if free and have and size % have == 0:
                known[free[0]] = size // have
            elif free or have != size:
                text = f"({' '.join(group)})" if group else "1"
                raise misfit(f"{self.pattern!r}: an axis of {size} is not {text} with {_known(group, known)}", spec)
        return known, hidden

    def infer(self, *arguments: TensorSpec) -> TensorSpec:
        spec = only("rearrange", arguments)
        known, hidden = self._solve(spec)
        _, right = sides(self.pattern)
        shape: list[int] = []
        for group in right:
            shape.extend(hidden if group is None else (prod(known[axis] for axis in group),))
        return checked_result("rearrange", tuple(shape), spec)

    def apply(self, *arguments: Tensor) -> Tensor:
        import einops

        return moved(lambda tensor: einops.rearrange(tensor, self.pattern, **dict(self.sizes)), *arguments)

    def recover(self, *arguments: TensorSpec) -> tuple[Piece, ...]:
        (spec,) = arguments
        known, _ = self._solve(spec)
        left, right = self.pattern.split("->")
        back = Rearrange(pattern=f"{right.strip()} -> {left.strip()}", sizes=tuple(sorted(known.items())))
        return (Piece(0, Box.whole(spec.shape), back),)

    def describe(self, *arguments: str) -> str:
        sizes = "".join(f", {name}={size}" for name, size in self.sizes)
        return f"rearrange({arguments[0]}, '{self.pattern}'{sizes})"

    @classmethod
    def examples(cls) -> list[Example]:
        def spec(*shape: int, dtype: DType = DType.float32) -> TensorSpec:
            return TensorSpec(shape, dtype)

        return [
            Example(cls(pattern="i o -> o i"), (spec(2, 3),), (spec(2),)),
            Example(cls(pattern="(h d two) ... -> (h two d) ...", sizes=(("h", 2), ("two", 2))), (spec(8, 3),), (spec(6, 3),)),
            Example(cls(pattern="(h d two) ... -> (h two d) ...", sizes=(("h", 2), ("two", 2))), (spec(8, dtype=DType.bfloat16),)),
            Example(cls(pattern="... o -> o ..."), (spec(2, 3, 4, dtype=DType.float8_e4m3fn),), (spec(),)),
            Example(cls(pattern="o i 1 1 -> o i"), (spec(4, 3, 1, 1),), (spec(4, 3, 2, 1),)),
            Example(cls(pattern="a b -> 1 a b"), (spec(0, 3, dtype=DType.int64),)),
            Example(cls(pattern="(g n d) ... -> g n d ...", sizes=(("g", 2), ("d", 2))), (spec(16, 3, dtype=DType.bool),)),
        ]


def _known(group: Group, known: dict[str, int]) -> str:
    return ", ".join(f"{axis}={known[axis]}" for axis in group if axis in known) or "nothing given"
