"""The inverse of a rule file, written as a rule file that a person can read, keep and change.

Two ways: step by step, last to first (:mod:`ckptconv.backsteps`), and, where a step cannot be turned round on its own, from the inverse
plan as a whole (:mod:`ckptconv.backplan`). Whatever is written is proved before it is given back: parsed and planned on the forward
result, it must give the source's own names, shapes and dtypes, but for what is said to be lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from ckptconv.backplan import Unturned, Written, derived
from ckptconv.backsteps import Loss, lowered, turned
from ckptconv.errors import CkptconvError, Refusal, printable
from ckptconv.invert import invert
from ckptconv.names import collapse
from ckptconv.plan import Plan, Read, reads
from ckptconv.planner import initial_table, make_plan
from ckptconv.ruleset import expressions
from ckptconv.ruleset.expressions import Node
from ckptconv.ruleset.model import RuleFile, parse
from ckptconv.ruleset.patterns import Pattern
from ckptconv.ruleset.steps import Include, Scope, Table
from ckptconv.ruleset.steps.base import Entry
from ckptconv.ruletests import run_tests
from ckptconv.ruletext import PLAIN, flow, specs, step_lines, test_lines
from ckptconv.spec import Manifest

_FEW, _MANY = 60, 200


class BackRule(Struct, frozen=True):
    """The way back: the text of its rule file, and what it does not bring back (step, names, reason)."""

    text: str
    lost: list[tuple[str, str, str]]
    way: str = "steps"  #: ``steps`` where every step was turned round, ``plan`` where the steps were derived from the inverse plan
    count: int = 0  #: how many source tensors do not come back as they were


class Lossy(Refusal):
    """The way back would lose something, and nobody said that it may."""

    def __init__(self, back: BackRule) -> None:
        shown = "; ".join(f"{names} ({label}: {reason})" for label, names, reason in back.lost[:5])
        super().__init__("the rules cannot be undone", code="CK212", found=printable(shown), try_="--lossy leaves it out")
        self.back = back


def back_name(name: str) -> str:
    """The name of the way back.

    >>> back_name("timm-vit-to-hf-vit"), back_name("ddp")
    ('hf-vit-to-timm-vit', 'ddp-back')
    """
    parts = name.split("-to-")
    return f"{parts[1]}-to-{parts[0]}" if len(parts) == 2 and all(parts) else f"{name}-back"[:100]


def rule_back(
    rules: RuleFile, like: Manifest, *, given: Mapping[str, Any] | None = None, config: Mapping[str, Any] | None = None, lossy: bool = False
) -> BackRule:
    """The rule file that undoes ``rules`` for checkpoints like ``like`` (the names and shapes of a source).

    Raises :class:`Lossy` (CK212) where something cannot come back and ``lossy`` is not said; it holds the rule all the same. Raises
    :class:`~ckptconv.errors.Refusal` where no way back could be written, and what the planner raises where ``rules`` do not fit ``like``.
    """
    job = _Job(rules, like, dict(given or {}), config)
    back, reasons = None, []
    for way, written in (("steps", job.by_steps), ("plan", job.by_plan)):
        if back is not None and len(invert(job.forward).lost) >= back.count:
            break  # nothing to gain: pieces that went different ways are found only by the plan as a whole
        try:
            found = job.finished(*written(), way)
            back = found if back is None or found.count < back.count else back
        except Unturned as reason:
            reasons.append(str(reason))
    if back is None:
        what = f"no way back could be written: {reasons[0]}"
        raise Refusal(what, code="CK212", found=printable(reasons[1]), try_="ckptconv convert --reverse undoes it without a rule")
    if back.lost and not lossy:
        raise Lossy(back)
    return back


class _Job:
    """One rule file and one manifest, planned forward; both ways of writing the way back start here."""

    def __init__(self, rules: RuleFile, like: Manifest, given: dict[str, Any], config: Mapping[str, Any] | None) -> None:
        self.rules, self.like, self.given, self.config = rules, like, given, config
        self.forward = make_plan(rules, like, given=given, config=config)
        self.scope = Scope(given, rules.header.vars, config)
        self.declared = _declared(rules)
        self.kept = {name: value for name, value in self.declared.items() if name not in given and not self._asks(name, set())}
        self.back = Scope(given, self.kept, config)

    def _asks(self, name: str, seen: set[str]) -> bool:
        """True where a variable's value depends on the source's tensors, which the way back does not see."""
        value = self.declared.get(name)
        if not isinstance(value, str) or name in seen:
            return False
        return _calls(expressions.parse(value)) or any(self._asks(each, seen | {name}) for each in expressions.parse(value).names())

    def by_steps(self) -> tuple[list[Written], list[Loss], set[str]]:
        """The forward steps, each turned round."""
        walk = turned(self.rules, initial_table(self.like), self.scope, self.back)
        return walk.written, walk.losses, walk.used

    def by_plan(self) -> tuple[list[Written], list[Loss], set[str]]:
        """Steps derived from the inverse plan."""
        inversion = invert(self.forward)
        return derived(inversion.plan), [Loss("plan", (lost.name,), lost.reason) for lost in inversion.lost], set()

    def finished(self, written: list[Written], losses: list[Loss], used: set[str], way: str) -> BackRule:
        """The file, proved. Raises :class:`Unturned` where the proof fails."""
        steps = written or [Written("keep", {"keys": "**", "reason": "there is nothing to undo"})]
        names = self._variables(used)
        head = _Head(self.rules, {name: self.kept[name] for name in self.kept if name in names})
        text = head.text(steps)
        plan = self._proved(text, losses)
        for head.expect_all in (True, False) if self.rules.header.expect_all else (False,):
            try:
                self._plan(head.text(steps), self.forward.manifest)
                break
            except CkptconvError:
                continue
        head.test = self._test(head.text(steps), steps, names)
        steps = self._guarded(head, steps, plan)
        text = head.text(steps)
        self._proved(text, losses)
        failed = [failure for outcome in run_tests(self._parsed(text)) if head.test for failure in outcome.failures]
        if failed and head.test:
            head.test = {**head.test, "name": "there and back; but its own result looks like what it takes", "todo": True}
        lost, count = self._lost(plan, losses)
        return BackRule(head.text(steps), lost, way, count)

    def _variables(self, used: Iterable[str]) -> set[str]:
        found: set[str] = set()
        todo = list(used)
        while todo:
            name = todo.pop()
            if name not in found:
                found.add(name)
                value = self.kept.get(name)
                todo += expressions.parse(value).names() if isinstance(value, str) else ()
        return found

    def _parsed(self, text: str) -> RuleFile:
        try:
            return parse(text.encode(), f"{back_name(self.rules.header.name)}.yaml")
        except CkptconvError as error:
            raise Unturned(f"the written rule is no rule: {error.problems[0].what}") from None

    def _plan(self, text: str, source: Manifest) -> Plan:
        return make_plan(self._parsed(text), source, given=self.given, config=self.config)

    def _proved(self, text: str, losses: Sequence[Loss]) -> Plan:
        """The plan of the written rule on the forward result: it must be the source, but for what is lost."""
        try:
            plan = self._plan(text, self.forward.manifest)
        except CkptconvError as error:
            raise Unturned(f"the way back cannot be planned: {error.problems[0].what}") from None
        lost = {name for loss in losses for name in loss.names}
        aliases = self.like.aliases
        for name, spec in plan.manifest.tensors.items():
            if self.like.tensors.get(name) != spec:
                raise Unturned(f"the way back gives {name} as {spec}, which the source does not have")
        silent = [name for name in self.like if name not in plan.manifest and aliases.get(name, name) not in lost]
        if silent:
            raise Unturned(f"the way back does not give {silent[0]}")
        self._from_the_right_ones(plan)
        return plan

    def _from_the_right_ones(self, plan: Plan) -> None:
        """Every tensor must come from outputs that it went into."""
        made_of = {output.name: set(reads(output.expr)) for output in self.forward.outputs}
        aliases = self.like.aliases
        for output in plan.outputs:
            if any(aliases.get(output.name, output.name) not in made_of[name] for name in reads(output.expr)):
                raise Unturned(f"{output.name} would come back from another tensor")

    def _lost(self, plan: Plan, losses: Sequence[Loss]) -> tuple[list[tuple[str, str, str]], int]:
        found: list[tuple[str, str, str]] = []
        told: set[str] = set()
        for loss in losses:  # the last step first: what it lost, no earlier one can lose again
            names = [name for name in loss.names if name not in told and (loss.rounded or name not in plan.manifest)]
            told.update(names)
            found += [(loss.step, str(template), loss.reason) for template in collapse(names)]
        return list(dict.fromkeys(found)), len(told)

    def _guarded(self, head: _Head, steps: list[Written], plan: Plan) -> list[Written]:
        """The steps, refusing what they made themselves: by names where those tell, by a shape where they do not."""
        try:
            again = self._plan(head.text(steps), plan.manifest)
        except (CkptconvError, Unturned):
            return steps
        if all(plan.manifest.tensors.get(name) == spec for name, spec in again.manifest.tensors.items()):
            return steps
        for told in telling_names(steps, self.forward.manifest, plan.manifest):
            head.when = told
            try:
                self._plan(head.text(steps), plan.manifest)
            except CkptconvError:
                return steps
            head.when = None
        check = telling_shape(steps, self.forward.manifest, plan.manifest)
        return [check, *steps] if check is not None else steps

    def _test(self, text: str, steps: Sequence[Written], names: set[str]) -> dict[str, Any]:
        """One test of real names: a few for every step."""
        manifest = self.forward.manifest
        for chosen in (self._sample(steps), list(manifest) if len(manifest) <= _MANY else []):
            part = Manifest({name: spec for name, spec in manifest.tensors.items() if name in set(chosen)})
            try:
                plan = self._plan(text, part)
            except (CkptconvError, Unturned):
                continue
            test: dict[str, Any] = {"name": "there and back"}
            variables = {name: value for name, value in self.given.items() if name in names}
            test |= {"set": variables} if variables else {}
            test |= {"config": self._config(names)} if "config" in names and self.config is not None else {}
            same = plan.manifest.tensors == part.tensors
            return {**test, "given": specs(part), "expect": "same" if same else specs(plan.manifest)}
        return {}

    def _config(self, names: set[str]) -> dict[str, Any]:
        """The fields of config that the variables ask for."""
        wanted: set[str] = set()
        for name in names:
            value = self.kept.get(name)
            wanted |= _fields(expressions.parse(value)) if isinstance(value, str) else set()
        return {key: value for key, value in (self.config or {}).items() if not wanted or key in wanted}

    def _sample(self, steps: Sequence[Written]) -> list[str]:
        manifest = self.forward.manifest
        table: Table = {name: Entry(Read(name, spec)) for name, spec in manifest.tensors.items()}
        chosen: set[str] = set()
        for step in steps:
            after = lowered(step, table, self.back)
            for names in _touched(step, table, after):
                chosen.update(names)
            table = after
        groups = [set(reads(entry.expr)) for entry in table.values()]
        for group in groups:
            if group & chosen and len(chosen | group) <= _FEW:
                chosen |= group
        for group in groups:
            if group & chosen:
                chosen |= group
        return [name for name in manifest if name in chosen]


def _declared(rules: RuleFile) -> dict[str, Any]:
    """The variables of a rule file, and of those that it includes as they are."""
    found = dict(rules.header.vars)
    for each in rules.steps:
        if each.included is not None and isinstance(each.step, Include) and not each.step.set and each.step.config is None:
            found = {**_declared(each.included), **found}
    return found


def _touched(step: Written, before: Table, after: Table) -> Iterable[tuple[str, ...]]:
    """For each pattern of a step, the tensors behind the first name that it changed."""
    for text in _patterns(step) or ["**"]:
        pattern = Pattern.parse(text)
        first = next((name for name in before if pattern.match(name) is not None), None)
        if first is not None:
            yield reads(before[first].expr)
    made = next((entry for name, entry in after.items() if name not in before or before[name].expr != entry.expr), None)
    if made is not None:
        yield reads(made.expr)


def _patterns(step: Written) -> list[str]:
    if step.op == "rename":
        return list(step.body)
    found = step.body.get("from", step.body.get("keys", [])) if isinstance(step.body, Mapping) else []
    return [found] if isinstance(found, str) else list(found)


def telling_names(steps: Sequence[Written], forward: Manifest, source: Manifest) -> Iterable[dict[str, list[str]]]:
    """Every ``when`` that holds for what the rule takes, and not for what it gives."""
    texts = [text for step in steps for text in _patterns(step)]
    yield from ({"all": [text]} for text in texts if _matches(text, forward) and not _matches(text, source))
    prefixes = [step.body if isinstance(step.body, str) else step.body["prefix"] for step in steps if step.op == "add_prefix"]
    new = {part for name in forward for part in name.split(".")}
    segments = [
        part for name in source for part in name.split(".")[:-1] if part not in new and not part.isdigit() and PLAIN.fullmatch(part)
    ]
    wrappers = [f"{prefix}**" for prefix in prefixes if prefix.endswith(".")]
    wrappers += [f"**.{part}.**" for part in sorted(set(segments), key=segments.count, reverse=True)]
    yield from ({"none": [text]} for text in wrappers if _matches(text, source) and not _matches(text, forward))


def _matches(text: str, manifest: Manifest) -> bool:
    pattern = Pattern.parse(text)
    return any(pattern.match(name) is not None for name in manifest)


def telling_shape(steps: Sequence[Written], forward: Manifest, source: Manifest) -> Written | None:
    """A check of a shape that is another after the steps."""
    for step in steps:
        for text in _patterns(step):
            pattern = Pattern.parse(text)
            names = [name for name in forward if pattern.match(name) is not None]
            for name in names:
                shape = forward[name].shape
                if name not in source or source[name].shape == shape or len(shape) != 2:
                    continue
                rows, columns = shape
                ratio = rows // columns if columns and rows > columns and rows % columns == 0 else 0
                wanted: list[Any] = [f"{ratio} * shape()[1]", "*"] if ratio else list(shape)
                inverse = columns // rows if rows and columns > rows and columns % rows == 0 else 0
                wanted = ["*", f"{inverse} * shape()[0]"] if inverse else wanted
                return Written("check", {"keys": name, "shape": wanted, "note": "otherwise it is undone already"})
    return None


def _calls(node: Node) -> bool:
    return (node.kind == "call" and node.value in ("shape", "has")) or any(map(_calls, node.parts))


def _fields(node: Node) -> set[str]:
    mine = {node.value} if node.kind == "field" and node.parts[0].kind == "name" and node.parts[0].value == "config" else set()
    return mine.union(*(_fields(part) for part in node.parts))


# --- the file's text -------------------------------------------------------------------------------------------------------------------


class _Head(Struct):
    """Everything of the file but its steps."""

    rules: RuleFile
    variables: Mapping[str, Any]
    expect_all: bool = False
    when: Mapping[str, list[str]] | None = None
    test: Mapping[str, Any] | None = None

    def text(self, steps: Sequence[Written]) -> str:
        """The whole file."""
        header = self.rules.header
        summary = f"the way back of {self.rules.label}: {header.summary}"
        lines = ["version: 1", f"name: {back_name(header.name)}", "revision: 1", f"summary: {flow(summary[:300])}"]
        lines += [f"when: {flow(self.when)}"] if self.when else []
        lines += [f"vars: {flow(self.variables)}"] if self.variables else []
        lines.append("steps:")
        said = ""
        for step in steps:
            lines += [f"  # {step.comment}"] if step.comment and step.comment != said else []
            said = step.comment or said
            lines += step_lines(step)
        lines += ["expect_all: true"] if self.expect_all else []
        lines += test_lines(self.test) if self.test else []
        return "\n".join(lines) + "\n"
