"""Converts reference conversions through the command line and compares the results: `python scripts/cases.py FOLDER [NAME …]`.

Every folder in FOLDER holds source files, `expected.safetensors` (made by somebody else's code) and `result.json` (which files are the
source, and how far the reference's own outputs differ). Exit 1 when a case is not converted, or not equal.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

TABLE = Path(__file__).with_name("cases.yaml")


@dataclass(frozen=True)
class Outcome:
    """What came of one case."""

    name: str
    rules: str
    keys: int
    verdict: str
    proved: str
    seconds: float
    right: bool


def converted(name: str, case: dict[str, Any], folder: Path, work: Path) -> Outcome:
    """One case: its source files alone, converted, compared with what was expected."""
    started = time.monotonic()
    expected = load_file(folder / "expected.safetensors")
    evidence = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    source = work / name
    for file in [*evidence["source_files"], "config.json"]:
        if (folder / file).is_file():
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes((folder / file).read_bytes())
    wanted = case.get("source") or next(iter(evidence["source_files"]))
    arguments = [str(word).replace("{source}", str(source)) for word in case.get("arguments", ())]
    output = work / f"{name}.safetensors"
    command = [
        sys.executable,
        "-m",
        "ckptconv",
        "run",
        case["rules"],
        str(source / wanted),
        str(output),
        "--json",
        "--verify",
        "4",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode:
        return Outcome(
            name, case["rules"], len(expected), f"exit {done.returncode}: {(done.stderr or done.stdout).strip()[:300]}", "", seconds, False
        )
    proved = json.loads(done.stdout)["verification"]["reached"]
    verdict, right = compared(load_file(output), expected, exact=case.get("exact", True), allowed=evidence.get("max_abs_diff") or 0.0)
    return Outcome(name, case["rules"], len(expected), verdict, proved, seconds, right)


def compared(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, exact: bool, allowed: float) -> tuple[str, bool]:
    """A verdict in words, and whether it is good enough."""
    if set(found) != set(expected):
        return f"other names: {sorted(set(found) ^ set(expected))[:4]}", False
    different = [name for name, tensor in expected.items() if found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor)]
    if not different:
        return "bit-equal", True
    if any(found[name].dtype != expected[name].dtype or found[name].shape != expected[name].shape for name in different):
        return f"other dtype or shape: {different[0]}", False
    most = max(float((found[name].double() - expected[name].double()).abs().max()) for name in different)
    limit = max(allowed, 1e-6)
    return f"{len(different)} differ, at most {most:.1e}", not exact and most <= limit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    there = sorted(path.parent.name for path in given.folder.glob("*/expected.safetensors"))
    names = given.names or there
    unknown = [name for name in names if name not in table or name not in there]
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(given.jobs) as pool:
        outcomes = list(
            pool.map(lambda name: converted(name, table[name], given.folder / name, Path(work)), [n for n in names if n not in unknown])
        )
    for each in outcomes:
        print(
            f"{each.name:<27} {each.rules:<34} {each.keys:>4}  {'ok  ' if each.right else 'FAIL'}  {each.verdict:<28} {each.proved:<12} {each.seconds:5.1f} s"
        )
    for name in unknown:
        print(f"{name:<27} no rule, or no such case")
    right = sum(each.right for each in outcomes)
    print(f"{right} of {len(names)} right, {sum(each.verdict == 'bit-equal' for each in outcomes)} of them bit-equal")
    return 0 if right == len(names) and names else 1


if __name__ == "__main__":
    sys.exit(main())
