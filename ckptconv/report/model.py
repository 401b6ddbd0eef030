"""Report objects: everything that a command found out, as data. The text, JSON and HTML views are drawn from the same object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from ckptconv._version import __version__
from ckptconv.errors import Problem
from ckptconv.names import collapse
from ckptconv.spec import DType, Manifest, TensorSpec
from ckptconv.verify.rungs import Ladder

if TYPE_CHECKING:
    from ckptconv.compare import Comparison
    from ckptconv.plan import Plan
    from ckptconv.report.changes import Change


class RunReport(Struct, frozen=True):
    """What ``run``, ``plan`` and ``verify`` say."""

    command: str
    rules: Mapping[str, Any]  #: label, file, digest
    source: Mapping[str, Any]  #: path, format, container, tensors, nbytes, digest
    destination: Mapping[str, Any]  #: path, format, files, tensors, nbytes, written
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)  #: entries of the source that are not tensors of the state_dict
    target: str = ""
    comparison: Comparison | None = None
    allowed: str = ""  #: the sentence on what stays at its initial values
    ladder: Ladder = field(default_factory=Ladder)
    #: copied_nbytes, computed_nbytes, peak_nbytes; of a plan in tasks also how many, and read_amplification
    cost: Mapping[str, float] = field(default_factory=dict)
    on_paper: Mapping[str, Any] = field(default_factory=dict)  #: of a plan: its cost on so many workers, bytes, requests, seconds
    seconds: float = 0.0
    workers: tuple[Mapping[str, Any], ...] = ()  #: of a run: number, copied_nbytes, cloned_nbytes, kernel_nbytes, computed_nbytes, seconds
    plan: Plan | None = None  #: where everything comes from, for views that show it
    rule_texts: Mapping[str, str] = field(default_factory=dict)  #: file -> text, for the lines that origins name
    #: what became of its state: at, parameters, groups, moments, counters, dropped
    optimizer: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        source = dict(self.source)
        if source and self.plan is not None:
            source["fingerprint"] = self.plan.source.fingerprint
        return {
            "ckptconv_report": 1, "ckptconv": __version__, "command": self.command, "rules": dict(self.rules), "source": source,
            "destination": dict(self.destination), "changes": [change.to_json() for change in self.changes], "notes": list(self.notes),
            "skipped": dict(self.skipped), "target": self.target, "fits": None if self.comparison is None else self.comparison.fits,
            "coverage": None if self.comparison is None else self.comparison.coverage, "allowed": self.allowed,
            "verification": self.ladder.to_json(), "cost": dict(self.cost), "seconds": round(self.seconds, 3),
            "workers": [dict(worker) for worker in self.workers], **({"on_paper": dict(self.on_paper)} if self.on_paper else {}),
            **({"optimizer": dict(self.optimizer)} if self.optimizer else {}),
        }  # fmt: skip


class Candidate(Struct, frozen=True):
    """One state_dict of an inspected file."""

    path: str
    manifest: Manifest
    skipped: Mapping[str, str]
    unsupported: Mapping[str, str]

    @property
    def dtypes(self) -> dict[DType, tuple[int, int]]:
        """dtype -> (tensors, bytes), most bytes first."""
        found: dict[DType, tuple[int, int]] = {}
        for spec, alike in Counter(self.manifest.stored.values()).items():
            count, nbytes = found.get(spec.dtype, (0, 0))
            found[spec.dtype] = (count + alike, nbytes + alike * spec.nbytes)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    def templates(self) -> list[tuple[str, str, int]]:
        """(template, spec, bytes): names collapsed where they have one shape and dtype."""
        groups: dict[TensorSpec, list[str]] = {}
        for name, spec in self.manifest.tensors.items():
            groups.setdefault(spec, []).append(name)
        order = {name: at for at, name in enumerate(self.manifest.tensors)}
        rows = [
            (order[template.names[0]], str(template), str(spec), len(template.names) * spec.nbytes)
            for spec, names in groups.items()
            for template in collapse(names)
        ]
        return [(text, spec, nbytes) for _, text, spec, nbytes in sorted(rows)]

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path, "tensors": len(self.manifest), "parameters": self.manifest.numel, "nbytes": self.manifest.nbytes,
            "dtypes": {dtype.value: list(counts) for dtype, counts in self.dtypes.items()}, "fingerprint": self.manifest.fingerprint,
            "manifest": self.manifest.to_json(), "skipped": dict(self.skipped), "unsupported": dict(self.unsupported),
        }  # fmt: skip


class Inspection(Struct, frozen=True):
    """What ``inspect`` says."""

    path: str
    format: str
    files: tuple[tuple[str, int], ...]
    candidates: tuple[Candidate, ...]
    metadata: Mapping[str, str]
    skipped: Mapping[str, str]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "ckptconv_inspection": 1, "path": self.path, "format": self.format, "files": [list(item) for item in self.files],
            "candidates": [candidate.to_json() for candidate in self.candidates], "metadata": dict(self.metadata),
            "skipped": dict(self.skipped), "warnings": list(self.warnings),
        }  # fmt: skip


class Difference(Struct, frozen=True):
    """What ``diff`` says."""

    left: str
    right: str
    only_left: tuple[str, ...]
    only_right: tuple[str, ...]
    changed: tuple[tuple[str, str, str], ...]  #: name, spec on the left, spec on the right
    ties: tuple[str, ...]
    a: Manifest  #: the left side whole
    b: Manifest

    @property
    def equal(self) -> bool:
        return not (self.only_left or self.only_right or self.changed or self.ties)

    def to_json(self) -> dict[str, Any]:
        return {
            "ckptconv_diff": 1, "left": self.left, "right": self.right, "equal": self.equal, "only_left": list(self.only_left),
            "only_right": list(self.only_right), "changed": [list(item) for item in self.changed], "ties": list(self.ties),
        }  # fmt: skip


def difference(left: str, a: Manifest, right: str, b: Manifest) -> Difference:
    """Two manifests compared, neither of them the right one."""
    changed = tuple((name, str(spec), str(b[name])) for name, spec in a.tensors.items() if name in b and b[name] != spec)
    ties_a, ties_b = ({frozenset(group) for group in manifest.ties} for manifest in (a, b))
    ties = [f"tied in {left} only: {', '.join(sorted(group))}" for group in ties_a - ties_b]
    ties += [f"tied in {right} only: {', '.join(sorted(group))}" for group in ties_b - ties_a]
    return Difference(
        left, right, tuple(name for name in a.tensors if name not in b), tuple(name for name in b.tensors if name not in a), changed,
        tuple(sorted(ties)), a, b,
    )  # fmt: skip


class RuleReport(Struct, frozen=True):
    """What ``test`` says of one rule file."""

    rules: str
    tests: int = 0
    failed: int = 0
    problems: tuple[Problem, ...] = ()
    todo: tuple[str, ...] = ()  #: tests that fail and may
    changed: tuple[str, ...] = ()  #: tests whose `expect` was rewritten

    def to_json(self) -> dict[str, Any]:
        return {
            "rules": self.rules, "tests": self.tests, "failed": self.failed, "todo": list(self.todo), "changed": list(self.changed),
            "problems": [problem.to_json() for problem in self.problems],
        }  # fmt: skip


class LockReport(Struct, frozen=True):
    """What ``rules lock`` says."""

    path: str
    rules: int
    written: bool = False
    problems: tuple[Problem, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "lock": self.path, "rules": self.rules, "written": self.written, "problems": [problem.to_json() for problem in self.problems],
        }  # fmt: skip
