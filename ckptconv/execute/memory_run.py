"""The one walk that computes: expressions in, tensors out, every value dropped at its last use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ckptconv.execute.sources import Sources
from ckptconv.formats.base import Placed
from ckptconv.memory import memory_explained, peak_nbytes
from ckptconv.plan import Apply, Expr, Fill, Output, Plan, Read, walk
from ckptconv.transforms.base import Transform

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")


def _kernel(transform: Transform, *arguments: Any) -> Any:
    return transform.apply(*arguments)


def computed(
    outputs: Sequence[Output], read: Callable[[Read], Value], apply: Callable[..., Value] = _kernel
) -> Iterator[tuple[Output, Value]]:
    """Each output with its value, in order. A node is computed once, and forgotten after its last use.

    ``apply`` is called with a transform and its arguments; where nothing is said, the transform's own kernel, on torch's tensors. Raises
    :class:`~ckptconv.errors.OutputError` where memory does not suffice.
    """
    uses = _exact_uses(outputs)
    values: dict[Expr, Value] = {}

    def release(node: Expr) -> None:
        uses[node] -= 1
        if not uses[node]:
            values.pop(node, None)

    done: set[Expr] = set()
    for output in outputs:
        for node in walk([output.expr]):
            if node in done:
                continue
            done.add(node)
            try:
                values[node] = _value(node, values, read, apply)
            except (MemoryError, RuntimeError) as error:
                raise memory_explained(error, output, peak_nbytes(outputs)) from None
            for argument in node.arguments:
                release(argument)
        value = values[output.expr]
        release(output.expr)
        yield output, value
        del value


def _exact_uses(outputs: Sequence[Output]) -> dict[Expr, int]:
    uses: dict[Expr, int] = {}
    for node in walk(output.expr for output in outputs):
        for argument in node.arguments:
            uses[argument] = uses.get(argument, 0) + 1
    for output in outputs:
        uses[output.expr] = uses.get(output.expr, 0) + 1
    return uses


def _value(node: Expr, values: Mapping[Expr, Value], read: Callable[[Read], Value], apply: Callable[..., Value]) -> Any:
    if isinstance(node, Read):
        return read(node)
    if isinstance(node, Fill):
        from ckptconv.transforms.filling import fill

        return fill(node.recipe, node.value, node.seed, node.spec.shape, node.spec.dtype)
    assert isinstance(node, Apply)
    return apply(node.transform, *(values[argument] for argument in node.arguments))


def evaluate(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All outputs in memory. Bare reads are the given tensors themselves; tied outputs are one tensor."""
    found = {output.name: value for output, value in computed(plan.stored, lambda node: tensors[node.name])}
    aliases = plan.manifest.aliases
    return {output.name: found[aliases.get(output.name, output.name)] for output in plan.outputs}


class LazyTensors(Mapping[str, "Tensor"]):
    """A checkpoint's tensors, each read when it is asked for."""

    def __init__(self, placed: Mapping[str, Placed], sources: Sources) -> None:
        self._placed, self._sources = placed, sources

    def __getitem__(self, name: str) -> Tensor:
        return self._sources.read_tensor(self._placed[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._placed)

    def __len__(self) -> int:
        return len(self._placed)
