"""Steps as before/after tables: names and shapes in, names, shapes and expressions out."""

import pytest

from ckptconv.errors import CkptconvError, FitError, UsageError
from ckptconv.plan import Plan, Read
from ckptconv.planner import make_plan
from ckptconv.report.changes import text_of
from ckptconv.ruleset.model import parse
from ckptconv.spec import DType, Manifest, TensorSpec


def manifest(tensors, ties=()):
    return Manifest({name: TensorSpec(tuple(shape), DType.float32) for name, shape in tensors.items()}, ties)


def rules(steps, more=""):
    return parse(f"version: 1\nname: r\nsummary: s\n{more}steps:\n{steps}".encode(), "r.yaml")


def planned(steps, tensors, more="", **options):
    return make_plan(rules(steps, more), manifest(tensors), **options)


def shapes(plan):
    return {output.name: list(output.expr.spec.shape) for output in plan.outputs}


@pytest.mark.parametrize(
    ("steps", "given", "expect"),
    [
        ("- strip_prefix: module.", {"module.a": [1], "module.b": [2]}, {"a": [1], "b": [2]}),
        ("- strip_prefix: {prefix: m., where: some}", {"m.a": [1], "b": [2]}, {"a": [1], "b": [2]}),
        ("- strip_prefix: {prefix: [m., o.], repeat: true}", {"m.o.m.a": [1], "m.o.m.b": [2]}, {"a": [1], "b": [2]}),
        ("- strip_prefix: {prefix: x., optional: true}", {"a": [1]}, {"a": [1]}),
        ("- add_prefix: model.", {"a": [1]}, {"model.a": [1]}),
        ("- add_prefix: {prefix: m., keys: 'a.{p}'}", {"a.w": [1], "b.w": [2]}, {"m.a.w": [1], "b.w": [2]}),
        ("- strip_infix: [_w, _x.y]", {"a._w.b": [1], "_w._x.y.c": [2], "d": [3]}, {"a.b": [1], "c": [2], "d": [3]}),
        ("- rename: {a: b, b: a}", {"a": [1], "b": [2]}, {"b": [1], "a": [2]}),
        ("- rename: {'l.{i:int}.{p}': 'm.{i + 1}.{p}'}", {"l.0.w": [1], "l.1.w": [2]}, {"m.1.w": [1], "m.2.w": [2]}),
        ("- rename: {from: a, to: b}", {"a": [1]}, {"b": [1]}),
        (r"- rename: {'regex:l(\d)\.(.*)': 'layer.\1.\2'}", {"l3.w": [1]}, {"layer.3.w": [1]}),
        ("- drop: [a, 'x.**']", {"a": [1], "x.y.z": [2], "b": [3]}, {"b": [3]}),
        ("- keep: 'a.**'", {"a.w": [1], "b.w": [2]}, {"a.w": [1]}),
        ("- copy: {from: a, to: b}", {"a": [1]}, {"a": [1], "b": [1]}),
        ("- copy: {from: a, to: '{x:p|q}'}", {"a": [1]}, {"a": [1], "p": [1], "q": [1]}),
        ("- tie: {from: a, to: b}", {"a": [1]}, {"a": [1], "b": [1]}),
        ("- reshape: {keys: a, shape: [-1]}", {"a": [2, 3]}, {"a": [6]}),
        ("- reshape: {from: a, to: b, shape: [3, -1]}", {"a": [2, 3]}, {"b": [3, 2]}),
        ("- rearrange: {keys: a, pattern: '(h two) i -> (two h) i', two: 2}", {"a": [8, 3]}, {"a": [8, 3]}),
        ("- rearrange: {keys: ['{m}.weight'], pattern: 'i o -> o i'}", {"f.weight": [2, 3]}, {"f.weight": [3, 2]}),
        ("- slice: {keys: a, dim: 1, start: 1, stop: -1}", {"a": [2, 5]}, {"a": [2, 3]}),
        ("- index: {keys: a, dim: 1, take: [0, 2, 1]}", {"a": [2, 3]}, {"a": [2, 3]}),
        ("- pad: {keys: a, size: '8 * D'}", {"a": [13, 3]}, {"a": [16, 3]}),
        ("- pad: {keys: a, before: 1, after: D, dim: -1}", {"a": [2, 3]}, {"a": [2, 6]}),
        ("- repeat: {keys: a, times: D}", {"a": [2, 3]}, {"a": [4, 3]}),
        ("- affine: {keys: a, add: 1.0}", {"a": [2, 3]}, {"a": [2, 3]}),
        ("- split: {from: a, to: ['q', 'k'], dim: 1}", {"a": [2, 6]}, {"q": [2, 3], "k": [2, 3]}),
        ("- split: {from: 'qkv.{p}', to: '{x:q|k|v}.{p}'}", {"qkv.w": [6, 2], "qkv.b": [6]},
         {"q.w": [2, 2], "k.w": [2, 2], "v.w": [2, 2], "q.b": [2], "k.b": [2], "v.b": [2]}),
        ("- split: {from: a, to: [q, k, v], sizes: ['2*D', D, D]}", {"a": [8]}, {"q": [4], "k": [2], "v": [2]}),
        ("- split: {from: 'a.{p}', to: '{x:q|k|v}.{p}', layout: '(g n d) ...', along: n, sizes: [2, 1, 1], g: D, d: 3}", {"a.w": [24, 5], "a.b": [24]},
         {"q.w": [12, 5], "k.w": [6, 5], "v.w": [6, 5], "q.b": [12], "k.b": [6], "v.b": [6]}),
        ("- concat: {from: '{x:q|k|v}.w', to: a.w, layout: '(g n d) ...', along: n, g: D, d: 3}", {"q.w": [12, 5], "k.w": [6, 5], "v.w": [6, 5]}, {"a.w": [24, 5]}),
        ("- concat: {from: ['{m:**}.gate.w', '{m:**}.up.w'], to: '{m}.gate_up.w'}", {"l.gate.w": [2, 3], "l.up.w": [4, 3]}, {"l.gate_up.w": [6, 3]}),
        ("- concat: {from: '{x:q|k|v}.w', to: qkv.w}", {"v.w": [1], "k.w": [2], "q.w": [3]}, {"qkv.w": [6]}),
        ("- stack: {from: 'e.{e:int}.w', over: e, to: all.w}", {f"e.{i}.w": [2, 3] for i in (10, 9, *range(9))}, {"all.w": [11, 2, 3]}),
        ("- stack: {from: 'e.{e:int}.w', over: e, to: all.w, dim: -1}", {"e.0.w": [2, 3], "e.1.w": [2, 3]}, {"all.w": [2, 3, 2]}),
        ("- unstack: {from: all.w, over: e, to: 'e.{e}.w'}", {"all.w": [2, 4, 3]}, {"e.0.w": [4, 3], "e.1.w": [4, 3]}),
        ("- cast: {keys: a, dtype: float64}", {"a": [2]}, {"a": [2]}),
        ("- fill: {to: b, shape: [2, 'shape(\"a\")[0]'], value: zeros}", {"a": [3]}, {"a": [3], "b": [2, 3]}),
        ("- fill: {for: '{m}.mean', to: '{m}.count', shape: [], dtype: int64, value: 0}", {"bn.mean": [3]}, {"bn.mean": [3], "bn.count": []}),
        ("- {drop: a, when: 'D == 3'}", {"a": [1], "b": [1]}, {"a": [1], "b": [1]}),
        ("- {drop: a, when: {all: [b]}}", {"a": [1], "b": [1]}, {"b": [1]}),
        ("- check: {keys: a, shape: ['*', D], dtype: float32, rank: 2, count: 1}", {"a": [5, 2]}, {"a": [5, 2]}),
    ],
)  # fmt: skip
def test_a_step(steps, given, expect):
    assert shapes(planned(steps, given, more="vars: {D: 2}\n")) == expect


