"""A plan file from elsewhere is a stranger's: validated word by word, its paths confined, no code named, its numbers not believed."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

import ckptconv
from ckptconv import api
from ckptconv.errors import CkptconvError, InputError, OutputError, UsageError
from ckptconv.stage.planfile import How, open_job


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A plan file in a folder of its own, source and destination beside it."""
    folder = tmp_path / "work"
    folder.mkdir()
    (tmp_path / "outside").mkdir()
    torch.save({"module.a": torch.arange(4.0), "module.b": torch.ones(2, 3)}, folder / "in.pth")
    monkeypatch.chdir(folder)
    ckptconv.plan("dataparallel", "in.pth", "out.pth", out="plan.json", task_size="8")
    return folder


def changed(place, **fields):
    data = json.loads((place / "plan.json").read_text())
    data["work"] |= fields
    (place / "plan.json").write_text(json.dumps({**data, "work": {key: value for key, value in data["work"].items() if value is not ...}}))
    return place / "plan.json"


def files_of(place):
    return {str(path.relative_to(place.parent)): path.stat().st_mtime_ns for path in place.parent.rglob("*") if path.name != "plan.json"}


def test_what_stands_in_it(place):
    work = json.loads((place / "plan.json").read_text())["work"]
    status = (place / "in.pth").stat()
    assert work == {
        "source": "in.pth",
        "destination": "out.pth",
        "task_size": "8",
        "files": [["in.pth", status.st_size, status.st_mtime_ns]],
    }
    api.work("plan.json")
    api.finish("plan.json")
    assert list(torch.load(place / "out.pth")) == ["a", "b"]


def test_a_folder_may_be_moved_with_its_plan(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").rename(tmp_path / "moved")
    api.work(tmp_path / "moved/plan.json")
    api.finish(tmp_path / "moved/plan.json")
    assert (tmp_path / "moved/out.pth").exists()


OUTSIDE = {
    "absolute source": lambda place: {"source": str(place.parent / "outside/in.pth")},
    "absolute destination": lambda place: {"destination": str(place.parent / "outside/out.pth")},
    "destination through a link": lambda place: {"destination": "link/out.pth"},
    "source through a link": lambda place: {"source": "in-link.pth"},
    "another source": lambda place: {"also": {"adapter": str(place.parent / "outside/in.pth")}},
}


@pytest.mark.parametrize("where", OUTSIDE)
def test_a_path_outside_of_the_roots_is_refused_unless_it_is_named(place, where):
    (place / "link").symlink_to("../outside")
    (place / "in-link.pth").symlink_to("../outside/in.pth")
    torch.save({"module.a": torch.arange(4.0), "module.b": torch.ones(2, 3)}, place.parent / "outside/in.pth")
    plan = changed(place, **OUTSIDE[where](place))
    before = files_of(place)
    for command in (api.work, api.finish, api.status):
        with pytest.raises(UsageError) as raised:
            command(plan)
        (problem,) = raised.value.problems
        assert (problem.code, problem.what) == ("CK106", "the plan file names a path outside of the folders that it may use")
        assert problem.try_.startswith("--root ")
    assert files_of(place) == before
    if "source" not in where:
        api.work(plan, roots=[place.parent / "outside"])
    else:  # it is read then, and told to be another file
        with pytest.raises((InputError, UsageError)) as raised:
            api.work(plan, roots=[place.parent / "outside"])
        assert raised.value.problems[0].code != "CK106"


@pytest.mark.parametrize(
    "fields",
    [
        {"source": "../outside/in.pth"},
        {"also": {"adapter": "../outside/in.pth"}},
        {"destination": "../out.pth"},
        {"destination": "link/../../out.pth"},
    ],
    ids=str,
)
def test_a_path_does_not_lead_upwards(place, fields):
    """Behind a link to a folder deep inside, `..` is a place inside for the system, and one outside for whoever puts paths together."""
    (place / "a/b/c").mkdir(parents=True)
    (place / "link").symlink_to("a/b/c")
    with pytest.raises(UsageError) as raised:
        api.work(changed(place, **fields), roots=["/"])
    (problem,) = raised.value.problems
    assert (problem.code, problem.what) == ("CK106", "a path of a plan file does not lead upwards")


def test_a_shard_that_is_a_link_out_of_the_roots(place, monkeypatch):
    """A snapshot of the Hugging Face cache: its files are links to blobs, which lie elsewhere."""
    snapshot, blobs = place / "models--a--b/snapshots/r", place / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"module.a": torch.ones(3)}, blobs / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (place / "elsewhere").mkdir()
    ckptconv.plan("dataparallel", snapshot, place / "out", out=place / "other.json")
    data = json.loads((place / "other.json").read_text())
    assert data["work"]["source"] == "models--a--b/snapshots/r"
    data["work"] |= {"source": ".", "destination": str(place / "elsewhere/out")}
    (snapshot / "plan.json").write_text(json.dumps(data))
    monkeypatch.chdir(snapshot)
    with pytest.raises(UsageError) as raised:
        open_job(snapshot / "plan.json", How([place / "elsewhere"]))
    assert raised.value.problems[0].code == "CK106"
    assert raised.value.problems[0].found == str(blobs / "abc")
    open_job(snapshot / "plan.json", How([place]))


