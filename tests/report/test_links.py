"""Lineage as data, and how it is folded: what each link says, and that nothing is lost or said twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptconv.compare import Allow, compare
from ckptconv.errors import CkptconvError
from ckptconv.names import collapse
from ckptconv.planner import make_plan
from ckptconv.report.groups import sections
from ckptconv.report.links import KINDS, Lineage, Link, in_doubt, lineage_of, lineage_of_difference
from ckptconv.report.model import difference
from ckptconv.ruleset import builtin
from ckptconv.ruleset.model import parse
from ckptconv.ruleset.testfile import tests_of as placed_tests
from ckptconv.spec import DType, Manifest, TensorSpec

F32, F16, BF16 = DType.float32, DType.float16, DType.bfloat16


def spec(*shape, dtype=F32):
    return TensorSpec(shape, dtype)


def plan_of(steps, tensors, ties=()):
    return make_plan(parse(f"version: 1\nname: r\nsummary: s\nsteps:\n{steps}".encode(), "r.yaml"), Manifest(tensors, ties))


def told(lineage):
    return [(link.kind, link.sources, link.output) for link in lineage.links]


ONE = {"a": spec(6, 4)}


@pytest.mark.parametrize(
    ("steps", "tensors", "expected"),
    [
        ("- rename: {a: b}", ONE, [("renamed", ("a",), "b")]),
        ("- copy: {from: a, to: b}", ONE, [("unchanged", ("a",), "a"), ("copied", ("a",), "b")]),
        ("- tie: {from: a, to: b}", ONE, [("unchanged", ("a",), "a"), ("tied", ("a",), "b")]),
        ("- split: {from: a, to: [x, y]}", ONE, [("split", ("a",), "x"), ("split", ("a",), "y")]),
        ("- concat: {from: ['a', 'b'], to: c}", ONE | {"b": spec(1, 4)}, [("joined", ("a", "b"), "c")]),
        ("- rearrange: {keys: a, pattern: 'o i -> i o'}", ONE, [("rearranged", ("a",), "a")]),
        ("- reshape: {keys: a, shape: [24]}", ONE, [("reshaped", ("a",), "a")]),
        ("- cast: {keys: a, dtype: float16}", ONE, [("cast", ("a",), "a")]),
        ("- affine: {keys: a, mul: 2}", ONE, [("computed", ("a",), "a")]),
        ("- fill: {to: z, shape: [2], value: ones}", ONE, [("unchanged", ("a",), "a"), ("filled", (), "z")]),
        ("- drop: b", {"b": spec(1), **ONE}, [("dropped", ("b",), ""), ("unchanged", ("a",), "a")]),
        ("- rename: {a: c}\n- drop: c", {**ONE, "b": spec(1)}, [("dropped", ("a",), ""), ("unchanged", ("b",), "b")]),
    ],
)  # fmt: skip
def test_what_is_done_to_tensors(steps, tensors, expected):
    assert told(lineage_of(plan_of(steps, tensors))) == expected


@pytest.mark.parametrize(
    ("found", "wanted", "allow", "expected"),
    [
        ({}, {"b": spec(1)}, {}, ("missing", (), "b", "")),
        ({"b": spec(1)}, {}, {}, ("unexpected", ("b",), "b", "")),
        ({"b": spec(1)}, {"b": spec(2)}, {}, ("shape", ("b",), "b", "[1] here, [2] in the target")),
        ({"b": spec(1)}, {"b": spec(1, dtype=F16)}, {}, ("dtype", ("b",), "b", "float32 here, float16 in the target")),
        ({"b": spec(1, dtype=F16)}, {"b": spec(1)}, {}, ("unchanged", ("b",), "b", "float16 here, float32 in the target: loading copies up")),
        ({"b": spec(2, dtype=F16)}, {"b": spec(1)}, {}, ("shape", ("b",), "b", "[2] here, [1] in the target")),
        ({}, {"b": spec(1)}, {"missing": True}, ("initial", (), "b", "")),
        ({"b": spec(1)}, {}, {"unexpected": True}, ("extra", ("b",), "b", "")),
    ],
)  # fmt: skip
def test_what_the_comparison_says(found, wanted, allow, expected):
    plan = plan_of("- rename: {a: a2}", {"a": spec(3), **found})
    comparison = compare(
        plan.manifest, Manifest({"a2": spec(3), **wanted}), Allow(**{key: (lambda _, value=value: value) for key, value in allow.items()})
    )
    lineage = lineage_of(plan, comparison)
    (link,) = [link for link in lineage.links if link.output == "b"]
    assert (link.kind, link.sources, link.output, link.note) == expected
    assert lineage.right["b"] == {**wanted, **found}["b"]


def test_ties_of_the_target():
    plan = plan_of("- rename: {z: a}", {"z": spec(1), "c": spec(1), "d": spec(1, dtype=BF16)})
    wanted = Manifest({name: spec(1) for name in "abcd"}, (("a", "b"), ("c", "d")))
    links = {link.output: link for link in lineage_of(plan, compare(plan.manifest, wanted)).links}
    assert (links["b"].kind, links["b"].note) == ("tied", "comes with a, which is the same tensor in the target")
    assert (links["c"].kind, links["d"].note) == ("tie", "c float32, d bfloat16")


def test_what_was_done_stands_beside_what_is_wrong():
    plan = plan_of("- cast: {keys: a, dtype: float16}", ONE)
    (link,) = lineage_of(plan, compare(plan.manifest, Manifest({"a": spec(9)}))).links
    assert (link.kind, link.verb, link.how, str(link.origin)) == ("shape", "cast", "cast(#1, float16)", "r.yaml:5  cast (step 1)")


def test_what_is_ambiguous_says_what_else_it_may_be():
    lineage = lineage_of(plan_of("- rename: {a: b, c: d}", {"a": spec(1), "c": spec(1)}))
    marked = in_doubt(lineage, {"b": "or of c"})
    assert [(link.kind, link.verb, link.note) for link in marked.links] == [("ambiguous", "renamed", "or of c"), ("renamed", "", "")]


def test_aliases_of_the_source_are_not_lost():
    links = lineage_of(plan_of("- drop: b", {"a": spec(1), "b": spec(1), "c": spec(2)}, (("a", "b"),))).links
    assert {name for link in links for name in link.sources} == {"a", "b", "c"}


def test_two_checkpoints_side_by_side():
    left = Manifest({"a": spec(1), "b": spec(1), "gone": spec(1), "c": spec(1)})
    right = Manifest({"a": spec(1), "b": spec(2), "new": spec(1), "c": spec(1)})
    lineage = lineage_of_difference(difference("l", left, "r", right))
    assert told(lineage) == [
        ("unchanged", ("a",), "a"), ("different", ("b",), "b"), ("left", ("gone",), ""), ("right", (), "new"), ("unchanged", ("c",), "c"),
    ]  # fmt: skip
    assert lineage.links[1].note == "[1] float32 against [2] float32"


def test_a_module_is_a_section_and_its_figures_are_templates():
    tensors = {"stem.w": spec(1)} | {f"b.{i}.{name}": spec(6) for i in range(3) for name in ("qkv", "out")} | {"head.w": spec(1)}
    lineage = lineage_of(plan_of("- split: {from: 'b.{i:int}.qkv', to: 'l.{i}.{x:q|k}'}\n- rename: {'b.{i:int}.out': 'l.{i}.o'}", tensors))
    shown = [
        (section.left, section.right, [([each.text for each in group.left], [each.text for each in group.right], group.count) for group in section.groups])
        for section in sections(lineage)
    ]  # fmt: skip
    assert sorted(shown) == [
        ("", "", [(["head.w"], ["head.w"], 1)]),
        ("", "", [(["stem.w"], ["stem.w"], 1)]),
        ("b.{0-2}", "l.{0-2}", [(["b.{0-2}.qkv"], ["l.{0-2}.q", "l.{0-2}.k"], 6), (["b.{0-2}.out"], ["l.{0-2}.o"], 3)]),
    ]


def check(lineage):
    """Each link once; each template's names those of its links; each tensor of either side in some link."""
    groups = [group for section in sections(lineage) for group in section.groups]
    assert sorted(link for group in groups for figure in group.figures for link in figure) == list(range(len(lineage.links)))
    for group in groups:
        links = [lineage.links[link] for figure in group.figures for link in figure]
        for lines, names in (
            (group.left, {name for each in links for name in each.sources}),
            (group.right, {each.output for each in links}),
        ):
            assert sum(line.count for line in lines) == len(names - {""})
            assert {line.text for line in lines} <= {each.text for each in collapse(sorted(names))} | {
                each.text for each in collapse(list(dict.fromkeys(name for link in links for name in (*link.sources, link.output) if name)))
            }
        assert all(line.kind in KINDS for line in group.right)
    assert {name for link in lineage.links for name in link.sources} == set(lineage.left)
    assert {link.output for link in lineage.links} - {""} == set(lineage.right)


