"""The cost model: its figures are those of the plan, the pages say what the code says, and runs move the bytes that it foretells."""

import re
import sys
from math import inf
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckptconv
from ckptconv.costs import PLACES, Load, Place, cost, loads_of, per_terabyte, requests_of
from ckptconv.invert import invert
from ckptconv.layout import lay_out
from ckptconv.planner import make_plan
from ckptconv.ruleset.builtin import find
from ckptconv.stage.preparing import Options, prepare
from ckptconv.stage.producing import begin
from ckptconv.tasks import cut

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "bench"))
from moe import EXPERTS, LAYERS, RULES, SHARD_NBYTES, checkpoint  # noqa: E402

PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
PLAIN = Place(
    1.0, 10.0, 100.0, 200.0, read_nbytes=10, written_nbytes=20, reads_in_flight=4, writes_in_flight=2, file_reads=3, file_writes=2
)


def test_a_twentieth_of_a_terabyte_of_experts_planned_cut_and_inverted():
    layers = round(LAYERS / 20)
    made = checkpoint(layers)
    assert len(made.manifest) == 3 + layers * (9 + 3 * EXPERTS)
    plan = make_plan(find(RULES), made.manifest)
    assert len(plan.outputs) == 3 + layers * (9 + 2)
    assert plan.manifest.nbytes == made.manifest.nbytes
    layout = lay_out(plan.manifest, Path("out"), format="safetensors", is_folder=True, shard_nbytes=SHARD_NBYTES)
    tasks = cut(plan, layout, made.placed, 4_000_000_000)
    assert sorted(name for task in tasks.tasks for name in task.outputs) == sorted(output.name for output in plan.stored)
    assert tasks.read_nbytes == tasks.written_nbytes == made.manifest.nbytes
    assert tasks.read_amplification <= 1.2
    assert max(task.peak_nbytes for task in tasks.tasks) == 0, "stacked experts, gate and up joined: all of it is copied"
    assert max(task.written_nbytes for task in tasks.tasks) <= 2 * EXPERTS * 2048 * 4096 * 2, (
        "one tensor is never cut, and no task is larger"
    )
    loads = loads_of(plan, layout, made.placed, tasks, PLACES["s3"], PLACES["s3"])
    assert sum(load.read_nbytes for load in loads) == made.manifest.nbytes
    assert sum(load.computed_nbytes for load in loads) == 0
    back = invert(plan)
    assert back.lost == ()
    assert [(output.name, output.expr.spec) for output in back.plan.outputs] == list(made.manifest.tensors.items())


@pytest.mark.parametrize(
    ("ranges", "gap", "requests"),
    [
        ([], 0, 0),
        ([(0, 0, 10)], 0, 1),
        ([(0, 0, 11)], 0, 2),
        ([(0, 0, 5), (0, 6, 10)], 0, 2),
        ([(0, 0, 5), (0, 6, 10)], 1, 1),
        ([(0, 0, 5), (1, 5, 10)], 9, 2),
        ([(0, 0, 40), (0, 10, 20)], 0, 4),
    ],
)
def test_requests(ranges, gap, requests):
    assert requests_of(ranges, 10, gap) == requests


def test_seconds_by_hand():
    """Two tasks of 1,000 bytes in 100 requests, on a place where everything is easily divided."""
    loads = [Load(1000, 100, 1000, 50)] * 2
    alone = cost(loads, 1, PLAIN, PLAIN, tensors=0, source_files=2, output_files=1, verified=False)
    # reading: 25 rounds of 4 requests, 1 s until the answer and 1 s for its 10 bytes; writing: 25 rounds of 2, 1 s and 2 s
    assert alone.tasks_s == 2 * (25 * 2 + 25 * 3)
    assert alone.alone_s == pytest.approx(0.4 + 3 + 2), "headers of two files at once, three requests one after the other; one output"
    assert (alone.reads, alone.writes) == (200 + 6, 100 + 2)
    two = cost(loads, 2, PLAIN, PLAIN, tensors=0, source_files=2, output_files=1)
    assert two.tasks_s == 25 * 2 + 25 * 3
    assert two.proved_nbytes == 2000
    assert two.alone_s == pytest.approx(0.4 + 3 + 2 + 51 * (1 + 2000 / 203 / 10))
    assert two.reads == 200 + 2 * 6 + 203, "each worker reads the headers; one reads the output back"
    computed = cost([Load(0, 0, 0, 0, 10**9)], 1, PLAIN, PLAIN, tensors=0, source_files=0, output_files=0, verified=False)
    assert computed.tasks_s == pytest.approx(2)
    slow = Place(0.0, 10.0, inf, 20.0)
    assert cost(loads, 2, slow, slow, tensors=0, source_files=0, output_files=0, verified=False).tasks_s == 200, (
        "all share 20 bytes in a second"
    )


@pytest.mark.parametrize("name", PLACES)
def test_more_workers_are_never_slower_than_one_and_never_faster_than_their_share(name):
    one = per_terabyte(1, PLACES[name])
    for workers in (2, 8, 64, 1000):
        more = per_terabyte(workers, PLACES[name])
        assert one.tasks_s / workers <= more.tasks_s * 1.001
        assert more.tasks_s <= one.tasks_s * 1.03, "what is left over when tasks do not divide evenly"
        assert more.alone_s == one.alone_s


