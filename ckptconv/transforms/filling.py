"""Tensors that no source has: a constant, a count, or seeded normal numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptconv.errors import Refusal
from ckptconv.spec import DType
from ckptconv.transforms.kernels import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


def fill(recipe: str, value: float | int | bool, seed: int, shape: tuple[int, ...], dtype: DType) -> Tensor:
    """The tensor of a plan's ``Fill`` node: ``constant`` (value), ``arange`` (from value, by one) or ``normal`` (std value, seed).

    Normal numbers are drawn in float32 from a generator of their own: the same on every machine, whatever else draws numbers. Raises
    :class:`~ckptconv.errors.Refusal` CK410 for a value that the dtype cannot hold.
    """
    import torch

    wanted = torch_dtype(dtype)
    if recipe == "normal":
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(shape, generator=generator, dtype=torch.float32) * value).to(wanted)
    if recipe == "arange":
        numbers = torch.arange(value, value + shape[0], dtype=torch.int64)
        _check(numbers, numbers.to(wanted).to(torch.int64), dtype)
        return numbers.to(wanted)
    if recipe == "constant":
        wide = torch.tensor(value)
        one = wide.to(wanted)
        _check(wide.to(torch.float64), one.to(torch.float32 if one.element_size() == 1 else wanted).to(torch.float64), dtype)
        return one.expand(shape).clone() if one.element_size() > 1 else one.view(torch.uint8).expand(shape).clone().view(wanted)
    raise Refusal(f"there is no way to fill called {recipe!r}", code="CK102", try_="constant, arange, normal")


def _check(wanted: Tensor, found: Tensor, dtype: DType) -> None:
    """Rounding is what float types do; another number is not."""
    close = (wanted - found).abs() <= wanted.abs() / 8 if dtype.kind in ("float", "complex") else wanted == found
    if not bool(close.all()):
        raise Refusal(f"{dtype} cannot hold {wanted[~close].flatten()[0].item()}", code="CK410")
