"""Targets are built in a process of their own: whatever user code does, there is a sentence for it."""

import json
import os
import time

import pytest
import torch

from ckptconv.errors import CkptconvError, FitError, UsageError
from ckptconv.spec import DType, TensorSpec
from ckptconv.target import manifest_of, parse, strict_load
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
def computes_tied():
    torch.linspace(0, 1, 3).numpy()
    return Tied()
def fails_deep_inside(): raise TypeError("bad argument deep inside\\nand a second line")
def killed(): os.kill(os.getpid(), 9)
def asks_to_tie():
    model = Tied()
    model.tie_weights = lambda what: None
    return model
class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.seen = 0
    def get_extra_state(self): return {"seen": self.seen}
    def set_extra_state(self, state): self.seen = state["seen"]
def bits():
    model = nn.Linear(1, 1)
    model.register_buffer("packed", torch.empty(2, dtype=torch.bits8))
    return model
def lazily():
    import torchvision
    return torchvision.models.resnet18()
something = 3
"""


GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "somemodels.py").write_text(MODELS)
    (tmp_path / "broken.py").write_text("import nothing_like_this\n")
    (tmp_path / "syntax.py").write_text("def (:\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "models.py").write_text("import package.gone\n")
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
    manifest = manifest_of(target("py:somemodels:computes"))
    assert manifest["w"].shape == (5,)
    assert manifest.notes == ("the model cannot be built on the meta device; it was built on the CPU",)
    assert manifest_of(target("py:somemodels:computes_tied")).ties == (("embed.weight", "head.weight"),)


def test_a_method_that_is_only_called_like_the_one_of_transformers_is_left_alone(folder):
    assert len(manifest_of(target("py:somemodels:asks_to_tie"))) == 7


def test_a_state_that_is_no_tensor_is_noted_and_stays(folder):
    manifest = manifest_of(target("py:somemodels:Stateful"))
    assert list(manifest) == ["fc.weight", "fc.bias"]
    assert manifest.notes == ("_extra_state is no tensor and is not compared",)
    torch.save({"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}, folder / "a.pth")
    result = strict_load(target("py:somemodels:Stateful"), [folder / "a.pth"], "torch")
    assert (result.loaded, result.notes) == (True, ("no tensor, and left as the model has it: _extra_state",))


@pytest.mark.parametrize("text", ["py:torchvision.models:resnet18", "py:somemodels:lazily"])
def test_code_that_imports_a_torchvision_built_for_another_torch(folder, text):
    assert manifest_of(target(text))["fc.weight"] == TensorSpec((1000, 512), DType.float32)


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
        (
            "py:somemodels:something",
            "py:somemodels:something  [CK406]\n  somemodels:something cannot be called: it is of type int\n"
            "  try: name a function or a class that gives the model",
        ),
        (
            "py:somemodels:something.more",
            "py:somemodels:something.more  [CK406]\n  somemodels has no 'something.more'\n  try: it has as_integer_ratio, ",
        ),
        (
            "py:somemodels:fails_deep_inside",
            "py:somemodels:fails_deep_inside  [CK406]\n  building the model failed: TypeError: bad argument deep inside and a second line",
        ),
        (
            "py:somemodels:killed",
            "py:somemodels:killed  [CK406]\n  building the target ended by signal 9, without an answer\n  try: memory may have run out",
        ),
        ("py:somemodels:bits", "py:somemodels:bits  [CK406]\n  packed is a tensor of torch.bits8, which ckptconv does not know"),
        ("py:package.models:f", "py:package.models:f  [CK406]\n  importing package.models failed: No module named 'package.gone'"),
        (
            "py:package.none:f",
            "py:package.none:f  [CK406]\n  there is no module 'package.none'\n  try: the working folder and PYTHONPATH are searched",
        ),
        ("py:somemodels:raises", "py:somemodels:raises  [CK406]\n  building the model failed: ValueError: no weights for you"),
        ("py:somemodels:exits", "py:somemodels:exits  [CK406]\n  building the model failed: it ended the process (exit code 7)"),
        ("py:somemodels:dies", "py:somemodels:dies  [CK406]\n  building the target ended with exit code 9, without an answer"),
        ("py:somemodels:not_a_model", "py:somemodels:not_a_model  [CK406]\n  the factory gives a dict, not an nn.Module"),
        (
            "py:somemodels:wide",
            "py:somemodels:wide  [CK406]\n  wide(width) cannot be called like this: missing a required argument: 'width'\n"
            "  try: py:somemodels:wide?name=value, or a function without arguments",
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
    with pytest.raises(FitError, match=r"took longer than 3 s"):
        manifest_of(target("py:somemodels:hangs"), timeout=3)
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("py:os:system", "CK106"),
        ("/etc/passwd", "CK106"),
        ("../x.json", "CK106"),
        ("hf:../x", "CK106"),
        ("hf:/x", "CK106"),
        ("nothing.json", "CK107"),
        ("hf:~/x", "CK106"),
        ("hf:x/../../y#Model", "CK106"),
        ("timm:resnet18?checkpoint_path=/etc/passwd", "CK107"),
    ],
)
def test_a_rule_file_names_no_code_and_stays_in_its_folder(tmp_path, text, code):
    with pytest.raises(UsageError) as error:
        parse(text, origin="rule file", base=tmp_path)
    assert error.value.problems[0].code == code


@pytest.mark.parametrize("text", ["py:os", "py:os:", "py:a b:c", "timm:", "hf:", "nothing.pth", "timm:resnet18?pretrained=true"])
def test_what_is_no_target_is_refused(folder, text):
    with pytest.raises(CkptconvError) as error:
        target(text)
    assert error.value.problems[0].code == "CK107"


def test_a_stranger_in_the_working_folder_does_not_shadow_a_library(folder, monkeypatch):
    (folder / "gpt2").mkdir()
    (folder / "gpt2" / "config.json").write_text(json.dumps(GPT2))
    # flash_attn: a library that is not installed here, and that transformers looks for.
    for name in ("torch", "json", "safetensors", "yaml", "numpy", "flash_attn"):
        (folder / f"{name}.py").write_text("import pathlib; pathlib.Path('marker').touch(); raise SystemExit(3)")
    # An empty entry of PYTHONPATH means the working folder, too.
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}{folder}{os.pathsep}.")
    assert len(manifest_of(target("py:somemodels:good"))) == 7
    assert len(manifest_of(target("hf:gpt2"))) > 7
    assert not (folder / "marker").exists()


def test_timm_and_transformers_models_with_their_ties(folder):
    timm = import_with_torchvision("timm")
    manifest = manifest_of(target("timm:resnet18?num_classes=10"))
    assert {name: spec.shape for name, spec in manifest.tensors.items()} == {
        name: tuple(value.shape) for name, value in timm.create_model("resnet18", num_classes=10).state_dict().items()
    }
    (folder / "c#" / "gpt2").mkdir(parents=True)
    (folder / "c#" / "gpt2" / "config.json").write_text(json.dumps(GPT2))
    assert manifest_of(target("hf:c#/gpt2")).ties == (("transformer.wte.weight", "lm_head.weight"),)
    assert "wte.weight" in manifest_of(target("hf:c#/gpt2#GPT2Model"))


def test_a_config_without_a_class_means_the_bare_model(folder):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", **sizes}))
    manifest = manifest_of(parse("hf:.", origin="rule file", base=folder))
    assert manifest["embeddings.position_embeddings"].shape == (1, 17, 32)


@pytest.mark.parametrize("name", ["Trainer", "pipeline", "GPT2Config", "NoSuchModel"])
def test_a_config_may_name_a_model_and_nothing_else(folder, name):
    (folder / "config.json").write_text(json.dumps({**GPT2, "architectures": [name]}))
    with pytest.raises(FitError, match=rf"has no model class '{name}'\n  try: hf:FOLDER#ClassName names another"):
        manifest_of(target("hf:."))


def test_a_large_model_costs_no_memory(folder):
    (folder / "huge.py").write_text("from torch import nn\ndef f(): return nn.Linear(1_000_000, 1_000_000)\n")
    assert manifest_of(target("py:huge:f"))["weight"].nbytes == 4 * 10**12
