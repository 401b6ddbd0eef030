"""Whole processes in pairs: every round runs each contender once, one after the other, so that a slow minute is slow for all of them.

In another order every round: what ran before decides which memory the next one gets, and a fixed order would give somebody the best of it always.
"""

from __future__ import annotations

import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """One process: seconds on the clock, seconds of all cores, and its peak resident memory."""

    seconds: float
    cpu_seconds: float
    peak_nbytes: int


class Rounds:
    """What all contenders took, round by round. The first round warms the cache and is not counted."""

    def __init__(self, contenders: Mapping[str, Sequence[str]], rounds: int, environment: Mapping[str, str], folder: Path) -> None:
        self.found: dict[str, list[Measured]] = {name: [] for name in contenders}
        before = _below(folder)
        dice = random.Random(0)
        for at in range(rounds + 1):
            for name, command in dice.sample(list(contenders.items()), len(contenders)):
                measured = timed(command, environment)
                # Every contender makes its output anew: replacing an old one costs differently by how it is done.
                _remove(_below(folder) - before)
                if at:
                    self.found[name].append(measured)
            print(f"  round {at} of {rounds}" if at else "  warm", file=sys.stderr, flush=True)

    def seconds(self, name: str) -> float:
        return statistics.median(each.seconds for each in self.found[name])

    def cpu_seconds(self, name: str) -> float:
        return statistics.median(each.cpu_seconds for each in self.found[name])

    def peak_nbytes(self, name: str) -> int:
        return max(each.peak_nbytes for each in self.found[name])

    def ratio(self, name: str, base: str) -> float:
        """The median of the ratios within a round."""
        return statistics.median(mine.seconds / its.seconds for mine, its in zip(self.found[name], self.found[base], strict=True))


def _below(folder: Path) -> set[Path]:
    """Everything in the folder but compiled modules."""
    return {path for path in folder.rglob("*") if path.relative_to(folder).parts[0] != "pycache"}


def _remove(paths: set[Path]) -> None:
    for path in sorted(paths, reverse=True):  # what is in a folder before the folder
        path.rmdir() if path.is_dir() else path.unlink()


def timed(command: Sequence[str], environment: Mapping[str, str]) -> Measured:
    """Runs a command with nothing to say."""
    os.sync()  # what the one before has written must not be paid for by this one
    started = time.perf_counter()
    process = subprocess.Popen(command, env=dict(environment), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}")
    return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def environment(folder: Path) -> dict[str, str]:
    """Compiled modules are kept, as an installed package has them, whatever this shell says; no network, no colours."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPROFILEIMPORTTIME")}
    return {
        **kept,
        "PYTHONPYCACHEPREFIX": str(folder / "pycache"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
    }
