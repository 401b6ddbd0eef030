"""Faults at random until the time is over: `python tests/faults/output/torture.py --seconds 60 [--seed N]`, or `make torture`.

Each round takes a kind of conversion and lets something go wrong in it: one or two calls fail, come back short, or are the last that the
process sees; or a signal comes at any moment. Whatever it is, the old result or the new one stands complete, the source is as it was,
what could be cleaned up is, and the next run succeeds. Ends with code 1 at the first round where this is not so, and says how to repeat it.
"""

import argparse
import errno
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path

from faulty import INTERRUPTED, KINDS, SIGNALS, Commands, Conversion

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EXDEV, errno.ESTALE, errno.EINVAL,
          errno.ENOSYS, errno.EOPNOTSUPP, errno.EINTR, errno.EMFILE, errno.ENOMEM)  # fmt: skip
CALLS = (
    "write",
    "fsync",
    "rename",
    "renameat2",
    "link",
    "create",
    "mkdir",
    "ftruncate",
    "fallocate",
    "chmod",
    "unlink",
    "flock",
    "pread",
    "*",
)


def some_fault(chance, conversion):
    """One call and what becomes of it."""
    call = chance.choice(CALLS)
    names = [name for name, _ in conversion.calls]
    at = chance.randint(1, {"*": len(names), "pread": 60, "flock": 3}.get(call, names.count(call) + 1))
    number = chance.choice(ERRORS)
    lasting = "" if number == errno.EINTR else chance.choice(["", "", "+"])  # a call that is interrupted every time is tried for ever
    return f"{call}:{at}:" + chance.choice([
        "kill=9", "after=9", f"kill={chance.choice([1, 2, 15])}", f"after={chance.choice([1, 2, 15])}", "short",
        *[f"error={number}{lasting}"] * 4,
    ])  # fmt: skip


def check(conversion, done, fault):
    """What must be so after any fault; gives back how the run ended."""
    assert "Traceback" not in done.err, done.err
    state = conversion.state()
    if done.code == -signal.SIGKILL:
        return f"killed, {state}"
    if done.code in SIGNALS.values() or done.code < 0:
        assert done.code > 0 or -done.code in (1, 2, 15), f"died by signal {-done.code}"
        assert done.err in ("", INTERRUPTED), done.err
        assert conversion.left() == [] or "unlink" in fault, conversion.left()
        return f"interrupted, {state}"
    if done.code == 0:
        assert (state, done.err) == ("new", "")
        assert conversion.left() == []
        return "done"
    assert done.code in (3, 4, 5), done
    assert done.err.startswith("error: "), done.err
    assert (state == "new") == ("the output is in place" in done.err), done.err
    # What removes the staging failed as well, where every call does.
    assert conversion.left() == [] or "unlink" in fault or "*" in fault, conversion.left()
    return f"refused with {done.code}, {state}"


def play(conversion, chance, seconds):
    """One round: the fault as text, and how it ended."""
    conversion.reset()
    if chance.random() < 0.4:
        number, after = chance.choice([9, 9, 9, 1, 2, 15]), chance.uniform(0, seconds)

        def strike(child):
            time.sleep(after)
            with suppress(ProcessLookupError):
                os.kill(child, number)

        fault, done = f"signal {number} after {after:.4f} s", conversion.run(during=strike)
    else:
        fault = ";".join(some_fault(chance, conversion) for _ in range(chance.choice([1, 1, 1, 2])))
        done = conversion.run(fault)
    return fault, done


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    given = parser.parse_args()
    chance, ends, end = random.Random(given.seed), Counter(), time.monotonic() + given.seconds
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        folder = Path(name)
        (folder / "commands").mkdir()
        commands = Commands(folder / "commands")
        conversions = [Conversion(folder, commands, kind) for kind in KINDS]
        started = time.monotonic()
        conversions[0].run()
        seconds = 1.5 * (time.monotonic() - started)
        code = 0
        while time.monotonic() < end:
            conversion, fault, done = chance.choice(conversions), "none yet", None
            try:
                fault, done = play(conversion, chance, seconds)
                ends[check(conversion, done, fault)] += 1
                conversion.run_again()
            except AssertionError:
                traceback.print_exc()
                print(f"seed {given.seed}, round {ends.total() + 1}: {conversion.kind}, fault {fault!r} ended in {done}", file=sys.stderr)
                code = 1
                break
        commands.close()
    print(f"seed {given.seed}: {ends.total():,} faults; " + ", ".join(f"{how} {count:,}" for how, count in sorted(ends.items())))
    return code


if __name__ == "__main__":
    sys.exit(main())
