"""Many files, few descriptors."""

import os
import threading

import pytest

from ckptconv.errors import InputError
from ckptconv.execute.descriptors import Descriptors, open_file_limit
from ckptconv.execute.sources import Sources


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / str(at) for at in range(20)]
    for at, path in enumerate(paths):
        path.write_bytes(bytes([at]) * 8)
    return paths


def test_the_one_that_was_idle_for_longest_is_closed(files):
    opened = []
    descriptors = Descriptors(lambda at: opened.append(at) or os.open(files[at], os.O_RDONLY), limit=3)
    for at in (0, 1, 2, 0, 3, 0, 1):
        with descriptors.use(at) as descriptor:
            assert os.pread(descriptor, 1, 0) == bytes([at])
    assert opened == [0, 1, 2, 3, 1]
    descriptors.close()


def test_what_is_in_use_is_never_closed(files):
    descriptors = Descriptors(lambda at: os.open(files[at], os.O_RDONLY), limit=1)
    with descriptors.use(0) as first, descriptors.use(1) as second, descriptors.use(0) as again:
        assert first == again
        assert (os.pread(first, 1, 0), os.pread(second, 1, 0)) == (b"\0", b"\1")
        assert len(descriptors) == 2
    with descriptors.use(2):
        assert len(descriptors) == 1
    descriptors.close()


def test_threads_read_what_they_asked_for(files):
    sources = Sources(files)
    sources.descriptors = Descriptors(sources._opened, limit=2)
    wrong = []

    def read(start):
        buffer = bytearray(8)
        for at in range(start, start + 400):
            sources.read_into(at % 20, 0, memoryview(buffer))
            if bytes(buffer) != bytes([at % 20]) * 8:
                wrong.append(at)

    with sources:
        threads = [threading.Thread(target=read, args=(3 * each,)) for each in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.parametrize("deed", ["replaced", "removed"])
def test_a_file_that_is_opened_again_must_be_the_same(files, deed):
    sources = Sources(files)
    sources.descriptors = Descriptors(sources._opened, limit=2)
    with sources:
        files[0].unlink()
        if deed == "replaced":
            files[0].write_bytes(b"\0" * 8)
        with pytest.raises(InputError) as error:
            sources.read_into(0, 0, memoryview(bytearray(8)))
    assert [problem.code for problem in error.value.problems] == ["CK311"]


def test_the_limit_follows_the_process(monkeypatch):
    for soft, wanted in ((64, 8), (1024, 128), (1 << 20, 256), (-1, 256)):
        monkeypatch.setattr("resource.getrlimit", lambda _, soft=soft: (soft, soft))
        assert open_file_limit() == wanted
