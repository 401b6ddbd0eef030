"""Simple ways to guess a conversion, for comparison. Each matches one source tensor to one target tensor of the same shape
and kind of numbers.

``suffix``: the longest common end of two names first. ``hungarian``: the assignment of greatest total name similarity among tensors of one
shape. ``alignment``: both models in their order, aligned so that as many shapes as possible agree. None can cut or join tensors. They are
asked like the suggester itself, and give back the same fields; one that finds no source for some target refuses.
"""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ckptconv.spec import Manifest, TensorSpec

Key = tuple[tuple[int, ...], str]  #: what must agree: the shape and the kind of numbers
Matched = dict[str, str]  #: target name -> source name


@dataclass(frozen=True)
class Guess:
    """What a baseline says, in the suggester's words. It never claims to be certain."""

    verdict: str
    reason: str
    text: str
    mapping: Mapping[str, tuple[tuple[str, ...], str]]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    confidence: Mapping[str, str] = field(default_factory=dict)


def guess(match: Callable[[Manifest, Manifest], Matched], source: Manifest, target: Manifest) -> Guess:
    found = match(source, target)
    missing = tuple(name for name in target.stored if name not in found)
    used = set(found.values())
    unused = tuple(name for name in source.stored if name not in used)
    verdict = "not convertible" if missing else "convertible with loss" if unused else "convertible"
    reason = f"{len(missing)} of {len(target)} have no source" if missing else ""
    mapping = {name: ((other,), "rename") for name, other in found.items()}
    text = _rule(
        found, [*unused, *source.aliases], source, target
    )  # the other names of a tie: the target's own are tied again when it is loaded
    return Guess(verdict, reason, text, mapping, missing, unused, dict.fromkeys(found, "likely"))


def _rule(found: Matched, unused: Sequence[str], source: Manifest, target: Manifest) -> str:
    """A rule with an entry per tensor. JSON is YAML."""
    if not found:
        return ""
    steps: list[dict[str, object]] = []
    if unused:
        steps.append({"drop": {"keys": list(unused), "reason": "no target"}})
    steps.append({"rename": {other: name for name, other in found.items()}})
    casts: dict[str, list[str]] = defaultdict(list)
    for name, other in found.items():
        if source[other].dtype != target[name].dtype:
            casts[target[name].dtype.value].append(name)
    steps += [{"cast": {"keys": names, "dtype": dtype}} for dtype, names in casts.items()]
    return json.dumps({"version": 1, "name": "baseline", "summary": "one entry per tensor", "steps": steps}, ensure_ascii=False, indent=1)


def _key(spec: TensorSpec) -> Key:
    return spec.shape, spec.dtype.kind


def _grouped(manifest: Manifest) -> dict[Key, list[str]]:
    groups: dict[Key, list[str]] = defaultdict(list)
    for name, spec in manifest.stored.items():
        groups[_key(spec)].append(name)
    return groups


def suffix(source: Manifest, target: Manifest) -> Matched:
    """Greedy: the two names with the longest common end are a pair, then the next two; among equals the first in order."""
    found: Matched = {}
    there = _grouped(source)
    for spec, targets in _grouped(target).items():
        ranked = sorted(
            ((-_common_end(one, other), i, j) for i, one in enumerate(targets) for j, other in enumerate(there.get(spec, ()))),
        )
        left, right = set(range(len(targets))), set(range(len(there.get(spec, ()))))
        for _, i, j in ranked:
            if i in left and j in right:
                left.discard(i)
                right.discard(j)
                found[targets[i]] = there[spec][j]
    return found


def _common_end(one: str, other: str) -> int:
    count = 0
    for a, b in zip(reversed(one), reversed(other)):  # noqa: B905  (the shorter one ends it)
        if a != b:
            break
        count += 1
    return count


def hungarian(source: Manifest, target: Manifest) -> Matched:
    """Per shape, the assignment with the greatest sum of similarities."""
    found: Matched = {}
    there = _grouped(source)
    for spec, targets in _grouped(target).items():
        names = there.get(spec, [])
        if not names:
            continue
        cost = -_similarities(targets, names)
        rows, columns = assignment(cost)
        found.update({targets[i]: names[j] for i, j in zip(rows, columns, strict=True)})
    return found


