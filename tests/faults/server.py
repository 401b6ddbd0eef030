"""A warm process that forks one child per case: the command line as a person runs it, without a second of imports each time.

Started by ``harness.Server``. One JSON request per line on stdin, one JSON answer per line on stdout. The child has limits on its address
space and its processor time, and an audit hook that notes whatever no reader of a bad file has a reason to do: sockets, commands,
unpickling, files opened for writing.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

from warm import import_everything

WATCHED = ("socket.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn", "subprocess.Popen", "urllib.", "ftplib.", "smtplib.",
           "http.", "poplib.", "imaplib.", "webbrowser.", "pickle.find_class", "ctypes.dlopen", "os.mkdir", "os.rename", "os.remove", "os.rmdir",
           "os.link", "os.symlink", "os.truncate", "shutil.", "tempfile.")  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def warm(with_torch: bool) -> None:
    """Everything that the commands import, once."""
    import_everything()
    if with_torch:
        import torch

        torch.set_num_threads(1)
        torch.ones(2).sum()


def child(request: dict[str, object], base_nbytes: int, events: int) -> None:
    """Runs one command and ends the process with its exit code."""
    os.setsid()
    os.chdir(str(request["cwd"]))
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, request["out"], os.O_WRONLY), (2, request["err"], os.O_WRONLY)):
        os.dup2(os.open(str(name), flags), number)
    os.environ.update(request["env"])  # type: ignore[call-overload]
    seconds = int(request["seconds"])  # type: ignore[call-overload]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    if request["mb"]:
        nbytes = base_nbytes + (int(request["mb"]) << 20)  # type: ignore[call-overload]
        resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))
    here = os.getcwd()

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            wanted = isinstance(flags, int) and flags & _WRITES and path != os.devnull and not isinstance(path, int)  # an open one
        else:
            path, wanted = arguments[0] if arguments else "", event.startswith(WATCHED)
        if wanted:
            shown = os.path.relpath(os.fsdecode(path), here) if isinstance(path, (str, bytes)) and path else str(path)
            os.write(events, f"{event} {shown}\n".encode("utf-8", "replace"))

    sys.addaudithook(watch)
    sys.argv = ["ckptconv", *request["arguments"]]  # type: ignore[misc]
    code = 1
    try:
        from ckptconv.__main__ import main

        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                code = code or 1
        os._exit(code)


def sizes() -> tuple[int, int]:
    """(virtual size, resident size) of this process in bytes."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        pages = stream.read().split()
    return int(pages[0]) * resource.getpagesize(), int(pages[1]) * resource.getpagesize()


def main() -> None:
    """Answers requests until stdin ends."""
    sys.dont_write_bytecode = True
    warm("torch" in sys.argv[1:])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()
        virtual, resident = sizes()
        pid = os.fork()
        if not pid:
            os.close(reading)
            child(request, virtual, writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as stream:
            events = stream.read().decode("utf-8", "replace").splitlines()
        _, status, used = os.wait4(pid, 0)
        try:
            os.killpg(pid, signal.SIGKILL)  # what the command left running is itself a fault
            left = True
        except ProcessLookupError:
            left = False
        answer = {
            "code": os.waitstatus_to_exitcode(status), "events": events, "seconds": used.ru_utime + used.ru_stime,
            "peak_nbytes": max(0, used.ru_maxrss * 1024 - resident), "left": left,
        }  # fmt: skip
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
