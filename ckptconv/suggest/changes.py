"""From pairs of modules to pairs of tensors, and what is left then: other sizes that a step can mend, ties, buffers, heads.

Everything here is about the few tensors of which shapes do not say it all: what is paired has its form already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import isqrt

from msgspec import Struct, field
from msgspec.structs import replace

from ckptconv.spec import Manifest
from ckptconv.suggest.assigning import assigned
from ckptconv.suggest.blocks import skeleton
from ckptconv.suggest.matching import LEVELS, Matching
from ckptconv.suggest.units import Module, Side, Unit
from ckptconv.suggest.words import BUFFERS, HEADS, TOKENS, likeness, words

_MOST_CHANNELS = 16
_MOST_PREFIX = 8
_NEVER = 1e6


Doubt = tuple[Callable[["Made"], bool], str, str]


class Made(Struct, frozen=True):
    """A tensor of the target (or several that are one in the source), of what it is made, and how its sizes are changed if they are."""

    source: Unit
    target: Unit
    level: str
    others: tuple[Unit, ...] = ()
    change: str = ""  #: rows, prefix, positions, line, channels; tie
    why: str = ""  #: why it is not certain
    added: tuple[Unit, ...] = ()  #: what is added to it: its position, where the target's positions have none for it

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors of the source that it is made of."""
        return (*self.source.names, *(name for unit in self.added for name in unit.names))


class Outcome(Struct):
    """What becomes of everything."""

    made: list[Made] = field(default_factory=list)
    unused: list[Unit] = field(default_factory=list)  #: of the source
    missing: list[Unit] = field(default_factory=list)  #: of the target
    heads: list[tuple[Unit, Unit]] = field(default_factory=list)  #: of another size: dropped here, random there
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)  #: of the target's ties the first name -> the others

    def add(self, source: Unit, target: Unit, level: str, others: Sequence[Unit] = (), change: str = "", why: str = "") -> None:
        self.made.append(Made(source, target, level, tuple(others), change, why))
        self.unused = [unit for unit in self.unused if unit.names != source.names]
        self.missing = [unit for unit in self.missing if unit.names != target.names]


def tie_twins(found: Outcome, source: Manifest, target: Manifest) -> None:
    """The further names of ties: those of the source become those of the target, as far as there are any."""
    ours = {group[0]: list(group[1:]) for group in source.ties}
    theirs = {group[0]: group[1:] for group in target.ties}
    used = {name for made in found.made for name in made.names}
    for made in list(found.made):
        wanted = theirs.get(made.target.name, ())
        if not wanted or made.source.joined or made.target.joined or made.change:
            continue
        found.tied[made.target.name] = wanted
        rest = [name for name in ours.get(made.source.name, ()) if name not in used]
        rest.sort(key=lambda name: name not in wanted)
        for one, other in zip(rest, sorted(wanted, key=lambda name: name not in rest), strict=False):
            found.made.append(replace(made, source=replace(made.source, names=(one,)), target=replace(made.target, names=(other,))))


def without_lone_buffers(source: Side, target: Side) -> tuple[Side, Side, list[Unit], list[Unit]]:
    """Both sides without the counters, masks and indices that only one of them has, so that a module is the same with and without."""
    gone = [_lone(one, other) for one, other in ((source, target), (target, source))]
    return source.without(gone[0]), target.without(gone[1]), gone[0], gone[1]


def _lone(side: Side, other: Side) -> list[Unit]:
    there = Counter(_leaf(unit) for unit in other.units)
    return [
        unit for unit in side.units if is_buffer(unit) and not there[_leaf(unit)] and not other.forms[unit.form] > side.forms[unit.form]
    ]


def _leaf(unit: Unit) -> str:
    return unit.name.rpartition(".")[2]


def is_buffer(unit: Unit) -> bool:
    """Whether a library makes such a tensor itself: whole numbers and booleans, and what is called like a mask or an index."""
    mask = len(unit.shape) == 4 and unit.shape[:2] == (1, 1) and unit.shape[2] == unit.shape[3] > 1 and unit.role == "bias"
    return unit.dtype.kind in ("int", "uint", "bool") or _leaf(unit) in BUFFERS or mask


