"""Problems as annotations of continuous integration: GitHub's workflow commands, and SARIF 2.1.0 for everything else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

from msgspec import Struct

from ckptconv._version import __version__
from ckptconv.errors import CODES, Problem

FORMATS = ("text", "github", "sarif")
_PLACE = re.compile(r"(?P<file>.+?\.(?:ya?ml|json|pth?|bin|ckpt|safetensors))(?::(?P<line>[0-9]+)(?::(?P<column>[0-9]+))?)?(?:\s|$)")


class Place(Struct, frozen=True):
    """Where a problem is; a line of 0 is the whole file."""

    file: str
    line: int = 0
    column: int = 0


def place_of(problem: Problem, file: str) -> Place:
    """The file, line and column that ``problem.where`` begins with; ``file`` where it names none.

    >>> place_of(Problem("CK201", "nothing matched", where="rules/a.yaml:14:9  drop (step 3)"), "rules/a.yaml")
    Place(file='rules/a.yaml', line=14, column=9)
    """
    found = _PLACE.match(problem.where)
    if found is None:
        return Place(file)
    return Place(found["file"], int(found["line"] or 0), int(found["column"] or 0))


def _message(problem: Problem) -> str:
    parts = [problem.what, f"found: {problem.found}" if problem.found else "", f"try: {problem.try_}" if problem.try_ else ""]
    return "\n".join(part for part in parts if part)


def github(found: Iterable[tuple[str, Sequence[Problem]]]) -> str:
    """One ``::error`` line per problem. Text is escaped as the runner wants it, so that no name of a file can become a command.

    >>> github([("a.yaml", [Problem("CK201", "100% wrong", where="a.yaml:3:5  drop (step 1)")])])
    '::error file=a.yaml,line=3,col=5,title=CK201::100%25 wrong'
    """
    lines = []
    for file, problems in found:
        for problem in problems:
            place = place_of(problem, file)
            where = [f"file={_property(place.file)}"]
            where += [f"line={place.line}"] if place.line else []
            where += [f"col={place.column}"] if place.column else []
            lines.append(f"::error {','.join([*where, f'title={_property(problem.code)}'])}::{_data(_message(problem))}")
    return "\n".join(lines)


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def sarif(found: Iterable[tuple[str, Sequence[Problem]]]) -> dict[str, Any]:
    """A SARIF 2.1.0 log: every problem a result, every code a rule with its sentence."""
    results = [(place_of(problem, file), problem) for file, problems in found for problem in problems]
    codes = sorted({problem.code for _, problem in results})
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": {"driver": {
                "name": "ckptconv", "version": __version__,
                "rules": [{"id": code, "shortDescription": {"text": CODES.get(code, code)}} for code in codes],
            }},
            "columnKind": "unicodeCodePoints",
            "results": [_result(place, problem, codes.index(problem.code)) for place, problem in results],
        }],
    }  # fmt: skip


def _uri(file: str) -> str:
    """A file as SARIF names it: a reference relative to the checkout, or a file: URI.

    >>> _uri("my rules/a:b.yaml"), _uri("/tmp/50%.yaml")
    ('my%20rules/a%3Ab.yaml', 'file:///tmp/50%25.yaml')
    """
    path = quote(file.replace("\\", "/").encode("utf-8", "surrogatepass"))
    return f"file://{path}" if path.startswith("/") else path


def _result(place: Place, problem: Problem, index: int) -> dict[str, Any]:
    location: dict[str, Any] = {"artifactLocation": {"uri": _uri(place.file)}}
    if place.line:
        location["region"] = {"startLine": place.line, **({"startColumn": place.column} if place.column else {})}
    return {
        "ruleId": problem.code, "ruleIndex": index, "level": "error", "message": {"text": _message(problem)},
        "locations": [{"physicalLocation": location}],
    }  # fmt: skip
