"""The rule file: steps in the order in which a person would write them, few patterns, doubts as comments, and a test that can be read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ckptconv.backplan import Written
from ckptconv.backnames import Row, escaped
from ckptconv.backwards import telling_shape
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
from ckptconv.suggest.changes import Made, Outcome, grids, is_buffer
from ckptconv.suggest.joining import EVERY as LIST
from ckptconv.suggest.naming import EVERY, Said, fanned, said
from ckptconv.suggest.units import Unit

_OVER = "e"
_FEW = 40  #: names in a test
_MOST_DOUBTS = 8


@dataclass(frozen=True)
class Rule:
    """A rule file that was written: its text, and the plan that it makes of the source."""

    text: str
    parsed: RuleFile
    plan: Plan


class Unwritten(Exception):  # noqa: N818  (a reason, on its way to a verdict)
    """No rule file says this."""


def written(name: str, summary: str, outcome: Outcome, source: Manifest, target: Manifest, *, plain: bool = False) -> Rule:
    """The rule file of an outcome. ``plain``: every name for itself. Raises :class:`Unwritten` where it cannot be parsed or planned."""
    steps = _steps(outcome, source, target, plain)
    allow = [each.keys[0] for each in said([Row((unit_name,), ()) for unit_name in _random(outcome, target)], target.tensors)]
    head = [
        "# yaml-language-server: $schema=../schema/rule-v1.schema.json", "version: 1", f"name: {flow(name)}", "revision: 1",
        f"summary: {flow(summary[:300])}", "steps:",
    ]  # fmt: skip
    for step in steps:
        head += [f"  # {line}" for line in step.comment.splitlines()]
        head += step_lines(step)
    head += [f"target: {{allow: {{missing: {flow(allow)}}}}}"] if allow else []
    body = "\n".join(head) + "\n"
    try:
        parsed = parse(body.encode(), f"{name}.yaml", stem=name)
        plan = make_plan(parsed, source)
    except CkptconvError as error:
        raise Unwritten(" ".join(str(error).split())[:500]) from None
    return _tested(Rule(body, parsed, plan), name, source, steps)


def _random(outcome: Outcome, target: Manifest) -> list[str]:
    """The names of the target that nothing fills, ties of filled ones not among them."""
    filled = {name for made in outcome.made for name in made.target.names}
    tied = {name for group in target.ties if filled & set(group) for name in group}
    return [name for name in target if name not in filled and name not in tied]


# --- steps -----------------------------------------------------------------------------------------------------------------------------


def _steps(outcome: Outcome, source: Manifest, target: Manifest, plain: bool) -> list[Written]:
    prefix = "" if plain else _common_prefix(outcome, source)
    names = [name.removeprefix(prefix) for name in source]
    steps = [Written("strip_prefix", prefix)] if prefix else []
    drops = _drops(outcome, source, target, prefix)
    steps += drops
    gone = {name for step in _gone(outcome, source, target).values() for name in step}
    marks = {name: mark for made in outcome.made for name, mark in _marks(made.source).items()}
    there = list(dict.fromkeys(marks.get(name, name).removeprefix(prefix) for name in source if name not in gone))
    joins: dict[tuple[str, str], list[Row]] = {}
    renames: list[Row] = []
    unstacked: list[Row] = []
    for made in outcome.made:
        if made.change == "tie":
            continue
        if not made.source.joined and not made.target.joined:
            renames.append(Row((made.source.name.removeprefix(prefix),), (made.target.name,)))
        else:
            keys, values = tuple(key.removeprefix(prefix) for key in _keys(made.source)), tuple(_keys(made.target))
            if made.target.count and (made.target.sizes or made.source.turned != made.target.turned):  # in two steps: cut, then unstacked
                whole = tuple(value.replace(f".{EVERY}.", ".") for value in values)
                unstacked += [Row((one,), (value,)) for one, value in zip(whole, values, strict=True)]
                values = whole
            joins.setdefault(_join_of(made), []).append(Row(keys, values))
    doubts = _doubts(outcome, prefix)
    for (op, form), rows in joins.items():
        steps += [_joined(op, form, each) for each in (_each(rows) if plain else said(rows, there))]
    if unstacked:
        there += [row.keys[0] for row in unstacked]
        steps += [_joined("unstack", "[0, false, true]", each) for each in (_each(unstacked) if plain else said(unstacked, there))]
    changing = [row for row in renames if row.keys != row.values]
    if changing:
        after = [name for name in there if not any(name in row.keys for rows in joins.values() for row in rows)]
        made_names = [value for rows in joins.values() for row in rows for value in row.values]
        entries = _each(changing) if plain else _shorter(said(renames, [*after, *made_names]), said(changing, [*after, *made_names]))
        steps.append(Written("rename", {each.keys[0]: each.values[0] for each in entries if each.keys[0] != each.values[0]}))
    if doubts and steps:
        at = next((at for at, step in enumerate(steps) if step.op not in ("strip_prefix", "drop")), 0)
        steps[at] = Written(steps[at].op, steps[at].body, "\n".join(doubts))
    steps += _in_place(outcome, target)
    steps += [Written("tie", {"from": made.source_name, "to": made.target.name}, "the source has no such tensor; its embeddings are taken")
              for made in _tied(outcome)]  # fmt: skip
    steps += _casts(outcome, source, target)
    check = telling_shape(steps, source, target) if any(step.op in ("rearrange", "reshape") for step in steps) else None
    if check is not None and check.body["keys"] in names and not prefix:
        steps.insert(0, check)
    return steps


def _each(rows: Sequence[Row]) -> list[Said]:
    return [Said(tuple(map(escaped, row.keys)), tuple(map(escaped, row.values)), (row,)) for row in rows]


def _shorter(one: list[Said], other: list[Said]) -> list[Said]:
    """The shorter of two ways to say it: with the names that stay as they are, or without."""

    def cost(entries: list[Said]) -> int:
        return sum(each.keys[0] != each.values[0] and "{" + each.keys[0] != each.values[0] for each in entries)

    return one if cost(one) < cost(other) else other


def _common_prefix(outcome: Outcome, source: Manifest) -> str:
    """A prefix of all names without which most of them are the target's own."""
    first = next(iter(source)).split(".")
    best, most = "", sum(made.source.names == made.target.names for made in outcome.made)
    for cut in range(1, len(first)):
        prefix = ".".join(first[:cut]) + "."
        if not all(name.startswith(prefix) for name in source):
            break
        same = sum(tuple(name.removeprefix(prefix) for name in made.source.names) == made.target.names for made in outcome.made)
        if same > most and 3 * same >= len(outcome.made):
            best, most = prefix, same
    return best


