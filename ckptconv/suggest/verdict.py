"""Convertible or not, and why not, in one sentence with numbers: another depth, width, kind of block, or another network altogether."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import prod

from msgspec import Struct

from ckptconv.names import collapse
from ckptconv.suggest.blocks import Family, families, inside, zones
from ckptconv.suggest.changes import Outcome, is_buffer, is_head, is_token
from ckptconv.suggest.units import Side, Unit
from ckptconv.suggest.words import ADAPTERS, OPTIMIZER

LOADS, CONVERTIBLE, LOSSY, NOT = "loads as it is", "convertible", "convertible with loss", "not convertible"
_FEW_CONVOLUTIONS = 3
_LEAST = 0.5  #: of a target's elements, heads left out, that a source of the same family fills


class Cause(Struct, frozen=True):
    """One finding: what kind, a sentence, and the names that it is about, as templates."""

    kind: str
    sentence: str
    templates: tuple[str, ...] = ()


def judged(outcome: Outcome, source: Side, target: Side, stored: tuple[Side, Side]) -> tuple[str, str, list[Cause]]:
    """The verdict, its reason, and what was found on the way. ``stored``: both sides before anything was joined."""
    why_not = _no_weights(source)
    if why_not:
        return NOT, why_not, [Cause("not a model", why_not)]
    faults = _faults(outcome, source, target)
    if faults:
        causes = [*(_variants(*stored) or _resized(*stored)), *faults]
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
        return [Cause("another network", "no tensor of the target can be made of the source's")]
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
            what = "would be lost" if side == "source" else "would have no source"
            sentence = f"the {side} has {family.text}, and {len(lost):,} of these {len(family.members):,} {what}"
            found.append(Cause("depth", sentence, (family.text,)))
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
    """What tells two members of a family apart: the kind of block, width, or depth; the first that differs, as it explains the others."""
    one, other = _blocks(source), _blocks(target)
    if one and other and one != other:
        return [Cause("blocks", f"the source has {one} and the target has {other}: another variant of the model")]
    wide, wanted = _width(source), _width(target)
    if wide and wanted and wide != wanted:
        return [Cause("width", f"the source is {wide:,} wide, and the target {wanted:,}: no renaming can change that")]
    deep, wanted = _depth(source), _depth(target)
    if deep and wanted and deep != wanted:
        return [Cause("depth", f"the source has {deep} blocks in its longest list, and the target {wanted}: no renaming can change that")]
    return []


def _blocks(side: Side) -> str:
    """The kind of a residual network's blocks: two convolutions of 3 pixels, or one between two of 1 pixel; empty for other networks."""
    kernels = Counter(unit.shape[2] for unit in side.units if len(unit.shape) == 4 and unit.shape[2] == unit.shape[3])
    if min(kernels[1], kernels[3]) < _FEW_CONVOLUTIONS or kernels[1] + kernels[3] < sum(kernels.values()) - 2:
        return ""
    return "bottleneck blocks" if kernels[1] > kernels[3] else "basic blocks"


def _depth(side: Side) -> int:
    """Members of the longest list in which most are alike: of a network that is as wide at its end as at its start."""
    found = 0
    for family in families(side):
        kinds = Counter(map(family.kind, family.members))
        alike = max(kinds.values())
        if 3 * alike >= 2 * len(family.members) and len(max(kinds, key=lambda kind: kinds[kind])) > 3:
            found = max(found, len(family.members))
    return found


def _width(side: Side) -> int:
    """The size of most norms, where nearly all have one: of a network without stages."""
    sizes = Counter(unit.form[1] for unit in side.units if len(unit.form) == 2 and unit.role == "weight")
    size, count = max(sizes.items(), key=lambda item: (item[1], item[0]), default=(0, 0))
    return size if 3 * count >= 2 * sum(sizes.values()) else 0


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
