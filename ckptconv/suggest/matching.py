"""Which module of one side is which of the other.

Top-down over both trees: parts with equal contents (the same signatures, however they are nested and called) are paired, members of lists
by their number, and looked into; what is left between them is assigned by order and names. Parts that are built alike are solved once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from msgspec import Struct, field

from ckptconv.names import natural_key
from ckptconv.suggest.assigning import assigned
from ckptconv.suggest.blocks import families, skeleton, zones
from ckptconv.suggest.units import Module, Node, Side, Signature, tree_of
from ckptconv.suggest.words import letter, likeness, place

LEVELS = ("certain", "likely", "ambiguous")
_COMPANY = 6.0  #: against 1 for names and for order: what is there in the same blocks only is the same
_NOISE = 0.1  #: what names may differ by chance
_CLEAR = 1.5  #: names that share nothing when they change places
_TOLD = 4.0  #: a gain that only hints or values give
_Table = Sequence[Sequence[float]]
_MOST = 48  #: more of one kind under several names are paired in order


class Found(Struct, frozen=True):
    """A pair, by the modules' numbers in their parts, with how sure it is and what else it could be."""

    source: int
    target: int
    level: int = 0
    others: tuple[int, ...] = ()  #: further modules of the source that would do


class Paired(Struct, frozen=True):
    """A module of the source and the module of the target that it becomes."""

    source: Module
    target: Module
    level: str
    others: tuple[Module, ...] = ()


class Matching(Struct, frozen=True):
    """All pairs, and what the two sides have left."""

    pairs: tuple[Paired, ...]
    source_rest: tuple[Module, ...]
    target_rest: tuple[Module, ...]


class Beyond(Protocol):
    """What is known besides names and shapes."""

    def of_names(self, one: str, other: str) -> float: ...

    def of_values(self, ours: Sequence[Module], theirs: Sequence[Module]) -> float: ...


class Evidence(Struct):
    """How far the order of registration is to be trusted, learnt from pairs that nothing else could be."""

    ordered: bool
    before: Mapping[tuple[str, ...], int]  #: of the source's modules outside of its blocks: on which side of them
    after: Mapping[tuple[str, ...], int]
    told: Beyond | None = None
    same: int = 0
    crossed: int = 0
    votes: Counter[tuple[str, str]] = field(default_factory=Counter)  #: of names within parts: how many parts paired the two
    voters: Counter[str] = field(default_factory=Counter)
    together: Counter[tuple[str, str]] = field(default_factory=Counter)  #: how many parts have the two where they could be one

    @property
    def trust(self) -> float:
        """0 to 1; what was seen, on the side of trust while little was."""
        if not self.ordered:
            return 0.0
        return max(0.0, (self.same + 3 - 2 * self.crossed) / (self.same + self.crossed + 3))

    def vote(self, one: str, other: str) -> None:
        self.votes[one, other] += 1

    def meet(self, ours: Iterable[str], theirs: Sequence[str]) -> None:
        """Notes which names stand for equal contents in two parts that are paired."""
        for one in set(ours):
            self.voters[one] += 1
            self.together.update((one, other) for other in set(theirs))
        self.voters.update(f"{other} <" for other in set(theirs))

    def support(self, one: str, other: str) -> float:
        """What other parts say of a pair: that the two are always there together, or not at all; and how they were paired there."""
        there, either = self.together[one, other], self.voters[one] + self.voters[other + " <"]
        if not there:
            return 0.0
        return _COMPANY * there / (either - there) + self.votes[one, other] / either

    def learn(self, pairs: Sequence[tuple[int, int]]) -> None:
        ordered = sorted(pairs)[:40]
        for at, (_, one) in enumerate(ordered):
            for _, other in ordered[at + 1 :]:
                if one != other:
                    self.same += other > one
                    self.crossed += other < one


