"""Ranges on their way: whatever is announced, asked for and punched out, readers get the bytes of the file."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv.errors import InputError, OutputError, Problem
from ckptconv.places import fetching, presence
from ckptconv.places.fetching import Arrivals, Placeholder

SIZE = 40_000
BODY = bytes(at * at % 251 for at in range(SIZE))


@pytest.fixture
def small(monkeypatch):
    for name, value in {"BLOCK": 1000, "GAP": 50, "LOOK": 300, "AHEAD": 4000, "_TURN": 2500, "_PAGE": 64}.items():
        monkeypatch.setattr(fetching, name, value)


class Placed:
    """A placeholder for ``BODY``, and what is asked of its store."""

    def __init__(self, folder, limit=10**9, read=None):
        self.asked = []
        self.arrivals = Arrivals(limit)
        self.path = folder / f"p{len(os.listdir(folder))}"

        def default(begin, end):
            self.asked.append((begin, end))
            return BODY[begin:end]

        self.file = Placeholder(self.path, "x://y", SIZE, self.arrivals, read or default, lambda: True)
        self.descriptor = os.open(self.path, os.O_RDONLY)

    def read(self, offset, nbytes):
        pieces = []
        for at, count in presence.arriving(self.descriptor, offset, nbytes):
            pieces.append(os.pread(self.descriptor, count, at))
        return b"".join(pieces)

    def close(self):
        os.close(self.descriptor)
        self.arrivals.close()


ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(0, 6000))


@settings(max_examples=60, deadline=None)
@given(
    limit=st.sampled_from([500, 3000, 10**9]),
    steps=st.lists(st.tuples(st.sampled_from(["announce", "once", "read"]), st.lists(ranges, min_size=1, max_size=4)), max_size=12),
)
def test_readers_get_the_bytes_of_the_file(tmp_path_factory, limit, steps):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"BLOCK": 1000, "GAP": 50, "LOOK": 300, "AHEAD": 4000, "_TURN": 2500, "_PAGE": 64}.items():
            patch.setattr(fetching, name, value)
        placed = Placed(tmp_path_factory.mktemp("placed"), limit)
        try:
            for what, given_ranges in steps:
                if what != "read":
                    presence.announce(((placed.path, *each) for each in given_ranges), once=what == "once")
                    continue
                with ThreadPoolExecutor(4) as pool:
                    found = list(pool.map(lambda each: placed.read(*each), given_ranges, timeout=20))
                assert found == [BODY[offset : offset + nbytes] for offset, nbytes in given_ranges]
            with placed.arrivals.lock:
                segments = sorted(placed.file._segments.values(), key=lambda segment: segment.begin)
                assert all(one.end <= other.begin for one, other in pairwise(segments))
                assert sum(segment.nbytes for segment in segments) == placed.arrivals.nbytes
                assert all(not segment.pins for segment in segments)
        finally:
            placed.close()


def test_what_is_announced_comes_in_blocks_and_once(small, tmp_path):
    placed = Placed(tmp_path)
    presence.announce((placed.path, at, 90) for at in range(10_000, 14_000, 100))  # small pieces, close together
    for at in range(10_000, 14_000, 100):
        assert placed.read(at, 90) == BODY[at : at + 90]
    assert sum(end - begin for begin, end in placed.asked) == 3960  # four blocks, and not what lies between them
    assert len(placed.asked) <= 5
    placed.close()


def test_no_more_comes_ahead_than_is_allowed(small, tmp_path):
    placed = Placed(tmp_path)
    presence.announce([(placed.path, 0, SIZE)])
    for _ in range(100):
        if sum(end - begin for begin, end in placed.asked) >= 4000:
            break
        threading.Event().wait(0.01)
    threading.Event().wait(0.05)
    assert sum(end - begin for begin, end in placed.asked) == 4000
    placed.read(0, 1000)
    placed.close()


def test_an_error_reaches_every_reader_and_is_not_for_ever(small, tmp_path):
    broken = threading.Event()
    broken.set()

    def read(begin, end):
        if broken.is_set():
            raise InputError(Problem("CK313", "no"))
        return BODY[begin:end]

    placed = Placed(tmp_path, read=read)
    errors = []

    def reader():
        try:
            placed.read(100, 5000)
        except InputError as error:
            errors.append(error)

    threads = [threading.Thread(target=reader) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert [error.problems[0].code for error in errors] == ["CK313"] * 4
    assert len(set(map(id, errors))) == 4
    broken.clear()
    assert placed.read(100, 5000) == BODY[100:5100]
    placed.close()


def test_a_fault_of_a_client_is_a_problem_and_no_hang(small, tmp_path):
    def read(begin, end):
        raise RuntimeError("client")

    placed = Placed(tmp_path, read=read)
    with pytest.raises(InputError, match=r"CK313.*\n.*the store's client failed\n  found: RuntimeError: client"):
        placed.read(0, 10)
    placed.close()


def test_a_scratch_disk_that_is_full(small, tmp_path, monkeypatch):
    placed = Placed(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"(?s)CK503.*the scratch folder cannot be written to: No space left on device.*--scratch DIR"):
        placed.read(0, 10)
    placed.close()


def test_what_comes_after_the_end_is_not_written(small, tmp_path):
    asked, go = threading.Event(), threading.Event()

    def read(begin, end):
        asked.set()
        go.wait(10)
        return BODY[begin:end]

    placed = Placed(tmp_path, read=read)
    presence.announce([(placed.path, 0, 1000)])
    assert asked.wait(10)
    placed.close()
    go.set()
    for thread in placed.arrivals._threads:
        thread.join(10)
    assert placed.path.read_bytes() == bytes(SIZE)


def test_where_holes_cannot_be_made_everything_stays(small, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "_punched", lambda *_: False)
    placed = Placed(tmp_path, limit=1000)
    assert placed.read(0, SIZE) == BODY
    assert placed.read(0, SIZE) == BODY
    assert sum(end - begin for begin, end in placed.asked) == SIZE
    placed.close()


def test_local_files_are_not_looked_up(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    with (tmp_path / "a").open("rb") as stream:
        assert presence.arriving(stream.fileno(), 1, 2) == ((1, 2),)
    assert presence.keeper_of(tmp_path / "none") is None


def test_nothing_is_a_placeholder_once_the_command_has_ended(small, tmp_path):
    placed = Placed(tmp_path)
    assert presence.keeper_of(placed.path) is placed.file
    placed.arrivals.close()
    assert presence.keeper_of(placed.path) is None
    with pytest.raises(InputError, match="the command that reads the file has ended"):
        list(placed.file.arriving(0, 10))
    os.close(placed.descriptor)
