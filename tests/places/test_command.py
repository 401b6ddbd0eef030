"""The command line with URLs: options, help, exit codes, JSON."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from placing import NONE

from ckptconv.cli import cli as commands


def invoke(*arguments):
    found = CliRunner().invoke(commands, [str(word) for word in arguments], standalone_mode=False, catch_exceptions=False)
    return found.exit_code if found.return_value is None else found.return_value, found.output


@pytest.mark.parametrize("command", ["inspect", "plan", "run", "diff", "verify", "explain", "suggest", "invert"])
def test_the_options_are_everywhere(command):
    _, said = invoke(command, "--help")
    for option in ("--online", "--scratch DIR", "--scratch-size SIZE"):
        assert option in said


def test_where_and_how_much(store, tmp_path, source, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "none.yaml").write_text(NONE)
    store.put("bucket/in", source)
    seen = set()
    store.hook = lambda _: seen.update(path.parent.parent.parent for path in (tmp_path / "there").rglob("in"))
    given = ("--scratch", tmp_path / "there", "--scratch-size", "1MB")
    assert invoke("run", tmp_path / "none.yaml", "slow://bucket/in", tmp_path / "out.pth", *given)[0] == 0
    assert seen == {tmp_path / "there"}
    assert not list((tmp_path / "there").iterdir())
    from ckptconv.places.settings import Settings, settings

    assert settings() == Settings()


def test_a_size_that_is_none(tmp_path):
    import click

    with pytest.raises(click.BadParameter, match="'much' is no size"):
        invoke("inspect", "slow://bucket/in", "--scratch-size", "much")


def test_reports_and_failures_as_json(store, scratch, tmp_path, source):
    store.put("bucket/in", source)
    (tmp_path / "none.yaml").write_text(NONE)
    code, said = invoke(
        "run", tmp_path / "none.yaml", "slow://me:hunter2@bucket/none", "slow://bucket/out.pth", "--json", "--report", tmp_path / "r.json"
    )
    assert code == 3
    assert json.loads(said)["problems"][0]["where"] == "slow://***@bucket/none"
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(said)
    code, said = invoke("run", tmp_path / "none.yaml", "slow://bucket/in", "slow://bucket/out.pth", "--json", "--html", tmp_path / "r.html")
    assert code == 0
    assert json.loads(said)["destination"]["path"] == "slow://bucket/out.pth"
    assert "slow://bucket/in" in (tmp_path / "r.html").read_text()
    assert str(scratch) not in (tmp_path / "r.html").read_text() + said


HANGS = """
import sys, threading, fsspec
from fsspec.implementations.memory import MemoryFileSystem

class Hangs(MemoryFileSystem):
    protocol = "hangs"
    def info(self, path, **_):
        return {"name": path, "size": 1 << 20, "type": "file"}
    def cat_file(self, path, start=None, end=None, **_):
        print("asked", flush=True)
        threading.Event().wait()

fsspec.register_implementation("hangs", Hangs)
sys.argv = ["ckptconv", "inspect", "hangs://in.pth"]
from ckptconv.__main__ import main
main()
"""


def test_a_store_that_hangs_can_be_interrupted(tmp_path):
    running = subprocess.Popen(
        [sys.executable, "-c", HANGS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert running.stdout.readline() == "asked\n"
    time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=20)
    assert running.returncode == 130
    assert "interrupted" in said
    assert not list(tmp_path.iterdir())
