"""The README's table is true: every number is there, and every test that it names exists."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS = re.findall(r"^\| ([0-9]+) \| .* \| (.*) \|$", (HERE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
OURS = [*range(1, 119), *range(137, 147), 127, *range(147, 155)]  # what comes in, and work by many; what goes out has a page of its own
REFERENCE = re.compile(r"`([a-z_./]+\.py)::(\w+)(?:\[(c[0-9]{3}-)…\])?`")


def test_every_number_stands_here_once():
    numbers = [int(number) for number, _ in ROWS]
    assert [number for number in numbers if number in OURS] == OURS


@pytest.mark.parametrize(("number", "tests"), ROWS, ids=[f"c{int(number):03}" for number, _ in ROWS])
def test_the_tests_that_are_named_exist(number, tests):
    found = REFERENCE.findall(tests)
    assert found
    assert len(found) == len(tests.split(", "))
    for file, name, row in found:
        source = (HERE / file).read_text(encoding="utf-8")
        assert f"def {name}(" in source or f"\n{name} = " in source or f"class {name}" in source, f"{file} has no {name}"
        assert not row or f'"{row}' in source, f"{file} has no row {row}"
    if int(number) in OURS:
        assert any(f"c{int(number):03}" in row + name for _, name, row in found) or int(number) == 78
