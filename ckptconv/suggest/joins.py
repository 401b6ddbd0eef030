"""What is joined, stacked, cut and unstacked, as steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct, field

from ckptconv.backnames import Row
from ckptconv.backplan import Written
from ckptconv.ruleset.patterns import Pattern
from ckptconv.suggest.changes import Made
from ckptconv.suggest.joining import EVERY as LIST
from ckptconv.suggest.naming import EVERY, Said, each_alone, fanned, said
from ckptconv.suggest.units import Unit

_OVER = "e"


class _Form(Struct):
    """What is done to make some tensors of others, and the names to which it is done."""

    acts: list[Any]
    pieces: int  #: that come of it
    gathers: bool  #: members of a list
    rows: list[Row] = field(default_factory=list)


def join_steps(made: Sequence[Made], prefix: str, there: list[str], *, plain: bool) -> list[Written]:
    """The steps for what is not one tensor to one tensor. ``there`` are the names that they see; ``prefix`` is gone from them."""
    forms: dict[str, _Form] = {}
    unstacked: list[Row] = []
    for each in made:
        keys, values = tuple(key.removeprefix(prefix) for key in _keys(each.source)), tuple(_keys(each.target))
        form = _form(each)
        if each.target.count and form.acts:  # in two steps: cut, then unstacked
            whole = tuple(value.replace(f".{EVERY}.", ".") for value in values)
            unstacked += [Row((one,), (value,)) for one, value in zip(whole, values, strict=True)]
            values = whole
        elif each.target.count:
            form.acts = [{"unstack": 0}]
        forms.setdefault(repr(form), form).rows.append(Row(keys, values))
    ways = said if not plain else lambda rows, _: each_alone(rows)
    steps = [_step(form, each) for form in forms.values() for each in ways(form.rows, there)]
    there += [row.keys[0] for row in unstacked]
    return steps + [_step(_Form([{"unstack": 0}], 0, False), each) for each in (ways(unstacked, there) if unstacked else ())]


def marks(made: Iterable[Made]) -> Mapping[str, str]:
    """Names of members of lists that are stacked -> the same with a mark for their number."""
    return {name: _marked(each.source, name) for each in made if each.source.count for name in each.source.names}


def _keys(unit: Unit) -> list[str]:
    """One name for each piece of a unit; of a list that is stacked, with a mark for the number."""
    return [_marked(unit, name) for name in unit.names[:: unit.count]] if unit.count else list(unit.names)


def _marked(unit: Unit, name: str) -> str:
    at = unit.path.index(LIST)
    parts = name.split(".")
    return ".".join([*parts[:at], EVERY, *parts[at + 1 :]])


def _form(made: Made) -> _Form:
    one, other = made.source, made.target
    acts: list[Any] = ["same"] if one.same else []
    if one.count:
        acts.append({"stack": 0})
    if one.sizes:
        acts.append({"concat": one.axis})
    pattern = "" if made.change else rearrangement(one.shape, other.shape, one.turned != other.turned)
    if pattern:
        acts.append({"rearrange": pattern})
    if other.sizes:
        how = {"parts": len(other.sizes)} if len(set(other.sizes)) == 1 else {"sizes": list(other.sizes)}
        acts.append({"split": {"dim": other.axis, **how}})
    return _Form(acts, len(other.sizes), bool(one.count))


def _step(form: _Form, each: Said) -> Written:
    taken = {name for text in each.keys for name in Pattern.parse(text.replace(EVERY, "0")).names}
    froms = [text.replace(EVERY, f"{{{_OVER}:int}}") for text in (each.keys if form.gathers else fanned(each.keys, taken))]
    tos = [text.replace(EVERY, f"{{{_OVER}}}") for text in fanned(each.values, taken)]
    source: Any = froms if len(froms) > 1 else froms[0]
    to: Any = tos if len(tos) > 1 else tos[0]
    act = form.acts[0] if len(form.acts) == 1 and isinstance(form.acts[0], dict) else {}
    if "concat" in act:
        return Written("concat", {"from": source, "to": to, "dim": act["concat"]})
    if "split" in act:
        return Written("split", {"from": source, "to": to, **{key: value for key, value in act["split"].items() if key != "parts"}})
    if "stack" in act or "unstack" in act:
        return Written(next(iter(act)), {"from": source, "over": _OVER, "to": to})
    return Written("convert", {"from": source, **({"gather": _OVER} if form.gathers else {}), "to": to, "do": form.acts})


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
