"""Block-quantised weights as plain floating-point numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from ckptconv.errors import Refusal
from ckptconv.spec import DType, TensorSpec
from ckptconv.transforms.base import Example, Transform, checked_axis, checked_result, misfit
from ckptconv.transforms.kernels import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

#: The sixteen values of a 4-bit float (OCP Microscaling Formats, E2M1): the sign is the highest bit.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Decode(Transform, frozen=True):
    """Stored numbers times their scales, in ``dtype``. The layouts:

    ``blocks``  weight ``[..., m, n]`` (fp8, int8) and one scale per block of ``block`` = (rows, columns); the last blocks may be ragged
                (DeepSeek-V3's ``weight_scale_inv``).
    ``mxfp4``   blocks ``[..., g, b]`` uint8, two numbers a byte, the low one first, and scales ``[..., g]`` uint8, powers of two with
                bias 127 (gpt-oss); gives ``[..., 2 g b]``.
    ``int8``    ``(q - zero point) * scale``, with scales (and zero points) per tensor or along ``axis``.
    ``int4``    as ``int8``, two unsigned numbers a byte along the last axis, the low one first, with scales ``[..., g]`` of ``g`` equal
                groups along the last axis.

    >>> w, s = TensorSpec((112, 48), DType.float8_e4m3fn), TensorSpec((4, 2), DType.float32)
    >>> str(Decode(layout="blocks", block=(32, 32)).infer(w, s))
    '[112, 48] float32'
    """

    layout: Literal["blocks", "mxfp4", "int8", "int4"]
    dtype: DType = DType.float32
    block: tuple[int, int] | None = None
    axis: int | None = None

    exact: ClassVar[bool] = False
    stops_moments: ClassVar[str] = "quantised numbers are not what was trained"

    def infer(self, *arguments: TensorSpec) -> TensorSpec:
        if len(arguments) not in ((2, 3) if self.layout in ("int8", "int4") else (2,)):
            raise misfit(
                f"decode {self.layout} takes the stored numbers, their scales{', and zero points at most' if self.layout[:3] == 'int' else ''}",
                *arguments,
            )
        if self.dtype.kind != "float" or self.dtype.bits < 16:
            raise misfit(f"decode gives a float of 16 bits or more, not {self.dtype}", *arguments)
        shape = {"blocks": self._blocks, "mxfp4": self._mxfp4, "int8": self._int8, "int4": self._int4}[self.layout](*arguments)
        return checked_result("decode", shape, TensorSpec(shape, self.dtype))

    def _blocks(self, weight: TensorSpec, scale: TensorSpec) -> tuple[int, ...]:
        rows, columns = self._block()
        if len(weight.shape) < 2 or weight.dtype.bits != 8:
            raise misfit("decode blocks takes an 8-bit weight of rank 2 or more", weight, scale)
        wanted = (*weight.shape[:-2], -(-weight.shape[-2] // rows), -(-weight.shape[-1] // columns))
        if scale.shape != wanted:
            raise misfit(f"blocks of {rows} x {columns} want scales {list(wanted)}", weight, scale)
        return weight.shape

    def _block(self) -> tuple[int, int]:
        if self.block is None or min(self.block) < 1:
            raise misfit("decode blocks wants block: [rows, columns]")
        return self.block

    def _mxfp4(self, blocks: TensorSpec, scales: TensorSpec) -> tuple[int, ...]:
        if (
            blocks.dtype is not DType.uint8
            or scales.dtype not in (DType.uint8, DType.float8_e8m0fnu)
            or blocks.shape[:-1] != scales.shape
            or not scales.shape
        ):
            raise misfit("mxfp4 takes blocks [..., g, b] and scales [..., g], both uint8", blocks, scales)
        return (*scales.shape[:-1], 2 * scales.shape[-1] * blocks.shape[-1])

    def _int8(self, stored: TensorSpec, scale: TensorSpec, zero: TensorSpec | None = None) -> tuple[int, ...]:
        wanted: tuple[tuple[int, ...], ...] = ((), (1,)) if self.axis is None else ((stored.shape[checked_axis(self.axis, stored)],),)
        if stored.dtype.kind not in ("int", "uint") or any(spec is not None and spec.shape not in wanted for spec in (scale, zero)):
            raise misfit(
                "int8 takes integers and scales, one or one for each index of axis", *(spec for spec in (stored, scale, zero) if spec)
            )
        return stored.shape

    def _int4(self, stored: TensorSpec, scale: TensorSpec, zero: TensorSpec | None = None) -> tuple[int, ...]:
        size = 2 * stored.shape[-1] if stored.shape else 0
        groups = scale.shape[-1] if scale.shape else 0
        if (
            stored.dtype is not DType.uint8
            or not groups
            or size % groups
            or scale.shape[:-1] != stored.shape[:-1]
            or (zero is not None and zero.shape != scale.shape)
        ):
            raise misfit(
                "int4 takes bytes [..., n] and scales [..., g], g a divisor of 2 n", *(spec for spec in (stored, scale, zero) if spec)
            )
        return (*stored.shape[:-1], size)

    def apply(self, *arguments: Tensor) -> Tensor:
        import torch

        stored, scale = arguments[:2]
        narrow = torch_dtype(self.dtype)
        wide = torch.float64 if narrow == torch.float64 else torch.float32
        if self.layout == "blocks":
            rows, columns = self._block()
            grid = (
                scale.to(wide)
                .repeat_interleave(rows, -2)[..., : stored.shape[-2], :]
                .repeat_interleave(columns, -1)[..., : stored.shape[-1]]
            )
            return _scaled(stored.to(wide), grid, scale).to(narrow)
        if self.layout == "mxfp4":
            table = torch.tensor(_E2M1, dtype=wide, device=stored.device)
            power = scale.view(torch.uint8).to(torch.int32) - 127
            if scale.device.type != "meta" and bool((power == 128).any()):
                raise Refusal("a scale is NaN", code="CK413", found=f"{int((power == 128).sum()):,} of {scale.numel():,} scales")
            return torch.ldexp(_nibbles(stored, table), power.unsqueeze(-1)).reshape(*scale.shape[:-1], -1).to(narrow)
        zero = arguments[2].to(wide) if len(arguments) == 3 else torch.zeros((), dtype=wide, device=stored.device)
        if self.layout == "int8":
            around = [1] * stored.dim()
            if self.axis is not None:
                around[self.axis] = -1
            zero = zero.reshape(around) if zero.numel() > 1 else zero.reshape(())
            steps = scale.to(wide).reshape(around if self.axis is not None else ())
            return _scaled(stored.to(wide) - zero, steps, scale).to(narrow)
        numbers = _nibbles(stored, torch.arange(16, dtype=wide, device=stored.device))
        groups = numbers.reshape(*scale.shape, -1)
        around_zero = groups - (zero.unsqueeze(-1) if zero.dim() else zero)
        return _scaled(around_zero, scale.to(wide).unsqueeze(-1), scale).reshape(numbers.shape).to(narrow)

    def describe(self, *arguments: str) -> str:
        return f"decode({', '.join(arguments)}, {self.layout}, {self.dtype})"

    @classmethod
    def examples(cls) -> list[Example]:
        def spec(dtype: DType, *shape: int) -> TensorSpec:
            return TensorSpec(shape, dtype)

        return [
            Example(cls(layout="blocks", block=(4, 4)), (spec(DType.float8_e4m3fn, 10, 6), spec(DType.float32, 3, 2)), (spec(DType.float8_e4m3fn, 10, 6), spec(DType.float32, 2, 2))),
            Example(cls(layout="mxfp4", dtype=DType.bfloat16), (spec(DType.uint8, 2, 3, 4), spec(DType.uint8, 2, 3)), (spec(DType.uint8, 2, 3), spec(DType.uint8, 3))),
            Example(cls(layout="int8", axis=0), (spec(DType.int8, 4, 3), spec(DType.float32, 4), spec(DType.int64, 4)), (spec(DType.int8, 4, 3), spec(DType.float32, 3))),
            Example(cls(layout="int8"), (spec(DType.int8, 4, 3), spec(DType.float32))),
            Example(cls(layout="int4"), (spec(DType.uint8, 4, 6), spec(DType.float16, 4, 3), spec(DType.float16, 4, 3)), (spec(DType.uint8, 4, 6), spec(DType.float16, 4, 5))),
        ]  # fmt: skip


def _scaled(numbers: Tensor, spread: Tensor, scales: Tensor) -> Tensor:
    """``numbers * spread``, unless one of the scales makes the product say nothing about the numbers."""
    import torch

    if scales.device.type != "meta":
        bad = ~torch.isfinite(scales.to(torch.float32))
        if bool(bad.any()):
            raise Refusal("a scale is not finite", code="CK413", found=f"{int(bad.sum()):,} of {scales.numel():,} scales")
        if bool((scales == 0).any()):
            lost = int(((spread == 0) & (numbers != 0)).sum())
            if lost:
                raise Refusal(
                    "numbers that are not zero have the scale zero", code="CK413", found=f"{lost:,} of {numbers.numel():,} numbers"
                )
    return numbers * spread


def _nibbles(stored: Tensor, table: Tensor) -> Tensor:
    """Both numbers of every byte, the low one first, looked up; the last axis doubles."""
    import torch

    pairs = torch.stack([stored & 15, stored >> 4], -1).to(torch.int64)
    return (
        table[pairs].flatten(-2) if stored.device.type != "meta" else torch.empty(pairs.flatten(-2).shape, dtype=table.dtype, device="meta")
    )