def matched(source: Side, target: Side, told: Beyond | None = None) -> Matching:
    """The pairs of two coarsened sides."""
    common = {module.signature for module in source.modules} & {module.signature for module in target.modules}
    left, right = tree_of(_only(source, common)), tree_of(_only(target, common))
    evidence = Evidence(source.ordered and target.ordered, zones(source, families(source)), zones(target, families(target)), told)
    _Solver(evidence, learning=True).solve(left, right)
    found = _Solver(evidence).solve(left, right)
    pairs = tuple(
        Paired(left.modules[each.source], right.modules[each.target], LEVELS[each.level], tuple(left.modules[at] for at in each.others))
        for each in sorted(found, key=lambda each: each.target)
    )
    mine, theirs = {pair.source.path for pair in pairs}, {pair.target.path for pair in pairs}
    return Matching(
        pairs, tuple(each for each in source.modules if each.path not in mine),
        tuple(each for each in target.modules if each.path not in theirs),
    )  # fmt: skip


def _only(side: Side, signatures: set[Signature]) -> Side:
    return side.holding(unit for module in side.modules if module.signature in signatures for unit in module.units)


class _Solver(Struct):
    evidence: Evidence
    learning: bool = False
    _known: dict[tuple[int, int], list[Found]] = field(default_factory=dict)

    def solve(self, left: Node, right: Node) -> list[Found]:
        left, right = _inner(left), _inner(right)
        key = (left.shape, right.shape)
        if key not in self._known:
            self._known[key] = self._solve(left, right)
        return self._known[key]

    def _solve(self, left: Node, right: Node) -> list[Found]:
        mine, theirs = _frontiers(left, right)
        first, second = _numbers(left), _numbers(right)
        found: list[Found] = []
        anchors: list[tuple[int, int]] = []
        for total, parts in mine.items():
            others = theirs[total]
            for one, other, level, rivals in self._parts(parts, others):
                at, to = first[one.modules[0].path], second[other.modules[0].path]
                if len(parts) == len(others) == 1 or level == 0:
                    anchors.append((at, to))
                for each in self.solve(one, other):
                    more = tuple(first[rival.modules[each.source].path] for rival in rivals) if rivals else ()
                    inner = tuple(at + rival for rival in each.others)
                    found.append(Found(at + each.source, to + each.target, max(level, each.level), (*inner, *more)))
        done, made = {each.source for each in found}, {each.target for each in found}
        rest: dict[Signature, tuple[list[int], list[int]]] = {}
        for at, module in enumerate(left.modules):
            if at not in done:
                rest.setdefault(module.signature, ([], []))[0].append(at)
        for at, module in enumerate(right.modules):
            if at not in made and module.signature in rest:
                rest[module.signature][1].append(at)
        for signature, (ours, wanted) in rest.items():
            if ours and wanted:
                if len(ours) == len(wanted) == 1:
                    anchors.append((ours[0], wanted[0]))
                found += self._modules(signature, left, right, ours, wanted)
        if self.learning:
            self.evidence.learn(anchors)
            for each in found:  # as modules of their own, not as members of lists
                self.evidence.vote(_ending(left.modules[each.source].path), _ending(right.modules[each.target].path))
            for total, parts in mine.items():
                self.evidence.meet(map(_last, parts), [_last(node) for node in theirs[total]])
            for ours, wanted in rest.values():
                self.evidence.meet([_ending(left.modules[at].path) for at in ours], [_ending(right.modules[at].path) for at in wanted])
        return found

    def _parts(self, ours: Sequence[Node], theirs: Sequence[Node]) -> list[tuple[Node, Node, int, tuple[Node, ...]]]:
        """Parts with equal contents in pairs, each with a level and the parts that it could be as well."""
        voted: list[list[float]] = []
        if len(ours) * len(theirs) > 1 and not self.learning:
            voted = [[self.evidence.support(_last(one), _last(other)) for other in theirs] for one in ours]
        known = self._known_of([(node.name, node.modules) for node in ours], [(node.name, node.modules) for node in theirs])
        pairs, levels, rivals = self._paired([node.name for node in ours], [node.name for node in theirs], voted, known, solid=True)
        return [(ours[at], theirs[to], levels[at], tuple(ours[other] for other in rivals[at])) for at, to in pairs]

    def _modules(self, signature: Signature, left: Node, right: Node, ours: Sequence[int], theirs: Sequence[int]) -> list[Found]:
        names = [_relative(left.modules[at], left) for at in ours]
        wanted = [_relative(right.modules[at], right) for at in theirs]
        solid = any(len(form) > 2 for form in signature)
        voted: list[list[float]] = []
        if len(ours) * len(theirs) > 1:
            voted = [[self._extra(left.modules[at], right.modules[to], solid) for to in theirs] for at in ours]
        known = self._known_of(
            [(left.modules[at].name, [left.modules[at]]) for at in ours], [(right.modules[to].name, [right.modules[to]]) for to in theirs]
        )
        pairs, levels, rivals = self._paired(names, wanted, voted, known, solid=solid)
        return [Found(ours[at], theirs[to], levels[at], tuple(ours[other] for other in rivals[at])) for at, to in pairs]

    def _known_of(self, ours: Sequence[tuple[str, Sequence[Module]]], theirs: Sequence[tuple[str, Sequence[Module]]]) -> list[list[float]]:
        """What hints and values say of every pair; empty where they say nothing."""
        told = self.evidence.told
        if told is None or len(ours) * len(theirs) < 2:
            return []
        said = [[told.of_names(one, other) + told.of_values(mine, wanted) for other, wanted in theirs] for one, mine in ours]
        return said if any(each for row in said for each in row) else []

    def _extra(self, one: Module, other: Module, solid: bool) -> float:
        """What speaks for a pair besides names and order: other parts, and, for norms, the same side of the blocks."""
        side = 0 if solid else self.evidence.before.get(one.path, 0) * self.evidence.after.get(other.path, 0)
        return (0.0 if self.learning else self.evidence.support(_ending(one.path), _ending(other.path))) - 2 * (side < 0)

    def _paired(
        self, ours: Sequence[str], theirs: Sequence[str], voted: _Table, known: _Table, *, solid: bool
    ) -> tuple[list[tuple[int, int]], dict[int, int], dict[int, tuple[int, ...]]]:
        """Pairs of things that are equal but for their names, listed in order; of a list, the lower number first, whatever the order says."""
        first, second = _by_number(ours), _by_number(theirs)
        voted, known = ([[table[at][to] for to in second] for at in first] if table else [] for table in (voted, known))
        pairs, levels, rivals = self._in_order([ours[at] for at in first], [theirs[to] for to in second], voted, known, solid=solid)
        return (
            [(first[at], second[to]) for at, to in pairs],
            {first[at]: level for at, level in levels.items()},
            {first[at]: tuple(first[other] for other in others) for at, others in rivals.items()},
        )

    def _in_order(
        self, ours: Sequence[str], theirs: Sequence[str], voted: _Table, known: _Table, *, solid: bool
    ) -> tuple[list[tuple[int, int]], dict[int, int], dict[int, tuple[int, ...]]]:
        even = len(ours) == len(theirs)
        if len(ours) == len(theirs) == 1:
            alike = solid or likeness(ours, theirs)[0][0] > 0
            return [(0, 0)], {0: 0 if alike else 1}, {0: ()}
        kinds, others = {skeleton(name) for name in ours}, {skeleton(name) for name in theirs}
        if even and len(kinds) == len(others) == 1 and not known:
            return [(at, at) for at in range(len(ours))], dict.fromkeys(range(len(ours)), 0), dict.fromkeys(range(len(ours)), ())
        by_kind = self._kind_by_kind(ours, theirs, voted, known, solid)
        if by_kind is not None:
            return by_kind
        if len(ours) > _MOST or len(theirs) > _MOST:
            pairs = list(zip(range(len(ours)), range(len(theirs)), strict=False))
            return (
                pairs,
                dict.fromkeys(range(len(ours)), 1 if even and self.evidence.trust > 0.5 else 2),
                dict.fromkeys(range(len(ours)), ()),
            )
        return self._weighed(ours, theirs, voted, known)

    def _kind_by_kind(
        self, ours: Sequence[str], theirs: Sequence[str], voted: _Table, known: _Table, solid: bool
    ) -> tuple[list[tuple[int, int]], dict[int, int], dict[int, tuple[int, ...]]] | None:
        """Lists against lists of as many members, member by member; None where their lengths are not the same on both sides."""
        mine, wanted = _kinds(ours), _kinds(theirs)
        sizes = Counter(map(len, mine))
        if sizes != Counter(map(len, wanted)) or set(sizes) == {1}:
            return None
        pairs: list[tuple[int, int]] = []
        levels: dict[int, int] = {}
        rivals: dict[int, tuple[int, ...]] = {}
        for size in sizes:
            left, right = ([kind for kind in kinds if len(kind) == size] for kinds in (mine, wanted))
            extra, sure = ([[table[one[0]][other[0]] for other in right] for one in left] if table else [] for table in (voted, known))
            found = self._in_order([ours[one[0]] for one in left], [theirs[other[0]] for other in right], extra, sure, solid=solid)
            for at, to in found[0]:
                for rank, (one, other) in enumerate(zip(left[at], right[to], strict=True)):
                    pairs.append((one, other))
                    levels[one] = found[1][at]
                    rivals[one] = tuple(left[rival][rank] for rival in found[2][at])
        return pairs, levels, rivals

    def _weighed(
        self, ours: Sequence[str], theirs: Sequence[str], voted: _Table, known: _Table
    ) -> tuple[list[tuple[int, int]], dict[int, int], dict[int, tuple[int, ...]]]:
        alike = likeness(ours, theirs)
        first, second = (
            list(zip(_places(ours), map(letter, ours), strict=True)),
            list(zip(_places(theirs), map(letter, theirs), strict=True)),
        )
        last = [one.rpartition(".")[2] for one in ours], [other.rpartition(".")[2] for other in theirs]
        name = [
            [alike[at][to] + _agree(first[at], second[to]) + 0.3 * (last[0][at] == last[1][to]) for to in range(len(theirs))]
            for at in range(len(ours))
        ]
        if known:
            name = [[each + known[at][to] for to, each in enumerate(row)] for at, row in enumerate(name)]
        total = [[each + voted[at][to] for to, each in enumerate(row)] for at, row in enumerate(name)] if voted else name
        span = max(len(ours), len(theirs)) - 1
        order = [[-abs(at - to) / span for to in range(len(theirs))] for at in range(len(ours))]
        trust = self.evidence.trust
        weight = 1.2 * trust + 0.02
        columns = assigned([[-total[at][to] - weight * order[at][to] for to in range(len(theirs))] for at in range(len(ours))])
        pairs = [(at, to) for at, to in enumerate(columns) if to >= 0]
        levels: dict[int, int] = {}
        rivals: dict[int, tuple[int, ...]] = {}
        kinds = [(skeleton(one)) for one in ours], [(skeleton(other)) for other in theirs]
        for at, to in pairs:
            worst, could = 0, []
            for other, there in [*pairs, *((other, -1) for other, column in enumerate(columns) if column < 0)]:
                if other == at:
                    continue
                level = self._level((name, total, order), trust, at, to, other, there, kinds, bool(known))
                worst = max(worst, level)
                if level == 2:
                    could.append(other)
            if len(theirs) > len(ours):
                worst = max(worst, 1)
            levels[at], rivals[at] = worst, tuple(could)
        return pairs, levels, rivals

    def _level(
        self, scores: tuple[_Table, _Table, _Table], trust: float, at: int, to: int, other: int, there: int,
        kinds: tuple[Sequence[str], Sequence[str]], sure: bool,
    ) -> int:  # fmt: skip
        """How sure a pair is against one change of places with another (``there`` -1: with one that stays unused).

        Certain only where names and order agree, or where names that need no order speak clearly: what other parts of the same model
        say was decided in the same way as this.
        """
        if there >= 0 and not sure and kinds[0][at] == kinds[0][other] and kinds[1][to] == kinds[1][there] and (at < other) == (to < there):
            return 0  # two of a list, by their numbers

        def gain(score: _Table) -> float:
            if there < 0:
                return score[at][to] - score[other][to]
            return score[at][to] + score[other][there] - score[at][there] - score[other][to]

        name, total, turn = map(gain, scores)
        if sure and name > _TOLD:
            return 0
        if trust > 0.5:
            if name > 0.25 and turn >= 0 and total > 0.25:
                return 0
            if turn > 0:
                return 1 if total >= 0 and name > -_NOISE else 2
            # Names against the order: a flag, unless the names are very clear, or other blocks tell.
            return 1 if name >= _CLEAR or (total >= name + 1 and name >= 0) else 2
        return 0 if min(name, total) > 0.8 else 1 if min(name, total) > 0.4 else 2


