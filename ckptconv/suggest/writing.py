"""The rule file: steps in the order in which a person would write them, few patterns, doubts as comments, and a test that can be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from msgspec import Struct
from msgspec.structs import replace

from ckptconv.backnames import Row, escaped
from ckptconv.backplan import Written
from ckptconv.backwards import telling_names, telling_shape
from ckptconv.errors import CkptconvError, printable
from ckptconv.names import collapse
from ckptconv.plan import Plan, reads
from ckptconv.planner import make_plan
from ckptconv.ruleset.model import RuleFile, parse
from ckptconv.ruleset.patterns import Pattern
from ckptconv.ruletests import run_tests
from ckptconv.ruletext import flow, specs, step_lines, test_lines
from ckptconv.spec import Manifest
from ckptconv.suggest.blocks import skeleton
from ckptconv.suggest.changes import Outcome, is_buffer
from ckptconv.suggest.findings import wrapper
from ckptconv.suggest.joins import join_steps, marks
from ckptconv.suggest.mending import casts, in_place, ties
from ckptconv.suggest.naming import Said, each_alone, said, swept

_FEW = 40  #: names in a test
_MANY = 200
_MOST_DOUBTS = 8
_MOST_CONDITIONS = 4


class Rule(Struct, frozen=True):
    """A rule file that was written: its text, and the plan that it makes of the source."""

    text: str
    parsed: RuleFile
    plan: Plan


class Unwritten(Exception):  # noqa: N818  (a reason, on its way to a verdict)
    """No rule file says this."""


def written(name: str, summary: str, outcome: Outcome, source: Manifest, target: Manifest, *, plain: bool = False) -> Rule:
    """The rule file of an outcome. ``plain``: every name for itself. Raises :class:`Unwritten` where it cannot be parsed or planned."""
    steps = _steps(outcome, source, target, plain)
    allow = [each.keys[0] for each in said([Row((each,), ()) for each in _random(outcome, target)], target.tensors)]
    first: Rule | None = None
    # A rule must leave its own result alone, or refuse it: a condition is added where the steps do not see to that themselves.
    new = next((made.target.name for made in outcome.made if made.target.name not in source), None)
    last = [{"none": [escaped(new)]}] if new is not None else []
    for when in (None, *islice(telling_names(steps, source, target), _MOST_CONDITIONS), *last):
        body = _text(name, summary, steps, allow, when)
        try:
            parsed = parse(body.encode(), f"{name}.yaml", stem=name)
            rule = Rule(body, parsed, make_plan(parsed, source))
        except CkptconvError as error:
            raise Unwritten(" ".join(str(error).split())[:500]) from None
        first = first or rule
        tested = _tested(rule, name, source, steps, new)
        if tested is not None:
            return tested
    assert first is not None
    return first


def _text(name: str, summary: str, steps: Sequence[Written], allow: Sequence[str], when: Mapping[str, list[str]] | None) -> str:
    lines = [
        "# yaml-language-server: $schema=../schema/rule-v1.schema.json", "version: 1", f"name: {flow(name)}", "revision: 1",
        f"summary: {flow(summary[:300])}", *([f"when: {flow(when)}"] if when else []), "steps:",
    ]  # fmt: skip
    for step in steps:
        lines += [f"  # {line}" for line in step.comment.splitlines()]
        lines += step_lines(step)
    lines += [f"target: {{allow: {{missing: {flow(allow)}}}}}"] if allow else []
    return "\n".join(lines) + "\n"


def _random(outcome: Outcome, target: Manifest) -> list[str]:
    """The names of the target that nothing fills, ties of filled ones not among them."""
    filled = {name for made in outcome.made for name in made.target.names}
    tied = {name for group in target.ties if filled & set(group) for name in group}
    return [name for name in target if name not in filled and name not in tied]


# --- steps --------------------------------------------------------------------------------------------------------------------------------


def _steps(outcome: Outcome, source: Manifest, target: Manifest, plain: bool) -> list[Written]:
    """In order: wrappers off, what goes, what is joined or cut, names, what is changed in its place, ties, dtypes."""
    prefix = "" if plain else _common_prefix(outcome, source)
    gone = _gone(outcome, source)
    joined = [made for made in outcome.made if (made.source.joined or made.target.joined) and made.change != "tie"]
    single = [made for made in outcome.made if not (made.source.joined or made.target.joined) and made.change != "tie"]
    left_out = {name for names in gone.values() for name in names}
    marked = marks(joined)
    there = list(dict.fromkeys(marked.get(name, name).removeprefix(prefix) for name in source if name not in left_out))
    steps = join_steps(joined, prefix, there, plain=plain)
    rows = [Row((made.source.name.removeprefix(prefix),), (made.target.name,)) for made in single]
    done = {
        name.removeprefix(prefix)
        for made in joined
        for name in (*made.source.names, *(marked.get(each, each) for each in made.source.names))
    }
    steps += _renamed(
        rows, [*(name for name in there if name not in done), *(name for made in joined for name in made.target.names)], plain
    )
    steps += [*in_place(outcome, target), *ties(outcome), *casts(outcome, source, target)]
    doubts = _doubts(outcome, prefix)
    if doubts and steps:
        steps[0] = replace(steps[0], comment="\n".join([*doubts, *steps[0].comment.splitlines()]))
    steps = [*([Written("strip_prefix", prefix)] if prefix else []), *_drops(gone, source, prefix), *steps]
    if not steps:
        steps = [Written("keep", "**", "names and shapes are right as they are")]
    check = telling_shape(steps, source, target) if not prefix and any(step.op == "rearrange" for step in steps) else None
    # A check of a name that the target has too: otherwise a second run finds nothing to rename, and stops at that.
    return [check, *steps] if check is not None and check.body["keys"] in target else steps


def _renamed(rows: Sequence[Row], universe: Sequence[str], plain: bool) -> list[Written]:
    """The names that change; those that stay are among the rows where that makes patterns simpler."""
    changing = [row for row in rows if row.keys != row.values]
    if not changing:
        return []
    added = _added_prefix(rows)
    if added and {row.keys[0] for row in rows} >= set(universe):
        return [Written("add_prefix", added)]
    entries = each_alone(changing) if plain else _shorter(said(rows, universe), said(changing, [*universe, *(row.keys[0] for row in rows)]))
    return [Written("rename", {each.keys[0]: each.values[0] for each in entries if each.keys[0] != each.values[0]})]


def _shorter(one: list[Said], other: list[Said]) -> list[Said]:
    """The shorter of two ways to say it: with the names that stay as they are, or without."""

    def cost(entries: list[Said]) -> int:
        return sum(each.keys[0] != each.values[0] for each in entries)

    return one if cost(one) < cost(other) else other


def _common_prefix(outcome: Outcome, source: Manifest) -> str:
    """A prefix of all names without which most of them are the target's own."""
    prefix = wrapper(outcome.made)
    return prefix if prefix and all(name.startswith(prefix) for name in source) else ""


