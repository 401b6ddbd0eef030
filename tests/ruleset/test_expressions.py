import pytest

from ckptconv.errors import Refusal
from ckptconv.ruleset.expressions import Absent, evaluate, parse

VALUES = {"H": 12, "hidden": 768, "config": {"num_heads": 4, "none": None}, "t": [3, 1, 2], "x": "k"}


def lookup(name):
    if name == "shape":
        return lambda key: {"w": [6, 10]}[key]
    if name == "has":
        return lambda key: key == "w"
    if name not in VALUES:
        raise Absent(f"variable {name!r} has no value")
    return VALUES[name]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2 * 3", 7), ("(1 + 2) * 3", 9), ("7 // 2", 3), ("7 % 4", 3), ("-3 + 1", -2), ("10 - 3 - 2", 5), ("--3", 3),
        ("hidden // H", 64), ("config.num_heads", 4), ("config['num_heads']", 4), ("t[1]", 1), ("t[-1]", 2),
        ("{'q': H, 'k': 4}[x]", 4), ("1 if H > 10 else 2", 1), ("H == 12 and not false", True), ("H < 3 or x == 'k'", True),
        ("3 in t", True), ("5 not in t", True), ("'ab' + 'c'", "abc"), ("[1] + [2]", [1, 2]), ("len(t)", 3), ("max(t)", 3), ("min(4, 2)", 2),
        ("first(config.missing, 7)", 7), ("first(config.none, config.num_heads)", 4), ("first(nothing, 1)", 1),
        ("shape('w')[0]", 6), ("has('w')", True), ("has('v')", False), ("count_below(t, 3)", 2), ("not not true", True), ("null == null", True),
        ("1 if true else 2 if true else 3", 1),
    ],
)  # fmt: skip
def test_arithmetic(text, value):
    assert evaluate(parse(text), lookup) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9**9", "unexpected '**'; `**` does not exist here"),
        ("1 / 2", "unexpected '/'; use // for division"),
        ("1 +", "the expression ends too early"),
        ("(1", "expected ')'"),
        ("a b", "unexpected 'b'"),
        ("__import__('os')", "there is no function '__import__' (there are by_name, count_below, first, has, len, max, min, shape)"),
        ("99999999999999999999", "an integer must fit into 64 bits"),
        ("a @ b", "'@' cannot stand in an expression"),
        ("(" * 40 + "1" + ")" * 40, "an expression nests at most 32 deep"),
        ("1" + "+1" * 600, "an expression has at most 1,024 characters; this one has 1,201"),
        ("lambda: 1", "unexpected ':'"),
    ],
)
def test_what_does_not_parse_says_why(text, message):
    with pytest.raises(Refusal) as refusal:
        parse(text)
    assert (refusal.value.code, refusal.value.what) == ("CK104", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "variable 'nothing' has no value"),
        ("config.nothing", "there is no 'nothing' (there are num_heads, none)"),
        ("1 // 0", "division by zero"),
        ("9223372036854775807 * 9", "a result must fit into 64 bits"),
        ("'a' * 9", "`*` takes integers"),
        ("true + 1", "`+` takes integers"),
        ("t[9]", "index 9 is outside a list of 3"),
        ("x.upper", "'upper' cannot be looked up in 'k'"),
        ("first(nothing)", "none of first()'s arguments has a value"),
    ],
)
def test_what_has_no_value_says_why(text, message):
    with pytest.raises(Refusal) as refusal:
        evaluate(parse(text), lookup)
    assert (refusal.value.code, refusal.value.what) == ("CK104", message)


def test_what_is_no_function_is_not_called():
    with pytest.raises(Refusal) as refusal:
        evaluate(parse("shape('w')"), lambda _name: 3)
    assert (refusal.value.code, refusal.value.what) == ("CK104", "shape is a variable here, and cannot be called")
