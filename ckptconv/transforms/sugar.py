"""Everyday words as transforms: an axis put in, an axis taken out."""

from __future__ import annotations

from functools import lru_cache

from ckptconv.transforms.rearrange import Rearrange


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
