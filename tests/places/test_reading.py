"""Sources at URLs: the same result as from the disk, and not a byte more than is needed."""

import importlib
import json
from itertools import pairwise

import pytest
import torch
from placing import (
    NONE,
    put_folder,
    tensors,
    write_dcp,
    write_index,
    write_legacy,
    write_pth,
    write_ranks,
    write_safetensors,
    write_shards,
)
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv.places import fetching, mirror
from ckptconv.places.settings import using
from ckptconv.verify.rungs import Rung

DROPS = "version: 1\nname: drops\nsummary: leaves the big one out\nsteps:\n  - drop: module.big\n  - strip_prefix: module.\n"


@pytest.mark.parametrize("write", [write_safetensors, write_pth, write_legacy, write_shards, write_index, write_dcp, write_ranks])
def test_the_result_is_that_of_the_same_files_here(store, scratch, tmp_path, write):
    here = tmp_path / "here"
    here.mkdir()
    name = write(here)
    put_folder(store, here, "bucket/some")
    rule = tmp_path / "none.yaml"
    rule.write_text(NONE)
    local = ckptconv.run(rule, here / name, tmp_path / "local.safetensors")
    remote = ckptconv.run(rule, f"slow://bucket/some/{name}", tmp_path / "remote.safetensors")
    assert remote.ladder.reached == local.ladder.reached != "none"
    assert remote.source == {**local.source, "path": f"slow://bucket/some/{name}"}
    one, other = load_file(tmp_path / "local.safetensors"), load_file(tmp_path / "remote.safetensors")
    assert list(one) == list(other)
    assert all(torch.equal(one[key].view(torch.uint8), other[key].view(torch.uint8)) for key in one)


@pytest.mark.parametrize("write", [write_safetensors, write_pth])
def test_inspect_reads_headers_only(store, scratch, tmp_path, write):
    store.put("bucket/in", tmp_path / write(tmp_path))
    report = ckptconv.inspect("slow://bucket/in")
    assert report.path == "slow://bucket/in"
    assert store.read_nbytes < 300_000


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_what_the_plan_does_not_need_is_not_fetched(store, scratch, tmp_path, suffix):
    big = 4 << 20
    everything = tensors(big=big)
    path = tmp_path / f"in.{suffix}"
    save_file(everything, path) if suffix == "safetensors" else torch.save(everything, path)
    (tmp_path / "drops.yaml").write_text(DROPS)
    store.put("bucket/in", path)
    report = ckptconv.run(tmp_path / "drops.yaml", "slow://bucket/in", tmp_path / "out.safetensors")
    assert report.ladder.reached == "L0 L1 L3"
    assert report.source["digest"] == ""  # that of the whole is not known: not all of it was read
    raw = path.read_bytes()
    begin = raw.index(everything["module.big"].numpy().tobytes()[:4096])
    inner = range(begin + (64 << 10), begin + big - (64 << 10))
    assert not [each for each in store.ranges("bucket/in") if each[0] < inner.stop and each[1] > inner.start]
    assert store.read_nbytes < len(raw) - big + (256 << 10)


def test_every_byte_that_is_needed_is_fetched_once(store, scratch, tmp_path, source):
    store.put("bucket/in", source)
    ckptconv.run("dataparallel", "slow://bucket/in", tmp_path / "out.safetensors")
    ranges = sorted(store.ranges("bucket/in"))
    assert ranges[0][0] == 0
    assert all(before[1] == after[0] for before, after in pairwise(ranges))
    assert store.read_nbytes == source.stat().st_size


def test_many_requests_are_in_flight(store, scratch, tmp_path, monkeypatch, source):
    monkeypatch.setattr(fetching, "BLOCK", 32 << 10)
    store.put("bucket/in", source)
    store.latency_s = 0.02
    ckptconv.run("dataparallel", "slow://bucket/in", tmp_path / "out.safetensors", threads=1)
    assert 8 <= store.most_in_flight <= fetching.IN_FLIGHT
    assert len(store.ranges("bucket/in")) > 30


