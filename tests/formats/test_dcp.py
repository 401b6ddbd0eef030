"""Folders of torch.distributed.checkpoint that we write, as torch's own readers see them; and real ones of other layouts, as we see them."""

import os
import pickle
import resource
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import ckptconv
from ckptconv import formats
from ckptconv.formats.base import Converted, Kept
from ckptconv.formats.dcp_writer import WRITER
from ckptconv.ruleset.model import parse
from ckptconv.spec import DType, Manifest, TensorSpec
from ckptconv.target.distributed import mapped_state


def rules(*steps, **header):
    import json

    return parse(json.dumps({"version": 1, "name": "t", "summary": "t", "steps": steps, **header}).encode(), "t.yaml")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Small(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


def whole(folder, tmp_path):
    """Everything in a folder, put together by torch."""
    dcp_to_torch_save(folder, tmp_path / "whole.pth")
    return torch.load(tmp_path / "whole.pth", weights_only=True)


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("shard_size", ["5GB", "200B"])
def test_a_model_loads_what_we_write(tmp_path, shard_size):
    model = Small()
    torch.save(model.state_dict(), tmp_path / "in.pth")
    report = ckptconv.run("plain-tensors", tmp_path / "in.pth", tmp_path / "out", format="dcp", shard_size=shard_size, verify=4)
    assert report.ladder.reached == "L0 L1 L3 L4"
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [".metadata", "__0_0.distcp"] if shard_size == "5GB" else len(files) > 3
    into = Small(seed=1)
    state = into.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    assert_equal(dict(into.state_dict()), dict(model.state_dict()))
    assert_equal(whole(tmp_path / "out", tmp_path), dict(model.state_dict()))


def test_tied_names_are_one_archive(tmp_path):
    torch.save(Small().state_dict(), tmp_path / "in.pth")
    ckptconv.run("plain-tensors", tmp_path / "in.pth", tmp_path / "out", format="dcp")
    places = dcp.FileSystemReader(tmp_path / "out").read_metadata().storage_data
    by_name = {index.fqn: (place.relative_path, place.offset) for index, place in places.items()}
    assert by_name["head.weight"] == by_name["embed.weight"]
    assert len(set(by_name.values())) == len(by_name) - 1
    (container,) = formats.read(tmp_path / "out").containers.values()
    assert container.manifest.ties == (("embed.weight", "head.weight"),)


def test_every_archive_is_a_whole_zip_whose_values_lie_at_multiples_of_64(tmp_path):
    torch.save(Small().state_dict(), tmp_path / "in.pth")
    ckptconv.run("plain-tensors", tmp_path / "in.pth", tmp_path / "out", format="dcp")
    data = (tmp_path / "out" / "__0_0.distcp").read_bytes()
    for index, place in dcp.FileSystemReader(tmp_path / "out").read_metadata().storage_data.items():
        with zipfile.ZipFile(BytesIO(data[place.offset : place.offset + place.length])) as archive:
            assert archive.testzip() is None, index
    container = formats.read(tmp_path / "out").containers["."]
    assert {(placed.storage.offset + placed.offset) % 64 for placed in container.tensors.values()} == {0}


def test_values_lie_where_they_lay_in_a_page():
    """So that a filesystem which can share bytes between files may do it."""
    manifest = Manifest({name: TensorSpec((size,), DType.uint8) for name, size in (("a", 5000), ("b", 3), ("c", 9000))})
    layout = WRITER.lay_out("f", manifest, metadata={}, phases={"a": 640, "c": 4032})
    assert [layout.slots[name].offset % 4096 for name in "ac"] == [640, 4032]
    assert layout.slots["b"].offset % 64 == 0


def test_a_rename_is_a_copy_of_bytes(tmp_path):
    from ckptconv.execute.engine import Receipt
    from ckptconv.stage import producing

    seen: list[Receipt] = []
    produce = producing.fill
    try:
        producing.fill = lambda *given, **options: seen.append(produce(*given, **options)) or seen[-1]
        torch.save({"module.w": normal(300, 7), "module.b": normal(9, dtype=torch.bfloat16)}, tmp_path / "in.pth")
        ckptconv.run("dataparallel", tmp_path / "in.pth", tmp_path / "out", format="dcp")
    finally:
        producing.fill = produce
    assert (seen[0].copied_nbytes, seen[0].computed_nbytes) == (300 * 7 * 4 + 9 * 2, 0)
    assert_equal(whole(tmp_path / "out", tmp_path), {"w": normal(300, 7), "b": normal(9, dtype=torch.bfloat16)})


def test_there_and_back_is_the_same_checkpoint(tmp_path):
    model = Small()
    dcp.save(dict(model.state_dict()), checkpoint_id=tmp_path / "dcp", no_dist=True)
    there = rules({"rename": {"layers.{i:int}.{p}": "model.blocks.{i}.{p}", "{m:embed|head|norm}.{p}": "model.{m}.{p}"}})
    back = rules({"rename": {"model.blocks.{i:int}.{p}": "layers.{i}.{p}", "model.{m:embed|head|norm}.{p}": "{m}.{p}"}})
    ckptconv.run(there, tmp_path / "dcp", tmp_path / "hf", format="safetensors", untie=True)
    ckptconv.run(back, tmp_path / "hf", tmp_path / "again", format="dcp")
    assert_equal(whole(tmp_path / "again", tmp_path), whole(tmp_path / "dcp", tmp_path))


def test_a_training_checkpoint_keeps_its_optimizer(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = torch.optim.AdamW(model.parameters(), 0.125)
    model(normal(2, 3)).sum().backward()
    optimizer.step()
    state = {"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}, "optimizer": optimizer.state_dict(),
             "epoch": 7, "note": "später", "rng": (normal(2), 3), "nothing": None}  # fmt: skip
    torch.save(state, tmp_path / "in.ckpt")
    ckptconv.run("dataparallel", tmp_path / "in.ckpt", tmp_path / "out", format="dcp", keep_extras=True, shard_size="60B")
    assert len(list((tmp_path / "out").glob("*.distcp"))) > 4
    found = whole(tmp_path / "out", tmp_path)
    assert_equal(found["state_dict"], dict(model.state_dict()))
    assert (found["epoch"], found["note"], found["rng"][1], found["nothing"]) == (7, "später", 3, None)
    assert torch.equal(found["rng"][0], normal(2))
    wanted = optimizer.state_dict()
    assert found["optimizer"]["param_groups"] == wanted["param_groups"]
    for number, moments in wanted["state"].items():  # torch makes text of the keys
        assert_equal(found["optimizer"]["state"][str(number)], moments)
    # The same once more, from the folder; and out of it again.
    ckptconv.run("plain-tensors", tmp_path / "out", tmp_path / "again", keep_extras=True)
    assert (tmp_path / "again" / ".metadata").is_file()
    ckptconv.run("plain-tensors", tmp_path / "again", tmp_path / "again.pth", keep_extras=True)
    last = torch.load(tmp_path / "again.pth", weights_only=True)
    assert last["optimizer"]["param_groups"] == wanted["param_groups"]
    assert torch.equal(last["optimizer"]["state"]["0"]["exp_avg"], wanted["state"][0]["exp_avg"])
    assert torch.equal(last["rng"][0], normal(2))


def test_weights_at_the_top_keep_what_stands_beside_them(tmp_path, cli):
    """As torchtitan saves: the model's names at the top, and dicts of other things."""
    weights = {"layers.0.weight": normal(3, 2), "norm.weight": normal(3)}
    state = {
        **weights,
        "optimizer": {"state.norm.weight.exp_avg": normal(3, seed=1), "param_groups.norm.weight.lr": 0.5},
        "train_state": {"step": 4},
    }
    dcp.save(state, checkpoint_id=tmp_path / "in", no_dist=True)
    (tmp_path / "r.yaml").write_text(
        '{"version": 1, "name": "r", "summary": "t", "steps": [{"rename": {"layers.{i:int}.{p}": "blocks.{i}.{p}"}}]}'
    )
    said = cli("run", "r.yaml", "in", "plain", cwd=tmp_path)
    assert said.code == 0
    assert "left behind: .: optimizer (dict)" in said.out
    assert whole(tmp_path / "plain", tmp_path).keys() == {"blocks.0.weight", "norm.weight"}
    refused = cli("run", "r.yaml", "in", "out.pth", "--keep-extras", cwd=tmp_path)
    assert refused.code == 2
    assert "only --format dcp keeps them so" in refused.err
    said = cli("run", "r.yaml", "in", "out", "--keep-extras", cwd=tmp_path)
    assert said.code == 0
    assert "left behind" not in said.out
    found = whole(tmp_path / "out", tmp_path)
    assert torch.equal(found["blocks.0.weight"], weights["layers.0.weight"])
    assert torch.equal(found["optimizer"]["state.norm.weight.exp_avg"], normal(3, seed=1))
    assert (found["optimizer"]["param_groups.norm.weight.lr"], found["train_state"]["step"]) == (0.5, 4)
    assert found.keys() == {"blocks.0.weight", "norm.weight", "optimizer", "train_state"}


def test_lists_are_taken_apart_where_torch_does_it():
    tree = {"model": Converted(), "a": [[1, 2], 3], "b": [{"x": 1}, Kept("::m", TensorSpec((2,), DType.int8))], "c": [], "d": {}}
    layout = WRITER.lay_out("f", Manifest({"w": TensorSpec((3,), DType.int8)}), metadata={}, tree=tree)
    entries = {entry.fqn: entry.path for blob in layout.detail for entry in blob.entries}
    assert entries == {"model.w": ("model", "w"), "a": ("a",), "b.0.x": ("b", 0, "x"), "b.1": ("b", 1), "c": ("c",)}
    plain = {"model": {"w": torch.zeros(3)}, "a": [[1, 2], 3], "b": [{"x": 1}, torch.zeros(2)], "c": [], "d": {}}
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict

    assert entries == flatten_state_dict(plain)[1]


def test_names_that_flatten_to_one_are_refused(tmp_path, cli):
    torch.save({"state_dict": {"a.b": normal(2)}, "state_dict.a": {"b": 3}}, tmp_path / "in.pth")
    result = cli("run", "plain-tensors", "in.pth", "out", "--format", "dcp", "--keep-extras", "--select", "state_dict", cwd=tmp_path)
    assert result.code == 2
    assert "two entries would be called 'state_dict.a.b'" in result.err
    assert not (tmp_path / "out").exists()


def test_what_is_no_folder_is_refused(tmp_path, cli):
    torch.save({"w": normal(2)}, tmp_path / "in.pth")
    result = cli("run", "plain-tensors", "in.pth", "out.pth", "--format", "dcp", cwd=tmp_path)
    assert result.code == 2
    assert "--format dcp, but the destination's name says torch" in result.err
    assert cli("run", "plain-tensors", "in.pth", "step.100", "--format", "dcp", cwd=tmp_path).code == 0
    assert_equal(whole(tmp_path / "step.100", tmp_path), {"w": normal(2)})


def test_the_written_folder_is_loaded_strictly(tmp_path, cli):
    (tmp_path / "small_dcp.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(2, 3)\n")
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "in.pth")
    said = cli("run", "plain-tensors", "in.pth", "out", "--format", "dcp", "--target", "py:small_dcp:make", cwd=tmp_path)
    assert "L2 ok     strict load" in said.out
    assert cli("verify", "out", "--target", "py:small_dcp:make", cwd=tmp_path).code == 0


def test_torch_s_metadata_and_the_archives_must_agree_and_nothing_of_it_is_run(tmp_path):
    torch.save({"a.w": normal(2)}, tmp_path / "in.pth")
    ckptconv.run("plain-tensors", tmp_path / "in.pth", tmp_path / "out", format="dcp")
    assert_equal(mapped_state(tmp_path / "out", "."), {"a.w": normal(2)})
    raw = (tmp_path / "out" / ".metadata").read_bytes()
    (tmp_path / "out" / ".metadata").write_bytes(raw.replace(b"ctorch\nfloat32\n", b"ctorch\nfloat64\n"))
    with pytest.raises(ValueError, match=r"a\.w is torch\.float32 \[2\], and its metadata says otherwise"):
        mapped_state(tmp_path / "out", ".")
    # An object that our own machine leaves out, and that an unpickler of torch's would make: it is not on the list.
    at = raw.index(b"N", raw.index(b"storage_meta"))
    (tmp_path / "out" / ".metadata").write_bytes(raw[:at] + b"cargparse\nNamespace\n)R" + raw[at + 1 :])
    assert list(formats.read(tmp_path / "out").containers["."].tensors) == ["a.w"]
    with pytest.raises(pickle.UnpicklingError, match=r"\.metadata asks for argparse\.Namespace"):
        mapped_state(tmp_path / "out", ".")


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_where_a_checkpoint_was_saved_is_no_attack(tmp_path, module):
    """torch notes the path; Python 3.13 has another name for its class."""
    dcp.save({"a.w": normal(2)}, checkpoint_id=tmp_path / "in", no_dist=True)
    path = tmp_path / "in" / ".metadata"
    metadata = dcp.FileSystemReader(tmp_path / "in").read_metadata()
    metadata.storage_meta.checkpoint_id = Path("/home/me")
    raw = pickle.dumps(metadata, protocol=2)
    path.write_bytes(raw.replace(b"cpathlib\nPosixPath\n", f"c{module}\nPosixPath\n".encode()))
    assert module.encode() in path.read_bytes()
    assert list(formats.read(tmp_path / "in").containers["."].tensors) == ["a.w"]
    assert_equal(mapped_state(tmp_path / "in", "."), {"a.w": normal(2)})


def test_torch_itself_reads_the_metadata_as_its_own(tmp_path):
    """Field by field what torch writes for the same state_dict, but for where things lie."""
    state = {"model": dict(Small().state_dict()), "step": 3}
    dcp.save(state, checkpoint_id=tmp_path / "theirs", no_dist=True)
    ckptconv.run("plain-tensors", tmp_path / "theirs", tmp_path / "ours", keep_extras=True)
    theirs, ours = (dcp.FileSystemReader(tmp_path / name).read_metadata() for name in ("theirs", "ours"))
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    assert ours.version == theirs.version
    assert Path(tmp_path / "ours" / ".metadata").stat().st_size < 2 * Path(tmp_path / "theirs" / ".metadata").stat().st_size


def test_the_tasks_of_many_machines_write_the_same_folder(tmp_path, cli):
    torch.save(Small().state_dict(), tmp_path / "in.pth")
    shape = ["plain-tensors", "in.pth", "out", "--format", "dcp", "--shard-size", "200B"]
    for words in (["plan", *shape, "--out", "plan.json"], ["work", "plan.json"], ["finish", "plan.json"]):
        done = cli(*words, cwd=tmp_path)
        assert done.code == 0, done.err
    ckptconv.run("plain-tensors", tmp_path / "in.pth", tmp_path / "one", format="dcp", shard_size="200B")
    of_many, of_one = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("out", "one"))
    assert of_many == of_one
    assert len(of_one) > 3


