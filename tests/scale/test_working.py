"""One conversion by many: whoever does which task, in whatever order and how often, the result is the one of a single run."""

import json
import os
import random
import shutil
import threading
import time

import pytest
import torch
import xxhash

import ckptconv
from ckptconv import api
from ckptconv.errors import FitError, InputError, OutputError
from ckptconv.execute import workfolder
from ckptconv.execute.claims import Claims
from ckptconv.execute.staging import Staging
from ckptconv.stage import working
from ckptconv.stage.planfile import How, open_job


def job_of(case):
    job = open_job(case.planned())
    assert len(job.tasks.tasks) > 5
    return job


def test_tasks_in_any_order_and_twice_give_the_bytes_of_a_run(case):
    job = job_of(case)
    job.start()
    numbers = 2 * list(range(len(job.tasks.tasks)))
    random.Random(1).shuffle(numbers)
    with job.made.sources() as opened:
        for number in numbers:
            job.do(number, opened)
    assert not case.out.exists()
    report = api.finish(case.plan)
    assert case.contents() == case.wanted
    assert report.ladder.reached == "L0 L1 L3"
    assert case.left() == []


def test_workers_with_shares_and_one_that_takes_what_is_left(case):
    plan = case.planned()
    first = api.work(plan, index=1, of=3)
    rest = api.work(plan, claim=True)
    total = len(open_job(plan).tasks.tasks)
    assert 0 < len(first.receipts) < total
    assert {receipt.task for receipt in first.receipts}.isdisjoint(receipt.task for receipt in rest.receipts)
    assert (first.done, rest.done, rest.total) == (len(first.receipts), total, total)
    assert not case.out.exists()
    api.finish(case.plan)
    assert case.contents() == case.wanted


def test_many_workers_at_once_do_every_task_once(shards):
    plan = shards.planned()
    found, errors = [], []

    def work():
        try:
            found.append(api.work(plan))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    done = sorted(receipt.task for each in found for receipt in each.receipts)
    assert done == list(range(found[0].total))
    api.finish(plan)
    assert shards.contents() == shards.wanted


def test_the_same_task_by_two_at_once(file):
    """The bytes are the same, one receipt stands, and nobody sees an error."""
    job = job_of(file)
    job.start()
    errors = []

    def do():
        try:
            with job.made.sources() as opened:
                for _ in range(20):
                    job.do(3, opened)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=do) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(job.done()) == [3]
    assert job.read(3)[0].task == 3
    assert [name for name in os.listdir(job.folder.receipts) if name.startswith(".")] == []
    api.work(file.plan)
    api.finish(file.plan)
    assert file.contents() == file.wanted


def test_finish_before_all_is_done_names_what_is_missing(file):
    plan = file.planned()
    with pytest.raises(FitError) as raised:
        api.finish(plan)
    assert [problem.what for problem in raised.value.problems] == ["no task is done: the work is not begun"]
    done = api.work(plan, index=0, of=2)
    with pytest.raises(FitError) as raised:
        api.finish(plan)
    (problem,) = raised.value.problems
    assert (problem.code, problem.what) == ("CK416", f"{done.total - done.done} of {done.total} tasks are not done")
    assert problem.found == f"tasks {done.done}-{done.total - 1}"
    assert problem.try_ == f"ckptconv work {plan}"
    assert not file.out.exists()


def damaged_bytes(job):
    name = job.tasks.tasks[2].outputs[0]
    file = job.folder.layouts_of(job.tasks.tasks[2].files)[0]
    with open(job.folder.path_of(file.name), "r+b") as stream:
        stream.seek(file.slots[name].offset)
        stream.write(b"\xff\xfe\xfd")