def test_scattered_tensors_come_many_at_a_time(store, scratch, tmp_path):
    """Every second tensor is needed, by one worker that reads one after the other."""
    save_file({f"{at:02}.{'keep' if at % 2 else 'leave'}": torch.randn(16 << 10) for at in range(32)}, tmp_path / "in.safetensors")
    store.put("bucket/in", tmp_path / "in.safetensors")
    (tmp_path / "some.yaml").write_text("version: 1\nname: some\nsummary: s\nsteps:\n  - keep: ['{i}.keep']\n")
    store.latency_s = 0.02
    ckptconv.run(tmp_path / "some.yaml", "slow://bucket/in", tmp_path / "out.safetensors", threads=1)
    assert store.most_in_flight >= 8
    assert store.read_nbytes < (tmp_path / "in.safetensors").stat().st_size * 0.6


def write_eight_ranks(folder):
    for rank in range(8):
        torch.save(tensors(rank), folder / f"consolidated.{rank:02}.pth")


def write_eight_shards(folder):
    (folder.parent / "none.yaml").write_text(NONE)
    save_file({f"{at}": torch.randn(50_000) for at in range(8)}, folder.parent / "whole.safetensors")
    ckptconv.run(folder.parent / "none.yaml", folder.parent / "whole.safetensors", folder / "out", shard_size="200KB")
    for path in (folder / "out").iterdir():
        path.rename(folder / path.name)


def write_many_chunks(folder):
    import torch.distributed.checkpoint as dcp

    dcp.save({f"{at}": torch.randn(50_000) for at in range(24)}, checkpoint_id=folder, no_dist=True)


def write_many_records(folder):
    torch.save({f"{at}": torch.randn(50_000) for at in range(24)}, folder / "model.pth")


@pytest.mark.parametrize("write", [write_eight_ranks, write_eight_shards, write_many_chunks, write_many_records])
def test_headers_of_many_parts_come_at_once(store, scratch, tmp_path, write):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    put_folder(store, tmp_path / "in", "bucket/in")
    store.latency_s = 0.02
    ckptconv.inspect("slow://bucket/in")
    assert store.most_in_flight >= 7
    assert store.read_nbytes < sum(path.stat().st_size for path in (tmp_path / "in").rglob("*") if path.is_file()) / 2


def test_the_scratch_folder_holds_no_more_than_is_allowed(store, scratch, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "BLOCK", 64 << 10)
    monkeypatch.setattr(fetching, "AHEAD", 256 << 10)
    monkeypatch.setattr(fetching, "LOOK", 8 << 10)
    save_file({f"module.{at}": torch.randn(64 << 10) for at in range(48)}, tmp_path / "in.safetensors")  # 12 MiB
    store.put("bucket/in", tmp_path / "in.safetensors")
    most = 0

    def look(request):
        nonlocal most
        most = max(most, sum(file.stat().st_blocks * 512 for file in scratch.rglob("*") if file.is_file()))

    store.hook = look
    with using(scratch_size=4 << 20):  # two workers read a MiB at a time, and something comes ahead
        ckptconv.run("dataparallel", "slow://bucket/in", tmp_path / "out.safetensors")
    assert 2 << 20 < most <= 9 << 19
    assert store.read_nbytes <= (tmp_path / "in.safetensors").stat().st_size + fetching.LOOK
    assert load_file(tmp_path / "out.safetensors").keys() == {str(at) for at in range(48)}


def test_computed_outputs_and_every_rung_read_what_they_need(store, scratch, tmp_path, monkeypatch, source):
    monkeypatch.setattr(fetching, "BLOCK", 64 << 10)
    monkeypatch.setattr(fetching, "_TURN", 128 << 10)
    (tmp_path / "cast.yaml").write_text(
        "version: 1\nname: cast\nsummary: casts\nsteps:\n  - cast: {keys: module.big, dtype: float64}\n"
        "  - reshape: {keys: module.big, shape: [2, -1]}\n  - rearrange: {keys: module.big, pattern: 'a b -> b a'}\n"
    )
    store.put("bucket/in", source)
    with using(scratch_size=300 << 10):
        report = ckptconv.run(tmp_path / "cast.yaml", "slow://bucket/in", tmp_path / "out.safetensors", verify=4)
    assert report.ladder.reached == "L0 L1 L3 L4"
    assert torch.equal(load_file(tmp_path / "out.safetensors")["module.big"].T.reshape(-1), tensors()["module.big"].double())