@pytest.mark.parametrize(
    ("steps", "given", "message"),
    [
        ("- drop: nothing", {"a": [1]}, "r.yaml:5:3  drop (step 1)  [CK201]\n  the step matched nothing: nothing\n  found: a\n  try: ckptconv inspect SRC --match '**', or add optional: true"),
        ("- strip_prefix: module.", {"module.a": [1], "b": [1]},
         "r.yaml:5:3  strip_prefix (step 1)  [CK204]\n  not all names start with 'module.': 1 do, 1 do not\n  found: without it: b\n  try: drop these first, or add where: some"),
        ("- rename: {a: b}", {"a": [1], "b": [1]},
         "r.yaml:5:3  rename (step 1)  [CK202]\n  two results under one name: b\n  found: r.yaml:5  rename (step 1) and passed through\n  try: drop or rename one of them first"),
        ("- rename: {'{p}': 'x.{p}', 'a': y}", {"a": [1]},
         "r.yaml:5:3  rename (step 1)  [CK203]\n  two entries claim a\n  found: '{p}' and 'a'\n  try: make one of them narrower"),
        ("- stack: {from: 'e.{e:int}.w', over: e, to: w}", {"e.0.w": [1], "e.2.w": [1]},
         "r.yaml:5:3  stack (step 1)  [CK205]\n  'e.{e:int}.w' has a gap: e=1\n  found: 2 of 3 members"),
        ("- concat: {from: ['{m}.a', '{m}.b'], to: '{m}.c'}", {"x.a": [1], "x.b": [1], "y.a": [1]},
         "r.yaml:5:3  concat (step 1)  [CK205]\n  '{m}.b' has no tensor at m=y\n  found: only y.a and its like"),
        ("- split: {from: a, to: [b, c]}", {"a": [3]},
         "r.yaml:5:3  split (step 1)  [CK206]\n  a: axis 0 has 3, which is no multiple of 2\n  found: [3] float32\n  try: give sizes"),
        ("- split: {from: a, to: [b, c], sizes: [1, 1]}", {"a": [3]},
         "r.yaml:5:3  split (step 1)  [CK206]\n  a: the sizes [1, 1] add up to 2, but axis 0 has 3\n  found: [3] float32"),
        ("- reshape: {keys: a, shape: [H]}", {"a": [3]},
         "r.yaml:5:3  reshape (step 1)  [CK104]\n  a: variable 'H' has no value\n  try: give it with --set NAME=VALUE, --config FILE, or vars: in the rule file"),
        ("- slice: {keys: a, stop: 9}", {"a": [3]}, "r.yaml:5:3  slice (step 1)  [CK206]\n  a: 0:9 is outside axis 0, which has 3\n  found: [3] float32"),
        ("- rename: {'a.{i:int}': '{config.x}'}", {"a.1": [3]},
         "r.yaml:5:3  rename (step 1)  [CK104]\n  a.1 -> {config.x}: there is no config.json beside the source; name one with --config FILE\n"
         "  try: give it with --set NAME=VALUE, --config FILE, or vars: in the rule file"),
        ("- rename: {a: __metadata__}", {"a": [1]},
         "r.yaml:5:3  rename (step 1)  [CK209]\n  the name __metadata__ is reserved by safetensors: '__metadata__'\n  found: made from a"),
        ("- fill: {to: __metadata__, shape: [], value: zeros}", {"a": [2]},
         "r.yaml:5:3  fill (step 1)  [CK209]\n  the name __metadata__ is reserved by safetensors: '__metadata__'"),
        ("- unstack: {from: a, over: e, to: 'x.{e}'}", {"a": [200000]},
         "r.yaml:5:3  unstack (step 1)  [CK211]\n  a: unstacking would give 200,000 tensors; at most 100,000 are allowed"),
    ],
)  # fmt: skip
def test_a_step_that_does_not_fit_says_where_what_and_what_to_try(steps, given, message):
    with pytest.raises(UsageError) as error:
        planned(steps, given)
    assert str(error.value) == message


