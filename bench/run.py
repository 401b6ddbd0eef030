"""Timings in pairs: ckptconv against `cp` and against the script that people write, each contender in a process of its own.

Prints medians, the ratio to `cp` of the same round, and the peak memory of the process. `--gigabytes` sets the size; the files are made
anew and removed again.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT_TORCH = """
import sys, torch
state = torch.load(sys.argv[1], weights_only=True)
torch.save({name.removeprefix("module."): value for name, value in state.items()}, sys.argv[2])
"""
SCRIPT_SAFETENSORS = """
import sys
from safetensors.torch import load_file, save_file
state = load_file(sys.argv[1])
save_file({name.removeprefix("module."): value for name, value in state.items()}, sys.argv[2])
"""


MAKE = """
import sys, torch
from safetensors.torch import save_file
folder, rows, tensors = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
state = {f"module.layers.{at}.weight": torch.randn(rows, 2048).to(torch.bfloat16) for at in range(tensors)}
torch.save(state, f"{folder}/in.pth")
save_file(state, f"{folder}/in.safetensors")
"""


def make(folder: Path, gigabytes: float, tensors: int = 300) -> tuple[Path, Path]:
    """A language model's worth of bf16 tensors, as .pth and as .safetensors.

    In a process of its own: a child's peak memory is counted from before it became another program, so this one must stay small.
    """
    rows = int(gigabytes * 2**30 / 2 / tensors / 2048)
    subprocess.run([sys.executable, "-c", MAKE, folder, str(rows), str(tensors)], check=True)
    return folder / "in.pth", folder / "in.safetensors"


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds, and the peak resident memory of the process in bytes."""
    os.sync()  # what the one before has written must not be paid for by this one
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder where nothing is said")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        pth, safetensors = make(folder, given.gigabytes)
        out = folder / "out"
        run = [sys.executable, "-m", "ckptconv", "run", "dataparallel"]
        quick = ["--force", "--quiet", "--no-sync", "--verify", "none"]
        contenders = {
            "cp": ["cp", str(pth), f"{out}.cp"],
            "ckptconv .pth → .pth": [*run, str(pth), f"{out}.pth", *quick],
            "ckptconv .pth → .pth, verified L3": [*run, str(pth), f"{out}.pth", "--force", "--quiet", "--no-sync"],
            "ckptconv .pth → safetensors": [*run, str(pth), f"{out}.safetensors", *quick],
            "ckptconv safetensors → safetensors": [*run, str(safetensors), f"{out}.safetensors", *quick],
            "ckptconv safetensors → .pth": [*run, str(safetensors), f"{out}.pth", *quick],
            "script .pth → .pth": [sys.executable, "-c", SCRIPT_TORCH, str(pth), f"{out}.script.pth"],
            "script safetensors → safetensors": [sys.executable, "-c", SCRIPT_SAFETENSORS, str(safetensors), f"{out}.script.safetensors"],
        }
        rounds: dict[str, list[tuple[float, int]]] = {name: [] for name in contenders}
        for at in range(given.rounds + 1):
            for label, command in contenders.items():
                found = timed(command)
                if at:  # the first round warms the cache
                    rounds[label].append(found)
    print(
        f"{given.gigabytes} GiB, {given.rounds} rounds, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n"
    )
    print("| contender | seconds | × cp | peak memory |\n|---|---|---|---|")
    for label, found in rounds.items():
        ratio = statistics.median(mine[0] / cp[0] for mine, cp in zip(found, rounds["cp"], strict=True))
        peak = max(memory for _, memory in found) / 2**20
        print(f"| {label} | {statistics.median(seconds for seconds, _ in found):.2f} | {ratio:.2f} | {peak:.0f} MiB |")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
