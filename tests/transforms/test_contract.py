"""One contract for every transform: shapes inferred are shapes computed, what can be had back comes back, JSON round trips."""

import json
import subprocess
import sys

import einops
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import to_builtins

from ckptconv import transforms
from ckptconv.errors import Refusal
from ckptconv.spec import DType, TensorSpec
from ckptconv.transforms import ALL, Cast, Concat, Guard, Rearrange, Reshape, Slice, parse
from ckptconv.transforms.sugar import insert_axis, remove_axis

EXAMPLES = [(kind.__name__, at, example) for kind in ALL for at, example in enumerate(kind.examples())]
IDS = [f"{name}-{at}" for name, at, _ in EXAMPLES]
examples = pytest.mark.parametrize("example", [example for _, _, example in EXAMPLES], ids=IDS)


def sample(spec, seed=0):
    """A tensor of this spec with arbitrary, but for floats finite, bits."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, spec.dtype.value)
    if spec.dtype is DType.bool:
        return torch.randint(0, 2, spec.shape, generator=generator).to(dtype)
    if spec.dtype.kind in ("float", "complex"):
        return torch.randn(spec.shape, generator=generator).to(dtype)
    return torch.randint(0, 100, spec.shape, generator=generator).to(dtype)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(left, right):
    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(bits(left), bits(right))


@pytest.mark.parametrize("kind", ALL)
def test_every_transform_has_examples(kind):
    assert kind.examples()


@examples
def test_inferred_is_computed(example):
    spec = example.transform.infer(*example.arguments)
    arguments = [sample(argument, at) for at, argument in enumerate(example.arguments)]
    if len(arguments) == 2 and example.transform.op == "guard":
        arguments[1] = arguments[0].clone()
    before = [argument.clone() for argument in arguments]
    result = example.transform.apply(*arguments)
    assert (tuple(result.shape), str(result.dtype)) == (spec.shape, f"torch.{spec.dtype}")
    assert all(map(same, arguments, before)), "the arguments are not changed"
    meta = example.transform.apply(*(argument.to("meta") for argument in arguments))
    assert (tuple(meta.shape), meta.dtype) == (spec.shape, result.dtype)


@examples
def test_what_can_be_had_back_comes_back(example):
    arguments = [sample(argument, at) for at, argument in enumerate(example.arguments)]
    result = example.transform.apply(*arguments)
    for piece in example.transform.recover(*example.arguments):
        original = arguments[piece.argument]
        for axis, (start, size) in enumerate(zip(piece.box.start, piece.box.size, strict=True)):
            original = original.narrow(axis, start, size)
        assert same(piece.back.apply(result) if piece.back else result, original)


@pytest.mark.parametrize("kind", ALL)
def test_every_transform_says_whether_moments_go_through(kind):
    assert "stops_moments" in vars(kind), "each decides for itself"
    assert not kind.stops_moments.endswith(".")


@examples
def test_moments_go_through_what_only_moves_elements(example):
    """Every element of the result stands in the arguments, once, and is taken once."""
    if example.transform.moments_stopped() or isinstance(example.transform, (Cast, Guard)):  # those two are passed by
        return
    at, arguments = 0, []
    for spec in example.arguments:
        arguments.append(torch.arange(at, at + spec.numel).reshape(spec.shape))
        at += spec.numel
    taken = example.transform.apply(*arguments).flatten().tolist()
    assert len(set(taken)) == len(taken)
    assert set(taken) <= set(range(at))


@examples
def test_a_transform_is_plain_data(example):
    transform = example.transform
    again = parse(json.loads(json.dumps(to_builtins(transform))))
    assert again == transform
    assert hash(again) == hash(transform)
    assert transform.describe(*("x" for _ in example.arguments))


@pytest.mark.parametrize("example", [example for _, _, example in EXAMPLES if example.refuses], ids=lambda example: example.transform.op)
def test_what_does_not_fit_is_refused_with_its_sizes(example):
    with pytest.raises(Refusal) as refusal:
        example.transform.infer(*example.refuses)
    assert refusal.value.code == "CK206"
    found = refusal.value.found.split(", ") if not any("," in str(spec) for spec in example.refuses) else None
    assert all(str(spec) in refusal.value.found for spec in example.refuses[:1])
    assert found is None or set(found) <= {str(spec) for spec in example.refuses}


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ({"op": "slise", "axis": 0}, "a saved transform names one of the known operations in its field `op`"),
        ({"op": "slice", "axis": 0}, "the saved transform slice has wrong fields"),
        ({"op": "slice", "axis": "0", "start": 0, "stop": 1}, "the saved transform slice has wrong fields"),
        ({"op": "concat", "axis": 0, "more": 1}, "the saved transform concat has wrong fields"),
    ],
)
def test_a_saved_transform_is_validated(data, what):
    with pytest.raises(Refusal) as refusal:
        parse(data)
    assert refusal.value.what == what


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("a b", "'a b' wants one arrow"),
        ("a a -> a", "'a a -> a': axis 'a' stands twice on one side"),
        ("a b -> a", "'a b -> a': b stands on one side only"),
        ("a ... -> a", "'a ... -> a': `...` must stand once on each side, or on none"),
        ("(a b -> a b", "'(a b -> a b': a `(` is never closed"),
        ("a 2 -> a 2", "'a 2 -> a 2': '2' cannot stand there"),
    ],
)
def test_a_pattern_that_is_none_says_why(pattern, what):
    with pytest.raises(Refusal) as refusal:
        Rearrange(pattern=pattern).infer(TensorSpec((2, 3), DType.float32))
    assert refusal.value.what == what


@given(data=st.data())
def test_rearrange_agrees_with_einops(data):
    axes = data.draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5, unique=True))
    sizes = {axis: data.draw(st.integers(1, 3)) for axis in axes}

    def side(order):
        words, at = [], 0
        while at < len(order):
            width = data.draw(st.integers(1, 3))
            group = order[at : at + width]
            words.append(group[0] if len(group) == 1 else f"({' '.join(group)})")
            at += width
        return " ".join(words), words

    left, words = side(axes)
    right, _ = side(data.draw(st.permutations(axes)))
    shape = []
    for word in words:
        size = 1
        for axis in word.strip("()").split():
            size *= sizes[axis]
        shape.append(size)
    transform = Rearrange(pattern=f"{left} -> {right}", sizes=tuple(sizes.items()))
    x = torch.arange(float(torch.Size(shape).numel())).view(shape)
    theirs = einops.rearrange(x, transform.pattern, **sizes)
    assert transform.infer(TensorSpec(tuple(shape), DType.float32)).shape == tuple(theirs.shape)
    assert torch.equal(transform.apply(x), theirs)
    (piece,) = transform.recover(TensorSpec(tuple(shape), DType.float32))
    assert torch.equal(piece.back.apply(theirs), x)


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5), axis=st.integers(0, 1))
def test_concat_undoes_slicing(sizes, axis):
    shape = (sum(sizes), 3) if axis == 0 else (3, sum(sizes))
    x = torch.arange(float(sum(sizes) * 3)).view(shape)
    parts, start = [], 0
    for size in sizes:
        parts.append(Slice(axis=axis, start=start, stop=start + size).apply(x))
        start += size
    assert torch.equal(Concat(axis=axis).apply(*parts), x)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_an_axis_put_in_comes_out_again(rank):
    x = torch.arange(2.0**rank).view((2,) * rank)
    for axis in range(rank + 1):
        with_axis = insert_axis(rank, axis).apply(x)
        assert torch.equal(with_axis, x.unsqueeze(axis))
        assert torch.equal(remove_axis(rank + 1, axis).apply(with_axis), x)


@pytest.mark.parametrize(
    "dtype", [DType.float8_e4m3fn, DType.uint16, DType.uint64, DType.bfloat16, DType.bool, DType.complex64, DType.complex32]
)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_moves_are_exact_for_every_dtype(dtype):
    x = sample(TensorSpec((4, 6), dtype))
    moved = Rearrange(pattern="(a b) c -> c (b a)", sizes=(("a", 2),)).apply(Concat(axis=0).apply(x, x))
    plain = torch.cat([x.view(torch.uint8 if x.element_size() == 1 else x.dtype)] * 2) if x.element_size() == 1 else None
    assert moved.shape == (6, 8)
    assert moved.dtype == x.dtype
    assert plain is None or torch.equal(moved.view(torch.uint8), einops.rearrange(plain, "(a b) c -> c (b a)", a=2))
    assert same(Reshape(shape=(-1,)).apply(x), x.reshape(-1))


@pytest.mark.parametrize(
    ("values", "source", "to", "what", "found"),
    [
        ([1.0, 70000.0, -1e9], "float32", "float16", "70000 overflows float16 (largest 65504)", "2 such values, the first at element 1"),
        ([1e39], "float64", "float32", "1e+39 overflows float32 (largest 3.40282e+38)", "1 such values, the first at element 0"),
        ([500.0], "float32", "float8_e4m3fn", "500 overflows float8_e4m3fn (largest 448)", "1 such values, the first at element 0"),
        ([float("inf")], "float32", "float8_e4m3fn", "inf overflows float8_e4m3fn (largest 448)", "1 such values, the first at element 0"),
        ([0.5], "float32", "int32", "0.5 is no int32", "1 such values, the first at element 0"),
        ([float("nan")], "float32", "int8", "nan is no int8", "1 such values, the first at element 0"),
        ([300], "int64", "int8", "300 is no int8", "1 such values, the first at element 0"),
        ([-1], "int32", "uint8", "-1 is no uint8", "1 such values, the first at element 0"),
        ([2], "int32", "bool", "2 is neither 0 nor 1", "1 such values, the first at element 0"),
    ],
)
def test_a_cast_that_loses_a_value_says_which(values, source, to, what, found):
    with pytest.raises(Refusal) as refusal:
        Cast(dtype=DType(to)).apply(torch.tensor(values, dtype=getattr(torch, source)))
    assert (refusal.value.code, refusal.value.what, refusal.value.found) == ("CK410", what, found)


def test_saturating_and_infinite_casts():
    x = torch.tensor([70000.0, -70000.0, 1.0, float("inf"), 65519.0])
    assert Cast(dtype=DType.float16, overflow="saturate").apply(x).tolist() == [65504.0, -65504.0, 1.0, float("inf"), 65504.0]
    assert Cast(dtype=DType.float16, overflow="inf").apply(x).tolist() == [float("inf"), float("-inf"), 1.0, float("inf"), 65504.0]
    assert Cast(dtype=DType.float8_e4m3fn, overflow="saturate").apply(x).float().tolist() == [448.0, -448.0, 1.0, 448.0, 448.0]


@given(st.lists(st.floats(-60000, 60000), min_size=1, max_size=20))
def test_a_float_cast_is_the_nearest_value(values):
    x = torch.tensor(values, dtype=torch.float64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        ours = Cast(dtype=DType(str(dtype).removeprefix("torch."))).apply(x)
        nearest = x.to(torch.float32).to(dtype) if dtype != torch.float32 else x.to(dtype)
        assert torch.equal(ours, nearest)


def test_importing_transforms_imports_no_torch():
    code = "import sys, ckptconv.transforms; print([name for name in ('torch', 'numpy', 'einops') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert transforms.ALL
