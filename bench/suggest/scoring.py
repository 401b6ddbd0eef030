"""How a suggestion is judged: by the names it maps, and by the values that its rule makes of small random tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml

from ckptconv.errors import CkptconvError, Refusal
from ckptconv.execute.memory_run import evaluate
from ckptconv.plan import Apply, Expr, Plan, Read, reads, walk
from ckptconv.planner import make_plan
from ckptconv.ruleset import builtin
from ckptconv.ruleset.model import parse
from ckptconv.spec import DType, Manifest, TensorSpec
from ckptconv.transforms import Guard

POSITIVE = ("loads as it is", "convertible", "convertible with loss")
VERDICTS = (*POSITIVE, "not convertible")


@dataclass
class Score:
    """One suggestion for one pair."""

    targets: int  #: tensors that have a source by the truth
    mapped: int = 0  #: of all names that are mapped
    right: int = 0  #: their sources are the truth's
    exact: int = 0  #: the rule makes the very same values
    levels: dict[str, list[int]] = field(default_factory=dict)  #: per level of confidence: how many, and how many of them are wrong
    certain_names: list[str] = field(default_factory=list)  #: said to be certain, from other sources than the truth's
    certain_values: list[str] = field(default_factory=list)  #: said to be certain, from the right sources, with other values
    refused: bool = False
    perfect: bool = False
    entries: int = 0
    error: str = ""
    verdict: str = ""
    seconds: float = 0.0

    @property
    def recall(self) -> float:
        return self.right / self.targets if self.targets else 1.0

    @property
    def precision(self) -> float:
        return self.right / self.mapped if self.mapped else 1.0

    @property
    def certain(self) -> int:
        return self.levels.get("certain", [0])[0]

    @property
    def certain_wrong(self) -> int:
        return len(self.certain_names) + len(self.certain_values)


class Judge:
    """What is right for one pair, worked out once."""

    def __init__(self, source: Manifest, target: Manifest, truth: Plan) -> None:
        self.source, self.target = source, target
        self.same = interchangeable(truth)
        self.wanted = {output.name: self._meant(reads(output.expr)) for output in truth.outputs}
        self.values = tensors(source, self.same)
        self.expected = evaluate(truth, self.values)

    def _meant(self, names: Iterable[str]) -> frozenset[str]:
        return frozenset(self.same.get(name, name) for name in names)

    def score(self, suggestion: Any) -> Score:
        """Judges ``suggestion``. What it maps is counted though it refuses, but perfect it is not then."""
        wanted, aliases = self.wanted, self.target.aliases
        mapping = {name: self._meant(names) for name, (names, _) in suggestion.mapping.items()}
        for name, first in aliases.items():  # a tied name has what its first name has
            if name not in mapping and first in mapping:
                mapping[name] = mapping[first]
        found = Score(len(wanted), verdict=suggestion.verdict, refused=suggestion.verdict not in POSITIVE)
        if suggestion.verdict not in VERDICTS:
            found.error = f"unknown verdict {suggestion.verdict!r}"
        made = self._made(suggestion, found)
        equal = {name for name in wanted if _equal(made.get(name, made.get(aliases.get(name, name))), self.expected[name])}
        for name, level in suggestion.confidence.items():
            other_names = mapping.get(name) != wanted.get(name)
            other_values = not other_names and bool(made) and name not in equal
            count = found.levels.setdefault(level, [0, 0])
            count[0] += 1
            count[1] += other_names or other_values
            if level == "certain" and other_names:
                found.certain_names.append(name)
            elif level == "certain" and other_values:
                found.certain_values.append(name)
        found.mapped = sum(name in self.target for name in mapping)
        found.right = sum(mapping.get(name) == sources for name, sources in wanted.items())
        found.exact = len(equal)
        found.perfect = not found.refused and not found.error and len(equal) == len(wanted) and set(made) <= set(self.target)
        return found

    def _made(self, suggestion: Any, found: Score) -> Mapping[str, torch.Tensor]:
        """What the suggested rule makes; nothing where it cannot be run, and then ``found`` says why."""
        if not suggestion.text:
            if suggestion.verdict == "loads as it is":
                return self.values
            found.error = found.error or ("" if found.refused else "no rule")
            return {}
        try:
            found.entries = entries(suggestion.text)
            return evaluate(plan_of(suggestion.text, self.source), self.values)
        except (CkptconvError, Refusal, yaml.YAMLError) as error:
            found.error = " ".join(str(error).split())[:300]
            return {}


def plan_of(text: str, source: Manifest) -> Plan:
    return make_plan(parse(text.encode(), "the suggested rule"), source)


def interchangeable(truth: Plan) -> dict[str, str]:
    """Source tensors that must be equal for the truth to hold at all (replicas of ranks, a tied head), mapped to one of them."""
    chosen: dict[str, str] = dict(truth.source.aliases)

    def top(name: str) -> str:
        while name in chosen:
            name = chosen[name]
        return name

    for node in walk(output.expr for output in truth.outputs):
        if isinstance(node, Apply) and isinstance(node.transform, Guard) and len(node.arguments) == 2:
            one, other = (_guarded(argument) for argument in node.arguments)
            if one is not None and other is not None and top(one) != top(other):
                chosen[top(other)] = top(one)
    return {name: top(name) for name in chosen}


def _guarded(node: Expr) -> str | None:
    while isinstance(node, Apply) and isinstance(node.transform, Guard):
        node = node.arguments[0]
    return node.name if isinstance(node, Read) else None


def tensors(source: Manifest, same: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Random values for every tensor, no two alike but those that must be."""
    generator = torch.Generator().manual_seed(7)
    found = {name: _random(spec, generator) for name, spec in source.tensors.items() if name not in same or same[name] == name}
    return {name: found[same.get(name, name)] for name in source}


def _random(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    dtype = getattr(torch, spec.dtype.value)
    if spec.dtype is DType.bool:
        return torch.rand(spec.shape, generator=generator) < 0.5
    if spec.dtype.kind in ("int", "uint"):
        return torch.randint(0, 2 ** min(spec.dtype.bits - 1, 40) - 1, spec.shape, generator=generator).to(dtype)
    return torch.randn(spec.shape, generator=generator).to(dtype)


def _equal(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    return one is not None and one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def entries(text: str) -> int:
    """How long a rule is for its reader: a step is one entry, a `rename` one for each of its lines."""
    steps = yaml.safe_load(text).get("steps", ())
    return sum(_entries(step) for step in steps)


def _entries(step: Mapping[str, Any]) -> int:
    if "include" in step:
        body = step["include"]
        return shipped_entries(body if isinstance(body, str) else body["rules"])
    body = step.get("rename")
    if not isinstance(body, Mapping):
        return 1
    return len(body["table"]) if isinstance(body.get("table"), Mapping) else len(body)


def shipped_entries(rule: str) -> int:
    return entries(builtin.path_of(rule).read_text(encoding="utf-8"))
