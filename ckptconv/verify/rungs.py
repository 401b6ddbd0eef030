"""What a climb leaves behind, as data: the rungs, and what each of them found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from ckptconv.errors import Problem

if TYPE_CHECKING:
    from ckptconv.verify.parity import ParityReport

LEVELS: Mapping[int, str] = {0: "integrity", 1: "accounting", 2: "strict load", 3: "values conserved", 4: "round trip",
                              5: "forward parity", 6: "first diverging module"}  # fmt: skip


class Rung(Struct, frozen=True):
    """One rung: climbed, failed, or not climbed with the reason."""

    level: int
    status: str  #: ``passed``, ``failed`` or ``skipped``
    sentence: str
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()  #: what the sentence does not vouch for

    @property
    def name(self) -> str:
        return LEVELS[self.level]

    def to_json(self) -> dict[str, Any]:
        return {
            "level": self.level, "name": self.name, "status": self.status, "sentence": self.sentence,
            "problems": [problem.to_json() for problem in self.problems], "notes": list(self.notes),
        }  # fmt: skip


class Ladder(Struct, frozen=True):
    """The climb: every rung that was tried, lowest first."""

    rungs: tuple[Rung, ...] = ()
    parity: ParityReport | None = None  #: what running the models showed, where they were run

    @property
    def failed(self) -> Rung | None:
        return next((rung for rung in self.rungs if rung.status == "failed"), None)

    @property
    def problems(self) -> list[Problem]:
        """Those of every rung that failed: L6 says where it is that L5 found a difference."""
        failed = [rung for rung in self.rungs if rung.status == "failed"]
        return [problem for rung in failed for problem in rung.problems or (Problem("CK407", f"L{rung.level}: {rung.sentence}"),)]

    @property
    def reached(self) -> str:
        """The passed rungs, as they are recorded in outputs: ``L0 L1 L3``; ``none`` when nothing was proved."""
        return " ".join(f"L{rung.level}" for rung in self.rungs if rung.status == "passed") or "none"

    def to_json(self) -> dict[str, Any]:
        parity = None if self.parity is None else self.parity.to_json()
        return {"reached": self.reached, "rungs": [rung.to_json() for rung in self.rungs], "parity": parity}
