"""Tests that rules carry: what they find, how they say it, where they stand, and how they are rewritten."""

import pytest
from msgspec.structs import replace

from ckptconv import rulefiles, ruletests
from ckptconv.errors import UsageError
from ckptconv.ruleset.model import load, parse
from ckptconv.ruletests import problems, run_tests
from ckptconv.transforms import Rearrange

HEAD = "version: 1\nname: r\nsummary: s\n"


def outcomes(steps, tests):
    return run_tests(parse(f"{HEAD}steps:\n{steps}\ntests:\n{tests}\n".encode(), "r.yaml"))


def said(steps, tests):
    (outcome,) = outcomes(steps, tests)
    return [str(failure) for failure in outcome.failures]


RENAME = "- rename: {'l.{i:int}.a': 'l.{i}.b'}"


def test_the_kinds_of_failure_are_sentences_with_collapsed_names():
    given = ", ".join(f"l.{i}.a: [2, 3], l.{i}.x: [1], l.{i}.y: [1]" for i in range(3))
    expect = ", ".join(f"l.{i}.b: [3, 2], l.{i}.z: [1], l.{i}.y: {{shape: [1], dtype: int64}}" for i in range(3))
    assert said(RENAME, f"- {{name: t, given: {{{given}}}, expect: {{{expect}}}}}") == [
        "missing: l.{0-2}.z ×3 are expected, but not made",
        "noisy: l.{0-2}.x ×3 are made, but not expected",
        "wrong shape: l.{0-2}.b ×3 are [2, 3] float32, not [3, 2] float32",
        "wrong dtype: l.{0-2}.y ×3 are [1] float32, not [1] int64",
    ]


@pytest.mark.parametrize(
    ("test", "sentence"),
    [
        ("refuses: CK208", "refused: CK208 is expected, but the rule refuses with CK201: "),
        ("expect: {b: [1]}", "refused: the rule refuses what it should convert with CK201: "),
    ],
)
def test_another_refusal_than_expected_is_said(test, sentence):
    assert said(RENAME, f"- {{name: t, given: {{x: [1]}}, {test}}}")[0].startswith(sentence)


def test_a_conversion_that_must_be_refused_and_a_test_that_wants_nothing():
    assert said(RENAME, "- {name: t, given: {l.0.a: [1]}, refuses: CK201}") == [
        "not refused: the rule must refuse this with CK201, but converts it"
    ]
    assert said(RENAME, "- {name: t, given: {l.0.a: [1]}}") == ["no expectation: a test says what it wants: expect or refuses"]


def test_a_rule_that_changes_its_own_result_fails():
    assert said("- add_prefix: {prefix: m., keys: '**'}", "- {name: t, given: {a: [1]}, expect: {m.a: [1]}}") == [
        "second run: the rule changes its own result: m.a, m.m.a"
    ]


def test_what_is_dropped_cut_or_computed_need_not_come_back():
    steps = (
        "- drop: {keys: d, optional: true}\n- slice: {keys: s, stop: 2, dim: 0}\n- cast: {keys: c, dtype: float16}\n- rename: {r: q}\n"
        "- check: {keys: s, shape: [2]}"
    )
    given = "{d: [2], s: [5], c: [3], r: [2]}"
    made = "{s: [2], c: {shape: [3], dtype: float16}, q: [2]}"
    assert said(steps, f"- {{name: t, given: {given}, expect: {made}}}") == []


def test_a_step_that_cannot_be_undone_though_it_only_moves_fails(monkeypatch):
    plain = Rearrange.recover
    steps = "- rearrange: {keys: w, pattern: 'i o -> o i'}\n- rename: {w: v}"
    test = "- {name: t, given: {w: [2, 3], u: [4]}, expect: {v: [3, 2], u: [4]}}"
    assert said(steps, test) == []
    # The way back forgets to turn: the shape of what comes back is another.
    monkeypatch.setattr(Rearrange, "recover", lambda self, *specs: tuple(replace(piece, back=None) for piece in plain(self, *specs)))
    assert said(steps, test) == ["inverse: w would come back as [3, 2] float32, not [2, 3] float32"]


def test_a_tensor_that_vanishes_without_a_step_that_takes_it_fails(monkeypatch):
    from ckptconv import invert as inverting

    def forgetful(plan):
        found = inverting.invert(plan)
        first = found.plan.outputs[0]
        lost = (*found.lost, inverting.Lost(first.name, "no output holds all of it"))
        return inverting.Inversion(replace(found.plan, outputs=found.plan.outputs[1:]), lost)

    monkeypatch.setattr(ruletests, "invert", forgetful)
    assert said(RENAME, "- {name: t, given: {l.0.a: [1], c: [1]}, expect: {l.0.b: [1], c: [1]}}") == [
        "inverse: l.0.a cannot be had back, though no step drops, cuts or computes it lossily: no output holds all of it"
    ]