def _gone(outcome: Outcome, source: Manifest, target: Manifest) -> dict[str, list[str]]:
    """Reason -> the names of the source that are left out for it."""
    found: dict[str, list[str]] = {}
    used = {name for made in outcome.made for name in made.source.names}
    heads = {name for one, _ in outcome.heads for name in one.names}
    units = {name: unit for unit in outcome.unused for name in unit.names}
    aliases = source.aliases
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
        else:
            reason = "the target has no such part"
        found.setdefault(reason, []).append(name)
    return found


def _drops(outcome: Outcome, source: Manifest, target: Manifest, prefix: str) -> list[Written]:
    steps = []
    rest = [name.removeprefix(prefix) for name in source]
    for reason, names in _gone(outcome, source, target).items():
        short = [name.removeprefix(prefix) for name in names]
        keys = swept(short, rest)
        steps.append(Written("drop", {"keys": keys if len(keys) > 1 else keys[0], "reason": reason}))
        gone = set(short)
        rest = [name for name in rest if name not in gone]
    return steps


def swept(names: Sequence[str], universe: Sequence[str]) -> list[str]:
    """Patterns for exactly ``names`` among ``universe``: whole subtrees and leaves of one name first.

    >>> swept(["a.n", "b.n", "dec.0.w", "dec.1.w"], ["a.w", "a.n", "b.n", "dec.0.w", "dec.1.w"])
    ['**.n', 'dec.**']
    """
    if any("::" in name for name in names):  # of ranks: `**` does not reach across
        return [each.keys[0] for each in said([Row((name,), ()) for name in names], universe)]
    mine = set(names)
    others = [name for name in universe if name not in mine]
    kept_heads = {".".join(name.split(".")[:cut]) for name in others for cut in range(1, name.count(".") + 1)}
    kept_leaves = {name.rpartition(".")[2] for name in others}
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        head = next((".".join(parts[:cut]) for cut in range(1, len(parts)) if ".".join(parts[:cut]) not in kept_heads), None)
        groups.setdefault(f"{escaped(head)}.**" if head is not None and head not in mine and head not in others else "", []).append(name)
    found = [text for text, group in groups.items() if text and len(group) > 1]
    left = [name for text, group in groups.items() if not text or len(group) < 2 for name in group]
    leaves: dict[str, list[str]] = {}
    for name in left:
        head, _, leaf = name.rpartition(".")
        leaves.setdefault(leaf if head and leaf not in kept_leaves and not leaf.isdigit() else "", []).append(name)
    swept_leaves = [leaf for leaf, group in leaves.items() if leaf and len(group) > 1 and not any(leaf == each.rpartition(".")[2] for each in mine - set(group))]
    found += [f"**.{escaped(leaf)}" for leaf in swept_leaves]
    left = [name for leaf, group in leaves.items() if leaf not in swept_leaves for name in group]
    rest = [name for name in universe if name not in mine or name in set(left)]
    return found + [each.keys[0] for each in said([Row((name,), ()) for name in left], rest)]


