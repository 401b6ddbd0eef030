"""Large checkpoints thought about as small ones: of a long list that both sides have, a few members are enough.

Members alike have names alike; where two members differ, both are kept. What is found for the few is carried over to all by their places in
the lists.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property

from msgspec import Struct, field

from ckptconv.names import collapse
from ckptconv.spec import Manifest, TensorSpec

FEW = 1_000  #: tensors of which every one is looked at
_LONG = 8  #: members of a list that is worth it
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?=\.)")

Ranks = tuple[int, ...]
Kind = tuple[str, TensorSpec]


class _Names(Struct):
    """The names of a manifest by their look and spec, with the place of each number in its list."""

    manifest: Manifest
    kinds: dict[Kind, tuple[list[str], list[Ranks]]] = field(default_factory=dict)
    places: dict[str, dict[str, int]] = field(default_factory=dict)  #: list -> number -> place
    lists: dict[str, tuple[str, ...]] = field(default_factory=dict)  #: look -> its lists, outermost first

    def __post_init__(self) -> None:
        # Keyed by the dtype's identity: the hash of an enum's member costs more than all the rest, half a million times.
        seen: dict[tuple[str, tuple[int, ...], int], tuple[TensorSpec, list[str], list[list[str]]]] = {}
        look_of, numbers_of = _NUMBER.sub, _NUMBER.findall
        for name, spec in self.manifest.tensors.items():
            own = look_of("#", name), spec.shape, id(spec.dtype)
            group = seen.get(own)
            if group is None:
                group = seen[own] = (spec, [], [])
            group[1].append(name)
            group[2].append(numbers_of(name))
        groups = {(look, spec): (names, found) for (look, _, _), (spec, names, found) in seen.items()}
        numbers: dict[str, set[str]] = {}
        for (look, _), (_, found) in groups.items():
            self.lists[look] = tuple(look[: at.end()] for at in re.finditer("#", look))[: len(found[0])]
            for where, column in zip(self.lists[look], zip(*found, strict=True), strict=True):
                numbers.setdefault(where, set()).update(column)
        self.places = {where: {number: at for at, number in enumerate(sorted(each, key=int))} for where, each in numbers.items()}
        for kind, (names, found) in groups.items():
            columns = [map(self.places[where].__getitem__, column)
                       for where, column in zip(self.lists[kind[0]], zip(*found, strict=True), strict=True)]  # fmt: skip
            self.kinds[kind] = names, list(zip(*columns, strict=True)) if columns else [()] * len(names)

    def known(self, name: str) -> tuple[str, Ranks]:
        """The look of a name, and its places."""
        look = _NUMBER.sub("#", name)
        return look, tuple(self.places[where][number] for where, number in zip(self.lists[look], _NUMBER.findall(name), strict=True))

    def lengths(self) -> set[int]:
        return {len(places) for places in self.places.values()}

    def telling(self, kept: dict[int, set[int]], turn: int) -> None:
        """Adds the places in lists that tell all there is to know: of every kind of tensor the first, the last, and some more."""
        for (look, _), (_, places) in self.kinds.items():
            for where, column in zip(self.lists[look], zip(*places, strict=True), strict=True):
                keep = kept.get(len(self.places[where]))
                if keep is not None:
                    ordered = sorted(set(column))
                    middle = len(ordered) // 2 * turn
                    keep.update([*ordered[: 3 - turn], *ordered[middle : middle + 2 * turn], ordered[-1]])

    def thinned(self, kept: Mapping[int, set[int]]) -> Manifest:
        stay: set[str] = set()
        for (look, _), (names, places) in self.kinds.items():
            keeps = [kept.get(len(self.places[where])) for where in self.lists[look]]
            tests = [(at, keep) for at, keep in enumerate(keeps) if keep is not None]
            stay.update(name for name, ranks in zip(names, places, strict=True) if all(ranks[at] in keep for at, keep in tests))
        names_kept = {name: spec for name, spec in self.manifest.tensors.items() if name in stay}
        ties = (tuple(name for name in group if name in stay) for group in self.manifest.ties)
        return Manifest(names_kept, tuple(group for group in ties if len(group) > 1), self.manifest.buffers & stay)


class Thinned(Struct, frozen=True, dict=True):
    """Two manifests made small, twice with other members, and the way back to all of their names."""

    source: Manifest
    target: Manifest
    again: tuple[Manifest, Manifest]
    _ours: _Names
    _theirs: _Names
    _kept: Mapping[int, set[int]]

    def carried(self, few: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, tuple[str, ...]]]:
        """For every name of the target that one of ``few`` (target name -> source names) stands for: that one, and its own source names."""
        made: dict[str, tuple[str, tuple[str, ...]]] = {}
        whole: dict[str, dict[Ranks, str]] = {}
        for (look, _), (names, places) in self._ours.kinds.items():
            whole.setdefault(look, {}).update(zip(places, names, strict=True))
        relations = self._relations(few)
        thin: dict[str, dict[Ranks, str]] = {}
        for name in few:
            look, ranks = self._theirs.known(name)
            thin.setdefault(look, {})[ranks] = name
        for (look, _), (names, places) in self._theirs.kinds.items():
            floors = self._floors(look, places)
            there = thin.get(look, {})
            for name, ranks in zip(names, places, strict=True):
                like = there.get(tuple([floor[rank] for floor, rank in zip(floors, ranks, strict=True)]))
                if like is not None:
                    sources = tuple(
                        [
                            whole[kind].get(tuple([ranks[at] if at >= 0 else fixed for at, fixed in parts]), "")
                            for kind, parts in relations[like]
                        ]
                    )
                    if all(sources):
                        made[name] = like, sources
        return made

    @cached_property
    def _spans(self) -> dict[str, str]:
        """The numbers of the few, as templates have them -> those of all."""
        found = {}
        for names in (self._ours, self._theirs):
            for places in names.places.values():
                keep = self._kept.get(len(places))
                if keep is not None:
                    few = collapse([number for number, at in places.items() if at in keep])[0].text
                    found[few] = collapse(list(places))[0].text
        return found

    def said(self, text: str) -> str:
        """A sentence on the few as one on all."""
        for few, all_ in self._spans.items():
            text = text.replace(few, all_)
        return text

    def said_in_comments(self, text: str) -> str:
        """The same in the comments of a rule file only."""
        return "\n".join(self.said(line) if line.lstrip().startswith("#") else line for line in text.split("\n"))

    def _floors(self, look: str, places: Sequence[Ranks]) -> list[dict[int, int]]:
        """Of each list that a look goes through: the places that there are -> the one that is kept and stands for it."""
        found = []
        for where, column in zip(self._theirs.lists[look], zip(*places, strict=True), strict=True):
            keep = self._kept.get(len(self._theirs.places[where]))
            ranks = sorted(set(column))
            kept = ranks if keep is None else [rank for rank in ranks if rank in keep]
            found.append({rank: kept[max(0, bisect_right(kept, rank) - 1)] for rank in ranks})
        return found

    def _relations(self, few: Mapping[str, tuple[str, ...]]) -> dict[str, list[tuple[str, list[tuple[int, int]]]]]:
        """For a name of the few, how the places of its sources follow from its own: which of its own, or -1 and a fixed place."""
        groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for name, sources in few.items():
            groups.setdefault((self._theirs.known(name)[0], tuple(self._ours.known(each)[0] for each in sources)), []).append(name)
        found: dict[str, list[tuple[str, list[tuple[int, int]]]]] = {}
        for names in groups.values():
            rows = [(self._theirs.known(name)[1], [self._ours.known(each)[1] for each in few[name]]) for name in names]
            follows: list[list[int]] = []
            for piece in range(len(rows[0][1])):
                follows.append([
                    next((to for to in range(len(rows[0][0])) if all(own[to] == theirs[piece][at] for own, theirs in rows)
                          and len({own[to] for own, _ in rows}) > 1), -1)
                    for at in range(len(rows[0][1][piece]))
                ])  # fmt: skip
            for name, (_, pieces) in zip(names, rows, strict=True):
                looks = [self._ours.known(each)[0] for each in few[name]]
                found[name] = [(look, list(zip(follow, ranks, strict=True)))
                               for look, follow, ranks in zip(looks, follows, pieces, strict=True)]  # fmt: skip
        return found


def thinned(source: Manifest, target: Manifest) -> Thinned | None:
    """Both manifests with few members of their long lists; None where they are small, or nothing would be gained."""
    if max(len(source), len(target)) <= FEW:
        return None
    ours, theirs = _Names(source), _Names(target)
    lengths = {length for length in ours.lengths() & theirs.lengths() if length >= _LONG}
    made: list[tuple[Manifest, Manifest]] = []
    keeps: list[dict[int, set[int]]] = []
    for turn in (0, 1):
        kept: dict[int, set[int]] = {length: set() for length in lengths}
        ours.telling(kept, turn)
        theirs.telling(kept, turn)
        keeps.append(kept)
        made.append((ours.thinned(kept), theirs.thinned(kept)))
    if len(made[0][0]) + len(made[0][1]) > 0.8 * (len(source) + len(target)):
        return None
    return Thinned(*made[0], made[1], ours, theirs, keeps[0])
