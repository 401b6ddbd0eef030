"""Tests in a file of their own: ``NAME.test.yaml`` beside ``NAME.yaml``, for rules whose tests would bury them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct
from pydantic_core import ValidationError

from ckptconv.errors import Problem, UsageError, printable
from ckptconv.fields import Fields
from ckptconv.ruleset import yamlfile
from ckptconv.ruleset.model import RuleFile, RuleTest, explained

SUFFIX = ".test.yaml"


class Beside(Fields, frozen=True):
    """All that may stand in a ``NAME.test.yaml``."""

    tests: Annotated[tuple[RuleTest, ...], Meta(min_length=1)]


class PlacedTest(Struct, frozen=True):
    """A test, where it stands for a reader, and where for who rewrites it: the file and its number there."""

    test: RuleTest
    where: str
    file: Path | None
    at: int


def is_test_file(path: Path) -> bool:
    """Whether the name is that of a file of tests, and not of a rule."""
    return path.name.endswith(SUFFIX)


def rule_of(path: Path) -> Path:
    """The rule file that a ``NAME.test.yaml`` is about. Raises CK105 where there is none."""
    rule = path.with_name(path.name.removesuffix(SUFFIX) + ".yaml")
    if not rule.is_file():
        raise UsageError(
            Problem("CK105", f"tests without their rule: there is no {printable(rule.name)} beside them", where=printable(path))
        )
    return rule


def tests_of(rules: RuleFile) -> list[PlacedTest]:
    """Every test of a rule: its own, then those of the file beside it. Raises what is wrong with that file, with line and column."""
    found = [
        PlacedTest(test, where, rules.path, at) for at, (test, where) in enumerate(zip(rules.header.tests, rules.test_places, strict=True))
    ]
    if rules.path is None:
        return found
    beside = rules.path.with_name(rules.path.stem + SUFFIX)
    if not beside.is_file():
        return found
    shown = str(Path(rules.file).with_name(beside.name))
    try:
        with beside.open("rb") as stream:
            raw = stream.read(yamlfile.MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(Problem("CK105", f"the tests cannot be read: {error.strerror}", where=printable(shown))) from None
    return found + [PlacedTest(test, where, beside, at) for at, (test, where) in enumerate(parse(raw, shown))]


def parse(raw: bytes, name: str) -> list[tuple[RuleTest, str]]:
    """The tests in the bytes of a ``NAME.test.yaml``, each with its place."""
    document = yamlfile.load(raw, name)
    if not isinstance(document.data, dict):
        raise UsageError(Problem("CK102", "a test file is a mapping with `tests:`", where=name, found=printable(document.data)))
    try:
        tests = Beside.validated(document.data).tests
    except ValidationError as error:
        raise UsageError(explained(error, document, (), Beside.written_names())) from None
    return [(test, document.where(("tests", at))) for at, test in enumerate(tests)]
