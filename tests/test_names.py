import pytest

from ckptconv.errors import printable
from ckptconv.names import MAX_NAME, collapse, natural_key, nearest, unusable


@pytest.mark.parametrize(
    ("names", "templates"),
    [
        (["a"], ["a"]),
        ([f"l.{i}.w" for i in range(12)], ["l.{0-11}.w ×12"]),
        (["l.0.w", "l.2.w", "l.5.w"], ["l.{0,2,5}.w ×3"]),
        (["l.0.w", "l.1.w", "l.2.w", "l.7.w"], ["l.{0-2,7}.w ×4"]),
        (["l.3.w"], ["l.3.w"]),
        (["l.0.fc1.w", "l.1.fc1.w"], ["l.{0-1}.fc1.w ×2"]),
        (["l.0.e.0.w", "l.0.e.1.w", "l.1.e.0.w", "l.1.e.1.w"], ["l.{0-1}.e.{0-1}.w ×4"]),
        (["l.0.b.0.w", "l.0.b.1.w", "l.1.b.0.w"], ["l.0.b.{0-1}.w ×2", "l.1.b.0.w"]),
        (["x.w", "l.0.w", "l.1.w", "y.w"], ["x.w", "l.{0-1}.w ×2", "y.w"]),
        (["l." + "1" * 5000, "l." + "2" * 5000], ["l." + "1" * 5000, "l." + "2" * 5000]),
        ([], []),
    ],
)
def test_names_collapse_to_templates(names, templates):
    assert [str(template) for template in collapse(names)] == templates


def test_every_name_is_in_exactly_one_template():
    names = [f"s.{i}.b.{j}.c{k}" for i in range(4) for j in range(i + 1) for k in (1, 2)]
    assert sorted(name for template in collapse(names) for name in template.names) == sorted(names)


def test_numbers_sort_as_numbers():
    assert sorted(["a.10", "a.9", "a.b", "a.1"], key=natural_key) == ["a.1", "a.9", "a.10", "a.b"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.b", None),
        ("größe", None),
        ("", "the name is empty"),
        ("x" * (MAX_NAME + 1), "the name has 1,025 characters; at most 1,024 are allowed"),
        ("a\nb", "the name holds control characters or lone surrogates"),
        ("a\x1b[31m", "the name holds control characters or lone surrogates"),
        ("a\ud800", "the name holds control characters or lone surrogates"),
        ("__metadata__", "the name __metadata__ is reserved by safetensors"),
        (3, "a name must be text, not int"),
    ],
)
def test_unusable_names_say_why(name, reason):
    assert unusable(name) == reason


def test_the_nearest_word():
    assert nearest("dataparalel", ["dataparallel", "ddp"]) == "dataparallel"
    assert nearest("zzz", ["dataparallel", "ddp"]) is None


def test_nothing_of_a_stranger_steers_the_terminal():
    assert printable("a\x1b[31m\u202eb") == "a\\x1b[31m\\u202eb"
    assert printable("x" * 300) == "x" * 200 + "…"
