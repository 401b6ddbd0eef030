"""Everyday words as transforms: an axis put in, an axis taken out."""

from __future__ import annotations

from functools import lru_cache

from msgspec import Struct

from ckptconv.errors import Refusal
from ckptconv.transforms.rearrange import Rearrange, sides


class OpenLayout(Struct, frozen=True):
    """A named axis made an axis of its own: how to get there, which one it is, and how to get back."""

    opened: str
    axis: int
    closed: str


@lru_cache(maxsize=1024)
def open_layout(layout: str, along: str) -> OpenLayout:
    """``(g n d) ...`` along ``n``: the pattern that opens the group, the axis of ``n`` then, and the pattern that closes it again.

    >>> open_layout("(g n d) ...", "n")
    OpenLayout(opened='(g n d) ... -> g n d ...', axis=1, closed='g n d ... -> (g n d) ...')
    """
    groups, _ = sides(f"{layout} -> {layout}")
    at = next((at for at, group in enumerate(groups) if group is not None and along in group), None)
    if at is None:
        raise Refusal(f"{along!r} is no axis of {layout!r}", code="CK206")
    if None in groups[:at]:
        raise Refusal(f"{layout!r}: `...` must come after the axis {along!r}", code="CK206")
    words = ["..." if group is None else "1" if not group else group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups]
    inner = groups[at]
    assert inner is not None
    plain = " ".join([*words[:at], *inner, *words[at + 1 :]])
    return OpenLayout(f"{' '.join(words)} -> {plain}", at + inner.index(along), f"{plain} -> {' '.join(words)}")


@lru_cache(maxsize=1024)
def insert_axis(rank: int, axis: int) -> Rearrange:
    """A new axis of size 1 at ``axis`` of a tensor of this rank (``unsqueeze``).

    >>> insert_axis(2, 0).pattern
    'a0 a1 -> 1 a0 a1'
    """
    axes = [f"a{at}" for at in range(rank)]
    return Rearrange(pattern=f"{' '.join(axes)} -> {' '.join([*axes[:axis], '1', *axes[axis:]])}".strip())


@lru_cache(maxsize=1024)
def remove_axis(rank: int, axis: int) -> Rearrange:
    """The axis of size 1 at ``axis`` taken out (``squeeze``).

    >>> remove_axis(3, 1).pattern
    'a0 1 a2 -> a0 a2'
    """
    axes = [f"a{at}" for at in range(rank)]
    return Rearrange(pattern=f"{' '.join([*axes[:axis], '1', *axes[axis + 1 :]])} -> {' '.join([*axes[:axis], *axes[axis + 1 :]])}")