def test_where_it_came_from_is_recorded_and_reported(store, scratch, tmp_path, source):
    store.put("bucket/in", source)
    report = ckptconv.run("dataparallel", "slow://bucket/in", tmp_path / "out.safetensors")
    recorded = json.loads(_header(tmp_path / "out.safetensors"))["__metadata__"]
    assert recorded["ckptconv.source"] == "slow://bucket/in"
    assert report.to_json()["source"]["path"] == "slow://bucket/in"
    assert ckptconv.verify(tmp_path / "out.safetensors", against="slow://bucket/in").ladder.reached == "L0 L1 L3"


def _header(path):
    with path.open("rb") as stream:
        return stream.read(int.from_bytes(stream.read(8), "little"))


def test_a_config_beside_the_file_is_found(store, scratch, tmp_path, source):
    (tmp_path / "config.yaml").write_text(
        "version: 1\nname: config\nsummary: by the config\nvars: {N: config.rows}\nsteps:\n  - reshape: {keys: module.first, shape: [N, -1]}\n"
    )
    store.put("bucket/m/in.safetensors", source)
    store.put("bucket/m/config.json", b'{"rows": 4}')
    report = ckptconv.plan(tmp_path / "config.yaml", "slow://bucket/m/in.safetensors")
    assert report.plan.manifest["module.first"].shape == (4, 16)
    assert store.read_nbytes < (128 << 10)


def test_what_lies_beside_a_model_comes_along(store, scratch, tmp_path):
    write_shards(tmp_path)
    put_folder(store, tmp_path / "in", "bucket/in")
    store.put("bucket/in/tokenizer.json", b'{"version": "1.0"}')
    ckptconv.run("dataparallel", "slow://bucket/in/", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == '{"hidden_size": 64}'
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"version": "1.0"}'


def test_what_deepspeed_calls_the_latest(store, scratch, monkeypatch):
    store.put("bucket/in/latest", b"global_step2")
    for step in (1, 2):
        store.put(f"bucket/in/global_step{step}/zero_pp_rank_0_mp_rank_00_optim_states.pt", b"x")
    monkeypatch.setattr("ckptconv.formats.deepspeed.read", lambda step, _: (_ for _ in ()).throw(LookupError(step.name)))
    with pytest.raises(LookupError, match="global_step2"):
        ckptconv.inspect("slow://bucket/in")


