"""The way back as a rule file: forward, then the written rule, gives the source's own bytes, and what is lost is said."""

import json

import jsonschema
import pytest
import torch
import yaml

from ckptconv.api import manifest_of_state_dict
from ckptconv.backnames import Row, Shape, Slot, Want, affine, fit, guessed, opened, parts_of, solved, text_of
from ckptconv.backplan import Unturned
from ckptconv.backwards import Lossy, back_name, rule_back
from ckptconv.errors import CkptconvError, Refusal
from ckptconv.execute.memory_run import evaluate
from ckptconv.invert import invert
from ckptconv.plan import Apply, reads, walk
from ckptconv.planner import make_plan
from ckptconv.ruleset import builtin, expressions
from ckptconv.ruleset.model import parse
from ckptconv.ruleset.patterns import Template
from ckptconv.ruleset.schema import json_schema
from ckptconv.ruletests import run_tests
from ckptconv.ruletext import flow
from ckptconv.spec import DType, Manifest, TensorSpec
from ckptconv.transforms import Guard


def numbered(**shapes):
    """A state_dict of distinct numbers; ``__`` in a name is a dot."""
    return filled(Manifest({name.replace("__", "."): TensorSpec(tuple(shape), DType.float32) for name, shape in shapes.items()}))


def filled(manifest):
    """Distinct numbers, as far as the dtype has them: a value that comes from the wrong place is another value.

    None is zero, and no byte 255: as a scale of quantised blocks either is refused.
    """
    state, at = {}, 1
    for name, spec in manifest.tensors.items():
        dtype = getattr(torch, spec.dtype.value)
        values = torch.arange(at, at + spec.numel) if spec.dtype is not DType.bool else torch.arange(spec.numel) % 3 == 0
        values = values % 254 + 1 if spec.dtype is DType.uint8 else values
        state[name] = values.view(spec.shape).to(dtype)
        at += spec.numel
    return state


def agreeing(plan, state):
    """The state with the values that the plan's guards want to be equal made so."""
    for node in walk(output.expr for output in plan.stored):
        if isinstance(node, Apply) and isinstance(node.transform, Guard) and len(node.arguments) == 2:
            for one, other in zip(*map(reads, node.arguments), strict=False):
                state[other] = state[one].clone()
    return state


def rule(steps, more=""):
    return parse(f"version: 1\nname: r\nsummary: s\n{more}steps:\n{steps}".encode(), "r.yaml")


def there_and_back(rules, state, *, given=None, config=None):
    """Runs the rule and its way back; gives the way back, its parsed rule, and the names that did not come back as they were."""
    like = manifest_of_state_dict(state)
    back = rule_back(rules, like, given=given, config=config, lossy=True)
    parsed = parse(back.text.encode(), f"{back_name(rules.header.name)}.yaml", stem=back_name(rules.header.name))
    forward = make_plan(rules, like, given=given, config=config)
    state = agreeing(forward, state)
    again = make_plan(parsed, forward.manifest, given=given, config=config)
    got = evaluate(again, evaluate(forward, state))
    assert all(again.manifest[name] == like[name] for name in again.manifest)
    same = {name for name, value in got.items() if torch.equal(value, state[name])}
    return back, parsed, [name for name in state if name not in same]


def body(back):
    """The steps of a written rule, as data."""
    return yaml.safe_load(back.text)["steps"]


# --- every shipped rule ----------------------------------------------------------------------------------------------------------------

SCHEMA = jsonschema.Draft202012Validator(json_schema())
CASES = [(name, test) for name in builtin.names() for test in builtin.find(name).header.tests if test.expect is not None]


@pytest.mark.parametrize(("name", "test"), CASES, ids=[f"{name}: {test.name}" for name, test in CASES])
def test_every_shipped_rule_has_a_way_back_that_a_person_can_read(name, test):
    rules = builtin.find(name)
    back, parsed, gone = there_and_back(rules, filled(Manifest(test.given)), given=test.set, config=test.config)
    assert back.way == "steps"
    check_losses(back, gone, make_plan(rules, Manifest(test.given), given=test.set, config=test.config))
    assert [outcome.failures for outcome in run_tests(parsed) if not outcome.passed] == []
    assert [*SCHEMA.iter_errors(yaml.safe_load(back.text))] == []
    # A pattern is one line, so where the rule itself has a long choice its way back has it too.
    own = (builtin.folder() / rules.file.removeprefix("rules/")).read_text(encoding="utf-8")
    assert max(map(len, back.text.splitlines())) <= max(200, *map(len, own.splitlines()))


def check_losses(back, gone, plan):
    """What a step dropped, or what a transform cannot give back: no more than the inverse of the plan loses, and all of it said."""
    lost = {each.name: each.reason for each in invert(plan).lost}
    dropped = {source for drop in plan.dropped for source in drop.sources}
    assert set(gone) <= set(lost)
    assert {name for name in lost if name in dropped} <= set(gone)  # an equal twin that stayed is found by both
    assert all(name in dropped or "cannot be undone" in lost[name] or "is in no output" in lost[name] for name in gone), lost
    assert len(gone) <= back.count <= len(lost)
    assert bool(back.lost) == bool(back.count)
    assert sum(int(names.rpartition(" ×")[2]) if " ×" in names else 1 for _, names, _ in back.lost) == back.count
    assert all(
        reason.startswith(("dropped", "approximate")) or "cannot be" in reason or "not there" in reason for _, _, reason in back.lost
    )