def _similarities(left: Sequence[str], right: Sequence[str]) -> np.ndarray:
    """Dice's coefficient of the sets of three letters, and as much again for the same indices in the same order."""
    grams = {name: {f"^{name}$"[at : at + 3] for at in range(len(name))} for name in (*left, *right)}
    indices = {name: [part for part in name.split(".") if part.isdigit()] for name in (*left, *right)}
    found = np.zeros((len(left), len(right)))
    for i, one in enumerate(left):
        for j, other in enumerate(right):
            dice = 2 * len(grams[one] & grams[other]) / (len(grams[one]) + len(grams[other]))
            found[i, j] = dice + (indices[one] == indices[other])
    return found


def assignment(cost: np.ndarray) -> tuple[list[int], list[int]]:
    """The rows and columns of least total cost: scipy's where it is installed, else the Hungarian method with potentials."""
    if importlib.util.find_spec("scipy") is not None:
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(cost)
        return [int(row) for row in rows], [int(column) for column in columns]
    if cost.shape[0] > cost.shape[1]:
        columns, rows = assignment(cost.T)
        return rows, columns
    count, width = cost.shape
    u, v = np.zeros(count + 1), np.zeros(width + 1)
    owner = np.zeros(width + 1, dtype=int)  # of a column, the row; both counted from 1, 0 is none
    padded = np.zeros((count + 1, width + 1))
    padded[1:, 1:] = cost
    for row in range(1, count + 1):
        owner[0], at = row, 0
        least, way = np.full(width + 1, np.inf), np.zeros(width + 1, dtype=int)
        done = np.zeros(width + 1, dtype=bool)
        while owner[at]:
            done[at] = True
            free = ~done
            reduced = padded[owner[at]] - u[owner[at]] - v
            better = free & (reduced < least)
            least[better], way[better] = reduced[better], at
            after = int(np.where(free, least, np.inf).argmin())
            step = least[after]
            u[owner[done]] += step
            v[done] -= step
            least[free] -= step
            at = after
        while at:
            owner[at], at = owner[way[at]], int(way[at])
    pairs = sorted((int(owner[column]) - 1, column - 1) for column in range(1, width + 1) if owner[column])
    return [row for row, _ in pairs], [column for _, column in pairs]


def alignment(source: Manifest, target: Manifest) -> Matched:
    """The longest common subsequence of shapes, both models in their order; among equals the one that pairs early ones."""
    left, right = ([(name, _key(spec)) for name, spec in each.stored.items()] for each in (target, source))
    best = np.zeros((len(left) + 1, len(right) + 1), dtype=np.int32)
    specs = {spec: at for at, spec in enumerate({key for _, key in (*left, *right)})}
    theirs = np.array([specs[spec] for _, spec in right])
    for i in range(len(left) - 1, -1, -1):
        same = theirs == specs[left[i][1]]
        row = np.maximum(best[i + 1, :-1], np.where(same, best[i + 1, 1:] + 1, 0))
        best[i, :-1] = np.maximum.accumulate(row[::-1])[::-1]
    found: Matched = {}
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i][1] == right[j][1] and best[i, j] == best[i + 1, j + 1] + 1:
            found[left[i][0]] = right[j][0]
            i, j = i + 1, j + 1
        elif best[i, j] == best[i + 1, j]:
            i += 1
        else:
            j += 1
    return found


def weightbridge(source: Manifest, target: Manifest) -> Matched:
    """The package of that name, where it is installed. Every tensor is filled with its own number, so that the result tells the match."""
    import weightbridge as package

    numbers = {at + 1: name for at, name in enumerate(source.stored)}
    given = {name: np.full(source[name].shape, at, dtype=np.float64) for at, name in numbers.items()}
    wanted = {name: np.zeros(spec.shape, dtype=np.float64) for name, spec in target.stored.items()}
    try:
        found = package.adapt(given, wanted)
    except Exception:  # it refuses by many kinds of exception
        return {}
    return {name: numbers[int(value.flat[0])] for name, value in found.items() if value.size and int(value.flat[0]) in numbers}


MATCHERS: dict[str, Callable[[Manifest, Manifest], Matched]] = {"suffix": suffix, "hungarian": hungarian, "alignment": alignment}
if importlib.util.find_spec("weightbridge") is not None:
    MATCHERS["weightbridge"] = weightbridge
