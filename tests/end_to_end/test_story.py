"""The questions that people ask, from the error on their screen to the answer of one command."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

NET = """
import torch.nn as nn


class Net(nn.Module):
    def __init__(self, out=6):
        super().__init__()
        self.body = nn.Linear(4, 10)
        self.head = nn.Linear(10, out)

    def forward(self, x):
        return self.head(self.body(x).relu())


def net():
    return Net()
"""


class Net(nn.Module):
    def __init__(self, out=6):
        super().__init__()
        self.body = nn.Linear(4, 10)
        self.head = nn.Linear(10, out)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "nets.py").write_text(NET)
    return tmp_path


def write_rules(folder, steps, more=""):
    (folder / "mine.yaml").write_text(f"version: 1\nname: mine\nsummary: s\n{more}steps:\n{steps}\n")
    return "mine.yaml"


def test_data_parallel_loads_after_one_command(folder, cli):
    torch.manual_seed(0)
    wrapped = nn.DataParallel(Net())
    torch.save(wrapped.state_dict(), folder / "in.pth")
    result = cli("run", "dataparallel", "in.pth", "out.pth", "--target", "py:nets:net", "--report", "report.json", cwd=folder)
    assert (result.code, result.err) == (0, "")
    model = Net()
    model.load_state_dict(torch.load(folder / "out.pth", weights_only=True, mmap=True), strict=True)
    for name, value in wrapped.module.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    report = json.loads((folder / "report.json").read_text())
    assert report["verification"]["reached"] == "L0 L1 L2 L3"
    assert report["rules"]["rules"] == "dataparallel@1"
    assert "module.body.weight" in result.out
    assert "L2 ok" in result.out


def test_a_changed_layer_names_both_sizes_and_writes_nothing(folder, cli, snapshot):
    torch.save(nn.DataParallel(Net(out=5)).state_dict(), folder / "in.pth")
    before = snapshot(folder)
    result = cli("run", "dataparallel", "in.pth", "out.pth", "--target", "py:nets:net", cwd=folder)
    assert result.code == 4
    assert "head.weight" in result.err
    assert "[5, 10]" in result.err
    assert "[6, 10]" in result.err
    assert "CK403" in result.err
    assert {name: data for name, data in snapshot(folder).items() if "__pycache__" not in name} == before


def test_missing_keys_are_named(folder, cli):
    state = nn.DataParallel(Net()).state_dict()
    del state["module.head.bias"]
    torch.save(state, folder / "in.pth")
    result = cli("run", "dataparallel", "in.pth", "out.pth", "--target", "py:nets:net", cwd=folder)
    assert result.code == 4
    assert "CK401" in result.err
    assert "head.bias" in result.err
    assert not (folder / "out.pth").exists()


def test_unexpected_keys_are_named(folder, cli):
    state = nn.DataParallel(Net()).state_dict()
    state["module.extra.weight"] = torch.ones(3)
    torch.save(state, folder / "in.pth")
    result = cli("run", "dataparallel", "in.pth", "out.pth", "--target", "py:nets:net", cwd=folder)
    assert result.code == 4
    assert "CK402" in result.err
    assert "extra.weight" in result.err


def test_a_partial_load_is_allowed_only_by_name_and_says_what_stays_random(folder, cli):
    state = Net(out=5).state_dict()
    torch.save(state, folder / "in.pth")
    steps = "  - drop: {keys: 'head.{p}', reason: other classes}"
    rules = write_rules(folder, steps, more="target: {allow: {missing: ['head.{p}']}}\n")
    result = cli("run", rules, "in.pth", "out.pth", "--target", "py:nets:net", cwd=folder)
    assert (result.code, result.err) == (0, "")
    assert "stay at their initial values" in result.out
    assert "head.weight" in result.out
    assert "66 elements" in result.out
    assert list(torch.load(folder / "out.pth")) == ["body.weight", "body.bias"]
    stricter = write_rules(folder, steps)
    assert cli("run", stricter, "in.pth", "out2.pth", "--target", "py:nets:net", cwd=folder).code == 4


def test_nothing_is_overwritten_without_force(folder, cli):
    torch.save({"module.a": torch.ones(2)}, folder / "in.pth")
    (folder / "out.pth").write_bytes(b"precious")
    result = cli("run", "dataparallel", "in.pth", "out.pth", cwd=folder)
    assert result.code == 5
    assert "CK501" in result.err
    assert "--force" in result.err
    assert (folder / "out.pth").read_bytes() == b"precious"
    assert cli("run", "dataparallel", "in.pth", "out.pth", "--force", cwd=folder).code == 0
    assert list(torch.load(folder / "out.pth")) == ["a"]


@pytest.mark.parametrize("destination", ["in.pth", "./in.pth", "link.pth"])
def test_the_source_is_never_the_destination(folder, cli, destination):
    torch.save({"module.a": torch.ones(2)}, folder / "in.pth")
    (folder / "link.pth").hardlink_to(folder / "in.pth")
    before = (folder / "in.pth").read_bytes()
    result = cli("run", "dataparallel", "in.pth", destination, "--force", cwd=folder)
    assert result.code == 2
    assert "CK502" in result.err
    assert (folder / "in.pth").read_bytes() == before


def test_a_training_checkpoint_says_what_it_leaves_behind_or_keeps_it(folder, cli):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    model.head(model.body(torch.ones(1, 4))).sum().backward()
    optimizer.step()
    wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": wrapped, "optimizer": optimizer.state_dict()}, folder / "in.ckpt")
    result = cli("run", "dataparallel", "in.ckpt", "out.pth", cwd=folder)
    assert result.code == 0
    assert "left behind: epoch" in result.out
    assert "left behind: optimizer" in result.out
    assert list(torch.load(folder / "out.pth")) == list(model.state_dict())
    assert cli("run", "dataparallel", "in.ckpt", "all.pth", "--keep-extras", cwd=folder).code == 0
    kept = torch.load(folder / "all.pth", weights_only=True)
    assert list(kept) == ["epoch", "state_dict", "optimizer"]
    assert kept["epoch"] == 3
    assert list(kept["state_dict"]) == list(model.state_dict())
    moment = optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(kept["optimizer"]["state"][0]["exp_avg"], moment)
    assert kept["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]


def test_two_state_dicts_are_a_question_and_not_a_guess(folder, cli):
    state = {"a.weight": torch.ones(2, 2)}
    torch.save({"model": state, "ema": {"a.weight": torch.zeros(2, 2)}}, folder / "in.pth")
    rules = write_rules(folder, "  - rename: {a.weight: b.weight}")
    result = cli("run", rules, "in.pth", "out.pth", cwd=folder)
    assert result.code == 3
    assert "CK309" in result.err
    assert "model" in result.err
    assert "ema" in result.err
    assert cli("run", rules, "in.pth", "out.pth", "--select", "ema", cwd=folder).code == 0
    assert torch.equal(torch.load(folder / "out.pth")["b.weight"], torch.zeros(2, 2))


def test_a_saved_plan_runs_and_refuses_another_source(folder, cli):
    torch.save({"module.a": torch.ones(2)}, folder / "in.pth")
    assert cli("plan", "dataparallel", "in.pth", "--out", "plan.json", cwd=folder).code == 0
    assert cli("run", "--plan", "plan.json", "in.pth", "out.pth", cwd=folder).code == 0
    assert list(torch.load(folder / "out.pth")) == ["a"]
    torch.save({"module.a": torch.ones(3)}, folder / "in.pth")
    result = cli("run", "--plan", "plan.json", "in.pth", "out2.pth", cwd=folder)
    assert result.code == 3
    assert "CK311" in result.err
    assert not (folder / "out2.pth").exists()


def test_a_dry_run_writes_nothing(folder, cli, snapshot):
    torch.save({"module.a": torch.ones(2)}, folder / "in.pth")
    before = snapshot(folder)
    result = cli("run", "dataparallel", "in.pth", "out.pth", "--dry-run", cwd=folder)
    assert result.code == 0
    assert "nothing written" in result.out
    assert snapshot(folder) == before


def test_errors_are_json_for_programs(folder, cli):
    result = cli("run", "dataparallel", "nothing.pth", "out.pth", "--json", cwd=folder)
    assert result.code == 3
    assert result.json["exit_code"] == 3
    assert result.json["problems"][0]["code"] == "CK310"


def test_verify_proves_what_is_already_there_and_finds_a_flipped_value(folder, cli):
    torch.manual_seed(0)
    torch.save(nn.DataParallel(Net()).state_dict(), folder / "in.pth")
    assert cli("run", "dataparallel", "in.pth", "out.pth", cwd=folder).code == 0
    good = cli("verify", "out.pth", "--target", "py:nets:net", "--against", "in.pth", "--rules", "dataparallel", cwd=folder)
    assert (good.code, good.err) == (0, "")
    assert "verified L0 L1 L2 L3" in good.out
    state = torch.load(folder / "out.pth")
    state["body.weight"][0, 0] += 1
    torch.save(state, folder / "bad.pth")
    bad = cli("verify", "bad.pth", "--against", "in.pth", "--rules", "dataparallel", cwd=folder)
    assert bad.code == 4
    assert "body.weight" in bad.out


def test_verify_knows_the_rules_and_the_revision_that_a_file_recorded(folder, cli):
    torch.save({"module.a": torch.ones(2)}, folder / "in.pth")
    assert cli("run", "dataparallel", "in.pth", "out.pth", cwd=folder).code == 0
    (folder / "dataparallel@1").write_text("a file of this name is not the rule")
    good = cli("verify", "out.pth", "--against", "in.pth", cwd=folder)
    assert (good.code, good.err) == (0, "")
    assert good.out.startswith("dataparallel@1  ")
    assert "verified L0 L1 L3" in good.out
    other = cli("verify", "out.pth", "--against", "in.pth", "--rules", "ddp", cwd=folder)
    assert other.code == 0
    assert "the file was made by dataparallel@1, and is compared by ddp@1" in other.out


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        (
            ("dataparallel@9", "sha256:0"),
            "error: out.safetensors  [CK105]\n  the built-in rule 'dataparallel' has revision 1, not 9\n  try: --rules RULES\n",
        ),
        (
            ("mine@1", "sha256:0"),
            "error: out.safetensors  [CK105]\n  there is no built-in rule 'mine'\n  try: --rules RULES\n",
        ),
        (
            ("dataparallel@1", "sha256:0"),
            "error: out.safetensors  [CK105]\n  it was made by dataparallel@1 with another meaning than dataparallel@1 has here\n"
            "  try: --rules RULES, with the file that it was made by\n",
        ),
        (
            None,
            "error: out.safetensors  [CK107]\n  the file does not say by which rules it was made\n  try: --rules RULES\n",
        ),
    ],
    ids=["another revision", "a rule of one's own", "another meaning", "nothing recorded"],
)
def test_verify_refuses_to_guess_the_rules(folder, cli, recorded, message):
    torch.save({"module.a": torch.ones(2)}, folder / "in.pth")
    metadata = {"ckptconv.rules": recorded[0], "ckptconv.rules_digest": recorded[1]} if recorded else None
    save_file({"a": torch.ones(2)}, folder / "out.safetensors", metadata)
    result = cli("verify", "out.safetensors", "--against", "in.pth", cwd=folder)
    assert (result.code, result.err) == (2, message)


def test_an_interrupted_run_leaves_nothing(folder, cli, snapshot):
    torch.save({"module.a": torch.ones(2)}, folder / "in.pth")
    before = snapshot(folder)
    # a disk that is full: no file may grow past 1 KiB
    limited = "import resource, signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024)); sys.argv = ['ckptconv', 'run', 'dataparallel', 'in.pth', 'out.pth']; runpy.run_module('ckptconv', run_name='__main__')"
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", limited], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert "CK503" in done.stderr
    assert snapshot(folder) == before


def test_a_rule_file_may_name_its_target_beside_it_but_no_code(folder, cli):
    torch.save(Net().state_dict(), folder / "good.pth")
    assert cli("inspect", "good.pth", "--save-manifest", "net.json", cwd=folder).code == 0
    torch.save(nn.DataParallel(Net(out=5)).state_dict(), folder / "in.pth")
    rules = write_rules(folder, "  - strip_prefix: module.", more="target: {model: net.json}\n")
    result = cli("run", rules, "in.pth", "out.pth", cwd=folder)
    assert result.code == 4
    assert "net.json  [CK403]" in result.err
    torch.save(nn.DataParallel(Net()).state_dict(), folder / "in.pth")
    assert cli("run", rules, "in.pth", "out.pth", cwd=folder).code == 0
    code = write_rules(folder, "  - strip_prefix: module.", more="target: {model: 'py:nets:net'}\n")
    refused = cli("run", code, "in.pth", "out2.pth", cwd=folder)
    assert refused.code == 2
    assert "CK106" in refused.err
    assert not (folder / "__pycache__").exists() or not list((folder / "__pycache__").glob("nets*")), "nothing was imported"


def test_what_a_format_cannot_hold_is_named_before_any_work(folder, cli):
    torch.save({"module.z": torch.ones(2, dtype=torch.complex128)}, folder / "in.pth")
    result = cli("run", "dataparallel", "in.pth", "out.safetensors", cwd=folder)
    assert result.code == 3
    assert "CK504" in result.err
    assert "z: safetensors has no complex128" in result.err
    assert cli("run", "dataparallel", "in.pth", "out.pth", cwd=folder).code == 0


def test_a_value_that_a_cast_cannot_hold_stops_everything(folder, cli):
    torch.save({"a.weight": torch.tensor([1.0, 7e4])}, folder / "in.pth")
    rules = write_rules(folder, "  - cast: {keys: '**', dtype: float16}")
    result = cli("run", rules, "in.pth", "out.pth", cwd=folder)
    assert result.code == 4
    assert "70000 overflows float16 (largest 65504)" in result.err
    assert not (folder / "out.pth").exists()


def test_a_check_looks_at_values_too(folder, cli):
    torch.save({"a.weight": torch.tensor([1.0, float("nan")])}, folder / "in.pth")
    rules = write_rules(folder, "  - check: {keys: '**', finite: true}")
    result = cli("run", rules, "in.pth", "out.pth", cwd=folder)
    assert result.code == 4
    assert "1 of 2 values are not finite" in result.err


def test_variables_come_from_the_command_line_and_from_the_config_beside_the_source(folder, cli):
    torch.save({"qkv": torch.arange(12.0).view(6, 2)}, folder / "in.pth")
    rules = write_rules(
        folder,
        "  - split: {from: qkv, to: [q, k, v], sizes: [H * 2, G, G]}",
        more="vars: {H: config.heads, G: 'first(config.groups, 1)'}\n",
    )
    missing = cli("run", rules, "in.pth", "out.pth", cwd=folder)
    assert missing.code == 2
    assert "there is no config.json beside the source; name one with --config FILE" in missing.err
    (folder / "config.json").write_text('{"heads": 2}')
    assert cli("run", rules, "in.pth", "out.pth", cwd=folder).code == 0
    assert [len(value) for value in torch.load(folder / "out.pth").values()] == [4, 1, 1]
    assert cli("run", rules, "in.pth", "out.pth", "--set", "H=1", "--set", "G=2", "--force", cwd=folder).code == 0
    assert [len(value) for value in torch.load(folder / "out.pth").values()] == [2, 2, 2]
    (folder / "other.json").write_text('{"heads": 1, "groups": 2}')
    assert cli("run", rules, "in.pth", "out.pth", "--config", "other.json", "--force", cwd=folder).code == 0
    assert [len(value) for value in torch.load(folder / "out.pth").values()] == [2, 2, 2]


def test_a_shape_that_is_allowed_by_name_is_written_and_said_to_be_unloadable(folder, cli):
    torch.save(Net(out=5).state_dict(), folder / "in.pth")
    rules = write_rules(folder, "  - rename: {'{r:**}': '{r}'}", more="target: {allow: {shape: ['head.{p}']}}\n")
    result = cli("run", rules, "in.pth", "out.pth", "--target", "py:nets:net", cwd=folder)
    assert result.code == 0, result.err
    assert "L2 –" in result.out
    assert "head.weight, head.bias" in result.out
