"""Either the whole output stands under its name, or what was there before."""

import os
import subprocess
import sys

import pytest

from ckptconv.errors import OutputError, UsageError
from ckptconv.execute.staging import Staging, refuse_overlap


def codes(error):
    return [problem.code for problem in error.value.problems]


def write(staging, data=b"new", name="out"):
    staging.path_of(name).write_bytes(data)


def test_a_file_appears_as_a_whole(tmp_path):
    with Staging(tmp_path / "out", is_folder=False, force=False) as staging:
        write(staging)
        assert not (tmp_path / "out").exists()
        staging.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_bytes() == b"new"


def test_a_folder_appears_as_a_whole(tmp_path):
    with Staging(tmp_path / "out", is_folder=True, force=False) as staging:
        write(staging, name="a")
        write(staging, name="b")
        staging.publish()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_an_error_leaves_nothing_behind(tmp_path, is_folder):
    def fail():
        with Staging(tmp_path / "out", is_folder=is_folder, force=False) as staging:
            write(staging, name="x")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_refused_without_force(tmp_path):
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(OutputError) as error, Staging(tmp_path / "out", is_folder=False, force=False):
        pass
    assert codes(error) == ["CK501"]
    assert (tmp_path / "out").read_bytes() == b"old"


def test_what_appears_meanwhile_is_not_overwritten(tmp_path):
    def race():
        with Staging(tmp_path / "out", is_folder=False, force=False) as staging:
            write(staging)
            (tmp_path / "out").write_bytes(b"someone else's")
            staging.publish()

    with pytest.raises(OutputError) as error:
        race()
    assert codes(error) == ["CK501"]
    assert (tmp_path / "out").read_bytes() == b"someone else's"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_and_keeps_the_mode(tmp_path):
    (tmp_path / "out").write_bytes(b"old")
    (tmp_path / "out").chmod(0o640)
    with Staging(tmp_path / "out", is_folder=False, force=True) as staging:
        write(staging)
        staging.publish()
    assert (tmp_path / "out").read_bytes() == b"new"
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640


def test_force_replaces_a_folder_as_a_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale").write_bytes(b"old")
    with Staging(tmp_path / "out", is_folder=True, force=True) as staging:
        write(staging, name="a")
        staging.publish()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_new_files_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with Staging(tmp_path / "out", is_folder=False, force=False) as staging:
            write(staging)
            staging.publish()
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(
    ("prepare", "is_folder", "message"),
    [
        (lambda at: (at / "out").symlink_to(at / "elsewhere"), False, "the output is a symbolic link, and links are not followed"),
        (lambda at: (at / "out").mkdir(), False, "a folder stands where the output goes"),
        (lambda at: (at / "out").write_bytes(b""), True, "a file stands where the output goes"),
    ],
)
def test_what_cannot_be_replaced_is_refused_even_with_force(tmp_path, prepare, is_folder, message):
    prepare(tmp_path)
    with pytest.raises(OutputError) as error, Staging(tmp_path / "out", is_folder=is_folder, force=True):
        pass
    assert error.value.problems[0].what == message


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OutputError) as error, Staging(tmp_path / "no" / "out", is_folder=False, force=False):
        pass
    assert error.value.problems[0].what == f"the folder {tmp_path / 'no'} does not exist"
    assert error.value.problems[0].try_.startswith("mkdir -p")


def test_a_dead_runs_leftovers_are_removed_and_a_living_ones_are_not(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from ckptconv.execute.staging import Staging\n"
        "s = Staging(Path(sys.argv[1]), is_folder=False, force=False).__enter__(); print('ready', flush=True); sys.stdin.read(); os._exit(9)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    (theirs,) = tmp_path.iterdir()
    with Staging(tmp_path / "out", is_folder=False, force=False):
        assert theirs.exists(), "its owner lives"
    process.communicate("")
    assert theirs.exists(), "nobody cleaned up after it"
    with Staging(tmp_path / "out", is_folder=False, force=False):
        assert not theirs.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["same", "relative", "hard", "soft"])
def test_the_output_is_never_the_source(tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "in.pth"
    source.write_bytes(b"x")
    (tmp_path / "hard").hardlink_to(source)
    (tmp_path / "soft").symlink_to(source)
    from pathlib import Path

    destination = {"same": source, "relative": Path("./in.pth"), "hard": tmp_path / "hard", "soft": tmp_path / "soft"}[way]
    with pytest.raises(UsageError) as error:
        refuse_overlap(destination, [source])
    assert codes(error) == ["CK502"]


def test_the_output_lies_neither_inside_the_source_nor_around_it(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(UsageError, match="inside the source folder"):
        refuse_overlap(tmp_path / "in" / "out", [tmp_path / "in"])
    with pytest.raises(UsageError, match="the source lies inside the output folder"):
        refuse_overlap(tmp_path, [tmp_path / "in"])
    refuse_overlap(tmp_path / "in2", [tmp_path / "in"])
