"""``ckptconv invert``: the way back as a file that is a rule file like any other."""

import pytest
import torch

LOSSY = """\
version: 1
name: lossy
summary: no head, and half of a bias
steps:
  - drop: {keys: "head.{p}", reason: another task}
  - slice: {keys: patch_embed.proj.bias, stop: 4}
  - rename: {"norm.{p}": "layernorm.{p}"}
"""


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    block = {
        "norm1.weight": (8,), "norm1.bias": (8,), "attn.qkv.weight": (24, 8), "attn.qkv.bias": (24,), "attn.proj.weight": (8, 8),
        "mlp.fc1.weight": (16, 8), "mlp.fc2.weight": (8, 16),
    }  # fmt: skip
    shapes = {"cls_token": (1, 1, 8), "pos_embed": (1, 5, 8), "patch_embed.proj.weight": (8, 3, 2, 2), "patch_embed.proj.bias": (8,),
              "norm.weight": (8,), "head.weight": (4, 8), "head.bias": (4,)}  # fmt: skip
    shapes |= {f"blocks.{i}.{name}": shape for i in range(12) for name, shape in block.items()}
    torch.save({name: torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "vit.pth")
    (tmp_path / "lossy.yaml").write_text(LOSSY)
    return tmp_path


def test_what_is_written_is_a_rule_file_that_leads_back_to_the_same_bits(folder, cli):
    written = cli("invert", "timm-vit-to-hf-vit", "--like", "vit.pth", "-o", "back.yaml", cwd=folder)
    assert (written.code, written.out, written.err) == (0, "back.yaml: written, step by step\n", "")
    assert cli("check", "back.yaml", cwd=folder).code == 0
    tested = cli("test", "back.yaml", cwd=folder)
    assert (tested.code, tested.out) == (0, "back.yaml: 1 tests, all pass\n")
    assert cli("run", "timm-vit-to-hf-vit", "vit.pth", "hf.pth", cwd=folder).code == 0
    assert cli("run", "back.yaml", "hf.pth", "again.pth", cwd=folder).code == 0
    before, after = (torch.load(folder / name, weights_only=True) for name in ("vit.pth", "again.pth"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_a_file_it_is_printed_and_a_saved_manifest_will_do(folder, cli):
    assert cli("inspect", "vit.pth", "--save-manifest", "vit.json", cwd=folder).code == 0
    (folder / "vit.pth").unlink()
    printed = cli("invert", "timm-vit-to-hf-vit", "--like", "vit.json", cwd=folder)
    assert printed.code == 0
    assert "\nname: hf-vit-to-timm-vit\n" in printed.out
    assert (
        '- concat: {from: "vit.layers.{i:int}.attention.{x:q|k|v}_proj.{p:weight|bias}", to: "blocks.{i}.attn.qkv.{p}", dim: 0}'
        in printed.out
    )


def test_what_cannot_come_back_is_listed_by_step_and_left_out_only_when_asked(folder, cli, snapshot):
    before = snapshot(folder)
    refused = cli("invert", "lossy.yaml", "--like", "vit.pth", "-o", "back.yaml", cwd=folder)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.count("[CK212]") == 2
    assert "line 6: slice  [CK212]\n  patch_embed.proj.bias cannot come back: slice cannot be undone\n  try: --lossy" in refused.err
    head = "  head.weight cannot come back: dropped: another task\n  head.bias cannot come back: dropped: another task\n"
    assert f"line 5: drop  [CK212]\n{head}  try: --lossy leaves it out\n" in refused.err
    assert snapshot(folder) == before
    lossy = cli("invert", "lossy.yaml", "--like", "vit.pth", "--lossy", "-o", "back.yaml", cwd=folder)
    assert (lossy.code, lossy.out) == (0, "back.yaml: written, step by step\n")
    assert lossy.err.splitlines() == [
        "does not come back: patch_embed.proj.bias: slice cannot be undone  (line 6: slice)",
        "does not come back: head.weight: dropped: another task  (line 5: drop)",
        "does not come back: head.bias: dropped: another task  (line 5: drop)",
    ]
    assert cli("test", "back.yaml", cwd=folder).code == 0


def test_a_file_is_never_replaced_unasked(folder, cli):
    (folder / "back.yaml").write_text("mine")
    refused = cli("invert", "timm-vit-to-hf-vit", "--like", "vit.pth", "-o", "back.yaml", cwd=folder)
    assert refused.code == 5
    assert "CK501" in refused.err
    assert (folder / "back.yaml").read_text() == "mine"
    assert cli("invert", "timm-vit-to-hf-vit", "--like", "vit.pth", "-o", "back.yaml", "--force", cwd=folder).code == 0


def test_a_checkpoint_that_the_rule_is_not_for(folder, cli):
    torch.save({"a.weight": torch.ones(2)}, folder / "other.pth")
    refused = cli("invert", "timm-vit-to-hf-vit", "--like", "other.pth", cwd=folder)
    assert (refused.code, refused.out) == (4, "")
    assert "the rule timm-vit-to-hf-vit@1 is not for this checkpoint: no name matches 'blocks.{i:int}.attn.qkv.weight'" in refused.err
    missing = cli("invert", "timm-vit-to-hf-vit", "--like", "none.pth", cwd=folder)
    assert missing.code == 2
    assert "CK107" in missing.err
