"""Prints one make rule for every checkpoint under a folder: its output depends on it and on the rule file.

File names may hold anything but a line break; make and the shell each get them quoted in their own way.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from ckptconv.errors import CkptconvError
from ckptconv.layout import FORMAT_OF_SUFFIX
from ckptconv.ruleset.builtin import find, folder

SUFFIX = {"torch": ".pth", "safetensors": ".safetensors"}


def for_make(path: Path) -> str:
    return re.sub(r"([\s#:%\\])", r"\\\1", str(path).replace("$", "$$"))


def for_shell(text: object) -> str:
    return shlex.quote(str(text)).replace("$", "$$")


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("rules")
    parser.add_argument("--command", required=True)
    parser.add_argument("--format", choices=sorted(SUFFIX))
    parser.add_argument("--arguments", default="", help="more options for every run, quoted as in a shell")
    given = parser.parse_args()
    try:
        rules = find(given.rules)
    except CkptconvError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    rule_path = folder() / rules.file.removeprefix("rules/") if rules.builtin else Path(given.rules)
    options = [*(["--format", given.format] if given.format else []), *shlex.split(given.arguments)]
    targets = []
    failed = for_shell(given.destination / ".failed")
    body = []
    for path, files in checkpoints(given.source):
        output = given.destination / path.relative_to(given.source)
        if given.format and path.is_file():
            output = output.with_suffix(SUFFIX[given.format])
        targets.append(output)
        command = " ".join(map(for_shell, [given.command, "run", given.rules, path, output, "--force", "--quiet", *options]))
        body.append(f"{for_make(output)}: {' '.join(map(for_make, [*files, rule_path]))}")
        body.append(f"\t@mkdir -p {for_shell(output.parent)}")
        body.append(f"\t@{command} && echo {for_shell(f'{path} -> {output}')} || {{ echo {for_shell(path)} >> {failed}; exit 1; }}")
    clashes = {output for output in targets if targets.count(output) > 1}
    if clashes:
        print(f"two checkpoints would be written to {min(clashes)}", file=sys.stderr)
        return 2
    print(f"all: {' '.join(map(for_make, targets))}")
    print("\n".join(body))
    return 0


if __name__ == "__main__":
    sys.exit(main())
