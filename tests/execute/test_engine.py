"""Filling: whatever the threads, the order and the format, the bytes are those that torch computes."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ckptconv import formats
from ckptconv.errors import FitError, InputError, OutputError
from ckptconv.execute.copying import BLOCK, Copy, Piece, batches
from ckptconv.execute.digest import content_digest, digest_tensors
from ckptconv.execute.engine import fill, seal_all
from ckptconv.execute.memory_run import computed, evaluate
from ckptconv.execute.sources import Sources
from ckptconv.memory import peak_nbytes, plan_peak
from ckptconv.plan import Output, Read, apply
from ckptconv.planner import make_plan
from ckptconv.ruleset.model import parse
from ckptconv.spec import DType, TensorSpec
from ckptconv.transforms import Cast, Concat, Rearrange

RULES = b"""
version: 1
name: r
summary: s
steps:
  - split: {from: "l.{i:int}.qkv.{p}", to: "l.{i}.{x:q|k|v}.{p}"}
  - stack: {from: "l.{i:int}.e.{e:int}.w", over: e, to: "l.{i}.experts"}
  - rearrange: {keys: "l.{i:int}.up", pattern: "i o -> o i"}
  - cast: {keys: "l.{i:int}.up", dtype: bfloat16}
  - concat: {from: ["l.{i:int}.a", "l.{i:int}.b"], to: "l.{i}.ab", dim: 1}
  - rename: {norm: n, strided: s}
  - fill: {to: made, shape: [3], value: arange, dtype: int64}
  - drop: gone