def _agree(one: tuple[int, str], other: tuple[int, str]) -> float:
    """What it counts for that both names say which of two alike they are; that of queries, keys and values there is no doubt."""
    place_ = 0.0 if not one[0] or not other[0] else 0.3 if one[0] == other[0] else -0.3
    letter_ = 0.0 if not one[1] or not other[1] else 0.8 if one[1] == other[1] else -0.8
    return place_ + letter_


def _places(names: Sequence[str]) -> list[int]:
    """For every name whether it is the first or second of two alike; two that differ in their number only are told by that."""
    kinds = Counter(skeleton(name) for name in names)
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        kind = skeleton(name)
        seen[kind] += 1
        found.append(seen[kind] if kinds[kind] == 2 else place(name))
    return found


def _kinds(names: Sequence[str]) -> list[list[int]]:
    """The places of names that differ in numbers only, together."""
    found: dict[str, list[int]] = {}
    for at, name in enumerate(names):
        found.setdefault(skeleton(name), []).append(at)
    return list(found.values())


def _by_number(names: Sequence[str]) -> list[int]:
    """The places of the names, those that differ in numbers only exchanged so that these rise."""
    kinds: dict[str, list[int]] = {}
    for at, name in enumerate(names):
        kinds.setdefault(skeleton(name), []).append(at)
    rising = {kind: iter(sorted(places, key=lambda at: natural_key(names[at]))) for kind, places in kinds.items()}
    return [next(rising[skeleton(name)]) for name in names]