def test_a_rule_without_a_test_fails():
    rules = parse(f"{HEAD}steps: [{{drop: a}}]\n".encode(), "r.yaml")
    assert [problem.what for problem in problems(rules, run_tests(rules))] == [
        "test '(no test)': no test: a rule without a test proves nothing: add `tests:`"
    ]


def test_todo_may_fail_and_must():
    gap, passing = outcomes(
        RENAME,
        "- {name: gap, given: {l.0.a: [1]}, expect: {c: [1]}, todo: true}\n"
        "- {name: done, given: {l.0.a: [1]}, expect: {l.0.b: [1]}, todo: true}",
    )
    assert (gap.passed, passing.passed) == (True, False)
    (problem,) = problems(parse(f"{HEAD}steps:\n{RENAME}\n".encode(), "r.yaml"), [gap, passing])
    assert problem.what == "test 'done': todo: the test passes now: take todo away"
    assert problem.where == "r.yaml:8:3"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "r.yaml").write_text(f"{HEAD}steps: [{{rename: {{a: b}}}}]\n")
    return tmp_path


def test_tests_may_stand_beside_the_rule_and_in_it(folder):
    beside = "tests:\n  - {name: beside, given: {a: [2]}, expect: {b: [3]}}\n"
    (folder / "r.test.yaml").write_text(beside)
    with (folder / "r.yaml").open("a") as stream:
        stream.write("tests: [{name: inside, given: {a: [1]}, expect: {b: [1]}}]\n")
    rules = load(folder / "r.yaml", shown="x/r.yaml")
    assert [outcome.name for outcome in run_tests(rules)] == ["inside", "beside"]
    (problem,) = problems(rules, run_tests(rules))
    assert problem.where == "x/r.test.yaml:2:5"
    digest = rules.digest
    (folder / "r.test.yaml").unlink()
    assert load(folder / "r.yaml").digest == digest


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("tests:\n  - {name: t, givn: {a: [1]}}\n", "2:15", "unknown field 'givn'"),
        ("tests:\n  - {name: t, given: {a: [-1]}}\n", "2:23", "want [sizes] or {shape: [sizes], dtype: NAME}"),
        ("more: 1\ntests: [{name: t, given: {a: [1]}}]\n", "1:1", "unknown field 'more'"),
        ("tests: []\n", "1:1", "tests: list should have at least 1 item"),
        ("tests: all\n", "1:1", "tests: input should be a valid list"),
        ("tests: &x []\n", "1:8", "anchors are not allowed"),
    ],
)
def test_a_test_file_is_validated_like_a_rule_file(folder, cli, text, where, what):
    (folder / "r.test.yaml").write_text(text)
    for command in ("check", "test"):
        result = cli(command, "r.yaml", cwd=folder)
        assert result.code == 1
        assert f"r.test.yaml:{where}  [CK10" in result.err
        assert what in result.err


def test_tests_without_their_rule_are_an_error_and_a_test_file_stands_for_its_rule(folder, cli):
    (folder / "r.test.yaml").write_text("tests: [{name: t, given: {a: [1]}, expect: {b: [1]}}]\n")
    assert cli("test", "r.test.yaml", "r.yaml", cwd=folder).out == "r.yaml: 1 tests, all pass\n"
    (folder / "lost.test.yaml").write_text("tests: [{name: t, given: {a: [1]}, expect: {b: [1]}}]\n")
    for command in ("check", "test"):
        result = cli(command, ".", cwd=folder)
        assert result.code == 1
        assert "tests without their rule: there is no lost.yaml beside them" in result.err


def test_todo_is_reported_and_does_not_fail_the_run(folder, cli):
    (folder / "r.test.yaml").write_text(
        "tests:\n  - {name: t, given: {a: [1]}, expect: {b: [1]}}\n  - {name: gap, given: {a: [1]}, expect: {c: [1]}, todo: true}\n"
    )
    result = cli("test", "r.yaml", cwd=folder)
    assert result.code == 0
    assert "r.yaml: todo: gap: missing: c is expected, but not made\n" in result.out
    assert "r.yaml: 2 tests, all pass but 1 todo\n" in result.out
    (report,) = cli("test", "r.yaml", "--json", cwd=folder).json
    assert (report["tests"], report["failed"], len(report["todo"])) == (2, 0, 1)


