"""Copying: whatever the kernel gives or refuses, the bytes are the source's, and so are the checksums."""

import errno
import os
import re
import struct
import subprocess
import sys
import threading
import time
import zlib
from random import Random

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from ckptconv import api, formats
from ckptconv.errors import InputError, OutputError
from ckptconv.execute import cloning, copying, writeback
from ckptconv.execute.copying import BLOCK, Copier, Copy, Piece, batches
from ckptconv.execute.sources import Sources
from ckptconv.memory import fixed_nbytes

RULE = "version: 1\nname: r\nsummary: s\nsteps:\n  - {step}\n"


@pytest.fixture(autouse=True)
def _never_slow(monkeypatch):
    monkeypatch.setattr(copying, "_SLOW", 1)


@pytest.fixture
def files(tmp_path):
    data = Random(0).randbytes(3 * BLOCK + 777)
    (tmp_path / "in").write_bytes(data)
    return tmp_path, data


def copied(folder, copies, size):
    """The output file and what the copier found."""
    with Sources([folder / "in"]) as sources:
        copier = Copier(sources, lambda _: None, threading.Event())
        descriptor = os.open(folder / "out", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            os.ftruncate(descriptor, size)
            for batch in batches(copies):
                copier.run(batch, descriptor)
        finally:
            os.close(descriptor)
    return (folder / "out").read_bytes(), copier


def few_at_a_time(real):
    """A kernel that does less than it is asked for."""
    return lambda descriptor, buffers, offset: real(descriptor, [buffers[0][: max(1, len(buffers[0]) // 3)]], offset)


@pytest.mark.parametrize("pieces", [
    [(0, 3 * BLOCK + 777)], [(5, 2 * BLOCK)], [(0, 10), (10, 20), (4000, 50), (2 * BLOCK, 99)], [(BLOCK, 300), (0, 300), (7, 1)],
    [(0, BLOCK), (3 * BLOCK, 700), (1, BLOCK + 1)],
], ids=["whole", "shifted", "small", "backwards", "large and small"])  # fmt: skip
@pytest.mark.parametrize(("checked", "in_kernel"), [(False, True), (False, False), (True, True)])
def test_pieces_are_put_one_after_the_other_and_their_checksums_taken(files, pieces, checked, in_kernel, monkeypatch):
    if not in_kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    folder, data = files
    wanted = b"".join(data[at : at + nbytes] for at, nbytes in pieces)
    copy = Copy(11, tuple(Piece(0, at, nbytes, f"t{at}") for at, nbytes in pieces), "o", crc=checked, digest=checked)
    written, copier = copied(folder, [copy], 11 + len(wanted))
    assert written == bytes(11) + wanted
    if checked:
        assert copier.found.crc32 == {"o": zlib.crc32(wanted)}
        assert copier.found.outputs == {"o": xxhash.xxh3_128_hexdigest(wanted)}
        assert copier.found.tensors == {f"t{at}": xxhash.xxh3_128_hexdigest(data[at : at + nbytes]) for at, nbytes in pieces}


def test_reads_and_writes_that_come_up_short_go_on(files, monkeypatch):
    folder, data = files
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    monkeypatch.setattr(os, "preadv", few_at_a_time(os.preadv))
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, view, offset: pwrite(descriptor, view[: max(1, len(view) // 2)], offset))
    written, _ = copied(folder, [Copy(0, (Piece(0, 0, len(data)),))], len(data))
    assert written == data


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY])
def test_a_filesystem_that_shares_nothing_is_asked_once_and_copied_on(files, monkeypatch, number):
    folder, data = files
    asked = []

    def refused(*arguments):
        asked.append(arguments)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(copying, "clone", refused)
    written, copier = copied(
        folder, [Copy(0, (Piece(0, 0, 2 * BLOCK),), "o", crc=True), Copy(2 * BLOCK, (Piece(0, 9, BLOCK),), "p", crc=True)], 3 * BLOCK
    )
    assert written == data[: 2 * BLOCK] + data[9 : 9 + BLOCK]
    assert (len(asked), copier.cloned_nbytes) == (1, 0)


@pytest.mark.parametrize("checked", [False, True])
def test_what_is_shared_is_not_written_and_its_checksum_is_taken_all_the_same(files, monkeypatch, checked):
    """The kernel's part is played by a copy of whole blocks; the borders are ours."""
    folder, data = files
    start, nbytes = 5, 3 * BLOCK + 700
    shared = []

    def ioctl(descriptor, request, argument):
        source, offset, length, to = struct.unpack("<qQQQ", argument)
        assert request == 0x4020940D
        assert not (offset | length | to) % cloning.BLOCK
        shared.append((offset, length))
        os.pwrite(descriptor, os.pread(source, length, offset), to)

    monkeypatch.setattr("fcntl.ioctl", ioctl)
    monkeypatch.setattr(cloning.sys, "platform", "linux")
    to = start + 2 * cloning.BLOCK
    written, copier = copied(folder, [Copy(to, (Piece(0, start, nbytes),), "o", crc=checked, digest=checked)], to + nbytes)
    assert written[to:] == data[start : start + nbytes]
    assert shared == [(cloning.BLOCK, 3 * BLOCK - cloning.BLOCK)]
    assert copier.cloned_nbytes == 3 * BLOCK - cloning.BLOCK
    assert copier.found.crc32 == ({"o": zlib.crc32(data[start : start + nbytes])} if checked else {})


def test_ranges_that_lie_differently_in_their_blocks_are_not_shared(files):
    assert cloning.clone(-1, 0, -1, 64, 5 * BLOCK) == (0, 0)
    assert cloning.clone(-1, 0, -1, 0, BLOCK - 1) == (0, 0)


def test_where_early_writing_is_not_known_nothing_happens(monkeypatch):
    monkeypatch.setattr(writeback.sys, "platform", "darwin")
    writeback._call.cache_clear()
    try:
        writeback.start(-1, 0, 10)
    finally:
        writeback._call.cache_clear()


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    state = {f"module.l.{at}.weight": torch.randn(1 << 19) for at in range(6)}
    state |= {f"module.l.{at}.bias": torch.randn(3) for at in range(6)}
    torch.save(state, tmp_path / "in.pth")
    save_file(state, tmp_path / "in.safetensors")
    return tmp_path, state


@pytest.mark.parametrize("source", ["in.pth", "in.safetensors"])
@pytest.mark.parametrize("destination", ["out.pth", "out.safetensors"])
@pytest.mark.parametrize("verify", [None, 1])
def test_one_two_and_eight_threads_write_the_same_bytes(checkpoint, source, destination, verify):
    folder, _ = checkpoint
    found = set()
    for threads in (1, 2, 8):
        api.run("dataparallel", folder / source, folder / destination, threads=threads, verify=verify, force=True, sync=False)
        found.add((folder / destination).read_bytes())
    assert len(found) == 1


@pytest.mark.parametrize("source", ["in.pth", "in.safetensors"])
def test_a_pth_can_be_mapped_and_its_large_records_lie_in_their_page_as_they_did(checkpoint, source):
    folder, state = checkpoint
    api.run("dataparallel", folder / source, folder / "out.pth", sync=False)
    loaded = torch.load(folder / "out.pth", mmap=True)
    assert all(torch.equal(loaded[name.removeprefix("module.")], value) for name, value in state.items())
    before = formats.read(folder / source).containers["."].tensors
    after = formats.read(folder / "out.pth").containers["."].tensors
    assert all(placed.storage.offset % 64 == 0 for placed in after.values())
    if source == "in.pth":
        large = [name for name in after if name.endswith("weight")]
        assert all(after[name].storage.offset % 4096 == before[f"module.{name}"].storage.offset % 4096 for name in large)


def test_safetensors_keep_their_place_in_the_page(checkpoint):
    folder, _ = checkpoint
    api.run("dataparallel", folder / "in.safetensors", folder / "out.safetensors", sync=False)
    before = formats.read(folder / "in.safetensors").containers["."].tensors
    after = formats.read(folder / "out.safetensors").containers["."].tensors
    name = "l.0.weight"
    assert after[name].storage.offset % 4096 == before[f"module.{name}"].storage.offset % 4096


@pytest.mark.parametrize("step", [
    "strip_prefix: module.", "stack: {from: 'module.l.{i:int}.weight', over: i, to: stacked}",
    "cast: {keys: '**', dtype: bfloat16}", "rearrange: {keys: 'module.l.{i:int}.weight', pattern: '(a b) -> (b a)', a: 2}",
], ids=["copied", "joined", "cast", "computed"])  # fmt: skip
def test_a_flipped_bit_of_the_source_ends_every_path(checkpoint, step):
    folder, _ = checkpoint
    place = formats.read(folder / "in.pth").containers["."].tensors["module.l.3.weight"]
    with (folder / "in.pth").open("r+b") as stream:
        stream.seek(place.storage.offset + 1_000_001)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 0x10]))
    (folder / "r.yaml").write_text(RULE.format(step=step))
    with pytest.raises(InputError) as error:
        api.run(folder / "r.yaml", folder / "in.pth", folder / "out.pth", sync=False)
    assert str(error.value) == (
        f"{folder / 'in.pth'}  [CK312]\n  module.l.3.weight: the checksum that the file records does not match its bytes\n"
        f"  found: storage at offset {place.storage.offset:,}\n  try: fetch the file again"
    )
    assert not (folder / "out.pth").exists()


def test_the_source_is_read_once_and_the_output_once(checkpoint, monkeypatch):
    """A rename is proved by as many bytes as there are in both files, and no more."""
    folder, _ = checkpoint
    read = [0]
    preadv = os.preadv

    def counted(descriptor, buffers, offset):
        read[0] += len(buffers[0])
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    report = api.run("dataparallel", folder / "in.pth", folder / "out.pth", verify=1, sync=False)
    assert report.ladder.reached == "L0 L1"
    size = (folder / "in.pth").stat().st_size
    assert 1.99 * size < read[0] < 2.01 * size


def test_a_file_past_four_gibibytes_is_a_64_bit_zip(tmp_path):
    """Made of holes: the source's header says 4.5 GiB and the disk holds a page of it."""
    big = 4_500 << 20
    header = (f'{{"a.big":{{"dtype":"U8","shape":[{big}],"data_offsets":[0,{big}]}},'
              f'"a.small":{{"dtype":"U8","shape":[3],"data_offsets":[{big},{big + 3}]}}}}').encode()  # fmt: skip
    with (tmp_path / "in.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + big)
        stream.seek(0, os.SEEK_END)
        stream.write(b"xyz")
    manifest = formats.read(tmp_path / "in.safetensors").containers["."].manifest
    writer = formats.WRITERS["torch"]
    layout = writer.lay_out("out.pth", manifest, metadata={})
    crc32 = {"a.big": 1, "a.small": zlib.crc32(b"xyz")}
    with (tmp_path / "out.pth").open("wb") as stream:
        stream.truncate(layout.nbytes)
        for offset, data in writer.seal(layout, crc32, {}):
            stream.seek(offset)
            stream.write(data)
        stream.seek(layout.slots["a.small"].offset)
        stream.write(b"xyz")
    assert (tmp_path / "out.pth").stat().st_blocks * 512 < 1 << 20
    loaded = torch.load(tmp_path / "out.pth", mmap=True)
    assert loaded["a.small"].tolist() == list(b"xyz")
    assert (loaded["a.big"].shape, int(loaded["a.big"][-1])) == ((big,), 0)
    again = formats.read(tmp_path / "out.pth").containers["."].tensors
    assert again["a.small"].storage.offset > 1 << 32
    assert (again["a.big"].storage.crc32, again["a.small"].storage.crc32) == (1, crc32["a.small"])


def test_max_memory_counts_the_process_and_says_the_number(checkpoint):
    folder, _ = checkpoint
    (folder / "r.yaml").write_text(RULE.format(step="rearrange: {keys: 'module.l.{i:int}.weight', pattern: '(a b) -> (b a)', a: 2}"))
    least = fixed_nbytes(2, computes=True) + 2 * (4 << 19)
    with pytest.raises(OutputError) as error:
        api.run(folder / "r.yaml", folder / "in.pth", folder / "out.pth", sync=False, max_memory="100MB")
    assert str(error.value) == (
        f"{folder / 'r.yaml'}:5  rearrange (step 1)  [CK503]\n  module.l.0.weight and its like need {2 * (4 << 19):,} bytes at once, and the process "
        f"{fixed_nbytes(2, computes=True):,} bytes: --max-memory allows 100,000,000\n  try: --max-memory {least // 10**6 + 1}MB"
    )
    api.run(folder / "r.yaml", folder / "in.pth", folder / "out.pth", sync=False, max_memory=f"{least // 10**6 + 1}MB")


@pytest.mark.parametrize(("step", "room"), [
    ("strip_prefix: module.", fixed_nbytes(2, computes=False)),
    ("rearrange: {keys: 'module.{i:int}', pattern: 'a b -> b a'}", fixed_nbytes(2, computes=True) + 2 * (16 << 20)),
], ids=["copied", "computed"])  # fmt: skip
def test_a_run_stays_below_what_it_was_allowed(tmp_path, step, room):
    """16 tensors of 16 MiB; the peak is the process's own word."""
    torch.save({f"module.{at}": torch.zeros(2048, 2048) for at in range(16)}, tmp_path / "in.pth")
    (tmp_path / "r.yaml").write_text(RULE.format(step=step))
    code = (
        "import re, sys; from pathlib import Path; from ckptconv import api; "
        "api.run(sys.argv[1], sys.argv[2], sys.argv[3], sync=False, verify=None, max_memory=sys.argv[4]); "
        "print(re.search(r'VmHWM:\\s*([0-9]+)', Path('/proc/self/status').read_text())[1])"
    )
    command = [sys.executable, "-c", code, tmp_path / "r.yaml", tmp_path / "in.pth", tmp_path / "out.pth", f"{room / 1e6 + 1}MB"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 <= room + 1e6


def test_v_says_what_each_worker_did_and_by_which_path(checkpoint):
    from click.testing import CliRunner

    from ckptconv.cli import cli

    folder, _ = checkpoint
    done = CliRunner().invoke(
        cli, ["run", "dataparallel", str(folder / "in.pth"), str(folder / "out.pth"), "-v", "--no-sync", "--threads", "1"]
    )
    path = r"12\.6 MB copied through a buffer|.* shared with the source by the filesystem"  # checksums are taken, so not by the kernel
    assert re.search(rf"^  worker 1: ({path}), [0-9]+\.[0-9]{{2}} s$", done.output, re.MULTILINE), done.output


@pytest.mark.parametrize(("seconds", "often", "least"), [(0.0, 1, 1 << 17), (0.001, 1, 1 << 15), (0.05, 40, 1 << 17)])
def test_writes_get_smaller_where_they_are_slow_and_begin_at_multiples_of_their_size(seconds, often, least, tmp_path, monkeypatch):
    """Where most of them are: a program that is interrupted now and then goes on as before."""
    data = os.urandom(12 * BLOCK + 5)
    (tmp_path / "in").write_bytes(data)
    written = []
    real = os.pwrite

    def counted(descriptor, part, offset):
        time.sleep(0 if len(written) % often else seconds)
        done = real(descriptor, part[: 4096 if len(written) == 20 else None], offset)  # one of them short
        written.append((offset, done))
        return done

    monkeypatch.setattr(copying, "_SLOW", 7e-9 if seconds else 1)  # 7 ms for a MiB, of 8, 16 or 32 writes
    monkeypatch.setattr(copying.os, "pwrite", counted)
    descriptor = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    with Sources([tmp_path / "in"]) as sources:
        copying.Copier(sources, lambda _: None, threading.Event()).run([Copy(4096, (Piece(0, 0, len(data)),), "a", crc=True)], descriptor)
    os.close(descriptor)
    assert (tmp_path / "out").read_bytes()[4096:] == data
    assert {nbytes for _, nbytes in written[-9:-1]} == {least}
    assert all(offset % least == 0 for offset, _ in written[-9:])


KERNEL = pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="the platform has no copy_file_range")
SHORT = 30_001


def lost(*_):
    raise OSError(errno.EXDEV, "cross-device link")


in_kernel = getattr(os, "copy_file_range", None)


def short(source, descriptor, nbytes, offset, to):
    return in_kernel(source, descriptor, min(nbytes, SHORT), offset, to)


def short_and_lost(source, descriptor, nbytes, offset, to):
    return short(source, descriptor, nbytes, offset, to) if to < 1000 + 2 * SHORT else lost()


@KERNEL
@pytest.mark.parametrize(("call", "by_kernel"), [
    (None, 3 * BLOCK + 5), (short, 3 * BLOCK + 5), (lost, 0), (short_and_lost, 2 * SHORT), (lambda *_: 0, 0),
], ids=["as it is", "short", "other filesystem", "short, then other filesystem", "nothing"])  # fmt: skip
def test_what_nobody_needs_to_see_is_copied_by_the_kernel(call, by_kernel, tmp_path, monkeypatch):
    data = os.urandom(3 * BLOCK + 5)
    (tmp_path / "in").write_bytes(b"x" * 1000 + data)
    if call is not None:
        monkeypatch.setattr(copying.os, "copy_file_range", call)
    told = []
    descriptor = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    with Sources([tmp_path / "in"]) as sources:
        copier = Copier(sources, told.append, threading.Event())
        copier.run([Copy(1000, (Piece(0, 1000, len(data)),))], descriptor)
    os.close(descriptor)
    assert (tmp_path / "out").read_bytes() == bytes(1000) + data
    assert (copier.kernel_nbytes, sum(told)) == (by_kernel, len(data))


@KERNEL
def test_checksums_are_taken_of_bytes_that_are_seen(tmp_path):
    data = os.urandom(2 * BLOCK)
    (tmp_path / "in").write_bytes(data)
    descriptor = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    with Sources([tmp_path / "in"]) as sources:
        copier = Copier(sources, lambda _: None, threading.Event())
        copier.run([Copy(0, (Piece(0, 0, len(data)),), "a", crc=True)], descriptor)
    os.close(descriptor)
    assert (copier.kernel_nbytes, copier.found.crc32) == (0, {"a": zlib.crc32(data)})


@KERNEL
@pytest.mark.parametrize("threads", [1, 2])
def test_shards_are_copied_by_the_kernel(threads, tmp_path):
    state = {f"module.{name}": torch.randn(1 << 19) for name in "abc"}
    torch.save(state, tmp_path / "in.pth")
    report = api.run("dataparallel", tmp_path / "in.pth", tmp_path / "out", format="torch", shard_size="2MB", threads=threads, verify=None)
    assert sum(worker["kernel_nbytes"] for worker in report.workers) == 3 * (4 << 19)
    loaded = {name: value for path in (tmp_path / "out").glob("*.bin") for name, value in torch.load(path).items()}
    assert all(torch.equal(loaded[name.removeprefix("module.")], value) for name, value in state.items())


@KERNEL
def test_the_kernel_copies_only_what_lies_alike_in_its_pages_and_from_multiples_of_64_kib_on(tmp_path, monkeypatch):
    data = os.urandom(3 * BLOCK)
    (tmp_path / "in").write_bytes(data)
    asked = []

    def noted(source, descriptor, nbytes, offset, to):
        asked.append(to)
        return in_kernel(source, descriptor, nbytes, offset, to)

    monkeypatch.setattr(copying.os, "copy_file_range", noted)
    written, _ = copied(tmp_path, [Copy(4096 + 64, (Piece(0, 64, 2 * BLOCK),))], 4096 + 64 + 2 * BLOCK)
    assert written[4096 + 64 :] == data[64 : 64 + 2 * BLOCK]
    assert (asked[0], {to % (1 << 16) for to in asked[1:]}) == (4096 + 64, {0})
    asked.clear()
    written, _ = copied(tmp_path, [Copy(64, (Piece(0, 0, 2 * BLOCK),))], 64 + 2 * BLOCK)
    assert (written[64:], asked) == (data[: 2 * BLOCK], [])


@KERNEL
def test_where_the_kernel_is_slow_it_is_not_asked_again(files, monkeypatch):
    folder, data = files
    monkeypatch.setattr(copying, "_SLOW", 0)
    written, copier = copied(folder, [Copy(0, (Piece(0, 0, 2 * BLOCK),)), Copy(2 * BLOCK, (Piece(0, 0, BLOCK),))], 3 * BLOCK)
    assert written == data[: 2 * BLOCK] + data[:BLOCK]
    assert copier.kernel_nbytes == 2 * BLOCK
