"""Another dtype, by a policy of our own: what would be lost is said, and never depends on the version of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from ckptconv.errors import Refusal
from ckptconv.spec import Box, DType, TensorSpec, widens
from ckptconv.transforms.base import Example, Piece, Transform, misfit, only
from ckptconv.transforms.kernels import dtype_of, torch_dtype
from ckptconv.transforms.noticing import notice

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 22
_NO_INFINITY = frozenset({DType.float8_e4m3fn, DType.float8_e4m3fnuz, DType.float8_e5m2fnuz})


class Cast(Transform, frozen=True):
    """``dtype`` for every element. A finite value that the dtype cannot reach is an error, the nearest it has (``saturate``), or infinity
    (``inf``). Rounding and flushing small values to zero are what narrowing means.

    >>> str(Cast(dtype=DType.bfloat16).infer(TensorSpec((2, 3), DType.float32)))
    '[2, 3] bfloat16'
    """

    dtype: DType
    overflow: Literal["error", "saturate", "inf"] = "error"

    exact = False
    stops_moments: ClassVar[str] = ""

    def infer(self, *arguments: TensorSpec) -> TensorSpec:
        spec = only("cast", arguments)
        for dtype in (spec.dtype, self.dtype):
            if dtype in (DType.float4_e2m1fn_x2, DType.float8_e8m0fnu) and spec.dtype != self.dtype:
                raise misfit(f"{dtype} cannot be cast: it is decoded with its scales", spec)
        if spec.dtype.kind == "complex" and self.dtype.kind != "complex":
            raise misfit(f"a cast from {spec.dtype} to {self.dtype} would drop the imaginary part", spec)
        return TensorSpec(spec.shape, self.dtype)

    def apply(self, *arguments: Tensor) -> Tensor:
        import torch

        (tensor,) = arguments
        wanted, source = torch_dtype(self.dtype), dtype_of(tensor)
        if tensor.device.type == "meta" or not tensor.numel():
            return torch.empty(tensor.shape, dtype=wanted, device=tensor.device)
        if widens(source, self.dtype):
            return tensor.to(torch.float32).to(wanted) if tensor.element_size() == 1 and source.kind == "float" else tensor.to(wanted)
        result = torch.empty(tensor.shape, dtype=wanted)
        flat, out = tensor.contiguous().view(-1), result.view(-1)
        for at in range(0, flat.numel(), _CHUNK):
            out[at : at + _CHUNK] = self._part(flat[at : at + _CHUNK], source, wanted, at)
        return result

    def _part(self, values: Tensor, source: DType, wanted: torch.dtype, at: int) -> Tensor:  # type: ignore[name-defined]  # noqa: F821
        import torch

        if source.kind == "float" and values.element_size() == 1:
            values = values.to(torch.float32)
        if self.dtype.kind == "float":
            if values.is_floating_point():
                return self._to_float(values, wanted, at)
            return values.to(torch.float64).to(wanted) if self.dtype is not DType.float64 else values.to(wanted)
        if self.dtype.kind == "complex":
            return values.to(wanted)
        if self.dtype is DType.bool:
            self._refuse((values != 0) & (values != 1), values, at, "is neither 0 nor 1")
            return values.to(wanted)
        limits = torch.iinfo(wanted)
        if values.is_floating_point():
            wide = values.to(torch.float64)
            bad = ~torch.isfinite(wide) | (wide != wide.trunc()) | (wide < float(limits.min)) | (wide > float(limits.max))
            self._refuse(bad, values, at, f"is no {self.dtype}")
            return wide.to(wanted)
        whole = values.to(torch.int64) if source is not DType.uint64 else values.view(torch.int64)
        bad = whole < (max(limits.min, -(2**63)) if source is not DType.uint64 else 0)
        bad |= whole > min(limits.max, 2**63 - 1)
        self._refuse(bad, values, at, f"is no {self.dtype}")
        return whole.to(wanted)

    def _to_float(self, values: Tensor, wanted: torch.dtype, at: int) -> Tensor:  # type: ignore[name-defined]  # noqa: F821
        import torch

        info = torch.finfo(wanted)
        # Halfway between the largest value and the next one that there would be, rounding goes to infinity (IEEE 754, 4.3.1).
        edge = info.max * (1 + info.eps / 4)
        wide = values.to(torch.float64) if values.dtype == torch.float64 or wanted == torch.float32 else values.to(torch.float32)
        low, high = torch.aminmax(wide)
        if -edge < low.item() and high.item() < edge:  # nearly always, and without a NaN: one look instead of six
            return self._counted(wide, wide.to(wanted))
        over = torch.isfinite(wide) & (wide.abs() >= edge if wanted != torch.float64 else torch.zeros_like(wide, dtype=torch.bool))
        lost = over | (torch.isinf(wide) if self.dtype in _NO_INFINITY else torch.zeros_like(over))
        if self.overflow == "error" or (self.overflow == "inf" and self.dtype in _NO_INFINITY):
            self._refuse(lost, values, at, f"overflows {self.dtype} (largest {info.max:g})")
        elif self.overflow == "saturate":
            wide = torch.where(lost, torch.copysign(torch.full_like(wide, info.max), wide), wide)
        else:
            wide = torch.where(over, torch.copysign(torch.full_like(wide, float("inf")), wide), wide)
        result = self._counted(wide, wide.to(wanted))
        if self.overflow != "error":
            what = "saturated" if self.overflow == "saturate" else "made infinite"
            notice(f"{what} by the cast to {self.dtype}", int((over | lost).sum()))
        return result

    def _counted(self, wide: Tensor, result: Tensor) -> Tensor:
        """``result``, and what became zero in it noticed. Zero stays zero, so that two counts tell."""
        import torch

        if result.element_size() > 1 and result.numel() and torch.aminmax(result.abs()).min.item() > 0:
            return result  # no zero in it, and no NaN: seen in a quarter of the time that counting takes
        left = torch.count_nonzero(result.to(torch.float32) if result.element_size() == 1 else result)
        notice(f"flushed to zero by the cast to {self.dtype}", int(torch.count_nonzero(wide) - left))
        return result

    def _refuse(self, bad: Tensor, values: Tensor, at: int, reason: str) -> None:
        count = int(bad.sum())
        if count:
            first = int(bad.nonzero()[0])
            raise Refusal(f"{values[first].item():g} {reason}", code="CK410", found=f"{count:,} such values, the first at element {at + first:,}",
                          try_="overflow: saturate, or a wider dtype")  # fmt: skip

    def recover(self, *arguments: TensorSpec) -> tuple[Piece, ...]:
        """The original, where the cast only widened."""
        (spec,) = arguments
        if not widens(spec.dtype, self.dtype):
            return ()
        return (Piece(0, Box.whole(spec.shape), Cast(dtype=spec.dtype)),)

    def describe(self, *arguments: str) -> str:
        return f"cast({arguments[0]}, {self.dtype}{'' if self.overflow == 'error' else f', overflow={self.overflow}'})"

    @classmethod
    def examples(cls) -> list[Example]:
        def spec(dtype: DType, *shape: int) -> TensorSpec:
            return TensorSpec(shape, dtype)

        return [
            Example(cls(dtype=DType.bfloat16), (spec(DType.float32, 2, 3),), (spec(DType.complex64, 2),)),
            Example(cls(dtype=DType.float32), (spec(DType.bfloat16, 2, 3),)),
            Example(cls(dtype=DType.float32), (spec(DType.float8_e4m3fn, 4),)),
            Example(cls(dtype=DType.float16), (spec(DType.float64),)),
            Example(cls(dtype=DType.int64), (spec(DType.int32, 0, 3),)),
            Example(cls(dtype=DType.float8_e5m2, overflow="saturate"), (spec(DType.float32, 5),)),
        ]
