"""The hooks that are offered to pre-commit: they load, and their entries do what they say on a rule file."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
HOOKS = {hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))}
GOOD = "version: 1\nname: mine\nsummary: s\nsteps: [{rename: {a: b}}]\ntests: [{name: t, given: {a: [1]}, expect: {b: [1]}}]\n"


def test_there_are_two_hooks_and_pre_commit_can_run_them():
    assert set(HOOKS) == {"ckptconv-check", "ckptconv-test"}
    for hook in HOOKS.values():
        assert set(hook) <= {"id", "name", "entry", "language", "files", "types"}
        assert hook["language"] == "python"


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_a_hook_takes_rule_files_and_their_tests_and_nothing_else(hook):
    wanted = re.compile(hook["files"])
    assert all(wanted.search(name) for name in ("rules/mine.yaml", "a/rules/b/mine.yaml", "rules/mine.test.yaml"))
    assert not any(wanted.search(name) for name in ("config.yaml", "myrules/a.yaml", "rules/LOCK.json"))


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_a_hook_passes_a_good_rule_and_fails_a_bad_one(tmp_path, cli, hook):
    program, *words = shlex.split(hook["entry"])
    assert program == "ckptconv"
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "mine.yaml").write_text(GOOD)
    (tmp_path / "rules" / "mine.test.yaml").write_text("tests: [{name: beside, given: {a: [1]}, expect: {b: [1]}}]\n")
    good = cli(*words, "rules/mine.test.yaml", "rules/mine.yaml", cwd=tmp_path)
    assert good.code == 0, good.err
    (tmp_path / "rules" / "mine.yaml").write_text(GOOD.replace("rename:", "renam:"))
    assert cli(*words, "rules/mine.yaml", cwd=tmp_path).code == 1
