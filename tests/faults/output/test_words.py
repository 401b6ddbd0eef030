"""Rows 126 and 135: nobody reads, or nothing more can be written of, the words. The conversion is not touched by it, the code is."""

import errno
import json
import os
import subprocess
import sys

import pytest

LOST = "error: standard output  [CK503]\n  the report cannot be printed: No space left on device\n  try: free some space, or --quiet\n"
RUN = ["run", "dataparallel", "in.pth", "out.pth"]


def shell(place, words, redirect):
    """The command as a shell runs it, and its own exit code whatever the pipe says."""
    line = f'"{sys.executable}" -m ckptconv {words} {redirect}; exit ${{PIPESTATUS[0]}}'
    return subprocess.run(
        ["bash", "-c", line], cwd=place, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1", "COLUMNS": "160"}
    )


@pytest.mark.parametrize("json_", [[], ["--json"]], ids=["text", "json"])
def test_a_full_disk_for_the_words(place, commands, json_):
    done = commands.run(*RUN, *json_, cwd=place, out="/dev/full")
    assert (done.code, done.err) == (5, LOST)
    assert commands.run("verify", "out.pth", "--against", "in.pth", "--rules", "dataparallel", cwd=place).code == 0
    quiet = commands.run(*RUN, "--force", "--quiet", cwd=place, out="/dev/full")
    assert (quiet.code, quiet.err) == (0, "")


def test_a_full_disk_for_the_words_of_a_failure(place, commands):
    """The first reason's code is kept."""
    done = commands.run("run", "dataparallel", "nothing.pth", "out.pth", "--json", cwd=place, out="/dev/full")
    assert (done.code, done.err) == (3, LOST)


@pytest.mark.parametrize(
    ("argv", "code"),
    [(RUN, 0), (["inspect", "in.pth"], 0), (["diff", "in.pth", "in"], 1), (["inspect", "nothing.pth", "--json"], 3), (["--help"], 0)],
)
def test_a_reader_who_left(place, commands, argv, code):
    """The rest goes nowhere; the code is that of the work."""
    reading, writing = os.pipe()
    os.close(reading)
    done = commands.run(*argv, cwd=place, out=f"/proc/{os.getpid()}/fd/{writing}", during=lambda _: None)
    os.close(writing)
    assert (done.code, done.err) == (code, "")


def test_head(place):
    done = shell(place, "inspect in --flat", "| head -1")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    failed = shell(place, "inspect nothing.pth", "2>&1 | true")
    assert (failed.returncode, failed.stderr) == (3, "")


@pytest.mark.parametrize("redirect", ["2>&-", "<&- >&- 2>&-"])
def test_closed_streams(place, commands, redirect):
    """The number of a closed stream is not given to the output: no warning of a library gets into it."""
    done = shell(place, "run dataparallel in.pth out.pth", redirect)
    assert (done.returncode, done.stderr) == (0, "")
    assert commands.run("verify", "out.pth", "--against", "in.pth", "--rules", "dataparallel", cwd=place).code == 0
    assert shell(place, "inspect nothing.pth", redirect).returncode == 3


def test_a_report_that_has_no_place(place, commands):
    """The output stands; the code and the message speak of the report only."""
    done = commands.run(*RUN, "--force", "--quiet", "--report", "no/report.json", cwd=place)
    message = f"error: {place}/no/report.json  [CK503]\n  the folder {place}/no does not exist\n  try: mkdir -p {place}/no\n"
    assert (done.code, done.err) == (5, message)
    assert commands.run("verify", "out.pth", "--against", "in.pth", "--rules", "dataparallel", cwd=place).code == 0


def test_a_full_disk_for_the_report(place, commands):
    for _ in range(2):  # over what is there, as the runs below
        assert commands.run(*RUN, "--report", "report.json", "--force", cwd=place).code == 0
    of_report = [at for at, (_, path) in enumerate(commands.calls(), 1) if "/.report.json" in path]
    report = (place / "report.json").read_bytes()
    for at in of_report[:-1]:
        done = commands.run(*RUN, "--report", "report.json", "--force", "--quiet", cwd=place, fault=f"*:{at}:error={errno.ENOSPC}")
        message = f"error: {place}/report.json  [CK503]\n  the output cannot be written: no space left on the disk\n  try: free some space, or write elsewhere\n"
        assert (done.code, done.err) == (5, message)
        assert (place / "report.json").read_bytes() == report
        assert sorted(path.name for path in place.iterdir()) == ["in", "in.pth", "out.pth", "report.json"]
    assert json.loads(report)["destination"]["written"] is True
    assert commands.run("verify", "out.pth", "--against", "in.pth", "--rules", "dataparallel", cwd=place).code == 0
