"""Rules run backwards: the inverse is derived from the plan, and what cannot come back is refused by name."""

import pytest
import torch


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    state = {
        f"blocks.{i}.attn.qkv.{p}": torch.randn(12, 4) if p == "weight" else torch.randn(12) for i in range(2) for p in ("weight", "bias")
    }
    torch.save(state | {"mask": torch.ones(3)}, tmp_path / "old.pth")
    (tmp_path / "split.yaml").write_text(
        "version: 1\nname: split\nsummary: s\nsteps:\n"
        "  - split: {from: 'blocks.{i:int}.attn.qkv.{p}', to: 'layers.{i}.{x:q|k|v}.{p}'}\n"
        "  - rearrange: {keys: 'layers.{i:int}.q.weight', pattern: 'i o -> o i'}\n"
    )
    (tmp_path / "lossy.yaml").write_text(
        "version: 1\nname: lossy\nsummary: s\nsteps:\n  - drop: mask\n  - rename: {'blocks.{r:**}': 'b.{r}'}\n"
    )
    return tmp_path


def test_there_and_back_through_files(folder, cli):
    assert cli("run", "split.yaml", "old.pth", "new.safetensors", cwd=folder).code == 0
    back = cli("run", "--reverse", "split.yaml", "new.safetensors", "back.pth", "--like", "old.pth", "--verify", "4", "--json", cwd=folder)
    assert back.code == 0, back.err + back.out
    assert back.json["verification"]["reached"] == "L0 L1 L3 L4"
    assert back.json["rules"]["rules"] == "split@1 reversed"
    old, new = torch.load(folder / "old.pth"), torch.load(folder / "back.pth")
    assert list(old) == list(new)
    assert all(torch.equal(new[name], value) for name, value in old.items())


def test_what_cannot_come_back_is_refused_unless_told(folder, cli):
    assert cli("run", "lossy.yaml", "old.pth", "new.pth", cwd=folder).code == 0
    refused = cli("run", "--reverse", "lossy.yaml", "new.pth", "back.pth", "--like", "old.pth", cwd=folder)
    assert refused.code == 2
    assert "CK212" in refused.err
    assert "mask cannot come back: dropped by lossy.yaml:5  drop (step 1)" in refused.err
    told = cli("run", "--reverse", "lossy.yaml", "new.pth", "back.pth", "--like", "old.pth", "--lossy", cwd=folder)
    assert told.code == 0, told.err
    assert "left out, because it cannot come back: mask" in told.out
    assert list(torch.load(folder / "back.pth")) == [name for name in torch.load(folder / "old.pth") if name != "mask"]


def test_reversing_asks_what_the_result_must_be_like(folder, cli):
    result = cli("run", "--reverse", "split.yaml", "old.pth", "back.pth", cwd=folder)
    assert result.code == 2
    assert "--reverse needs --like" in result.err


def test_a_source_that_the_rules_did_not_make_is_refused(folder, cli):
    torch.save({"x": torch.ones(2)}, folder / "other.pth")
    result = cli("run", "--reverse", "split.yaml", "other.pth", "back.pth", "--like", "old.pth", cwd=folder)
    assert result.code == 4
    assert "other.pth is not what split@1 makes of old.pth" in result.err
