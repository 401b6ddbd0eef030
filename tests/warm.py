"""A process that has everything imported and forks one command at a time: hundreds of commands in the time of ten starts of Python.

The child runs `ckptconv.__main__.main` as a person's command would: signal handlers, exit code, the interpreter's own end.
"""

import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import resource
import signal
import sys
import tempfile

#: What a command imports comes as late as it can. These bring most of it, and none of them brings torch.
USUAL = (
    "run dataparallel in.safetensors out.pth",
    "run dataparallel in.safetensors folder --format torch --shard-size 1kB",
    "run dataparallel in.safetensors dcp --format dcp",
    "inspect folder --json",
    "inspect dcp",
    "plan dataparallel in.safetensors --target out.pth --out plan.json",
    "verify out.pth --against in.safetensors",
    "diff in.safetensors out.pth",
    "check dataparallel",
    "test dataparallel",
    "explain out.pth --target in.safetensors",
)


def import_everything():
    """Imports what the usual commands import, as a child that runs them names it: no list of modules grows old, nothing else of a run stays."""
    from ckptconv.cli import cli
    from ckptconv.ruleset import builtin

    reading, writing = os.pipe()
    if os.fork() == 0:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            header = b'{"module.a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
            with open("in.safetensors", "wb") as stream:
                stream.write(len(header).to_bytes(8, "little") + header + bytes(8))
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                codes = [cli(words.split(), prog_name="ckptconv", standalone_mode=False) or 0 for words in USUAL]
            os.chdir("/")
        with os.fdopen(writing, "w") as stream:
            stream.write("\n".join(sys.modules))
        os._exit(max(codes) > 1)
    os.close(writing)
    with os.fdopen(reading) as stream:
        names = stream.read().splitlines()
    _, status = os.wait()
    assert status == 0, "the usual commands failed"
    for name in names:
        importlib.import_module(name)
    builtin.find("dataparallel")


def drop_capabilities():
    """Root without its powers: permissions count for it as for anyone."""
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, nothing) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def run(job):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.path[0] = job["cwd"]  # as `python -m` has it
    os.umask(job.get("umask", 0o022))
    for name, limit in {"RLIMIT_CPU": 100, **job.get("limits", {})}.items():  # what never ends is a failure, not a test that hangs
        resource.setrlimit(getattr(resource, name), (limit, limit))
    for number, path, flags in ((0, job.get("in", os.devnull), os.O_RDONLY), (1, job["out"], os.O_WRONLY), (2, job["err"], os.O_WRONLY)):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if job.get("plain"):
        drop_capabilities()
    sys.argv = ["ckptconv", *job["argv"]]
    from ckptconv.__main__ import main

    main()


def serve():
    import_everything()
    gc.freeze()
    jobs, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    print("ready", file=answers, flush=True)
    for line in jobs:
        child = os.fork()
        if child == 0:
            jobs.close()
            answers.close()
            return json.loads(line)
        print(child, file=answers, flush=True)
        _, status, usage = os.wait4(child, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "maxrss": usage.ru_maxrss * 1024}), file=answers, flush=True)
    return None


if __name__ == "__main__":
    job = serve()
    if job is not None:
        run(job)
