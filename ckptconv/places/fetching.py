"""Ranges of remote files on their way into placeholders: many requests in flight, nothing twice, never more on the disk than allowed.

A placeholder is a sparse file. What has arrived of it is a list of segments that do not overlap; a reader pins those that it reads, and
where room is needed those that were used longest ago are punched out again. What readers announce is fetched ahead in blocks; what they
ask for unannounced is fetched as it is asked for.
"""

from __future__ import annotations

import ctypes
import os
import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from ckptconv.errors import CkptconvError, InputError, OutputError, Problem, named, printable
from ckptconv.places.presence import LOOK, Range, forget, watch

BLOCK = 8 << 20  #: bytes of one request
GAP = 32 << 10  #: wanted ranges with no more than this between them are fetched in one request
AHEAD = 128 << 20  #: bytes that are fetched before anybody asks for them
IN_FLIGHT = 16  #: requests at once
_TURN = 32 << 20  # a reader's range is pinned in pieces of this size
_PUNCH, _KEEP_SIZE = 2, 1
_PAGE = 4096
_versions = count(1)


class Segment:
    """A range of a placeholder that has arrived, or is on its way."""

    __slots__ = ("ahead", "begin", "end", "error", "file", "here", "pins")

    def __init__(self, file: Placeholder, begin: int, end: int, *, ahead: bool) -> None:
        self.file, self.begin, self.end, self.ahead = file, begin, end, ahead
        self.here = False
        self.pins = 0
        self.error: BaseException | None = None

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class Arrivals:
    """The requests of all placeholders of one command, and the room that they share."""

    def __init__(self, limit_nbytes: int, in_flight: int = IN_FLIGHT) -> None:
        self.limit_nbytes = limit_nbytes
        self.nbytes = self.ahead_nbytes = 0  #: here or on their way; of these, not yet asked for
        self.kept_nbytes = 0  #: of files that are needed as a whole
        self.most_nbytes = 0
        self.lock = threading.Condition()
        self.urgent: deque[Segment] = deque()
        self.later: deque[tuple[Placeholder, int, int]] = deque()
        self.idle: OrderedDict[Segment, None] = OrderedDict()  #: here and unpinned, the one that was used longest ago first
        self._in_flight, self._threads = in_flight, list[threading.Thread]()
        self._waiting = self._writing = 0
        self.stopped = False
        self.watched: list[tuple[int, int]] = []  #: placeholders, as :func:`~ckptconv.places.presence.forget` takes them
        self._punches = True
        self.failed: BaseException | None = None  #: a fault of ours in a thread: nobody must wait for it for ever

    def wake(self) -> None:
        """There is work; the lock is held. Threads are daemons: one that waits for a store that hangs must not keep the process."""
        if self._waiting < len(self.urgent) + len(self.later) and len(self._threads) < self._in_flight:
            thread = threading.Thread(target=self._work, name=f"ckptconv-fetch-{len(self._threads) + 1}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self.lock.notify_all()

    def close(self) -> None:
        """No placeholder is one any more, and none is written to: their inodes may soon be other files."""
        with self.lock:
            self.stopped = True
            for key in self.watched:
                forget(key)
            self.lock.notify_all()
            while self._writing:
                self.lock.wait()

    def touch(self, segment: Segment) -> None:
        """A reader asked for it; the lock is held."""
        segment.pins += 1
        self.idle.pop(segment, None)
        if segment.ahead:
            segment.ahead = False
            self.ahead_nbytes -= segment.nbytes
            self.wake()

    def let_go(self, segment: Segment) -> None:
        """A reader is done with it; the lock is held."""
        segment.pins -= 1
        if not segment.pins and segment.here:
            self.idle[segment] = None
            if self.nbytes > self.limit_nbytes:
                self.make_room(0)

    def make_room(self, nbytes: int) -> bool:
        """Punches out what nobody reads until ``nbytes`` more may come; False where that is not enough. The lock is held."""
        while self.nbytes + nbytes > self.limit_nbytes and self._punches:
            segment = next(iter(self.idle), None)
            if segment is None:
                break
            begin, end = segment.file.pages_of(segment)
            if not _punched(segment.file.path, begin, end - begin):
                self._punches = False  # a filesystem without holes: what came stays
                break
            del self.idle[segment]
            segment.file.drop(segment)
            self.nbytes -= segment.nbytes
        return self.nbytes + nbytes <= self.limit_nbytes or not self._punches

    def _next(self) -> Segment | None:
        """What is to be fetched next: what somebody waits for, else what comes soon, as far as there is room. The lock is held."""
        if self.urgent:
            segment = self.urgent.popleft()
            self.make_room(0)
            return segment
        while self.later and self.ahead_nbytes < AHEAD:
            file, begin, end = self.later[0]
            gaps = file.gaps(begin, end) if begin in file.pending else []
            if not gaps:
                self.later.popleft()
                file.pending.discard(begin)
                continue
            begin, end = gaps[0]
            if not self.make_room(end - begin):
                return None
            return file.add(begin, end, ahead=True)
        return None

    def _work(self) -> None:
        try:
            self._fetch_on()
        except BaseException as error:
            with self.lock:
                self.failed = error
                self.lock.notify_all()

    def _fetch_on(self) -> None:
        while True:
            with self.lock:
                while not self.stopped and (segment := self._next()) is None:
                    self._waiting += 1
                    self.lock.wait()
                    self._waiting -= 1
                if self.stopped:
                    return
            assert segment is not None
            try:
                data = segment.file.fetch(segment.begin, segment.end)
                self._written(segment, data)
            except BaseException as error:  # every reader that waits gets it
                with self.lock:
                    segment.error = error
                    segment.file.drop(segment)
                    self.nbytes -= segment.nbytes
                    if segment.ahead:
                        self.ahead_nbytes -= segment.nbytes
                    self.lock.notify_all()

    def _written(self, segment: Segment, data: bytes) -> None:
        with self.lock:
            if self.stopped:
                return
            self._writing += 1
        try:
            with _opened(segment.file.path) as descriptor:
                done = 0
                while done < len(data):
                    done += os.pwrite(descriptor, memoryview(data)[done:], segment.begin + done)
        except OSError as error:
            what = f"the scratch folder cannot be written to: {error.strerror}"
            raise OutputError(
                Problem("CK503", what, where=printable(segment.file.url), try_="--scratch DIR, --scratch-size SIZE")
            ) from None
        finally:
            with self.lock:
                self._writing -= 1
                self.lock.notify_all()
        with self.lock:
            segment.here = True
            if not segment.pins and not segment.ahead:
                self.idle[segment] = None
            self.lock.notify_all()


class Placeholder:
    """A sparse file that stands for a remote one, and what has arrived of it.

    ``read`` gives the bytes of a range, all of them, or raises; ``is_same`` asks the store whether the file is what it was.
    """

    def __init__(
        self, path: Path, url: str, nbytes: int, arrivals: Arrivals, read: Callable[[int, int], bytes], is_same: Callable[[], bool]
    ) -> None:
        self.path, self.url, self.nbytes = path, url, nbytes
        self._arrivals, self._read, self._is_same = arrivals, read, is_same
        self.version = next(_versions)
        self.was_read = False
        self._begins: list[int] = []
        self._segments: dict[int, Segment] = {}
        self._blocks: list[Range] = []  # ever announced, as (begin, end), in order and apart
        self.pending: set[int] = set()  #: begins of announced blocks that nobody has asked the store for
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        os.truncate(path, nbytes)
        with arrivals.lock:
            arrivals.watched.append(watch(path, self))

    # ------------------------------------------------------------------------------------------------------- for readers

    def arriving(self, offset: int, nbytes: int) -> Iterator[Range]:
        """See :class:`~ckptconv.places.presence.Keeper`."""
        end = min(offset + nbytes, self.nbytes)
        with self._arrivals.lock:
            if end - offset > _TURN:
                self._announced([(0, offset, end - offset)])
        for at in range(offset, end, _TURN):
            with self._arrivals.lock:
                segments = self._wanted(at, min(at + _TURN, end))
            try:
                self._wait(segments)
                yield at, min(_TURN, end - at)
            finally:
                with self._arrivals.lock:
                    for segment in segments:
                        self._arrivals.let_go(segment)
        if offset + nbytes > end:
            yield max(end, offset), offset + nbytes - max(end, offset)  # behind the end: the reader finds out

    def keep(self) -> None:
        """See :class:`~ckptconv.places.presence.Keeper`."""
        arrivals = self._arrivals
        with arrivals.lock:
            if arrivals.kept_nbytes + self.nbytes > arrivals.limit_nbytes:
                raise OutputError(
                    Problem("CK503", "the file is needed as a whole, and the scratch folder may not hold as much", where=printable(self.url),
                            found=f"{self.nbytes:,} bytes; {arrivals.limit_nbytes:,} are allowed", try_="--scratch-size SIZE")
                )  # fmt: skip
            segments = self._wanted(0, self.nbytes)  # and never let go
            arrivals.kept_nbytes += self.nbytes
        self._wait(segments)

    def changed(self) -> bool:
        """See :class:`~ckptconv.places.presence.Keeper`."""
        return not self._is_same()

    def announce(self, ranges: Sequence[tuple[int, int, int]], *, once: bool) -> None:
        """See :class:`~ckptconv.places.presence.Keeper`."""
        with self._arrivals.lock:
            self._announced(ranges, once=once)

    # ------------------------------------------------------------------------------------------- the rest holds the lock

    def _announced(self, ranges: Sequence[tuple[int, int, int]], *, once: bool = False) -> None:
        joined: list[tuple[int, int, int]] = []  # rank, begin, end
        for rank, offset, nbytes in sorted(ranges, key=lambda each: each[1]):
            begin, end = offset, min(offset + nbytes, self.nbytes)
            if joined and begin - joined[-1][2] <= GAP and max(end, joined[-1][2]) - joined[-1][1] <= BLOCK:
                joined[-1] = min(rank, joined[-1][0]), joined[-1][1], max(end, joined[-1][2])
                continue
            begin = max(begin, joined[-1][2]) if joined else begin
            joined += [(rank, at, min(at + BLOCK, end)) for at in range(begin, end, BLOCK)]
        new = [(rank, *rest) for rank, begin, end in joined for rest in _without(self._blocks, begin, end)]
        if not once:  # else what lies around them would be cut into pieces
            self._blocks = sorted([*self._blocks, *((begin, end) for _, begin, end in new)])
        self.pending.update(begin for _, begin, _ in new)
        self._arrivals.later.extend((self, begin, end) for _, begin, end in sorted(new))
        for _ in range(min(len(new), IN_FLIGHT)):
            self._arrivals.wake()

    def _wanted(self, begin: int, end: int) -> list[Segment]:
        """The segments of a range, pinned; what is missing of it is asked for."""
        wide = self._looked(begin, end) if not self._blocks else self._in_blocks(begin, end)
        for gap_begin, gap_end in self.gaps(*wide) if begin < end else ():
            for at in range(gap_begin, gap_end, BLOCK):
                self._arrivals.urgent.append(self.add(at, min(at + BLOCK, gap_end), ahead=False))
        found = self._overlapping(begin, end)
        for segment in found:
            self._arrivals.touch(segment)
        for _ in range(min(len(self._arrivals.urgent), IN_FLIGHT)):
            self._arrivals.wake()
        return found

    def _looked(self, begin: int, end: int) -> Range:
        if begin < LOOK:
            return 0, max(end, min(LOOK, self.nbytes))
        if end > self.nbytes - LOOK:
            return max(0, min(begin, self.nbytes - LOOK)), self.nbytes
        return begin, end

    def _in_blocks(self, begin: int, end: int) -> Range:
        """The range with the announced blocks at its ends as a whole."""
        at = bisect_right(self._blocks, (begin, self.nbytes + 1)) - 1
        if at >= 0 and self._blocks[at][1] > begin:
            begin = self._blocks[at][0]
        at = bisect_left(self._blocks, (end, 0)) - 1
        if at >= 0 and self._blocks[at][1] > end:
            end = self._blocks[at][1]
        return begin, end

    def _overlapping(self, begin: int, end: int) -> list[Segment]:
        at = max(0, bisect_right(self._begins, begin) - 1)
        found = []
        while at < len(self._begins) and self._begins[at] < end:
            segment = self._segments[self._begins[at]]
            if segment.end > begin:
                found.append(segment)
            at += 1
        return found

    def gaps(self, begin: int, end: int) -> list[Range]:
        """What is neither here nor on its way. Small pieces that nobody reads are fetched again with what lies around them."""
        there = self._overlapping(begin, end)
        small = [each for each in there if each.nbytes <= LOOK and each in self._arrivals.idle and not each.ahead]
        if there and len(small) == len(there) and sum(each.nbytes for each in small) * 8 < end - begin and len(small) > 1:
            for segment in small:
                del self._arrivals.idle[segment]
                self.drop(segment)
                self._arrivals.nbytes -= segment.nbytes
                begin, end = min(begin, segment.begin), max(end, segment.end)
            there = []
        found, at = [], begin
        for segment in there:
            if segment.begin > at:
                found.append((at, segment.begin))
            at = max(at, segment.end)
        if at < end:
            found.append((at, end))
        return found

    def add(self, begin: int, end: int, *, ahead: bool) -> Segment:
        """A segment that is on its way from now on."""
        segment = Segment(self, begin, end, ahead=ahead)
        self._begins.insert(bisect_left(self._begins, begin), begin)
        self._segments[begin] = segment
        self.pending.discard(begin)
        at = bisect_left(self._blocks, (begin, 0))
        while self.pending and at < len(self._blocks) and self._blocks[at][0] < end:
            self.pending.discard(self._blocks[at][0])
            at += 1
        self._arrivals.nbytes += segment.nbytes
        self._arrivals.most_nbytes = max(self._arrivals.most_nbytes, self._arrivals.nbytes)
        self._arrivals.ahead_nbytes += segment.nbytes if ahead else 0
        return segment

    def pages_of(self, segment: Segment) -> Range:
        """The segment with the rest of its first and last page, where nothing else is there: a page of which a part is kept is not freed."""
        begin, end = segment.begin - segment.begin % _PAGE, min(segment.end + -segment.end % _PAGE, self.nbytes)
        return (
            segment.begin if self._overlapping(begin, segment.begin) else begin,
            segment.end if self._overlapping(segment.end, end) else end,
        )

    def drop(self, segment: Segment) -> None:
        """The segment is not here any more."""
        del self._begins[bisect_left(self._begins, segment.begin)]
        del self._segments[segment.begin]

    # ----------------------------------------------------------------------------------------------- and this does not

    def _wait(self, segments: Sequence[Segment]) -> None:
        with self._arrivals.lock:
            for segment in segments:
                while not segment.here and segment.error is None:
                    if self._arrivals.failed is not None:
                        raise self._arrivals.failed
                    if self._arrivals.stopped:
                        raise InputError(Problem("CK310", "the command that reads the file has ended", where=printable(self.url)))
                    self._arrivals.lock.wait(0.2)  # in short turns, so that Ctrl-C is heard
                if segment.error is not None:
                    raise _again(segment.error)

    def fetch(self, begin: int, end: int) -> bytes:
        """The bytes of a range, from the store."""
        self.was_read = True
        return self._read(begin, end)


def _again(error: BaseException) -> BaseException:
    """What a reader raises for it: one of its own, because several readers may wait."""
    if isinstance(error, CkptconvError):
        return type(error)(error.problems)
    return InputError(Problem("CK313", "the store's client failed", found=printable(f"{type(error).__name__}: {named(error)}")))


def _without(blocks: Sequence[Range], begin: int, end: int) -> list[Range]:
    """The parts of a range that none of the blocks (in order, and apart) covers."""
    found: list[Range] = []
    at = max(0, bisect_right(blocks, (begin, begin)) - 1)
    while at < len(blocks) and blocks[at][0] < end and begin < end:
        if blocks[at][0] > begin:
            found.append((begin, blocks[at][0]))
        begin = max(begin, blocks[at][1])
        at += 1
    if begin < end:
        found.append((begin, end))
    return found


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """To write to. Not kept open: a folder may have more files than a process may have descriptors."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _punched(path: Path, offset: int, nbytes: int) -> bool:
    """True when the range takes no room any more."""
    try:
        call = ctypes.CDLL(None, use_errno=True).fallocate64
    except (AttributeError, OSError, TypeError):  # not Linux
        return False
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    with _opened(path) as descriptor:
        return bool(call(descriptor, _PUNCH | _KEEP_SIZE, offset, nbytes) == 0)