@pytest.mark.parametrize("name", builtin.names())
def test_every_rule_can_be_drawn(name):
    rules = builtin.find(name)
    drawn = 0
    for placed in placed_tests(rules):
        test = placed.test
        try:
            plan = make_plan(rules, Manifest(test.given), given=test.set, config=test.config)
        except CkptconvError:
            continue  # a test of what is refused
        check(lineage_of(plan))
        check(lineage_of(plan, compare(plan.manifest, Manifest({"other": spec(1), **dict(list(plan.manifest.tensors.items())[1:])}))))
        drawn += 1
    assert drawn


@given(st.data())
def test_any_lineage_is_folded_without_loss(data):
    names = st.from_regex(r"[ab](\.[0-2]){0,2}(\.[wx])?", fullmatch=True)
    left = dict.fromkeys(data.draw(st.lists(names, unique=True, max_size=12)), spec(1))
    right = dict.fromkeys(data.draw(st.lists(names, unique=True, max_size=12)), spec(1))
    sources = st.lists(st.sampled_from(sorted(left)), unique=True, max_size=3) if left else st.just([])
    kinds = st.sampled_from(sorted(KINDS))
    links = [Link(data.draw(kinds), tuple(data.draw(sources)), name) for name in right]
    used = {name for link in links for name in link.sources}
    check(Lineage(left, right, (*links, *(Link("dropped", (name,)) for name in left if name not in used))))
