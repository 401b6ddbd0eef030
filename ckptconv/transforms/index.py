"""Rows picked by a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ckptconv.spec import Box, DType, TensorSpec
from ckptconv.transforms.base import Example, Piece, Transform, checked_axis, checked_result, misfit, only
from ckptconv.transforms.kernels import moved

if TYPE_CHECKING:
    from torch import Tensor


class Index(Transform, frozen=True):
    """Position ``i`` of the result along ``axis`` is position ``take[i]`` of the argument; repeats and omissions are allowed.

    >>> Index(axis=1, take=(0, 2, 1, 3)).infer(TensorSpec((8, 4), DType.float32)).shape
    (8, 4)
    """

    axis: int
    take: tuple[int, ...]

    stops_moments: ClassVar[str] = ""

    def infer(self, *arguments: TensorSpec) -> TensorSpec:
        spec = only("index", arguments)
        axis = checked_axis(self.axis, spec)
        size = spec.shape[axis]
        if self.take and not (min(self.take) >= 0 and max(self.take) < size):
            outside = next(at for at in self.take if not 0 <= at < size)
            raise misfit(f"index takes position {outside} from axis {axis} of size {size}", spec)
        return checked_result("index", (*spec.shape[:axis], len(self.take), *spec.shape[axis + 1 :]), spec)

    def apply(self, *arguments: Tensor) -> Tensor:
        import torch

        (tensor,) = arguments
        take = torch.tensor(self.take, dtype=torch.int64, device=tensor.device)
        return moved(lambda values: values.index_select(self.axis, take), tensor)

    def recover(self, *arguments: TensorSpec) -> tuple[Piece, ...]:
        """One piece for each run of neighbouring positions that were taken; the whole tensor when all of them were."""
        (spec,) = arguments
        axis = checked_axis(self.axis, spec)
        found: dict[int, int] = {}
        for at, position in enumerate(self.take):
            found.setdefault(position, at)
        runs: list[list[int]] = []
        for position in sorted(found):
            if runs and position == runs[-1][-1] + 1:
                runs[-1].append(position)
            else:
                runs.append([position])
        pieces = []
        for run in runs:
            start = tuple(run[0] if at == axis else 0 for at in range(len(spec.shape)))
            size = (*spec.shape[:axis], len(run), *spec.shape[axis + 1 :])
            pieces.append(Piece(0, Box(start, size), Index(axis=axis, take=tuple(found[position] for position in run))))
        return tuple(pieces)

    def moments_stopped(self) -> str:
        return "positions that are taken twice share what was one gradient" if len({*self.take}) < len(self.take) else ""

    def describe(self, *arguments: str) -> str:
        shown = ", ".join(map(str, self.take[:8])) + (f", … {len(self.take):,} positions" if len(self.take) > 8 else "")
        return f"index({arguments[0]}, axis={self.axis}, [{shown}])"

    @classmethod
    def examples(cls) -> list[Example]:
        def spec(*shape: int, dtype: DType = DType.float32) -> TensorSpec:
            return TensorSpec(shape, dtype)

        return [
            Example(cls(axis=1, take=(0, 2, 1, 3)), (spec(2, 4),), (spec(2, 3),)),
            Example(cls(axis=0, take=(4, 1, 1, 2)), (spec(6, 2),), (spec(4, 2),)),
            Example(cls(axis=-1, take=()), (spec(2, 3),), (spec(),)),
            Example(cls(axis=0, take=(1, 0)), (spec(2, dtype=DType.uint16),), (spec(1, dtype=DType.uint16),)),
        ]
