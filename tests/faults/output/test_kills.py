"""Rows 124 to 126: whatever ends a run, and whenever, the old result or the new one stands complete."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from faulty import INTERRUPTED, LONG, SIGNALS


def test_killed_at_a_call(conversion):
    """SIGKILL before every call that changes a file, one run for each."""
    states = []
    for at in conversion.moments(5):
        conversion.reset()
        assert conversion.run(f"*:{at}:kill=9").code == -signal.SIGKILL
        states.append(conversion.state())
        conversion.run_again()
    assert states == sorted(states, reverse=True), "once the new result stands, it stays"
    assert set(states) == {"old", "new"}


def test_killed_between_the_two_renames_where_there_is_no_exchange(conversions):
    """A filesystem without RENAME_EXCHANGE has a moment in which nothing stands; the next run puts the old folder back."""
    conversion = conversions["folder-replaced"]
    for at in (1, 2, 3):
        conversion.reset()
        assert conversion.run(f"renameat2:1:error=22+;rename:{at}:kill=9").code == -signal.SIGKILL
        refused = conversion.commands.run(*[word for word in conversion.argv if word != "--force"], cwd=conversion.folder)
        assert refused.code == 5, "it is put back before anything else happens"
        assert conversion.state() == ("old" if at < 3 else "new")
        assert conversion.left() == []
    conversion.run_again()


@pytest.mark.parametrize("name", SIGNALS)
def test_signalled_at_a_call(conversion, name):
    """Signals that can be handled leave nothing behind."""
    number = getattr(signal, name)
    for at in conversion.moments(10) if LONG else list(conversion.moments(10))[number % 4 :: 4]:
        conversion.reset()
        done = conversion.run(f"*:{at}:kill={number}")
        assert (done.code, done.err) == (SIGNALS[name], INTERRUPTED), conversion.calls[at - 1]
        conversion.state()
        assert conversion.left() == [], conversion.calls[at - 1]
    conversion.run_again()


def test_a_second_signal_does_not_stop_the_first_from_cleaning_up(conversions):
    conversion = conversions["folder"]
    conversion.reset()
    done = conversion.run("write:3:kill=2;unlink:2:kill=15")
    assert (done.code, done.err) == (143, INTERRUPTED)
    assert (conversion.state(), conversion.left()) == ("old", [])


def test_a_signal_that_python_swallows_comes_again():
    """What is raised in a destructor or a weak reference's callback is ignored by Python; the signal must not be."""
    code = (
        "import os, signal, time; from ckptconv import __main__ as it\n"
        "class Late:\n    def __del__(self): os.kill(os.getpid(), signal.SIGTERM)\n"
        "def run():\n    for _ in range(3): Late()\n    time.sleep(60)\n"
        "it._run = run; it.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", INTERRUPTED)


@pytest.mark.parametrize(("deed", "code", "said"), [("os.kill(os.getpid(), 15)", 143, INTERRUPTED), ("1 / 0", 1, "ValueError: theirs\n")])
def test_a_signal_that_a_library_puts_an_error_of_its_own_in_place_of(deed, code, said):
    """As pydantic does, where it calls back: it is the signal all the same. An error without one stays a fault of ours."""
    run = (
        f"import os\nfrom ckptconv import __main__\ndef run():\n try: {deed}\n except BaseException: raise ValueError('theirs') from None\n"
    )
    done = subprocess.run([sys.executable, "-c", run + "__main__._run = run\n__main__.main()"], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr.endswith(said)
    assert ("Traceback" in done.stderr) == (code == 1)


def test_ended_at_random_moments(conversion):
    """A hundred moments in all, a thousand and more in a long run: not those between calls only, but any."""
    chance = random.Random(conversion.kind)
    started = time.monotonic()
    conversion.run()
    seconds = time.monotonic() - started
    ends = []
    for _ in range(300 if LONG else 25):
        conversion.reset()
        number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        after = chance.uniform(0, seconds)

        def strike(child, number=number, after=after):
            time.sleep(after)
            with suppress(ProcessLookupError):  # it was faster
                os.kill(child, number)

        done = conversion.run(during=strike)
        state = conversion.state()
        if done.code == -signal.SIGKILL:
            conversion.run_again()
        else:
            # Before our handlers stand, and after the work is over, a signal ends the process as it ends any.
            assert done.code in (0, 128 + number, -number), done.err
            assert done.err in ("", INTERRUPTED), done.err
            assert conversion.left() == []
            assert state == "new" or done.code != 0
        ends.append((done.code, state))
    assert any(code for code, _ in ends), "it was always too late"


def test_a_signal_while_the_target_is_built(place, commands):
    """The process that runs the user's code ends with the run."""
    (place / "slow.py").write_text(
        "import os, time\nfrom pathlib import Path\nPath('pid').write_text(str(os.getpid()))\nos.rename('pid', 'started')\ntime.sleep(300)\n"
    )

    def strike(child):
        end = time.monotonic() + 60
        while not (place / "started").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        os.kill(child, signal.SIGTERM)

    done = commands.run("run", "dataparallel", "in.pth", "out.pth", "--target", "py:slow:model", cwd=place, during=strike)
    assert (done.code, done.err) == (143, INTERRUPTED)
    builder = int((place / "started").read_text())
    with suppress(FileNotFoundError):
        assert Path(f"/proc/{builder}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z", "nobody waits for what init has not reaped"
    assert not (place / "out.pth").exists()