def _added_prefix(rows: Sequence[Row]) -> str:
    """What stands before every name of the target, if that is all that changes."""
    first = rows[0]
    prefix = first.values[0].removesuffix(first.keys[0])
    return prefix if prefix.endswith(".") and all(row.values[0] == prefix + row.keys[0] for row in rows) else ""


def _gone(outcome: Outcome, source: Manifest) -> dict[str, list[str]]:
    """Reason -> the names of the source that are left out for it."""
    found: dict[str, list[str]] = {}
    used = {name for made in outcome.made for name in made.source.names}
    heads = {name for one, _ in outcome.heads for name in one.names}
    units = {name: unit for unit in outcome.unused for name in unit.names}
    aliases = source.aliases
    tied = {made.target.form for made in outcome.made if made.target.name in outcome.tied}
    for name in source:
        if name in used:
            continue
        unit = units.get(name)
        if name in heads:
            reason = "the target has another number of classes"
        elif unit is not None and is_buffer(unit):
            reason = "the model makes it itself"
        elif name in aliases:
            reason = "a second name of a tied tensor"
        elif unit is not None and unit.form in tied:
            reason = "the target ties it to another"
        else:
            reason = "the target has no such part"
        found.setdefault(reason, []).append(name)
    return found


def _drops(gone: Mapping[str, Sequence[str]], source: Manifest, prefix: str) -> list[Written]:
    steps = []
    rest = [name.removeprefix(prefix) for name in source]
    for reason, names in gone.items():
        short = [name.removeprefix(prefix) for name in names]
        keys = swept(short, rest)
        steps.append(Written("drop", {"keys": keys if len(keys) > 1 else keys[0], "reason": reason}))
        done = set(short)
        rest = [name for name in rest if name not in done]
    return steps


