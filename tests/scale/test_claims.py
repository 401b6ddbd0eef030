"""Claims: one living owner to a task, a dead one's taken over, by the filesystem's clock; at worst a task is done twice."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from ckptconv.errors import OutputError
from ckptconv.execute import claims as module
from ckptconv.execute.claims import MAX_CLAIM, Claims, Owner

ABOUT = {"order": "a" * 32, "ckptconv": "1.0", "torch": "2.13.0"}


@pytest.fixture
def elsewhere(monkeypatch):
    """Whether owners run is not known here: only the lease tells, as between machines."""
    monkeypatch.setattr(Owner, "is_dead", lambda self: False)


def aged(path, seconds):
    """Last renewed so long ago, by the filesystem's clock."""
    written = path.stat().st_mtime
    os.utime(path, (written - seconds, written - seconds))


def test_one_of_two_has_it_until_it_is_let_go(tmp_path):
    one, other = Claims(tmp_path, ABOUT), Claims(tmp_path, ABOUT)
    with one.take("000001") as got:
        assert got
        found = other.look("000001")
        assert (found.state, found.owner, found.about) == ("claimed", Owner.me(), ABOUT)
        with other.take("000001") as second:
            assert not second
        with other.take("000002") as third:
            assert third
    assert os.listdir(tmp_path) == []
    with other.take("000001") as got:
        assert got


def test_what_fails_lets_go(tmp_path):
    claims = Claims(tmp_path, ABOUT)
    with pytest.raises(ZeroDivisionError), claims.take("000001"):
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == []


def test_a_claim_is_renewed_while_its_owner_lives(tmp_path, elsewhere):
    lease = 0.6
    one, other = Claims(tmp_path, ABOUT, lease), Claims(tmp_path, ABOUT, lease)
    with one.take("000001"):
        before = (tmp_path / "000001").stat().st_mtime_ns
        end = time.monotonic() + 20
        while (tmp_path / "000001").stat().st_mtime_ns == before:
            assert time.monotonic() < end, "it was never renewed"
            time.sleep(0.02)
        with other.take("000001") as second:
            assert not second


@pytest.mark.parametrize("skew", [-300, 0, 300])
def test_a_stale_claim_is_taken_over_whatever_the_clocks_of_machines_say(tmp_path, elsewhere, monkeypatch, skew):
    """What counts is the age by the filesystem, not the time on the wall of whoever looks."""
    clock = time.time
    monkeypatch.setattr(module.time, "time", lambda: clock() + skew)
    theirs, mine = Claims(tmp_path, ABOUT, 60), Claims(tmp_path, ABOUT, 60)
    with theirs.take("000001"):
        with mine.take("000001") as got:
            assert not got
        aged(tmp_path / "000001", 61)
        assert mine.look("000001").state == "stale"
        with mine.take("000001") as got:
            assert got
            assert mine.look("000001").state == "claimed"
        assert not (tmp_path / "000001").exists()
    assert os.listdir(tmp_path) == []


def test_an_owner_that_lost_its_claim_leaves_the_new_one_alone(tmp_path, elsewhere):
    theirs, mine = Claims(tmp_path, ABOUT, 60), Claims(tmp_path, ABOUT, 60)
    late = theirs.take("000001")
    assert late.__enter__()
    aged(tmp_path / "000001", 61)
    with mine.take("000001") as got:
        assert got
        late.__exit__(None, None, None)
        assert mine.look("000001").state == "claimed"
    assert os.listdir(tmp_path) == []


def test_a_time_in_the_future_is_not_stale(tmp_path, elsewhere):
    """A claim that another machine's clock dated: it costs waiting, until that time has come and the lease is over."""
    claims = Claims(tmp_path, ABOUT, 60)
    (tmp_path / "000001").write_text("")
    aged(tmp_path / "000001", -300)
    with claims.take("000001") as got:
        assert not got


def test_of_many_who_take_over_at_once_at_least_one_has_it_and_one_claim_is_left(tmp_path, elsewhere):
    (tmp_path / "000001").write_text("")
    aged(tmp_path / "000001", 1000)
    barrier, got = threading.Barrier(8), []

    def take():
        claims = Claims(tmp_path, ABOUT, 60)
        barrier.wait()
        with claims.take("000001") as mine:
            got.append(mine)
            barrier.wait()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(got)
    assert os.listdir(tmp_path) == []


def test_a_process_of_this_machine_that_is_dead_need_not_be_waited_for(tmp_path):
    code = "import os, sys; from ckptconv.execute.claims import Claims; from pathlib import Path\n" \
           f"with Claims(Path({str(tmp_path)!r}), {ABOUT!r}).take('000001'): os.kill(os.getpid(), 9)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    claims = Claims(tmp_path, ABOUT)
    found = claims.look("000001")
    assert (found.state, found.seconds < 60) == ("stale", True)
    with claims.take("000001") as got:
        assert got


def test_a_process_id_that_is_used_again_is_another_process(tmp_path):
    claims = Claims(tmp_path, ABOUT)
    with claims.take("000001"):
        data = json.loads((tmp_path / "000001").read_text())
    assert data["owner"]["pid"] == os.getpid()
    for field, value, state in (("started", "1", "stale"), ("place", "another boot", "claimed"), ("place", "", "claimed")):
        (tmp_path / "000001").write_text(json.dumps({**data, "owner": {**data["owner"], field: value}}))
        assert claims.look("000001").state == state


@pytest.mark.parametrize("word", ABOUT)
def test_a_claim_by_another_order_or_version_is_refused_by_name(tmp_path, word):
    theirs, mine = Claims(tmp_path, {**ABOUT, word: "something else"}), Claims(tmp_path, ABOUT)
    with theirs.take("000007"), pytest.raises(OutputError) as raised, mine.take("000007"):
        pass
    (problem,) = raised.value.problems
    assert problem.code == "CK507"
    assert problem.what == f"task 7 is claimed by {Owner.me()}, which works by another {word}"
    assert problem.found == f"something else, here {ABOUT[word]}"


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"[" * 4000, b"\xff\xfe", b'{"owner": {}, "about": {}}', b'{"owner": 1, "about": {}}', b"x" * (2 * MAX_CLAIM),
     json.dumps({"owner": {"host": "h", "place": "p", "pid": "1", "started": "s"}, "about": {}}).encode(),
     json.dumps({"owner": {"host": "h", "place": "p", "pid": -1, "started": "s"}, "about": {}}).encode(),
     json.dumps({"owner": {"host": "h", "place": "p", "pid": 1, "started": "s"}, "about": {"order": 3}}).encode(),
     json.dumps({"owner": {"host": "h", "place": "p", "pid": 1, "started": "s"}, "about": [1]}).encode()],
    ids=str,
)  # fmt: skip
def test_a_claim_that_cannot_be_read_is_old_or_young_and_no_more(tmp_path, raw):
    claims = Claims(tmp_path, ABOUT, 60)
    (tmp_path / "000001").write_bytes(raw)
    found = claims.look("000001")
    assert (found.state, found.owner, found.about) == ("claimed", None, {})
    aged(tmp_path / "000001", 61)
    with claims.take("000001") as got:
        assert got