def outcome(matching: Matching, source: Side, target: Side) -> Outcome:
    """Tensor by tensor, with what the modules that are left over could be."""
    found = Outcome()
    for pair in matching.pairs:
        for one, other in _units(pair.source, pair.target):
            rivals = [unit for module in pair.others for unit, _ in _units(module, pair.target) if _ == other]
            found.made.append(Made(one, other, pair.level, tuple(rivals)))
    found.unused = [unit for module in matching.source_rest for unit in module.units]
    found.missing = [unit for module in matching.target_rest for unit in module.units]
    _same_forms(found)
    _other_sizes(found, source, target)
    _ties(found)
    _positions_of_tokens(found)
    doubts = _doubts(found)
    found.made = [_judged(made, doubts) for made in found.made]
    return found


def _units(source: Module, target: Module) -> list[tuple[Unit, Unit]]:
    """The parameters of two modules by their roles; where roles have other names, by their forms and in order."""
    rest = {unit.names: unit for unit in source.units}
    found, open_ = [], []
    for unit in target.units:
        same = next((each for each in rest.values() if each.role == unit.role and each.form == unit.form), None)
        if same is None:
            open_.append(unit)
        else:
            found.append((rest.pop(same.names), unit))
    for unit in open_:
        same = next((each for each in rest.values() if each.form == unit.form), None)
        if same is not None:
            found.append((rest.pop(same.names), unit))
    return found


def _same_forms(found: Outcome) -> None:
    """Parameters of one form, or of one turned, that are in different company there: where a name says so, or nothing else has the form."""
    spare, open_ = Counter(unit.form for unit in found.unused), Counter(unit.form for unit in found.missing)
    for at, unit in enumerate(found.unused):
        other = (*unit.form[:-2], unit.form[-1], unit.form[-2]) if len(unit.form) == 3 else unit.form
        if other != unit.form and not open_[unit.form] and spare[unit.form] <= open_[other] and not spare[other]:
            found.unused[at] = replace(unit, turned=not unit.turned)
    for target in list(found.missing):
        rivals = [
            unit for unit in found.unused if unit.form == target.form and (unit.role == target.role or not unit.role or not target.role)
        ]
        if rivals and not is_buffer(target):
            alike = likeness([".".join(unit.path) for unit in rivals], [".".join(target.path)])
            best = max(range(len(rivals)), key=lambda at: alike[at][0])
            alone = len(rivals) == 1 and sum(unit.form == target.form for unit in found.missing) == 1
            if alike[best][0] > 0.5 or (alone and len(target.form) > 2):
                found.add(rivals[best], target, "likely" if alone else "ambiguous", [unit for at, unit in enumerate(rivals) if at != best])


# --- other sizes -----------------------------------------------------------------------------------------------------------------------


def _other_sizes(found: Outcome, source: Side, target: Side) -> None:
    ours, theirs = (Counter(skeleton(unit.name) for unit in side.units) for side in (source, target))
    spare = [unit for unit in found.unused if not (unit.count or unit.same) and (ours[skeleton(unit.name)] == 1 or len(unit.shape) == 4)]
    open_ = [unit for unit in found.missing if not unit.joined and (theirs[skeleton(unit.name)] == 1 or len(unit.shape) == 4)]
    for change in ("prefix", "positions", "line", "channels", "rows"):
        wanted = [unit for unit in open_ if any(_change(each, unit) == change for each in spare) and unit in found.missing]
        rivals = [each for each in spare if each in found.unused and any(_change(each, unit) == change for unit in wanted)]
        if not wanted or not rivals or (change == "channels" and len(wanted) > 1):
            continue
        alike = likeness([".".join(each.path) for each in rivals], [".".join(unit.path) for unit in wanted])
        costs = [
            [-alike[at][to] if _change(one, unit) == change else _NEVER for to, unit in enumerate(wanted)] for at, one in enumerate(rivals)
        ]
        for at, to in enumerate(assigned(costs)):
            if to >= 0 and costs[at][to] < _NEVER and wanted[to] in found.missing:
                others = [rival for place, rival in enumerate(rivals) if place != at and alike[place][to] > alike[at][to] - 0.2]
                _resized(found, change, rivals[at], wanted[to], others, target)