SEVERAL = [name for name in builtin.names() if sum(name == other for other, _ in CASES) > 1]


@pytest.mark.parametrize("name", SEVERAL)
def test_all_tests_of_a_shipped_rule_at_once(name):
    """Their given names in one manifest, as far as they agree and the rule takes them together."""
    rules, given, settings, config = builtin.find(name), {}, {}, None
    for test in rules.header.tests:
        if test.expect is None or any(given.get(key, spec) != spec for key, spec in test.given.items()):
            continue
        merged = {**given, **test.given}
        try:
            make_plan(rules, Manifest(merged), given={**settings, **test.set}, config=test.config or config)
        except CkptconvError:
            continue
        given, settings, config = merged, {**settings, **test.set}, test.config or config
    back, _, gone = there_and_back(rules, filled(Manifest(given)), given=settings, config=config)
    assert back.way == "steps"
    check_losses(back, gone, make_plan(rules, Manifest(given), given=settings, config=config))


# --- models of several layers, where a template must say more than one name -----------------------------------------------------------


def layers(count, **shapes):
    return {f"{prefix.replace('__', '.')}": shape for prefix, shape in shapes.items() if "#" not in prefix} | {
        prefix.replace("__", ".").replace("#", str(at)): shape for at in range(count) for prefix, shape in shapes.items() if "#" in prefix
    }


def manifest(count, shapes):
    return Manifest({name: TensorSpec(tuple(shape), DType.float32) for name, shape in layers(count, **shapes).items()})


LLAMA = {
    "model.embed_tokens.weight": [11, 8], "model.norm.weight": [8], "lm_head.weight": [11, 8],
    **{f"model.layers.#.self_attn.{x}_proj.weight": [8 if x in "qo" else 4, 8] for x in "qkvo"},
    **{f"model.layers.#.mlp.{x}_proj.weight": [6, 8] for x in ("gate", "up", "down")},
    "model.layers.#.input_layernorm.weight": [8], "model.layers.#.post_attention_layernorm.weight": [8],
}  # fmt: skip


def test_expressions_and_variables_go_along():
    rules = builtin.find("hf-llama-to-torchtune-llama")
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8}
    back, parsed, gone = there_and_back(rules, filled(manifest(12, LLAMA)), config=config)
    assert gone == []
    assert yaml.safe_load(back.text)["name"] == "torchtune-llama-to-hf-llama"
    assert body(back)[1] == {"rearrange": {
        "from": "layers.{i:int}.attn.{x:q|k}_proj.weight", "to": "model.layers.{i}.self_attn.{x}_proj.weight",
        "pattern": "(h d two) i -> (h two d) i", "two": 2, "h": "{'q': H, 'k': G}[x]",
    }}  # fmt: skip
    assert yaml.safe_load(back.text)["vars"] == {"H": "config.num_attention_heads", "G": "first(config.num_key_value_heads, H)"}
    # It is a rule for the family, not for the one checkpoint it was written from.
    other = manifest(3, {**LLAMA, **{f"model.layers.#.self_attn.{x}_proj.weight": [16 if x in "qo" else 4, 8] for x in "qkvo"}})
    config = {"num_attention_heads": 8, "num_key_value_heads": 2}
    forward = make_plan(rules, other, config=config)
    state = filled(other)
    got = evaluate(make_plan(parsed, forward.manifest, config=config), evaluate(forward, state))
    assert all(torch.equal(got[name], value) for name, value in state.items())


def test_arithmetic_that_algebra_cannot_undo_is_observed():
    names = {f"features.{n}.{b}.layer_scale": (n, b) for n, count in ((1, 3), (3, 3), (5, 9), (7, 3)) for b in range(count)}
    state = {
        "features.0.0.weight": torch.ones(4, 3, 2, 2),
        **{f"features.{n}.{k}.weight": torch.ones(2) * n for n in (2, 4, 6) for k in (0, 1)},
    }
    state |= {name: torch.full((n + 3, 1, 1), float(b)) for name, (n, b) in names.items()}
    back, _, gone = there_and_back(builtin.find("torchvision-convnext-to-hf-convnext"), state)
    assert gone == []
    table = body(back)[0]["rename"]
    assert table["convnext.encoder.stages.{n:int}.layers.{b:int}.layer_scale_parameter"] == "features.{2*n + 1}.{b}.layer_scale"
    assert table["convnext.encoder.stages.{n:1=2|2=4|3=6}.downsampling_layer.{k:0|1}.{p}"] == "features.{n}.{k}.{p}"
    assert body(back)[1] == {"reshape": {"keys": "features.{n:int}.{b:int}.layer_scale", "shape": [-1, 1, 1]}}