# --- what is joined, stacked, cut ------------------------------------------------------------------------------------------------------


def _keys(unit: Unit) -> list[str]:
    """One name for each piece of a unit; of a list that is stacked, with a mark for the number."""
    if not unit.count:
        return list(unit.names)
    return [_marked(unit, unit.names[at]) for at in range(0, len(unit.names), unit.count)]


def _marked(unit: Unit, name: str) -> str:
    at = unit.path.index(LIST)
    parts = name.split(".")
    return ".".join([*parts[:at], EVERY, *parts[at + 1 :]])


def _marks(unit: Unit) -> dict[str, str]:
    return {name: _marked(unit, name) for name in unit.names} if unit.count else {}


def _join_of(made: Made) -> tuple[str, str]:
    """What is done to make one of the other: rows of one form become one step."""
    one, other = made.source, made.target
    acts: list[Any] = []
    shape = one.shape
    if one.same:
        acts.append("same")
    if one.count:
        acts.append({"stack": 0})
    if one.sizes:
        acts.append({"concat": one.axis})
    pattern = "" if made.change else rearrangement(shape, other.shape, one.turned != other.turned)
    if pattern:
        acts.append({"rearrange": pattern})
    if other.sizes:
        even = len(set(other.sizes)) == 1
        acts.append({"split": {"dim": other.axis, **({} if even else {"sizes": list(other.sizes)})}})
    if other.count and not acts:
        acts.append({"unstack": 0})
    return (next(iter(acts[0])) if len(acts) == 1 and not one.same and not acts[0].get("rearrange") else "convert"), flow([*acts, len(other.sizes), bool(one.count), bool(other.count)])


def _joined(op: str, form: str, each: Said) -> Written:
    *acts, pieces, gathers, spreads = yaml.safe_load(form)
    taken = {name for text in each.keys for name in Pattern.parse(text.replace(EVERY, "0")).names}
    froms = [text.replace(EVERY, f"{{{_OVER}:int}}") for text in (each.keys if gathers else fanned(each.keys, taken))]
    tos = [text.replace(EVERY, f"{{{_OVER}}}") for text in fanned(each.values, taken)]
    body: dict[str, Any] = {"from": froms if len(froms) > 1 else froms[0]}
    to: Any = tos if len(tos) > 1 else tos[0]
    if op == "concat":
        return Written(op, {**body, "to": to, "dim": acts[0]["concat"]})
    if op == "split":
        sizes = acts[0]["split"].get("sizes")
        return Written(op, {**body, "to": to, "dim": acts[0]["split"]["dim"], **({"sizes": sizes} if sizes else {})})
    if op in ("stack", "unstack"):
        return Written(op, {**body, "over": _OVER, "to": to})
    for act in acts:
        if act != "same" and "split" in act and "sizes" not in act["split"]:
            act["split"]["parts"] = pieces
    return Written("convert", {**body, **({"gather": _OVER} if gathers else {}), "to": to, "do": acts})


