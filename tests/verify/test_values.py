"""Values are conserved: looked at part by part, so that the proof of a large tensor needs no more memory than that of a small one."""

import pytest
import torch

import ckptconv
from ckptconv.execute.sources import Sources
from ckptconv.verify import values

RULE = "version: 1\nname: r\nsummary: s\nsteps: [{stack: {from: 'e.{e:int}.w', over: e, to: w}}]\n"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.complex128], ids=str)
def test_stacked_tensors_are_looked_at_in_parts(tmp_path, monkeypatch, dtype):
    torch.save({f"e.{at}.w": (torch.arange(300) * (at + 1)).to(dtype) for at in range(3)}, tmp_path / "in.pth")
    (tmp_path / "r.yaml").write_text(RULE)
    largest = 0
    read = Sources.read_tensor

    def watched(self, placed):
        nonlocal largest
        largest = max(largest, placed.spec.numel)
        return read(self, placed)

    monkeypatch.setattr(values, "_CHUNK", 70)
    monkeypatch.setattr(Sources, "read_tensor", watched)
    report = ckptconv.run(tmp_path / "r.yaml", tmp_path / "in.pth", tmp_path / "out.pth")
    assert report.ladder.rungs[3].sentence.endswith("1 tensors hold exactly their sources' elements")
    assert largest == 70
