"""Loading is as strict as torch can be, and stricter where torch lets things pass."""

import os
import signal
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ckptconv import api
from ckptconv.errors import FitError, InputError
from ckptconv.target import building, load_into, manifest_of, parse, strict_load

MODEL = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    (tmp_path / "tiedmodel.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return parse("py:tiedmodel:Tied", origin="command line")


@pytest.fixture
def state():
    return {"embed.weight": torch.randn(10, 4), "norm.weight": torch.ones(4), "norm.bias": torch.ones(4), "norm.running_mean": torch.ones(4),
            "norm.running_var": torch.ones(4), "norm.num_batches_tracked": torch.tensor(1)}  # fmt: skip


def test_strict_loading_in_the_child(model, state, tmp_path):
    torch.save(state, tmp_path / "a.pth")
    good = strict_load(model, [tmp_path / "a.pth"], "torch")
    assert (good.loaded, good.error) == (True, "")
    assert good.notes == ("load_state_dict(assign=True) unties head.weight and embed.weight: both hold the same values",)
    torch.save({"epoch": 1, "state_dict": {**state, "extra": torch.ones(1)}}, tmp_path / "b.pth")
    del state["norm.bias"]
    torch.save(state, tmp_path / "c.pth")
    with building.Builder(model) as builder:
        bad = builder.strict_load([tmp_path / "b.pth"], "torch", container="state_dict")
        may = builder.strict_load([tmp_path / "b.pth"], "torch", container="state_dict", allow_unexpected=["extra"])
        lacking = builder.strict_load([tmp_path / "c.pth"], "torch")
        allowed = builder.strict_load([tmp_path / "c.pth"], "torch", allow_missing=["norm.bias"])
    assert (bad.loaded, bad.error, bad.unexpected) == (False, "unexpected: extra", ("extra",))
    assert may.loaded
    assert (lacking.loaded, lacking.error, lacking.missing) == (False, "missing: norm.bias", ("norm.bias",))
    assert allowed.loaded
    assert allowed.notes[0] == "loaded with initial values for what is allowed to be missing: norm.bias"


def test_shards_and_recorded_aliases_are_put_together(model, state, tmp_path):
    embed = {"embed.weight": state.pop("embed.weight")}
    save_file(embed, tmp_path / "1.safetensors", metadata={"format": "pt", "head.weight": "embed.weight"})
    save_file(state, tmp_path / "2.safetensors", metadata={"format": "pt"})
    with building.Builder(model) as builder:
        assert builder.strict_load([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], "safetensors").loaded
        alone = builder.strict_load([tmp_path / "1.safetensors"], "safetensors")
    assert (alone.loaded, alone.error) == (
        False, "missing: norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked",
    )  # fmt: skip


def test_two_values_for_one_tensor_are_refused(model, state, tmp_path):
    torch.save({**state, "head.weight": state["embed.weight"] + 1}, tmp_path / "a.pth")
    result = strict_load(model, [tmp_path / "a.pth"], "torch")
    assert (result.loaded, result.error) == (
        False, "one tensor in the model, two different values in the file: head.weight and embed.weight",
    )  # fmt: skip


def test_a_written_file_that_cannot_be_read_is_no_fault_of_the_model(model, tmp_path):
    (tmp_path / "a.pth").write_bytes(b"PK nothing")
    with pytest.raises(FitError, match=r"\[CK408\]\n  the written files cannot be read: "):
        strict_load(model, [tmp_path / "a.pth"], "torch")


def test_a_checkpoint_as_the_target(tmp_path, monkeypatch):
    save_file({"w": torch.ones(2, 3)}, tmp_path / "a.safetensors")
    assert manifest_of(parse("a.safetensors", origin="rule file", base=tmp_path))["w"].shape == (2, 3)

    def fails(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(building.formats, "read", fails)
    with pytest.raises(InputError) as error:
        manifest_of(parse("a.safetensors", origin="rule file", base=tmp_path))
    assert (
        str(error.value)
        == "a.safetensors  [CK310]\n  the target cannot be opened: Permission denied\n  try: look at the rights of the file and its folders: ls -l"
    )


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)
        self.b = nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight


VALUES = torch.tensor([[float("nan"), 0.0], [1.0, 2.0]])


@pytest.mark.parametrize(
    ("other", "loads"),
    [
        pytest.param(VALUES.clone(), True, id="equal bits, NaN among them"),
        pytest.param(VALUES.clone().t().contiguous().t(), True, id="equal values, other strides"),
        pytest.param(VALUES * torch.tensor([[1.0, -1.0], [1.0, 1.0]]), False, id="minus zero"),
        pytest.param(VALUES.double(), False, id="other dtype"),
    ],
)
@pytest.mark.parametrize("assign", [True, False])
def test_a_tie_takes_one_value(other, loads, assign):
    model = Pair()
    before = model.a.weight.clone()
    result = load_into(model, {"a.weight": VALUES, "b.weight": other}, assign=assign)
    assert result.loaded == loads
    assert loads or torch.equal(model.a.weight, before)
    assert loads or result.error == "one tensor in the model, two different values in the file: b.weight and a.weight"


def test_loading_in_place_copies_all_or_nothing():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = {**{name: value + 1 for name, value in before.items()}, "1.weight": torch.ones(5, 5)}
    result = load_into(model, wrong)
    assert (result.loaded, result.error) == (False, "size mismatch for 1.weight: [5, 5] against [1, 3]")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert load_into(model, {name: value + 1 for name, value in before.items()}).loaded
    assert all(torch.equal(value, before[name] + 1) for name, value in model.state_dict().items())


def test_what_is_left_on_meta_is_no_success():
    with torch.device("meta"):
        model = nn.Linear(2, 1)
    left = load_into(model, {"weight": torch.zeros(1, 2), "bias": torch.zeros(1, device="meta")}, assign=True)
    assert (left.loaded, left.error, left.missing) == (False, "left without values: bias", ("bias",))


def test_a_hook_of_the_model_may_fail():
    model = nn.Linear(2, 1)

    def hook(*_):
        raise KeyError("old layout")

    model.register_load_state_dict_pre_hook(hook)
    result = load_into(model, model.state_dict())
    assert (result.loaded, result.error) == (False, "KeyError: 'old layout'")


class Versioned(nn.Linear):
    _version = 2
    seen = None

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        type(self).seen = local_metadata.get("version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_module_versions_reach_the_modules_and_are_not_written_into():
    state = OrderedDict(weight=torch.zeros(1, 2), bias=torch.zeros(1))
    state._metadata = OrderedDict({"": {"version": 1}})
    assert load_into(Versioned(2, 1), state, assign=True).loaded
    assert Versioned.seen == 1
    assert state._metadata == {"": {"version": 1}}


def test_many_keys_are_said_in_a_line():
    many = {f"layers.{at}.w": torch.zeros(1) for at in range(1000)}
    assert load_into(nn.Linear(1, 1, bias=False), many).error == "missing: weight; unexpected: layers.{0-999}.w ×1000"


def test_what_may_be_unexpected_is_loaded_where_the_model_has_it():
    model = nn.Linear(2, 1)
    state = {"weight": torch.ones(1, 2), "bias": torch.ones(1), "total_ops": torch.ones(1)}
    assert load_into(model, state, allow_unexpected=["bias", "total_ops"]).loaded
    assert model.bias.item() == 1


COUNTED = """
from tiedmodel import Tied

def factory():
    with open("built", "a") as stream:
        stream.write(f"{__import__('os').getpid()} ")
    return Tied()
"""


@pytest.fixture
def counted(model, state, tmp_path):
    (tmp_path / "countedmodel.py").write_text(COUNTED)
    torch.save({**state, "head.weight": state["embed.weight"]}, tmp_path / "in.pth")
    (tmp_path / "nothing.yaml").write_text("version: 1\nname: nothing\nsummary: s\nsteps:\n  - drop: nothing\n    optional: true\n")
    return lambda: (tmp_path / "built").read_text().split()


def test_a_run_builds_its_target_once(counted):
    report = api.run("nothing.yaml", "in.pth", "out.pth", target="py:countedmodel:factory")
    assert report.ladder.rungs[2].status == "passed"
    assert len(counted()) == 1


def test_a_verification_builds_its_target_once(counted):
    assert api.verify("in.pth", target_word="py:countedmodel:factory", level=2).ladder.rungs[2].status == "passed"
    assert len(counted()) == 1


def test_a_builder_that_died_meanwhile_is_started_anew(counted, tmp_path):
    with building.Builder(parse("py:countedmodel:factory", origin="command line")) as builder:
        assert len(builder.manifest()) == 7
        os.kill(int(counted()[0]), signal.SIGKILL)
        assert builder.strict_load([tmp_path / "in.pth"], "torch").loaded
        first, second = map(int, counted())
    for process in (first, second):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_what_was_loaded_into_is_not_taken_for_the_model_that_was_built(counted, tmp_path):
    with building.Builder(parse("py:countedmodel:factory", origin="command line")) as builder:
        before = builder.manifest()
        assert builder.strict_load([tmp_path / "in.pth"], "torch").loaded
        assert builder.manifest() == before
    assert len(counted()) == 2
    assert len(set(counted())) == 1


def test_a_builder_ends_with_its_object(counted):
    builder = building.Builder(parse("py:countedmodel:factory", origin="command line"))
    builder.manifest()
    del builder
    with pytest.raises(ProcessLookupError):
        os.kill(int(counted()[0]), 0)