def test_the_page_says_what_the_code_says():
    """docs/scale.md, per terabyte: place, workers, requests read and written, seconds of the tasks, and of one alone."""
    rows = re.findall(r"^\| (disk|nfs|s3) \| (\d+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", PAGE, re.MULTILINE)
    found = [(name, int(workers), *(int(cell.replace(",", "")) for cell in cells)) for name, workers, *cells in rows]
    wanted = []
    for name, place in PLACES.items():
        for workers in (1, 8, 64):
            made = per_terabyte(workers, place)
            wanted.append((name, workers, made.reads, made.writes, round(made.tasks_s), round(made.alone_s)))
    assert found == wanted
    figures = re.findall(
        r"^\| `(\w+)` \| ([\d.]+) ms \| ([\d.]+) \| ([\d.]+) \| ([\d.]+|–) \| (\d+) · (\d+) MiB \| (\d+) · (\d+) \|", PAGE, re.MULTILINE
    )
    assert [
        (name, float(latency) / 1e3, float(stream) * 1e9, float(worker) * 1e9, inf if shared == "–" else float(shared) * 1e9,
         int(read) << 20, int(written) << 20, int(reads), int(writes))
        for name, latency, stream, worker, shared, read, written, reads, writes in figures
    ] == [
        (name, each.latency_s, each.stream_nbytes_per_s, each.worker_nbytes_per_s, each.shared_nbytes_per_s, each.read_nbytes,
         each.written_nbytes, each.reads_in_flight, each.writes_in_flight)
        for name, each in PLACES.items()
    ]  # fmt: skip


def experts(folder, layers=2):
    """A small mixture of experts in three shards, of tensors that are large enough to be copied in pieces."""
    folder.mkdir()
    tensors = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight": torch.full((256, 512), float(expert), dtype=torch.bfloat16)
        for layer in range(layers) for expert in range(8) for name in ("gate", "up", "down")
    }  # fmt: skip
    tensors |= {f"model.layers.{layer}.mlp.gate.weight": torch.ones(8, 512) for layer in range(layers)}
    names, shards = list(tensors), {}
    for at in range(3):
        shards |= dict.fromkeys(names[at::3], f"model-{at + 1:05}-of-00003.safetensors")
        save_file({name: tensors[name] for name in names[at::3]}, folder / f"model-{at + 1:05}-of-00003.safetensors")
    import json

    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return folder


def moved():
    found = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(found["rchar"]), int(found["wchar"])


def test_a_run_moves_the_bytes_that_the_plan_says(tmp_path):
    """What the kernel counts for this process, against the plan's own figures: within one part in a hundred, and some headers."""
    source = experts(tmp_path / "in")
    ckptconv.run(RULES, source, tmp_path / "first")  # everything is imported
    made = begin(prepare(RULES, source, Options()), tmp_path / "out", Options())
    tasks = cut(made.prepared.plan, made.layout, made.prepared.source.placed, 1 << 20)
    loads = loads_of(made.prepared.plan, made.layout, made.prepared.source.placed, tasks, PLACES["disk"], PLACES["disk"])
    foretold = cost(loads, 1, PLACES["disk"], PLACES["disk"], tensors=50, source_files=3, output_files=len(made.layout.files))
    before = moved()
    ckptconv.run(RULES, source, tmp_path / "out", threads=1)
    read, written = (after - start for after, start in zip(moved(), before, strict=True))
    assert foretold.written_nbytes == made.prepared.plan.manifest.nbytes > 12_000_000
    assert foretold.proved_nbytes == foretold.written_nbytes, "ranges that are put together otherwise are proved by their digests"
    assert abs(read - foretold.read_nbytes - foretold.proved_nbytes) < 0.01 * read + 100_000
    assert abs(written - foretold.written_nbytes) < 0.01 * written + 100_000


def test_a_plan_says_its_cost(tmp_path, cli):
    experts(tmp_path / "in")
    words = ["plan", RULES, "in", "out", "--workers", "8", "--store", "s3", "--task-size", "1MB"]
    done = cli(*words, cwd=tmp_path)
    line = done.out.splitlines()[-1]
    assert line == (
        "on paper, 8 workers at s3: 12.6 MB and 12.6 MB for the proof read in 96 requests, 12.6 MB written in 8; 0 s, "
        "and 1 s that no further worker makes shorter"
    )
    found = cli(*words, "--json", cwd=tmp_path).json["on_paper"]
    assert (found["read_nbytes"], found["written_nbytes"], found["workers"]) == (12_615_680, 12_615_680, 8)
    # Neighbours together; four requests for each of three files, by each of the six who have a task; the proof; the folders.
    assert found["reads"] == 8 + 6 * 3 * 4 + 6 + 10
    refused = cli("plan", RULES, "in", "--workers", "8", cwd=tmp_path)
    assert (refused.code, "--workers needs DST" in refused.err) == (2, True)
