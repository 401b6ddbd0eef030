"""Catalogue J: what becomes of numbers. Nothing is lost without an error or a count, and what is only moved is moved bit by bit."""

import json
import math
import struct

import pytest
import torch
from building import entry, safetensors_file
from harness import message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv.spec import DType
from ckptconv.transforms.affine import Affine
from ckptconv.transforms.combine import Combine
from ckptconv.transforms.reduce import Reduce

RUN = "run", "rules.yaml", "in.safetensors", "out.safetensors", "--no-sync"
LIMITS = {"torch": True, "mb": 1024}


def rules(*steps):
    return json.dumps({"version": 1, "name": "rules", "summary": "s", "steps": steps})


def cast(dtype, **more):
    return rules({"cast": {"keys": "x", "dtype": dtype, **more}})


def floats(*values):
    return torch.tensor(values, dtype=torch.float32)


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


REFUSED = [
    ("c108-1e300-into-float32", torch.tensor([1.0, 1e300], dtype=torch.float64), cast("float32"), ("rules.yaml:1  cast (step 1)", "CK410", "x: 1e+300 overflows float32 (largest 3.40282e+38)", "1 such values, the first at element 1", "overflow: saturate, or a wider dtype")),
    ("c115-2-to-the-24-into-int16", torch.tensor([(1 << 24) + 1]), cast("int16"), ("rules.yaml:1  cast (step 1)", "CK410", "x: 1.67772e+07 is no int16", "1 such values, the first at element 0", "overflow: saturate, or a wider dtype")),
    ("c110-70000-into-float16", floats(1, 2, 3, -70000, 80000), cast("float16"), ("rules.yaml:1  cast (step 1)", "CK410", "x: -70000 overflows float16 (largest 65504)", "2 such values, the first at element 3", "overflow: saturate, or a wider dtype")),
    ("c110-just-over-the-edge", floats(65519.9, 65520), cast("float16"), ("rules.yaml:1  cast (step 1)", "CK410", "x: 65520 overflows float16 (largest 65504)", "1 such values, the first at element 1", "overflow: saturate, or a wider dtype")),
    ("c112-500-into-e4m3", floats(448, 500), cast("float8_e4m3fn"), ("rules.yaml:1  cast (step 1)", "CK410", "x: 500 overflows float8_e4m3fn (largest 448)", "1 such values, the first at element 1", "overflow: saturate, or a wider dtype")),
    ("c112-infinity-into-e4m3", floats(1, math.inf), cast("float8_e4m3fn"), ("rules.yaml:1  cast (step 1)", "CK410", "x: inf overflows float8_e4m3fn (largest 448)", "1 such values, the first at element 1", "overflow: saturate, or a wider dtype")),
    ("c112-infinity-into-e4m3-as-infinity", floats(1, math.inf), cast("float8_e4m3fn", overflow="inf"), ("rules.yaml:1  cast (step 1)", "CK410", "x: inf overflows float8_e4m3fn (largest 448)", "1 such values, the first at element 1", "overflow: saturate, or a wider dtype")),
    ("c113-NaN-where-finite-is-checked", floats(1, math.nan), rules({"check": {"keys": "x", "finite": True}}), ("passed through", "CK207", "x: 1 of 2 values are not finite", "nan at element 1")),
    ("c113-infinity-made-by-a-formula", floats(1, 3e38), rules({"affine": {"keys": "x", "mul": 2}}, {"check": {"keys": "x", "finite": True}}), ("rules.yaml:1  affine (step 1)", "CK207", "x: 1 of 2 values are not finite", "inf at element 1")),
    ("c115-300-into-int8", floats(1, 300), cast("int8"), ("rules.yaml:1  cast (step 1)", "CK410", "x: 300 is no int8", "1 such values, the first at element 1", "overflow: saturate, or a wider dtype")),
    ("c115-minus-1-into-uint8", torch.tensor([1, -1]), cast("uint8"), ("rules.yaml:1  cast (step 1)", "CK410", "x: -1 is no uint8", "1 such values, the first at element 1", "overflow: saturate, or a wider dtype")),
    ("c115-a-half-into-int8", floats(0.5), cast("int8"), ("rules.yaml:1  cast (step 1)", "CK410", "x: 0.5 is no int8", "1 such values, the first at element 0", "overflow: saturate, or a wider dtype")),
    ("c115-NaN-into-int8", floats(math.nan), cast("int8"), ("rules.yaml:1  cast (step 1)", "CK410", "x: nan is no int8", "1 such values, the first at element 0", "overflow: saturate, or a wider dtype")),
    ("c115-2-into-bool", floats(0, 1, 2), cast("bool"), ("rules.yaml:1  cast (step 1)", "CK410", "x: 2 is neither 0 nor 1", "1 such values, the first at element 2", "overflow: saturate, or a wider dtype")),
]  # fmt: skip
PLANNED = [
    ("c108-complex-into-float32", torch.ones(2, dtype=torch.complex64), cast("float32"), ("rules.yaml:1:60  cast (step 1)", "CK206", "x: a cast from complex64 to float32 would drop the imaginary part", "[2] complex64")),
    ("c115-minus-1-into-e8m0", floats(-1), cast("float8_e8m0fnu"), ("rules.yaml:1:60  cast (step 1)", "CK206", "x: float8_e8m0fnu cannot be cast: it is decoded with its scales", "[1] float32")),
]  # fmt: skip