# --- update ------------------------------------------------------------------------------------------------------------------------------

REWRITTEN = [
    # a block: the value changes, a line goes (its comment stays), a line comes, all comments stay
    (
        "tests:\n  # about t\n  - name: t  # its name\n    given: {a: [4, 2], x: [1], c: {shape: [], dtype: int64}}\n    expect:  # what is made\n"
        "      b: [4, 3]   # a weight\n      old: [1]  # was here once\n      older: [1]\n      # the rest\n      c: {shape: [], dtype: int32}  # counter\n"
        "\n    # done\n  - {name: other, given: {a: [1]}, expect: {b: [1]}}  # stays\n",
        "tests:\n  # about t\n  - name: t  # its name\n    given: {a: [4, 2], x: [1], c: {shape: [], dtype: int64}}\n    expect:  # what is made\n"
        "      b: [4, 2]   # a weight\n      # was here once\n      # the rest\n      c: {shape: [], dtype: int64}  # counter\n      \"y\": [1]\n"
        "\n    # done\n  - {name: other, given: {a: [1]}, expect: {b: [1]}}  # stays\n",
    ),
    # flow, of any shape
    ("tests: [{name: t, given: {a: [2]}, expect: {b: [3]}}]\n", "tests: [{name: t, given: {a: [2]}, expect: {b: [2]}}]\n"),
    ("tests: [{name: t, given: {a: [2]}, expect: {c: [2]}}]", "tests: [{name: t, given: {a: [2]}, expect: {b: [2]}}]"),
    (
        "tests: [{name: t, given: {a: [2], c: [1]}, expect: {b: [2], d: [9]}}]\n",
        "tests: [{name: t, given: {a: [2], c: [1]}, expect: {b: [2], c: [1]}}]\n",
    ),
    (
        "tests: [{name: t, given: {a: [2], c: [1]}, expect: {d: [9], e: [8], b: [2], c: [1], f: []}}]\n",
        "tests: [{name: t, given: {a: [2], c: [1]}, expect: {b: [2], c: [1]}}]\n",
    ),
    (
        "tests:\n- name: t\n  given: {a: [2], c: [1]}\n  expect: {\n    d: [9],  # nine, at first\n    b: [3],  # three\n    # none\n  }\n",
        "tests:\n- name: t\n  given: {a: [2], c: [1]}\n  expect: {\n     # nine, at first\n    b: [2], c: [1],  # three\n    # none\n  }\n",
    ),
    (
        "tests:\n- name: t\n  given: {a: [2]}\n  expect: {b: [3],  # three\n    d: [9]}\n",
        "tests:\n- name: t\n  given: {a: [2]}\n  expect: {b: [2] # three\n    }\n",
    ),
    # same, nothing, an empty value
    ("tests: [{name: t, given: {a: [2]}, expect: same}]\n", "tests: [{name: t, given: {a: [2]}, expect: {b: [2]}}]\n"),
    ("tests: [{name: t, given: {a: [2]}}]\n", "tests: [{name: t, given: {a: [2]}, expect: {b: [2]}}]\n"),
    (
        "tests:\n  - name: t\n    expect: same  # as it was\n    given: {a: [2]}\n",
        "tests:\n  - name: t\n    expect: {b: [2]}  # as it was\n    given: {a: [2]}\n",
    ),
    (
        "tests:\n  - name: t\n    given:\n      a: [2]  # two\n    # the end\n",
        "tests:\n  - name: t\n    given:\n      a: [2]  # two\n    expect: {b: [2]}\n    # the end\n",
    ),
    ("tests:\n  - name: t\n    given: {a: [2]}\n    expect:\n", "tests:\n  - name: t\n    given: {a: [2]}\n    expect: {b: [2]}\n"),
    # specs in a block, dtypes that come and go
    (
        "tests:\n  - name: t\n    given: {a: {shape: [2], dtype: int64}, x: [3]}\n    expect:\n      b:\n        shape: [2]  # two\n      y: {shape: [3], dtype: int8}",
        "tests:\n  - name: t\n    given: {a: {shape: [2], dtype: int64}, x: [3]}\n    expect:\n      b:\n        shape: [2]  # two\n        dtype: int64\n"
        "      y: {shape: [3], dtype: float32}",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), REWRITTEN)
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_an_update_rewrites_the_expectation_and_nothing_else(folder, before, after, beside, newline):
    steps = f"{HEAD}# first\nsteps:  # all\n  - {{rename: {{a: b, x: 'y'}}}}\n"
    rule, tests = folder / "r.yaml", folder / ("r.test.yaml" if beside else "r.yaml")
    rule.write_bytes(steps.replace("\n", newline).encode())
    head = "" if beside else steps
    tests.write_bytes((head + before).replace("\n", newline).encode())
    (report,) = rulefiles.rule_tests([rule], update=True)
    assert tests.read_bytes().decode() == (head + after).replace("\n", newline)
    assert (report.changed, report.problems) == (("t",), ())
    assert rulefiles.check([rule]) == [(str(rule), ())]
    assert rulefiles.rule_tests([rule], update=True)[0].changed == ()