def cut_file(job):
    file = job.folder.layouts_of(job.tasks.tasks[2].files)[0]
    os.truncate(job.folder.path_of(file.name), file.nbytes // 2)


def receipt(job, change):
    path = job.folder.receipts / "000002.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def other_tensors(job):
    """Right in itself, but about a tensor of another task."""
    _, details = job.read(2)
    name, *_ = details.digests
    renamed = details.model_copy(update={"digests": {"other": details.digests[name]}})
    raw = renamed.model_dump_json()
    receipt(job, lambda data: data.update(details=json.loads(raw), digest=xxhash.xxh3_128_hexdigest(raw.encode())))


def no_checksums(job):
    _, details = job.read(2)
    raw = details.model_copy(update={"crc32": {}}).model_dump_json()
    receipt(job, lambda data: data.update(details=json.loads(raw), digest=xxhash.xxh3_128_hexdigest(raw.encode())))


DAMAGES = {
    "other tensors": (other_tensors, "task 2: its receipt is about other tensors"),
    "bytes": (damaged_bytes, "task 2: the bytes that it wrote are not there any more"),
    "a digest": (lambda job: receipt(job, lambda data: data["details"]["digests"].update({job.tasks.tasks[2].outputs[0]: "0" * 32})), "task 2: its receipt is damaged"),
    "not JSON": (lambda job: (job.folder.receipts / "000002.json").write_text("{"), "task 2: its receipt is damaged"),
    "too large": (lambda job: (job.folder.receipts / "000002.json").write_text(" " * 20_000), "task 2: its receipt is too large"),
    "another plan": (lambda job: receipt(job, lambda data: data.update(order="f" * 32)), "task 2: its receipt is of another plan, source or version"),
    "another task": (lambda job: shutil.copy(job.folder.receipts / "000001.json", job.folder.receipts / "000002.json"), "task 2: its receipt is another task's"),
    "unknown words": (lambda job: receipt(job, lambda data: data.update(more=1)), "task 2: its receipt is damaged"),
    "another torch": (lambda job: receipt(job, lambda data: data.update(torch="1.0")), "task 2: it was computed by another torch"),
    "no file beside it": (lambda job: receipt(job, lambda data: data.update(details=None)), "task 2: its receipt lacks the file beside it"),
}  # fmt: skip


@pytest.mark.parametrize("verify", ["auto", None])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_task_is_named_and_only_that_is_done_again(shards, damage, verify):
    job = open_job(shards.planned(verify=verify))
    api.work(shards.plan)
    change, what = DAMAGES[damage]
    change(job)
    with pytest.raises(FitError) as raised:
        api.finish(shards.plan)
    assert (raised.value.problems[0].code, raised.value.problems[0].what) == ("CK416", what)
    assert raised.value.problems[0].try_ == f"ckptconv work {shards.plan}: it will be done again"
    assert not shards.out.exists()
    again = api.work(shards.plan)
    assert [each.task for each in again.receipts] == [2]
    api.finish(shards.plan)
    assert shards.contents() == (shards.wanted if verify == "auto" else shards.contents())
    assert shards.left() == []


def test_a_receipt_without_the_checksums_that_the_format_wants(file):
    job = open_job(file.planned())
    api.work(file.plan)
    no_checksums(job)
    with pytest.raises(FitError) as raised:
        api.finish(file.plan)
    assert raised.value.problems[0].what == "task 2: its receipt lacks checksums"


def test_a_file_that_was_cut_is_made_whole_again(shards):
    job = open_job(shards.planned())
    api.work(shards.plan)
    cut_file(job)
    with pytest.raises(FitError):
        api.finish(shards.plan)
    api.work(shards.plan)
    api.finish(shards.plan)
    assert shards.contents() == shards.wanted


def test_receipts_that_travel_are_small_and_the_others_lie_beside_them(tmp_path):
    torch.save({f"some.quite.long.name.of.a.tensor.{at}": torch.full((2,), float(at)) for at in range(500)}, tmp_path / "in.pth")
    (tmp_path / "many.yaml").write_text("version: 1\nname: many\nsummary: s\nsteps:\n  - rename: {'some.{m:**}': 'other.{m}'}\n")
    ckptconv.plan(tmp_path / "many.yaml", tmp_path / "in.pth", tmp_path / "out.pth", out=tmp_path / "plan.json", task_size="3kB")
    found = api.work(tmp_path / "plan.json")
    receipts = tmp_path / ".out.pth.ckptconv-work" / "receipts"
    assert [each.details for each in found.receipts] == [None] * 2
    assert all(len(each.model_dump_json()) < 1000 for each in found.receipts)
    assert all(path.stat().st_size < 10_000 for path in receipts.glob("*.json"))
    assert len(list(receipts.glob("*.details"))) == 2
    api.finish(tmp_path / "plan.json")
    ckptconv.run(tmp_path / "many.yaml", tmp_path / "in.pth", tmp_path / "wanted.pth")
    assert (tmp_path / "out.pth").read_bytes() == (tmp_path / "wanted.pth").read_bytes()


def test_status_counts_done_claimed_stale_and_missing(file):
    plan = file.planned()
    before = api.status(plan).to_json()
    assert (before["begun"], before["done"], before["done_nbytes"], before["seconds_left"]) == (False, [], 0, None)
    total = before["tasks"]
    api.work(plan, index=0, of=total)
    job = open_job(plan)
    (job.folder.claims / "000001").write_text("")
    (job.folder.claims / "000002").write_text("")
    old = job.folder.claims.stat().st_mtime - 1000
    os.utime(job.folder.claims / "000002", (old, old))
    found = api.status(plan)
    data = found.to_json()
    assert (data["begun"], data["done"], data["claimed"], data["stale"], data["missing"]) == (True, [0], [1], [2], list(range(3, total)))
    assert data["done_nbytes"] == found.tasks.tasks[0].written_nbytes
    assert data["nbytes_per_second"] > 0
    assert found.seconds_left > 0
    assert data["read_amplification"] == 1
    for name in ("000001", "000002"):
        (job.folder.claims / name).unlink()
    api.work(plan)
    assert api.status(plan).seconds_left == 0
    (job.folder.receipts / "000001.json").write_text("{}")
    assert api.status(plan).to_json()["damaged"] == {"1": "its receipt is damaged"}


def other_rules(case):
    path = case.folder / "other.yaml"
    path.write_text("version: 1\nname: other\nsummary: s\nsteps:\n  - drop: gone\n")
    return path


def test_the_folder_is_refused_to_a_plain_run_and_to_another_plan(file):
    plan = file.planned()
    api.work(plan, index=0, of=3)
    work = file.folder / ".out.pth.ckptconv-work"
    with pytest.raises(OutputError) as raised:
        ckptconv.run(file.folder / "many.yaml", file.folder / "in.pth", file.out)
    (problem,) = raised.value.problems
    assert (problem.code, problem.what, problem.found) == ("CK506", "this output is being made in tasks", work.name)
    assert problem.try_ == f"ckptconv finish {plan}, or rm -r {work}"
    with pytest.raises(OutputError) as raised:
        ckptconv.run(other_rules(file), file.folder / "in.pth", file.out, force=True)
    assert raised.value.problems[0].code == "CK506"
    shutil.rmtree(work)
    ckptconv.run(file.folder / "many.yaml", file.folder / "in.pth", file.out)
    assert file.contents() == file.wanted


@pytest.mark.parametrize("kind", ["fresh", "over an old result"])
def test_resume_keeps_what_is_done(case, kind, monkeypatch):
    force = kind != "fresh"
    if force:
        case.out.mkdir() if case.destination == "out" else case.out.write_text("old")
        before = case.contents()
    settings = {**case.options, "task_size": "300", "resume": True, "force": force}
    done, do = [], working.Job.do

    def fails(self, number, *rest, **more):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(number)
        return do(self, number, *rest, **more)

    monkeypatch.setattr(working.Job, "do", fails)
    with pytest.raises(KeyboardInterrupt):
        ckptconv.run(case.folder / "many.yaml", case.folder / case.source, case.out, **settings)
    assert case.contents() == (before if force else None)
    again = []
    monkeypatch.setattr(working.Job, "do", lambda self, number, *rest, **more: again.append(number) or do(self, number, *rest, **more))
    report = ckptconv.run(case.folder / "many.yaml", case.folder / case.source, case.out, **settings)
    total = len(done) + len(again)
    assert set(done).isdisjoint(again)
    assert f"3 of {total} tasks were done before, checked and kept" in report.notes
    assert case.contents() == case.wanted
    assert case.left() == []


def rules(case):
    (case.folder / "many.yaml").write_text(ckpt_rules(case).replace("- drop: gone", "- drop: gone\n  - rename: {n: m}"))


def ckpt_rules(case):
    return (case.folder / "many.yaml").read_text()


def touched(case):
    os.utime(case.folder / "in.pth", (1, 1))


CHANGES = {
    "rules": (rules, {}, "the rules, the plan that the rules make, the output's files, the tasks"),
    "source": (touched, {}, "the source's files"),
    "task size": (lambda case: None, {"task_size": "500"}, "the tasks"),
    "version": (lambda case: case.monkeypatch.setattr(working, "__version__", "99.0"), {}, "the version of ckptconv"),
    "torch": (lambda case: case.monkeypatch.setattr(working, "torch_version", lambda: "99.0"), {}, "the version of torch"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_resume_is_refused_where_something_changed(file, change, monkeypatch, snapshot):
    object.__setattr__(file, "monkeypatch", monkeypatch)
    settings = {"task_size": "300", "resume": True}
    do = working.Job.do

    def fails(self, number, *rest, **more):
        if self.done():
            raise KeyboardInterrupt
        return do(self, number, *rest, **more)

    monkeypatch.setattr(working.Job, "do", fails)
    with pytest.raises(KeyboardInterrupt):
        ckptconv.run(file.folder / "many.yaml", file.folder / "in.pth", file.out, **settings)
    monkeypatch.setattr(working.Job, "do", do)
    deed, more, what = CHANGES[change]
    deed(file)
    work = file.folder / ".out.pth.ckptconv-work"
    before = snapshot(work)
    with pytest.raises(OutputError) as raised:
        ckptconv.run(file.folder / "many.yaml", file.folder / "in.pth", file.out, **settings | more)
    (problem,) = raised.value.problems
    assert snapshot(work) == before
    assert (problem.code, problem.what, problem.where) == (
        "CK507",
        f"the work that is under way was begun with something else: {what}",
        str(work),
    )
    assert problem.try_ == f"go on as it was begun; or --force, or rm -r {work}, to begin anew"
    report = ckptconv.run(file.folder / "many.yaml", file.folder / "in.pth", file.out, **settings | more, force=True)
    assert not any("kept" in note for note in report.notes)
    assert file.left() == []


def test_work_is_refused_while_a_plain_run_makes_the_same_output(file):
    plan = file.planned()
    with Staging(file.out, is_folder=False, force=False) as staging:
        with pytest.raises(OutputError) as raised:
            api.work(plan)
        assert (raised.value.problems[0].code, raised.value.problems[0].found) == ("CK506", staging.path.name)
    api.work(plan)


def test_force_does_not_take_away_what_somebody_works_on(file):
    plan = file.planned()
    job = open_job(plan)
    job.start()
    (job.folder.claims / "000001").write_text("")
    with pytest.raises(OutputError) as raised:
        ckptconv.run(other_rules(file), file.folder / "in.pth", file.out, resume=True, force=True)
    assert (raised.value.problems[0].code, raised.value.problems[0].found) == ("CK506", "000001: None")
    assert job.folder.is_there


def test_a_source_that_changes_while_it_is_worked_on(file):
    plan = file.planned()
    api.work(plan, index=0, of=3)
    touched(file)
    for command in (api.work, api.finish):
        with pytest.raises(InputError) as raised:
            command(plan)
        assert raised.value.problems[0].code == "CK311"
    assert not file.out.exists()


def test_no_worker_asks_for_space_by_writing_where_others_write(file, monkeypatch):
    """Where a filesystem cannot promise space, the C library reads a byte and writes it back: somebody else's, by then."""
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: pytest.fail("bytes of others may be lost"))
    api.work(file.planned())


def test_a_source_that_changes_in_the_middle_of_a_task_leaves_no_receipt(file, monkeypatch):
    fill = working.fill

    def changed_meanwhile(*rest, **more):
        filled = fill(*rest, **more)
        touched(file)
        return filled

    plan = file.planned()
    monkeypatch.setattr(working, "fill", changed_meanwhile)
    with pytest.raises(InputError) as raised:
        api.work(plan)
    assert raised.value.problems[0].code == "CK311"
    work = file.folder / ".out.pth.ckptconv-work"
    assert os.listdir(work / "receipts") == os.listdir(work / "claims") == []


def test_finish_waits_for_who_still_does_a_task_that_another_has_done(file):
    """A straggler writes the same bytes, but not into what is being verified."""
    plan = file.planned()
    api.work(plan)
    job = open_job(plan)
    finishing = threading.Thread(target=api.finish, args=(plan,))
    with Claims(job.folder.claims, job.about).take("000003") as got:
        assert got
        finishing.start()
        while not (job.folder.claims / "finish").exists():
            time.sleep(0.01)
        finishing.join(0.5)
        assert finishing.is_alive()
        assert not file.out.exists()
    finishing.join(60)
    assert file.contents() == file.wanted


def test_truth_values_are_checked_by_task_and_all_of_them_at_the_end(file, monkeypatch):
    looked = []
    for place in ("ckptconv.execute.engine", "ckptconv.stage.working"):
        monkeypatch.setattr(f"{place}.check_truth_values", lambda _, placed: looked.append(set(placed)))
    job = job_of(file)
    api.work(file.plan)
    assert len(looked) == len(job.tasks.tasks)
    assert sum("mask" in names for names in looked) == 1
    api.finish(file.plan)
    assert "gone" in looked[-1]


def test_finish_publishes_over_what_stands_there_only_when_it_is_told(shards):
    plan = shards.planned()
    api.work(plan)
    shards.out.mkdir()
    (shards.out / "model.safetensors").write_text("old")
    with pytest.raises(OutputError) as raised:
        api.finish(plan)
    assert raised.value.problems[0].code == "CK501"
    with pytest.raises(OutputError):
        api.work(plan)
    api.finish(plan, force=True)
    assert shards.contents() == shards.wanted
    assert shards.left() == []


def test_who_is_killed_after_publishing_leaves_what_the_next_one_takes_away(shards, monkeypatch):
    """The new output stands; what it replaced lies in the work folder, and is not taken for staged files."""
    plan = shards.planned()
    shards.out.mkdir()
    (shards.out / "model.safetensors").write_text("old")
    api.work(plan, force=True)

    def killed(_work):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(workfolder, "remove_work", killed)
        with pytest.raises(KeyboardInterrupt):
            api.finish(plan, force=True)
    assert shards.contents() == shards.wanted
    assert shards.left() == [".out.ckptconv-work"]
    status = api.status(plan)
    assert (status.begun, status.stands) == (False, True)
    with pytest.raises(FitError) as raised:
        api.finish(plan, force=True)
    assert raised.value.problems[0].what == "no task is done: the work is not begun"
    assert shards.contents() == shards.wanted
    ckptconv.run(shards.folder / "many.yaml", shards.folder / "in", shards.out, force=True, **shards.options)
    assert shards.contents() == shards.wanted
    assert shards.left() == []


def test_a_target_is_compared_with_when_the_work_is_finished(file):
    names = file.folder / "wanted.json"
    ckptconv.run(file.folder / "many.yaml", file.folder / "in.pth", file.folder / "wanted.pth")
    api.save_manifest(str(file.folder / "wanted.pth"), names)
    plan = file.planned(target=str(names))
    assert file.data()["work"]["target"] == "wanted.json"
    api.work(plan)
    data = json.loads(names.read_text())
    data["tensors"]["n"] = ["float32", 10]
    names.write_text(json.dumps(data))
    with pytest.raises(FitError) as raised:
        api.finish(plan)
    assert raised.value.problems[0].code == "CK403"
    data["tensors"]["n"] = ["float32", 9]
    names.write_text(json.dumps(data))
    report = api.finish(plan)
    assert report.target.endswith("wanted.json")
    assert "target keys filled" in report.ladder.rungs[1].sentence


def test_what_a_rule_allows_to_be_missing_goes_with_the_plan(tmp_path):
    torch.save({"module.a": torch.ones(2)}, tmp_path / "in.pth")
    torch.save({"a": torch.ones(2), "head.w": torch.ones(3)}, tmp_path / "model.pth")
    (tmp_path / "r.yaml").write_text(
        "version: 1\nname: r\nsummary: s\nsteps:\n  - strip_prefix: module.\ntarget: {allow: {missing: ['head.**']}}\n"
    )
    ckptconv.plan(
        tmp_path / "r.yaml", tmp_path / "in.pth", tmp_path / "out.pth", out=tmp_path / "plan.json", target=str(tmp_path / "model.pth")
    )
    api.work(tmp_path / "plan.json")
    report = api.finish(tmp_path / "plan.json")
    assert "allowed to be missing" in report.ladder.rungs[1].sentence
    ckptconv.run(None, tmp_path / "in.pth", tmp_path / "two.pth", plan_file=tmp_path / "plan.json", target=str(tmp_path / "model.pth"))
    assert (tmp_path / "two.pth").read_bytes() == (tmp_path / "out.pth").read_bytes()


def test_more_memory_than_a_worker_may_take_is_refused(file):
    plan = file.planned()
    with pytest.raises(OutputError) as raised:
        api.work(plan, max_memory="1MB")
    assert raised.value.problems[0].code == "CK503"
    assert api.status(plan).claims == {}
    assert How().compare is False
