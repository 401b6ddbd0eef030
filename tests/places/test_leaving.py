"""Outputs for stores: whole or not there, the old one until the new one is, and no part of an upload left behind."""

import json
import re

import pytest
import torch
from placing import NONE, put_folder, tensors
from safetensors.torch import load, save_file

import ckptconv
from ckptconv.places import leaving
from ckptconv.places.stores import TRIES

OUT = "slow://bucket/out.safetensors"


@pytest.fixture
def rule(tmp_path):
    (tmp_path / "none.yaml").write_text(NONE)
    return tmp_path / "none.yaml"


@pytest.fixture
def parts(monkeypatch):
    """Uploads in parts of 64 KiB."""
    monkeypatch.setattr(leaving, "PART", 64 << 10)


def fetched(store, path):
    return load(store.body(path))


def folder_of(store, path):
    """The checkpoint in a folder of the store, as somebody reads it who trusts the index."""
    index = next((name for name in store.objects if name.startswith(f"{path}/") and name.endswith(".index.json")), None)
    if index is None:
        return None
    shards = set(json.loads(store.body(index))["weight_map"].values())
    return {key: value for shard in sorted(shards) for key, value in fetched(store, f"{path}/{shard}").items()}


def same(one, other):
    return one is not None and one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in other)


def test_a_file_is_one_upload_in_parts(store, scratch, tmp_path, source, rule, parts):
    seen = []
    store.hook = lambda request: seen.append((request.kind, "bucket/out.safetensors" in store.objects))
    report = ckptconv.run(rule, source, OUT)
    assert report.destination["path"] == OUT
    assert report.destination["written"]
    kinds = [kind for kind, _ in seen]
    assert kinds.count("part") == -(-report.destination["nbytes"] // (64 << 10))
    assert kinds.count("put") == 1
    assert [kind for kind, visible in seen if visible] == ["head"]  # it is looked at once it is there
    assert same(fetched(store, "bucket/out.safetensors"), tensors())
    assert not store.uploads


def test_a_small_file_is_one_request(store, scratch, source, rule):
    ckptconv.run(rule, source, OUT)
    assert [request.kind for request in store.log if request.kind not in ("head", "list")] == ["put"]


def test_of_a_folder_the_index_goes_last(store, scratch, tmp_path, source, rule):
    (tmp_path / "in").mkdir()
    source.rename(tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text("{}")
    ckptconv.run(rule, tmp_path / "in", "slow://bucket/new/", shard_size="500KB")
    puts = [request.path.removeprefix("bucket/new/") for request in store.log if request.kind == "put"]
    assert puts[-2:] == ["config.json", "model.safetensors.index.json"]
    assert len(puts) == 4
    assert same(folder_of(store, "bucket/new"), tensors())
    assert not ckptconv.verify("slow://bucket/new", against=tmp_path / "in", rules=rule).ladder.failed


def test_a_folder_without_an_index_ends_with_its_model(store, scratch, tmp_path, source, rule):
    (tmp_path / "in").mkdir()
    source.rename(tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "zebra.json").write_text("{}")
    ckptconv.run(rule, tmp_path / "in", "slow://bucket/llama-3.1/")
    assert [request.path for request in store.log if request.kind == "put"] == [
        "bucket/llama-3.1/zebra.json",
        "bucket/llama-3.1/model.safetensors",
    ]


def test_what_is_there_is_refused_before_anything_is_read(store, scratch, source, rule):
    store.put("bucket/in.safetensors", source)
    store.put("bucket/out.safetensors", b"old")
    with pytest.raises(ckptconv.CkptconvError) as caught:
        ckptconv.run(rule, "slow://bucket/in.safetensors", OUT)
    assert str(caught.value) == (
        f"{OUT}  [CK501]\n  the output exists already, and nothing is ever overwritten unasked\n  try: --force, or another name"
    )
    assert store.body("bucket/out.safetensors") == b"old"
    assert store.read_nbytes <= 64 << 10
    assert not store.written_nbytes


def test_with_force_an_old_file_stands_until_the_new_one_is_whole(store, scratch, tmp_path, source, rule, parts):
    store.put("bucket/out.safetensors", b"old")
    seen = []
    store.hook = lambda request: seen.append((request.kind, store.body("bucket/out.safetensors") == b"old"))
    ckptconv.run(rule, source, OUT, force=True)
    assert [kind for kind, old in seen if not old] == ["head"]
    assert same(fetched(store, "bucket/out.safetensors"), tensors())


def test_with_force_an_old_folder_stands_until_the_new_one_is_whole(store, scratch, tmp_path, source, rule):
    """At every request, whoever reads by the index gets the old checkpoint or the new one, never a mixture."""
    save_file(tensors(seed=1), tmp_path / "old.safetensors")
    for number, (path, seed) in enumerate([(tmp_path / "old.safetensors", 1), (source, 0), (tmp_path / "old.safetensors", 1)]):
        before = set(store.objects)
        found = []

        def look(request, found=found):
            found.append(folder_of(store, "bucket/out"))

        store.hook = look if number else None
        ckptconv.run(rule, path, "slow://bucket/out/", shard_size="500KB", force=True)
        store.hook = None
        assert all(same(each, tensors(seed=0)) or same(each, tensors(seed=1)) for each in found)
        assert same(folder_of(store, "bucket/out"), tensors(seed=seed))
        assert len(store.objects) == 3
        assert not number or len(set(store.objects) & before) == 1  # the index


def test_force_takes_no_more_away_than_a_checkpoint(store, scratch, source, rule):
    store.put("bucket/out/model.safetensors", b"old")
    store.put("bucket/out/thesis/chapter.tex", b"mine")
    with pytest.raises(
        ckptconv.CkptconvError, match=r"(?s)slow://bucket/out/  \[CK503\].*more than one converted checkpoint.*found: thesis"
    ):
        ckptconv.run(rule, source, "slow://bucket/out/", force=True)
    assert len(store.objects) == 2


@pytest.mark.parametrize(
    ("word", "destination", "message"),
    [
        ("in/model.safetensors", "in/model.safetensors", "the output is the source"),
        ("in", "in/", "the output is the source"),
        ("in/", "in/new.safetensors", "the output and the source lie in one another"),
        ("in/model.safetensors", "in/", "the output and the source lie in one another"),
        ("in/", "", "the output and the source lie in one another"),
    ],
)
def test_the_output_is_never_the_source(store, scratch, source, rule, word, destination, message):
    store.put("bucket/in/model.safetensors", source)
    with pytest.raises(ckptconv.CkptconvError, match=rf"slow://bucket/{destination}  \[CK502\]\n  {message}"):
        ckptconv.run(rule, f"slow://bucket/{word}", f"slow://bucket/{destination}", force=True)
    assert store.body("bucket/in/model.safetensors") == source.read_bytes()


def test_what_is_not_verified_is_not_sent(store, scratch, source, rule, monkeypatch):
    from ckptconv.stage import producing

    seal = producing.seal_all

    def and_spoil(layouts, receipt, metadata, folder):
        seal(layouts, receipt, metadata, folder)
        path = folder / layouts[0].name
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)

    monkeypatch.setattr(producing, "seal_all", and_spoil)
    with pytest.raises(ckptconv.CkptconvError) as caught:
        ckptconv.run(rule, source, OUT)
    assert caught.value.exit_code == 4
    assert not store.objects
    assert not store.written_nbytes


@pytest.mark.parametrize("error", [KeyboardInterrupt, PermissionError("no"), OSError(5, "Input/output error")])
@pytest.mark.parametrize("kind", ["part", "put"])
def test_an_upload_that_fails_leaves_nothing(store, scratch, source, rule, parts, kind, error):
    seen = 0

    def hook(request):
        nonlocal seen
        seen += request.kind == kind
        if request.kind == kind and seen >= (3 if kind == "part" else 1):
            raise error

    store.hook = hook
    with pytest.raises((KeyboardInterrupt, ckptconv.CkptconvError)) as caught:
        ckptconv.run(rule, source, OUT)
    if error is not KeyboardInterrupt:
        assert re.match(rf"{OUT}  \[CK503\]\n  the output cannot be sent(: access is denied|, after {TRIES} tries)\n", str(caught.value))
    assert not store.objects
    assert not store.uploads


def test_any_filesystem_gets_the_file_under_another_name_first(scratch, tmp_path, source, rule, monkeypatch):
    import fsspec

    fs = fsspec.filesystem("memory")
    seen = []
    move = type(fs).mv
    monkeypatch.setattr(type(fs), "mv", lambda self, one, other, **words: (seen.append(set(fs.store)), move(self, one, other, **words))[1])
    ckptconv.run(rule, source, "memory://leaving/out.safetensors")
    assert [[re.sub(r"[0-9a-f]{8}", "…", name) for name in each if "/leaving/" in name] for each in seen] == [
        ["/leaving/.out.safetensors.….partial"]
    ]
    assert fs.ls("/leaving", detail=False) == ["/leaving/out.safetensors"]

    def fail(self, one, other, **words):
        raise PermissionError("no")

    monkeypatch.setattr(type(fs), "mv", fail)
    with pytest.raises(ckptconv.CkptconvError, match="CK503"):
        ckptconv.run(rule, source, "memory://leaving/new.safetensors")
    assert fs.ls("/leaving", detail=False) == ["/leaving/out.safetensors"]


def test_the_hub_is_not_written_to(scratch, source, rule):
    with pytest.raises(ckptconv.CkptconvError, match=r"(?s)hf://a/b  \[CK107\].*hf:// is a place to read from"):
        ckptconv.run(rule, source, "hf://a/b")


def test_progress_tells_of_sending(store, scratch, source, rule, parts):
    told = []
    ckptconv.run(rule, source, OUT, progress=lambda *words: told.append(words))
    assert told[-1] == ("sending", store.objects["bucket/out.safetensors"].nbytes, store.objects["bucket/out.safetensors"].nbytes)


def test_a_plan_for_a_url_writes_nothing(store, scratch, source, rule):
    report = ckptconv.plan(rule, source, "slow://bucket/llama-3.1/", shard_size="500KB")
    assert report.destination["path"] == "slow://bucket/llama-3.1/"
    assert len(report.destination["files"]) == 2
    assert not store.log


def test_folders_in_the_way(store, scratch, tmp_path, source, rule):
    put_folder(store, tmp_path, "bucket/out.safetensors")
    with pytest.raises(ckptconv.CkptconvError, match="CK501"):
        ckptconv.run(rule, source, OUT)


@pytest.mark.parametrize(("options", "word"), [({"resume": True}, "--resume"), ({"engine": "ray"}, "--engine ray")])
def test_work_that_outlives_a_process_stays_on_disks(store, scratch, tmp_path, source, rule, options, word):
    store.put("bucket/in.safetensors", source)
    for here, there in ((source, OUT), ("slow://bucket/in.safetensors", tmp_path / "out.safetensors")):
        with pytest.raises(ckptconv.CkptconvError, match=rf"slow://bucket/.*  \[CK107\]\n  {word} needs source and destination on a disk"):
            ckptconv.run(rule, here, there, **options)


def test_a_saved_plan_runs_at_urls(store, scratch, tmp_path, source, rule):
    store.put("bucket/in.safetensors", source)
    ckptconv.plan(rule, "slow://bucket/in.safetensors", OUT, out=tmp_path / "plan.json")
    assert "scratch" not in (tmp_path / "plan.json").read_text()
    ckptconv.run(None, "slow://bucket/in.safetensors", OUT, plan_file=tmp_path / "plan.json")
    assert same(fetched(store, "bucket/out.safetensors"), tensors())


def test_commands_that_take_paths_say_so(tmp_path, source, rule):
    with pytest.raises(ckptconv.CkptconvError, match=r"CK107\]\n  this command takes paths, and no URLs"):
        ckptconv.batch([source], rule, tmp_path / "out", also=["other=slow://bucket/in"], jobs=1)


def test_a_distributed_checkpoint_ends_with_its_metadata_and_is_not_replaced(store, scratch, source, rule):
    ckptconv.run(rule, source, "slow://bucket/dcp/", format="dcp")
    puts = [request.path.removeprefix("bucket/dcp/") for request in store.log if request.kind == "put"]
    assert puts[-1] == ".metadata"
    assert len(puts) > 1
    with pytest.raises(ckptconv.CkptconvError, match=r"CK503\]\n  a distributed checkpoint in a store is not replaced"):
        ckptconv.run(rule, source, "slow://bucket/dcp/", format="dcp", force=True)
