"""What is changed where it stands, under the names of the target: axes, sizes, dtypes; and what is tied to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ckptconv.backnames import Row
from ckptconv.backplan import Written
from ckptconv.ruletext import flow
from ckptconv.spec import Manifest
from ckptconv.suggest.changes import Made, Outcome, grids
from ckptconv.suggest.joins import rearrangement
from ckptconv.suggest.naming import said, swept
from ckptconv.suggest.units import Unit


def in_place(outcome: Outcome, target: Manifest) -> list[Written]:
    """What is done to single tensors when they have their names; one step for all to which the same is done."""
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
        yield (
            "resize_rows",
            {"rows": other.shape[0]},
            f"{one.shape[0]:,} rows in the source: " + ("the new ones are zeros" if more else "the last ones are taken to be padding"),
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


def ties(outcome: Outcome) -> list[Written]:
    """Names of tensors that the source does not have, and that are most likely one with others."""
    called = {made.source.name: made.target.name for made in outcome.made if made.change != "tie" and not made.source.joined}
    return [Written("tie", {"from": called[made.source.name], "to": made.target.name}, f"ambiguous: {made.why}")
            for made in outcome.made if made.change == "tie"]  # fmt: skip


def casts(outcome: Outcome, source: Manifest, target: Manifest) -> list[Written]:
    """The dtypes that the target has; one step for each change."""
    wanted: dict[tuple[str, str], list[str]] = {}
    stays: set[str] = set()
    for made in outcome.made:
        have = source[made.source.name].dtype
        for name in made.target.names:
            if have != target[name].dtype:
                wanted.setdefault((have.value, target[name].dtype.value), []).append(name)
            else:
                stays.add(have.value)
    steps = []
    for (old, new), names in wanted.items():
        alone = old not in stays and sum(one == old for one, _ in wanted) == 1
        keys: Any = "**" if alone else swept(names, list(target))
        body = {"keys": keys, "dtype": new, **({"of": [old]} if alone else {})}
        steps.append(Written("cast", body))
    return steps
