"""Casts and moves without torch give torch's bits, and leave to it what it must count or refuse."""

import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptconv import formats
from ckptconv.errors import FitError
from ckptconv.execute import arrays
from ckptconv.execute.engine import fill, seal_all
from ckptconv.execute.sources import Sources
from ckptconv.planner import make_plan
from ckptconv.ruleset.model import parse
from ckptconv.spec import DType

RULE = "version: 1\nname: r\nsummary: s\nsteps:\n"
CASTS = [(DType.float32, DType.bfloat16), (DType.float32, DType.float16), (DType.bfloat16, DType.float32), (DType.float16, DType.float32)]
#: float32 words around everything that a cast to 16 bits decides: ties, carries, the largest value, overflow, denormals, zeros, NaN.
EDGES = sorted({
    sign | (word + step) % 2**31
    for sign in (0, 0x80000000)
    for word in (0, 1, 0x7FFF, 0x8000, 0x18000, 0x0000FFFF, 0x33000000, 0x33000001, 0x387FC000, 0x38800000, 0x3F808000, 0x3F818000, 0x3F80FFFF, 0x477FE000,
                 0x477FEFFF, 0x477FF000, 0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF)
    for step in (-1, 0, 1)
})  # fmt: skip


def torch_bits(source, wanted, data):
    """What torch's kernel makes of the words, and whether it has something to say of them: a refusal, a NaN, a value that became zero."""
    values = torch.frombuffer(bytearray(data), dtype=getattr(torch, source.value))
    result = values.to(getattr(torch, wanted.value))
    quiet = bool(torch.isfinite(result.float()).all()) and int(torch.count_nonzero(result)) == int(torch.count_nonzero(values))
    return bytes(result.view(torch.uint8).numpy()), quiet


@pytest.mark.parametrize(("source", "wanted"), CASTS, ids=str)
def test_every_word_is_cast_as_torch_casts_it_or_left_to_it(source, wanted):
    words = EDGES if source is DType.float32 else range(2**16)
    shape = "<I" if source is DType.float32 else "<H"
    caster, cast = arrays.Caster(source, wanted), 0
    for word in words:
        data = struct.pack(shape, word)
        expected, quiet = torch_bits(source, wanted, data)
        found = caster.cast(memoryview(data))
        assert (found is not None) == quiet, hex(word)
        if found is not None:
            assert bytes(found) == expected, hex(word)
            cast += 1
    assert 0 < cast < len(words)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40), st.sampled_from(CASTS[:2]))
def test_many_words_at_once(words, pair):
    data = struct.pack(f"<{len(words)}I", *words)
    expected, quiet = torch_bits(*pair, data)
    found = arrays.Caster(*pair).cast(memoryview(data))
    assert (found is not None) == quiet
    assert found is None or bytes(found) == expected


def converted(folder, state, steps, *, with_torch, monkeypatch):
    monkeypatch.setattr(arrays, "_TORCH_PAYS", -1 if with_torch else 1 << 40)
    torch.save(state, folder / "in.pth")
    contents = formats.read(folder / "in.pth")
    plan = make_plan(parse((RULE + steps).encode(), "r.yaml"), contents.containers["."].manifest)
    layout = formats.WRITERS["safetensors"].lay_out("out.safetensors", plan.manifest, metadata={})
    with Sources(contents.files) as sources:
        receipt = fill(plan, contents.containers["."].tensors, sources, [layout], folder, digests=True)
    seal_all([layout], receipt, {}, folder)
    return (folder / "out.safetensors").read_bytes(), dict(receipt.digests), dict(receipt.source_digests), receipt.noticed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "int64", "int8", "bool", "float8_e4m3fn", "complex64"])
@pytest.mark.parametrize(
    "step",
    [
        "rearrange: {keys: x, pattern: '(h two d) i -> (h d two) i', two: 2, d: 3}",
        "rearrange: {keys: x, pattern: 'o i -> i o'}",
        "rearrange: {keys: x, pattern: '(a b) i -> b (a i)', a: 4}",
        "split: {from: x, to: '{p:a|b}', dim: 1}",
        "concat: {from: [x, y], to: z, dim: 1}",
        "concat: {from: [y, x], to: z, dim: -1}",
        "cast: {keys: x, dtype: float32, optional: true}",
    ],
)
def test_the_file_is_the_same_with_and_without_torch(tmp_path, step, dtype, monkeypatch):
    torch.manual_seed(0)
    state = {name: torch.randint(0, 2, (12, 80)) if dtype == "bool" else torch.randn(12, 80) * 9 for name in "xy"}
    state = {name: value.to(getattr(torch, dtype)) for name, value in state.items()}
    if state["x"].is_floating_point() and dtype != "float8_e4m3fn":
        state["x"][3, 4] = float("nan")
        state["y"][0, 0] = -float("inf")
    if dtype == "complex64" and "cast" in step:
        return
    with_torch, without = (converted(tmp_path, state, f"  - {step}\n", with_torch=way, monkeypatch=monkeypatch) for way in (True, False))
    assert with_torch == without


@pytest.mark.parametrize("value", [1e-45, -1e-45, 3.4e38, float("nan"), 0.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_a_cast_does_to_single_values_is_said_alike(tmp_path, value, dtype, monkeypatch):
    x = torch.randn(300_000) + 3
    x[[5, 299_000]] = value
    results = []
    for way in (True, False):
        try:
            results.append(
                converted(tmp_path, {"x": x}, f"  - cast: {{keys: x, dtype: {dtype}}}\n", with_torch=way, monkeypatch=monkeypatch)
            )
        except FitError as error:
            results.append(str(error))
    assert results[0] == results[1]


def test_torch_is_not_imported_for_them_and_is_for_a_transpose(tmp_path):
    torch.save({"a": torch.randn(64, 64), "b": torch.randn(64, 64), "c": torch.randn(64, 64)}, tmp_path / "in.pth")
    steps = {
        False: "  - cast: {keys: a, dtype: bfloat16}\n  - rearrange: {keys: b, pattern: '(h two d) i -> (h d two) i', two: 2, d: 8}\n",
        True: "  - rearrange: {keys: c, pattern: 'o i -> i o'}\n",
    }
    for imported, text in steps.items():
        (tmp_path / "r.yaml").write_text(RULE + text)
        code = (
            "import sys; from ckptconv import api\n"
            "api.run('r.yaml', 'in.pth', 'out.pth', verify=1, force=True); print('torch' in sys.modules, 'numpy' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout == f"{imported} True\n" if not imported else done.stdout.startswith("True")
