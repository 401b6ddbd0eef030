"""The command line as a stranger meets it: help, wrong words, and what each command says."""

import json
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
COMMANDS = ["explain", "suggest", "batch", "run", "plan", "work", "finish", "status", "inspect", "diff", "verify", "check", "test", "rules", "schema",
            "completion"]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    state = {f"module.layers.{i}.attn.qkv.weight": torch.randn(6, 2) for i in range(12)} | {"module.head.weight": torch.randn(3, 2)}
    torch.save(state, tmp_path / "in.pth")
    return tmp_path


def test_help_names_every_command_with_examples_at_its_end(process):
    top = process("--help")
    assert top.code == 0
    for command in COMMANDS:
        assert re.search(rf"^  {command}\b", top.out, re.MULTILINE)
        if command != "rules":
            text = process(command, "--help").out
            assert "Examples:" in text
            assert f"  ckptconv {command}" in text.split("Examples:")[1]


def test_version(process):
    assert re.fullmatch(r"ckptconv \d+\.\d+\.\d+\n", process("--version").out)


def test_inspect_collapses_names_to_templates(folder, cli):
    result = cli("inspect", "in.pth", cwd=folder)
    assert result.code == 0
    assert "module.layers.{0-11}.attn.qkv.weight ×12" in result.out
    assert "[6, 2] float32" in result.out
    assert "13 tensors, 150 parameters" in result.out


def test_inspect_shows_names_that_match_or_all_of_them(folder, cli):
    matching = cli("inspect", "in.pth", "--match", "module.layers.{i:int}.**", cwd=folder).out
    assert matching.count("qkv.weight") == 12
    assert "head" not in matching
    assert cli("inspect", "in.pth", "--flat", cwd=folder).out.count(".weight") == 13
    assert "layers" in cli("inspect", "in.pth", "--tree", cwd=folder).out


def test_inspect_as_json(folder, cli):
    data = cli("inspect", "in.pth", "--json", cwd=folder).json
    assert data["format"] == "torch"
    assert data["candidates"][0]["path"] == "."
    assert data["candidates"][0]["manifest"]["tensors"]["module.head.weight"] == ["float32", 3, 2]


def test_inspect_lists_every_candidate_and_what_it_skipped(tmp_path, cli):
    import argparse

    state = {"a.weight": torch.ones(2)}
    torch.save({"model": state, "ema": {"a.weight": torch.zeros(2)}, "args": argparse.Namespace(lr=1), "epoch": 3}, tmp_path / "in.pth")
    result = cli("inspect", "in.pth", cwd=tmp_path)
    assert "  model  1 tensors" in result.out
    assert "  ema  1 tensors" in result.out
    assert "skipped: args (argparse.Namespace)" in result.out


def test_diff_says_what_differs_and_exits_1(folder, cli):
    torch.save({"module.head.weight": torch.ones(4, 2), "new": torch.ones(1)}, folder / "other.pth")
    result = cli("diff", "in.pth", "other.pth", cwd=folder)
    assert result.code == 1
    assert "only in in.pth: module.layers.{0-11}.attn.qkv.weight ×12" in result.out
    assert "only in other.pth: new" in result.out
    assert "different: module.head.weight  [3, 2] float32 against [4, 2] float32" in result.out
    same = cli("diff", "in.pth", "in.pth", cwd=folder)
    assert (same.code, same.out) == (0, "the same names, shapes, dtypes and ties\n")


def test_a_saved_manifest_is_a_target_and_a_side_of_diff(folder, cli):
    assert cli("inspect", "in.pth", "--save-manifest", "m.json", cwd=folder).code == 0
    assert cli("diff", "in.pth", "m.json", cwd=folder).code == 0
    assert cli("diff", "in.pth", "m.json", "--json", cwd=folder).json["equal"] is True
    wrong = cli("plan", "dataparallel", "in.pth", "--target", "m.json", cwd=folder)
    assert wrong.code == 4
    assert "CK401" in wrong.err


def test_plan_says_bytes_lineage_and_peak(folder, cli):
    result = cli("plan", "dataparallel", "in.pth", "out.pth", cwd=folder)
    assert result.code == 0
    assert "renamed" in result.out
    assert "module.layers.{0-11}.attn.qkv.weight, module.head.weight → layers.{0-11}.attn.qkv.weight, head.weight" in result.out
    assert "peak memory" in result.out
    split = "version: 1\nname: s\nsummary: s\nsteps: [{split: {from: 'module.{m:**}.qkv.{p}', to: '{m}.{x:q|k|v}.{p}'}}]\n"
    (folder / "s.yaml").write_text(split)
    assert "600 B copied, 0 B computed" in cli("plan", "s.yaml", "in.pth", "out.pth", cwd=folder).out, (
        "rows of a tensor are copied, as a run says"
    )
    assert not (folder / "out.pth").exists()


def test_check_names_all_problems_of_all_files(tmp_path, cli):
    (tmp_path / "good.yaml").write_text("version: 1\nname: good\nsummary: s\nsteps: [{drop: a}]\n")
    (tmp_path / "bad.yaml").write_text("version: 1\nname: bad\nsummary: s\nsteps:\n  - drp: a\n  - cast: {keys: '**', dtype: float33}\n")
    result = cli("check", "good.yaml", "bad.yaml", "dataparallel", cwd=tmp_path)
    assert result.code == 1
    assert "bad.yaml:5:5" in result.err
    assert "bad.yaml:6:24" in result.err
    assert "good.yaml: right" in result.out
    assert "dataparallel: right" in result.out
    assert cli("check", ".", cwd=tmp_path).code == 1
    assert cli("check", "good.yaml", "--json", cwd=tmp_path).json == [{"rules": "good.yaml", "problems": []}]