def test_a_table_of_stages_becomes_a_line_for_each():
    first, words = [1, 2, 4, 7], ("0.0", "0.1", "1.0", "1.1", "2", "3")
    state = {"features.0.0.weight": torch.ones(1), "features.0.1.bias": torch.ones(2), "classifier.1.weight": torch.ones(3)}
    state |= {f"features.1.conv.{k}.weight": torch.full((2,), float(at)) for at, k in enumerate(("0.0", "0.1", "1", "2"))}
    state |= {f"features.{i}.conv.{k}.weight": torch.full((i,), float(at)) for i in range(2, 10) for at, k in enumerate(words)}
    state |= {"features.10.0.weight": torch.ones(4), "features.10.1.weight": torch.ones(5)}
    rules = builtin.find("torchvision-mobilenet-v2-to-timm-mobilenet-v2")
    back, _, gone = there_and_back(rules, state, given={"first": first, "blocks": 9})
    assert gone == []
    said = "{k:conv_pw=0.0|bn1=0.1|conv_dw=1.0|bn2=1.1|conv_pwl=2|bn3=3}"
    assert body(back)[0]["rename"] == {
        **{f"blocks.{stage}.{{n2:int}}.{said}.{{p}}": f"features.{{n2 + {first[stage]}}}.conv.{{k}}.{{p}}" for stage in (1, 2, 3)},
        "{k:conv_head=0|bn2=1}.{p}": "features.10.{k}.{p}",
        "classifier.{p}": "classifier.1.{p}",
    }


def test_what_one_entry_tells_of_a_placeholder_holds_for_the_others():
    steps = '- rename: {"t.b{s:int}.b{t:int}-{i:int}.{p}": "s{s}.{i + 1}.{p}", "u.b{s:int}.b{t:int}.{p}": "v{s}.{p}"}'
    back, _, gone = there_and_back(rule(steps), numbered(**{"t.b1.b1-0.w": [1], "t.b2.b2-0.w": [2], "u.b1.b1.w": [3]}))
    assert gone == []
    assert body(back) == [{"rename": {"s{s:int}.{i:int}.{p}": "t.b{s}.b{s}-{i - 1}.{p}", "v{s:int}.{p}": "u.b{s}.b{s}.{p}"}}]


def test_experts_are_unstacked_again():
    shapes = {"model.layers.#.block_sparse_moe.gate.weight": [5, 4]}
    shapes |= {
        f"model.layers.#.block_sparse_moe.experts.{e}.{w}.weight": [4, 6] if w == "w2" else [6, 4]
        for e in range(12)
        for w in ("w1", "w2", "w3")
    }
    back, _, gone = there_and_back(builtin.find("mixtral-to-fused-experts"), filled(manifest(3, shapes)))
    assert gone == []
    assert [next(iter(step)) for step in body(back)] == ["rename", "split", "unstack", "unstack", "unstack"]
    assert "# undoes line 8: stack" in back.text


def test_wrappers_go_where_they_were():
    state = numbered(**{f"_orig_mod.layers.{i}._fsdp_wrapped_module.{p}.weight": [2, i + 1] for i in range(3) for p in ("attn", "mlp")})
    state |= numbered(**{"_orig_mod.norm.weight": [2]})
    back, _, gone = there_and_back(builtin.find("wrapper-stack"), state)
    assert gone == []
    assert body(back) == [
        {"rename": {"layers.{i:int}.{r:**}": "layers.{i}._fsdp_wrapped_module.{r}"}},
        {"add_prefix": "_orig_mod."},
    ]
    again, _, _ = there_and_back(builtin.find("torch-compile"), numbered(**{"_orig_mod.a": [1], "_orig_mod.b": [2]}))
    assert yaml.safe_load(again.text)["when"] == {"none": ["_orig_mod.**"]}


# --- steps, one by one -----------------------------------------------------------------------------------------------------------------

