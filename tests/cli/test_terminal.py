"""What stands on a terminal, and what in a pipe: colour, width, progress."""

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import threading

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
LONG = "encoder." + "very_long_module_name." * 8 + "weight"


def on_terminal(*arguments, cwd, columns=80, **environment):
    """The command's exit code, stdout and stderr, each of these a terminal of its own."""
    terminals, texts = [os.openpty() for _ in range(2)], [b"", b""]
    for _, slave in terminals:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptconv", *map(str, arguments)], cwd=cwd, stdout=terminals[0][1], stderr=terminals[1][1],
        env={**kept, "TERM": "xterm-256color", "PYTHONPATH": ROOT, **environment},
    )  # fmt: skip
    for _, slave in terminals:
        os.close(slave)

    def read(at):
        while True:
            try:
                part = os.read(terminals[at][0], 65536)
            except OSError:  # a terminal whose other end is closed
                part = b""
            if not part:
                break
            texts[at] += part
        os.close(terminals[at][0])

    readers = [threading.Thread(target=read, args=(at,)) for at in range(2)]
    for reader in readers:
        reader.start()
    code = process.wait(timeout=60)
    for reader in readers:
        reader.join()
    return (code, *(text.decode().replace("\r\n", "\n") for text in texts))


@pytest.fixture
def folder(tmp_path):
    state = {f"module.layers.{i}.attn.qkv.weight": torch.ones(6, 2) for i in range(12)} | {f"module.{LONG}": torch.ones(3)}
    torch.save(state, tmp_path / "in.pth")
    torch.save({"other": torch.ones(1)}, tmp_path / "b.pth")
    return tmp_path


COMMANDS = [["inspect", "in.pth"], ["inspect", "in.pth", "--tree"], ["plan", "dataparallel", "in.pth"], ["diff", "in.pth", "b.pth"]]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_narrow_terminal_without_colour(folder, words):
    _, out, err = on_terminal(*words, cwd=folder, columns=60, NO_COLOR="1")
    assert "\x1b" not in out + err
    assert max(map(len, out.split("\n"))) <= 60
    assert "…" not in out, "nothing is cut, it goes on in the next line"
    if "--tree" not in words:
        assert LONG.replace("_", "") in re.sub(r"[\s_]|\[3\] float32|12 B", "", out)
    if "plan" in words:
        lines = out.split("\n")
        at = next(at for at, line in enumerate(lines) if line.startswith("  renamed  13  "))
        assert lines[at + 1].startswith(" " * len("  renamed  13  ")), "what goes on stands under its beginning"


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_pipe_gets_plain_whole_lines(folder, words, cli):
    result = cli(*words, cwd=folder, env={"NO_COLOR": "", "TERM": "xterm-256color"})
    assert "\x1b" not in result.out + result.err
    if "--tree" not in words:
        assert sum(LONG in line for line in result.out.split("\n")) == 1


def test_a_terminal_has_colours(folder):
    assert "\x1b[" in on_terminal("plan", "dataparallel", "in.pth", cwd=folder)[1]


def test_progress_is_drawn_on_stderr_and_only_on_a_terminal(folder, cli):
    words = ["run", "dataparallel", "in.pth", "out.pth", "--force"]
    code, out, err = on_terminal(*words, cwd=folder)
    assert code == 0
    for stage in ("planning", "verifying"):  # one bar: what is done in between is over too soon to be drawn
        assert stage in err
        assert stage not in out
    assert on_terminal(*words, "--no-progress", cwd=folder)[2] == ""
    assert cli(*words, cwd=folder).err == ""
    assert "verifying" in on_terminal("verify", "out.pth", "--against", "in.pth", "--rules", "dataparallel", cwd=folder)[2]
