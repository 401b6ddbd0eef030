"""The Ray engine: workers, machines and the driver are killed for real, and the output is that of a run by threads, byte for byte."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckptconv
from ckptconv.stage import ray_engine

ray = pytest.importorskip("ray") if os.environ.get("CI") != "true" else __import__("ray")
ROOT = Path(__file__).parent.parent.parent
RULE = """version: 1
name: fused
summary: experts stacked, a projection split, a cast that is computed
steps:
  - stack: {from: "{m:**}.experts.{e:int}.w", over: e, to: "{m}.experts"}
  - split: {from: "{m:**}.qkv", to: "{m}.{x:q|k|v}"}
  - cast: {keys: "{m:**}.norm", dtype: bfloat16}
"""


@pytest.fixture(scope="module")
def cluster():
    """A head and a machine beside it, with a processor each. What tests define is sent to them as it is written here."""
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}  # no token in the home folder of who runs the tests
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    node = {"num_cpus": 1, "object_store_memory": 80_000_000}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A checkpoint in two shards, of eight outputs or so; converted once by threads."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in"
    folder.mkdir()
    weight_map = {}
    for at in range(2):
        tensors = {f"l{at}.experts.{e}.w": torch.randn(64, 128) for e in range(4)}
        tensors |= {f"l{at}.qkv": torch.randn(96, 128), f"l{at}.norm": torch.randn(20_000)}
        save_file(tensors, folder / f"model-{at + 1:05}-of-00002.safetensors")
        weight_map |= dict.fromkeys(tensors, f"model-{at + 1:05}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "fused.yaml").write_text(RULE)
    ckptconv.run("fused.yaml", "in", "local", shard_size="200kB")
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


OPTIONS = {"shard_size": "200kB", "task_size": "60kB", "engine": "ray"}
do_task = ray_engine.do_task


def once(path):
    """True for the first who asks, whichever process that is."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def killed_and_stuck(plan_file, roots, options, order, number):
    """The first task on the head kills its own worker when all is written but the receipt; the first on the other machine never ends."""
    from ckptconv.execute import receipts as kept

    folder = Path(plan_file).parent.parent
    victim = (folder / "victim").read_text()
    write = kept.write

    def late(*arguments, **more):
        if ray.get_runtime_context().get_node_id() == victim:
            if once(folder / "stuck"):
                time.sleep(600)
        elif once(folder / "killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*arguments, **more)

    kept.write = late
    try:
        return do_task(plan_file, roots, options, order, number)
    finally:
        kept.write = write


def test_a_worker_and_a_machine_are_killed_in_the_middle_of_a_task(cluster, source, tmp_path, monkeypatch):
    other = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    cluster.wait_for_nodes()
    (tmp_path / "victim").write_text(other.node_id)
    monkeypatch.setattr(ray_engine, "do_task", killed_and_stuck)
    places, sizes = [], []
    as_they_come = ray_engine._as_they_come

    def watched(ray, calls):
        for call, number in as_they_come(ray, calls):
            where = ray.experimental.get_object_locations([call])[call]
            places.append(where["node_ids"])
            sizes.append(where["object_size"])
            yield call, number

    monkeypatch.setattr(ray_engine, "_as_they_come", watched)

    def kill():
        deadline = time.monotonic() + 60
        while not (tmp_path / "stuck").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        cluster.remove_node(other, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    told = []
    report = ckptconv.run("fused.yaml", "in", "out", ray_address=cluster.address, progress=lambda *each: told.append(each), **OPTIONS)
    killer.join()
    assert (tmp_path / "killed").exists()
    assert (tmp_path / "stuck").exists()
    assert report.ladder.reached == "L0 L1 L3"
    assert f"{len(sizes)} tasks done by a Ray cluster" in report.notes
    assert len(sizes) >= 6
    assert files("out") == files("local")
    assert 0 < min(sizes) <= max(sizes) < 10_000
    assert places == [[]] * len(sizes), "no node's object store holds anything of them: tensors never travel"
    assert not (tmp_path / ".out.ckptconv-work").exists()
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told), "one bar for all"
    assert {stage for stage, _, _ in told} >= {"working", "verifying"}
    assert told[-1][1] == told[-1][2]


DRIVER = """
import os, sys, time
from pathlib import Path
import ckptconv, ray
from ckptconv.stage import ray_engine
done = ray_engine.do_task

def slow(plan_file, roots, options, order, number):
    if len(list((Path(plan_file).parent / "receipts").glob("[0-9]*.json"))) >= 3:
        time.sleep(600)
    return done(plan_file, roots, options, order, number)

ray_engine.do_task = slow
ckptconv.run("fused.yaml", "in", "out", ray_address={address!r}, **{options!r})
"""


def test_the_driver_is_killed_and_the_next_one_goes_on(cluster, source, tmp_path):
    receipts = tmp_path / ".out.ckptconv-work" / "receipts"
    code = DRIVER.format(address=cluster.address, options=OPTIONS)
    driver = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (receipts.is_dir() and len(list(receipts.glob("[0-9]*.json"))) >= 3):
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (tmp_path / "out").exists()
    before = {path.name: path.stat().st_mtime_ns for path in receipts.iterdir()}
    report = ckptconv.run("fused.yaml", "in", "out", ray_address=cluster.address, **OPTIONS)
    assert any(note.startswith("3 of ") and note.endswith("tasks were done before, checked and kept") for note in report.notes), (
        report.notes
    )
    assert len(before) >= 3
    assert files("out") == files("local")


INTERRUPTED = """
import sys, time
import ckptconv
from ckptconv.stage import ray_engine

def slow(*_):
    import time
    time.sleep(60)

ray_engine.do_task = slow
from ckptconv.__main__ import main
sys.argv = ["ckptconv", "run", "fused.yaml", "in", "out", "--engine", "ray", "--ray-address", {address!r}]
main()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_driver_ends_as_every_run_does(cluster, source, tmp_path, name, code):
    driver = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED.format(address=cluster.address)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not (tmp_path / ".out.ckptconv-work" / "plan.json").exists():
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)  # it waits for its tasks
    driver.send_signal(getattr(signal, name))
    said = driver.communicate(timeout=30)[1]
    assert driver.returncode == code, said
    assert said.endswith("interrupted: the output is whole, or as it was before\n")
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


class Counting:
    """What stands in for Ray where only what it is asked for counts."""

    class exceptions:
        RayError = RayTaskError = ZeroDivisionError

    def __init__(self):
        self.asked = []

    def remote(self, function):
        self.function = function
        return self

    def options(self, **options):
        call = type(self)()
        call.asked, call.function, call.remote = (
            self.asked,
            self.function,
            lambda *words: (self.asked.append(options), self.function(*words))[1],
        )
        return call

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 3.0, "memory": 1e9}}, {"Alive": False, "Resources": {"CPU": 99.0, "memory": 1e15}}]

    def wait(self, calls, num_returns, timeout):
        return calls[:1], calls[1:]

    def get(self, call):
        return call

    def cancel(self, call, force):
        pass


def test_each_task_asks_for_what_the_plan_says(source, tmp_path):
    from ckptconv.stage import working
    from ckptconv.stage.preparing import Options, prepare
    from ckptconv.stage.producing import begin

    options = Options(shard_size="200kB", task_size="60kB", threads=5)
    job = working.Job(begin(prepare("fused.yaml", Path("in"), options), Path("out"), options), "again")
    job.start()
    ray = Counting()
    numbers = [task.number for task in job.tasks.tasks]
    found = list(ray_engine._worked(ray, job, ray_engine._write_plan(job), numbers))
    assert sorted(receipt.task for receipt in found) == numbers
    assert job.done() == set(numbers)
    assert [each["memory"] for each in ray.asked] == [task.memory_nbytes(3) for task in job.tasks.tasks]
    assert len({each["memory"] for each in ray.asked}) > 1, "what is computed needs more"
    assert {(each["num_cpus"], each["max_retries"]) for each in ray.asked} == {(3, 3)}


def test_a_task_that_cannot_be_done_says_why(cluster, source, tmp_path, monkeypatch):
    shard = source / "model-00002-of-00002.safetensors"

    def after_planning(*arguments, **more):
        raw = shard.read_bytes()
        shard.write_bytes(raw[:-1] + b"x")
        return write(*arguments, **more)

    write = ray_engine._write_plan
    monkeypatch.setattr(ray_engine, "_write_plan", after_planning)
    with pytest.raises(ckptconv.InputError) as refusal:
        ckptconv.run("fused.yaml", "in", "out", ray_address=cluster.address, **OPTIONS)
    assert [problem.code for problem in refusal.value.problems] == ["CK311"]
    assert not (tmp_path / "out").exists()


def test_a_machine_that_is_too_small_and_a_worker_that_always_dies(cluster, source, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ray_engine, "_largest", lambda ray: (1.0, 1000.0))
        with pytest.raises(ckptconv.OutputError, match="no machine of the cluster offers as much"):
            ckptconv.run("fused.yaml", "in", "out", ray_address=cluster.address, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(ray_engine, "RETRIES", 1)
        patch.setattr(ray_engine, "do_task", lambda *_: os.kill(os.getpid(), 9))
        with pytest.raises(ckptconv.OutputError) as refusal:
            ckptconv.run("fused.yaml", "in", "out", ray_address=cluster.address, **OPTIONS)
    (problem,) = refusal.value.problems
    assert problem.code == "CK510"
    assert problem.what.endswith("ended, 2 times")
    assert problem.try_ == "ckptconv run --engine ray, as it was begun: only what is missing is done"


def test_a_batch_by_a_cluster(cluster, source, tmp_path, monkeypatch):
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    for at in range(4):
        torch.save({"module.a": torch.full((4,), float(at))}, zoo / f"{at}.pth")
    (zoo / "bad.pth").write_text("no checkpoint")
    report = ckptconv.batch(["zoo"], "dataparallel", "many", engine="ray", ray_address=cluster.address)
    assert [item.output for item in report.converted] == [f"many/{at}.pth" for at in range(4)]
    assert [(item.source, item.problems[0].code) for item in report.failed] == [("zoo/bad.pth", "CK301")]
    assert torch.load("many/3.pth")["a"].tolist() == [3.0] * 4
    again = ckptconv.batch(["zoo"], "dataparallel", "many", engine="ray", ray_address=cluster.address)
    assert (len(again.converted), len(again.unchanged), len(again.failed)) == (0, 4, 1)


def test_without_ray(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ckptconv.OutputError) as refusal:
        ckptconv.run("fused.yaml", "in", "out", engine="ray")
    assert str(refusal.value) == "[CK505]\n  --engine ray needs the package ray\n  try: pip install 'ckptconv[ray]'"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999", "ray://127.0.0.1:1"])
def test_an_address_where_nobody_is(source, address):
    with pytest.raises(ckptconv.OutputError) as refusal:
        ckptconv.run("fused.yaml", "in", "out", engine="ray", ray_address=address)
    (problem,) = refusal.value.problems
    assert (problem.code, problem.where) == ("CK511", address)
    assert problem.what.startswith("the cluster cannot be reached: ")


def test_nobody_imports_ray_who_does_not_ask_for_it(source):
    code = (
        "import sys, ckptconv; from ckptconv.cli import cli; from ckptconv.stage import batching; "
        "ckptconv.run('fused.yaml', 'in', 'plain'); print('ray' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
