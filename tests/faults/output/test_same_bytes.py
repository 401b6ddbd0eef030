"""Row 134: the output depends on nothing but the source and the rules."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from faulty import LONG, contents

PLACES = itertools.cycle([
    {"TZ": "UTC", "LC_ALL": "C"}, {"TZ": "Asia/Kathmandu", "LC_ALL": "C.UTF-8"}, {"TZ": "America/St_Johns", "LC_ALL": "POSIX", "PYTHONUTF8": "0"},
])  # fmt: skip


@pytest.mark.parametrize("argv", [["in.pth", "out.pth"], ["in", "out.safetensors"], ["in", "out"]], ids=["torch", "safetensors", "folder"])
def test_places_threads_and_a_clock_that_jumps(place, commands, argv):
    first = None
    for at, threads, clock in itertools.product(range(2), (1, 8), ("0", "400000000")):
        env = {**next(PLACES), "FAULT_CLOCK": clock}
        more = ["--shard-size", "20kB"] if argv[1] == "out" else []
        done = commands.run(
            "run", "dataparallel", *argv, *more, "--force", "--threads", threads, "--no-sync", cwd=place, env=env, umask=0o077 * at
        )
        assert (done.code, done.err) == (0, "")
        first = first or contents(place / argv[1])
        assert contents(place / argv[1]) == first


COMPUTED = """version: 1
name: computed
summary: s
steps:
  - strip_prefix: module.
  - cast: {keys: '**', dtype: bfloat16}
"""


def test_hash_seeds(place):
    """Ten seeds, each in an interpreter of its own; two of them compute, which takes torch a while."""
    torch.manual_seed(0)
    torch.save({f"module.l.{at}.w": torch.randn(30, 7) for at in range(40)}, place / "many.pth")
    (place / "computed.yaml").write_text(COMPUTED)
    found = {"dataparallel": set(), "computed.yaml": set()}
    for seed in range(10):
        rules = "computed.yaml" if seed in (0, 9) or LONG else "dataparallel"
        for rule in {rules, "dataparallel"} if LONG else {rules}:
            environment = {**os.environ, **next(PLACES), "PYTHONHASHSEED": str(seed)}
            words = ["run", rule, "many.pth", "out.pth", "--force", "--quiet", "--no-sync", "--threads", str(1 + 7 * (seed % 2))]
            subprocess.run([sys.executable, "-m", "ckptconv", *words], cwd=place, env=environment, check=True)
            found[rule].add((place / "out.pth").read_bytes())
    assert [len(each) for each in found.values()] == [1, 1]