"""


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    state = {}
    for i in range(3):
        state[f"l.{i}.qkv.weight"] = torch.randn(12, 5)
        state[f"l.{i}.qkv.bias"] = torch.randn(12)
        state[f"l.{i}.up"] = torch.randn(7, 4)
        for e in range(11):
            state[f"l.{i}.e.{e}.w"] = torch.full((2, 3), float(e))
        state[f"l.{i}.a"], state[f"l.{i}.b"] = torch.randn(4, 2), torch.randn(4, 3)
    state |= {
        "norm": torch.randn(9),
        "strided": torch.randn(4, 6).T,
        "gone": torch.ones(1),
        "empty": torch.ones(0, 3),
        "scalar": torch.tensor(5),
    }
    torch.save(state, tmp_path / "in.pth")
    return tmp_path / "in.pth", state


def expected(state):
    out = {}
    for i in range(3):
        for p in ("weight", "bias"):
            for name, part in zip("qkv", state[f"l.{i}.qkv.{p}"].chunk(3), strict=True):
                out[f"l.{i}.{name}.{p}"] = part
        out[f"l.{i}.experts"] = torch.stack([state[f"l.{i}.e.{e}.w"] for e in range(11)])
        out[f"l.{i}.up"] = state[f"l.{i}.up"].T.to(torch.bfloat16)
        out[f"l.{i}.ab"] = torch.cat([state[f"l.{i}.a"], state[f"l.{i}.b"]], 1)
    return out | {"n": state["norm"], "s": state["strided"], "made": torch.arange(3), "empty": state["empty"], "scalar": state["scalar"]}


def written(path, folder, name, format, threads=2):
    contents = formats.read(path)
    placed = contents.containers["."].tensors
    plan = make_plan(parse(RULES, "r.yaml"), contents.containers["."].manifest)
    layout = formats.WRITERS[format].lay_out(name, plan.manifest, metadata={})
    with Sources(contents.files) as opened:
        receipt = fill(plan, placed, opened, [layout], folder, threads=threads)
        seal_all([layout], receipt, {}, folder)
    return receipt


@pytest.mark.parametrize("format", ["torch", "safetensors"])
@pytest.mark.parametrize("threads", [1, 2, 8])
def test_every_kind_of_expression_is_what_torch_computes(tmp_path, source, format, threads):
    path, state = source
    receipt = written(path, tmp_path, "out", format, threads)
    wanted = expected(state)
    with Sources(formats.read(tmp_path / "out").files) as opened:
        placed = formats.read(tmp_path / "out").containers["."].tensors
        found = {name: opened.read_tensor(place) for name, place in placed.items()}
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
    copied = {"n", "empty", "scalar"} | {f"l.{i}.{x}.{p}" for i in range(3) for x in "qkv" for p in ("weight", "bias")}
    copied |= {f"l.{i}.experts" for i in range(3)}
    assert receipt.copied_nbytes == sum(wanted[name].nbytes for name in copied), "rows of a tensor and stacked tensors are byte ranges too"


@pytest.mark.parametrize("format", ["torch", "safetensors"])
def test_the_bytes_do_not_depend_on_the_threads(tmp_path, source, format):
    path, _ = source
    for threads in (1, 2, 8):
        written(path, tmp_path, f"out{threads}", format, threads)
    assert (tmp_path / "out1").read_bytes() == (tmp_path / "out2").read_bytes() == (tmp_path / "out8").read_bytes()


def test_evaluating_in_memory_gives_the_same_and_passes_tensors_through(source):
    _, state = source
    from ckptconv.api import manifest_of_state_dict

    plan = make_plan(parse(RULES, "r.yaml"), manifest_of_state_dict(state))
    found = evaluate(plan, state)
    assert all(torch.equal(found[name], value) for name, value in expected(state).items())
    assert found["n"] is state["norm"]


def test_a_value_is_dropped_at_its_last_use():
    """A chain of stacks: at no time are more tensors alive than the plan says."""
    spec = TensorSpec((1000,), DType.float32)
    outputs = [
        Output(f"o{at}", apply(Cast(dtype=DType.float64), apply(Concat(axis=0), Read(f"a{at}", spec), Read(f"b{at}", spec))))
        for at in range(20)
    ]
    alive, most = [], 0

    def read(node):
        nonlocal most
        value = torch.ones(1000)
        import weakref

        alive.append(weakref.ref(value))
        most = max(most, sum(each() is not None for each in alive))
        return value

    for _, value in computed(outputs, read):
        assert value.shape == (2000,)
        del value
    assert most <= 2
    assert peak_nbytes(outputs[:1]) == 4000 + 4000 + 8000 + 8000 or peak_nbytes(outputs[:1]) <= 32_000
    assert peak_nbytes(outputs) == peak_nbytes(outputs[:1]), "outputs that share nothing do not add up"


def test_the_peak_of_a_plan_does_not_grow_with_its_length():
    spec = TensorSpec((100, 100), DType.float32)

    def plan(count):
        outputs = tuple(Output(f"o{at}", apply(Rearrange(pattern="a b -> b a"), Read(f"x{at}", spec))) for at in range(count))
        return [[output] for output in outputs]

    assert plan_peak(plan(1000), 2) == plan_peak(plan(10), 2)


def test_too_little_memory_is_refused_before_the_work(tmp_path, source):
    path, _ = source
    contents = formats.read(path)
    plan = make_plan(parse(RULES, "r.yaml"), contents.containers["."].manifest)
    layout = formats.WRITERS["torch"].lay_out("out", plan.manifest, metadata={})
    with Sources(contents.files) as opened, pytest.raises(OutputError, match="CK503") as error:
        fill(plan, contents.containers["."].tensors, opened, [layout], tmp_path, max_memory=10)
    assert "--max-memory allows 10" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_refusal_in_a_worker_names_the_output_and_its_rule(tmp_path):
    torch.save({"x": torch.tensor([1.0, 70000.0])}, tmp_path / "in.pth")
    contents = formats.read(tmp_path / "in.pth")
    rules = parse(b"version: 1\nname: r\nsummary: s\nsteps:\n  - cast: {keys: x, dtype: float16}\n", "r.yaml")
    plan = make_plan(rules, contents.containers["."].manifest)
    layout = formats.WRITERS["torch"].lay_out("out", plan.manifest, metadata={})
    with Sources(contents.files) as opened, pytest.raises(FitError) as error:
        fill(plan, contents.containers["."].tensors, opened, [layout], tmp_path)
    assert str(error.value) == (
        "r.yaml:5  cast (step 1)  [CK410]\n  x: 70000 overflows float16 (largest 65504)\n"
        "  found: 1 such values, the first at element 1\n  try: overflow: saturate, or a wider dtype"
    )


def test_a_source_that_shrinks_is_an_error_and_not_a_signal(tmp_path):
    torch.save({"x": torch.ones(1000, 1000)}, tmp_path / "in.pth")
    contents = formats.read(tmp_path / "in.pth")
    with Sources(contents.files) as opened:
        os.truncate(tmp_path / "in.pth", 5000)
        with pytest.raises(InputError, match="changed while it was read"):
            opened.read_tensor(contents.containers["."].tensors["x"])
        with pytest.raises(InputError, match="CK311"):
            opened.check_unchanged()


def test_a_source_that_is_replaced_is_noticed(tmp_path):
    (tmp_path / "a").write_bytes(b"1234")
    with Sources([tmp_path / "a"]) as opened:
        opened.check_unchanged()
        (tmp_path / "b").write_bytes(b"1234")
        os.replace(tmp_path / "b", tmp_path / "a")
        with pytest.raises(InputError, match="CK311"):
            opened.check_unchanged()


def test_a_flipped_bit_of_the_source_is_found_by_its_checksum(tmp_path):
    torch.save({"x": torch.full((500,), 2.0)}, tmp_path / "in.pth")
    contents = formats.read(tmp_path / "in.pth")
    place = contents.containers["."].tensors["x"]
    raw = bytearray((tmp_path / "in.pth").read_bytes())
    raw[place.storage.offset + 3] ^= 0x40
    (tmp_path / "in.pth").write_bytes(raw)
    contents = formats.read(tmp_path / "in.pth")
    with Sources(contents.files) as opened, pytest.raises(InputError) as error:
        digest_tensors(opened, contents.containers["."].tensors)
    assert error.value.problems[0].code == "CK312"
    assert error.value.problems[0].what == "x: the checksum that the file records does not match its bytes"


def test_a_flipped_bit_that_no_whole_tensor_covers_is_found_too(tmp_path):
    big = torch.arange(100.0)
    torch.save({"x": big[:10]}, tmp_path / "in.pth")
    raw = bytearray((tmp_path / "in.pth").read_bytes())
    place = formats.read(tmp_path / "in.pth").containers["."].tensors["x"]
    raw[place.storage.offset + 300] ^= 1
    (tmp_path / "in.pth").write_bytes(raw)
    contents = formats.read(tmp_path / "in.pth")
    with Sources(contents.files) as opened, pytest.raises(InputError, match="CK312"):
        digest_tensors(opened, contents.containers["."].tensors)


def test_digests_are_of_values_and_not_of_places(tmp_path):
    value = torch.arange(24.0).view(4, 6)
    torch.save({"a": value, "b": value.T.contiguous().T, "c": torch.cat([value, value])[4:]}, tmp_path / "a.pth")
    contents = formats.read(tmp_path / "a.pth")
    with Sources(contents.files) as opened:
        found = digest_tensors(opened, contents.containers["."].tensors)
    assert len(set(found.values())) == 1
    manifest = contents.containers["."].manifest
    assert content_digest(manifest, found) == content_digest(manifest, dict(found))
    assert content_digest(manifest, found).startswith("xxh3_128:")


def test_small_neighbours_go_together_and_large_ranges_are_shared():
    small = [Copy(at * 100, (Piece(0, at * 100, 50),)) for at in range(10)]
    assert [len(batch) for batch in batches(small)] == [10]
    touching = [Copy(7 + at * 100, (Piece(0, at * 100, 100),)) for at in range(10)]
    assert batches(touching) == [[Copy(7, (Piece(0, 0, 1000),))]]
    (first, *rest) = batches([Copy(0, (Piece(0, 0, 40 * BLOCK),))])
    assert rest
    assert sum(batch[0].nbytes for batch in (first, *rest)) == 40 * BLOCK
    with_checksum = batches([Copy(0, (Piece(0, 0, 40 * BLOCK),), "x", crc=True)])
    assert len(with_checksum) == 1, "one checksum needs one pass"


def test_peak_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """A rename of 16 times as many bytes needs the same memory, and never imports torch."""
    code = (
        "import re, sys; from pathlib import Path; from ckptconv import api; api.run('dataparallel', sys.argv[1], sys.argv[2], verify=None, sync=False); "
        "print(re.search('VmHWM:\\s*([0-9]+)', Path('/proc/self/status').read_text())[1], 'torch' in sys.modules)"
    )
    peaks = []
    for count in (4, 64):
        torch.save({f"module.{at}": torch.zeros(1 << 18) for at in range(count)}, tmp_path / f"in{count}.pth")
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / f"in{count}.pth", tmp_path / f"out{count}.pth"],
            capture_output=True,
            text=True,
            check=True,
        )
        peak, torch_imported = done.stdout.split()
        assert torch_imported == "False"
        peaks.append(int(peak))
    assert peaks[1] < peaks[0] * 1.2, peaks


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_leaves_nothing_behind(tmp_path, name, code):
    torch.save({f"module.{at}": torch.zeros(1 << 20) for at in range(64)}, tmp_path / "in.pth")
    before = sorted(tmp_path.iterdir())
    process = subprocess.Popen([sys.executable, "-m", "ckptconv", "run", "dataparallel", tmp_path / "in.pth", tmp_path / "out.pth"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
    deadline = time.monotonic() + 20
    while sorted(tmp_path.iterdir()) == before and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=30)
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("way", ["convert", "load", "verify"])
def test_memory_that_runs_out_is_said_with_the_output_and_how_much_it_needs(tmp_path, way):
    """A cast of 400 MB to float64 needs 1.2 GB, and the process may have 1 GB more; half of that where the source is there already."""
    (tmp_path / "wide.yaml").write_bytes(b"version: 1\nname: wide\nsummary: s\nsteps:\n  - cast: {keys: big, dtype: float64}\n")
    torch.save({"big": torch.zeros(100_000_000)}, tmp_path / "in.pth")
    code = f"""
import resource, sys, torch
from ckptconv import api
from ckptconv.errors import CkptconvError
model = torch.nn.Module(); model.register_buffer("big", torch.zeros((), dtype=torch.float64, device="meta").expand(100_000_000))
state = torch.load("in.pth", mmap=True)
if {way!r} == "verify":
    api.run("wide.yaml", "in.pth", "out.pth", verify=None)
torch.zeros(10) + 1
now = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (now + (5 * 10**8 if {way!r} == "convert" else 10**9), resource.RLIM_INFINITY))
try:
    if {way!r} == "convert":
        api.convert(state, "wide.yaml")
    elif {way!r} == "load":
        api.load(model, "in.pth", rules="wide.yaml")
    else:
        api.verify("out.pth", against="in.pth", rules="wide.yaml", level=4)
except CkptconvError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "big: there is not enough memory" in done.stdout, done.stdout + done.stderr[-2000:]
    assert "1,200,000,000 bytes needed at once" in done.stdout
