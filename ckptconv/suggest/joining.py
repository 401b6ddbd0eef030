"""What is several tensors on one side and one on the other: queries, keys and values; gates; the experts of a list.

Both sides are brought to the coarser of the two, so that everything afterwards matches one to one. Only tensors are joined whose shape is
left over (more often here than there), into shapes that are left over there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from msgspec import Struct
from msgspec.structs import replace

from ckptconv.suggest.blocks import skeleton
from ckptconv.suggest.units import Side, Unit
from ckptconv.suggest.words import QUERY_KEY_VALUE, says_all, words

Form = tuple[int, ...]
_MOST_SIBLINGS = 10
_MOST_ROUNDS = 3
#: The member of a list that stands for all of them.
EVERY = "*"


def coarsened(source: Side, target: Side) -> tuple[Side, Side]:
    """Both sides with everything joined that is one tensor on the other side."""
    source = _stacked(source, target)
    target = _stacked(target, source)
    for _ in range(_MOST_ROUNDS):  # what is joined on one side may be what the other side lacked to be joined
        before = len(source.units), len(target.units)
        source, target = _fused(source, target)
        target, source = _fused(target, source)
        if before == (len(source.units), len(target.units)):
            break
    return source, target


def _left_over(side: Side, other: Side) -> Counter[Form]:
    return side.forms - other.forms


def _stacked(side: Side, other: Side) -> Side:
    """Lists of members alike as one member of stacked tensors, where the other side has tensors with that many."""
    wanted = _left_over(other, side)
    counts = {form[1] for form in wanted if len(form) > 2}
    if not counts:
        return side
    lists: dict[tuple[str, ...], set[int]] = {}
    for unit in side.units:
        for at, part in enumerate(unit.path):
            if part.isdigit():
                lists.setdefault(unit.path[:at], set()).add(int(part))
    chosen = {path for path, numbers in lists.items() if len(numbers) in counts and numbers == set(range(len(numbers)))}
    groups: dict[tuple[tuple[str, ...], str], list[Unit]] = {}
    for unit in side.units:
        # Of lists in lists the innermost: as many layers as experts is no reason to stack the layers.
        member = next((at for at in reversed(range(len(unit.path))) if unit.path[at].isdigit() and unit.path[:at] in chosen), -1)
        if member >= 0:
            groups.setdefault(((*unit.path[:member], EVERY, *unit.path[member + 1 :]), unit.role), []).append(unit)
    made: dict[tuple[str, ...], Unit] = {}
    spare = _left_over(side, other)
    reach = _Reachable(wanted)
    for (path, _), units in groups.items():
        first, at = units[0], path.index(EVERY)
        count = len(lists[path[:at]])
        same = len(units) == count and len({(unit.shape, unit.dtype, unit.turned) for unit in units}) == 1
        if same and count in counts and spare[first.form] and (count, *first.form[1:]) in reach:
            ordered = sorted(units, key=lambda unit: int(unit.path[at]))
            names = tuple(unit.name for unit in ordered)
            made[first.names] = replace(first, path=path, shape=(count, *first.shape), names=names, count=count)
    gone = {name for unit in made.values() for name in unit.names}
    return side.holding(made.get(unit.names, unit) for unit in side.units if unit.names in made or unit.name not in gone)


class _Reachable:
    """Forms of stacked tensors that are wanted, or of which a piece, or with the last two axes changed, is wanted."""

    def __init__(self, wanted: Mapping[Form, int]) -> None:
        self._forms = [form[1:] for form in wanted if len(form) > 2]

    def __contains__(self, form: Form) -> bool:
        return any(_piece_of(form, each) or _piece_of(form, _changed(each)) for each in self._forms)


def _changed(form: Form) -> Form:
    return (*form[:-2], form[-1], form[-2])


def _piece_of(form: Form, whole: Form) -> bool:
    if len(form) != len(whole):
        return False
    differing = [at for at, (one, other) in enumerate(zip(form, whole, strict=True)) if one != other]
    return len(differing) <= 1 and all(at and form[at] < whole[at] and whole[at] % form[at] == 0 for at in differing)


class _Join(Struct, frozen=True):
    """Siblings that can be joined: which, in what order, along which axis, and what comes of it."""

    members: tuple[int, ...]
    axis: int  #: of the form, its kind not counted
    form: Form
    rank: tuple[int, ...]  #: the higher the better


def _fused(side: Side, other: Side) -> tuple[Side, Side]:
    """Siblings joined into shapes that the other side has left over."""
    spare, wanted = _left_over(side, other), _left_over(other, side)
    if not spare or not wanted:
        return side, other
    turned = {(form[0], *_changed(form[1:])): form for form in wanted if len(form) == 4}
    named: dict[Form, list[str]] = {}
    for unit in other.units:
        if unit.form in wanted:
            named.setdefault(unit.form, []).append(unit.path[-1])
    families: dict[tuple[tuple[str, ...], str], list[Unit]] = {}
    for unit in side.units:
        if spare[unit.form] and not unit.sizes:
            families.setdefault((unit.path[:-1], unit.role), []).append(unit)
    known: dict[tuple[tuple[str, Form], ...], list[_Join]] = {}
    joined: dict[tuple[str, ...], Unit] = {}
    flipped: set[Form] = set()
    unsure: set[tuple[str, ...]] = set()
    alike = Counter(_kind(parent, family) for (parent, _), family in families.items())
    begun: Counter[tuple[object, Form]] = Counter()
    matrices: set[tuple[tuple[str, ...], ...]] = set()  # of what: biases are joined where their matrices are, and norms never
    owners = {unit.path for unit in side.units if len(unit.form) > 2}
    for (parent, _), family in sorted(families.items(), key=lambda item: max(len(unit.form) for unit in item[1]) < 3):
        kind = _kind(parent, family)
        key = tuple((unit.path[-1], unit.form) for unit in family)
        if key not in known:
            known[key] = _joins(family, {**dict.fromkeys(wanted), **dict.fromkeys(turned)}, named, side.ordered)
        taken: set[int] = set()
        for join in known[key]:
            form = join.form if wanted[join.form] > 0 else turned.get(join.form, join.form)
            # What most members of a list need, all of them get: one tensor of that shape may be another's.
            if taken & set(join.members) or (wanted[form] <= 0 and 2 * begun[kind, form] < alike[kind]):
                continue
            pieces = [family[at] for at in join.members]
            paths = tuple(piece.path for piece in pieces)
            if len(form) < 3 and paths not in matrices and any(path in owners or pieces[0].role for path in paths):
                continue
            matrices.add(paths)
            wanted[form] -= 1
            begun[kind, form] += 1
            taken.update(join.members)
            if not join.rank[0] and any(each.form == join.form and each.members != join.members for each in known[key]):
                forms = {piece.form for piece in pieces}
                unsure.update(unit.names for unit in family if unit.form in forms)
            if form != join.form:
                flipped.add(form)
            joined[pieces[0].names] = _one(pieces, parent, join.axis)
    gone = {name for unit in joined.values() for name in unit.names}
    kept = [joined.get(unit.names, unit) for unit in side.units if unit.names in joined or unit.name not in gone]
    side = side.holding(replace(unit, unsure=True) if unit.names in unsure else unit for unit in kept)
    return side, other.holding(replace(unit, turned=True) if unit.form in flipped else unit for unit in other.units)


def _kind(parent: tuple[str, ...], family: Sequence[Unit]) -> object:
    return skeleton(".".join(parent)), family[0].role, tuple(unit.path[-1] for unit in family)


def _joins(family: Sequence[Unit], wanted: Mapping[Form, object], named: Mapping[Form, Sequence[str]], ordered: bool) -> list[_Join]:
    if not 2 <= len(family) <= _MOST_SIBLINGS:
        return []
    found = []
    for size in (2, 3):
        for members in combinations(range(len(family)), size):
            units = [family[at] for at in members]
            for axis, form in _sums([unit.form for unit in units]):
                if form in wanted:
                    order, rank = _order(units, named.get(form, ()))
                    near = int(ordered and members[-1] - members[0] == size - 1)
                    found.append(_Join(tuple(members[at] for at in order), axis, form, (*rank, near, -members[0])))
    return sorted(found, key=lambda join: join.rank, reverse=True)


def _sums(forms: Sequence[Form]) -> Iterator[tuple[int, Form]]:
    """The forms that these make when they are joined, with the axis."""
    if len({len(form) for form in forms}) > 1 or len(forms[0]) < 2 or len({form[0] for form in forms}) > 1:
        return
    for axis in range(1, len(forms[0])):
        if len({(*form[:axis], *form[axis + 1 :]) for form in forms}) == 1:
            yield axis - 1, (*forms[0][:axis], sum(form[axis] for form in forms), *forms[0][axis + 1 :])


def _order(units: Sequence[Unit], wholes: Sequence[str]) -> tuple[list[int], tuple[int, int]]:
    """In which order the pieces stand: queries, keys, values; else as the whole's name says; else as they come. And how sure that is."""
    names = [unit.path[-1] for unit in units]
    for wanted in (QUERY_KEY_VALUE, QUERY_KEY_VALUE[1:], QUERY_KEY_VALUE[:2]):
        by_word = says_all(names, wanted)
        if by_word is not None:
            return by_word, (2, len(wanted))
    for whole in wholes:
        own = [[word for word in words(name) if sum(word in words(each) for each in names) == 1 and word in words(whole)] for name in names]
        if all(own):
            said = words(whole)
            return sorted(range(len(units)), key=lambda at: said.index(own[at][0])), (2, 0)
    return list(range(len(units))), (0, 0)


def _one(pieces: Sequence[Unit], parent: tuple[str, ...], form_axis: int) -> Unit:
    first = pieces[0]
    real = [at for at, size in enumerate(first.shape) if size != 1]
    if first.turned:
        real = [*real[:-2], real[-1], real[-2]]
    axis = real[form_axis]
    sizes = tuple(piece.shape[axis] for piece in pieces)
    shape = (*first.shape[:axis], sum(sizes), *first.shape[axis + 1 :])
    names = tuple(name for piece in pieces for name in piece.names)
    path = (*parent, "|".join(piece.path[-1] for piece in pieces))
    return replace(first, path=path, shape=shape, names=names, sizes=sizes, axis=axis, at=min(piece.at for piece in pieces))