EXACT = [
    ("- strip_prefix: m.\n- rename: {a: b, b: a}", numbered(m__a=[2], m__b=[3]), [{"rename": {"b": "a", "a": "b"}}, {"add_prefix": "m."}]),
    ("- strip_prefix: {prefix: m., where: some}", numbered(m__a__x=[2], m__a__y=[2], m__b=[3], c=[2]),
     [{"add_prefix": {"prefix": "m.", "keys": ["a.**", "b"]}}]),
    ("- strip_prefix: {prefix: [a., b.], repeat: true}", numbered(a__b__x=[2], a__b__y=[3]), [{"add_prefix": "a.b."}]),
    ("- add_prefix: m.", numbered(a=[2], b=[3]), [{"strip_prefix": "m."}]),
    ("- add_prefix: {prefix: m., keys: 'l.{i:int}.{p}'}", numbered(l__0__a=[2], c=[2]), [{"strip_prefix": {"prefix": "m.", "where": "some"}}]),
    ("- rename: {'l.{i:int}.{x:a=q|b=k}.**': 'm.{i + 1}.{x}'}", numbered(l__0__a__w=[1], l__1__b__w=[2]),
     [{"rename": {"m.{i:int}.{x:q=a|k=b}": "l.{i - 1}.{x}.w"}}]),
    ("- rename: {'b.{i:int}.{p}': 's.{i // 2}.{i % 2}.{p}'}", numbered(**{f"b__{i}__{p}": [i + 1] for i in range(6) for p in "wb"}),
     [{"rename": {"s.{n:int}.{n2:int}.{p}": "b.{2*n + n2}.{p}"}}]),
    ("- rename: {'b.{i:int}': 's.{[3, 0, 1][i]}'}", numbered(b__0=[1], b__1=[2], b__2=[3]), [{"rename": {"s.{n:3=0|0=1|1=2}": "b.{n}"}}]),
    ("- rename: {'b.{i:int}': 'c.{5 - i}'}", numbered(b__0=[1], b__3=[2]), [{"rename": {"c.{i:int}": "b.{5 - i}"}}]),
    ("- rename: {'regex:l([0-9]+)_(.*)': 'layers.\\1.\\2'}", numbered(l0_a=[2], l1_a=[2], l2_a=[1]),
     [{"rename": {"layers.{i:int}.a": "l{i}_a"}}]),
    ("- split: {from: qkv, to: '{x:q|k|v}'}", numbered(qkv=[6, 4], other=[2]), [{"concat": {"from": "{x:q|k|v}", "to": "qkv", "dim": 0}}]),
    ("- split: {from: 'l.{i:int}.qkv', to: ['m.{i + 1}.a', 'm.{i + 1}.b'], dim: 1, sizes: [3, 1]}", numbered(l__0__qkv=[6, 4], l__1__qkv=[2, 4]),
     [{"concat": {"from": ["m.{i:int}.a", "m.{i:int}.b"], "to": "l.{i - 1}.qkv", "dim": 1}}]),
    ("- split: {from: a.w, to: '{x:q|k|v}.w', layout: '(g n d) ...', along: n, sizes: [3, 1, 1], g: 2, d: 4}", numbered(a__w=[40, 5]),
     [{"concat": {"from": "{x:q|k|v}.w", "to": "a.w", "layout": "(g n d) ...", "along": "n", "g": 2, "d": 4}}]),
    ("- concat: {from: [q, k, v], to: qkv, layout: '(g n d) ...', along: n, g: 2, d: 3}", numbered(q=[24, 5], k=[6, 5], v=[6, 5]),
     [{"split": {"from": "qkv", "to": ["q", "k", "v"], "layout": "(g n d) ...", "along": "n", "sizes": [4, 1, 1], "g": 2, "d": 3}}]),
    ("- concat: {from: [a, b], to: c}\n- rearrange: {keys: c, pattern: 'i o -> o i'}", numbered(a=[2, 3], b=[4, 3]),
     [{"rearrange": {"keys": "c", "pattern": "o i -> i o"}}, {"split": {"from": "c", "to": ["a", "b"], "dim": 0, "sizes": [2, 4]}}]),
    ("- concat: {from: 'l.{i:int}.{x:wq=q|wk=k}', to: 'l.{2*i + 1}.c'}", numbered(l__0__wq=[2], l__0__wk=[2], l__1__wq=[3], l__1__wk=[3]),
     [{"split": {"from": "l.{i:int}.c", "to": "l.{(i - 1) // 2}.{x:wq|wk}", "dim": 0}}]),
    ("- stack: {from: 'e.{e:int}', over: e, to: all, dim: 1}", numbered(**{f"e__{e}": [2, 3] for e in range(12)}),
     [{"unstack": {"from": "all", "over": "e", "to": "e.{e}", "dim": 1}}]),
    ("- stack: {from: 'e.{e:a|b}.w', over: e, to: all, dim: -1}", numbered(e__a__w=[2, 3], e__b__w=[2, 3]),
     [{"convert": {"from": "all", "to": ["e.a.w", "e.b.w"], "do": [{"unstack": -1}]}}]),
    ("- unstack: {from: 'l.{i:int}.all', over: e, to: 'l.{i}.e.{e}.w', dim: 1}", numbered(l__0__all=[5, 2, 3], l__1__all=[5, 2, 3]),
     [{"stack": {"from": "l.{i:int}.e.{e:int}.w", "over": "e", "to": "l.{i}.all", "dim": 1}}]),
    ("- rearrange: {keys: w, pattern: '(h d two) i -> (h two d) i', h: 2, two: 2}", numbered(w=[8, 3]),
     [{"rearrange": {"keys": "w", "pattern": "(h two d) i -> (h d two) i", "h": 2, "two": 2}}]),
    ("- rearrange: {keys: w, pattern: 'h d i -> (h d) i'}", numbered(w=[2, 4, 3]),
     [{"rearrange": {"keys": "w", "pattern": "(h d) i -> h d i", "d": 4}}]),
    ("- rearrange: {keys: w, pattern: '(h d) i -> (d h) i', h: 'shape()[0] // 3'}", numbered(w=[6, 3]),
     [{"rearrange": {"keys": "w", "pattern": "(d h) i -> (h d) i", "h": 2}}]),
    ("- reshape: {keys: 'l.{i:int}', shape: [-1]}", numbered(l__0=[4, 1, 2], l__1=[6, 1, 2]), [{"reshape": {"keys": "l.{i:int}", "shape": [-1, 1, 2]}}]),
    ("- reshape: {keys: 'l.{i:int}', shape: [-1]}", numbered(l__0=[4, 1, 2], l__1=[6, 2, 2]),
     [{"reshape": {"keys": "l.0", "shape": [4, 1, 2]}}, {"reshape": {"keys": "l.1", "shape": [6, 2, 2]}}]),
    ("- copy: {from: a, to: b}\n- rearrange: {keys: b, pattern: 'i o -> o i'}", numbered(a=[2, 3]),
     [{"rearrange": {"keys": "b", "pattern": "o i -> i o"}}, {"drop": {"keys": "b", "reason": "a copy"}}]),
    ("- tie: {from: a, to: b}", numbered(a=[2, 3], c=[1]), [{"drop": {"keys": "b", "reason": "a copy"}}]),
    ("- cast: {keys: a, dtype: float64}", numbered(a=[4]), [{"cast": {"keys": "a", "dtype": "float32"}}]),
    ("- fill: {for: 'l.{i:int}.w', to: 'l.{i}.b', shape: [2], value: zeros}", numbered(l__0__w=[4], l__1__w=[3]),
     [{"drop": {"keys": "l.{i:int}.b", "reason": "not part of the source"}}]),
    ("- check: {keys: a, finite: true}", numbered(a=[4]), [{"keep": {"keys": "**", "reason": "there is nothing to undo"}}]),
    ("- index: {keys: a, take: [2, 0, 1]}", numbered(a=[3, 2]), [{"index": {"keys": "a", "dim": 0, "take": [1, 2, 0]}}]),
    ("- pad: {keys: a, before: 1, after: 2}", numbered(a=[5, 2]), [{"slice": {"keys": "a", "dim": 0, "start": 1, "stop": 6}}]),
    ("- repeat: {keys: a, times: 3}", numbered(a=[2, 2]), [{"index": {"keys": "a", "dim": 0, "take": [0, 3]}}]),
    ("- weight_norm: {fold: false}", numbered(c__weight=[2, 2], c__bias=[2]),
     [{"drop": {"keys": "c.weight_g", "reason": "made by weight_norm"}}, {"rename": {"c.weight_v": "c.weight"}}]),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "state", "wanted"), EXACT)