def rearrangement(shape: Sequence[int], wanted: Sequence[int], turn: bool) -> str:
    """The pattern that turns the last two axes, and puts in or takes out axes of size 1; empty text where nothing is to be done.

    >>> rearrangement((48, 144), (144, 48), True), rearrangement((96, 24, 1, 1), (96, 24), False), rearrangement((1, 48), (48,), False)
    ('i o -> o i', 'o i 1 1 -> o i', '1 a -> a')
    """
    if tuple(shape) == tuple(wanted) and not turn:
        return ""
    count = sum(size != 1 for size in shape)
    axes = list("oi" if count == 2 and not turn else "io" if count == 2 else "abcdefgh"[:count])
    if count > 8:
        return ""
    turned = [*axes[:-2], axes[-1], axes[-2]] if turn and count > 1 else axes
    left, right = iter(axes), iter(turned)
    one = " ".join("1" if size == 1 else next(left) for size in shape)
    other = " ".join("1" if size == 1 else next(right) for size in wanted)
    return f"{one} -> {other}" if one != other else ""


# --- what is changed in its place ------------------------------------------------------------------------------------------------------


def _in_place(outcome: Outcome, target: Manifest) -> list[Written]:
    found: dict[tuple[str, str], list[str]] = {}
    bodies: dict[tuple[str, str], tuple[dict[str, Any], str]] = {}
    for made in outcome.made:
        one, other = made.source, made.target
        if ((one.joined or other.joined) and not made.change) or made.change == "tie":
            continue
        if made.change == "prefix":
            continue
        for op, body, why in _changes(made):
            key = op, flow(body)
            found.setdefault(key, []).append(other.name)
            bodies[key] = body, why
    steps = []
    for (op, text), names in found.items():
        body, why = bodies[op, text]
        keys = [each.keys[0] for each in said([Row((name,), ()) for name in names], target.tensors)]
        steps.append(Written(op, {"keys": keys if len(keys) > 1 else keys[0], **body}, why))
    return steps + [step for made in outcome.made if made.change == "prefix" for step in _without_prefix(made, outcome)]


def _without_prefix(made: Made, outcome: Outcome) -> list[Written]:
    """The first positions cut off; added to the token that they are of, where there is one."""
    one, name = made.source, made.target.name
    axis = next(at for at in range(len(one.shape)) if one.shape[at] != made.target.shape[at])
    sizes = [one.shape[axis] - made.target.shape[axis], made.target.shape[axis]]
    rest = f"{name}_of_tokens"
    steps = [Written("split", {"from": name, "to": [rest, name], "dim": axis, "sizes": sizes})]
    tokens = [each.target.name for each in outcome.made if each.added]
    if not tokens:
        return [*steps, Written("drop", {"keys": rest, "reason": "the target has no positions for tokens"})]
    body = {"from": {"token": tokens[0], "position": rest}, "to": tokens[0], "formula": "token + position"}
    return [*steps, Written("combine", body, "the target adds no position to its token")]


def _changes(made: Made) -> Iterable[tuple[str, dict[str, Any], str]]:
    one, other = made.source, made.target
    if not made.change:
        pattern = rearrangement(one.shape, other.shape, one.turned != other.turned or _is_bare_turn(one, other))
        if pattern:
            yield "rearrange", {"pattern": pattern}, ""
        return
    if made.change == "rows":
        more = other.shape[0] > one.shape[0]
        yield "resize_rows", {"rows": other.shape[0]}, f"{one.shape[0]:,} rows in the source: " + (
            "the new ones are zeros" if more else "the last ones are taken to be padding"
        )
    elif made.change == "channels":
        how = "repeat" if other.shape[1] > one.shape[1] else "sum"
        yield "adapt_channels", {"channels": other.shape[1], "how": how}, ""
    else:
        axis = next(at for at in range(len(one.shape)) if one.shape[at] != other.shape[at])
        sizes = grids(one.shape[axis], other.shape[axis])
        if sizes is not None:
            yield "resize", {"size": [sizes[2], sizes[2]], **({"prefix": sizes[0]} if sizes[0] else {})}, "another resolution"
        elif other.shape[axis] < one.shape[axis]:
            yield "resize_rows", {"rows": other.shape[axis], **({"dim": axis} if axis else {})}, "fewer positions: the first are kept"
        else:
            yield "resize", {"size": [other.shape[axis]], "dim": axis, "mode": "linear"}, "more positions: they are interpolated"