# --- doubts, and the test --------------------------------------------------------------------------------------------------------------


def _doubts(outcome: Outcome, prefix: str) -> list[str]:
    """Sentences on what is not certain, templates instead of names, alternatives named."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for made in outcome.made:
        if made.level == "ambiguous" and made.change != "tie":
            others = " or ".join(str(template.text) for template in collapse([each.name.removeprefix(prefix) for each in made.others[:3]]))
            groups.setdefault((made.level, others and skeleton(others), made.why), []).append(made.target.name)
        elif made.why and made.level == "likely" and made.change != "tie":
            groups.setdefault((made.level, "", made.why), []).append(made.target.name)
    lines = []
    for (level, others, why), names in groups.items():
        shown = ", ".join(template.text for template in collapse(names)[:3]) + (" …" if len(collapse(names)) > 3 else "")
        reason = f"may be {others} as well" if others else why or "only the order of the names speaks for it"
        lines.append(printable(f"{level}: {shown}: {reason}")[:300])
    more = len(lines) - _MOST_DOUBTS
    return lines[:_MOST_DOUBTS] + ([f"and {more} more doubts of this kind"] if more > 0 else [])


def _tested(rule: Rule, name: str, source: Manifest, steps: Sequence[Written], new: str | None) -> Rule | None:
    """The rule with a test of few observed names, in which every pattern has something to do; None where no such test passes."""
    sample = _sample(rule, source, steps)
    telling = next((reads(output.expr) for output in rule.plan.outputs if output.name == new), ())
    for names in (sample, [*sample, *telling], list(source)):
        if not names or len(names) > _MANY:
            continue
        chosen = set(names)
        given = Manifest({each: spec for each, spec in source.tensors.items() if each in chosen})
        try:
            expected = make_plan(rule.parsed, given).manifest
        except CkptconvError:
            continue
        test = {"name": "names and shapes that were seen", "given": specs(given), "expect": specs(expected)}
        text = rule.text + "\n".join(test_lines(test)) + "\n"
        parsed = parse(text.encode(), f"{name}.yaml", stem=name)
        if all(outcome.passed for outcome in run_tests(parsed)):
            return Rule(text, parsed, rule.plan)
    return None


def _sample(rule: Rule, source: Manifest, steps: Sequence[Written]) -> list[str]:
    """For every pattern the first name that it has something to do with, with all that is joined with it."""
    chosen: dict[str, None] = {}
    by_source: dict[str, tuple[str, ...]] = {}
    final: dict[str, tuple[str, ...]] = {}
    for output in rule.plan.outputs:
        names = reads(output.expr)
        final[output.name] = names
        for each in names:
            by_source[each] = names
    prefix = next((step.body for step in steps if step.op == "strip_prefix"), "")
    short = {each.removeprefix(prefix): each for each in source}
    for step in steps:
        dropping = step.op == "drop"
        open_ = {name: full for name, full in short.items() if (full in by_source) != dropping}
        for text in _texts(step):
            pattern = Pattern.parse(text)
            hits = [name for name in open_ if pattern.match(name) is not None]
            hit = open_[hits[0]] if hits else None
            if dropping:  # what one step drops, the next does not see
                short = {name: full for name, full in short.items() if name not in set(hits)}
            if hit is None:
                made = next((final[name] for name in final if pattern.match(name) is not None), ())
                chosen.update(dict.fromkeys(made))
            else:
                chosen.update(dict.fromkeys((hit, *by_source.get(hit, ()))))
    if all(each not in by_source for each in chosen):  # something has to be left
        chosen.update(dict.fromkeys(reads(rule.plan.outputs[0].expr)))
    return _two_of_each(list(chosen)) if len(chosen) > _FEW else list(chosen)


def _two_of_each(names: Sequence[str]) -> list[str]:
    """Of names that differ in the numbers of lists only, the first two: enough to see what is stacked."""
    seen: dict[str, int] = {}
    kept = []
    for name in names:
        kind = ".".join("#" if part.isdigit() else part for part in name.split("."))
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= 2:
            kept.append(name)
    return kept


def _texts(step: Written) -> list[str]:
    if step.op == "rename":
        return list(step.body)
    if not isinstance(step.body, Mapping):
        return []
    found = step.body.get("from", step.body.get("keys", []))
    return [found] if isinstance(found, str) else list(found)