def test_the_tests_of_rules_run_from_the_command_line(tmp_path, cli):
    head = "version: 1\nname: {}\nsummary: s\nsteps: [{{rename: {{a: b}}}}]\n"
    (tmp_path / "good.yaml").write_text(head.format("good") + "tests: [{name: t, given: {a: [1]}, expect: {b: [1]}}]\n")
    (tmp_path / "bare.yaml").write_text(head.format("bare"))
    (tmp_path / "bad.yaml").write_text(head.format("bad") + "tests: [{name: t, given: {a: [1], c: [2]}, expect: {b: [2], d: [1]}}]\n")
    assert cli("test", "good.yaml", cwd=tmp_path).out == "good.yaml: 1 tests, all pass\n"
    bare = cli("test", "bare.yaml", cwd=tmp_path)
    assert (bare.code, "a rule without a test proves nothing" in bare.err) == (1, True)
    bad = cli("test", ".", cwd=tmp_path)
    assert bad.code == 1
    assert "bad.yaml:5:9  [CK108]" in bad.err
    assert "test 't': missing: d is expected, but not made" in bad.err
    assert "test 't': noisy: c is made, but not expected" in bad.err
    assert "test 't': wrong shape: b is [1] float32, not [2] float32" in bad.err
    everything = cli("test")
    assert everything.code == 0, everything.err
    assert everything.out.count("all pass") >= 19


def test_rules_are_listed_and_shown(cli):
    listed = cli("rules", "list").out
    assert re.search(r"^dataparallel@1 +nn\.DataParallel", listed, re.MULTILINE)
    shown = cli("rules", "show", "dataparallel").out
    assert "strip_prefix: module." in shown
    assert {rule["name"] for rule in cli("rules", "list", "--json").json} >= {"dataparallel", "lightning"}


def test_schema_is_json(cli):
    assert json.loads(cli("schema").out)["title"] == "ckptconv rule file, version 1"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(cli, shell):
    assert "_CKPTCONV_COMPLETE" in cli("completion", shell).out


def test_completion_knows_the_rules(cli):
    result = cli(env={"_CKPTCONV_COMPLETE": "bash_complete", "COMP_WORDS": "ckptconv run datap", "COMP_CWORD": "2"})
    assert "dataparallel" in result.out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "dataparalel", "in.pth", "out.pth"], 2, ["CK105", "did you mean 'dataparallel'?"]),
        (["run", "dataparallel", "in.pth"], 2, ["want RULES SRC DST"]),
        (["run", "missing.yaml", "in.pth", "out.pth"], 2, ["CK105", "there is no such rule file"]),
        (["run", "dataparallel", "nothing.pth", "out.pth"], 3, ["CK310"]),
        (["run", "dataparallel", "in.pth", "out.pth", "--target", "py:nowhere:factory"], 4, ["CK406", "nowhere"]),
        (["run", "dataparallel", "in.pth", "out.pth", "--set", "H"], 2, ["CK107", "NAME=VALUE"]),
        (["run", "dataparallel", "in.pth", "out.pth", "--shard-size", "many"], 2, ["CK107"]),
        (["run", "dataparallel", "in.pth", "nowhere/out.pth"], 5, ["CK503"]),
        (["run", "torch-compile", "in.pth", "out.pth"], 2, ["CK201", "'_orig_mod'"]),
        (["run", "dataparallel", "in.pth", "out.safetensors", "--keep-extras"], 2, ["CK107", "--keep-extras"]),
        (["run", "dataparallel", "in.pth", "out.pth", "--verify", "9"], 2, ["want 0 to 6 or none"]),
        (["run", "dataparallel", "in.pth", "out.xyz"], 2, ["CK107", ".xyz says no format"]),
        (["inspect", "in.pth", "--match", "a{"], 2, ["CK103", "a `{` is never closed"]),
        (["inspect", "nothing.pth"], 3, ["CK310"]),
        (["verify", "in.pth"], 2, ["CK107", "--target"]),
        (["frobnicate"], 2, ["No such command"]),
    ],
)
def test_wrong_words_get_a_sentence_and_the_right_code(folder, cli, snapshot, arguments, code, words):
    before = snapshot(folder)
    result = cli(*arguments, cwd=folder)
    assert result.code == code, result.err + result.out
    for word in words:
        assert word in result.err
    assert "Traceback" not in result.err
    assert snapshot(folder) == before


def test_nothing_of_a_hostile_name_reaches_the_terminal(tmp_path, cli):
    from safetensors.torch import save_file

    save_file({"module.a\u202e[red]b[/red]": torch.ones(1)}, tmp_path / "in.safetensors")
    result = cli("run", "dataparallel", "in.safetensors", "out.safetensors", cwd=tmp_path)
    assert result.code == 0
    assert "\u202e" not in result.out
    assert "a\\u202e[red]b[/red]" in result.out


def test_a_stranger_in_the_working_folder_is_not_imported(folder, process):
    for module in ("yaml", "torch", "pydantic", "click"):
        (folder / f"{module}.py").write_text("import pathlib; pathlib.Path('marker').touch(); raise SystemExit(9)")
    result = process("run", "dataparallel", "in.pth", "out.pth", cwd=folder, env={"PYTHONPATH": f":{ROOT}"})
    assert result.code == 0, result.err
    assert not (folder / "marker").exists()


def test_a_closed_pipe_is_no_error(folder):
    import subprocess
    import sys

    done = subprocess.run(
        f"{sys.executable} -m ckptconv inspect in.pth --flat | head -1", shell=True, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