def test_a_model_in_another_process_loads_it(store, scratch, tmp_path, source, monkeypatch):
    (tmp_path / "nets.py").write_text(
        "import torch\n\ndef net():\n    module = torch.nn.Linear(4, 3)\n    module.register_buffer('big', torch.zeros(300_000))\n    return module\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    save_file({"weight": torch.ones(3, 4), "bias": torch.ones(3), "big": torch.ones(300_000)}, tmp_path / "net.safetensors")
    store.put("bucket/net.safetensors", tmp_path / "net.safetensors")

    def only_opened(self):
        self.written = self.evidence.read().containers["."]
        return Rung(0, "passed", "its bytes are not read here, so that the other process finds nothing that came before")

    monkeypatch.setattr(importlib.import_module("ckptconv.verify.ladder")._Climb, "integrity", only_opened)
    report = ckptconv.verify("slow://bucket/net.safetensors", target_word="py:nets:net", level=2)
    assert report.ladder.reached == "L0 L1 L2"
    assert store.read_nbytes == (tmp_path / "net.safetensors").stat().st_size


def test_other_commands_take_urls_too(store, scratch, tmp_path, source):
    store.put("bucket/in.safetensors", source)
    save_file({key.removeprefix("module."): value for key, value in tensors().items()}, tmp_path / "out.safetensors")
    store.put("bucket/out.safetensors", tmp_path / "out.safetensors")
    one, other = "slow://bucket/in.safetensors", "slow://bucket/out.safetensors"
    assert not ckptconv.diff(one, other).equal
    assert ckptconv.diff(one, str(source)).equal
    explained = ckptconv.explain(one, other)
    assert explained.verdict == "convertible"
    assert f"ckptconv run dataparallel {one}" in json.dumps(explained.to_json())
    assert ckptconv.verify(other, against=one, rules="dataparallel").ladder.reached == "L0 L1 L3"
    assert ckptconv.verify(other, target_word=other).ladder.reached == "L0 L1"
    suggested = ckptconv.suggest(one, other)
    assert suggested.verdict == "convertible"
    assert f"{one} out.safetensors --target {other}" in json.dumps(suggested.to_json())
    ckptconv.run("dataparallel", other, tmp_path / "back.safetensors", reverse=True, like=one)
    assert load_file(tmp_path / "back.safetensors").keys() == tensors().keys()


def test_a_second_source_may_be_remote(store, scratch, tmp_path, source):
    (tmp_path / "both.yaml").write_text(
        "version: 1\nname: both\nsummary: takes one of the other\nsteps:\n  - rename: {'other::module.last': 'last'}\n  - drop: 'other::{m:**}'\n"
    )
    store.put("bucket/in.safetensors", source)
    ckptconv.run(tmp_path / "both.yaml", source, tmp_path / "out.safetensors", also=["other=slow://bucket/in.safetensors"])
    assert torch.equal(load_file(tmp_path / "out.safetensors")["last"], tensors()["module.last"])


def test_messages_name_the_url(store, scratch, tmp_path):
    store.put("bucket/bad.safetensors", b"\x40\0\0\0\0\0\0\0{not json" + b" " * 100)
    with pytest.raises(ckptconv.CkptconvError) as caught:
        ckptconv.inspect("slow://bucket/bad.safetensors")
    assert str(caught.value).startswith("slow://bucket/bad.safetensors  [CK307]\n  not valid JSON")
    assert str(scratch) not in str(caught.value)


@pytest.mark.parametrize("name", ["../up", "..", "a\\b", "c\x00d", "x" * 300])
def test_names_that_are_none_here_are_never_written(store, scratch, tmp_path, source, name):
    store.put("bucket/in/model.safetensors", source)
    store.put(f"bucket/in/{name}", b"evil")
    if len(name) > 255:
        with pytest.raises(ckptconv.CkptconvError, match="CK310"):
            ckptconv.inspect("slow://bucket/in")
    else:
        ckptconv.inspect("slow://bucket/in")
    assert not list(tmp_path.rglob("*up"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_stays_in_the_scratch_folder(store, scratch, tmp_path, monkeypatch, source, error):
    store.put("bucket/in", source)

    def stop(*_):
        raise error

    monkeypatch.setattr("ckptconv.stage.producing.seal_all", stop)
    with pytest.raises(error):
        ckptconv.run("dataparallel", "slow://bucket/in", tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("*out*"))


def test_a_folder_of_too_many_files(store, scratch, monkeypatch):
    monkeypatch.setattr(mirror, "MAX_FILES", 2)
    for number in range(3):
        store.put(f"bucket/in/{number}.pth", b"x")
    with pytest.raises(
        ckptconv.CkptconvError, match=r"slow://bucket/in  \[CK308\]\n  the folder has more than 2 files\n  try: name the index"
    ):
        ckptconv.inspect("slow://bucket/in")


def test_a_file_url_is_a_path(source):
    assert ckptconv.inspect(f"file://{source}").candidates


def test_memory_in_the_end(scratch, tmp_path, source):
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe_file("/reading/in.safetensors", source.read_bytes())
    report = ckptconv.run("dataparallel", "memory://reading/in.safetensors", "memory://reading/out.safetensors")
    assert report.ladder.reached == "L0 L1 L3"
    (tmp_path / "out.safetensors").write_bytes(fs.cat_file("/reading/out.safetensors"))
    assert load_file(tmp_path / "out.safetensors").keys() == {"first", "big", "half", "last"}
    assert fs.ls("/reading", detail=False) == ["/reading/in.safetensors", "/reading/out.safetensors"]
