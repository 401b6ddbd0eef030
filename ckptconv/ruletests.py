"""A rule file's own tests: names and shapes in, names and shapes out. They need no weights, no files and no torch.

Every test is planned again under a shuffled key order, its result is planned a second time (a rule must refuse its own output or leave it
alone), and the plan is inverted: what no step drops, cuts or computes away must come back.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from ckptconv.errors import CkptconvError, Problem, Refusal, printable
from ckptconv.invert import invert
from ckptconv.names import collapse
from ckptconv.plan import Apply, Expr, Plan, Read, walk
from ckptconv.planner import make_plan
from ckptconv.ruleset.model import RuleFile, RuleTest
from ckptconv.ruleset.testfile import PlacedTest, tests_of
from ckptconv.spec import Manifest, TensorSpec

_MAX_SHOWN = 20

#: The kinds of failure that a new `expect` would mend.
MENDABLE = frozenset({"missing", "noisy", "wrong shape", "wrong dtype", "no expectation"})


class Failure(Struct, frozen=True):
    """One thing that is wrong: of which kind, and a sentence."""

    kind: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.sentence}"


class Outcome(Struct, frozen=True):
    """One test: what failed; nothing when it passed. ``made`` is what the rule makes, where it could be planned."""

    name: str
    failures: tuple[Failure, ...]
    todo: bool = False
    placed: PlacedTest | None = None
    made: Mapping[str, TensorSpec] | None = None

    @property
    def passed(self) -> bool:
        """A test marked todo may fail, and must: once it passes, the mark has to go."""
        return bool(self.failures) if self.todo else not self.failures


def run_tests(rules: RuleFile) -> list[Outcome]:
    """Every test of the rule file, and of the test file beside it. A rule without tests is one failed outcome."""
    tests = tests_of(rules)
    if not tests:
        return [Outcome("(no test)", (Failure("no test", "a rule without a test proves nothing: add `tests:`"),))]
    return [_outcome(rules, placed) for placed in tests]


def problems(rules: RuleFile, outcomes: Iterable[Outcome]) -> list[Problem]:
    """The failed tests as problems of the rule file."""
    found = []
    for outcome in outcomes:
        if outcome.passed:
            continue
        where = outcome.placed.where if outcome.placed is not None else rules.file
        failures = outcome.failures or (Failure("todo", "the test passes now: take todo away"),)
        found += [Problem("CK108", f"test {printable(outcome.name)!r}: {failure}", where=where) for failure in failures]
    return found


def _outcome(rules: RuleFile, placed: PlacedTest) -> Outcome:
    test = placed.test
    try:
        plan = _plan(rules, test, test.given)
    except CkptconvError as error:
        return Outcome(test.name, tuple(_refused(test, error)), test.todo, placed)
    return Outcome(test.name, tuple(_failures(rules, test, plan)), test.todo, placed, plan.manifest.tensors)


def _refused(test: RuleTest, error: CkptconvError) -> list[Failure]:
    codes = list(dict.fromkeys(problem.code for problem in error.problems))
    if test.refuses in codes:
        return []
    first = error.problems[0]
    wanted = f"{test.refuses} is expected, but the rule refuses" if test.refuses else "the rule refuses what it should convert"
    return [Failure("refused", f"{wanted} with {', '.join(codes)}: {first.what}" + (f" ({first.where})" if first.where else ""))]


def _failures(rules: RuleFile, test: RuleTest, plan: Plan) -> list[Failure]:
    if test.refuses is not None:
        return [Failure("not refused", f"the rule must refuse this with {test.refuses}, but converts it")]
    wanted = test.given if test.expect == "same" else test.expect
    if wanted is None:
        return [Failure("no expectation", "a test says what it wants: expect or refuses")]
    return _compared(plan.manifest.tensors, wanted) or [*_shuffled(rules, test, plan), *_second_run(rules, test, plan), *_inverse(plan)]


def _plan(rules: RuleFile, test: RuleTest, given: Mapping[str, TensorSpec]) -> Plan:
    return make_plan(rules, Manifest(given), given=test.set, config=test.config, shown_source="the test's names")


def _compared(found: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]) -> list[Failure]:
    missing = [name for name in wanted if name not in found]
    noisy = [name for name in found if name not in wanted]
    wrong: dict[tuple[str, TensorSpec, TensorSpec], list[str]] = {}
    for name, spec in wanted.items():
        have = found.get(name, spec)
        if have != spec:
            kind = "wrong dtype" if have.shape == spec.shape else "wrong shape"
            wrong.setdefault((kind, have, spec), []).append(name)
    failures = [Failure("missing", f"{_listed(missing)} {_are(missing)} expected, but not made")] if missing else []
    failures += [Failure("noisy", f"{_listed(noisy)} {_are(noisy)} made, but not expected")] if noisy else []
    return failures + [Failure(kind, f"{_listed(names)} {_are(names)} {have}, not {spec}") for (kind, have, spec), names in wrong.items()]


def _shuffled(rules: RuleFile, test: RuleTest, plan: Plan) -> list[Failure]:
    names = list(test.given)
    random.Random(0).shuffle(names)  # the same order every time: a failure can be looked at again
    try:
        again = _plan(rules, test, {name: test.given[name] for name in names})
    except CkptconvError as error:
        return [Failure("key order", f"under another order of the keys the rule refuses: {error.problems[0].what}")]
    first, second = ({output.name: output.expr for output in made.outputs} for made in (plan, again))
    differing = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return [Failure("key order", f"{_listed(differing)} {_depend(differing)} on the order of the keys")] if differing else []


def _second_run(rules: RuleFile, test: RuleTest, plan: Plan) -> list[Failure]:
    made = plan.manifest.tensors
    try:
        again = _plan(rules, test, made).manifest.tensors
    except CkptconvError:
        return []
    changed = [name for name in {**made, **again} if made.get(name) != again.get(name)]
    return [Failure("second run", f"the rule changes its own result: {_listed(changed)}")] if changed else []


def _inverse(plan: Plan) -> list[Failure]:
    """The way back: every source tensor with its name, shape and dtype, but for those that a step drops, cuts or computes lossily."""
    try:
        inversion = invert(plan)
    except Refusal as refusal:
        return [Failure("inverse", f"the way back cannot be planned: {refusal.what}")]
    back, lost = inversion.plan.manifest.tensors, {each.name: each.reason for each in inversion.lost}
    source, excused = plan.source.tensors, _excused(plan)
    failures = []
    gone = [name for name in source if name not in back and name not in excused]
    for reason in dict.fromkeys(lost.get(name, "it is not even listed as lost") for name in gone):
        names = [name for name in gone if lost.get(name, reason) == reason]
        failures.append(
            Failure(
                "inverse", f"{_listed(names)} cannot be had back, though no step drops, cuts or computes {_it(names)} lossily: {reason}"
            )
        )
    wrong = [name for name, spec in source.items() if name in back and back[name] != spec]
    if wrong:
        failures.append(Failure("inverse", f"{_listed(wrong)} would come back as {back[wrong[0]]}, not {source[wrong[0]]}"))
    new = [name for name in back if name not in source]
    return failures + ([Failure("inverse", f"the way back makes {_listed(new)}, which the source does not have")] if new else [])


def _excused(plan: Plan) -> set[str]:
    """The source tensors that need not come back: dropped, or under a transform that does not give all of its argument back.

    Told from the plan itself, not from what the inverter says of it: the two must agree.
    """
    excused = {name for drop in plan.dropped for name in drop.sources}
    lossy: list[Expr] = []
    for node in walk(output.expr for output in plan.outputs):
        if not isinstance(node, Apply):
            continue
        back = [0] * len(node.arguments)
        for piece in node.transform.recover(*(argument.spec for argument in node.arguments)):
            back[piece.argument] += _count(piece.box.size)
        lossy += [argument for argument, count in zip(node.arguments, back, strict=True) if count < argument.spec.numel]
    return excused | {node.name for node in walk(lossy) if isinstance(node, Read)}


def _count(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _listed(names: Sequence[str]) -> str:
    """The names as templates, the first of many."""
    templates = collapse(names)
    shown = ", ".join(printable(template) for template in templates[:_MAX_SHOWN])
    return shown + (f" and {len(templates) - _MAX_SHOWN} more" if len(templates) > _MAX_SHOWN else "")


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _it(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _depend(names: Sequence[str]) -> str:
    return "depends" if len(names) == 1 else "depend"
