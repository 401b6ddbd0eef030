"""Rows 122, 132 and 133: small disks, little memory, few descriptors."""

import json
import os
import random
import subprocess

import pytest
import torch
from faulty import LONG, everything
from safetensors.torch import save_file

MB = 1 << 20


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of 8 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small filesystem cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors", "out"])
def test_the_planned_size_is_compared_with_the_room(small_disk, tmp_path, commands, name):
    """Nothing is written where it cannot fit; where it fits beside what is there, it is."""
    torch.save({"module.a": torch.zeros(5 * MB // 4)}, tmp_path / "in.pth")
    assert commands.run("run", "dataparallel", "in.pth", small_disk / name, cwd=tmp_path).code == 0
    before = everything(small_disk)
    done = commands.run("run", "dataparallel", "in.pth", small_disk / name, "--force", cwd=tmp_path)
    where, *rest = done.err.splitlines()
    assert (done.code, where) == (5, f"error: {small_disk / name}  [CK503]")
    assert rest[0] == "  the output cannot be written: no space left on the disk"
    needed, free = (
        int(word.replace(",", ""))
        for word in rest[1].removeprefix("  found: ").replace(" bytes to write", "").replace(" free", "").split(", ")
    )
    room = os.statvfs(small_disk)
    assert 5 * MB <= needed <= 5 * MB + 20_000
    assert free == room.f_frsize * room.f_bfree
    assert rest[2:] == ["  try: free some space, or write elsewhere"]
    assert {name for name, _ in commands.calls()} <= {"unlink"}
    assert everything(small_disk) == before


def test_what_a_dead_run_left_is_no_longer_in_the_way(small_disk, tmp_path, commands):
    """Its staging fills the disk; it is gone before room is looked for."""
    torch.save({"module.a": torch.zeros(5 * MB // 4)}, tmp_path / "in.pth")
    killed = commands.run("run", "dataparallel", "in.pth", small_disk / "out.pth", cwd=tmp_path, fault="*:5:kill=9")
    assert killed.code == -9
    assert [path.stat().st_size > 5 * MB for path in small_disk.iterdir()] == [True]
    assert commands.run("run", "dataparallel", "in.pth", small_disk / "out.pth", cwd=tmp_path).code == 0
    assert [path.name for path in small_disk.iterdir()] == ["out.pth"]


def test_no_file_may_grow_past_a_random_byte(conversions):
    """RLIMIT_FSIZE, in the header, in the weights, in the directory at the end."""
    chance = random.Random(122)
    for conversion in conversions.values():
        files = list(conversion.new.values()) if isinstance(conversion.new, dict) else [conversion.new]
        largest = max(map(len, files))
        for _ in range(100 if LONG else 6):
            conversion.reset()
            limit = chance.randrange(1024, largest)  # the message goes to a file, too
            done = conversion.run(limits={"RLIMIT_FSIZE": limit})
            assert done.code == 5, (limit, done.err)
            assert done.err.startswith(f"error: {conversion.output}  [CK503]\n")
            assert "File too large\n" in done.err
            assert (conversion.state(), conversion.left()) == ("old", [])
        conversion.run_again()


def sparse_checkpoint(path, nbytes):
    """A safetensors file with a hole in the place of its weights: as large as it says, and on no disk."""
    header = json.dumps({"module.w": {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [0, nbytes]}}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + nbytes)


def test_a_checkpoint_larger_than_memory(tmp_path, commands):
    """Copied through small buffers. A long run takes 8 GiB with 2 GiB of address space."""
    size, allowed = (8 << 30, 2 << 30) if LONG else (640 * MB, 512 * MB)
    sparse_checkpoint(tmp_path / "in.safetensors", size)
    done = commands.run(
        "run", "dataparallel", "in.safetensors", "out.safetensors", "--no-sync", cwd=tmp_path, limits={"RLIMIT_AS": allowed}
    )
    assert (done.code, done.err) == (0, "")
    assert (tmp_path / "out.safetensors").stat().st_size > size
    assert done.maxrss < 150 * MB


def test_a_tensor_that_is_computed_and_too_large_for_memory(tmp_path, commands):
    """What it needs is said; what was there stays. A long run takes 6 GiB."""
    size = (6 << 30) if LONG else (1 << 30)
    sparse_checkpoint(tmp_path / "in.safetensors", size)
    (tmp_path / "half.yaml").write_text(
        "version: 1\nname: half\nsummary: s\nsteps:\n  - strip_prefix: module.\n  - cast: {keys: '**', dtype: float16}\n"
    )
    (tmp_path / "out.safetensors").write_bytes(b"old")
    argv = ["run", "half.yaml", "in.safetensors", "out.safetensors", "--force"]
    done = commands.run(*argv, cwd=tmp_path, limits={"RLIMIT_AS": size + 200 * MB})
    assert done.code == 5, done.err
    assert done.err == (
        "error: half.yaml:6  cast (step 2)  [CK503]\n  w: there is not enough memory\n"
        f"  found: {size + size // 2:,} bytes needed at once\n"
        "  try: --threads 1, or a machine with more memory\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.yaml", "in.safetensors", "out.safetensors"]
    assert (tmp_path / "out.safetensors").read_bytes() == b"old"


def test_five_hundred_shards_and_few_descriptors(tmp_path, commands):
    """Row 133: in and out, with 64 descriptors and 8 threads."""
    source = tmp_path / "in"
    source.mkdir()
    names = [f"model-{at:05}-of-00500.safetensors" for at in range(1, 501)]
    for at, name in enumerate(names):
        save_file({f"module.l.{at}": torch.full((64,), float(at))}, source / name)
    weight_map = {f"module.l.{at}": name for at, name in enumerate(names)}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for threads in (1, 8):
        argv = ["run", "dataparallel", "in", f"out-{threads}", "--shard-size", "256B", "--no-sync", "--threads", threads]
        done = commands.run(*argv, cwd=tmp_path, limits={"RLIMIT_NOFILE": 64})
        assert (done.code, done.err) == (0, "")
    one, eight = (everything(tmp_path / f"out-{threads}") for threads in (1, 8))
    assert one == eight
    assert len(one) == 501
