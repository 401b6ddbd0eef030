"""Section M of the catalogue: work by many who die, lie in wait, disagree, or run out of disk; and row 127, a run that goes on.

Commands run in children of one process that has everything imported, under a library that makes any call that changes files the last one,
or fail (``output/faulty.py``). Who is killed is killed with SIGKILL, in the middle of a task.
"""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).with_name("output")))

from faulty import Commands, while_stopped

TENSORS = 8
WORK = ".out.ckptconv-work"
PLAN = ["plan", "dataparallel", "in.pth", "out", "--out", "plan.json", "--task-size", "5kB", "--shard-size", "9kB", "--quiet"]


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    made = Commands(tmp_path_factory.mktemp("commands"))
    yield made
    made.close()


class Place:
    """A folder with a source, a plan of eight tasks, and what one run makes of it."""

    def __init__(self, folder, commands):
        self.folder, self.commands = folder, commands

    def run(self, *words, **options):
        return self.commands.run(*words, cwd=self.folder, **options)

    def ok(self, *words, **options):
        done = self.run(*words, **options)
        assert (done.code, done.err) == (0, ""), done
        return done

    def apart(self, *words):
        """The same command as a process beside the others."""
        environment = {**os.environ, "NO_COLOR": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "ckptconv", *words],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def work(self):
        return self.folder / WORK

    def receipts(self):
        """When the receipt of each task was written."""
        return {int(path.stem): path.stat().st_mtime_ns for path in (self.work / "receipts").glob("*.json")}

    def claims(self):
        return sorted(path.name for path in (self.work / "claims").iterdir() if not path.name.startswith("."))

    def nothing_is_published(self):
        assert not (self.folder / "out").exists()

    def finished(self):
        """Finishes, and compares with one run: all of it is right, and nothing is left beside it."""
        self.ok("finish", "plan.json", "--quiet")
        self.is_right()

    def is_right(self):
        out, wanted = self.folder / "out", self.folder / "wanted"
        assert sorted(os.listdir(out)) == sorted(os.listdir(wanted))
        assert all((out / name).read_bytes() == (wanted / name).read_bytes() for name in os.listdir(wanted))
        assert not any(name.startswith(".out") for name in os.listdir(self.folder))


@pytest.fixture(scope="module")
def model(commands):
    """The place that the others are copies of, and the number of the write with which a worker is in the middle of its second task."""
    # In memory where that can be: dozens of runs wait for hundreds of fsyncs otherwise.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        made = Place(Path(name) / "model", commands)
        made.folder.mkdir()
        torch.save({f"module.layers.{at}.w": torch.full((1000,), float(at)) for at in range(TENSORS)}, made.folder / "in.pth")
        made.ok("run", "dataparallel", "in.pth", "wanted", "--shard-size", "9kB", "--quiet")
        made.ok(*PLAN)
        made.ok("work", "plan.json", "--index", "0", "--of", "1", "--quiet")
        writes = [path for call, path in commands.calls() if call == "write"]
        second = [at for at, path in enumerate(writes, 1) if f"{WORK}/files/" in path][1]
        shutil.rmtree(made.work)
        yield made, second


@pytest.fixture
def place(model):
    made, _ = model
    folder = made.folder.with_name("place")
    shutil.copytree(made.folder, folder)
    yield Place(folder, made.commands)
    shutil.rmtree(folder)


@pytest.fixture
def in_a_task(model):
    """The start of a fault that strikes when a worker is in its second task."""
    return f"write:{model[1]}:"


def standing(deed):
    """For ``during``: the deed is done while the process stands still, and then it goes on, if it lives. Where the deed fails, nobody waits."""

    def strike(child):
        try:
            while_stopped(deed)(child)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            if not isinstance(error, ProcessLookupError):
                raise

    return strike