def _inner(node: Node) -> Node:
    """Past places that hold one part and nothing else: wrappers, mostly."""
    while len(node.children) == 1 and node.module is None:
        node = node.children[0]
    return node


def _numbers(node: Node) -> dict[tuple[str, ...], int]:
    return {module.path: at for at, module in enumerate(node.modules)}


def _ending(path: tuple[str, ...]) -> str:
    """What something is called in the part around it."""
    return ".".join(path[-1:] if len(path) < 2 or path[-2].isdigit() else path[-2:])


def _last(node: Node) -> str:
    return node.path[-1] if node.path else ""


def _relative(module: Module, node: Node) -> str:
    return ".".join(module.path[len(node.path) :]) or module.path[-1]


def _frontiers(left: Node, right: Node) -> tuple[dict[int, list[Node]], dict[int, list[Node]]]:
    """The outermost parts of each that have an equal in the other, by their contents."""
    whole = left.total != right.total
    ours = {node.total for node in left.below() if len(node.modules) > 1 and (whole or node is not left)}
    theirs = {node.total for node in right.below() if len(node.modules) > 1 and (whole or node is not right)}
    mine, other = _outermost(left, theirs, whole), _outermost(right, ours, whole)
    return {total: parts for total, parts in mine.items() if total in other}, other


def _outermost(root: Node, totals: Iterable[int], whole: bool) -> dict[int, list[Node]]:
    there = set(totals)
    found: dict[int, list[Node]] = {}
    stack = [root] if whole else list(reversed(root.children))
    while stack:
        node = _inner(stack.pop())
        if len(node.modules) > 1 and node.total in there:
            found.setdefault(node.total, []).append(node)
        elif len(node.modules) > 1:
            stack.extend(reversed(node.children))
    return found
