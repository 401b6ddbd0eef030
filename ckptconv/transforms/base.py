"""What every transform is: fields that a person writes, a shape rule, a kernel, and the way back."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from msgspec import Struct

from ckptconv.errors import Refusal
from ckptconv.fields import Fields
from ckptconv.spec import MAX_ELEMENTS, MAX_RANK, Box, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class Piece(Struct, frozen=True):
    """A region of one argument, and how to get it from the transform's result (None: the result is the region)."""

    argument: int
    box: Box
    back: Transform | None


class Example(Struct, frozen=True):
    """A transform with argument specs that it accepts, for the shared contract test; ``refuses`` is one that it must not."""

    transform: Transform
    arguments: tuple[TensorSpec, ...]
    refuses: tuple[TensorSpec, ...] | None = None


class Transform(Fields, frozen=True, tag_field="op", tag=str.lower):
    """One operation on tensors, said as data. Adding one: one file, one class, one line in ``transforms.ALL``.

    A transform is frozen, compared by value and hashable; its JSON is ``op``, the class's name in small letters, and its fields. ``infer``
    never needs torch.
    """

    #: True when the kernel only moves elements, so that every bit of the arguments can be found in the result.
    exact: ClassVar[bool] = True
    #: Why an optimizer's moments cannot go where their parameter goes; empty where they can. They can where the kernel takes every element of
    #: the result from one place and from no place twice, and changes none. Each transform says it for itself.
    stops_moments: ClassVar[str]

    @property
    def op(self) -> str:
        """Its name in saved plans."""
        return str(self.__struct_config__.tag)

    @abstractmethod
    def infer(self, *arguments: TensorSpec) -> TensorSpec:
        """The result's spec. Raises :class:`~ckptconv.errors.Refusal`, naming the sizes, where the arguments do not fit."""

    @abstractmethod
    def apply(self, *arguments: Tensor) -> Tensor:
        """The result. Its shape and dtype are those of ``infer``; the arguments are not changed."""

    def recover(self, *arguments: TensorSpec) -> tuple[Piece, ...]:  # noqa: ARG002  (for those that can)
        """Which regions of the arguments can be had from the result, and how. Empty: none (the transform is lossy)."""
        return ()

    def lossless(self, *arguments: TensorSpec) -> bool:  # noqa: ARG002  (for those that depend on it)
        """True when this use loses nothing of what ``recover`` gives back; ``exact`` unless it depends on the dtypes."""
        return self.exact

    def moments_stopped(self) -> str:
        """Why moments cannot go through this use of it; ``stops_moments`` unless it depends on the fields."""
        return self.stops_moments

    @abstractmethod
    def describe(self, *arguments: str) -> str:
        """The operation as text, for the printed plan."""

    @classmethod
    @abstractmethod
    def examples(cls) -> list[Example]:
        """Cases for the contract test."""


def misfit(what: str, *arguments: TensorSpec) -> Refusal:
    """The refusal of a transform whose arguments do not fit, with their shapes."""
    return Refusal(what, code="CK206", found=", ".join(str(argument) for argument in arguments))


def checked_axis(axis: int, spec: TensorSpec) -> int:
    """``axis`` counted from the front; refuses one that the tensor does not have."""
    rank = len(spec.shape)
    if not -rank <= axis < rank:
        raise misfit(f"there is no axis {axis} in a tensor of rank {rank}", spec)
    return axis % rank


def only(op: str, arguments: tuple[TensorSpec, ...]) -> TensorSpec:
    """The one argument of a transform that takes one."""
    if len(arguments) != 1:
        raise misfit(f"{op} takes one tensor, and was given {len(arguments)}", *arguments)
    return arguments[0]


def checked_result(op: str, shape: tuple[int, ...], *arguments: TensorSpec) -> TensorSpec:
    """The result's spec, with the first argument's dtype; refuses a rank or a count of elements that no tensor can have."""
    elements = 1
    for size in shape:
        elements *= size or 1
    if len(shape) > MAX_RANK or elements > MAX_ELEMENTS:
        raise misfit(f"{op} would make a tensor past the limits of {MAX_RANK} axes and 2^63 elements", *arguments)
    return TensorSpec(shape, arguments[0].dtype)
