"""The lock of a folder of rules: a rule whose meaning changed has a higher revision, or the check says so."""

import json
from pathlib import Path

import pytest

from ckptconv import rulefiles
from ckptconv.errors import UsageError
from ckptconv.ruleset import builtin, lock

ROOT = Path(__file__).parent.parent.parent


def write(folder, to="b", revision=1, more=""):
    (folder / "r.yaml").write_text(f"version: 1\nname: r\nrevision: {revision}\nsummary: s\nsteps: [{{rename: {{a: {to}}}}}]\n{more}")


def said(folder, check=True):
    return [(problem.what, problem.try_) for problem in rulefiles.lock_rules(folder, check=check).problems]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path)
    assert rulefiles.lock_rules(tmp_path).written
    return tmp_path


def test_the_committed_lock_is_current():
    assert rulefiles.lock_rules(check=True).problems == ()
    assert set(lock.read(builtin.folder())) >= set(builtin.names())


def test_the_lock_is_no_rule_and_travels_with_the_rules():
    assert "LOCK" not in builtin.names()
    assert '\n"rules" = "ckptconv/rules"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # the wheel takes the whole folder
    assert (ROOT / "rules" / lock.NAME).is_file()


def test_what_does_not_change_the_meaning_needs_no_new_revision(folder):
    write(folder, more="# a comment\ntests: [{name: t, given: {a: [1]}, expect: {b: [1]}}]\n")
    (folder / "r.test.yaml").write_text("tests: [{name: t, given: {a: [1]}, expect: {b: [1]}}]\n")
    assert said(folder) == []
    assert not rulefiles.lock_rules(folder).written


def test_a_new_meaning_under_the_old_revision_fails_and_is_not_locked(folder):
    before = (folder / lock.NAME).read_bytes()
    old = lock.read(folder)["r"].digest[:19]
    write(folder, "c")
    for check in (True, False):
        ((what, hint),) = said(folder, check)
        assert what.startswith(f"the meaning of rule 'r' changed, but its revision is still 1: {old}… became sha256:")
        assert hint == "raise revision to 2, then run ckptconv rules lock"
    assert (folder / lock.NAME).read_bytes() == before


def test_a_higher_revision_is_locked_and_the_old_one_stays_listed(folder):
    first = lock.read(folder)["r"]
    write(folder, "c", 2)
    ((what, hint),) = said(folder)
    assert what.startswith("rule 'r' has revision 2 (sha256:")
    assert hint == "run ckptconv rules lock"
    assert rulefiles.lock_rules(folder).written
    assert said(folder) == []
    second = lock.read(folder)["r"]
    assert second.revision == 2
    assert second.history == {"1": first.digest, "2": second.digest}
    assert second.digest != first.digest


def test_a_revision_never_goes_back(folder):
    write(folder, "c", 2)
    rulefiles.lock_rules(folder)
    write(folder, "b", 1)
    assert "rule 'r' went back from revision 2" in said(folder, check=False)[0][0]
    write(folder, "d", 1)
    assert "rule 'r' went back to revision 1, which meant sha256:" in said(folder, check=False)[0][0]


def test_a_rule_that_the_lock_does_not_know_fails_the_check(folder):
    (folder / "new.yaml").write_text("version: 1\nname: new\nsummary: s\nsteps: [{drop: a}]\n")
    assert said(folder) == [("rule 'new' is not in the lock", "run ckptconv rules lock")]
    assert rulefiles.lock_rules(folder).written
    assert said(folder) == []


def test_a_name_that_is_gone_stays_taken(folder):
    (folder / "new.yaml").write_text("version: 1\nname: new\nsummary: s\nsteps: [{drop: a}]\n")
    rulefiles.lock_rules(folder)
    (folder / "new.yaml").unlink()
    assert said(folder) == []
    rulefiles.lock_rules(folder)
    assert set(lock.read(folder)) == {"new", "r"}


@pytest.mark.parametrize("text", ["[]", "{", '{"r": {"revision": 0}}', '{"r": 1}'])
def test_a_file_that_is_no_lock_is_refused(folder, text):
    (folder / lock.NAME).write_text(text)
    with pytest.raises(UsageError, match="this is no lock of rules"):
        rulefiles.lock_rules(folder)
    assert (folder / lock.NAME).read_text() == text


def test_from_the_command_line(folder, cli):
    assert cli("rules", "lock", ".", "--check", cwd=folder).out == "LOCK.json: 1 rules as they are locked\n"
    write(folder, "c")
    result = cli("rules", "lock", ".", cwd=folder)
    assert (result.code, "CK109" in result.err) == (1, True)
    write(folder, "c", 2)
    assert cli("rules", "lock", ".", "--check", "-q", cwd=folder).code == 1
    assert cli("rules", "lock", ".", "--json", cwd=folder).json["written"] is True
    assert json.loads((folder / lock.NAME).read_text())["r"]["revision"] == 2
    assert cli("rules", "lock", "--check").code == 0
