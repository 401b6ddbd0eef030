"""A process that has everything imported and forks one command at a time: hundreds of faults in the time of ten starts of Python.

The child runs `ckptconv.__main__.main` as a person's command would: signal handlers, exit code, the interpreter's own end.
"""

import ctypes
import gc
import json
import os
import resource
import signal
import sys


def drop_capabilities():
    """Root without its powers: permissions count for it as for anyone."""
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, nothing) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def run(job):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    os.umask(job["umask"])
    for name, limit in {"RLIMIT_CPU": 100, **job["limits"]}.items():  # what never ends is a failure, not a test that hangs
        resource.setrlimit(getattr(resource, name), (limit, limit))
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, job["out"], os.O_WRONLY), (2, job["err"], os.O_WRONLY)):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if job["plain"]:
        drop_capabilities()
    sys.argv = ["ckptconv", *job["argv"]]
    from ckptconv.__main__ import main

    main()


def serve():
    import ckptconv.api
    import ckptconv.cli
    import ckptconv.cli.streams
    import ckptconv.report.text
    import ckptconv.stage.planfile  # noqa: F401
    from ckptconv.ruleset import builtin

    builtin.find("dataparallel")  # what reads rules is made when it is first asked for

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