@pytest.mark.parametrize(("x", "text", "said"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(box, x, text, said):
    save_file({"x": x}, box.folder / "in.safetensors")
    box.write("rules.yaml", text)
    box.refuses(4, message(*said), *RUN, staged=True, **LIMITS)


@pytest.mark.parametrize(("x", "text", "said"), [row[1:] for row in PLANNED], ids=[row[0] for row in PLANNED])
def test_refused_when_it_is_planned(box, x, text, said):
    save_file({"x": x}, box.folder / "in.safetensors")
    box.write("rules.yaml", text)
    box.refuses(2, message(*said), *RUN)


COUNTED = [
    ("c110-saturated", floats(1, -70000, 80000), cast("float16", overflow="saturate"), torch.tensor([1, -65504, 65504], dtype=torch.float16),
     "x: 2 values saturated by the cast to float16"),
    ("c110-made-infinite", floats(1, 70000), cast("float16", overflow="inf"), torch.tensor([1, math.inf], dtype=torch.float16),
     "x: 1 values made infinite by the cast to float16"),
    ("c110-at-the-edge", floats(65519.9), cast("float16"), torch.tensor([65504], dtype=torch.float16), ""),
    ("c111-flushed", floats(1, 1e-8, -1e-8, 0), cast("float16"), torch.tensor([1, 0, -0.0, 0], dtype=torch.float16), "x: 2 values flushed to zero by the cast to float16"),
    ("c111-denormals-that-survive", floats(6e-8), cast("float16"), torch.tensor([6e-8], dtype=torch.float16), ""),
    ("c111-float64-denormals", torch.tensor([1e-300], dtype=torch.float64), cast("float32"), floats(0), "x: 1 values flushed to zero by the cast to float32"),
    ("c112-saturated-e4m3", floats(500, math.inf, -math.inf), cast("float8_e4m3fn", overflow="saturate"), torch.tensor([448, 448, -448], dtype=torch.float32).to(torch.float8_e4m3fn),
     "x: 3 values saturated by the cast to float8_e4m3fn"),
    ("c113-infinities-stay-in-a-cast", floats(math.inf, -math.inf), cast("float16"), torch.tensor([math.inf, -math.inf], dtype=torch.float16), "x: 2 values NaN or infinite"),
]  # fmt: skip


@pytest.mark.parametrize(("x", "text", "wanted", "note"), [row[1:] for row in COUNTED], ids=[row[0] for row in COUNTED])
def test_counted(box, x, text, wanted, note):
    save_file({"x": x}, box.folder / "in.safetensors")
    box.write("rules.yaml", text)
    outcome = box.converts(*RUN, **LIMITS)
    found = load_file(box.folder / "out.safetensors")["x"]
    assert found.dtype == wanted.dtype
    assert torch.equal(bits(found), bits(wanted))
    assert note in outcome.out
    assert note or "values" not in outcome.out.partition("L0")[0]


#: Quiet and signalling NaNs with payloads, infinities, minus zero, the smallest denormals.
ODD = struct.pack("<8I", 0x7FC00001, 0x7F800001, 0xFFC12345, 0x7F800000, 0xFF800000, 0x80000000, 1, 0x80000001)


@pytest.mark.parametrize(("dtype", "width"), [("F32", 4), ("F16", 2), ("BF16", 2), ("F64", 8), ("F8_E4M3", 1), ("C64", 8), ("BOOL", 1)])
@pytest.mark.parametrize("output", ["out.safetensors", "out.pth"])
def test_c114_what_is_renamed_or_cut_keeps_every_bit(box, dtype, width, output):
    data = ODD if dtype != "BOOL" else bytes([0, 1] * 16)
    count = len(data) // width
    box.write("in.safetensors", safetensors_file({"x": entry([count // 2, 2], [0, len(data)], dtype)}, data))
    box.write(
        "rules.yaml",
        rules({"split": {"from": "x", "to": ["y.a", "y.b"], "dim": 0}}, {"concat": {"from": ["y.a", "y.b"], "to": "z", "dim": 0}}),
    )
    box.converts("run", "rules.yaml", "in.safetensors", output, "--no-sync", **LIMITS)
    if output.endswith("pth"):
        found = bits(torch.load(box.folder / output)["z"]).numpy().tobytes()
    else:
        found = (box.folder / output).read_bytes()[-len(data) :]
    assert found == data


def test_c113_what_is_not_finite_is_carried_along(box):
    box.write("in.safetensors", safetensors_file({"x": entry([8], [0, 32])}, ODD))
    box.write("rules.yaml", rules({"rename": {"x": "y"}}))
    box.converts(*RUN)
    assert (box.folder / "out.safetensors").read_bytes().endswith(ODD)


def test_c113_unless_it_is_forbidden(box):
    save_file({"a": floats(1, 2), "x": floats(math.nan, 1, math.inf), "n": torch.tensor([1])}, box.folder / "in.safetensors")
    box.write("rules.yaml", rules({"rename": {"x": "y"}}))
    said = (
        "rules.yaml:1  rename (step 1)",
        "CK414",
        "y: 2 of 3 values are NaN or infinite",
        "",
        "leave --forbid-nonfinite out, if they are meant",
    )
    box.refuses(4, message(*said), *RUN, "--forbid-nonfinite", staged=True, **LIMITS)
    box.write("finite.yaml", rules({"drop": "x"}).replace('"rules"', '"finite"'))
    box.converts("run", "finite.yaml", "in.safetensors", "out.safetensors", "--forbid-nonfinite", **LIMITS)


# ------------------------------------------------------------------------------------------------------------ quantised blocks


def blocks(scale, shape=(4, 4)):
    weight = torch.ones(shape, dtype=torch.float32).to(torch.float8_e4m3fn)
    return {"w": weight, **({} if scale is None else {"w_scale_inv": torch.tensor(scale, dtype=torch.float32)})}


def decoding(block=(2, 2)):
    return rules(
        {"decode": {"weight": "{m:**}.w", "scale": "{m:**}.w_scale_inv", "layout": "blocks", "block": list(block), "dtype": "float32"}}
    )


BLOCKS = [
    ("c116-no-scales", {**blocks([[1.0, 1], [1, 1]]), "lonely.w": blocks(None)["w"]}, decoding(), 4, ("rules.yaml:1:60  decode (step 1)", "CK413", "lonely.w has no scale '{m:**}.w_scale_inv'", "[4, 4] float8_e4m3fn")),
    ("c116-another-block-size", blocks([[1.0, 1], [1, 1]]), decoding((4, 4)), 2, ("rules.yaml:1:60  decode (step 1)", "CK206", "w_scale_inv: blocks of 4 x 4 want scales [1, 1]", "[4, 4] float8_e4m3fn, [2, 2] float32")),
    ("c116-a-block-size-of-zero", blocks([[1.0, 1], [1, 1]]), decoding((0, 2)), 2, ("rules.yaml:1:60  decode (step 1)", "CK104", "w_scale_inv: a block has positive sizes", "[0, 2]")),
    ("c116-a-scale-of-NaN", blocks([[1.0, math.nan], [1, 1]]), decoding(), 4, ("rules.yaml:1  decode (step 1)", "CK413", "w: a scale is not finite", "1 of 4 scales")),
    ("c116-a-scale-of-infinity", blocks([[1.0, math.inf], [1, 1]]), decoding(), 4, ("rules.yaml:1  decode (step 1)", "CK413", "w: a scale is not finite", "1 of 4 scales")),
    ("c116-a-scale-of-zero", blocks([[1.0, 0], [1, 1]]), decoding(), 4, ("rules.yaml:1  decode (step 1)", "CK413", "w: numbers that are not zero have the scale zero", "4 of 16 numbers")),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "text", "code", "said"), [row[1:] for row in BLOCKS], ids=[row[0] for row in BLOCKS])
def test_blocks(box, tensors, text, code, said):
    save_file(tensors, box.folder / "in.safetensors")
    box.write("rules.yaml", text)
    box.refuses(code, message(*said), *RUN, staged=True, **LIMITS)


def test_c116_scales_in_another_shard(box):
    (box.folder / "in").mkdir()
    whole = blocks([[2.0, 1], [1, 0.5]])
    for at, name in enumerate(whole):
        save_file({name: whole[name]}, box.folder / "in" / f"{at}.safetensors")
    index = {"weight_map": {name: f"{at}.safetensors" for at, name in enumerate(whole)}}
    box.write("in/model.safetensors.index.json", json.dumps(index))
    box.write("rules.yaml", decoding())
    box.converts("run", "rules.yaml", "in", "out.safetensors", "--no-sync", **LIMITS)
    found = load_file(box.folder / "out.safetensors")["w"]
    assert torch.equal(found, torch.tensor([[2.0, 2, 1, 1]] * 2 + [[1.0, 1, 0.5, 0.5]] * 2))


# --------------------------------------------------------------------------------------------------- sums are taken in float32

SMALL = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NARROW = st.sampled_from([torch.bfloat16, torch.float16, torch.float8_e4m3fn])


def drawn(seed, *shape, dtype):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def is_rounded_once(found, exact):
    """``found`` is within half a unit in the last place (and float32's own error) of the exact value: nothing was rounded on the way."""
    info = torch.finfo(found.dtype)
    error = (found.to(torch.float64) - exact).abs()
    return bool((error <= exact.abs() * (info.eps * 0.5 + 1e-4) + info.smallest_normal).all())


@SMALL
@given(seed=st.integers(0, 1 << 16), dtype=NARROW, how=st.sampled_from(["sum", "mean"]), size=st.integers(1, 200))
def test_c117_sums_and_means(seed, dtype, how, size):
    x = (drawn(seed, 3, size, dtype=torch.float32) / 64).to(dtype)
    exact = getattr(x.to(torch.float64), how)(1, keepdim=True)
    assert is_rounded_once(Reduce(how=how, axis=1).apply(x), exact)


@SMALL
@given(seed=st.integers(0, 1 << 16), dtype=st.sampled_from([torch.bfloat16, torch.float16]), rank=st.integers(1, 64))
def test_c117_merges(seed, dtype, rank):
    w, a, b = drawn(seed, 5, 7, dtype=dtype), drawn(seed + 1, rank, 7, dtype=dtype), drawn(seed + 2, 5, rank, dtype=dtype)
    found = Combine(names=("w", "a", "b"), formula="w + s * (b @ a)", constants=(("s", 0.5),)).apply(w, a, b)
    exact = w.to(torch.float64) + 0.5 * (b.to(torch.float64) @ a.to(torch.float64))
    assert found.dtype == dtype
    assert is_rounded_once(found, exact)


@SMALL
@given(seed=st.integers(0, 1 << 16), dtype=NARROW)
def test_c117_affine(seed, dtype):
    x = drawn(seed, 50, dtype=dtype)
    assert is_rounded_once(Affine(mul=1.25, add=0.5).apply(x), x.to(torch.float64) * 1.25 + 0.5)


# ------------------------------------------------------------------------------------------------- two hundred models, there and back

DTYPES = [dtype for dtype in DType if dtype.value not in ("float4_e2m1fn_x2", "complex32", "complex128", "complex64", "bool")]


@st.composite
def models(draw):
    """A state_dict with every kind of shape, dtype and tie, its bytes at random."""
    tensors = {}
    words = st.sampled_from(["a", "layers.0", "layers.1", "layers.10", "norm", "head", "é", "weight_1"])
    for name in draw(st.lists(st.tuples(words, words).map(".".join), min_size=1, max_size=6, unique=True)):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 4), max_size=3))
        count = math.prod(shape) * dtype.nbytes
        raw = torch.frombuffer(bytearray(draw(st.binary(min_size=count, max_size=count)) or b"\0"), dtype=torch.uint8)[:count]
        tensors[name] = (
            raw.clone().view(getattr(torch, dtype.value)).view(shape) if count else torch.empty(shape, dtype=getattr(torch, dtype.value))
        )
    if draw(st.booleans()):
        first = next(iter(tensors))
        tensors["tied"] = tensors[first]
    return tensors


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(tensors=models(), pair=st.sampled_from([("pth", "pth"), ("pth", "safetensors"), ("safetensors", "pth")]))
def test_c118_two_hundred_models_there_and_back(tmp_path, tensors, pair):
    renaming = tmp_path / "renaming.yaml"
    renaming.write_text(
        rules({"add_prefix": "model."}, {"rename": {"model.layers.{i:int}.{p}": "blocks.{i + 1}.{p}"}}).replace('"rules"', '"renaming"')
    )
    renaming.write_text(renaming.read_text().replace('{"rename"', '{"optional": true, "rename"'))
    start, there, back = tmp_path / "start.pth", tmp_path / f"there.{pair[0]}", tmp_path / f"back.{pair[1]}"
    torch.save(tensors, start)
    ckptconv.run(renaming, start, there, force=True, sync=False)
    ckptconv.run(renaming, there, back, reverse=True, like=start, force=True, sync=False)
    if pair[1] == "pth":
        found = torch.load(back)
    else:
        with safe_open(back, "pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
            found |= {alias: found[kept] for alias, kept in opened.metadata().items() if kept in found}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(found[name]), bits(tensor))
