"""Which outputs are ranges of the source's bytes: always the right bytes, and only where that pays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv import ranges
from ckptconv.execute.memory_run import computed
from ckptconv.formats.base import Placed, Storage
from ckptconv.plan import Output, Read, apply
from ckptconv.ranges import as_spans
from ckptconv.spec import DType, TensorSpec
from ckptconv.transforms import Concat, Reshape, Slice


def source(shapes):
    """Tensors one after the other in one storage: their places, their values, and all bytes."""
    placed, tensors, raw = {}, {}, bytearray()
    for name, shape in shapes.items():
        tensor = torch.arange(len(raw), len(raw) + torch.Size(shape).numel(), dtype=torch.int16)
        spec = TensorSpec(tuple(shape), DType.int16)
        placed[name] = Placed(spec, Storage(0, len(raw), spec.nbytes), 0, tensor.view(shape).stride())
        tensors[name] = tensor.view(shape)
        raw += tensor.numpy().tobytes()
    return placed, tensors, bytes(raw)


@st.composite
def expressions(draw):
    """Concats, slices and reshapes in one another, of rank 3."""
    shapes = {}

    def read(shape):
        name = f"t{len(shapes)}"
        shapes[name] = shape
        return Read(name, TensorSpec(tuple(shape), DType.int16))

    def made(shape, depth):
        kind = draw(st.sampled_from(["read", "concat", "slice", "reshape"])) if depth else "read"
        axis = draw(st.integers(0, 2))
        if kind == "concat":
            size = shape[axis]
            cuts = sorted(draw(st.lists(st.integers(0, size), max_size=2)))
            sizes = [stop - start for start, stop in zip([0, *cuts], [*cuts, size], strict=True)]
            return apply(Concat(axis=axis), *(made([*shape[:axis], each, *shape[axis + 1 :]], depth - 1) for each in sizes))
        if kind == "slice":
            before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
            inner = made([*shape[:axis], before + shape[axis] + after, *shape[axis + 1 :]], depth - 1)
            return apply(Slice(axis=axis, start=before, stop=before + shape[axis]), inner)
        if kind == "reshape" and axis < 2:
            inner = made([*shape[:axis], shape[axis] * shape[axis + 1], 1, *shape[axis + 2 :]], depth - 1)
            return apply(Reshape(shape=tuple(shape)), inner)
        return read(shape)

    return made([draw(st.integers(0, 3)) for _ in range(3)], 3), shapes


@settings(max_examples=200, deadline=None)
@given(expressions())
def test_the_ranges_are_the_bytes_that_computing_gives(made):
    expr, shapes = made
    placed, tensors, raw = source(shapes)
    least, ranges._LEAST = ranges._LEAST, 0
    try:
        spans = as_spans(expr, placed)
    finally:
        ranges._LEAST = least
    ((_, value),) = computed([Output("x", expr)], lambda node: tensors[node.name])
    assert b"".join(raw[span.storage.offset + span.offset :][: span.nbytes] for span in spans) == value.contiguous().numpy().tobytes()
    for span in spans:
        assert not span.tensor or (span.nbytes, span.offset) == (placed[span.tensor].spec.nbytes, 0), "a name stands for a whole tensor"


@pytest.mark.parametrize(("width", "copied"), [(256, True), (255, False)])
def test_short_pieces_are_computed(width, copied):
    """Gate and up of two experts: pieces of 64 KiB are copied, shorter ones put together in memory."""
    specs = {name: TensorSpec((2, 128, width), DType.int16) for name in ("gate", "up")}
    placed = {name: Placed(spec, Storage(0, 0, spec.nbytes), 0, (128 * width, width, 1)) for name, spec in specs.items()}
    both = apply(Concat(axis=1), *(Read(name, spec) for name, spec in specs.items()))
    assert (as_spans(both, placed) is not None) == copied
    back = apply(Slice(axis=1, start=0, stop=128), Read("gate", TensorSpec((2, 256, width), DType.int16)))
    fused = {"gate": Placed(TensorSpec((2, 256, width), DType.int16), Storage(0, 0, 4 * 128 * width), 0, (256 * width, width, 1))}
    assert (as_spans(back, fused) is not None) == copied
    outermost = apply(Concat(axis=0), *(Read(name, spec) for name, spec in specs.items()))
    assert as_spans(outermost, placed) is not None, "along the outermost axis pieces may be of any length"
