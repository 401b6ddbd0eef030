"""The issue's *Load*: hundreds of conversions in one process, and a folder of checkpoints of which some are bad."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from faulty import ROOT, everything

import ckptconv
from ckptconv.errors import printable


def in_use():
    """Open descriptors, threads, and bytes of memory in use."""
    with open("/proc/self/statm") as stream:
        resident = int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(os.listdir("/proc/self/fd")), threading.active_count(), resident


COMPUTED = """version: 1
name: computed
summary: s
steps:
  - strip_prefix: module.
  - cast: {keys: 'a', dtype: bfloat16}
"""


def test_five_hundred_conversions_in_one_process(place):
    """Files and folders, copied and computed, good and bad ones: nothing is left open, and memory does not grow."""
    rules = place / "computed.yaml"
    rules.write_text(COMPUTED)
    (place / "bad.pth").write_bytes((place / "in.pth").read_bytes()[:300])

    def convert(times):
        for at in range(times):
            source, out = [
                ("in.pth", "out.pth"),
                ("in", "out"),
                ("in.pth", "out.safetensors"),
                ("bad.pth", "bad-out.pth"),
                ("in.pth", "computed.pth"),
            ][at % 5]
            try:
                ckptconv.run(rules if out == "computed.pth" else "dataparallel", place / source, place / out, force=True, sync=False)
            except ckptconv.InputError:
                assert source == "bad.pth"

    convert(100)
    files, threads, memory = in_use()
    convert(500)
    files_after, threads_after, memory_after = in_use()
    assert (files_after, threads_after) == (files, threads)
    assert memory_after - memory < 8 << 20, f"{(memory_after - memory) / 500:,.0f} bytes per conversion"


def make_convert(zoo, out, *options):
    """`make convert -j2`, with the Python that runs these tests in the place of the Makefile's own environment."""
    tools = out.parent / "venv"
    (tools / "bin").mkdir(parents=True, exist_ok=True)
    for name, line in (("python", f'exec {sys.executable} "$@"'), ("ckptconv", f'exec {sys.executable} -m ckptconv "$@"')):
        (tools / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / "bin" / name).chmod(0o755)
    (tools / ".ready").touch()
    command = [
        "make",
        "--no-print-directory",
        "-j2",
        "convert",
        f"IN={zoo}",
        f"OUT={out}",
        "RULES=dataparallel",
        f"VENV={tools}",
        "ARGS=--no-sync",
        *options,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


#: Names that mean something to make, to the shell, or to an option parser.
NAMES = ["a=b", "a;touch pwned;b", "a:b", "a%b", "a#b", "$(shell touch pwned)", "`touch pwned`", "it's", 'say "no"', "a\\nb", "*", "a|b", "~", "-q", " a ", "a&b", "ü", "a\n1:\n\t@touch pwned\nb"]  # fmt: skip


def test_a_folder_of_checkpoints_of_which_some_are_bad(tmp_path):
    """200 of which 10 are bad: the good ones are converted, the bad ones named, and the code is not zero.

    What is run is what the names say, and nothing that stands in them.
    """
    total, every = 200, 20
    zoo, out = tmp_path / "zoo", tmp_path / "out"
    bad, value_of = [], {}
    for at, name in enumerate([*NAMES, *(f"{at:03}" for at in range(total - len(NAMES)))]):
        path = zoo / f"part {at % 3}" / f"{name}.pth"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"module.a": torch.full((4,), float(at))}, tmp_path / "x.pth")
        (tmp_path / "x.pth").rename(path)
        if at % every == every // 2:
            bad.append(str(path))
            path.write_bytes(path.read_bytes()[: 40 * (1 + at // every)])
        else:
            value_of[str(path.relative_to(zoo))] = float(at)
    before, around = everything(zoo), set(ROOT.iterdir())
    done = make_convert(zoo, out)
    assert done.returncode != 0
    named = [line.removeprefix("not converted: ") for line in done.stderr.splitlines() if line.startswith("not converted: ")]
    assert named == sorted(map(printable, bad)), done.stdout + done.stderr
    assert done.stderr.count("\nerror: ") == len(bad), "each with its sentences"
    *told, summary = done.stdout.splitlines()
    assert sorted(told) == sorted(f"{printable(zoo / path, 1000)} -> {printable(out / path, 1000)}" for path in value_of)
    assert summary.startswith("dataparallel@1: 190 converted, 0 unchanged, 10 not converted, ")
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {*value_of, "ckptconv.lock.json"}
    assert {path: torch.load(out / path)["a"].tolist() for path in value_of} == {path: [value] * 4 for path, value in value_of.items()}
    assert everything(zoo) == before
    assert set(ROOT.iterdir()) == around
    for path in bad:
        os.unlink(path)
    again = make_convert(zoo, out)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith("dataparallel@1: 0 converted, 190 unchanged, "), "what is done is not done again"


@pytest.mark.parametrize(
    ("names", "out", "message"),
    [
        (["a.pth"], "zoo/out", "  the outputs' folder lies in {at}/zoo, where the sources are looked for"),
        (["a.pth"], "zoo", "  the outputs' folder lies in {at}/zoo, where the sources are looked for"),
        (["a.pth", "a.pt"], "out", "  two checkpoints would be written to {at}/out/a.safetensors"),
    ],
    ids=["out-in-in", "out-is-in", "clash"],
)
def test_what_make_convert_refuses(tmp_path, names, out, message):
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    for name in names:
        torch.save({"module.a": torch.ones(1)}, zoo / name)
    done = make_convert(zoo, tmp_path / out, "FORMAT=safetensors")
    assert done.returncode != 0
    assert message.replace("{at}", str(tmp_path)) in done.stderr.splitlines()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and "venv" not in path.parts] == [
        path.name for path in zoo.iterdir() if path.is_file()
    ]
