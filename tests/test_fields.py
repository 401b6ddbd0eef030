"""Fields that are written by people: types are strict, every fault is told at once, and a run pays for no more than it uses."""

import subprocess
import sys
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta, field
from pydantic_core import ValidationError

from ckptconv.fields import Checked, Fields, Parsed, Rest, schema_of


class Colour(str, Enum):
    red = "red"


def halved(value):
    if value % 2:
        raise ValueError("odd")
    return value // 2


class Inner(Fields, frozen=True):
    size: Annotated[int, Meta(ge=1)] = 1


class Outer(Fields, frozen=True, kw_only=True):
    name: Annotated[str, Meta(min_length=2, max_length=4, pattern="^[a-z]+$")]
    half: Annotated[int, Checked(halved)] = 0
    text: Annotated[tuple[str, ...], Parsed(lambda value: tuple(str(value).split()), {"type": "string"})] = ()
    source: str | None = field(default=None, name="from")
    how: Literal["sum", "mean", 3] = "sum"
    colour: Colour = Colour.red
    pair: tuple[int, str] = (0, "")
    inner: Inner = Inner()
    many: Annotated[tuple[Inner, ...], Meta(max_length=2)] = ()
    by_name: Annotated[dict[str, float], Meta(min_length=1)] | None = None
    either: dict[str, int] | Literal["same"] | None = None
    anything: Any = None
    whether: bool = False


class Open(Fields, frozen=True):
    pattern: str
    sizes: Annotated[dict[str, int], Rest({"type": "integer"})] = field(default_factory=dict)


class Ordered(Fields, frozen=True):
    start: int
    stop: int

    def __post_init__(self):
        if self.stop < self.start:
            raise ValueError("stops before it starts")


def faults(kind, data):
    with pytest.raises(ValidationError) as error:
        kind.validated(data)
    return {(".".join(map(str, fault["loc"])), fault["type"]) for fault in error.value.errors()}


def test_what_is_written_becomes_an_object():
    data = {
        "name": "abc", "half": 8, "text": "a b", "from": "x", "how": 3, "colour": "red", "pair": [1, "b"], "inner": {"size": 2}, "many": [{}],
        "by_name": {"a": 1}, "either": "same", "anything": [{}], "whether": True,
    }  # fmt: skip
    made = Outer.validated(data)
    assert made == Outer(
        name="abc", half=4, text=("a", "b"), source="x", how=3, colour=Colour.red, pair=(1, "b"), inner=Inner(2), many=(Inner(),),
        by_name={"a": 1.0}, either="same", anything=[{}], whether=True,
    )  # fmt: skip
    assert Outer.validated({"name": "abc"}) == Outer(name="abc")


def test_all_faults_are_told_at_once_and_where():
    data = {
        "name": "A", "half": 3, "from": 1, "how": "max", "colour": "blue", "pair": [1], "inner": {"size": 0, "more": 1}, "many": [{}, {"size": "2"}],
        "by_name": {}, "either": 1, "whether": "yes", "source": "x",
    }  # fmt: skip
    assert {place.split(".")[0] for place, _ in faults(Outer, data)} == {*data}
    assert {("inner.size", "greater_than_equal"), ("inner.more", "extra_forbidden"), ("many.1.size", "int_type")} <= faults(Outer, data)
    assert faults(Outer, {}) == {("name", "missing")}
    assert faults(Outer, {"name": "abcde", "many": [{}] * 3}) == {("name", "string_too_long"), ("many", "too_long")}


@pytest.mark.parametrize("data", [None, [], "name", 3, {1: 2}])
def test_only_a_mapping_with_names_is_taken(data):
    assert faults(Inner, data)


@pytest.mark.parametrize(("wrong", "kind"), [(True, "int_type"), (1.0, "int_type"), ("1", "int_type"), (None, "int_type")])
def test_types_are_strict(wrong, kind):
    assert faults(Inner, {"size": wrong}) == {("size", kind)}


def test_what_has_no_name_of_its_own_goes_to_the_rest():
    assert Open.validated({"pattern": "h d", "h": 2, "sizes": 3}) == Open("h d", {"h": 2, "sizes": 3})
    assert faults(Open, {"pattern": "h d", "h": "2"}) == {("h", "int_type")}
    assert Open.written_names() == ("pattern",)
    assert "from" in Outer.written_names()
    assert "source" not in Outer.written_names()


def test_what_no_field_can_know_is_checked_of_the_whole():
    assert faults(Ordered, {"start": 2, "stop": 1}) == {("", "value_error")}
    with pytest.raises(ValueError, match="stops before it starts"):
        Ordered(2, 1)


@pytest.mark.parametrize("kind", [set[int], list[int], bytes, Annotated[float, Meta(ge=0)], Annotated[int | None, Meta(ge=0)]])
def test_an_annotation_that_would_not_be_checked_is_refused(kind):
    with pytest.raises(TypeError):
        schema_of(kind)


def test_a_run_needs_neither_torch_nor_pydantic_s_models(tmp_path):
    """Each takes longer to import than a small conversion takes."""
    header = b'{"module.a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    (tmp_path / "in.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    code = (
        "import sys; from ckptconv.cli import cli\n"
        "for words in ('run dataparallel in.safetensors out.pth -q', 'check dataparallel', 'inspect out.pth', 'plan dataparallel in.safetensors'):\n"
        "    cli(words.split(), standalone_mode=False)\n"
        "print([name for name in ('torch', 'numpy', 'pydantic', 'logging', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