def _resized(found: Outcome, change: str, one: Unit, other: Unit, rivals: Sequence[Unit], target: Side) -> None:
    if change == "rows" and not _is_vocabulary(one, other, found):
        last = target.ordered and other.at > max((made.target.at for made in found.made), default=0)
        if is_head(other) or last:
            _head(found, one, other)
    elif change != "rows" or _near(one, other):
        cut = change == "rows" and other.shape[0] <= one.shape[0]
        found.add(one, other, "ambiguous" if rivals else "likely", rivals, change, "rows are cut off" if cut else "its sizes are changed")


def _change(one: Unit, other: Unit) -> str:
    """The step that makes one's sizes the other's; empty where none does."""
    if one.role == "bias" or one.dtype.kind != other.dtype.kind or len(one.shape) < 2:
        return ""
    if len(one.shape) == 4 and len(other.shape) == 4:
        differ = [at for at in range(4) if one.shape[at] != other.shape[at]]
        return "channels" if differ == [1] and max(one.shape[1], other.shape[1]) <= _MOST_CHANNELS else ""
    mine, theirs = ([size for size in unit.shape if size != 1] for unit in (one, other))
    if len(mine) != 2 or len(theirs) != 2 or mine[1] != theirs[1] or mine[0] == theirs[0] or len(one.shape) != len(other.shape):
        return ""
    if "pos" in words(one.name) or "pos" in words(other.name):
        fewer = mine[0] - theirs[0]
        if 0 < fewer < _MOST_PREFIX and isqrt(theirs[0]) ** 2 == theirs[0]:
            return "prefix"
        return "positions" if grids(mine[0], theirs[0]) else "line"
    return "rows" if len(one.shape) == 2 and one.role == other.role == "weight" else ""


def _near(one: Unit, other: Unit) -> bool:
    """Rows of one vocabulary: padded, or with some words more."""
    return max(one.shape[0], other.shape[0]) <= 2 * min(one.shape[0], other.shape[0])


def grids(have: int, wanted: int) -> tuple[int, int, int] | None:
    """(tokens before them, side of the square there, side of the square wanted), where both counts are squares after equally many tokens.

    >>> grids(197, 257), grids(40, 80)
    ((1, 14, 16), None)
    """
    for extra in range(_MOST_PREFIX):
        one, other = isqrt(max(0, have - extra)), isqrt(max(0, wanted - extra))
        if one * one == have - extra and other * other == wanted - extra and min(one, other) > 1:
            return extra, one, other
    return None


def _is_vocabulary(one: Unit, other: Unit, found: Outcome) -> bool:
    """Rows of a vocabulary, not of classes: there is no bias, and it is called so, or two matrices have the same new number of rows."""
    biased = any(unit.path == other.path and unit.role == "bias" for unit in found.missing)
    open_ = [*found.missing, *(made.target for made in found.made if made.change == "rows")]
    alike = [unit for unit in open_ if unit.role == "weight" and unit.shape[:1] == other.shape[:1] and len(unit.shape) == 2]
    named = {"embed", "vocab", "lm"} & {*words(one.name), *words(other.name)}
    return not biased and (bool(named) or len(alike) > 1)


def _head(found: Outcome, one: Unit, other: Unit) -> None:
    mine = [unit for unit in found.unused if unit.path == one.path]
    theirs = [unit for unit in found.missing if unit.path == other.path]
    for unit in theirs:
        partner = next((each for each in mine if each.role == unit.role), None)
        if partner is not None:
            found.heads.append((partner, unit))
            found.unused.remove(partner)
            found.missing.remove(unit)


def _ties(found: Outcome) -> None:
    """A head that is not there, with the shape of an embedding that is, or a bias beside one alike: most likely the two are tied."""
    why = "the source has no such tensor: the one that it is tied to elsewhere may be meant"
    rows = Counter(size for each in (*found.missing, *(made.target for made in found.made)) for size in each.form[1:] if len(each.form) > 2)
    for unit in list(found.missing):
        same = [made for made in found.made if made.target.form == unit.form and made.target.role == unit.role and not made.change
                and not made.source.joined and not made.target.joined]  # fmt: skip
        if unit.joined or len(same) != 1 or len(set(unit.form[1:])) < len(unit.form) - 1:
            continue
        partner = same[0].target
        embeds = len(unit.form) == 3 and {"embed", "token"} & set(words(partner.name)) and rows[unit.form[1]] == 2
        beside = len(unit.form) == 2 and partner.path[:-1] and unit.path[: len(partner.path) - 1] == partner.path[:-1] and is_head(unit)
        if embeds or beside:
            found.add(same[0].source, unit, "ambiguous", (), "tie", why)