BAD = {
    "no source": ({"source": ...}, "source", "Field required"),
    "no destination": ({"destination": ...}, "destination", "Field required"),
    "no files": ({"files": ...}, "files", "Field required"),
    "an unknown word": ({"run": "rm -rf /"}, "run", "Extra inputs are not permitted"),
    "a number for a path": ({"source": 1}, "source", "Input should be a valid string"),
    "an empty path": ({"source": ""}, "source", "String should have at least 1 character"),
    "a NUL in a path": ({"source": "in.pth\0"}, "source", "String should match pattern"),
    "a long path": ({"source": "a" * 5000}, "source", "String should have at most 4096 characters"),
    "an unknown format": ({"format": "pickle"}, "format", "there is no output format of this name: torch, safetensors, dcp"),
    "a rung that is none": ({"verify": 7}, "verify", "Input should be less than or equal to 6"),
    "text for truth": ({"keep_extras": "yes"}, "keep_extras", "Input should be a valid boolean"),
    "many sources": ({"also": {f"n{at}": "in.pth" for at in range(65)}}, "also", "Dictionary should have at most 64 items"),
    "files of another kind": ({"files": [["in.pth", "1", 2]]}, "files.0.1", "Input should be a valid integer"),
    "files of two": ({"files": [["in.pth", 1]]}, "files.0.2", "Field required"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_malformed_plan_is_refused_with_the_word(place, what):
    fields, where, message = BAD[what]
    plan = changed(place, **fields)
    with pytest.raises(UsageError) as raised:
        open_job(plan)
    problems = raised.value.problems
    assert problems[0].code == "CK107"
    assert any(problem.where.startswith(f"{plan}: work.{where}") and message in problem.what for problem in problems), problems


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"shard_size": "5 bananas", "destination": "out"}, "'5 bananas' is no size"),
        ({"task_size": "0"}, "'0' is no size"),
        ({"max_output": "1kB"}, "the output would have"),
        ({"destination": "in.pth"}, "the output is the source"),
        ({"destination": "."}, "the source lies inside the output folder"),
        ({"source": "nothing.pth"}, "the source cannot be opened"),
        ({"destination": "no/out.pth"}, "does not exist"),
    ],
)
def test_words_that_do_not_fit_together(place, fields, what):
    with pytest.raises(CkptconvError) as raised:
        api.work(changed(place, **fields))
    assert what in str(raised.value)
    assert sorted(os.listdir(place)) == ["in.pth", "plan.json"]


@pytest.mark.parametrize("raw", ["", "[]", "1", '{"work": {}}', '{"plan": {}, "work": 3}', "[" * 100_000, '{"work": ' * 1000])
def test_what_is_no_plan(place, raw):
    (place / "plan.json").write_text(raw)
    with pytest.raises(UsageError) as raised:
        open_job(place / "plan.json")
    assert {problem.code for problem in raised.value.problems} == {"CK107"}


def test_a_plan_without_a_destination_is_for_run_only(place):
    ckptconv.plan("dataparallel", "in.pth", out="bare.json")
    with pytest.raises(UsageError) as raised:
        api.work("bare.json")
    assert raised.value.problems[0].what == "the plan names no destination to work on"
    ckptconv.run(None, "in.pth", "out.pth", plan_file="bare.json")
    ckptconv.run(None, "in.pth", "two.pth", plan_file="plan.json")
    assert (place / "out.pth").read_bytes() == (place / "two.pth").read_bytes()


@pytest.mark.parametrize("files", [[["in.pth", 1, 2]], [], [["in.pth", 1, 2]] * 2])
def test_another_source_than_the_planned_one(place, files):
    with pytest.raises(InputError) as raised:
        open_job(changed(place, files=files))
    assert raised.value.problems[0].code == "CK311"


def test_a_target_that_is_code_must_stand_on_the_command_line(place):
    (place / "mine.py").write_text("open('marker', 'w')\n")
    plan = changed(place, target="py:mine:model")
    api.work(plan)
    with pytest.raises(UsageError) as raised:
        api.finish(plan)
    assert (raised.value.problems[0].code, raised.value.problems[0].what) == ("CK106", "a plan file cannot name code as its target")
    api.save_manifest("in.pth", place.parent / "outside/model.json")
    for target in (str(place.parent / "outside/model.json"), f"hf:{place.parent / 'outside'}#Model"):
        with pytest.raises(UsageError) as raised:
            api.finish(changed(place, target=target))
        assert raised.value.problems[0].what == "the plan file names a path outside of the folders that it may use"
    assert not (place / "marker").exists()
    assert not (place / "out.pth").exists()


def test_a_worker_never_builds_a_target(place, monkeypatch):
    from ckptconv import target

    monkeypatch.setattr(target, "manifest_of", lambda *_: pytest.fail("a worker built the target"), raising=False)
    plan = changed(place, target="timm:resnet18")
    api.work(plan)
    assert api.status(plan).seconds_left == 0


def test_a_plan_that_lies_about_its_fingerprints_is_recomputed(place):
    """Nothing of the file says where bytes go: with a changed plan the work is another, and is refused where one is under way."""
    api.work("plan.json", index=0, of=2)
    data = json.loads((place / "plan.json").read_text())
    (one, at, origin), (two, other, _) = data["plan"]["outputs"]
    data["plan"]["outputs"] = [[one, other, origin], [two, at, origin]]  # a takes b's values; the recorded fingerprint stays
    (place / "plan.json").write_text(json.dumps(data))
    for command in (api.work, api.status, api.finish):
        with pytest.raises(OutputError) as raised:
            command("plan.json")
        assert raised.value.problems[0].code == "CK507"
    assert How().roots == ()
