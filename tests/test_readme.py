"""The README's words are true: its rule file is valid, its commands run, its Python runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from ckptconv.ruleset import steps
from ckptconv.ruleset.model import parse
from ckptconv.ruletests import run_tests
from ckptconv.target.torchvision_ops import import_with_torchvision

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RULES = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    timm = import_with_torchvision("timm")
    torch.save(torch.nn.DataParallel(timm.create_model("resnet18")).state_dict(), folder / "in.pth")
    (folder / "rules").mkdir()
    (folder / "rules" / "mine.yaml").write_text(blocks("yaml")[0])
    return folder


def test_the_rule_file_is_valid_and_passes_its_tests():
    rules = parse(blocks("yaml")[0].encode(), "mine.yaml", stem="mine")
    assert [outcome.failures for outcome in run_tests(rules)] == [()]


def test_every_step_is_listed_here_and_explained_there():
    for name in steps.ALL:
        assert f"`{name}`" in README
        assert f"`{name}`" in RULES


def test_the_commands_run(folder, process):
    commands = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines() if line.startswith("ckptconv ")]
    assert len(commands) >= 8
    for command in commands:
        words = shlex.split(command)[1:]
        words += ["--out", "plan.json"] if words[0] == "plan" else []
        result = process(*words, cwd=folder)
        meant = {"diff": (1,), "explain": (0, 1), "suggest": (0, 1)}.get(words[0], (0,))
        assert result.code in meant, f"{command}\n{result.out}{result.err}"


def test_every_kind_of_cause_is_documented():
    kinds = {
        kind
        for file in (ROOT / "ckptconv" / "explain").glob("*.py")
        for kind in re.findall(r'Cause\(\s*"([a-z-]+)"', file.read_text(encoding="utf-8"))
    }
    assert len(kinds) > 30
    table = (ROOT / "docs" / "explain.md").read_text(encoding="utf-8")
    assert {kind for kind in kinds if f"`{kind}`" not in table} == set()


def test_the_python_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    timm = import_with_torchvision("timm")
    names = {"blocks.0.attn.qkv.weight": torch.ones(12, 4), "blocks.0.norm1.weight": torch.ones(4), "patch_embed.proj.bias": torch.ones(4),
             "head.bias": torch.ones(2)}  # fmt: skip
    scope = {"old_state_dict": names, "model": timm.create_model("resnet18")}
    exec(blocks("python")[0], scope)
    assert scope["report"].ladder.reached == "L0 L1 L2 L3"
    assert "embeddings.projection.bias" in scope["state"]
