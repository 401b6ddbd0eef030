"""Batches: only what changed is converted, one bad checkpoint stops nothing, and the lock never says more than is true."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from msgspec.structs import asdict, replace
from safetensors.torch import save_file

import ckptconv
from ckptconv.errors import UsageError
from ckptconv.stage import batch_lock, batch_workers, batching
from ckptconv.stage.batch_lock import NAME, LockFile
from ckptconv.stage.batch_words import jobs_of
from ckptconv.stage.preparing import Options

ROOT = Path(__file__).parent.parent.parent
RULE = "version: 1\nname: mine\nrevision: {revision}\nsummary: s\nvars: {{N: 2}}\nsteps: [{{strip_prefix: module.}}{more}]\n"


def checkpoint(path, value=1.0, size=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"module.a": torch.full((size,), value)}, path)


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for at, name in enumerate(["one", "two", "sub/three"]):
        checkpoint(Path("zoo", f"{name}.pth"), float(at))
    Path("mine.yaml").write_text(RULE.format(revision=1, more=""))
    return Path("zoo")


def at_once(_count):
    """An engine without processes."""

    def engine(requests, tell):
        for request in requests:
            yield batching.convert(request, lambda _stage, done, total, at=request.number: tell(at, done, total))

    return engine


def batch(words=("zoo",), rules="mine.yaml", engine=at_once, **options):
    """(converted: why, unchanged, failed: codes), by output."""
    done = batching.batch(list(words), rules, Path("out"), Options(**{"sync": False, **options}), engine)
    return (
        {each.job.name: each.why for each in done.converted},
        {job.name for job in done.unchanged},
        {each.job.name: [problem.code for problem in each.problems] for each in done.failed},
    )


ALL = {"one.pth", "two.pth", "sub/three.pth"}


def rewritten():
    checkpoint(Path("zoo/one.pth"), 7.0)


def altered():
    raw = bytearray(Path("out/one.pth").read_bytes())
    raw[-1] ^= 1
    Path("out/one.pth").write_bytes(raw)


@pytest.mark.parametrize(
    ("change", "options", "why"),
    [
        (rewritten, {}, {"one.pth": "the source"}),
        (altered, {}, {"one.pth": "the output was altered"}),
        (lambda: Path("out/one.pth").unlink(), {}, {"one.pth": "the output is gone"}),
        (lambda: Path("mine.yaml").write_text(RULE.format(revision=2, more="")), {}, dict.fromkeys(ALL, "rules: mine@1, now mine@2")),
        (lambda: Path("mine.yaml").write_text(RULE.format(revision=1, more=", {rename: {a: b}}")), {}, dict.fromkeys(ALL, "rules: another meaning")),
        (lambda: None, {"set": ["N=3"]}, dict.fromkeys(ALL, "options")),
        (lambda: None, {"verify": 0}, dict.fromkeys(ALL, "options")),
        (lambda: Path("zoo/config.json").write_text("{}"), {}, {"one.pth": "the source", "two.pth": "the source"}),
        (lambda: None, {"threads": 7, "timeout": 3.0}, {}),
        (lambda: os.utime("zoo/one.pth"), {}, {}),
        (lambda: os.utime("out/one.pth"), {}, {}),
        (lambda: shutil.copytree("zoo", "copy"), {}, {}),
    ],
    ids=["source", "output-altered", "output-gone", "revision", "meaning", "variable", "verify", "config", "threads", "touched", "output-touched", "nothing"],
)  # fmt: skip
def test_what_changed_is_converted_again_and_nothing_else(zoo, change, options, why):
    assert batch() == (dict.fromkeys(ALL, "new"), set(), {})
    change()
    assert batch(**options) == (why, ALL - why.keys(), {})
    assert batch(**options) == ({}, ALL, {}), "and then it is done"
    for name in ALL:
        state = torch.load(Path("out") / name)
        assert next(iter(state.values())).tolist() == torch.load(zoo / name)["module.a"].tolist()


def test_a_file_that_an_option_names_is_part_of_the_work(zoo):
    Path("mine.yaml").write_text(RULE.format(revision=1, more=", {drop: 'base::**'}").replace("strip_prefix: module.", "strip_prefix: {prefix: module., where: some}"))  # fmt: skip
    checkpoint(Path("base.pth"))
    assert batch(also=["base=base.pth"])[0].keys() == ALL
    os.utime("base.pth")
    assert batch(also=["base=base.pth"]) == ({}, ALL, {})
    checkpoint(Path("base.pth"), 3.0)
    assert batch(also=["base=base.pth"]) == (dict.fromkeys(ALL, "options"), set(), {})


def test_what_is_unchanged_is_not_read(zoo, monkeypatch):
    batch()
    os.utime("zoo/one.pth")
    batch()
    monkeypatch.setattr(batch_lock, "_digest", None)
    assert batch() == ({}, ALL, {})


def test_of_what_was_touched_only_that_is_read(zoo, monkeypatch):
    checkpoint(Path("base.pth"))
    Path("mine.yaml").write_text(
        Path("mine.yaml").read_text().replace("strip_prefix: module.", "strip_prefix: {prefix: module., where: some}")
    )
    batch(also=["base=base.pth"])
    os.utime("out/one.pth")
    read, digest = [], batch_lock._digest
    monkeypatch.setattr(batch_lock, "_digest", lambda path: read.append(str(path)) or digest(path))
    assert batch(also=["base=base.pth"]) == ({}, ALL, {})
    assert read == ["out/one.pth"]


def test_the_digest_of_one_file_is_that_of_its_bytes(zoo):
    import xxhash

    batch()
    entry = json.loads(Path("out", NAME).read_text())["outputs"]["one.pth"]
    assert entry["output"]["digest"] == "xxh3_128:" + xxhash.xxh3_128_hexdigest(Path("out/one.pth").read_bytes())
    assert entry["made_of"]["digest"] == "xxh3_128:" + xxhash.xxh3_128_hexdigest(Path("zoo/one.pth").read_bytes())
    assert (entry["source"], entry["rules"], entry["verified"]) == ("../zoo/one.pth", "mine@1", "L0 L1 L3")


def test_the_old_output_stands_until_there_is_a_new_one(zoo):
    batch()
    before, lock = Path("out/one.pth").read_bytes(), Path("out", NAME).read_text()
    whole = Path("zoo/one.pth").read_bytes()
    Path("zoo/one.pth").write_bytes(whole[:300])
    assert batch() == ({}, ALL - {"one.pth"}, {"one.pth": ["CK302"]})
    assert Path("out/one.pth").read_bytes() == before
    assert Path("out", NAME).read_text() == lock
    Path("zoo/one.pth").write_bytes(whole)
    assert batch() == ({}, ALL, {}), "the source is again what the output was made of"


def test_what_somebody_else_put_there_is_not_overwritten_unasked(zoo):
    checkpoint(Path("out/one.pth"), 9.0)
    before = Path("out/one.pth").read_bytes()
    assert batch()[2] == {"one.pth": ["CK501"]}
    assert Path("out/one.pth").read_bytes() == before
    assert batch(force=True) == ({"one.pth": "new"}, ALL - {"one.pth"}, {})
    checkpoint(Path("other/one.pth"), 5.0)
    assert batch(["other"])[2] == {"one.pth": ["CK501"]}, "nor what was made of another source"


def test_killed_between_an_output_and_its_entry(zoo, monkeypatch):
    put = LockFile.put

    def killed(self, outputs=None, **more):
        if outputs:
            raise KeyboardInterrupt
        put(self, outputs, **more)

    with monkeypatch.context() as patch:
        patch.setattr(LockFile, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            batch()
    made = {str(path.relative_to("out")) for path in Path("out").rglob("*.pth")}
    assert len(made) == 1
    assert batch() == (dict.fromkeys(ALL, "new"), set(), {}), "what stands there is the batch's own, and may be replaced"
    assert json.loads(Path("out", NAME).read_text())["started"] == []


def test_threads_and_memory_are_for_all_jobs_together(zoo):
    seen = []

    def engine(count):
        def work(requests, tell):
            seen.append((count, {(each.options["threads"], each.options["max_memory"]) for each in requests}))
            yield from at_once(count)(requests, tell)

        return work

    batching.batch(["zoo"], "mine.yaml", Path("out"), Options(threads=6, max_memory="3GB"), engine, jobs=3)
    batching.batch(["zoo"], "mine.yaml", Path("more"), Options(threads=2, max_memory="3GB"), engine, jobs=8)
    assert seen == [(3, {(2, "1000000000B")}), (3, {(1, "1000000000B")})]


def test_one_measure_over_all(zoo):
    told = []
    batching.batch(["zoo"], "mine.yaml", Path("out"), Options(), at_once, progress=lambda *each: told.append(each))
    total = sum(path.stat().st_size for path in zoo.rglob("*.pth"))
    assert told[-1] == ("3 of 3 checkpoints", total, total)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


# ---------------------------------------------------------------------------------------------------------------- words


def sharded(folder):
    folder.mkdir(parents=True)
    for at in (1, 2):
        save_file({f"module.{at}": torch.ones(2)}, folder / f"model-{at:05}-of-00002.safetensors")
    weight_map = {f"module.{at}": f"model-{at:05}-of-00002.safetensors" for at in (1, 2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("words", "format", "outputs"),
    [
        (["zoo"], None, ["llama", "one.pth", "sub/three.pth", "two.pth"]),
        (["zoo/**/*.pth"], None, ["one.pth", "sub/three.pth", "two.pth"]),
        (["zoo/*"], None, ["llama", "one.pth", "two.pth"]),
        (["zoo/*/*"], None, ["llama", "sub/three.pth"]),
        (["zoo/[ot]*.pth"], None, ["one.pth", "two.pth"]),
        (["zoo/one.pth", "zoo/sub/three.pth"], None, ["one.pth", "three.pth"]),
        (["zoo/llama"], None, ["llama"]),
        (["zoo/llama/model-00001-of-00002.safetensors", "zoo/llama/model.safetensors.index.json"], None, ["llama"]),
        (["zoo", "zoo/one.pth"], "safetensors", ["llama", "one.safetensors", "sub/three.safetensors", "two.safetensors"]),
        (["zoo/one.pth", "./zoo/../zoo/one.pth"], "torch", ["one.pth"]),
        (["notes.txt"], None, ["notes.txt"]),
    ],
    ids=["folder", "any-depth", "pattern", "one-down", "class", "shell", "index", "a-shard-is-its-folder", "format", "twice", "named"],
)
def test_words(zoo, words, format, outputs):
    sharded(zoo / "llama")
    Path("notes.txt").write_text("named by itself, it is tried")
    (zoo / "README.md").write_text("below a folder, it is none")
    (zoo / ".hidden.pth").write_text("nor is this")
    jobs = jobs_of(words, Path("out"), format)
    assert [job.name for job in jobs] == outputs
    assert [job.output for job in jobs] == [Path("out") / name for name in outputs]


@pytest.mark.parametrize(
    ("words", "out", "problem"),
    [
        (["zoo/on.pth"], "out", "zoo/on.pth  [CK107]\n  there is no such file or folder"),
        (["zoo/*.bin"], "out", "zoo/*.bin  [CK107]\n  there is no checkpoint of this name\n  try: checkpoints end in .safetensors, .pth, .pt, .bin, .ckpt, .th, .tar"),
        (["zoo/one.pth", "zoo/sub/one.pth"], "out", "zoo/one.pth  [CK107]\n  two checkpoints would be written to out/one.pth\n  found: zoo/sub/one.pth\n  try: quote the pattern, so that folders are kept; or two batches into two folders"),
        (["zoo"], "zoo/out", "zoo/out  [CK502]\n  the outputs' folder lies in zoo, where the sources are looked for\n  try: a folder beside it"),
        (["zoo/**"], "zoo/out", "zoo/out  [CK502]\n  the outputs' folder lies in zoo, where the sources are looked for\n  try: a folder beside it"),
        (["zoo/*.pth"], "zoo", "zoo  [CK502]\n  the outputs' folder lies in zoo, where the sources are looked for\n  try: a folder beside it"),
        (["a/x", "zoo/x"], "out", "out/x/one.pth  [CK107]\n  an output would lie in another one, out/x\n  found: a/x/one.pth\n  try: two batches into two folders"),
    ],
    ids=["missing", "no-match", "clash", "out-below", "out-below-pattern", "out-is-in", "nested"],
)  # fmt: skip
def test_words_that_are_refused_before_anything_is_converted(zoo, words, out, problem):
    checkpoint(zoo / "sub" / "one.pth")
    if "a/x" in words:
        checkpoint(Path("a/x/one.pth"))
        sharded(zoo / "x")
        words = ["a", "zoo/x"]
    with pytest.raises(UsageError) as refusal:
        batching.batch(words, "mine.yaml", Path(out), Options(), at_once)
    assert list(map(str, refusal.value.problems)) == [problem]
    assert not Path(out, NAME).exists()


def test_a_name_that_is_no_text(zoo):
    name = os.fsdecode(b"caf\xe9\n.pth")
    checkpoint(Path("in.pth"))
    Path("in.pth").rename(zoo / name)
    assert batch()[0].keys() == {*ALL, "caf\\xe9\n.pth"}
    assert batch() == ({}, {*ALL, "caf\\xe9\n.pth"}, {})
    assert torch.load(Path("out") / name)["a"].shape == (4,)


# ---------------------------------------------------------------------------------------------------------------- the lock

ENTRY = {
    "source": "../zoo/one.pth", "made_of": {"digest": "xxh3_128:" + "0" * 32, "files": {"one.pth": [1, 2, 3]}}, "rules": "mine@1",
    "rules_digest": "sha256:0", "options": {}, "output": {"digest": "xxh3_128:" + "0" * 32, "files": {"one.pth": [1, 2, 3]}},
    "verified": "L0", "ckptconv": "1.0",
}  # fmt: skip


def lock_of(**changes):
    return json.dumps({"ckptconv_lock": 1, "given": {}, "started": [], "outputs": {}, **changes})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid JSON"),
        ("[]", "it should begin with ckptconv_lock: 1"),
        (lock_of(ckptconv_lock=2), "it should begin with ckptconv_lock: 1"),
        (lock_of(ckptconv_lock=True), "it should begin with ckptconv_lock: 1"),
        (lock_of(outputs={"../one.pth": ENTRY}), "an output must lie in the lock's folder"),
        (lock_of(outputs={"/etc/one.pth": ENTRY}), "an output must lie in the lock's folder"),
        (lock_of(outputs={"a//b": ENTRY}), "an output must lie in the lock's folder"),
        (lock_of(started=["a/../../b"]), "an output must lie in the lock's folder"),
        (lock_of(outputs={"one.pth": {**ENTRY, "more": 1}}), "outputs.one.pth.more: Extra inputs are not permitted"),
        (lock_of(outputs={"one.pth": {**ENTRY, "made_of": {"digest": "x", "files": {}}}}), "outputs.one.pth.made_of.digest: String should match"),
        (lock_of(outputs={"one.pth": {**ENTRY, "output": {**ENTRY["output"], "files": {"a": [1, 2]}}}}), "outputs.one.pth.output.files.a: List should have at least 3"),
        (lock_of(outputs=[]), "outputs: Input should be a valid dictionary"),
        ('{"ckptconv_lock": 1, "ckptconv_lock": 1}', "the key 'ckptconv_lock' occurs twice"),
        ("[" * 100_000, "the JSON is nested too deep"),
        (" " * (batch_lock.MAX_LOCK + 1), "the file is larger than 67,108,864 bytes"),
    ],
    ids=["cut", "list", "version", "true", "parent", "root", "slashes", "started", "field", "digest", "pair", "outputs", "twice", "deep", "large"],
)  # fmt: skip
def test_a_lock_that_no_batch_wrote_is_refused(zoo, text, reason, snapshot):
    Path("out").mkdir()
    Path("out", NAME).write_text(text)
    before = snapshot(".")
    with pytest.raises(UsageError) as refusal:
        batch()
    (problem,) = refusal.value.problems
    assert problem.code == "CK111"
    assert problem.what.startswith(f"this is no lock of a batch: {reason}")
    assert problem.where == "out/ckptconv.lock.json"
    assert problem.try_ == "restore it, or remove it: rm out/ckptconv.lock.json; the batch then makes everything again with --force"
    assert snapshot(".") == before


def test_what_a_lock_claims_is_compared_with_the_disk(zoo):
    """A lock that is well-formed and lies: nothing that it names is followed, and nothing is taken for done."""
    Path("out").mkdir()
    Path("out", NAME).write_text(
        lock_of(outputs={"one.pth": {**ENTRY, "source": "/dev/zero"}, "two.pth": {**ENTRY, "source": "../zoo/two.pth"}})
    )
    assert batch() == ({"one.pth": "another source", "two.pth": "rules: another meaning", "sub/three.pth": "new"} | {
        "two.pth": "rules: another meaning"}, set(), {})  # fmt: skip


def test_what_a_killed_writer_left_is_removed(zoo):
    Path("out").mkdir()
    Path("out", f".{NAME}.1-aa.partial").write_text("{")
    batch()
    assert not list(Path("out").glob(".*"))


def test_a_lock_that_cannot_be_written_ends_the_batch(zoo, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LockFile, "_write", full)
    with pytest.raises(ckptconv.OutputError) as refusal:
        batch()
    assert str(refusal.value).startswith(
        "out/ckptconv.lock.json  [CK503]\n  the lock of the batch cannot be written: No space left on device"
    )
    assert not list(Path("out").rglob("*.pth"))


# ---------------------------------------------------------------------------------------------------------------- processes


def start(body):
    """First lines of a worker that does ``body`` before anything else."""
    return batch_workers._START.replace("import main; main()", f"import main; import os, time; {body}; main()")


#: A worker is killed in the middle of its work: everything is written, nothing is renamed.
AT_PUBLISH = (
    "from ckptconv.execute.staging import Staging as S; real = S.publish; "
    "S.publish = lambda self, **more: ({}) if 'one' in self.destination.name else real(self, **more)"
)


def test_a_worker_that_is_killed_fails_only_its_file(zoo, monkeypatch):
    for jobs in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(batch_workers, "_START", start(AT_PUBLISH.format("os.kill(os.getpid(), 9)")))
            report = ckptconv.batch(["zoo"], "mine.yaml", f"out{jobs}", jobs=jobs)
        assert [item.output for item in report.converted] == [f"out{jobs}/sub/three.pth", f"out{jobs}/two.pth"]
        assert [str(item.problems[0]) for item in report.failed] == [
            "zoo/one.pth  [CK510]\n  the process that converted it ended by signal 9\n"
            "  try: memory may have run out: --jobs 1, or --max-memory"
        ]
        assert report.exit_code == 5
    again = ckptconv.batch(["zoo"], "mine.yaml", "out1")
    assert ([item.output for item in again.converted], len(again.unchanged)) == (["out1/one.pth"], 2)
    assert not list(Path("out1").rglob(".*"))


DRIVER = """
import sys
from ckptconv.stage import batch_workers
batch_workers._START = {start!r}
from ckptconv.__main__ import main
sys.argv = ["ckptconv", "batch", "zoo", "-r", "mine.yaml", "-o", "out", "--jobs", "2"]
main()
"""


def workers_of(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def until(question, seconds=30):
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_ended_at_any_time_the_lock_tells_the_truth_and_the_next_run_goes_on(zoo, name):
    code = DRIVER.format(start=start(AT_PUBLISH.format("open('waiting', 'w').close(), time.sleep(600)")))
    child = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    until(
        lambda: (
            Path("waiting").exists()
            and Path("out/two.pth").exists()
            and '"two.pth"' in Path("out", NAME).read_text().partition("outputs")[2]
        )
    )
    workers = workers_of(child.pid)
    assert workers
    child.send_signal(getattr(signal, name))
    said = child.communicate(timeout=30)[1].decode()
    assert child.returncode == {"SIGKILL": -9, "SIGINT": 130, "SIGTERM": 143}[name]
    assert said == ("" if name == "SIGKILL" else "interrupted: the output is whole, or as it was before\n")
    until(lambda: not any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text() for pid in workers))
    assert not Path("out/one.pth").exists()
    assert not list(Path("out").rglob(".*")), "a worker whose batch is gone tidies up"
    done = set(json.loads(Path("out", NAME).read_text())["outputs"])
    assert "two.pth" in done
    assert "one.pth" not in done
    report = ckptconv.batch(["zoo"], "mine.yaml", "out")
    assert {Path(item.output).relative_to("out").as_posix() for item in report.converted} == ALL - done
    assert (len(report.unchanged), report.failed) == (len(done), ())


def test_two_batches_at_once_share_the_work_and_the_lock(zoo):
    for at in range(20):
        checkpoint(zoo / f"{at:02}.pth", float(at))
    command = [sys.executable, "-m", "ckptconv", "batch", str(zoo.absolute()), "-r", str(Path("mine.yaml").absolute()), "-o", str(Path("out").absolute()), "--jobs", "2", "--json"]  # fmt: skip
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    found = [json.loads(each.communicate(timeout=60)[0]) for each in running]
    assert [report["failed"] for report in found] == [[], []]
    assert all(len(report["converted"]) + len(report["unchanged"]) == 23 for report in found)
    assert len(json.loads(Path("out", NAME).read_text())["outputs"]) == 23
    assert batch(rules=str(Path("mine.yaml").absolute()))[1] == {*ALL, *(f"{at:02}.pth" for at in range(20))}
    assert {path.name: torch.load(path)["a"][0].item() for path in Path("out").glob("[0-9]*.pth")} == {
        f"{at:02}.pth": float(at) for at in range(20)
    }


def test_what_another_batch_is_making_is_tried_again_at_the_end(zoo):
    met = []

    def engine(count):
        def work(requests, tell):
            met.append([Path(each.source).name for each in requests])
            for request in requests:
                if len(met) == 1 and "one" in request.source:
                    yield batching.Answer(
                        request.number, problems=({"code": "CK506", "what": "", "where": "", "found": "", "try": ""},), exit_code=5
                    )
                else:
                    yield batching.convert(request)

        return work

    assert batch(engine=engine)[0].keys() == ALL
    assert met == [["one.pth", "three.pth", "two.pth"], ["one.pth"]]


# ---------------------------------------------------------------------------------------------------------------- the command


def test_bad_ones_are_named_at_the_end_and_the_code_is_the_highest(zoo, cli):
    Path("zoo/bad.pth").write_text("no checkpoint")
    save_file({"other": torch.ones(1)}, "zoo/misfit.safetensors")
    done = cli("batch", "zoo", "-r", "mine.yaml", "-o", "out", "--report", "report.json", cwd=".")
    assert done.code == 3
    *told, summary = done.out.splitlines()
    assert sorted(told) == [f"zoo/{name} -> out/{name}" for name in sorted(ALL)]
    assert summary.startswith("mine@1: 3 converted, 0 unchanged, 2 not converted, 6.0 kB, ")
    assert done.err.splitlines()[:4] == [
        "not converted: zoo/bad.pth",
        "error: zoo/bad.pth  [CK301]",
        "  this is a text file, not a checkpoint",
        "  found: no checkpoint",
    ]
    assert done.err.splitlines()[4] == "not converted: zoo/misfit.safetensors"
    assert "[CK201]" in done.err.splitlines()[5]
    report = json.loads(Path("report.json").read_text())
    assert [(item["source"], item["exit_code"]) for item in report["failed"]] == [("zoo/bad.pth", 3), ("zoo/misfit.safetensors", 2)]
    dry = cli("batch", "zoo", "-r", "mine.yaml", "-o", "out", "--dry-run", cwd=".")
    assert dry.out.splitlines()[:2] == ["zoo/bad.pth -> out/bad.pth  (new)", "zoo/misfit.safetensors -> out/misfit.safetensors  (new)"]
    assert dry.code == 0
    quiet = cli("batch", "zoo/*.pth", "-r", "mine.yaml", "-o", "out", "-q", cwd=".")
    assert (quiet.code, quiet.out) == (3, "")


def test_what_is_wrong_with_the_whole_batch_is_said_once(zoo, cli):
    for words, code in [
        (["-r", "mine.yaml", "--set", "1"], "CK107"),
        (["-r", "nobody"], "CK105"),
        (["-r", "mine.yaml", "--max-memory", "x"], "CK107"),
    ]:
        done = cli("batch", "zoo", *words, "-o", "out", cwd=".")
        assert (done.code, done.out) == (2, "")
        assert done.err.count("error: ") == 1
        assert code in done.err
    assert not Path("out", NAME).exists()


def test_a_dry_run_writes_nothing(zoo, snapshot):
    before = snapshot(".")
    report = ckptconv.batch(["zoo"], "mine.yaml", "out", dry_run=True)
    assert {item.why for item in report.converted} == {"new"}
    assert snapshot(".") == before
    assert not Path("out").exists()


def test_a_source_that_changes_while_it_is_converted_is_not_recorded(zoo, monkeypatch):
    take = batch_lock.take

    def late(paths):
        if "one.pth" in paths and "zoo" in paths["one.pth"].parts:
            os.utime(paths["one.pth"])
        return take(paths)

    monkeypatch.setattr(batching, "take", late)
    assert batch()[2] == {"one.pth": ["CK311"]}


def test_a_request_is_plain_data(zoo):
    request = batching._request(
        0, jobs_of(["zoo/one.pth"], Path("out"))[0], "mine.yaml", "d", Options(config=Path("c.json"), also={"b": Path("x")}), None
    )
    assert batching.Request(**json.loads(json.dumps(asdict(request)))) == replace(request)
