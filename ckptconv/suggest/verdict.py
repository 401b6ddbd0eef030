"""Convertible or not, and why not, in one sentence with numbers: another depth, width, kind of block, or another network altogether."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ckptconv.names import collapse
from ckptconv.suggest.blocks import Family, families, inside, zones
from ckptconv.suggest.changes import Outcome, is_buffer, is_head, is_token
from ckptconv.suggest.units import Side, Unit
from ckptconv.suggest.words import ADAPTERS, OPTIMIZER

LOADS, CONVERTIBLE, LOSSY, NOT = "loads as it is", "convertible", "convertible with loss", "not convertible"
_LEAST = 0.5  #: of a target's elements, heads left out, that a source of the same family fills


@dataclass(frozen=True)
class Cause:
    """One finding: what kind, a sentence, and the names that it is about, as templates."""

    kind: str
    sentence: str
    templates: tuple[str, ...] = ()


def judged(outcome: Outcome, source: Side, target: Side) -> tuple[str, str, list[Cause]]:
    """The verdict, its reason, and what was found on the way."""
    why_not = _no_weights(source)
    if why_not:
        return NOT, why_not, [Cause("not a model", why_not)]
    faults = _faults(outcome, source, target)
    if faults:
        causes = [*_variants(source, target), *faults]
        return NOT, causes[0].sentence, causes
    losses = _losses(outcome, source)
    if losses:
        return LOSSY, "; ".join(cause.sentence for cause in losses), losses
    return CONVERTIBLE, "", []


def _no_weights(source: Side) -> str:
    def share(words: frozenset[str]) -> float:
        return sum(bool(words & set(unit.name.split("."))) for unit in source.units) / max(1, len(source.units))

    if share(OPTIMIZER) > 0.5:
        return "the source is the state of an optimizer: it has the shapes of a model, and none of its weights"
    if share(ADAPTERS) > 0.5:
        return "the source is an adapter alone (LoRA): without the model that it was made for, it says nothing of the target's weights"
    return ""


# --- what cannot be mended -------------------------------------------------------------------------------------------------------------


def _faults(outcome: Outcome, source: Side, target: Side) -> list[Cause]:
    if not outcome.made:
        return _resized(source, target) or [Cause("another network", "no tensor of the target can be made of the source's")]
    used = {name for made in outcome.made for name in made.source.names}
    filled = {name for made in outcome.made for name in made.target.names}
    ours, theirs = families(source), families(target)
    faults = _depths(ours, used, "source") + _depths(theirs, filled, "target")
    faults += _missing(outcome, target, theirs, filled)
    faults += _crossed(outcome, zones(source, ours), zones(target, theirs))
    faults += _unused(outcome, source, ours, used)
    whole = sum(prod(unit.shape) for unit in target.units if not is_head(unit))
    part = sum(prod(made.target.shape) for made in outcome.made if not is_head(made.target))
    if whole and part < _LEAST * whole and not faults:
        faults.append(Cause("another network", f"only {part / whole:.0%} of the target's elements have a source"))
    return faults


def _resized(source: Side, target: Side) -> list[Cause]:
    """Tensors of the same name and another size."""
    shapes = {unit.name: unit.shape for unit in source.units}
    differ = [unit for unit in target.units if shapes.get(unit.name, unit.shape) != unit.shape]
    if not differ:
        return []
    one = differ[0]
    more = f"; {len(differ) - 1:,} more of the same names differ" if len(differ) > 1 else ""
    return [
        Cause(
            "sizes", f"{one.name} is {list(shapes[one.name])} in the source and {list(one.shape)} in the target{more}", _templates(differ)
        )
    ]


def _depths(families_: Sequence[Family], used: set[str], side: str) -> list[Cause]:
    """Lists of which some members are used, and others alike are not."""
    found = []
    for family in families_:
        in_use = [part for part, units in family.members.items() if any(unit.name in used for unit in units)]
        idle = [part for part in family.members if part not in set(in_use)]
        kinds = {family.kind(part) for part in in_use}
        lost = [part for part in idle if any(family.kind(part) <= kind or kind <= family.kind(part) for kind in kinds)]
        if lost:
            have, other = len(family.members), len(family.members) - len(lost)
            what = "would be lost" if side == "source" else "would have no source"
            found.append(Cause("depth", f"the {side} has {have} of {family.text}, and {len(lost)} of them {what}: there are {other} on the other side",
                               (family.text,)))  # fmt: skip
    return found


def _missing(outcome: Outcome, target: Side, theirs: Sequence[Family], filled: set[str]) -> list[Cause]:
    within = inside(theirs)
    last = max((unit.at for family in theirs for units in family.members.values() for unit in units if unit.name in filled), default=-1)
    found: dict[str, list[Unit]] = {}
    for unit in outcome.missing:
        if is_buffer(unit):
            continue
        if unit.name in within and not is_head(unit):
            found.setdefault("parts of its blocks", []).append(unit)
        elif not (is_head(unit) or is_token(unit) or (target.ordered and last >= 0 and unit.at > last)):
            found.setdefault("parts", []).append(unit)
    return [Cause("missing", f"the target needs {_few(units)}: the source has no such {what.replace('parts of its', 'parts in its')}",
                  _templates(units)) for what, units in found.items()]  # fmt: skip


def _crossed(outcome: Outcome, before: Mapping[tuple[str, ...], int], after: Mapping[tuple[str, ...], int]) -> list[Cause]:
    """Norms that stand before the blocks on one side and after them on the other: the layers are in another order."""
    units = [made.target for made in outcome.made if made.target.role == "weight" and len(made.target.form) == 2
             and before.get(made.source.path, 0) * after.get(made.target.path, 0) < 0]  # fmt: skip
    where = "after" if units and after[units[0].path] > 0 else "before"
    return [Cause("order", f"the target has {_few(units)} {where} its blocks, and the source's only norm for it stands on their other side",
                  _templates(units))] if units else []  # fmt: skip


def _unused(outcome: Outcome, source: Side, ours: Sequence[Family], used: set[str]) -> list[Cause]:
    """Parts that every used block has and the target lacks; norms between the embeddings and the blocks."""
    found = []
    lost = {unit.name: unit for unit in outcome.unused if not is_buffer(unit)}
    for family in ours:
        in_use = [part for part, units in family.members.items() if any(unit.name in used for unit in units)]
        carried = Counter(family.inside(unit) for part in in_use for unit in family.members[part] if unit.name in lost)
        common = [what for what, count in carried.items() if 2 * count > len(in_use) and len(in_use) > 1]
        units = [unit for part in in_use for unit in family.members[part] if unit.name in lost and family.inside(unit) in common]
        if units:
            found.append(Cause("unused", f"the source's blocks have {_few(units)}, and the target's have no such parts", _templates(units)))
            break
    if found or not source.ordered:
        return found
    within = inside(ours)
    blocks = [unit.at for unit in source.units if unit.name in within and unit.name in used]
    before = [unit for unit in lost.values() if blocks and unit.role in ("weight", "bias") and len(unit.form) == 2 and unit.name not in within
              and any(other.at < unit.at for other in source.units if other.name in used) and unit.at < min(blocks)]  # fmt: skip
    if before:
        found.append(
            Cause("unused", f"the source has {_few(before)} before its blocks, and the target has nothing there", _templates(before))
        )
    return found


# --- which variant it is ---------------------------------------------------------------------------------------------------------------


def _variants(source: Side, target: Side) -> list[Cause]:
    """What tells two members of a family apart: width, kind of block, depth."""
    found = []
    convolutions = [[unit for unit in side.units if len(unit.shape) == 4 and unit.shape[2] == unit.shape[3]] for side in (source, target)]
    if all(len(each) > 8 for each in convolutions):
        narrow = [sum(unit.shape[2] == 1 for unit in each) / sum(unit.shape[2] == 3 for unit in each or [each[0]]) if any(unit.shape[2] == 3 for unit in each) else 0
                  for each in convolutions]  # fmt: skip
        kinds = ["bottleneck blocks" if each > 1 else "basic blocks" for each in narrow]
        if kinds[0] != kinds[1]:
            found.append(Cause("blocks", f"the source has {kinds[0]} and the target has {kinds[1]}: another variant of the model"))
    elif not any(convolutions) or all(len(each) < 3 for each in convolutions):
        one, other = _width(source), _width(target)
        if one and other and one != other:
            found.append(Cause("width", f"the source is {one:,} wide and the target {other:,}: another size of the model"))
    depths = [max((len(family.members) for family in families(side) if len(next(iter(family.members.values()))) > 3), default=0)
              for side in (source, target)]  # fmt: skip
    if all(depths) and depths[0] != depths[1] and not found:
        found.append(
            Cause("depth", f"the source has {depths[0]} blocks in its longest list and the target {depths[1]}: another size of the model")
        )
    return found


def _width(side: Side) -> int:
    sizes = Counter(unit.form[1] for unit in side.units if len(unit.form) == 2 and unit.role == "weight")
    return max(sizes, key=lambda size: (sizes[size], size)) if sizes else 0


# --- what stays random, or is dropped from inside --------------------------------------------------------------------------------------


def _losses(outcome: Outcome, source: Side) -> list[Cause]:
    found = []
    if outcome.heads:
        one, other = outcome.heads[0]
        found.append(Cause("head", f"the head is of another size, {one.shape[0]:,} against {other.shape[0]:,}: {_few([unit for _, unit in outcome.heads])} "
                           f"stay as they are initialised", _templates([unit for _, unit in outcome.heads])))  # fmt: skip
    fresh = [unit for unit in outcome.missing if not is_buffer(unit)]
    if fresh:
        found.append(
            Cause(
                "missing", f"{_few(fresh)} {_have(fresh)} no source and stay{'s' if _one(fresh) else ''} as initialised", _templates(fresh)
            )
        )
    sentences = {
        "rows": ("vocabulary", "{} has {} rows in the source and {} in the target"),
        "positions": ("positions", "{} is for {} positions in the source and {} in the target"),
        "prefix": ("positions", "{} is for {} positions in the source and {} in the target"),
        "line": ("positions", "{} is for {} positions in the source and {} in the target"),
        "channels": ("channels", "{} takes {} channels in the source and {} in the target"),
    }
    for made in outcome.made:
        if made.change in sentences:
            kind, sentence = sentences[made.change]
            axis = next(at for at in range(len(made.source.shape)) if made.source.shape[at] != made.target.shape[at])
            found.append(
                Cause(
                    kind,
                    sentence.format(made.target.name, f"{made.source.shape[axis]:,}", f"{made.target.shape[axis]:,}"),
                    (made.target.name,),
                )
            )
    within = inside(families(source))
    used = {part for made in outcome.made for part in _prefixes(made.source.path)}
    dropped = [unit for unit in outcome.unused if not is_buffer(unit) and unit.name in within and _block(unit) in used]
    if dropped:
        found.append(
            Cause("dropped", f"{_few(dropped)} inside of the source's blocks {_have(dropped)} no place in the target", _templates(dropped))
        )
    return found


def _block(unit: Unit) -> tuple[str, ...]:
    at = next((at for at, part in enumerate(unit.path) if any(letter.isdigit() for letter in part)), 0)
    return unit.path[: at + 1]


def _prefixes(path: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [path[:cut] for cut in range(1, len(path) + 1)]


def _one(units: Sequence[Unit]) -> bool:
    return len(units) == 1


def _have(units: Sequence[Unit]) -> str:
    return "has" if _one(units) else "have"


def _templates(units: Iterable[Unit]) -> tuple[str, ...]:
    return tuple(template.text for template in collapse([unit.name for unit in units])[:12])


def _few(units: Iterable[Unit], most: int = 3) -> str:
    templates = collapse([name for unit in units for name in unit.names[:1]])
    return ", ".join(str(template) for template in templates[:most]) + (
        f" and {len(templates) - most} more templates" if len(templates) > most else ""
    )
