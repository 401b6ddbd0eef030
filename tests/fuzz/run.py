"""Coverage-guided fuzzing with atheris: ``python tests/fuzz/run.py --seconds 600 [TARGET…]``, all targets one after the other by default.

Each target runs in a process of its own, so that a crash, a hang or too much memory is found like an exception. What is found is left in
``build/fuzz/TARGET/``; a small copy of it belongs into ``tests/faults/regressions/TARGET/``, where the test suite runs it again and again.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parent.parent / "build" / "fuzz"
MAX_LENGTH = {"rules": 4000, "zip": 4000, "legacy": 4000}
RSS_MB, HANG_SECONDS = 1500, 60  # seconds by the clock: a busy machine is no hang


def _guided(name: str, arguments: list[str]) -> None:
    """Inside the child: instruments the package, then never comes back."""
    import atheris

    with atheris.instrument_imports(include=["ckptconv"]):
        sys.path.insert(0, str(HERE))
        import targets
    atheris.Setup([sys.argv[0], *arguments], targets.TARGETS[name])
    atheris.Fuzz()


def _prepared(name: str, inputs: list[bytes], words: list[bytes]) -> list[str]:
    corpus = BUILD / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for at, data in enumerate(inputs):
        (corpus / f"seed-{at}").write_bytes(data)
    known = HERE.parent / "faults" / "regressions" / name
    dictionary = BUILD / name / "words"
    dictionary.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in words))
    return [str(corpus), *([str(known)] if known.is_dir() else []), f"-dict={dictionary}", f"-artifact_prefix={BUILD / name}/found-",
            f"-max_len={MAX_LENGTH.get(name, 2000)}", f"-rss_limit_mb={RSS_MB}", f"-timeout={HANG_SECONDS}", "-print_final_stats=1"]  # fmt: skip


def main() -> int:
    """Exit code 1 where a target found something."""
    if sys.argv[1:2] == ["--inside"]:
        _guided(sys.argv[2], sys.argv[3:])
    sys.path.insert(0, str(HERE))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=float, default=600, help="in all, shared by the targets")
    parser.add_argument("--seed", type=int, default=0, help="the same inputs every time, as far as the time reaches; 0: others")
    known = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed (it has no wheel for this Python or system): nothing is fuzzed; the test suite still tries mutants")
        return 0
    from seeds import WORDS, seeds

    corpus = seeds()
    names = known.targets or list(corpus)
    found = []
    for name in names:
        words = WORDS.get("pickle" if name in ("legacy", "zipped-pickle") else name, [])
        arguments = _prepared(name, corpus[name], words)
        seconds = max(1, int(known.seconds / len(names)))
        command = [sys.executable, str(Path(__file__)), "--inside", name, *arguments, f"-max_total_time={seconds}", f"-seed={known.seed}"]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
        lines = done.stderr.splitlines()
        runs = next((line.split()[-1] for line in lines if "number_of_executed_units" in line), "?")
        print(
            f"{name}: {runs} inputs in {seconds} s, {'nothing found' if done.returncode == 0 else f'exit code {done.returncode}'}",
            flush=True,
        )
        if done.returncode:
            found.append(name)
            print("\n".join(lines[-60:]), file=sys.stderr, flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
