import time

import pytest

from ckptconv.errors import Refusal
from ckptconv.ruleset.patterns import Pattern, PatternSet, Template


@pytest.mark.parametrize(
    ("pattern", "name", "captures"),
    [
        ("a.b", "a.b", {}),
        ("a.b", "a.bc", None),
        ("a.{p}", "a.weight", {"p": "weight"}),
        ("a.{p}", "a.b.c", None),
        ("w{p}_x", "wq_x", {"p": "q"}),
        ("l.{i:int}.w", "l.10.w", {"i": 10}),
        ("l.{i:int}.w", "l.x.w", None),
        ("{m:**}.w", "w", {"m": ""}),
        ("{m:**}.w", "a.b.w", {"m": "a.b"}),
        ("{m:**}.w", "aw", None),
        ("a.{m:**}.w", "a.w", {"m": ""}),
        ("a.{m:**}.w", "a.x.y.w", {"m": "x.y"}),
        ("a.**", "a", {}),
        ("a.**", "a.b.c", {}),
        ("a.**", "ab", None),
        ("**", "x.y", {}),
        ("a.{x:q|k|v}.w", "a.k.w", {"x": "k"}),
        ("a.{x:q|k|v}.w", "a.z.w", None),
        ("a.{x:wv=v_proj|wo=o_proj}.w", "a.wo.w", {"x": "o_proj"}),
        ("a+b.{p}", "a+b.w", {"p": "w"}),
        ("a+b.{p}", "aab.w", None),
        ("{{x}}.{p}", "{x}.w", {"p": "w"}),
        (r"regex:l\.(\d+)\.(?P<x>q|k)", "l.3.k", {"1": "3", "x": "k"}),
        (r"regex:l\.(\d+)", "l.3.k", None),
        ("weight", "weight_scale_inv", None),
        ("größe.{p}", "größe.w", {"p": "w"}),
    ],
)
def test_a_pattern_matches_the_whole_name(pattern, name, captures):
    assert Pattern.parse(pattern).match(name) == captures


@pytest.mark.parametrize(
    ("template", "captures", "name"),
    [
        ("x.{p}", {"p": "w"}, "x.w"),
        ("x.{i + 1}.y", {"i": 3}, "x.4.y"),
        ("{2*i + 1}", {"i": 3}, "7"),
        ("{e // 8}.{e % 8}", {"e": 13}, "1.5"),
        ("{t[i]}", {"t": [4, 2], "i": 1}, "2"),
        ("{m}.w", {"m": ""}, "w"),
        ("a.{m}.w", {"m": ""}, "a.w"),
        ("a.{m}", {"m": ""}, "a"),
        ("{m}.w", {"m": "a.b"}, "a.b.w"),
        (r"l.\1.\g<x>", {"1": "3", "x": "k"}, "l.3.k"),
        ("{{x}}", {}, "{x}"),
        ("{'a' if i == 0 else 'b'}", {"i": 0}, "a"),
    ],
)
def test_a_template_renders(template, captures, name):
    assert Template.parse(template).render(captures.__getitem__) == name


def test_an_integer_keeps_its_zeros_where_it_is_only_copied():
    captures = Pattern.parse("l.{i:int}").match("l.007")
    assert captures == {"i": 7}
    assert Template.parse("x.{i}").render(captures.__getitem__) == "x.007"
    assert Template.parse("x.{i + 1}").render(captures.__getitem__) == "x.8"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "a pattern must not be empty"),
        ("a.{p", "a `{` is never closed"),
        ("a.p}", "a `}` without `{`"),
        ("a.*.b", "`*` alone matches nothing"),
        ("a{m:**}", "`**` stands for whole parts of a name: a dot, or the name's end, must be on both sides"),
        ("{p}.{p}", "placeholder 'p' stands twice"),
        ("{1x}", "{1x} is not a placeholder"),
        ("{x:q|q}", "{x:q|q}: the choices must be different and not empty"),
        ("{config}", "'config' cannot name a placeholder: the word has a meaning of its own"),
        ("regex:(?=a)b", "the regular expression does not compile: invalid perl operator: (?="),
        ("a" * 1025, "a pattern has at most 1,024 characters; this one has 1,025"),
    ],
)
def test_a_malformed_pattern_says_what_is_wrong(pattern, message):
    with pytest.raises(Refusal) as refusal:
        Pattern.parse(pattern)
    assert refusal.value.what == message
    assert refusal.value.code == "CK103"


@pytest.mark.parametrize("pattern", ["regex:(a+)+$", "regex:(a|a)*$", "regex:(a*)*b", "{a}{b}{c}{d}{e}!", "{m:**}.{n:**}.{o:**}.{p:**}.!"])
def test_a_strangers_pattern_cannot_hang(pattern):
    compiled = Pattern.parse(pattern)
    started = time.process_time()
    for name in ("a" * 1023 + "?", "a." * 511 + "?"):
        assert compiled.match(name) is None
    assert time.process_time() - started < 1.0


def test_a_set_finds_every_match_in_order():
    patterns = [Pattern.parse(text) for text in ("a.{p}", "b.w", "{m:**}.w", "c.{i:int}.{p}")]
    asked = PatternSet(patterns)
    for name in ("a.w", "b.w", "c.1.w", "d", "x.y.w"):
        one_by_one = [(at, pattern.match(name)) for at, pattern in enumerate(patterns) if pattern.match(name) is not None]
        assert asked.match(name) == one_by_one
