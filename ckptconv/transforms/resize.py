"""Position embeddings at another resolution: a row of positions, a grid of them, or a table of relative ones."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, ClassVar, Literal

from ckptconv.spec import DType, TensorSpec
from ckptconv.transforms.base import Example, Transform, checked_axis, misfit, only

if TYPE_CHECKING:
    from torch import Tensor


class Resize(Transform, frozen=True):
    """Positions along ``axis`` resampled from ``source`` to ``size`` (one number: a line; two: a grid, rows first).

    The first ``prefix`` and the last ``suffix`` positions are no positions (class and register tokens) and stay as they are. With
    ``antialias``, and for grids of image patches, this is what timm's ``resample_abs_pos_embed`` computes. In float32, rounded back.

    >>> str(Resize(axis=1, source=(4, 4), size=(6, 6), prefix=1).infer(TensorSpec((1, 17, 48), DType.float32)))
    '[1, 37, 48] float32'
    """

    axis: int
    source: tuple[int, ...]
    size: tuple[int, ...]
    prefix: int = 0
    suffix: int = 0
    mode: Literal["bicubic", "bilinear", "linear", "nearest"] = "bicubic"
    antialias: bool = True

    exact: ClassVar[bool] = False
    stops_moments: ClassVar[str] = "positions between the old ones have no history"

    def infer(self, *arguments: TensorSpec) -> TensorSpec:
        spec = only("resize", arguments)
        axis = checked_axis(self.axis, spec)
        if spec.dtype.kind != "float" or spec.dtype in (DType.float4_e2m1fn_x2, DType.float8_e8m0fnu):
            raise misfit(f"resize works on floating-point numbers, not on {spec.dtype}", spec)
        if len(self.source) != len(self.size) or len(self.size) not in (1, 2) or min(*self.source, *self.size, 1) < 1:
            raise misfit("resize wants one size (a line) or two (a grid), all positive", spec)
        if self.prefix < 0 or self.suffix < 0 or self.prefix + self.suffix + _count(self.source) != spec.shape[axis]:
            rest = f"{self.prefix} + {' x '.join(map(str, self.source))} + {self.suffix}"
            raise misfit(f"axis {axis} has {spec.shape[axis]} positions, not {rest}", spec)
        return TensorSpec((*spec.shape[:axis], self.prefix + _count(self.size) + self.suffix, *spec.shape[axis + 1 :]), spec.dtype)

    def apply(self, *arguments: Tensor) -> Tensor:
        import torch
        from torch.nn.functional import interpolate

        (tensor,) = arguments
        moved = tensor.movedim(self.axis, -1)
        count = _count(self.source)
        before, middle, after = torch.split(moved, [self.prefix, count, self.suffix], -1)
        wide = middle if tensor.dtype == torch.float64 else middle.to(torch.float32)
        lead = wide.shape[:-1]
        line = len(self.size) == 1
        planes = wide.reshape(1, -1, 1, *self.source) if line else wide.reshape(1, -1, *self.source)
        mode = {"linear": "bilinear"}.get(self.mode, self.mode)
        size = (1, *self.size) if line else self.size
        planes = planes.reshape(1, -1, *planes.shape[-2:])
        smooth = {} if mode == "nearest" else {"align_corners": False, "antialias": self.antialias}
        made = interpolate(planes, size=size, mode=mode, **smooth)
        joined = torch.cat([before, made.reshape(*lead, _count(self.size)).to(tensor.dtype), after], -1)
        return joined.movedim(-1, self.axis).contiguous()

    def describe(self, *arguments: str) -> str:
        extra = "".join(f", {what} {count}" for what, count in (("prefix", self.prefix), ("suffix", self.suffix)) if count)
        return f"resize({arguments[0]}, {'x'.join(map(str, self.source))} to {'x'.join(map(str, self.size))}, {self.mode}{extra})"

    @classmethod
    def examples(cls) -> list[Example]:
        grid = TensorSpec((1, 17, 4), DType.float32)
        return [
            Example(cls(axis=1, source=(4, 4), size=(6, 5), prefix=1), (grid,), (TensorSpec((1, 16, 4), DType.float32),)),
            Example(cls(axis=0, source=(5,), size=(8,), mode="linear", antialias=False), (TensorSpec((5, 3), DType.bfloat16),)),
            Example(cls(axis=0, source=(3, 3), size=(5, 5), suffix=3), (TensorSpec((12, 2), DType.float64),)),
        ]


def grid_of(count: int) -> tuple[int, int] | None:
    """The square grid of ``count`` positions, or None: the test is exact, whatever the size."""
    side = isqrt(count)
    return (side, side) if side and side * side == count else None


def _count(size: tuple[int, ...]) -> int:
    return size[0] * (size[1] if len(size) == 2 else 1)
