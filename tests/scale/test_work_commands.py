"""The command lines of docs/scale.md, as they stand there, by the launchers themselves or with what these put into the environment."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

import ckptconv
from ckptconv.cli import cli

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent


def block(heading, language="sh"):
    section = PAGE.split(f"\n{heading}\n", 1)[1]
    return re.search(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    torch.save({f"module.layers.{at}.w": torch.full((1000,), float(at)) for at in range(12)}, tmp_path / "in.pth")
    monkeypatch.chdir(tmp_path)
    ckptconv.run("dataparallel", "in.pth", "wanted.pth")
    return tmp_path


def command(*words, env=None):
    """The command in this process: code, stdout, stderr."""
    done = CliRunner().invoke(cli, list(map(str, words)), env={"NO_COLOR": "1", "COLUMNS": "160", **(env or {})}, standalone_mode=False)
    code = done.return_value if done.exception is None else getattr(done.exception, "exit_code", done.exception)
    return code or 0, done.stdout, done.stderr


def planned():
    assert command("plan", "dataparallel", "in.pth", "out.pth", "--out", "plan.json", "--task-size", "9kB")[0] == 0


def shell(text, folder, **env):
    """What a person's shell makes of it, `ckptconv` on the path."""
    (folder / "bin").mkdir(exist_ok=True)
    ours = folder / "bin/ckptconv"
    ours.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ckptconv "$@"\n')
    ours.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}/bin:{BIN}:{os.environ['PATH']}", "NO_COLOR": "1", "COLUMNS": "160", **env}
    return subprocess.run(["sh", "-ec", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def converted(folder):
    return (folder / "out.pth").read_bytes() == (folder / "wanted.pth").read_bytes()


def small_tasks(text):
    """The same command, on a checkpoint of kilobytes."""
    return text.replace("--out plan.json", "--out plan.json --task-size 9kB")


def test_torchrun(folder):
    done = shell(small_tasks(block("### torchrun")), folder, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"(\d) tasks done here", done.stdout) == ["3", "3"]
    assert converted(folder)


def test_ssh(folder):
    (folder / "bin").mkdir()
    (folder / "bin/ssh").write_text('#!/bin/sh\nshift\ncd / && exec sh -c "$*"\n')
    (folder / "bin/ssh").chmod(0o755)
    done = shell(small_tasks(block("### Several machines by ssh")), folder)
    assert done.returncode == 0, done.stderr
    assert sum(map(int, re.findall(r"(\d) tasks done here", done.stdout))) == 6
    assert converted(folder)


def test_a_slurm_array(folder):
    text = block("### A Slurm array")
    assert re.search(r"^#SBATCH --array=0-\d+$", text, re.MULTILINE)
    planned()
    found = []
    for at in range(3):
        environment = {
            "SLURM_ARRAY_TASK_ID": str(at),
            "SLURM_ARRAY_TASK_COUNT": "3",
            "SLURM_ARRAY_TASK_MIN": "0",
            "SLURM_CPUS_PER_TASK": "1",
        }
        done = shell(text, folder, **environment)
        assert done.returncode == 0, done.stderr
        found += re.findall(r"(\d) tasks done here", done.stdout)
    assert found == ["2", "2", "2"]
    assert command("finish", "plan.json")[0] == 0
    assert converted(folder)


def test_a_kubernetes_job(folder):
    job = yaml.safe_load(block("### A Kubernetes Job", "yaml"))
    assert job["spec"]["completionMode"] == "Indexed"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    given = {each["name"]: each["value"] for each in container["env"]}
    assert given == {"JOB_COMPLETIONS": str(job["spec"]["completions"])}
    planned()
    words = [word.replace("/data", str(folder)) for word in container["command"]]
    assert words[0] == "ckptconv"
    done = [command(*words[1:], env={**given, "JOB_COMPLETION_INDEX": str(index)}) for index in range(job["spec"]["completions"])]
    assert [int(re.search(r"(\d) tasks done here", out)[1]) for code, out, _ in done if code == 0] == [2, 1, 2, 1]
    assert command("finish", "plan.json")[0] == 0
    assert converted(folder)


def test_what_the_commands_say(folder):
    code, out, _ = command("plan", "dataparallel", "in.pth", "out.pth", "--out", "plan.json", "--task-size", "9kB")
    assert out.splitlines()[-1].endswith("; 6 tasks, which read the source 1.00 times")
    assert "not begun" in command("status", "plan.json")[1]
    worked = json.loads(command("work", "plan.json", "--index", "1", "--of", "3", "--json")[1])
    assert (worked["tasks"], worked["total"], worked["done"], worked["nbytes"]) == ([2, 3], 6, 2, 16_000)
    status = json.loads(command("status", "plan.json", "--json")[1])
    assert (status["done"], status["missing"], status["done_nbytes"]) == ([2, 3], [0, 1, 4, 5], 16_000)
    shown = command("status", "plan.json")[1]
    assert "  done     2 tasks, 16.0 kB (33%)" in shown
    assert "  missing  4 tasks: 0-1, 4-5" in shown
    code, _, err = command("finish", "plan.json", "--report", "failed.json")
    work = folder / ".out.pth.ckptconv-work"
    assert (code, err) == (
        4,
        f"error: {work}  [CK416]\n  4 of 6 tasks are not done\n  found: tasks 0-1, 4-5\n  try: ckptconv work plan.json\n",
    )
    assert json.loads((folder / "failed.json").read_text())["exit_code"] == 4
    code, out, _ = command("work", "plan.json", "--index", "0", "--of", "3", "--claim", "-v")
    assert out.splitlines()[0].startswith("  task 0: 2 tensors, ")
    assert out.splitlines()[-1].startswith("4 tasks done here, 32.0 kB in ")
    assert "all done: ckptconv finish puts it in place" in command("status", "plan.json")[1]
    finished = json.loads(command("finish", "plan.json", "--json", "--report", "report.json")[1])
    assert finished["verification"]["reached"] == "L0 L1 L3"
    assert json.loads((folder / "report.json").read_text()) == finished
    assert converted(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["failed.json", "in.pth", "out.pth", "plan.json", "report.json", "wanted.pth"]
    code, _, err = command("finish", "plan.json")
    assert (code, "the output exists already" in err) == (5, True)


def test_a_resumed_run_says_what_it_kept(folder):
    planned()
    assert command("work", "plan.json", "--index", "0", "--of", "2")[0] == 0
    code, out, err = command("run", "dataparallel", "in.pth", "out.pth", "--resume", "--task-size", "9kB")
    assert code == 0, err
    assert "note: 3 of 6 tasks were done before, checked and kept" in out
    assert converted(folder)


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (["work", "plan.json", "--index", "2", "--of", "2"], 2, "there is no share 2 of 2: the first is 0, the last 1"),
        (["work", "plan.json", "--index", "2"], 2, "--index needs --of: how many workers there are"),
        (["work", "nothing.json"], 2, "the plan cannot be read: No such file or directory"),
        (["plan", "dataparallel", "in.pth", "out.pth", "--out", "plan.json"], 5, "the output exists already"),
    ],
)
def test_words_that_do_not_fit(folder, words, code, what):
    planned()
    found, _, err = command(*words)
    assert (found, what in err) == (code, True), err


def test_the_commands_start_without_what_they_do_not_need():
    code = (
        "import sys; import ckptconv.cli, ckptconv.cli.working; "
        "print([name for name in ('torch', 'numpy', 'pydantic', 'rich', 'asyncio', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_work_that_only_copies_needs_no_torch(folder):
    planned()
    code = "import sys; from ckptconv import api; api.work('plan.json'); api.finish('plan.json', verify=3); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
