"""Rows 119, 120, 128 and 131: where an output may go, who else is there, and the modes of what is written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faulty import contents, everything, while_stopped

from ckptconv.errors import printable


def link(name, to):
    return lambda at: (at / name).symlink_to(at / to if to.startswith("in") else to)


def touch(name):
    return lambda at: (at / name).write_bytes(b"old")


def model_folder(name, *more):
    def make(at):
        (at / name).mkdir()
        for file in ("model.safetensors", "config.json", *more):
            (at / name / file).parent.mkdir(exist_ok=True)
            (at / name / file).write_bytes(b"old")

    return make


EXISTS = "[CK501]\n  the output exists already, and nothing is ever overwritten unasked\n  try: --force, or another name\n"
LINK = "[CK503]\n  the output is a symbolic link, and links are not followed\n  try: name the link's target\n"
STANDS = "[CK503]\n  a {} stands where the output goes\n  try: another name\n"
MORE = "[CK503]\n  the folder holds more than one converted checkpoint, and --force would take all of it away\n  found: {}\n  try: a new folder, or move out what is yours\n"


@pytest.mark.parametrize(
    ("make", "argv", "message"),
    [
        (touch("out.pth"), ["in.pth", "out.pth"], EXISTS),
        (model_folder("out"), ["in", "out"], EXISTS),
        (link("out.pth", "nowhere"), ["in.pth", "out.pth"], LINK),
        (link("out.pth", "nowhere"), ["in.pth", "out.pth", "--force"], LINK),
        (lambda at: (touch("kept")(at), link("out.pth", "kept")(at)), ["in.pth", "out.pth", "--force"], LINK),
        (lambda at: (model_folder("kept")(at), link("out", "kept")(at)), ["in.pth", "out", "--force"], LINK),
        (lambda at: os.mkfifo(at / "out.pth"), ["in.pth", "out.pth", "--force"], STANDS.format("device or pipe")),
        (touch("out"), ["in", "out", "--force"], STANDS.format("file")),
        (lambda at: (at / "out.pth").mkdir(), ["in.pth", "out.pth"], EXISTS),
        (model_folder("out", "other/notes.txt"), ["in", "out", "--force"], MORE.format("other")),
        (model_folder("out", "resnet50.pth"), ["in", "out", "--force"], MORE.format("resnet50.pth")),
        (lambda at: (at / "docs").mkdir() or (at / "docs" / "thesis.tex").touch(), ["in", "docs", "--force"], MORE.format("thesis.tex")),
        (
            lambda at: None,
            ["in.pth", "o" * 300 + ".pth", "--force"],
            "[CK503]\n  the output cannot be written: File name too long\n  try: a shorter name\n",
        ),
        (lambda at: None, ["in.pth", "no/out.pth"], "[CK503]\n  the folder {at}/no does not exist\n  try: mkdir -p {at}/no\n"),
        (lambda at: None, ["in.pth", "in.pth/out.pth"], "[CK503]\n  the folder {at}/in.pth does not exist\n  try: mkdir -p {at}/in.pth\n"),
    ],
    ids=["file", "folder", "dangling", "dangling-force", "link", "link-to-folder", "pipe", "file-for-folder", "folder-for-file",
         "subfolder", "other-weights", "no-model", "long-name", "no-folder", "file-as-folder"],
)  # fmt: skip
def test_what_is_there_stays(place, commands, make, argv, message):
    """Row 119: exit 5, and every byte, link and mode as it was."""
    make(place)
    before = everything(place)
    done = commands.run("run", "dataparallel", *argv, cwd=place)
    where = argv[1] if message.startswith("[CK503]\n  the folder holds") else printable(place / argv[1])
    assert (done.code, done.err) == (5, f"error: {where}  {message.replace('{at}', str(place))}")
    assert everything(place) == before


SAME = "the output is the source\n  try: another name; sources are never overwritten\n"
INSIDE = "the output lies inside the source folder\n  try: a place outside of it\n"
AROUND = "the source lies inside the output folder\n  try: another folder\n"


@pytest.mark.parametrize(
    ("make", "argv", "message"),
    [
        (lambda at: None, ["in.pth", "in.pth"], SAME),
        (lambda at: None, ["in.pth", "./in.pth"], SAME),
        (lambda at: None, ["./in.pth", "in/../in.pth"], SAME),
        (lambda at: (at / "hard.pth").hardlink_to(at / "in.pth"), ["in.pth", "hard.pth"], SAME),
        (link("soft.pth", "in.pth"), ["in.pth", "soft.pth"], SAME),
        (link("soft.pth", "in.pth"), ["soft.pth", "in.pth"], SAME),
        (lambda at: None, ["in", "in"], SAME),
        (lambda at: None, ["in", "in/out"], INSIDE),
        (lambda at: None, ["in", "in/out.pth"], INSIDE),
        (lambda at: None, ["in", "in/model-00001-of-00002.safetensors"], INSIDE),
        (link("alias", "in"), ["in", "alias/out.pth"], INSIDE),
        (link("alias", "in"), ["alias", "in/out.pth"], INSIDE),
        (lambda at: (at / "hard.safetensors").hardlink_to(at / "in/model-00001-of-00002.safetensors"), ["in", "hard.safetensors"], SAME),
        (lambda at: shutil.copytree(at / "in", at / "sub/in"), ["sub/in", "sub"], AROUND),
    ],
    ids=["same", "dot", "dots", "hard", "soft", "soft-source", "folder", "inside", "file-inside", "a-shard", "alias-inside",
         "inside-alias", "hard-to-shard", "around"],
)  # fmt: skip
@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_the_output_is_never_the_source(place, commands, make, argv, message, force):
    """Row 120: exit 2, under every name that a file can have."""
    make(place)
    before = everything(place)
    done = commands.run("run", "dataparallel", *argv, *force, cwd=place)
    assert (done.code, done.err) == (2, f"error: {Path(argv[1])}  [CK502]\n  {message}")
    assert everything(place) == before


@pytest.mark.parametrize(
    ("argv", "where", "overwritten"),
    [
        (["run", "dataparallel", "in.pth", "out.pth", "--report", "in.pth"], "in.pth", "in.pth"),
        (["run", "dataparallel", "in.pth", "out.pth", "--report", "hard"], "hard", "in.pth"),
        (["run", "dataparallel", "in.pth", "out.pth", "--report", "./out.pth"], "out.pth", "out.pth"),
        (["run", "mine.yaml", "in.pth", "out.pth", "--report", "mine.yaml"], "mine.yaml", "mine.yaml"),
        (["run", "dataparallel", "in", "out", "--report", "in/config.json"], "in/config.json", "a file of in"),
        (["run", "dataparallel", "in.pth", "out.pth", "--also", "x=in", "--report", "in/config.json"], "in/config.json", "a file of in"),
        (["run", "dataparallel", "in.pth", "out.pth", "--config", "in/config.json", "--report", "in/config.json"], "in/config.json", "in/config.json"),
        (["plan", "dataparallel", "in.pth", "--out", "in.pth", "--force"], "in.pth", "in.pth"),
        (["inspect", "in.pth", "--save-manifest", "hard", "--force"], "hard", "in.pth"),
        (["invert", "mine.yaml", "--like", "in.pth", "-o", "in.pth", "--force"], "in.pth", "in.pth"),
        (["invert", "mine.yaml", "--like", "in.pth", "-o", "mine.yaml", "--force"], "mine.yaml", "mine.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_nothing_else_that_is_written_goes_over_what_was_given(place, commands, argv, where, overwritten):
    """A report, a plan, a manifest, a rule: the source and the rule file are as safe from these as from the output itself."""
    (place / "mine.yaml").write_text("version: 1\nname: mine\nsummary: s\nsteps:\n  - strip_prefix: module.\n")
    (place / "hard").hardlink_to(place / "in.pth")
    before = everything(place)
    done = commands.run(*argv, cwd=place)
    message = f"error: {where}  [CK502]\n  this would overwrite {overwritten}, which the command is given\n  try: another name\n"
    assert (done.code, done.err) == (2, message)
    assert everything(place) == before


@pytest.mark.parametrize("argv", [["in.pth", "out.pth"], ["in", "out"]], ids=["file", "folder"])
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_new_outputs_follow_the_umask(place, commands, argv, umask):
    """Row 131."""
    assert commands.run("run", "dataparallel", *argv, cwd=place, umask=umask).code == 0
    out = place / argv[1]
    for path in [out, *out.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_modes_survive_force(place, commands):
    (place / "out.pth").touch(0o640)
    os.chmod(place / "out.pth", 0o640)
    assert commands.run("run", "dataparallel", "in.pth", "out.pth", "--force", cwd=place, umask=0o077).code == 0
    assert (place / "out.pth").stat().st_mode & 0o7777 == 0o640
    assert commands.run("run", "dataparallel", "in", "out", cwd=place).code == 0
    (place / "out").chmod(0o2750)
    (place / "out" / "model.safetensors").chmod(0o440)
    assert commands.run("run", "dataparallel", "in", "out", "--force", cwd=place, umask=0o077).code == 0
    assert (place / "out").stat().st_mode & 0o7777 == 0o2750
    assert (place / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o440
    assert (place / "out" / "config.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("argv", [["in.pth", "out.pth"], ["in", "out"]], ids=["file", "folder"])
def test_a_folder_that_may_not_be_written_into(place, commands, argv):
    closed = place / "closed"
    closed.mkdir(0o555)
    done = commands.run("run", "dataparallel", argv[0], f"closed/{argv[1]}", cwd=place, plain=True)
    message = f"error: {closed / argv[1]}  [CK503]\n  the output cannot be written: Permission denied\n  try: write where you may\n"
    assert (done.code, done.err) == (5, message)
    assert list(closed.iterdir()) == []


def test_a_folder_that_may_not_be_looked_into_is_not_taken_away(place, commands):
    (place / "out").mkdir(0o300)
    done = commands.run("run", "dataparallel", "in", "out", "--force", cwd=place, plain=True)
    message = "the folder cannot be looked into, and --force would take all of it away: Permission denied"
    assert (done.code, done.err) == (5, f"error: out  [CK503]\n  {message}\n  try: a new folder\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to someone else")
@pytest.mark.parametrize("argv", [["in.pth", "out.pth"], ["in", "out"]], ids=["file", "folder"])
def test_someone_elses_output_in_a_sticky_folder(place, commands, argv):
    sticky = place / "sticky"
    sticky.mkdir()
    out = sticky / argv[1]
    assert commands.run("run", "dataparallel", *[argv[0], out], cwd=place).code == 0
    for path in (sticky, out):
        os.chown(path, 4321, 4321)
    sticky.chmod(0o1777)
    before = everything(sticky)
    done = commands.run("run", "dataparallel", argv[0], out, "--force", cwd=place, plain=True)
    message = f"error: {out}  [CK503]\n  the output cannot be written: Operation not permitted\n  try: write where you may\n"
    assert (done.code, done.err) == (5, message)
    assert everything(sticky) == before


def test_a_link_that_appears_meanwhile_is_not_followed(place, commands):
    """The name is taken from the link; what it leads to is not touched."""
    (place / "precious").write_bytes(b"precious")
    (place / "out.pth").write_bytes(b"old")

    def swap():
        (place / "out.pth").unlink()
        (place / "out.pth").symlink_to("precious")

    done = commands.run(
        "run", "dataparallel", "in.pth", "out.pth", "--force", cwd=place, fault="write:1:kill=19", during=while_stopped(swap)
    )
    assert done.code == 0
    assert (place / "precious").read_bytes() == b"precious"
    assert not (place / "out.pth").is_symlink()


@pytest.mark.parametrize("argv", [["in.pth", "out.pth"], ["in", "out"]], ids=["file", "folder"])
@pytest.mark.parametrize("force", [[], ["--force"]], ids=["fresh", "force"])
def test_two_runs_to_one_output(place, commands, argv, force):
    """Row 128: the second is refused at once, the first goes on to its end."""
    if force:
        assert commands.run("run", "dataparallel", *argv, cwd=place).code == 0
    seen = []

    def second():
        # under another name of the same folder
        words = ["run", "dataparallel", argv[0], f"../{place.name}/{argv[1]}", *force]
        seen.append(subprocess.run([sys.executable, "-m", "ckptconv", *words], cwd=place, capture_output=True, text=True))
        seen.append(sorted(path.name for path in place.iterdir() if path.name.startswith(".")))

    done = commands.run("run", "dataparallel", *argv, *force, cwd=place, fault="write:2:kill=19", during=while_stopped(second))
    assert (done.code, done.err) == (0, "")
    refused, (staging,) = seen
    where = os.path.abspath(f"{place}/../{place.name}/{argv[1]}")
    assert (refused.returncode, refused.stderr) == (
        5, f"error: {where}  [CK506]\n  another run is writing this output\n  found: {staging}\n  try: wait until it is done, or another name\n"
    )  # fmt: skip
    assert contents(place / argv[1])
    assert sorted(path.name for path in place.iterdir()) == ["in", "in.pth", argv[1]]


def test_many_runs_into_one_folder_do_not_meet(place):
    """The place is locked, not the folder around it."""
    words = [sys.executable, "-m", "ckptconv", "run", "dataparallel", "in.pth"]
    runs = [subprocess.Popen([*words, f"out-{at}.pth", "--quiet"], cwd=place, stderr=subprocess.PIPE, text=True) for at in range(4)]
    assert [(run.communicate()[1], run.returncode) for run in runs] == [("", 0)] * 4
    assert len({(place / f"out-{at}.pth").read_bytes() for at in range(4)}) == 1
