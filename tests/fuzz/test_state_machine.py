"""Rules against manifests: steps are added to a rule file one after the other, and after each the plan is made, or refused in sentences.

What holds whenever a plan is made: no two outputs share a name, every read is of the source, shapes are what numpy-free arithmetic says they
are, and the plan is the same when it is made again, saved and loaded.
"""

import json
import string

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ckptconv.errors import CkptconvError
from ckptconv.plan import Plan, reads
from ckptconv.planner import make_plan
from ckptconv.ruleset import model
from ckptconv.spec import DType, Manifest, TensorSpec

PARTS = st.sampled_from(["a", "b", "layers", "0", "1", "2", "10", "weight", "bias", "w"])
NAMES = st.lists(PARTS, min_size=1, max_size=3).map(".".join)
DTYPES = st.sampled_from([DType.float32, DType.bfloat16, DType.float64, DType.int64, DType.bool])
PATTERNS = st.one_of(
    NAMES,
    st.sampled_from(
        ["{p}", "{m:**}", "layers.{i:int}.{p}", "{m:**}.{x:weight|bias}", "{a}.{b}", "regex:(.*)weight", "**", "{", "a**b", ""]
    ),
)
TEMPLATES = st.one_of(
    NAMES,
    st.sampled_from(
        ["{p}", "x.{m}", "layers.{i + 1}.{p}", "{b}.{a}", "{x:q|k}.w", r"\1v", "{nothing}", "{i // 0}", "__metadata__", "{", ""]
    ),
)
SIZES = st.one_of(st.integers(-2, 6), st.sampled_from(["n", "n * 2", "shape()[0]", "9**9", "10**30", "1 // 0", "[1]", "x" * 2000]))
STEPS = st.one_of(
    st.builds(lambda table: {"rename": table}, st.dictionaries(PATTERNS, TEMPLATES, min_size=1, max_size=3)),
    st.builds(lambda keys: {"drop": keys}, st.lists(PATTERNS, min_size=1, max_size=2)),
    st.builds(lambda prefix: {"add_prefix": prefix + "."}, PARTS),
    st.builds(lambda prefix: {"strip_prefix": prefix + "."}, PARTS),
    st.builds(lambda source, to: {"copy": {"from": source, "to": to}}, PATTERNS, TEMPLATES),
    st.builds(lambda source, to: {"tie": {"from": source, "to": to}}, PATTERNS, TEMPLATES),
    st.builds(lambda keys, shape: {"reshape": {"keys": keys, "shape": shape}}, PATTERNS, st.lists(SIZES, max_size=3)),
    st.builds(lambda keys, dtype: {"cast": {"keys": keys, "dtype": dtype}}, PATTERNS, st.sampled_from(["float16", "int8", "float8_e4m3fn", "no"])),
    st.builds(lambda keys, pattern: {"rearrange": {"keys": keys, "pattern": pattern}}, PATTERNS, st.sampled_from(["a b -> b a", "(a b) -> a b", "... -> ... 1", "a -> b", "->"])),
    st.builds(lambda source, to, dim: {"split": {"from": source, "to": to, "dim": dim}}, PATTERNS, st.lists(TEMPLATES, min_size=1, max_size=3), st.integers(-3, 3)),
    st.builds(lambda source, to, dim: {"concat": {"from": source, "to": to, "dim": dim}}, st.lists(PATTERNS, min_size=1, max_size=3), TEMPLATES, st.integers(-3, 3)),
    st.builds(lambda source, to: {"stack": {"from": source, "over": "i", "to": to}}, PATTERNS, TEMPLATES),
    st.builds(lambda source: {"unstack": {"from": source, "over": "j", "to": "u.{j}"}}, PATTERNS),
    st.builds(lambda to, shape: {"fill": {"to": to, "shape": shape, "value": "zeros"}}, TEMPLATES, st.lists(SIZES, max_size=2)),
    st.builds(lambda keys, times: {"repeat": {"keys": keys, "dim": 0, "times": times}}, PATTERNS, SIZES),
    st.builds(lambda text: {text: 1}, st.text(string.ascii_lowercase, min_size=1, max_size=8)),
)  # fmt: skip


class RulesAgainstManifests(RuleBasedStateMachine):
    """One checkpoint, one growing rule file."""

    @initialize(
        tensors=st.dictionaries(NAMES, st.tuples(st.lists(st.integers(0, 4), max_size=3), DTYPES), min_size=1, max_size=6),
        n=st.integers(-1, 5),
    )
    def start(self, tensors, n):
        self.source = Manifest({name: TensorSpec(tuple(shape), dtype) for name, (shape, dtype) in tensors.items()})
        self.steps, self.n, self.plan = [], n, None

    @rule(step=STEPS, optional=st.booleans())
    def add(self, step, optional):
        self.steps = [*self.steps[-5:], {**step, **({"optional": True} if optional else {})}]
        self.plan = self.planned()
        if self.plan is None:
            self.steps.pop()  # what is refused is left out, so that the file goes on growing

    def planned(self):
        text = json.dumps({"version": 1, "name": "t", "summary": "t", "vars": {"n": self.n}, "steps": self.steps})
        try:
            return make_plan(model.parse(text.encode(), "t.yaml"), self.source)
        except CkptconvError as error:
            refusal = error
        assert refusal.exit_code in (2, 4)
        assert refusal.problems
        for problem in refusal.problems:
            assert problem.where.startswith("t.yaml"), problem
            assert str(problem).replace("\n", "").isprintable()
        return None

    @invariant()
    def what_is_planned_is_sound(self):
        if getattr(self, "plan", None) is None:
            return
        names = [output.name for output in self.plan.outputs]
        assert len(set(names)) == len(names)
        assert {name for output in self.plan.outputs for name in reads(output.expr)} <= set(self.source.tensors)
        assert all(size >= 0 for output in self.plan.outputs for size in output.expr.spec.shape)
        assert Plan.from_json(json.loads(json.dumps(self.plan.to_json()))) == self.plan
        assert self.planned() == self.plan


TestRulesAgainstManifests = RulesAgainstManifests.TestCase
TestRulesAgainstManifests.settings = settings(
    max_examples=60, stateful_step_count=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
