"""Prints a makefile that converts every checkpoint under a folder whose output is not there yet, or older than what it is made of.

Make brings the parallel jobs and goes on past failures. It never sees a file's name outside of a recipe: names with `;`, `=`, `%` or `*`
in them mean something in its own language, so its targets are numbers.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from ckptconv.errors import CkptconvError, printable
from ckptconv.layout import FORMAT_OF_SUFFIX
from ckptconv.ruleset.builtin import find, folder

LINE = ("printf", "%s\\n")
SUFFIX = {"torch": ".pth", "safetensors": ".safetensors"}


def for_recipe(words: Iterable[object]) -> str:
    """A shell command as a line of a recipe."""
    return shlex.join(map(str, words)).replace("$", "$$")


def checkpoints(source: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Every checkpoint with the files that it is made of: a folder with an index is one, and so is each other file."""
    for path in sorted(source.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if any(path.glob("*.index.json")):
                yield path, sorted(child for child in path.iterdir() if child.is_file())
            else:
                yield from checkpoints(path)
        elif path.suffix in FORMAT_OF_SUFFIX:
            yield path, [path]


def is_current(output: Path, made_of: Iterable[Path]) -> bool:
    """Whether an output is there and no older than any of the files that it is made of. What cannot be looked at is for the run to say."""
    try:
        made = output.stat().st_mtime_ns
        return all(path.stat().st_mtime_ns <= made for path in made_of)
    except OSError:
        return False


def refused(source: Path, destination: Path, output_of: Iterable[tuple[Path, Path]]) -> str:
    """Why nothing can be converted at all; empty where it can."""
    seen = set[Path]()
    for path, output in output_of:
        if output in seen:
            return f"two checkpoints would be written to {printable(output)}"
        seen.add(output)
        if "\n" in str(path) or "\r" in str(path):
            return f"a line break in a file's name: {printable(path)}"
    inner, outer = (Path(os.path.realpath(path)) for path in (destination, source))
    return f"OUT ({printable(destination)}) lies in IN ({printable(source)})" if outer in (inner, *inner.parents) else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("rules")
    parser.add_argument("--command", required=True)
    parser.add_argument(
        "--failed", type=Path, required=True, metavar="FILE", help="gets a line for every checkpoint that was not converted"
    )
    parser.add_argument("--format", choices=sorted(SUFFIX))
    parser.add_argument("--arguments", default="", help="more options for every run, quoted as in a shell")
    given = parser.parse_args()
    try:
        rules = find(given.rules)
        found = [(path, files, given.destination / path.relative_to(given.source)) for path, files in checkpoints(given.source)]
    except (CkptconvError, OSError) as error:
        print(error, file=sys.stderr)
        return error.exit_code if isinstance(error, CkptconvError) else 2
    if given.format:
        found = [(path, files, output.with_suffix(SUFFIX[given.format]) if path.is_file() else output) for path, files, output in found]
    reason = refused(given.source, given.destination, [(path, output) for path, _, output in found])
    if reason:
        print(reason, file=sys.stderr)
        return 2
    rule_path = folder() / rules.file.removeprefix("rules/") if rules.builtin else Path(given.rules)
    options = [*(["--format", given.format] if given.format else []), *shlex.split(given.arguments)]
    body: list[str] = []
    jobs = 0
    for path, files, output in found:
        if is_current(output, [*files, rule_path]):
            continue
        jobs += 1
        folder_there = for_recipe(["mkdir", "-p", output.parent])
        converted = for_recipe([given.command, "run", given.rules, path, output, "--force", "--quiet", *options])
        told, failed = for_recipe([*LINE, f"{path} -> {output}"]), for_recipe([*LINE, path])
        body += [f"{jobs}:", f"\t@{folder_there} && {converted} && {told} || {{ {failed} >> {for_recipe([given.failed])}; exit 1; }}"]
    numbers = " ".join(map(str, range(1, jobs + 1)))
    print(f".PHONY: all {numbers}\nall: {numbers}\n\t@:")
    print("\n".join(body))
    return 0


if __name__ == "__main__":
    sys.exit(main())
