"""A formula over several tensors: LoRA merged into its base, weight-norm folded, batch norms folded into convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from ckptconv.errors import Refusal, printable
from ckptconv.fields import Checked
from ckptconv.spec import DType, TensorSpec
from ckptconv.transforms.base import Example, Transform, checked_result, misfit
from ckptconv.transforms.formula import parse, shape_of, value_of
from ckptconv.transforms.kernels import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


def _parses(formula: str) -> str:
    try:
        parse(formula)
    except Refusal as refusal:
        raise ValueError(refusal.what) from None
    return formula


class Combine(Transform, frozen=True):
    """``formula`` over the arguments, which it calls ``names``, and over ``constants``.

    Computed in float32 (float64 where an argument is float64) and rounded to ``dtype``: that of the first argument, where nothing is said.

    >>> w, a, b = (TensorSpec(shape, DType.float32) for shape in ((8, 6), (2, 6), (8, 2)))
    >>> str(Combine(names=("w", "a", "b"), formula="w + s * (b @ a)", constants=(("s", 0.5),)).infer(w, a, b))
    '[8, 6] float32'
    """

    names: tuple[str, ...]
    formula: Annotated[str, Checked(_parses)]
    constants: tuple[tuple[str, float], ...] = ()
    dtype: DType | None = None

    exact: ClassVar[bool] = False
    stops_moments: ClassVar[str] = "a formula's result has other gradients than what goes into it"

    def infer(self, *arguments: TensorSpec) -> TensorSpec:
        if len(arguments) != len(self.names) or not arguments:
            raise misfit(f"the formula names {len(self.names)} tensors, and was given {len(arguments)}", *arguments)
        for spec in arguments:
            if spec.dtype.kind == "complex" or spec.dtype in (DType.float4_e2m1fn_x2, DType.float8_e8m0fnu):
                raise misfit(f"a formula works on real numbers, not on {spec.dtype}", spec)
        term = parse(self.formula)
        unknown = [name for name in term.names() if name not in self.names and name not in dict(self.constants)]
        if unknown:
            raise Refusal(f"{printable(unknown[0])!r} has no value in the formula", code="CK104", found=printable(self.formula))
        try:
            shape = shape_of(term, dict(zip(self.names, (spec.shape for spec in arguments), strict=True)), self.formula)
        except Refusal as refusal:
            raise Refusal(
                f"{refusal.what}: {refusal.found}", code="CK206", found=", ".join(map(str, arguments)), try_=refusal.try_
            ) from None
        if shape is None:
            raise misfit("the formula gives a number, not a tensor", *arguments)
        dtype = self.dtype or arguments[0].dtype
        if dtype.kind != "float":
            raise misfit(f"a formula gives floating-point numbers, not {dtype}", *arguments)
        return checked_result("combine", shape, TensorSpec(arguments[0].shape, dtype))

    def apply(self, *arguments: Tensor) -> Tensor:
        import torch

        wide = torch.float64 if any(argument.dtype == torch.float64 for argument in arguments) else torch.float32
        values = {**dict(zip(self.names, (argument.to(wide) for argument in arguments), strict=True)), **dict(self.constants)}
        result = value_of(parse(self.formula), values, self.formula)
        assert isinstance(result, torch.Tensor), "infer has seen that it is one"
        narrow = torch_dtype(self.dtype) if self.dtype is not None else arguments[0].dtype
        made = result.to(narrow)
        if made.device.type != "meta" and result.numel() and not bool(torch.isfinite(made.to(wide)).all()):
            finite = all(bool(torch.isfinite(argument.to(wide)).all()) for argument in arguments)
            if finite:
                raise Refusal("the formula gives values that are not finite", code="CK410", found=printable(self.formula))
        return made

    def describe(self, *arguments: str) -> str:
        named = ", ".join(f"{name}={argument}" for name, argument in zip(self.names, arguments, strict=True))
        return f"[{self.formula}]({', '.join([named, *(f'{name}={value:g}' for name, value in self.constants)])})"

    @classmethod
    def examples(cls) -> list[Example]:
        def spec(*shape: int, dtype: DType = DType.float32) -> TensorSpec:
            return TensorSpec(shape, dtype)

        lora = cls(names=("w", "a", "b"), formula="w + s * (b @ a)", constants=(("s", 0.5),))
        return [
            Example(lora, (spec(8, 6), spec(2, 6), spec(8, 2)), (spec(8, 6), spec(6, 2), spec(8, 2))),
            Example(cls(names=("g", "v"), formula="g * v / norm(v, axes=(1, ...))"), (spec(4, 1, 1), spec(4, 3, 2)), (spec(4), spec(4, 3, 2))),
            Example(cls(names=("w", "g", "n"), formula="w * rows(g / sqrt(n * n + 1e-5), w)"), (spec(4, 3), spec(4), spec(4))),
            Example(cls(names=("x",), formula="-transpose(x) + mean(transpose(x), axes=(1))", dtype=DType.bfloat16), (spec(4, 3, dtype=DType.float16),)),
        ]  # fmt: skip
