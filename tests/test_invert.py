"""Forward, then back: byte-equal for everything exact, and a reason for the rest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv.api import manifest_of_state_dict
from ckptconv.execute.memory_run import evaluate
from ckptconv.invert import invert
from ckptconv.plan import Output, Plan, Read, apply
from ckptconv.planner import make_plan
from ckptconv.ruleset import builtin
from ckptconv.ruleset.model import parse
from ckptconv.spec import DType, Manifest, TensorSpec
from ckptconv.transforms import Rearrange, Slice


def plan_of(steps, state, more=""):
    return make_plan(parse(f"version: 1\nname: r\nsummary: s\n{more}steps:\n{steps}".encode(), "r.yaml"), manifest_of_state_dict(state))


def numbered(**shapes):
    state, at = {}, 0
    for name, shape in shapes.items():
        count = int(torch.Size(shape).numel())
        state[name.replace("__", ".")] = torch.arange(at, at + count, dtype=torch.float32).view(shape)
        at += count
    return state


@pytest.mark.parametrize(
    ("steps", "state"),
    [
        ("- strip_prefix: m.\n- rename: {a: b, b: a}", numbered(m__a=[2], m__b=[3])),
        ("- split: {from: qkv, to: '{x:q|k|v}'}", numbered(qkv=[6, 4], other=[2])),
        ("- split: {from: qkv, to: '{x:q|k|v}', dim: 1, sizes: [4, 1, 1]}\n- reshape: {keys: q, shape: [-1]}", numbered(qkv=[3, 6])),
        ("- rearrange: {keys: w, pattern: '(h d two) i -> (h two d) i', h: 2, two: 2}", numbered(w=[8, 3])),
        ("- concat: {from: [a, b], to: c}\n- rearrange: {keys: c, pattern: 'i o -> o i'}", numbered(a=[2, 3], b=[4, 3])),
        ("- stack: {from: 'e.{e:int}', over: e, to: all}", numbered(**{f"e__{e}": [2, 3] for e in range(12)})),
        ("- unstack: {from: all, over: e, to: 'e.{e}'}", numbered(all=[5, 2, 3])),
        ("- stack: {from: 'e.{e:int}.gate', over: e, to: g}\n- stack: {from: 'e.{e:int}.up', over: e, to: u}\n- concat: {from: [g, u], to: gu, dim: 1}",
         numbered(**{f"e__{e}__{p}": [2, 3] for e in range(3) for p in ("gate", "up")})),
        ("- copy: {from: a, to: b}\n- rearrange: {keys: b, pattern: 'i o -> o i'}", numbered(a=[2, 3])),
        ("- cast: {keys: a, dtype: float64}", numbered(a=[4])),
        ("- fill: {to: z, shape: [2], value: zeros}", numbered(a=[4])),
        ("- check: {keys: a, finite: true}", numbered(a=[4])),
        ("- index: {keys: a, take: [2, 0, 1]}", numbered(a=[3, 2])),
        ("- concat: {from: [q, k, v], to: qkv, layout: '(g n d) ...', along: n, g: 2, d: 3}", numbered(q=[24, 5], k=[6, 5], v=[6, 5])),
        ("- pad: {keys: a, size: 8}", numbered(a=[5, 2])),
        ("- repeat: {keys: a, times: 3}", numbered(a=[4, 2])),
    ],
)  # fmt: skip
def test_there_and_back_is_where_we_were(steps, state):
    plan = plan_of(steps, state)
    inversion = invert(plan)
    assert inversion.lost == ()
    back = evaluate(inversion.plan, evaluate(plan, state))
    assert list(back) == list(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("steps", "state", "lost"),
    [
        ("- drop: a", numbered(a=[2], b=[1]), {"a": "dropped by r.yaml:5  drop (step 1)"}),
        ("- cast: {keys: a, dtype: bfloat16}", numbered(a=[2]), {"a": "cast(·, bfloat16) cannot be undone"}),
        ("- affine: {keys: a, add: 1.0}", numbered(a=[3]), {"a": "· + 1 cannot be undone"}),
        ("- slice: {keys: a, stop: 2}", numbered(a=[5, 2]), {"a": "2:5 along axis 0 is in no output"}),
        ("- split: {from: a, to: [x, y]}\n- drop: x", numbered(a=[4]), {"a": "0:2 along axis 0 is in no output"}),
    ],
)
def test_what_does_not_come_back_has_a_reason(steps, state, lost):
    found = {each.name: each.reason for each in invert(plan_of(steps, state)).lost}
    assert found == lost


def test_pieces_cut_along_two_axes_meet_again():
    """Two tensor-parallel ranks by three experts: six outputs, each a corner of one tensor."""
    spec = TensorSpec((6, 8), DType.float32)
    x = Read("x", spec)
    outputs = [
        Output(
            f"rank{r}.expert{e}", apply(Slice(axis=1, start=4 * r, stop=4 * r + 4), apply(Slice(axis=0, start=2 * e, stop=2 * e + 2), x))
        )
        for r in range(2)
        for e in range(3)
    ]
    plan = Plan(Manifest({"x": spec}), tuple(outputs))
    inversion = invert(plan)
    assert inversion.lost == ()
    value = torch.arange(48.0).view(6, 8)
    assert torch.equal(evaluate(inversion.plan, evaluate(plan, {"x": value}))["x"], value)


def test_ties_come_back_tied():
    weight = torch.arange(6.0).view(3, 2)
    state = {"embed": weight, "head": weight, "x": torch.ones(1)}
    inversion = invert(plan_of("- rename: {embed: wte, head: lm_head}", state))
    assert inversion.plan.ties == (("embed", "head"),)
    assert inversion.lost == ()


@pytest.mark.parametrize("name", builtin.names())
def test_every_shipped_rule_goes_there_and_back_on_its_own_tests(name):
    rules = builtin.find(name)
    for test in rules.header.tests:
        if test.expect is None:
            continue
        plan = make_plan(rules, Manifest(test.given), given=test.set, config=test.config)
        state = {  # no zero and no byte 255: as scales of quantised blocks they are refused
            key: (torch.arange(spec.numel) % (254 if spec.dtype is DType.uint8 else spec.numel + 1) + 1)
            .view(spec.shape)
            .to(getattr(torch, spec.dtype.value))
            for key, spec in test.given.items()
        }
        inversion = invert(plan)
        dropped = {key for drop in plan.dropped for key in drop.sources}
        lost = {each.name: each.reason for each in inversion.lost}
        # Beside what is dropped, only what the rule says itself that it cuts off or computes.
        assert all("is in no output" in lost[key] or "cannot be undone" in lost[key] for key in set(lost) - dropped)
        back = evaluate(inversion.plan, evaluate(plan, state))
        assert all(torch.equal(back[key], value) for key, value in state.items() if key not in lost)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_inverse_of_the_inverse_is_the_plan(data):
    rows = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    spec = TensorSpec((sum(rows), 4), DType.float32)
    x, start, outputs = Read("x", spec), 0, []
    for at, size in enumerate(rows):
        expr = apply(Slice(axis=0, start=start, stop=start + size), x)
        start += size
        if data.draw(st.booleans()):
            expr = apply(Rearrange(pattern="a (b c) -> b (c a)", sizes=(("b", 2),)), expr)
        outputs.append(Output(f"o{at}", expr))
    plan = Plan(Manifest({"x": spec}), tuple(data.draw(st.permutations(outputs))))
    value = torch.arange(float(spec.numel)).view(spec.shape)
    there = evaluate(plan, {"x": value})
    once = invert(plan)
    assert torch.equal(evaluate(once.plan, there)["x"], value)
    twice = invert(once.plan)
    assert once.lost == twice.lost == ()
    again = evaluate(twice.plan, {"x": value})
    assert all(torch.equal(again[name], there[name]) for name in there)


def test_a_grouped_query_split_is_what_the_equations_say():
    """Megatron's layout: for each group its queries, then its key, then its value."""
    groups, per_group, width = 2, 3, 4
    q, k, v = (torch.randn(groups, count, width, 5) for count in (per_group, 1, 1))
    fused = torch.cat([q, k, v], 1).reshape(-1, 5)
    plan = plan_of("- split: {from: a.w, to: '{x:q|k|v}.w', layout: '(g n d) ...', along: n, sizes: [3, 1, 1], g: 2, d: 4}", {"a.w": fused})
    found = evaluate(plan, {"a.w": fused})
    for name, value in zip("qkv", (q, k, v), strict=True):
        assert torch.equal(found[f"{name}.w"], value.reshape(-1, 5))
    assert torch.equal(evaluate(invert(plan).plan, found)["a.w"], fused)