def test_a_batch_of_files_becomes_folders(tmp_path, cli):
    (tmp_path / "in").mkdir()
    torch.save({"w": normal(2)}, tmp_path / "in" / "a.pth")
    done = cli("batch", "in/*.pth", "-r", "plain-tensors", "-o", "out", "--format", "dcp", cwd=tmp_path)
    assert done.code == 0, done.err
    assert_equal(whole(tmp_path / "out" / "a", tmp_path), {"w": normal(2)})


class Stranger:
    pass


def test_values_are_read_as_far_as_they_are_plain(tmp_path, monkeypatch):
    state = {"model": {"a.w": normal(2)}, "text": "x" * 9000, "odd": {"object": Stranger()}, "pair": (1, normal(3))}
    dcp.save(state, checkpoint_id=tmp_path / "in", no_dist=True)
    tree = formats.read(tmp_path / "in").tree
    assert tree["text"] == "x" * 9000
    assert tree["pair"][0] == 1
    assert str(tree["pair"][1].spec) == "[3] float32"
    assert tree["odd"]["object"].name.endswith("test_dcp.Stranger")
    (length,) = (
        place.length for index, place in dcp.FileSystemReader(tmp_path / "in").read_metadata().storage_data.items() if index.fqn == "text"
    )
    for limit, value in (("MAX_VALUES", 1), ("MAX_PICKLE", length)):
        with monkeypatch.context() as patched:
            patched.setattr(formats.dcp, limit, value)
            contents = formats.read(tmp_path / "in")
            assert contents.warnings == ("2 entries that are no tensors were not read; they are left behind",)
            assert contents.tree["text"] == "x" * 9000
            assert contents.tree["pair"].name.endswith("BytesStorageMetadata")