def test_an_update_says_what_it_changed_and_leaves_what_is_right(folder, cli):
    right = "tests: [{name: t, given: {a: [1]}, expect: {b: [1]}}]\n"
    (folder / "good.yaml").write_text("version: 1\nname: good\nsummary: s\nsteps: [{rename: {a: b}}]\n" + right)
    before = (folder / "good.yaml").stat()
    (folder / "r.test.yaml").write_text("tests: [{name: one, given: {a: [1]}, expect: same}]\n")
    result = cli("test", "--update", ".", cwd=folder)
    assert (result.code, result.err) == (0, "")
    assert "r.yaml: the expectation of 'one' was rewritten\n" in result.out
    assert (folder / "good.yaml").stat().st_mtime_ns == before.st_mtime_ns
    assert cli("test", ".", cwd=folder).code == 0


@pytest.mark.parametrize(
    ("tests", "what"),
    [
        ("- {name: bad, given: {z: [1]}, expect: same}\n  - {name: t, given: {a: [1]}, expect: same}", "nothing is rewritten, because it cannot be planned"),
        ("- {name: bad, given: {a: [1]}, refuses: CK201}", "the rule must refuse this with CK201"),
        ("- {name: bad, given: {a: [1]}, expect: {b: [1]}, todo: true}", "take todo away"),
        ("- {name: bad, given: {a: [1]}, expect: {b: [\n      2,  # two\n    ]}}", "change this expectation by hand"),
    ],
)  # fmt: skip
def test_an_update_refuses_what_it_must_not_decide(folder, cli, snapshot, tests, what):
    (folder / "r.test.yaml").write_text(f"tests:\n  {tests}\n")
    before = snapshot(folder)
    result = cli("test", "r.yaml", "--update", cwd=folder)
    assert result.code == 1
    assert what in result.err
    assert snapshot(folder) == before


def test_a_todo_test_that_fails_is_not_rewritten(folder, snapshot):
    (folder / "r.test.yaml").write_text("tests: [{name: gap, given: {a: [1]}, expect: {c: [1]}, todo: true}]\n")
    before = snapshot(folder)
    (report,) = rulefiles.rule_tests([folder / "r.yaml"], update=True)
    assert (report.changed, report.problems, len(report.todo)) == ((), (), 1)
    assert snapshot(folder) == before


def test_built_in_rules_are_never_rewritten(folder, cli, monkeypatch, snapshot):
    assert "--update leaves built-in rules as they are" in cli("test", "dataparallel", "--update").err
    bare = cli("test", "--update")
    assert (bare.code, "none is named" in bare.err) == (2, True)
    from ckptconv.ruleset import builtin

    monkeypatch.setattr(builtin, "is_installed", lambda path: path.is_relative_to(folder))
    (folder / "r.test.yaml").write_text("tests: [{name: one, given: {a: [1]}, expect: same}]\n")
    before = snapshot(folder)
    (report,) = rulefiles.rule_tests([folder / "r.yaml"], update=True)
    assert "--update leaves built-in rules as they are" in report.problems[0].what
    assert snapshot(folder) == before


def test_nothing_is_written_when_the_text_does_not_say_what_was_meant(folder, monkeypatch, snapshot):
    from ckptconv.ruleset import rewriting

    monkeypatch.setattr(rewriting, "_spec", lambda spec: "[99]")
    (folder / "r.test.yaml").write_text("tests: [{name: one, given: {a: [1]}, expect: same}]\n")
    before = snapshot(folder)
    with pytest.raises(UsageError, match="change it by hand"):
        rewriting.rewritten(folder / "r.test.yaml", {0: run_tests(load(folder / "r.yaml"))[0].made})
    assert snapshot(folder) == before
