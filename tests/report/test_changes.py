import pytest

from ckptconv.planner import make_plan
from ckptconv.report.changes import changes
from ckptconv.report.text import nbytes_text
from ckptconv.ruleset.model import parse
from ckptconv.spec import DType, Manifest, TensorSpec


def lines(steps, names, ties=()):
    source = Manifest({name: TensorSpec((6, 4), DType.float32) for name in names}, ties)
    plan = make_plan(parse(f"version: 1\nname: r\nsummary: s\nsteps:\n{steps}".encode(), "r.yaml"), source)
    return [(each.verb, each.count, [t.text for t in each.sources], [t.text for t in each.outputs], each.detail) for each in changes(plan)]


@pytest.mark.parametrize(
    ("steps", "names", "expected"),
    [
        ("- strip_prefix: m.", ["m.a", "m.b"], [("renamed", 2, ["m.a", "m.b"], ["a", "b"], "")]),
        ("- strip_prefix: m.", ["m.a", "m.b", "m.c", "m.d"], [("renamed", 4, ["m.a", "m.b", "m.c", "m.d"], ["a", "b", "c", "d"], "'m.' to ''")]),
        ("- rename: {'b.{i:int}.n.{p}': 'l.{i}.norm.{p}'}", ["b.0.n.w", "b.1.n.w", "b.0.n.b", "b.1.n.b"],
         [("renamed", 4, ["b.{0-1}.n.w", "b.{0-1}.n.b"], ["l.{0-1}.norm.w", "l.{0-1}.norm.b"], "")]),
        ("- drop: {keys: b, reason: why}", ["a", "b"], [("unchanged", 1, ["a"], ["a"], ""), ("dropped", 1, ["b"], [], "why")]),
        ("- copy: {from: a, to: b}", ["a"], [("unchanged", 1, ["a"], ["a"], ""), ("copied", 1, ["a"], ["b"], "·")]),
        ("- tie: {from: a, to: b}", ["a"], [("unchanged", 1, ["a"], ["a"], ""), ("tied", 1, ["a"], ["b"], "")]),
        ("- split: {from: a, to: [x, y]}", ["a"],
         [("split", 1, ["a"], ["x"], "slice(·, axis=0, 0:3)"), ("split", 1, ["a"], ["y"], "slice(·, axis=0, 3:6)")]),
        ("- fill: {to: z, shape: [2], value: ones}", ["a"],
         [("unchanged", 1, ["a"], ["a"], ""), ("filled", 1, [], ["z"], "constant 1 [2] float32")]),
    ],
)  # fmt: skip
def test_a_plan_in_a_few_lines(steps, names, expected):
    assert lines(steps, names) == expected


def test_many_names_stay_one_line():
    names = [f"module.blocks.{i}.{p}" for i in range(48) for p in ("a.w", "b.w", "c.w", "d.w", "e.w")]
    assert len(lines("- strip_prefix: module.", names)) == 1


def test_bytes_as_people_say_them():
    assert [nbytes_text(size) for size in (0, 999, 1000, 46_800_000, 10**15)] == ["0 B", "999 B", "1.0 kB", "46.8 MB", "1000.0 TB"]
