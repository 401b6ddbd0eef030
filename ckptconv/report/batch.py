"""What ``batch`` says: as data, and as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from rich.console import Console
from rich.text import Text

from ckptconv._version import __version__
from ckptconv.errors import Problem, printable
from ckptconv.report.text import nbytes_text, print_problems, safe


class BatchItem(Struct, frozen=True):
    """One checkpoint."""

    source: str
    output: str
    why: str = ""  #: new, or what changed
    nbytes: int = 0
    verified: str = ""
    problems: tuple[Problem, ...] = ()
    exit_code: int = 0

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"source": self.source, "output": self.output, "why": self.why}
        if self.problems:
            return {**found, "exit_code": self.exit_code, "problems": [problem.to_json() for problem in self.problems]}
        return {**found, "nbytes": self.nbytes, "verified": self.verified}


class BatchReport(Struct, frozen=True):
    """What ``batch`` says. With ``dry_run``, ``converted`` is what would be."""

    rules: Mapping[str, Any]  #: label, file, digest
    destination: str
    converted: tuple[BatchItem, ...]
    unchanged: tuple[str, ...]  #: sources whose outputs are as the lock says
    failed: tuple[BatchItem, ...]
    jobs: int
    seconds: float
    dry_run: bool = False

    @property
    def exit_code(self) -> int:
        """0 where all is done; else what the checkpoints that are not converted would have ended with alone, the highest."""
        return max((item.exit_code for item in self.failed), default=0)

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.converted)

    def to_json(self) -> dict[str, Any]:
        return {
            "ckptconv_batch": 1, "ckptconv": __version__, "rules": dict(self.rules), "destination": self.destination, "dry_run": self.dry_run,
            "converted": [item.to_json() for item in self.converted], "unchanged": list(self.unchanged),
            "failed": [item.to_json() for item in self.failed], "exit_code": self.exit_code, "nbytes": self.nbytes, "jobs": self.jobs,
            "seconds": round(self.seconds, 3),
        }  # fmt: skip


def converted_line(item: BatchItem) -> str:
    """What is said of a checkpoint as soon as it is done."""
    return f"{printable(item.source, 1000)} -> {printable(item.output, 1000)}"


def print_batch(report: BatchReport, console: Console, verbose: int = 0) -> None:
    """The end of a batch: counts, and in a dry run what would be done and why."""
    if report.dry_run:
        for item in report.converted:
            console.print(Text(f"{converted_line(item)}  ({item.why})"), soft_wrap=True)
    if verbose:
        for source in report.unchanged:
            console.print(Text("unchanged ", "dim").append_text(safe(source, 1000)), soft_wrap=True)
    made = f"{len(report.converted):,} {'to convert' if report.dry_run else 'converted'}"
    counts = [made, f"{len(report.unchanged):,} unchanged"]
    counts += [f"{len(report.failed):,} not converted"] if report.failed else []
    size = f", {nbytes_text(report.nbytes)}" if report.nbytes else ""
    console.print(Text(f"{printable(report.rules['rules'])}: {', '.join(counts)}{size}, {report.seconds:.1f} s"), soft_wrap=True)


def print_failures(report: BatchReport, errors: Console) -> None:
    """Every checkpoint that was not converted, with its sentences."""
    for item in report.failed:
        errors.print(Text("not converted: ", "bold red").append_text(safe(item.source, 1000)), soft_wrap=True)
        print_problems(item.problems, errors)