def test_c147_a_worker_is_killed_in_a_task_and_the_others_finish_the_job(place, in_a_task):
    found = []

    def others():
        """While it stands in the middle of a task: two others do what is left, and wait for it; then it is killed."""
        beside = [place.apart("work", "plan.json", "--json") for _ in range(2)]
        end = time.monotonic() + 60
        while len(place.receipts()) < TENSORS - 1 or place.claims() != ["000001"]:
            assert time.monotonic() < end, [each.poll() for each in beside]
            time.sleep(0.01)
        assert all(each.poll() is None for each in beside), "they wait for the one that is not done"
        os.kill(json.loads((place.work / "claims/000001").read_text())["owner"]["pid"], signal.SIGKILL)
        found.extend(json.loads(each.communicate(timeout=60)[0]) for each in beside)

    done = place.run("work", "plan.json", "--index", "0", "--of", "1", fault=in_a_task + "kill=19", during=standing(others))
    assert done.code == -signal.SIGKILL
    assert sorted(number for each in found for number in each["tasks"]) == [1, *range(2, TENSORS)]
    assert [each["done"] for each in found] == [TENSORS] * 2
    place.finished()


def test_c148_everybody_is_killed_at_any_call_and_only_what_is_missing_is_done_again(place):
    """One worker after the other, each killed at a later call; then one that is not; `finish` likewise."""
    place.ok("work", "plan.json", "--index", "0", "--of", "1", "--quiet")
    calls = len(place.commands.calls())
    shutil.rmtree(place.work)
    before = {}
    for at in range(1, calls, max(calls // 20, 1)):
        assert place.run("work", "plan.json", "--index", "0", "--of", "1", "--quiet", fault=f"*:{at}:kill=9").code in (-signal.SIGKILL, 0)
        place.nothing_is_published()
        now = place.receipts() if place.work.exists() else {}
        assert {number: when for number, when in now.items() if number in before} == before, "what was done was done again"
        before = now
    worked = json.loads(place.ok("work", "plan.json", "--json").out)
    assert set(worked["tasks"]) == set(range(TENSORS)) - set(before)
    assert {number: when for number, when in place.receipts().items() if number in before} == before
    at = 1
    while (
        place.run("finish", "plan.json", "--quiet", fault=f"*:{at}:kill=9").code == -signal.SIGKILL and not (place.folder / "out").exists()
    ):
        assert len(place.receipts()) == TENSORS, "nothing is lost"
        at += 5
    if any(name.startswith(".out") for name in os.listdir(place.folder)):  # killed while it cleaned up: the next one does
        assert place.run("finish", "plan.json", "--quiet").code == 5
        place.ok("run", "dataparallel", "in.pth", "out", "--shard-size", "9kB", "--quiet", "--force")
    place.is_right()


def test_c149_the_same_task_by_two_at_once(place, in_a_task):
    """The second takes it over while the first stands still in it; both end well, and one valid receipt stands."""

    def second():
        claim = place.work / "claims/000001"
        old = claim.stat().st_mtime - 1000
        os.utime(claim, (old, old))
        beside = place.apart("work", "plan.json", "--json")
        out, err = beside.communicate(timeout=60)
        assert beside.returncode == 0, err
        assert json.loads(out)["tasks"] != []
        assert len(place.receipts()) == TENSORS

    done = place.run("work", "plan.json", "--index", "0", "--of", "1", "--json", fault=in_a_task + "kill=19", during=standing(second))
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["tasks"] == [0, 1]
    assert sorted(place.receipts()) == list(range(TENSORS))
    assert place.claims() == []
    place.finished()


@pytest.mark.parametrize("skew", [-300, 300])
def test_c150_a_stale_claim_of_another_machine_whatever_its_clock_says(place, commands, skew):
    """Its owner cannot be asked, and the time in it is another clock's: the age of the file counts, and only that."""
    place.ok("work", "plan.json", "--index", "0", "--of", str(TENSORS), "--quiet")
    owner = {"host": "elsewhere", "place": "another boot", "pid": 1, "started": "1"}
    claim = place.work / "claims/000003"
    claim.write_text(json.dumps({"ckptconv_claim": 1, "owner": owner, "time": time.time() + skew, "about": {}}))
    waits = place.run("work", "plan.json", "--no-wait", "--json")
    assert (waits.code, json.loads(waits.out)["done"]) == (0, TENSORS - 1)
    assert place.claims() == ["000003"]
    assert json.loads(place.ok("status", "plan.json", "--json").out)["owners"] == {"3": "elsewhere:1"}
    old = claim.stat().st_mtime - 130
    os.utime(claim, (old, old))
    assert json.loads(place.ok("status", "plan.json", "--json").out)["stale"] == [3]
    assert json.loads(place.ok("work", "plan.json", "--json").out)["tasks"] == [3]
    place.finished()


def test_c150_a_short_lease_is_waited_for(place):
    place.ok("work", "plan.json", "--index", "0", "--of", str(TENSORS), "--quiet")
    (place.work / "claims/000003").write_text("")
    assert 3 in json.loads(place.ok("work", "plan.json", "--json", "--lease", "0.5").out)["tasks"]
    place.finished()


DIFFERENT = {
    "ckptconv": "the version of ckptconv", "torch": "the version of torch", "plan": "the plan that the rules make", "rules": "the rules",
    "source": "the source's files", "layout": "the output's files", "tasks": "the tasks",
}  # fmt: skip


@pytest.mark.parametrize("part", DIFFERENT)
def test_c151_who_works_by_something_else_is_refused_by_name(place, part):
    place.ok("work", "plan.json", "--index", "0", "--of", "2", "--quiet")
    order = place.work / "order.json"
    data = json.loads(order.read_text())
    data["parts"][part] = "something else"
    order.write_text(json.dumps(data))
    before = place.receipts()
    for command in ("work", "finish", "status"):
        done = place.run(command, "plan.json")
        assert done.code == 5
        assert done.err.startswith(
            f"error: {place.work}  [CK507]\n  the work that is under way was begun with something else: {DIFFERENT[part]}\n"
        )
    assert place.receipts() == before
    place.nothing_is_published()


@pytest.mark.parametrize("word", ["order", "ckptconv", "torch"])
def test_c151_and_so_does_a_claim(place, word):
    place.ok("work", "plan.json", "--index", "0", "--of", "2", "--quiet")
    owner = {"host": "elsewhere", "place": "another boot", "pid": 7, "started": "1"}
    (place.work / "claims/000006").write_text(json.dumps({"ckptconv_claim": 1, "owner": owner, "time": 0, "about": {word: "1.0"}}))
    done = place.run("work", "plan.json")
    assert done.code == 5
    assert done.err.startswith(
        f"error: {place.work}  [CK507]\n  task 6 is claimed by elsewhere:7, which works by another {word}\n  found: 1.0, here "
    )


def missing(place):
    (place.work / "receipts/000002.json").unlink()
    return "  1 of 8 tasks are not done\n  found: tasks 2\n"


def corrupt(place):
    path = sorted((place.work / "files").iterdir())[1]
    with open(path, "r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        stream.write(b"\1\2\3\4")
    return "the bytes that it wrote are not there any more\n"


def torn(place):
    path = place.work / "receipts/000002.json"
    path.write_bytes(path.read_bytes()[:100])
    return "  task 2: its receipt is damaged\n"


def foreign(place):
    path = place.work / "receipts/000002.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "order": "0" * 32}))
    return "  task 2: its receipt is of another plan, source or version\n"


@pytest.mark.parametrize("deed", [missing, corrupt, torn, foreign])
def test_c152_finish_names_what_is_missing_corrupt_or_of_another_plan(place, deed):
    place.ok("work", "plan.json", "--quiet")
    before = place.receipts()
    what = deed(place)
    done = place.run("finish", "plan.json")
    assert done.code == 4
    assert done.err.startswith(f"error: {place.work}  [CK416]\n  ")
    assert what in done.err
    assert "try: ckptconv work plan.json" in done.err
    place.nothing_is_published()
    (again,) = json.loads(place.ok("work", "plan.json", "--json").out)["tasks"]
    assert {number for number, when in place.receipts().items() if before[number] != when} == {again}
    place.finished()


def test_c153_a_disk_that_is_full_for_one_worker(place, in_a_task):
    """Its task fails cleanly, and is free for the next; what it did before stays done."""
    done = place.run("work", "plan.json", "--index", "0", "--of", "1", fault=in_a_task + "error=28+")
    message = f"error: {place.folder}/out  [CK503]\n  the output cannot be written: no space left on the disk\n  try: free some space, or write elsewhere\n"
    assert (done.code, done.err) == (5, message)
    assert list(place.receipts()) == [0]
    assert place.claims() == []
    place.nothing_is_published()
    assert sorted(json.loads(place.ok("work", "plan.json", "--json").out)["tasks"]) == list(range(1, TENSORS))
    place.finished()


def test_c153_a_straggler_is_overtaken_by_whoever_has_a_shorter_lease(place, in_a_task):
    """A worker that stands still no longer renews its claim: another does its task, and its own late bytes are the same."""

    def overtaken():
        beside = place.apart("work", "plan.json", "--json", "--lease", "0.5")
        assert 1 in json.loads(beside.communicate(timeout=60)[0])["tasks"]

    done = place.run("work", "plan.json", "--index", "0", "--of", "1", "--json", fault=in_a_task + "kill=19", during=standing(overtaken))
    assert (done.code, json.loads(done.out)["done"]) == (0, TENSORS)
    place.finished()


RESUME = ["run", "dataparallel", "in.pth", "out", "--resume", "--task-size", "5kB", "--shard-size", "9kB"]


def test_c127_a_run_that_is_killed_goes_on_where_it_was(place):
    calls = len(place.ok(*RESUME, "--quiet") and place.commands.calls())
    place.is_right()
    shutil.rmtree(place.folder / "out")
    before = {}
    for at in range(2, calls, max(calls // 30, 1)):
        done = place.run(*RESUME, "--quiet", fault=f"*:{at}:kill=9")
        if (place.folder / "out").exists():
            break
        assert done.code == -signal.SIGKILL
        now = place.receipts() if place.work.exists() else {}
        assert {number: when for number, when in now.items() if number in before} == before, "what was done was done again"
        before = now
    else:
        done = place.ok(*RESUME)
        assert f"{TENSORS} of {TENSORS} tasks were done before, checked and kept" in done.out
    if any(name.startswith(".out") for name in os.listdir(place.folder)):
        place.ok(*RESUME, "--quiet", "--force")
    place.is_right()


def flip(place, value):
    """One bit of the tensor that is full of this value, where it is staged."""
    needle = struct.pack("<f", value) * 1000
    (path,) = [path for path in (place.work / "files").iterdir() if needle in path.read_bytes()]
    raw = bytearray(path.read_bytes())
    raw[raw.index(needle) + 2000] ^= 1
    path.write_bytes(raw)


def test_c127_only_where_digests_match(place, in_a_task):
    """What was damaged meanwhile is done again; with other rules or another source it is refused, and nothing is touched."""
    assert place.run(*RESUME, fault=in_a_task + "kill=9").code == -signal.SIGKILL
    while len(place.receipts()) < 3:
        assert place.run(*RESUME, fault=f"write:{len(place.receipts()) * 4 + 8}:kill=9").code == -signal.SIGKILL
    before = place.receipts()
    first, second = sorted(before)[:2]
    name = next(iter(json.loads((place.work / "receipts" / f"{second:06d}.json").read_text())["details"]["digests"]))
    flip(place, float(name.split(".")[1]))
    path = place.work / "receipts" / f"{first:06d}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "order": "0" * 32}))
    for words in (["run", "other.yaml", *RESUME[2:]], [*RESUME, "--format", "safetensors"], [*RESUME, "--shard-size", "20kB"]):
        (place.folder / "other.yaml").write_text("version: 1\nname: other\nsummary: s\nsteps:\n  - strip_prefix: module.layers.\n")
        refused = place.run(*words)
        assert (refused.code, "[CK507]\n  the work that is under way was begun with something else: " in refused.err) == (5, True)
    done = place.ok(*RESUME)
    assert f"{len(before) - 2} of {TENSORS} tasks were done before, checked and kept" in done.out
    assert f"done again: task {second}: the bytes that it wrote are not there any more" in done.out
    assert f"done again: task {first}: its receipt is of another plan, source or version" in done.out
    place.is_right()
