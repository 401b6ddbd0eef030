"""Targets are built in a process of their own: whatever user code does, there is a sentence for it."""

import json
import time

import pytest
import torch
from torch import nn

from ckptconv.errors import CkptconvError, FitError, UsageError
from ckptconv.spec import DType, TensorSpec
from ckptconv.target import load_into, manifest_of, parse, strict_load
from ckptconv.target.torchvision_ops import import_with_torchvision

MODELS = """
import os, sys, time
from pathlib import Path
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("transient", torch.zeros(1), persistent=False)

def good(): return Tied()
def wide(width): return Tied(width)
def noisy():
    for _ in range(2000): print("x" * 100_000)
    return Tied()
def raises(): raise ValueError("no weights for you")
def exits(): sys.exit(7)
def dies(): os._exit(9)
def hangs(): time.sleep(1000)
def forks():
    if os.fork() == 0: time.sleep(1000)
    return Tied()
def not_a_model(): return {"a": 1}
def computes():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.linspace(0, 1, 5))
            self.steps = [x.item() for x in torch.linspace(0, 1, 3)]
    return M()
something = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "somemodels.py").write_text(MODELS)
    (tmp_path / "broken.py").write_text("import nothing_like_this\n")
    (tmp_path / "syntax.py").write_text("def (:\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def target(text):
    return parse(text, origin="command line")


def test_a_model_of_the_users_own(folder):
    manifest = manifest_of(target("py:somemodels:good"))
    assert manifest["embed.weight"] == TensorSpec((10, 4), DType.float32)
    assert manifest.ties == (("embed.weight", "head.weight"),)
    assert manifest.buffers == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert "transient" not in manifest
    assert manifest_of(target("py:somemodels:wide?width=6"))["embed.weight"].shape == (10, 6)
    assert manifest_of(target("py:somemodels:Tied"))["embed.weight"].shape == (10, 4)


def test_a_model_that_cannot_be_built_on_meta_is_built_on_the_cpu(folder):
    assert manifest_of(target("py:somemodels:computes"))["w"].shape == (5,)


def test_what_user_code_prints_is_no_answer(folder):
    assert len(manifest_of(target("py:somemodels:noisy"))) == 7


def test_a_child_of_the_child_is_gone_too(folder):
    started = time.monotonic()
    assert len(manifest_of(target("py:somemodels:forks"), timeout=60)) == 7
    assert time.monotonic() - started < 50


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("py:nowhere:f", "py:nowhere:f  [CK406]\n  there is no module 'nowhere'\n  try: the working folder and PYTHONPATH are searched"),
        ("py:somemodels:nothing", "py:somemodels:nothing  [CK406]\n  somemodels has no 'nothing'\n  try: it has "),
        ("py:somemodels:something", "py:somemodels:something  [CK406]\n  somemodels:something is a int, not something to call\n"),
        ("py:somemodels:raises", "py:somemodels:raises  [CK406]\n  building the model failed: ValueError: no weights for you"),
        ("py:somemodels:exits", "py:somemodels:exits  [CK406]\n  building the model failed: it ended the process (exit code 7)"),
        ("py:somemodels:dies", "py:somemodels:dies  [CK406]\n  building the target ended with exit code 9, without an answer"),
        ("py:somemodels:not_a_model", "py:somemodels:not_a_model  [CK406]\n  the factory gives a dict, not an nn.Module"),
        (
            "py:somemodels:wide",
            "py:somemodels:wide  [CK406]\n  wide() cannot be called like this: wide() missing 1 required positional argument: 'width'\n",
        ),
        (
            "py:broken:f",
            "py:broken:f  [CK406]\n  importing broken failed: No module named 'nothing_like_this'\n  try: pip install nothing_like_this",
        ),
        ("py:syntax:f", "py:syntax:f  [CK406]\n  importing syntax failed: SyntaxError: "),
        ("timm:resnet18x", "timm:resnet18x  [CK406]\n  timm has no model 'resnet18x'\n  try: did you mean resnet18?"),
        ("hf:nothing", "hf:nothing  [CK406]\n  there is no config.json in "),
    ],
)
def test_a_target_that_cannot_be_built_gets_its_sentence(folder, text, message):
    with pytest.raises(FitError) as error:
        manifest_of(target(text))
    assert str(error.value).startswith(message)


def test_a_target_that_hangs_is_ended(folder):
    started = time.monotonic()
    with pytest.raises(FitError, match=r"took longer than 6 s"):
        manifest_of(target("py:somemodels:hangs"), timeout=6)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("py:os:system", "CK106"),
        ("/etc/passwd", "CK106"),
        ("../x.json", "CK106"),
        ("hf:../x", "CK106"),
        ("hf:/x", "CK106"),
        ("nothing.json", "CK107"),
    ],
)
def test_a_rule_file_names_no_code_and_stays_in_its_folder(tmp_path, text, code):
    with pytest.raises(UsageError) as error:
        parse(text, origin="rule file", base=tmp_path)
    assert error.value.problems[0].code == code


@pytest.mark.parametrize("text", ["py:os", "py:os:", "py:a b:c", "timm:", "hf:", "nothing.pth"])
def test_what_is_no_target_is_refused(folder, text):
    with pytest.raises(CkptconvError) as error:
        target(text)
    assert error.value.problems[0].code == "CK107"


def test_a_stranger_in_the_working_folder_does_not_shadow_a_library(folder):
    for name in ("torch", "json", "safetensors"):
        (folder / f"{name}.py").write_text("import pathlib; pathlib.Path('marker').touch(); raise SystemExit(3)")
    assert len(manifest_of(target("py:somemodels:good"))) == 7
    assert not (folder / "marker").exists()


def test_timm_and_transformers_models_with_their_ties(folder):
    timm = import_with_torchvision("timm")
    manifest = manifest_of(target("timm:resnet18?num_classes=10"))
    assert {name: spec.shape for name, spec in manifest.tensors.items()} == {
        name: tuple(value.shape) for name, value in timm.create_model("resnet18", num_classes=10).state_dict().items()
    }
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 16,
    }
    (folder / "gpt2").mkdir()
    (folder / "gpt2" / "config.json").write_text(json.dumps(config))
    assert manifest_of(target("hf:gpt2")).ties == (("transformer.wte.weight", "lm_head.weight"),)
    assert "wte.weight" in manifest_of(target("hf:gpt2#GPT2Model"))


def test_a_large_model_costs_no_memory(folder):
    (folder / "huge.py").write_text("from torch import nn\ndef f(): return nn.Linear(1_000_000, 1_000_000)\n")
    assert manifest_of(target("py:huge:f"))["weight"].nbytes == 4 * 10**12


def test_strict_loading_in_the_child(folder):
    state = {"embed.weight": torch.randn(10, 4), "norm.weight": torch.ones(4), "norm.bias": torch.ones(4), "norm.running_mean": torch.ones(4),
             "norm.running_var": torch.ones(4), "norm.num_batches_tracked": torch.tensor(1)}  # fmt: skip
    torch.save(state, folder / "a.pth")
    good = strict_load(target("py:somemodels:good"), [folder / "a.pth"], "torch")
    assert (good.loaded, good.error) == (True, "")
    torch.save({**state, "extra": torch.ones(1)}, folder / "b.pth")
    bad = strict_load(target("py:somemodels:good"), [folder / "b.pth"], "torch")
    assert (bad.loaded, bad.unexpected) == (False, ("extra",))
    assert strict_load(target("py:somemodels:good"), [folder / "b.pth"], "torch", allow_unexpected=["extra"]).loaded
    del state["norm.bias"]
    torch.save(state, folder / "c.pth")
    assert not strict_load(target("py:somemodels:good"), [folder / "c.pth"], "torch").loaded
    assert strict_load(target("py:somemodels:good"), [folder / "c.pth"], "torch", allow_missing=["norm.bias"]).loaded


def test_loading_in_place_copies_all_or_nothing():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = {**{name: value + 1 for name, value in before.items()}, "1.weight": torch.ones(5, 5)}
    result = load_into(model, wrong)
    assert not result.loaded
    assert "size mismatch for 1.weight: [5, 5] against [1, 3]" in result.error
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert load_into(model, {name: value + 1 for name, value in before.items()}).loaded
    assert all(torch.equal(value, before[name] + 1) for name, value in model.state_dict().items())