def test_one_archive_of_many_names_is_read_once(tmp_path, monkeypatch):
    """Else a few bytes of metadata could ask for the same megabytes of pickle a million times."""
    model = nn.ModuleList([nn.Linear(2, 2)] * 5)
    torch.save(model.state_dict(), tmp_path / "in.pth")
    ckptconv.run("plain-tensors", tmp_path / "in.pth", tmp_path / "out", format="dcp")
    calls = []
    read = formats.dcp.read_embedded
    monkeypatch.setattr(formats.dcp, "read_embedded", lambda *given: calls.append(given) or read(*given))
    assert len(formats.read(tmp_path / "out").containers["."].tensors) == 10
    assert len(calls) == 2


def test_a_file_from_each_of_many_ranks(tmp_path):
    """More of them than files may be open at a time."""
    weights = {f"layers.{at}.w": normal(2, seed=at) for at in range(60)}
    torch.save(weights, tmp_path / "in.pth")
    ckptconv.run("plain-tensors", tmp_path / "in.pth", tmp_path / "out", format="dcp", shard_size="8B")
    assert len(list((tmp_path / "out").glob("*.distcp"))) == 60
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, hard))
    try:
        contents = formats.read(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert list(contents.containers["."].tensors) == list(weights)
    assert_equal(mapped_state(tmp_path / "out", "."), weights)


def test_companions_come_along(tmp_path):
    dcp.save({"w": normal(2)}, checkpoint_id=tmp_path / "in", no_dist=True)
    (tmp_path / "in" / "config.json").write_text("{}")
    ckptconv.run("plain-tensors", tmp_path / "in", tmp_path / "out", format="safetensors")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    ckptconv.run("plain-tensors", tmp_path / "out", tmp_path / "again", format="dcp")
    ckptconv.run("plain-tensors", tmp_path / "in", tmp_path / "again", force=True)
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [".metadata", "__0_0.distcp", "config.json"]