def test_all_problems_come_at_once_without_their_echoes():
    with pytest.raises(UsageError) as error:
        planned("- drop: x\n- drop: y\n- split: {from: a, to: [b, c]}\n- rename: {b: d}\n", {"a": [3]})
    assert [problem.code for problem in error.value.problems] == ["CK201", "CK201", "CK206"]


@pytest.mark.parametrize(
    ("steps", "more", "message"),
    [
        ("- check: {keys: 'a', shape: [2, 3]}", "", "r.yaml:5:3  check (step 1)  [CK207]\n  want shape [2, 3], found [1]\n  found: a"),
        ("- drop: b", "when: {all: [c]}\n", "r.yaml  when  [CK208]\n  the rule r@1 is not for this checkpoint: no name matches 'c'"),
        ("- drop: b", "expect_all: true\n", "r.yaml  [CK210]\n  no step touches a\n  try: rename or drop it, or leave expect_all out"),
        ("- drop: '**'", "", "r.yaml  [CK207]\n  nothing is left: every tensor was dropped"),
    ],
)
def test_a_checkpoint_that_the_rule_is_not_for_is_exit_code_4(steps, more, message):
    with pytest.raises(FitError) as error:
        planned(steps, {"a": [1], "b": [1]}, more)
    assert str(error.value) == message


