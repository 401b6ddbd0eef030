"""``--parity``: the outputs of the converted model are compared before it gets its name, and a difference is traced to a module."""

import json

import pytest
import torch

from ckptconv import api

NETS = """
import torch
from torch import nn


class Old(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k, self.out = nn.LayerNorm(8, eps=1e-6), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(x)
        return self.out(self.q(x).tanh() * self.k(x))


class New(nn.Module):
    def __init__(self, eps=1e-6):
        super().__init__()
        self.ln, self.query, self.key, self.head = nn.LayerNorm(8, eps=eps), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.ln(x)
        return self.head(self.query(x).tanh() * self.key(x))
"""
RIGHT = {"norm": "ln", "q": "query", "k": "key", "out": "head"}
SWAPPED = {**RIGHT, "q": "key", "k": "query"}
MODELS = ("--target", "py:nets:New", "--parity", "source=py:nets:Old", "--parity", "inputs=inputs.pt")


def write_rules(folder, name, names):
    steps = "".join(f'      "{old}.{{p}}": "{new}.{{p}}"\n' for old, new in names.items())
    (folder / f"{name}.yaml").write_text(f"version: 1\nname: {name}\nsummary: s\nsteps:\n  - rename:\n{steps}")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    namespace = {}
    exec(NETS, namespace)
    torch.manual_seed(0)
    model = namespace["Old"]().eval()
    with torch.no_grad():
        for parameter in model.norm.parameters():
            parameter.normal_()
        inputs = torch.randn(4, 8)
        torch.save({"inputs": [inputs], "output": model(inputs)}, tmp_path / "golden.pt")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "in.pth")
    torch.save([inputs], tmp_path / "inputs.pt")
    write_rules(tmp_path, "right", RIGHT)
    write_rules(tmp_path, "swapped", SWAPPED)
    return tmp_path


def converted(folder, names=RIGHT):
    state = torch.load(folder / "in.pth")["state_dict"]
    torch.save({f"{names[name.split('.')[0]]}.{name.split('.')[1]}": value for name, value in state.items()}, folder / "out.pth")


def test_equal_outputs_reach_l5_and_the_output_says_so(folder, cli):
    result = cli("run", "right.yaml", "in.pth", "out/", "--format", "safetensors", *MODELS, "--report", "report.json", cwd=folder)
    assert (result.code, result.err) == (0, "")
    assert "L5 ok     forward parity: outputs are equal within 0.0001 (largest difference " in result.out
    report = json.loads((folder / "report.json").read_text())["verification"]
    assert report["reached"] == "L0 L1 L2 L3 L4 L5"
    assert report["parity"]["verdict"] == "equal"
    assert report["parity"]["probed"] == 8
    assert api.inspect(folder / "out").metadata["ckptconv.verified"].strip() == "L0 L1 L2 L3 L4 L5"


def test_a_swapped_mapping_writes_nothing_and_names_both_modules(folder, cli, snapshot):
    before = snapshot(folder)
    result = cli("run", "swapped.yaml", "in.pth", "out.pth", *MODELS, "--verify", "6", "--json", cwd=folder)
    assert result.code == 4
    assert {name: data for name, data in snapshot(folder).items() if "__pycache__" not in name} == before
    outputs, modules = result.json["problems"]
    assert outputs["code"] == modules["code"] == "CK412"
    assert "largest difference" in outputs["what"]
    assert outputs["what"].endswith("the mapping is wrong")
    assert modules["where"] == "py:nets:Old / py:nets:New"
    assert modules["what"].startswith("out / head is the first to differ")  # q and k were exchanged before it, in no module of their own
    parity = result.json["verification"]["parity"]
    assert (parity["verdict"], parity["equal"]) == ("mapping wrong", False)
    assert [rung["status"] for rung in result.json["verification"]["rungs"][-2:]] == ["failed", "failed"]


def test_verify_finds_the_first_module_that_differs(folder, cli):
    converted(folder)
    against = ("--against", "in.pth", "--rules", "right.yaml", "--target", "py:nets:New?eps=0.1")
    other = cli("verify", "out.pth", *against, *MODELS[2:], "--level", "6", cwd=folder)
    assert other.code == 4
    assert "L5 FAILED forward parity: the outputs differ: hyper-parameters differ" in other.out
    assert "found: eps 1e-06 against 0.1 (norm / ln)" in other.out
    assert "L6 FAILED first diverging module: norm / ln" in other.out


def test_a_golden_output_needs_no_source(folder, cli):
    converted(folder)
    right = cli("verify", "out.pth", "--target", "py:nets:New", "--parity", "golden=golden.pt", "--level", "5", "--json", cwd=folder)
    assert right.code == 0
    assert right.json["verification"]["reached"] == "L0 L1 L2 L5"


def test_without_parity_l5_says_what_is_missing_where_it_was_asked_for(folder, cli):
    asked = cli("verify", "in.pth", "--target", "in.pth", "--level", "5", cwd=folder)
    assert asked.code == 0
    assert "L5 –      forward parity: not climbed: no --parity source=… or golden=…" in asked.out
    assert "L5" not in cli("verify", "in.pth", "--target", "in.pth", cwd=folder).out


@pytest.mark.parametrize(
    ("words", "what", "hint"),
    [
        (["inputs=inputs.pt"], "either a source model or a golden output", "source=py:module:factory or golden=FILE"),
        (["source=py:nets:Old", "golden=golden.pt"], "not with both", "golden=FILE"),
        (["source="], "--parity source=: want NAME=VALUE", "source=py:module:factory"),
        (["sauce=py:nets:Old"], "--parity sauce=py:nets:Old", "source=py:module:factory"),
        (["source=in.pth"], "only a model can be run", "timm:NAME"),
        (["source=py:nets:Old"], "no inputs to run the models on", "--parity inputs=FILE"),
        (["golden=nowhere.pt"], "there is no such file", "--parity golden=FILE"),
        (["golden=golden.pt", "tolerance=little"], "want a number", "tolerance=1e-4"),
        (["golden=golden.pt", "--verify", "3"], "given to stop before it", "--verify 5"),
        (["golden=golden.pt", "--target", "in.pth"], "a target that is a model", "--target py:module:factory"),
    ],
)
def test_wrong_words_are_usage_errors_before_anything_is_written(folder, monkeypatch, words, what, hint):
    from click.testing import CliRunner

    from ckptconv.cli import cli as command

    monkeypatch.chdir(folder)
    options = [each for word in words[:2] if "=" in word for each in ("--parity", word)]
    options += [word for word in words if "=" not in word]
    result = CliRunner().invoke(command, ["run", "right.yaml", "in.pth", "out.pth", "--target", "py:nets:New", *options, "--json"])
    assert result.exit_code == 2
    problem = json.loads(result.stdout)["problems"][0]
    assert problem["code"] == "CK107"
    assert what in problem["what"]
    assert hint in problem["try"]
    assert not (folder / "out.pth").exists()


def test_a_source_needs_its_weights(folder, cli):
    converted(folder)
    result = cli("verify", "out.pth", *MODELS, cwd=folder)
    assert result.code == 2
    assert "a source model needs its weights" in result.err
    assert "try: --against SRC --rules RULES" in result.err