def test_a_step_turned_round(steps, state, wanted):
    back, parsed, gone = there_and_back(rule(steps), state)
    assert (back.way, back.lost, gone) == ("steps", [], [])
    assert body(back) == wanted
    assert all(outcome.passed for outcome in run_tests(parsed))


@pytest.mark.parametrize(
    ("steps", "state", "wanted"),
    [
        ("- convert: {from: 'l.{i:int}.{x:q|k|v}', to: 'l.{i}.qkv', do: [{rearrange: 'i o -> o i'}, {concat: 0}]}",
         numbered(**{f"l__{i}__{x}": [2, 3] for i in range(3) for x in "qkv"}),
         [{"convert": {"from": "l.{i:int}.qkv", "to": "l.{i}.{x:q|k|v}", "do": [{"split": {"dim": 0, "sizes": [3, 3, 3]}}, {"rearrange": "o i -> i o"}]}}]),
        ("- convert: {from: 'l.{i:int}.qkv', to: 'l.{i}.{x:q|k}', do: [{split: {dim: 0, sizes: [4, 2]}}, {transpose: [0, 1]}]}",
         numbered(l__0__qkv=[6, 2], l__1__qkv=[6, 2]),
         [{"convert": {"from": ["l.{i:int}.q", "l.{i:int}.k"], "to": "l.{i}.qkv", "do": [{"rearrange": "a1 a0 -> a0 a1"}, {"concat": 0}]}}]),
        ("- unstack: {from: all, over: e, to: 'e.{e + 1}'}", numbered(all=[3, 2]),
         [{"convert": {"from": ["e.1", "e.2", "e.3"], "to": "all", "do": [{"stack": 0}]}}]),
        ("- convert: {from: ['l.{i:int}.e.{e:int}.g', 'l.{i:int}.e.{e:int}.u'], gather: e, to: 'm.{i}.gu', do: [{stack: 0}, {concat: 1}]}\n"
         "- fill: {to: z, shape: [2], value: 1}\n- rename: {h: hh}",
         numbered(h=[3], **{f"l__{i}__e__{e}__{x}": [2, 3] for i in range(2) for e in range(2) for x in "gu"}),
         [{"rename": {"hh": "h"}}, {"drop": {"keys": "z", "reason": "not part of the source"}},
          {"convert": {"from": "m.{i:int}.gu", "to": ["l.{i}.e.0.g", "l.{i}.e.1.g", "l.{i}.e.0.u", "l.{i}.e.1.u"],
                       "do": [{"split": {"dim": 1, "sizes": [2, 2]}}, {"unstack": 0}]}}]),
    ],
)  # fmt: skip
def test_a_step_without_a_step_that_undoes_it_is_undone_from_what_it_did(steps, state, wanted):
    back, _, gone = there_and_back(rule(steps), state)
    assert (back.way, back.lost, gone) == ("steps", [], [])
    assert body(back) == wanted


