"""Either the whole output stands under its name, or what was there before."""

import errno
import os
import subprocess
import sys
from pathlib import Path

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


@pytest.fixture
def other(tmp_path):
    """Another process that stages the same output, until it is told to die without cleaning up."""
    code = (
        "import os, sys; from pathlib import Path; from ckptconv.execute.staging import Staging\n"
        "s = Staging(Path(sys.argv[1]), is_folder=False, force=False).__enter__(); print('ready', flush=True); sys.stdin.read(); os._exit(9)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_a_living_runs_staging_is_respected_and_a_dead_ones_removed(tmp_path, other):
    (theirs,) = tmp_path.iterdir()
    with pytest.raises(OutputError) as error, Staging(tmp_path / "out", is_folder=False, force=True):
        pass
    (problem,) = error.value.problems
    assert (problem.code, problem.what, problem.found) == ("CK506", "another run is writing this output", theirs.name)
    assert list(tmp_path.iterdir()) == [theirs]
    with Staging(tmp_path / "out2", is_folder=False, force=False) as staging:  # beside it there is no quarrel
        staging.publish()
    other.communicate("")
    assert theirs.exists(), "nobody cleaned up after it"
    with Staging(tmp_path / "out", is_folder=False, force=False):
        assert not theirs.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out2"]


def test_where_a_filesystem_has_no_locks_runs_go_on_and_leave_each_other_alone(tmp_path, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with Staging(tmp_path / "out", is_folder=False, force=False) as first:
        with Staging(tmp_path / "out", is_folder=False, force=False) as second:
            assert first.path.exists()
            write(second)
            second.publish()
        assert first.path.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_listed_can_be_written_into(tmp_path, monkeypatch):
    opened = os.open

    def refuse(path, *more):
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *more)

    monkeypatch.setattr("os.open", refuse)
    with Staging(tmp_path / "out", is_folder=False, force=False) as staging:
        write(staging)
        staging.publish(sync=False)
    assert (tmp_path / "out").read_bytes() == b"new"


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_a_name_promises_to_nobody_is_left_alone(tmp_path, is_folder):
    """Names that only look like a staging's: a link that someone planted, a pipe that would hang its reader, a longer name's staging."""
    names = [
        ".out.ckptconv-1-aaaaaaaa.partial",
        ".out.ckptconv-2-aaaaaaaa.partial",
        ".out.ckptconv-x.partial",
        ".out2.ckptconv-1-aaaaaaaa.partial",
    ]
    (tmp_path / "precious").mkdir()
    (tmp_path / names[0]).symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / names[1])
    for name in names[2:]:
        (tmp_path / name).write_bytes(b"")
    with Staging(tmp_path / "out", is_folder=is_folder, force=False):
        pass
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted(["precious", *names[:1], *names[2:]])


def test_a_name_as_long_as_names_can_be(tmp_path):
    for letter in "ab":
        destination = tmp_path / (letter * 251 + ".pth")
        with Staging(destination, is_folder=False, force=False) as staging:
            staging.path.write_bytes(letter.encode())
            staging.publish()
        assert destination.read_bytes() == letter.encode()


def test_what_replaces_something_private_is_private_from_the_start(tmp_path):
    (tmp_path / "file").touch(0o640)
    with Staging(tmp_path / "file", is_folder=False, force=True) as staging:
        assert staging.path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "folder").mkdir(0o750)
    (tmp_path / "folder" / "a").touch(0o640)
    with Staging(tmp_path / "folder", is_folder=True, force=True) as staging:
        assert staging.path.stat().st_mode & 0o777 == 0o700
        write(staging, name="a")
        staging.publish()
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "folder" / "a").stat().st_mode & 0o777 == 0o640


def test_the_size_is_compared_with_the_room_before_anything_is_written(tmp_path):
    with pytest.raises(OutputError) as error, Staging(tmp_path / "out", is_folder=False, force=False, nbytes=1 << 60):
        pass
    (problem,) = error.value.problems
    assert (problem.code, problem.what) == ("CK503", "the output cannot be written: no space left on the disk")
    assert problem.found.startswith("1,152,921,504,606,846,976 bytes to write, ")
    assert problem.try_ == "free some space, or write elsewhere"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_exchange(monkeypatch):
    """A filesystem that knows none of the flags of renameat2."""
    monkeypatch.setattr("ckptconv.execute.renaming._renameat2", lambda old, new, flags: False)


@pytest.mark.usefixtures("no_exchange")
@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_without_exchange_the_next_best_way_gives_the_same(tmp_path, is_folder, there):
    if there and is_folder:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "stale").touch()
    elif there:
        (tmp_path / "out").touch()
    with Staging(tmp_path / "out", is_folder=is_folder, force=there) as staging:
        write(staging)
        staging.publish()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == (["out", "out/out"] if is_folder else ["out"])


@pytest.mark.usefixtures("no_exchange")
@pytest.mark.parametrize("is_folder", [False, True])
def test_without_exchange_what_appears_meanwhile_is_not_overwritten_either(tmp_path, is_folder):
    def race():
        with Staging(tmp_path / "out", is_folder=is_folder, force=False) as staging:
            (tmp_path / "out").mkdir() if is_folder else (tmp_path / "out").touch()
            write(staging)
            staging.publish()

    with pytest.raises(OutputError) as error:
        race()
    assert codes(error) == ["CK501"]
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out"]


def test_what_a_run_was_killed_over_between_two_renames_is_put_back(tmp_path):
    """Only where there is no exchange: the old folder was moved aside, and the new one had not come yet."""
    aside, staged = tmp_path / ".out.ckptconv-7-0123abcd.partial.old", tmp_path / ".out.ckptconv-7-0123abcd.partial"
    for folder in (aside, staged):
        folder.mkdir()
    (aside / "a").write_bytes(b"old")
    with pytest.raises(OutputError) as error, Staging(tmp_path / "out", is_folder=True, force=False):
        pass
    assert codes(error) == ["CK501"]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["out", "out/a"]
    aside.mkdir()  # and one that was killed after both renames
    with Staging(tmp_path / "out", is_folder=True, force=True):
        pass
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["out", "out/a"]


@pytest.mark.parametrize("way", ["same", "relative", "hard", "soft"])
def test_the_output_is_never_the_source(tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "in.pth"
    source.write_bytes(b"x")
    (tmp_path / "hard").hardlink_to(source)
    (tmp_path / "soft").symlink_to(source)
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
