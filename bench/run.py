"""Timings in pairs: ckptconv against `cp`, against the script that people write, and against transformers.

    python bench/run.py [--only copy|computed|startup|plan|verify] [--gigabytes 2] [--rounds 5] [--folder TMP] [--no-write]

Checkpoints are made anew in a temporary folder and removed again. Each part replaces its section of bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from checkpoints import make
from results import Must, machine, table, write_section
from timing import Rounds, environment

import scripts

PYTHON = sys.executable
CKPTCONV = [str(Path(PYTHON).with_name("ckptconv"))]  # as people start it
QUICK = ["--force", "--quiet", "--no-sync", "--verify", "none"]
RESULTS = Path(__file__).parent / "RESULTS.md"


class Bench:
    """One call: where the checkpoints go, how large they are, and how often each contender runs."""

    def __init__(self, folder: Path, gigabytes: float, rounds: int, write: bool) -> None:
        self.folder, self.gigabytes, self.rounds, self.write = folder, gigabytes, rounds, write
        self._sections: dict[str, list[str]] = {}

    def measure(self, title: str, what: str, contenders: Mapping[str, Sequence[str]], base: str, musts: Sequence[Must]) -> None:
        """Runs the contenders, prints their table and adds it to the section ``title``."""
        print(f"{title}: {what}", file=sys.stderr)
        found = Rounds(contenders, self.rounds, environment(self.folder), self.folder)
        text = f"{what[:1].upper()}{what[1:]}; {self.rounds} rounds on {machine(self.folder)}.\n\n{table(found, base, musts)}"
        print(text, flush=True)
        self._sections.setdefault(title, []).append(text)
        if self.write:
            write_section(RESULTS, title, "\n".join(self._sections[title]))

    def run(self, rules: str, source: Path, out: str, *options: str) -> list[str]:
        return [*CKPTCONV, "run", rules, str(source), str(self.folder / out), *options]

    def made(self, kind: str, *names: str, gigabytes: float | None = None) -> list[Path]:
        make(kind, self.folder, self.gigabytes if gigabytes is None else gigabytes)
        return [self.folder / name for name in names]

    def clear(self) -> None:
        """Removes everything but the compiled modules."""
        import shutil

        for path in self.folder.iterdir():
            if path.name != "pycache":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def written(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path


def copy(bench: Bench) -> None:
    """Names change, bytes do not."""
    size = f"{bench.gigabytes:g} GiB, 300 tensors in bf16"
    for kind, name in (("torch", "in.pth"), ("safetensors", "in.safetensors")):
        (source,) = bench.made(kind, name)
        out = str(bench.folder / "out")
        other = "safetensors" if kind == "torch" else "torch"
        suffix = {"torch": ".pth", "safetensors": ".safetensors"}
        same, cross = f"ckptconv → {suffix[kind]}", f"ckptconv → {suffix[other]}"
        reordered = bench.written("reorder.yaml", scripts.rule("reorder", "keep: ['module.lm_head.weight', 'module.model.{rest:**}']"))
        contenders = {
            "cp": ["cp", str(source), f"{out}.cp"],
            same: bench.run("dataparallel", source, f"out{suffix[kind]}", *QUICK),
            f"{same}, kept by pattern": bench.run(str(reordered), source, f"out2{suffix[kind]}", *QUICK),
            f"{same}, one thread": bench.run("dataparallel", source, f"out{suffix[kind]}", *QUICK, "--threads", "1"),
            cross: bench.run("dataparallel", source, f"out{suffix[other]}", *QUICK),
            "cp, sync": ["sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", str(source), f"{out}.cp"],
            f"{same}, durable": bench.run("dataparallel", source, f"out{suffix[kind]}", "--force", "--quiet", "--verify", "none"),
            f"script → {suffix[kind]}": [PYTHON, "-c", scripts.RENAMES[kind, kind], str(source), f"{out}.script{suffix[kind]}"],
            f"script → {suffix[other]}": [PYTHON, "-c", scripts.RENAMES[kind, other], str(source), f"{out}.script{suffix[other]}"],
        }
        musts = [
            Must(same, 1.15, "cp"), Must(same, 0, peak_mib=60), Must(f"{same}, kept by pattern", 1.15, "cp"),
            Must(cross, 1.3 if kind == "torch" else 1.5, "cp"), Must(cross, 3, f"script → {suffix[other]}", faster=True),
            Must(f"{same}, durable", 0.9, "cp, sync"),
        ]  # fmt: skip
        if kind == "torch":
            musts.append(Must(same, 6, f"script → {suffix[kind]}", faster=True))
        bench.measure("copy", f"one {suffix[kind]} file of {size}", contenders, "cp", musts)
        bench.clear()
    _sharded(bench, size)
    _transformers(bench, size)


def _sharded(bench: Bench, size: str) -> None:
    torch, safetensors = bench.made("sharded", "torch", "st")
    out = bench.folder
    contenders = {
        "cp -r": ["cp", "-r", str(torch), str(out / "cp")],
        "ckptconv, 5 .bin": bench.run("dataparallel", torch, "bin/", *QUICK, "--shard-size", "500MB"),
        "ckptconv, 5 .safetensors": bench.run("dataparallel", safetensors, "shards/", *QUICK, "--shard-size", "500MB"),
    }
    musts = [Must(name, 1.15, "cp -r") for name in contenders if name != "cp -r"]
    musts += [Must(name, 0, peak_mib=60) for name in contenders if name != "cp -r"]
    for name in ("bin", "shards"):
        (out / name).mkdir()
    bench.measure("copy", f"folders of shards, {size}", contenders, "cp -r", musts)
    bench.clear()


def _transformers(bench: Bench, size: str) -> None:
    (model,) = bench.made("hf", "hf")
    nothing = bench.written("nothing.yaml", scripts.rule("nothing", "rename: {'model.norm.{p}': 'model.final_norm.{p}'}"))
    (bench.folder / "out").mkdir()
    contenders = {
        "cp -r": ["cp", "-r", str(model), str(bench.folder / "cp")],
        "ckptconv": bench.run(str(nothing), model, "out/", *QUICK),
        "transformers": [PYTHON, "-c", scripts.TRANSFORMERS, str(model), str(bench.folder / "theirs")],
    }
    bench.measure("copy", f"a model's folder, {size}, against from_pretrained / save_pretrained", contenders, "cp -r", [])
    bench.clear()


def computed(bench: Bench) -> None:
    """Values or their order change."""
    size = bench.gigabytes / 2
    bench.made("wide", gigabytes=size)
    for name, (source, step, _) in scripts.COMPUTED.items():
        rules = bench.written("measured.yaml", scripts.rule("measured", step))
        path = bench.folder / f"{source}.pth"
        script, ours = f"script: {name}", f"ckptconv: {name}"
        contenders = {
            script: [PYTHON, "-c", scripts.computed_script(name), str(path), str(bench.folder / "script.pth")],
            ours: bench.run(str(rules), path, "out.pth", *QUICK),
            f"{ours}, one thread": bench.run(str(rules), path, "out.pth", *QUICK, "--threads", "1"),
        }
        bench.measure("computed", f"{name}, about {size:g} GiB", contenders, script, [Must(ours, 2, script, faster=True)])
    bench.clear()


def startup(bench: Bench) -> None:
    """Whole processes that do little."""
    pth, safetensors = bench.made("small", "small.pth", "small.safetensors")
    rules = bench.written("long.yaml", scripts.long_rule())
    contenders = {
        "python -c pass": [PYTHON, "-c", "pass"],
        "--help": [*CKPTCONV, "--help"],
        "check, 2,000 lines": [*CKPTCONV, "check", str(rules)],
        "inspect .pth, 20,000 tensors": [*CKPTCONV, "inspect", str(pth)],
        "inspect .safetensors, 20,000 tensors": [*CKPTCONV, "inspect", str(safetensors)],
        "import torch": [PYTHON, "-c", "import torch"],
    }
    musts = [
        Must("--help", 0.2), Must("check, 2,000 lines", 0.5), Must("inspect .pth, 20,000 tensors", 0.6),
        Must("inspect .safetensors, 20,000 tensors", 0.6),
    ]  # fmt: skip
    bench.measure("startup", "whole processes", contenders, "", musts)
    bench.clear()


def plan(bench: Bench) -> None:
    """Headers only."""
    small, large = bench.made("headers", "many20000.safetensors", "many500000.safetensors")
    hundred, twenty = (bench.written(f"patterns{n}.yaml", scripts.patterns_rule(f"patterns{n}", n)) for n in (100, 20))
    first, second = "20,000 tensors × 100 patterns", "500,000 tensors × 20 patterns"
    contenders = {
        first: [*CKPTCONV, "plan", str(hundred), str(small)],
        second: [*CKPTCONV, "plan", str(twenty), str(large)],
    }
    musts = [Must(first, 1.5), Must(second, 15), Must(second, 0, peak_mib=1.5e9 / 2**20)]
    bench.measure("plan", "rename patterns over names", contenders, "", musts)
    bench.clear()


def verify(bench: Bench) -> None:
    """What the proof costs on top of the run."""
    (source,) = bench.made("torch", "in.pth")
    (model,) = bench.made("hf", "hf", gigabytes=bench.gigabytes)
    levels = {"none": "none", "L1": "1", "L3": "3"}
    contenders = {
        f"run, --verify {label}": bench.run("dataparallel", source, "out.pth", "--force", "--quiet", "--no-sync", "--verify", level)
        for label, level in levels.items()
    }
    # As people run it, with an fsync before the rename.
    contenders |= {
        f"durable run, --verify {label}": bench.run("dataparallel", source, "out.pth", "--force", "--quiet", "--verify", level)
        for label, level in (("none", "none"), ("L1", "1"))
    }
    contenders["building the model"] = [PYTHON, "-c", scripts.BUILD, str(model)]
    contenders["run, --verify L2"] = bench.run(
        "dataparallel", source, "out.pth", "--force", "--quiet", "--no-sync", "--verify", "2", "--target", f"hf:{model}"
    )
    bench.measure("verify", f"a rename of {bench.gigabytes:g} GiB", contenders, "run, --verify none", [
        Must("run, --verify L1", 1.4, "run, --verify none"),
        Must("durable run, --verify L1", 1.4, "durable run, --verify none"),
    ])  # fmt: skip
    bench.clear()


PARTS: Mapping[str, Callable[[Bench], None]] = {each.__name__: each for each in (copy, computed, startup, plan, verify)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="may be given several times")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder where nothing is said")
    parser.add_argument("--no-write", action="store_true", help="leave RESULTS.md as it is")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        bench = Bench(Path(name), given.gigabytes, given.rounds, not given.no_write)
        for part in given.only or PARTS:
            PARTS[part](bench)


if __name__ == "__main__":
    main()
