import time

import pytest

from ckptconv.errors import UsageError
from ckptconv.ruleset.yamlfile import load


def problems(text):
    with pytest.raises(UsageError) as error:
        load(text if isinstance(text, bytes) else text.encode(), "r.yaml")
    return [(problem.where, problem.what, problem.found, problem.try_) for problem in error.value.problems]


def test_plain_data_with_places():
    file = load(b"a: 1\nb:\n  - x: two\n    y: 'no'\n  - [1.5, true, null, -3]\n", "r.yaml")
    assert file.data == {"a": 1, "b": [{"x": "two", "y": "no"}, [1.5, True, None, -3]]}
    assert file.where(("b", 0, "y")) == "r.yaml:4:5"
    assert file.where(("b", 1, 2)) == "r.yaml:5:17"
    assert file.where(("b", 0, "nothing")) == "r.yaml:3:5"


def test_a_byte_order_mark_is_accepted():
    assert load(b"\xef\xbb\xbfa: 1\n", "r.yaml").data == {"a": 1}


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("a: &x 1", "r.yaml:1:4", "anchors are not allowed"),
        ("a: *x", "r.yaml:1:4", "aliases are not allowed"),
        ("<<: {a: 1}", "r.yaml:1:1", "merge keys are not allowed"),
        ("a: !!python/object:os.system x", "r.yaml:1:4", "tags are not allowed"),
        ("a: !thing x", "r.yaml:1:4", "tags are not allowed"),
        ("a: 1\n---\nb: 2", "r.yaml:2:1", "a rule file holds one document"),
        ("a: 1\nb: 2\na: 3", "r.yaml:3:1", "key 'a' stands twice"),
        ("s: {a: 1, a: 2}", "r.yaml:1:11", "key 'a' stands twice"),
        ("1: a", "r.yaml:1:1", "a key must be text"),
        ("? [a]\n: b", "r.yaml:1:3", "a key must be text"),
        ("a: no", "r.yaml:1:4", "'no' means different things to different YAML readers"),
        ("a: On", "r.yaml:1:4", "'On' means different things to different YAML readers"),
        ("a: True", "r.yaml:1:4", "'True' means different things to different YAML readers"),
        ("a: 1e3", "r.yaml:1:4", "'1e3' looks like a number or a date, and YAML readers disagree on which"),
        ("a: 017", "r.yaml:1:4", "'017' looks like a number or a date, and YAML readers disagree on which"),
        ("a: 2020-01-01", "r.yaml:1:4", "'2020-01-01' looks like a number or a date, and YAML readers disagree on which"),
        ("a: 1:30", "r.yaml:1:4", "'1:30' looks like a number or a date, and YAML readers disagree on which"),
        ("a: 0x1F", "r.yaml:1:4", "'0x1F' looks like a number or a date, and YAML readers disagree on which"),
        ("a: .inf", "r.yaml:1:4", "'.inf' looks like a number or a date, and YAML readers disagree on which"),
        ("a: 'x", "r.yaml:1:6", "not YAML: found unexpected end of stream"),
        ("{a: " * 100_000, "r.yaml:1:129", "nested deeper than 32"),
        ("- " * 100_000, "r.yaml:1:65", "nested deeper than 32"),
        (b"a: \xff", "r.yaml", "a rule file is UTF-8 text"),
        ("a: 1".encode("utf-16"), "r.yaml", "a rule file is UTF-8 text"),
        (b"a" * (1 << 21), "r.yaml", "a rule file has at most 1,048,576 bytes; this one has 2,097,152"),
    ],
)  # fmt: skip
def test_a_surprise_is_an_error_with_its_place(text, where, what):
    assert problems(text)[0][:2] == (where, what)


def test_a_bomb_is_too_deep_whether_the_library_or_we_count_it():
    """libyaml 0.2.6 stops at 1,000 before its first event; older ones leave the counting to us."""
    where, what, *_ = problems("[" * 100_000)[0]
    assert what == "nested deeper than 32"
    assert where in ("r.yaml:1:33", "r.yaml:1:1001")


def test_every_problem_is_found_at_once_with_what_to_try():
    assert problems("a: no\nb: &x 1\n") == [
        (
            "r.yaml:1:4",
            "'no' means different things to different YAML readers",
            "",
            '"no" for the text, or true, false, null in lower case',
        ),
        ("r.yaml:2:4", "anchors are not allowed", "&x", "write the value out where it is used"),
    ]


def test_a_tab_gets_a_hint():
    assert problems("a:\n\tb: 1") == [
        ("r.yaml:2:1", "not YAML: found character that cannot start any token", "", "indent with spaces, not tabs")
    ]


def test_an_alias_bomb_costs_nothing():
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=False)
    )
    started = time.process_time()
    found = problems(bomb)
    assert time.process_time() - started < 1
    assert {what for _, what, _, _ in found} == {"anchors are not allowed", "aliases are not allowed"}
    assert sum(len(str(problem)) for problem in found) < 20_000