@pytest.mark.parametrize(
    ("steps", "state", "lost", "gone"),
    [
        ("- drop: {keys: a, reason: why not}", numbered(a=[2], b=[1]), [("line 5: drop", "a", "dropped: why not")], ["a"]),
        ("- keep: 'b.**'", numbered(a=[2], b__0=[1]), [("line 5: keep", "a", "dropped")], ["a"]),
        ("- cast: {keys: a, dtype: bfloat16}", {"a": torch.tensor([1 / 3])}, [("line 5: cast", "a", "approximate: bfloat16 holds less than float32")], ["a"]),
        ("- affine: {keys: a, mul: 0.5, add: 1.0e-05}", numbered(b=[1], a=[2]), [("line 5: affine", "a", "approximate: the numbers are rounded")], []),
        ("- slice: {keys: a, stop: 2}", numbered(a=[5, 2], b=[1]), [("line 5: slice", "a", "slice cannot be undone")], ["a"]),
        ("- resize: {keys: p, size: [3, 3]}", numbered(p=[1, 5, 2], b=[1]), [("line 5: resize", "p", "resize cannot be undone")], ["p"]),
        ("- combine: {from: {w: w, b: b}, to: c, formula: w + b}", numbered(w=[2], b=[2], d=[1]),
         [("line 5: combine", "w", "combine cannot be undone"), ("line 5: combine", "b", "combine cannot be undone")], ["w", "b"]),
        ("- split: {from: '{i:int}.qkv', to: '{i}.{x:a|b}'}\n- drop: 1.a", numbered(**{"0.qkv": [4], "1.qkv": [4]}),
         [("line 6: drop", "1.qkv", "dropped")], ["1.qkv"]),
        ("- drop: 'l.{i:int}.x'", numbered(**{f"l.{i}.{x}": [i + 1] for i in range(5) for x in "xy"}),
         [("line 5: drop", "l.{0-4}.x ×5", "dropped")], [f"l.{i}.x" for i in range(5)]),
    ],
)  # fmt: skip
def test_what_does_not_come_back_is_said(steps, state, lost, gone):
    back, _, missing = there_and_back(rule(steps), state)
    assert back.lost == lost
    assert missing == gone
    with pytest.raises(Lossy, match="cannot be undone") as caught:
        rule_back(rule(steps), manifest_of_state_dict(state))
    assert caught.value.code == "CK212"
    assert caught.value.back.lost == lost


# --- rules in rules, ranks, and what must be equal --------------------------------------------------------------------------------------

SPLIT = "version: 1\nname: part\nsummary: s\nvars: {H: config.heads}\nsteps:\n"


def including(tmp_path, part, step):
    (tmp_path / "part.yaml").write_text(f"{SPLIT}{part}\n")
    return parse(f"version: 1\nname: r\nsummary: s\nsteps:\n- include: {step}\n".encode(), "r.yaml", folder=tmp_path)


@pytest.mark.parametrize(
    ("part", "step", "state", "wanted"),
    [
        ("- rename: {'l.{i:int}.{p}': 'h.{i + 1}.{p}'}\n- concat: {from: 'h.{i:int}.{x:q|k}', to: 'h.{i}.qk', dim: 0}",
         "{rules: part.yaml, scope: v.}", numbered(l__0__q=[1], **{f"v__l__{i}__{x}": [2, 3] for i in range(3) for x in "qk"}),
         [{"split": {"from": "v.h.{i:int}.qk", "to": "v.h.{i}.{x:q|k}", "dim": 0}}, {"rename": {"v.h.{i:int}.{p}": "v.l.{i - 1}.{p}"}}]),
        ("- strip_prefix: m.", "{rules: part.yaml, scope: v.}", numbered(v__m__a=[2], v__m__b__c=[1], m__d=[3]),
         [{"rename": {"v.{r:**}": "v.m.{r}"}}]),
        ("- add_prefix: {prefix: m., keys: 'a.**'}", "{rules: part.yaml, scope: v.}", numbered(v__a__b=[2], v__b=[1], m__d=[3]),
         [{"rename": {"v.m.{r:**}": "v.{r}"}}]),
        ("- rearrange: {keys: '**', pattern: '(h two) i -> (two h) i', h: H}", "part.yaml", numbered(a=[8, 2]),
         [{"rearrange": {"keys": "**", "pattern": "(two h) i -> (h two) i", "h": "H"}}]),
        ("- rearrange: {keys: '**', pattern: '(h two) i -> (two h) i', h: H}", "{rules: part.yaml, set: {H: 2}}", numbered(a=[8, 2]),
         [{"rearrange": {"keys": "**", "pattern": "(two h) i -> (h two) i", "h": 2}}]),
        ("- rearrange: {keys: '**', pattern: '(h two) i -> (two h) i', h: H}", "{rules: part.yaml, scope: v., config: config.vision}",
         numbered(v__a=[6, 2], a=[2]), [{"rearrange": {"keys": "v.**", "pattern": "(two h) i -> (h two) i", "h": 3}}]),
        ("- rename: {zzz: y}", "{rules: part.yaml, optional: true}", numbered(a=[2]),
         [{"keep": {"keys": "**", "reason": "there is nothing to undo"}}]),
    ],
    ids=["steps", "strip_prefix", "add_prefix", "variable", "set", "config", "left out"],
)  # fmt: skip
def test_an_included_rule_is_undone_in_its_place(part, step, state, wanted, tmp_path):
    back, parsed, gone = there_and_back(including(tmp_path, part, step), state, config={"heads": 4, "vision": {"heads": 3}})
    assert (back.way, back.lost, gone) == ("steps", [], [])
    assert body(back) == wanted
    assert all(outcome.passed for outcome in run_tests(parsed))


def test_what_an_included_rule_loses_is_said_with_its_name(tmp_path):
    back, _, gone = there_and_back(including(tmp_path, "- drop: x", "{rules: part.yaml, scope: v.}"), numbered(v__x=[2], v__y=[1], x=[1]))
    assert back.lost == [("part line 6: drop", "v.x", "dropped")]
    assert gone == ["v.x"]