def _is_bare_turn(one: Unit, other: Unit) -> bool:
    """A bare matrix is used as `x @ p`, the weight of a linear layer as `x @ w.T`: between the two it is turned."""
    square = len(one.form) == 3 and one.form[1] == one.form[2]
    return square and len(one.shape) == len(other.shape) == 2 and bool(one.role) != bool(other.role) and one.turned == other.turned


@dataclass(frozen=True)
class _Tie:
    source_name: str
    target: Unit


def _tied(outcome: Outcome) -> list[_Tie]:
    called = {made.source.name: made.target.name for made in outcome.made if made.change != "tie" and not made.source.joined}
    return [_Tie(called[made.source.name], made.target) for made in outcome.made if made.change == "tie"]


def _casts(outcome: Outcome, source: Manifest, target: Manifest) -> list[Written]:
    wanted: dict[tuple[str, str], list[str]] = {}
    stays: set[str] = set()
    for made in outcome.made:
        kinds = {source[name].dtype for name in made.source.names}
        for name in made.target.names:
            have = next(iter(kinds))
            if have != target[name].dtype:
                wanted.setdefault((have.value, target[name].dtype.value), []).append(name)
            else:
                stays.add(have.value)
    steps = []
    for (have, dtype), names in wanted.items():
        alone = have not in stays and sum(one == have for one, _ in wanted) == 1
        keys: Any = "**" if alone else swept(names, list(target))
        body = {"keys": keys, "dtype": dtype, **({"of": [have]} if alone else {})}
        steps.append(Written("cast", body))
    return steps


# --- doubts, and the test --------------------------------------------------------------------------------------------------------------


def _doubts(outcome: Outcome, prefix: str) -> list[str]:
    """Sentences on what is not certain, templates instead of names, alternatives named."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for made in outcome.made:
        if made.level == "ambiguous" and made.change != "tie":
            others = " or ".join(str(template.text) for template in collapse([each.name.removeprefix(prefix) for each in made.others[:3]]))
            groups.setdefault((made.level, others and _numberless(others), made.why), []).append(made.target.name)
        elif made.why and made.level == "likely" and made.change != "tie":
            groups.setdefault((made.level, "", made.why), []).append(made.target.name)
    lines = []
    for (level, others, why), names in groups.items():
        shown = ", ".join(template.text for template in collapse(names)[:3]) + (" …" if len(collapse(names)) > 3 else "")
        reason = f"may be {others} as well" if others else why or "only the order of the names speaks for it"
        lines.append(printable(f"{level}: {shown}: {reason}")[:300])
    more = len(lines) - _MOST_DOUBTS
    return lines[:_MOST_DOUBTS] + ([f"and {more} more doubts of this kind"] if more > 0 else [])


def _numberless(text: str) -> str:
    return skeleton(text)


def _tested(rule: Rule, name: str, source: Manifest, steps: Sequence[Written]) -> Rule:
    """The rule with a test of few observed names, in which every pattern has something to do."""
    for names in (_sample(rule, source, steps), list(source)):
        if not names or len(names) > max(_FEW * 4, 200):
            continue
        given = Manifest({each: source[each] for each in source if each in set(names)})
        try:
            expected = make_plan(rule.parsed, given).manifest
        except CkptconvError:
            continue
        test = {"name": "names and shapes that were seen", "given": specs(given), "expect": specs(expected)}
        text = rule.text + "\n".join(test_lines(test)) + "\n"
        parsed = parse(text.encode(), f"{name}.yaml", stem=name)
        if all(outcome.passed for outcome in run_tests(parsed)):
            return Rule(text, parsed, rule.plan)
    return rule


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
        for text in _texts(step):
            pattern = Pattern.parse(text)
            hit = next((full for name, full in short.items() if pattern.match(name) is not None), None)
            if hit is None:
                made = next((final[name] for name in final if pattern.match(name) is not None), ())
                chosen.update(dict.fromkeys(made))
            else:
                chosen.update(dict.fromkeys((hit, *by_source.get(hit, ()))))
    if not chosen:
        chosen.update(dict.fromkeys(list(source)[:2]))
    return _two_of_each(list(chosen)) if len(chosen) > _FEW else list(chosen)


def _two_of_each(names: Sequence[str]) -> list[str]:
    """Of names that differ in their last number only, those with 0 and 1: enough to see what is stacked."""
    seen: dict[str, int] = {}
    kept = []
    for name in names:
        kind = skeleton(name)
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