def _positions_of_tokens(found: Outcome) -> None:
    """Where the source has one position more than a square grid, it is the class token's: a model without it wants the two added."""
    cut = [made for made in found.made if made.change == "prefix"]
    tokens = [at for at, made in enumerate(found.made) if is_token(made.target) and "cls" in words(made.target.name)]
    if len(cut) == len(tokens) == 1 and sum(cut[0].source.shape) - sum(cut[0].target.shape) == 1:
        made = found.made[tokens[0]]
        if made.source.shape == made.target.shape == tuple(1 if one != other else one for one, other in
                                                           zip(cut[0].source.shape, cut[0].target.shape, strict=True)):  # fmt: skip
            why = "the source's position for it is added, because the target's positions have none"
            found.made[tokens[0]] = replace(made, added=(cut[0].source,), level="ambiguous", why=why)


# --- how sure ---------------------------------------------------------------------------------------------------------------------------


def _judged(made: Made, doubts: Sequence[Doubt]) -> Made:
    """The pair with what shapes cannot tell of its values: rows in another order, a square matrix turned or not."""
    for holds, level, why in doubts:
        if LEVELS.index(made.level) < LEVELS.index(level) and holds(made):
            made = replace(made, level=level, why=made.why or why)
    return made


def _doubts(found: Outcome) -> list[Doubt]:
    """What may be wrong though the shapes are right: when, how bad, and why."""
    doubts: list[Doubt] = [
        (_is_unsure, "ambiguous", "another of its siblings has the shape as well, and no name tells which is part of the joined tensor"),
        (_is_fused, "likely", "the order of rows in the joined tensor is taken to be piece after piece"),
        (_is_qkv, "likely", "the order of rows in the joined tensor is taken to be the same"),
        (_is_square, "likely", "a square matrix: its shape does not tell whether it is turned"),
    ]
    if not any(len(made.target.form) > 2 and "pos" in words(made.target.name) for made in found.made):
        doubts.append((_is_query_or_key, "likely", "rotary implementations order the rows of a head differently"))
    if any(made.change in ("prefix", "positions", "line") for made in found.made):
        doubts.append((_is_token, "likely", "the positions are changed, and a token may have one of them"))
    return doubts


def _renamed(made: Made) -> bool:
    """Another name, not only other wrappers around it."""
    one, other = made.source.name.split("."), made.target.name.split(".")
    shorter = min(len(one), len(other), 3)
    return one[-shorter:] != other[-shorter:]


def _is_unsure(made: Made) -> bool:
    return made.source.unsure or made.target.unsure


def _is_fused(made: Made) -> bool:
    return bool(made.source.sizes or made.target.sizes)


def _is_query_or_key(made: Made) -> bool:
    said = {*words(made.target.path[-1]), *words(made.source.path[-1])}
    return bool(said & {"q", "k", "qkv"}) and "norm" not in said and _renamed(made)


def _is_qkv(made: Made) -> bool:
    one, other = made.source, made.target
    whole = not one.joined and len(one.form) == 3 and one.form[1] == 3 * one.form[2]
    return whole and "attn" in words(other.name) and one.path[-1] != other.path[-1]


def _is_square(made: Made) -> bool:
    one, other = made.source, made.target
    square = len(one.form) == 3 and one.form[1] == one.form[2]
    return square and (one.turned != other.turned or bool(one.role) != bool(other.role))


def _is_token(made: Made) -> bool:
    return len(made.target.form) == 2 and not made.target.role


def is_head(unit: Unit) -> bool:
    """Whether a tensor is called like the last layers of a model, which are made new for a new task."""
    return bool(HEADS & {part.lower() for name in unit.path for part in name.split("_")} | ({"head"} & set(words(unit.name))))


def is_token(unit: Unit) -> bool:
    """Whether a tensor is one vector that stands for a token: of a class, a mask, a register."""
    return not unit.role and bool(TOKENS & set(words(unit.name)))
