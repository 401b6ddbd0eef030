"""M. Object stores: an upload that ends in the middle, and the answers by which a store says no."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

import ckptconv
from ckptconv.places import leaving, stores
from ckptconv.places.settings import using

BENCH = Path(__file__).parents[2] / "bench" / "store.py"
PASS = "version: 1\nname: pass\nsummary: passes everything\nsteps:\n  - drop: {keys: nothing.at.all, optional: true}\n"


class Answer(Exception):
    """What a client raises for a status."""

    def __init__(self, status):
        super().__init__(f"answer {status}")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


class Cut(BaseException):
    """The process ends here."""


@pytest.fixture
def store(monkeypatch, tmp_path):
    monkeypatch.setattr(stores, "WAIT", 0)
    monkeypatch.setattr(leaving, "PART", 1 << 10)
    if "latency_store" not in sys.modules:
        spec = importlib.util.spec_from_file_location("latency_store", BENCH)
        sys.modules["latency_store"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["latency_store"])
    (tmp_path / "pass.yaml").write_text(PASS)
    (tmp_path / "scratch").mkdir()
    for name, value in (("in", 1.0), ("other", 2.0)):
        save_file({f"{at}": torch.full((1000,), value + at) for at in range(3)}, tmp_path / f"{name}.safetensors")
    with using(scratch=tmp_path / "scratch"):
        yield sys.modules["latency_store"].LatencyStore()
    assert not list((tmp_path / "scratch").iterdir())


def converted(tmp_path, destination, name="in", **options):
    return ckptconv.run(tmp_path / "pass.yaml", tmp_path / f"{name}.safetensors", destination, **options)


def answering(status, times, kind="put", path=""):
    left = [times]

    def hook(request):
        if request.kind == kind and path in request.path and left[0]:
            left[0] -= 1
            raise Answer(status)

    return hook


def values(store):
    """What the index leads to; None where there is no index."""
    if "b/out/model.safetensors.index.json" not in store.objects:
        return None
    found = {}
    for shard in sorted(set(json.loads(store.body("b/out/model.safetensors.index.json"))["weight_map"].values())):
        found |= {name: tensor[0].item() for name, tensor in load(store.body(f"b/out/{shard}")).items()}
    return found


NEW, OLD = {"0": 1.0, "1": 2.0, "2": 3.0}, {"0": 2.0, "1": 3.0, "2": 4.0}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("at", range(4))
def test_c154_a_crash_between_shards_leaves_no_checkpoint_or_the_old_one(store, tmp_path, old, at):
    """Before every one of the requests that make something visible. A crash leaves the parts of one file, as it must: nobody is there."""
    if old:
        converted(tmp_path, "slow://b/out/", "other", shard_size="5KB")
    seen = 0

    def hook(request):
        nonlocal seen
        if request.kind == "put":
            seen += 1
            if seen > at:
                raise Cut

    store.hook = hook
    with pytest.raises(Cut):
        converted(tmp_path, "slow://b/out/", shard_size="5KB", force=True)
    store.hook = None
    assert values(store) == (OLD if old else None)
    if not old and at:
        with pytest.raises(
            ckptconv.CkptconvError,
            match=r"(?s)CK501.*found: model-00001-of-00003.safetensors.*no index: the rest of a run that was cut off",
        ):
            converted(tmp_path, "slow://b/out/", shard_size="5KB")
    converted(tmp_path, "slow://b/out/", shard_size="5KB", force=True)
    assert values(store) == NEW
    assert len(store.objects) == 4


@pytest.mark.parametrize("status", [409, 503, 500, 429])
@pytest.mark.parametrize("kind", ["create_multipart_upload", "part", "put"])
def test_c154_what_passes_is_sent_again(store, tmp_path, status, kind):
    store.hook = answering(status, 3, kind)
    converted(tmp_path, "slow://b/out/", shard_size="5KB")
    assert values(store) == NEW
    assert not store.uploads


@pytest.mark.parametrize("status", [409, 503])
def test_c154_what_does_not_pass_is_told(store, tmp_path, status):
    store.hook = answering(status, 1000, path="-00002-of")
    with pytest.raises(ckptconv.CkptconvError) as caught:
        converted(tmp_path, "slow://b/out/", shard_size="5KB")
    assert str(caught.value) == (
        f"slow://b/out/  [CK503]\n  the output cannot be sent, after 5 tries\n  found: Answer: answer {status} (status {status})\n"
        "  try: run again later; look at the network and at the store's endpoint"
    )
    assert caught.value.exit_code == 5
    assert list(store.objects) == ["b/out/model-00001-of-00003.safetensors"]
    assert not store.uploads


def test_c154_somebody_elses_object_is_not_overwritten(store, tmp_path):
    """It appears between the last look and the request that completes the upload: the store says 412."""

    def hook(request):
        if request.kind == "put" and "b/out.safetensors" not in store.objects:
            store.put("b/out.safetensors", b"theirs")

    store.hook = hook
    with pytest.raises(ckptconv.CkptconvError) as caught:
        converted(tmp_path, "slow://b/out.safetensors")
    assert (
        str(caught.value)
        == "slow://b/out.safetensors  [CK501]\n  the output appeared while it was being made\n  try: --force, or another name"
    )
    assert store.body("b/out.safetensors") == b"theirs"
    assert not store.uploads


def test_c154_a_412_of_the_store_is_the_same(store, tmp_path):
    store.hook = answering(412, 1)
    with pytest.raises(ckptconv.CkptconvError, match=r"CK501\]\n  the output appeared while it was being made"):
        converted(tmp_path, "slow://b/out.safetensors")
    assert not store.objects
    assert not store.uploads


def test_c154_an_object_of_another_size_is_no_success(store, tmp_path, monkeypatch):
    put = type(store).put
    monkeypatch.setattr(type(store), "put", lambda self, path, body: put(self, path, body[:-1] if isinstance(body, bytes) else body))
    with pytest.raises(
        ckptconv.CkptconvError, match=r"CK503\]\n  the store does not hold what was sent\n  found: 12,[0-9]+ bytes, 12,[0-9]+ were sent"
    ):
        converted(tmp_path, "slow://b/out.safetensors")