def test_a_tie_of_the_source_is_one_read_and_stays_tied():
    source = manifest({"embed": [4, 2], "head": [4, 2], "x": [1]}, ties=(("embed", "head"),))
    plan = make_plan(rules("- rename: {embed: wte, head: lm_head}"), source)
    assert plan.ties == (("wte", "lm_head"),)
    assert [output.name for output in plan.stored] == ["wte", "x"]
    cast = make_plan(rules("- cast: {keys: '**', dtype: float64}"), source)
    assert cast.ties == (("embed", "head"),)
    undone = make_plan(rules("- cast: {keys: head, dtype: float64}"), source)
    assert undone.ties == ()
    assert undone.notes == ("embed, head come from one tied tensor (embed) and are written as separate tensors",)
    assert make_plan(rules("- rename: {x: y}"), source, untie=True).ties == ()


def test_tie_shares_and_copy_does_not():
    assert planned("- tie: {from: a, to: b}", {"a": [1]}).ties == (("a", "b"),)
    assert planned("- copy: {from: a, to: b}", {"a": [1]}).ties == ()


def test_results_stand_at_the_place_of_what_they_were_made_of():
    plan = planned("- concat: {from: [b, d], to: z}\n- split: {from: a, to: [a1, a2]}", {"a": [2], "b": [1], "c": [1], "d": [1], "e": [1]})
    assert list(shapes(plan)) == ["a1", "a2", "z", "c", "e"]


def test_an_expression_reads_like_what_it_does():
    plan = planned("- stack: {from: 'e.{e:int}', over: e, to: s}\n- cast: {keys: s, dtype: bfloat16}", {"e.0": [2], "e.1": [2]})
    assert "bfloat16" in text_of(plan.outputs[0].expr)
    assert text_of(plan.outputs[0].expr).count("·") == 2


def test_a_plan_survives_json():
    plan = planned(
        "- split: {from: a, to: [q, k]}\n- fill: {to: z, shape: [2], value: {normal: {seed: 3}}}\n- drop: b",
        {"a": [4, 2], "b": [1], "c": [3]},
    )
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.fingerprint == plan.fingerprint
    assert isinstance(again.outputs[2].expr, Read)


@pytest.mark.parametrize("broken", [{}, {"ckptconv_plan": 1}, {"ckptconv_plan": 2}, []])
def test_what_is_not_a_plan_is_refused(broken):
    with pytest.raises(ValueError, match="not a saved plan"):
        Plan.from_json(broken)


def test_a_saved_plan_that_was_tampered_with_is_refused():
    good = planned("- fill: {to: z, shape: [2], value: ones}", {"a": [4], "b": [2]}).to_json()

    def broken(change):
        import copy

        data = copy.deepcopy(good)
        change(data)
        with pytest.raises(ValueError, match=r"saved plan|saved transform|saved manifest|dtype"):
            Plan.from_json(data)

    broken(lambda data: data["outputs"].append(data["outputs"][0]))
    broken(lambda data: data["outputs"][0].__setitem__(0, "a\nb"))
    broken(lambda data: data["outputs"][0].__setitem__(1, 99))
    broken(lambda data: data["outputs"].__setitem__(0, 5))
    broken(lambda data: data["nodes"].__setitem__(0, {"read": "nope"}))
    broken(lambda data: data["nodes"].__setitem__(0, {"apply": {"op": "x"}, "of": []}))
    broken(lambda data: data["nodes"][-1].__setitem__("fill", "os.system"))
    broken(lambda data: data["nodes"][-1].__setitem__("spec", ["float32", -1]))
    broken(lambda data: data["ties"].append(["a", "nope"]))


def test_many_names_and_patterns_stay_fast_enough_to_be_linear():
    given = {f"layers.{i}.m{j}.weight": [2] for i in range(200) for j in range(50)}
    steps = "- rename:\n" + "".join(f"    'layers.{{i:int}}.m{j}.{{p}}': 'blocks.{{i}}.n{j}.{{p}}'\n" for j in range(50))
    assert len(planned(steps, given).outputs) == 10_000


def test_errors_are_all_of_one_family():
    assert issubclass(UsageError, CkptconvError)
    assert (UsageError.exit_code, FitError.exit_code) == (2, 4)
