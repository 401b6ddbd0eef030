"""The table: what each contender took, what it must reach, and whether it did. Sections are replaced one by one in RESULTS.md."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from timing import Rounds

HEAD = """# What `make bench` measured

Every contender is a process of its own; all run one after the other in each round, with a warm cache, and the ratios are medians of the
ratios within a round. Times are for this one kind of machine, ratios travel. Peak memory is the largest resident set of the process.
"""


@dataclass(frozen=True)
class Must:
    """A demand: ``contender`` takes at most ``limit`` × ``base`` (seconds where there is no base), or is that much faster (``faster``)."""

    contender: str
    limit: float
    base: str = ""
    faster: bool = False
    peak_mib: float | None = None


def table(rounds: Rounds, base: str, musts: Sequence[Must]) -> str:
    """One row per contender, with its demands."""
    lines = [f"| contender | seconds | × {base or 'first'} | CPU s | peak MiB | must | reached |", "|---|---|---|---|---|---|---|"]
    for name in rounds.found:
        wanted = [_verdict(rounds, must) for must in musts if must.contender == name]
        ratio = f"{rounds.ratio(name, base):.2f}" if base else ""
        row = [
            name, f"{rounds.seconds(name):.2f}", ratio, f"{rounds.cpu_seconds(name):.2f}", f"{rounds.peak_nbytes(name) / 2**20:.0f}",
            "; ".join(text for text, _, _ in wanted), "; ".join(f"{found} {'✓' if held else '✗'}" for _, found, held in wanted),
        ]  # fmt: skip
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _verdict(rounds: Rounds, must: Must) -> tuple[str, str, bool]:
    """What is wanted, what was found, and whether that is it."""
    if must.peak_mib is not None:
        peak = rounds.peak_nbytes(must.contender) / 2**20
        return f"≤ {must.peak_mib:.0f} MiB", f"{peak:.0f} MiB", peak <= must.peak_mib
    if not must.base:
        seconds = rounds.seconds(must.contender)
        return f"≤ {must.limit:g} s", f"{seconds:.2f} s", seconds <= must.limit
    ratio = rounds.ratio(must.contender, must.base)
    if must.faster:
        return f"≥ {must.limit:g} × faster than {must.base}", f"{1 / ratio:.1f} ×", 1 / ratio >= must.limit
    return f"≤ {must.limit:g} × {must.base}", f"{ratio:.2f} ×", ratio <= must.limit


def machine(folder: Path) -> str:
    """The machine's kind: nothing that names it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    kernel = re.match(r"[0-9]+\.[0-9]+", platform.release())
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, {_filesystem(folder)}, "
        f"{platform.system()} {kernel[0] if kernel else ''}, Python {platform.python_version()}"
    )


def _filesystem(folder: Path) -> str:
    mounts = Path("/proc/mounts")
    if not mounts.is_file():
        return "an unknown filesystem"
    found = {line.split()[1]: line.split()[2] for line in mounts.read_text().splitlines()}
    return next((found[str(each)] for each in (folder.resolve(), *folder.resolve().parents) if str(each) in found), "an unknown filesystem")


def write_section(path: Path, title: str, text: str) -> None:
    """Puts a section into the file, in place of the one of the same title."""
    have = path.read_text(encoding="utf-8") if path.is_file() else HEAD
    head, *sections = re.split(r"^## ", have, flags=re.MULTILINE)
    by_title = {section.split("\n", 1)[0]: section for section in sections}
    by_title[title] = f"{title}\n\n{text.rstrip()}\n\n"
    path.write_text(head.rstrip() + "\n\n" + "".join(f"## {section}" for section in by_title.values()).rstrip() + "\n", encoding="utf-8")