def test_ranks_of_many_layers_are_cut_alike():
    rules = builtin.find("meta-llama-to-hf-llama")
    (test,) = [test for test in rules.header.tests if test.expect is not None]
    state = {}
    for name, spec in test.given.items():
        for layer in range(4) if ".layers." in name or "::layers." in name else (0,):
            for rank in range(3) if name.startswith("00::") else ():
                state[f"{rank:02d}{name[2:]}".replace("layers.0.", f"layers.{layer}.")] = spec
    back, _, gone = there_and_back(rules, filled(Manifest(state)), config={"n_heads": 6, "n_kv_heads": 3})
    assert back.way == "steps"
    assert gone == [f"{rank:02d}::rope.freqs" for rank in range(3)]
    steps = body(back)
    assert {
        "copy": {"from": "00::layers.{j:int}.ffn_norm.weight", "to": [f"{at:02d}::layers.{{j}}.ffn_norm.weight" for at in (1, 2)]}
    } in steps
    assert len(steps) == 12


def test_what_was_checked_to_be_equal_is_its_twin_again_with_bytes_of_its_own():
    back, _, gone = there_and_back(rule("- check: {keys: [a, b], equal: true}\n- drop: b"), numbered(a=[2, 3], b=[2, 3]))
    assert (back.lost, gone) == ([], [])
    assert body(back) == [{"copy": {"from": "a", "to": "b"}}]


def test_pieces_of_a_layout_are_opened_by_every_axis_but_one():
    steps = "- split: {from: 'l.{i:int}.qkv', to: 'l.{i}.{x:q|k|v}', layout: '(g n d) ...', along: n, sizes: [2, 1, 1], g: 2}"
    back, _, gone = there_and_back(rule(steps), numbered(l__0__qkv=[24, 5], l__1__qkv=[24, 5], l__2__qkv=[40, 5]))
    assert (back.way, back.lost, gone) == ("steps", [], [])
    assert [step["concat"]["d"] for step in body(back)] == [3, 5]


def test_ties_come_back_tied():
    weight = torch.arange(6.0).view(3, 2)
    state = {"embed": weight, "head": weight, "x": torch.ones(1)}
    rules = rule("- drop: head\n- rename: {embed: wte}")
    back, parsed, gone = there_and_back(rules, state)
    assert (gone, back.lost) == ([], [])
    assert body(back) == [{"rename": {"wte": "embed"}}, {"tie": {"from": "embed", "to": "head"}}]
    forward = make_plan(rules, manifest_of_state_dict(state))
    assert make_plan(parsed, forward.manifest).manifest.ties == (("embed", "head"),)


def test_a_first_name_that_went_is_its_copy_again():
    back, _, gone = there_and_back(rule("- copy: {from: a, to: b}\n- drop: a"), numbered(a=[2, 3]))
    assert (gone, back.lost) == ([], [])


def test_nothing_left_is_refused():
    with pytest.raises(Refusal, match="no way back could be written"):
        rule_back(rule("- slice: {keys: a, stop: 2}"), manifest_of_state_dict(numbered(a=[5])), lossy=True)


def test_pieces_that_went_different_ways_are_found_by_the_plan_as_a_whole():
    steps = "- copy: {from: a, to: b}\n- slice: {keys: a, stop: 2}\n- slice: {keys: b, start: 2}\n- rename: {c: d}"
    back, _, gone = there_and_back(rule(steps), numbered(a=[5, 3], c=[2]))
    assert (back.way, back.lost, gone) == ("plan", [], [])
    assert body(back) == [{"convert": {"from": ["a", "b"], "to": "a", "do": [{"concat": 0}]}}, {"rename": {"d": "c"}}]


#: Pieces of different sizes, opened before they are joined, and then cut into ranks: one convert cannot say it, the steps do.
TOGETHER = {("megatron-qkv-to-llama", "one layer with grouped queries, padded vocabulary"), ("megatron-tp-to-hf-llama", "two ranks")}


@pytest.mark.parametrize(("name", "test"), CASES, ids=[f"{name}: {test.name}" for name, test in CASES])
def test_the_way_back_from_the_plan_alone(name, test, monkeypatch):
    """The second way, for rules that could be turned round: longer, but as exact."""

    def refuse(*arguments):
        raise Unturned("on purpose")

    monkeypatch.setattr("ckptconv.backwards.turned", refuse)
    rules = builtin.find(name)
    if (name, test.name) in TOGETHER:
        with pytest.raises(Refusal, match="no way back could be written"):
            rule_back(rules, Manifest(test.given), given=test.set, config=test.config, lossy=True)
        return
    back, _, gone = there_and_back(rules, filled(Manifest(test.given)), given=test.set, config=test.config)
    plan = make_plan(rules, Manifest(test.given), given=test.set, config=test.config)
    assert back.way == "plan"
    assert set(gone) <= {each.name for each in invert(plan).lost}


def test_a_form_that_no_step_says_is_refused_with_its_reason():
    steps = "- convert: {from: [a, b], to: [c, d], do: [{concat: 0}, {split: {dim: 0, sizes: [1, 3]}}]}"
    with pytest.raises(Refusal, match="line 5: convert: no step undoes it; a, b are made of 2 tensors together") as caught:
        rule_back(rule(steps), manifest_of_state_dict(numbered(a=[2], b=[2])), lossy=True)
    assert caught.value.code == "CK212"


