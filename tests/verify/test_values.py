"""Values are conserved: by their places where outputs are ranges of the source, else by their bits, part by part."""

import pytest
import torch

import ckptconv
from ckptconv.execute.sources import Sources
from ckptconv.formats.base import Placed, Storage
from ckptconv.plan import Output, Read, apply
from ckptconv.spec import DType, TensorSpec
from ckptconv.transforms import Concat, Slice
from ckptconv.verify import values

STACK = "version: 1\nname: r\nsummary: s\nsteps: [{stack: {from: 'e.{e:int}.w', over: e, to: w}}]\n"
TURN = "version: 1\nname: r\nsummary: s\nsteps: [{rearrange: {keys: 'e.{e:int}.w', pattern: 'a b -> b a'}}]\n"


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def made(rule, dtype=torch.float32):
        torch.save({f"e.{at}.w": (torch.arange(300) * (at + 1)).to(dtype).reshape(20, 15) for at in range(3)}, "in.pth")
        (tmp_path / "r.yaml").write_text(rule)

    return made


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.complex128], ids=str)
def test_what_was_moved_is_looked_at_in_parts(source, monkeypatch, dtype):
    """So that the proof of a large tensor needs no more memory than that of a small one."""
    source(TURN, dtype)
    ckptconv.run("r.yaml", "in.pth", "first.pth")
    sizes = []
    read = Sources.read_tensor
    monkeypatch.setattr(values, "_CHUNK", 70)
    monkeypatch.setattr(values.Sources, "read_tensor", lambda self, placed: sizes.append(placed.spec.numel) or read(self, placed))
    report = ckptconv.run("r.yaml", "in.pth", "out.pth")
    assert report.ladder.rungs[3].sentence.endswith("3 tensors hold exactly their sources' elements")
    assert sizes.count(300) == 3, "each once, to be turned"
    assert sizes.count(70) == 2 * 3 * 4, "source and output of each, in parts"


def test_what_is_put_together_of_ranges_is_not_read_again(source, monkeypatch):
    source(STACK)
    monkeypatch.setattr(Sources, "read_tensor", None)
    report = ckptconv.run("r.yaml", "in.pth", "out.pth")
    assert report.ladder.rungs[3].sentence.endswith("1 tensors hold exactly their sources' elements")


A, B = (Read(name, TensorSpec((4, 8), DType.int8)) for name in "ab")
HALF = apply(Slice(axis=0, start=0, stop=2), A)
OTHER = apply(Slice(axis=0, start=2, stop=4), A)


@pytest.mark.parametrize(
    ("outputs", "tiled"),
    [
        ([apply(Concat(axis=0), A, B)], True),
        ([HALF, OTHER], True),
        ([apply(Concat(axis=0), OTHER, HALF), B], True),
        ([HALF], False),
        ([HALF, HALF], False),
        ([apply(Concat(axis=0), A, A), B], False),
        ([apply(Concat(axis=1), A, B)], False),
    ],
    ids=["joined", "split", "exchanged", "a-part", "twice-a-part", "twice", "short-pieces"],
)
def test_every_byte_once(outputs, tiled):
    placed = {name: Placed(A.spec, Storage(0, at * 32, 32), 0, (8, 1)) for at, name in enumerate("ab")}
    assert values._tiled([Output(str(at), expr) for at, expr in enumerate(outputs)], placed) == tiled
