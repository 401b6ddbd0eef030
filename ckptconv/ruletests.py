"""A rule file's own tests: names and shapes in, names and shapes out. They need no weights, no files and no torch.

Every test is planned again under a shuffled key order, and its result is planned a second time: a rule must refuse its own output or
leave it alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from ckptconv.errors import CkptconvError, Problem
from ckptconv.plan import Plan
from ckptconv.planner import make_plan
from ckptconv.ruleset.model import RuleFile, RuleTest
from ckptconv.spec import Manifest, TensorSpec


@dataclass(frozen=True)
class Outcome:
    """One test: what failed, in sentences; none when it passed."""

    name: str
    failures: tuple[str, ...]
    todo: bool = False

    @property
    def passed(self) -> bool:
        """A test marked todo may fail, and must: once it passes, the mark has to go."""
        return bool(self.failures) if self.todo else not self.failures


def run_tests(rules: RuleFile) -> list[Outcome]:
    """Every test of the rule file. A file without tests is one failed outcome."""
    if not rules.header.tests:
        return [Outcome("(no test)", ("a rule without a test proves nothing: add `tests:`",))]
    return [Outcome(test.name, tuple(_failures(rules, test)), test.todo) for test in rules.header.tests]


def problems(rules: RuleFile) -> list[Problem]:
    """The failed tests as problems of the rule file."""
    return [
        Problem("CK108", f"test {outcome.name!r}: {'; '.join(outcome.failures) or 'passes, but is marked todo'}", where=rules.file)
        for outcome in run_tests(rules)
        if not outcome.passed
    ]


def _failures(rules: RuleFile, test: RuleTest) -> list[str]:
    try:
        plan = _plan(rules, test, test.given)
    except CkptconvError as error:
        codes = [problem.code for problem in error.problems]
        if test.refuses is None:
            return [f"refused: {error.problems[0].what} [{codes[0]}]"]
        return [] if test.refuses in codes else [f"refused with {', '.join(codes)}, not {test.refuses}"]
    if test.refuses is not None:
        return [f"must be refused with {test.refuses}, but was planned"]
    wanted = test.given if test.expect == "same" else test.expect
    if wanted is None:
        return ["want expect or refuses"]
    found = _compared(plan.manifest.tensors, wanted)
    if found:
        return found
    return _shuffled(rules, test, plan) + _second_run(rules, test, plan)


def _plan(rules: RuleFile, test: RuleTest, given: Mapping[str, TensorSpec]) -> Plan:
    return make_plan(rules, Manifest(given), given=test.set, config=test.config)


def _compared(found: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]) -> list[str]:
    missing = [name for name in wanted if name not in found]
    noisy = [name for name in found if name not in wanted]
    wrong = [f"{name} is {found[name]}, not {spec}" for name, spec in wanted.items() if name in found and found[name] != spec]
    return (
        ([f"missing: {', '.join(missing)}"] if missing else [])
        + ([f"noisy: {', '.join(noisy)}"] if noisy else [])
        + ([f"wrong: {'; '.join(wrong)}"] if wrong else [])
    )


def _shuffled(rules: RuleFile, test: RuleTest, plan: Plan) -> list[str]:
    names = list(test.given)
    random.Random(0).shuffle(names)  # the same order every time: a failure can be looked at again
    again = _plan(rules, test, {name: test.given[name] for name in names})
    same = {output.name: output.expr for output in again.outputs} == {output.name: output.expr for output in plan.outputs}
    return [] if same else ["the result depends on the order of the keys"]


def _second_run(rules: RuleFile, test: RuleTest, plan: Plan) -> list[str]:
    try:
        again = _plan(rules, test, plan.manifest.tensors)
    except CkptconvError:
        return []
    changed = [name for name, spec in again.manifest.tensors.items() if plan.manifest.tensors.get(name) != spec]
    return [f"a second run changes its own result: {', '.join(changed[:3])}"] if changed else []