def test_a_rule_that_leaves_names_as_they_are_checks_a_shape():
    back, parsed, _ = there_and_back(
        rule("- rearrange: {keys: 'h.{i:int}.w', pattern: 'i o -> o i'}"), numbered(h__0__w=[4, 12], h__1__w=[4, 12])
    )
    assert body(back)[0] == {"check": {"keys": "h.0.w", "shape": ["3 * shape()[1]", "*"], "note": "otherwise it is undone already"}}
    source = Manifest({f"h.{i}.w": TensorSpec((4, 12), DType.float32) for i in range(2)})
    with pytest.raises(CkptconvError, match="want shape"):
        make_plan(parsed, source)


# --- the pieces ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "found", "back"),
    [
        ("i + 1", ("i", 1, 1), "i - 1"),
        ("i - 1", ("i", 1, -1), "i + 1"),
        ("2 * i + 1", ("i", 2, 1), "(i - 1) // 2"),
        ("3 * (i - 1)", ("i", 3, -3), "(i + 3) // 3"),
        ("i * 4", ("i", 4, 0), "i // 4"),
        ("5 - i", ("i", -1, 5), "5 - i"),
        ("i // 2", None, ""),
        ("i * i", None, ""),
        ("i + j", None, ""),
        ("i - i", None, ""),
        ("count_below(first, i)", None, ""),
    ],
)
def test_arithmetic_turned_round(expression, found, back):
    assert affine(expressions.parse(expression)) == found
    if found is not None:
        for value in range(2, 30):
            there = expressions.evaluate(expressions.parse(expression), {"i": value}.__getitem__)
            assert expressions.evaluate(expressions.parse(solved(*found)), {"i": there}.__getitem__) == value
        assert solved(*found) == back


def test_choices_turned_round():
    parts = parts_of("a.{x:wq=q|wk=k}.{p:weight|bias}")
    slots = {part.name: part for part in parts if isinstance(part, Slot)}
    shape = opened(Template.parse("b.{x}.{p}"), slots, {}, {})
    assert text_of(shape.keys[0]) == "b.{x:q=wq|k=wk}.{p:weight|bias}"
    assert shape.hints == {"x": ("x",), "p": ("p",)}


def test_two_words_that_became_one_are_the_one_that_was_seen():
    slots = {"f": Slot("f", "choice", (("fc2", "fc2"), ("down", "fc2")))}
    assert text_of(opened(Template.parse("{f}"), slots, {}, {"f": {"down"}}).keys[0]) == "{f:fc2=down}"
    assert text_of(opened(Template.parse("{f}"), slots, {}, {"f": {"down", "fc2"}}).keys[0]) == "{f:fc2}"


def said(entries):
    return {text_of(entry.keys[0]): text_of(entry.values[0]) for entry in entries}


def test_names_that_speak_for_themselves():
    rows = [Row((f"new.{i}.{2 * i}.{p}",), (f"old.{3 * i + 2}.{p}",)) for i in range(4) for p in ("weight", "bias")]
    assert said(guessed(rows, [row.keys[0] for row in rows])) == {"new.{i:int}.{j:int}.{p}": "old.{3*i + 2}.{p}"}


def test_a_pattern_leaves_the_names_of_others_alone():
    rows = [Row((f"a.{i}.{p}",), (f"b.{i}.{p}",), {"i": str(i), "p": p}) for i in (1, 2) for p in ("w", "b")]
    shape = Shape((("a.", Slot("i", "int"), ".", Slot("p", "part")),), (("b.", Want("i"), ".", Want("p")),), {"i": ("i",), "p": ("p",)})
    own = [row.keys[0] for row in rows]
    assert said(fit(rows, shape, own)) == {"a.{i:int}.{p}": "b.{i}.{p}"}
    assert said(fit(rows, shape, [*own, "a.1.s"])) == {"a.{i:int}.{p:w|b}": "b.{i}.{p}"}
    assert said(fit(rows, shape, [*own, "a.0.w"])) == {"a.{i:1|2}.{p}": "b.{i}.{p}"}
    assert said(fit(rows, shape, [*own, "a.0.w", "a.1.s"])) == {"a.{i:1|2}.{p:w|b}": "b.{i}.{p}"}
    half = rows[1:]  # a.1.b, a.2.w, a.2.b: no grid, so each number is said apart
    assert said(fit(half, shape, own)) == {"a.1.b": "b.1.b", "a.2.{p}": "b.2.{p}"}


def test_values_on_one_line_are_what_strict_yaml_reads():
    value = {"from": "a.{i:int}", "no": [1, 1.5, 1e-5, True, None, "1e3", "- x", 'say "hi"', "null", ""], "{p}": {"x y": "a: b"}}
    text = f"version: 1\nname: a\nsummary: s\nvars: {{v: {flow(value)}}}\nsteps: [{{drop: a}}]\n"
    assert parse(text.encode(), "a.yaml").header.vars["v"] == value


def test_a_name_is_swapped_where_it_can_be():
    assert back_name("a-to-b") == "b-to-a"
    assert back_name("a-to-b-to-c") == "a-to-b-to-c-back"
    assert json.loads(json.dumps(back_name("ddp"))) == "ddp-back"
