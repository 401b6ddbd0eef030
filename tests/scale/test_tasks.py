"""Cutting: whatever the plan, every output is in one task, nothing is computed twice without need, and the source is read hardly more than once."""

from pathlib import PurePath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import force_setattr

from ckptconv.formats.base import Placed, Storage
from ckptconv.formats.sharded import plan_shards
from ckptconv.layout import lay_out
from ckptconv.plan import Output, Plan, Read, apply
from ckptconv.ranges import as_spans
from ckptconv.spec import DType, Manifest, TensorSpec, contiguous_strides
from ckptconv.tasks import MAX_AMPLIFICATION, computed_islands, cut, numbers_text
from ckptconv.transforms import Cast, Concat, Rearrange, Slice

ROWS = 8  # of every tensor that is taken apart here


def spec(columns):
    return TensorSpec((ROWS, columns), DType.float32)


def source(sizes, per_file=5):
    """Tensors of these widths one after the other, a few to a file."""
    tensors, placed, offset = {}, {}, 0
    for at, columns in enumerate(sizes):
        offset = 0 if at % per_file == 0 else offset
        tensors[f"s.{at}"] = spec(columns)
        placed[f"s.{at}"] = Placed(
            spec(columns), Storage(at // per_file, offset, spec(columns).nbytes), 0, contiguous_strides((ROWS, columns))
        )
        offset += spec(columns).nbytes
    return Manifest(tensors), placed


def made_of(kind, name, reads):
    """Outputs of one kind, over one or more source tensors."""
    first = reads[0]
    if kind == "copy":
        return [Output(name, first)]
    if kind == "twice":
        return [Output(f"{name}.{at}", first) for at in range(2)]
    if kind == "rows":
        return [Output(f"{name}.{at}", apply(Slice(axis=0, start=2 * at, stop=2 * at + 2), first)) for at in range(ROWS // 2)]
    if kind == "cast":
        return [Output(name, apply(Cast(dtype=DType.float16), first))]
    fused = apply(Rearrange(pattern="i o -> o i"), apply(Concat(axis=1), *reads) if len(reads) > 1 else first)
    half = fused.spec.shape[0] // 2
    return [Output(f"{name}.{part}", apply(Slice(axis=0, start=start, stop=stop), fused)) for part, start, stop in (("a", 0, half), ("b", half, fused.spec.shape[0]))]  # fmt: skip


@st.composite
def plans(draw):
    sizes = draw(st.lists(st.integers(2, 40), min_size=1, max_size=30))
    manifest, placed = source(sizes, draw(st.integers(1, 9)))
    names = draw(st.permutations(list(manifest.tensors)))
    outputs = []
    while names:
        kind = draw(st.sampled_from(["copy", "twice", "rows", "cast", "fused"]))
        count = draw(st.integers(1, 3)) if kind == "fused" else 1
        taken, names = names[:count], names[count:]
        outputs += made_of(kind, f"o.{len(outputs)}", [Read(name, manifest[name]) for name in taken])
    return Plan(manifest, tuple(outputs)), placed


def laid(plan, placed, shard, is_folder):
    together = [[output.name for output in island] for island in computed_islands(plan.stored, placed)]
    name = "out" if is_folder else "out.safetensors"
    return lay_out(
        plan.manifest,
        PurePath(name),
        format="safetensors",
        is_folder=is_folder,
        shard_nbytes=shard if is_folder else None,
        together=together,
    )


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(200, 6000), st.integers(500, 8000), st.booleans())
def test_any_plan_is_cut_into_tasks_that_are_the_whole(made, task_nbytes, shard, is_folder):
    plan, placed = made
    layout = laid(plan, placed, shard, is_folder)
    tasks = cut(plan, layout, placed, task_nbytes)
    assert sorted(name for task in tasks.tasks for name in task.outputs) == sorted(plan.manifest.stored)
    assert [task.number for task in tasks.tasks] == list(range(len(tasks.tasks)))
    assert tasks.read_amplification <= MAX_AMPLIFICATION == 1.2
    assert tasks.written_nbytes == plan.manifest.nbytes
    assert cut(plan, layout, placed, task_nbytes) == tasks
    home = {name: task.number for task in tasks.tasks for name in task.outputs}
    for island in computed_islands(plan.stored, placed):
        assert len({home[output.name] for output in island}) == 1, "it would be computed twice"
    group = {output.name: number for number, island in enumerate(plan.islands()) for output in island}
    for task in tasks.tasks:
        assert set(task.files) == {file.name for file in layout.files if set(task.outputs) & set(file.slots)}
        parts = [name for name in task.outputs if name in layout.files[0].slots]
        assert list(task.outputs)[: len(parts)] == parts or len(task.files) > 1, "in file order"
        if len(task.files) > 1:  # small files, or what reads one tensor for outputs in more than one
            assert task.written_nbytes <= task_nbytes or len({group[name] for name in task.outputs}) == 1


@settings(max_examples=50, deadline=None)
@given(plans(), st.integers(200, 6000), st.integers(1, 12))
def test_shares_are_the_whole_whatever_their_number(made, task_nbytes, of):
    plan, placed = made
    tasks = cut(plan, laid(plan, placed, None, False), placed, task_nbytes)
    shares = [tasks.share(index, of) for index in range(of)]
    assert sorted(number for share in shares for number in share) == list(range(len(tasks.tasks)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_is_sliced_counts_as_its_slices_and_what_is_computed_as_its_tensors():
    manifest, placed = source([4, 4])
    rows, fused = (Read(name, manifest[name]) for name in manifest.tensors)
    plan = Plan(manifest, (*made_of("rows", "r", [rows])[:1], *made_of("fused", "f", [fused])[:1]))
    tasks = cut(plan, laid(plan, placed, None, False), placed, 1)
    assert [(task.outputs, task.read_nbytes, task.written_nbytes) for task in tasks.tasks] == [(("r.0",), 32, 32), (("f.a",), 128, 64)]
    assert [(task.peak_nbytes, task.computes) for task in tasks.tasks] == [(0, False), (128 + 128, True)]
    assert tasks.tasks[0].memory_nbytes(2) < tasks.tasks[1].memory_nbytes(2)


def test_an_island_that_is_larger_than_a_task_is_cut_where_that_costs_little():
    """One small tensor that everything is multiplied by makes one island of a whole model."""
    manifest, placed = source([1, *[50] * 20])
    small, *large = (Read(name, manifest[name]) for name in manifest.tensors)
    outputs = tuple(Output(f"o.{at}", apply(Concat(axis=1), each, small)) for at, each in enumerate(large))
    plan = Plan(manifest, outputs)
    assert len(computed_islands(outputs, placed)) == 1
    tasks = cut(plan, laid(plan, placed, None, False), placed, 5000)
    assert [task.outputs for task in tasks.tasks][:2] == [("o.0", "o.1", "o.2"), ("o.3", "o.4", "o.5")]
    assert 1 < tasks.read_amplification < 1.02


def test_an_island_whose_parts_would_read_all_of_it_again_stays_whole():
    manifest, placed = source([50] * 3)
    plan = Plan(manifest, tuple(made_of("fused", "f", [Read(name, manifest[name]) for name in manifest.tensors])))
    tasks = cut(plan, laid(plan, placed, None, False), placed, 100)
    assert [task.outputs for task in tasks.tasks] == [("f.a", "f.b")]
    assert tasks.read_amplification == 1


def test_tasks_need_few_source_files():
    """An output order that jumps between the source's files: within an output file, tasks follow the source."""
    manifest, placed = source([10] * 40, per_file=10)
    order = [f"s.{10 * file + at}" for at in range(10) for file in range(4)]
    plan = Plan(manifest, tuple(Output(f"o.{name}", Read(name, manifest[name])) for name in order))
    tasks = cut(plan, laid(plan, placed, None, False), placed, 3200)
    touched = [{placed[name[2:]].storage.file for name in task.outputs} for task in tasks.tasks]
    assert touched == [{0}, {1}, {2}, {3}]


def test_small_files_go_together_and_large_ones_stay_alone():
    manifest, placed = source([2, 2, 2, 60, 2, 2])
    plan = Plan(manifest, tuple(Output(name, Read(name, found)) for name, found in manifest.tensors.items()))
    layout = laid(plan, placed, 70, True)
    assert [task.files for task in cut(plan, layout, placed, 200).tasks] == [
        tuple(f"model-0000{at}-of-00006.safetensors" for at in group) for group in ((1, 2, 3), (4,), (5, 6))
    ]


def test_the_rest_of_a_large_file_does_not_go_with_the_next():
    manifest, placed = source([6, 1, 2])
    plan = Plan(manifest, tuple(Output(name, Read(name, found)) for name, found in manifest.tensors.items()))
    tasks = cut(plan, laid(plan, placed, 240, True), placed, 200)
    assert [task.outputs for task in tasks.tasks] == [("s.0",), ("s.1",), ("s.2",)]


def test_two_names_of_one_tensor_are_read_together():
    manifest, placed = source([4, 4, 4])
    placed["s.2"] = placed["s.0"]
    plan = Plan(manifest, tuple(Output(name, Read(name, found)) for name, found in manifest.tensors.items()))
    tasks = cut(plan, laid(plan, placed, None, False), placed, 1)
    assert [task.outputs for task in tasks.tasks] == [("s.0", "s.2"), ("s.1",)]
    assert tasks.read_amplification == 1


def test_kept_tensors_are_tasks_too():
    manifest, placed = source([4, 4])
    plan = Plan(manifest, tuple(Output(name, Read(name, found)) for name, found in list(manifest.tensors.items())[:1]))
    layout = laid(plan, placed, None, False)
    force_setattr(layout.files[0], "slots", {**layout.files[0].slots, "::moment": layout.files[0].slots["s.0"]})
    tasks = cut(plan, layout, placed, 1, kept={"::moment": placed["s.1"]})
    assert [task.outputs for task in tasks.tasks] == [("s.0",), ("::moment",)]


@pytest.mark.parametrize("limit", [4 * 4 * ROWS, 5 * 4 * ROWS, 9 * 4 * ROWS, None])
def test_an_island_is_not_torn_between_shards_where_it_fits_into_one(limit):
    manifest, placed = source([3, 5, 2])
    plan = Plan(manifest, (
        *made_of("copy", "first", [Read("s.0", manifest["s.0"])]), *made_of("fused", "f", [Read("s.1", manifest["s.1"])]),
        *made_of("copy", "last", [Read("s.2", manifest["s.2"])]),
    ))  # fmt: skip
    together = [[output.name for output in island] for island in computed_islands(plan.stored, placed)]
    assert together == [["f.a", "f.b"]]
    shards = [list(part) for _, part in plan_shards(plan.manifest, "safetensors", limit, "model", together)]
    torn = [list(part) for _, part in plan_shards(plan.manifest, "safetensors", limit, "model")]
    assert any({"f.a", "f.b"} <= set(names) for names in shards) == (limit != 4 * 4 * ROWS)
    assert [name for names in shards for name in names] == [name for names in torn for name in names] == list(plan.manifest.tensors)
    assert as_spans(plan.outputs[1].expr, placed) is None


def test_numbers_for_people():
    assert numbers_text([3, 1, 2, 9]) == "1-3, 9"
    assert numbers_text(range(0, 40, 2)).endswith("22, …")
    assert numbers_text([]) == ""
