"""``hf://``: what the cache of huggingface_hub holds, laid out by hand as the library lays it out."""

import json
import sys

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from placing import NONE, tensors
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv.places import hub
from ckptconv.places.settings import using

COMMIT, OLDER = "0123456789abcdef" * 2 + "01234567", "f" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder with one repository of two revisions: blobs, and snapshots with links to them."""
    home = tmp_path / "hub"
    repo = home / "models--owner--repo"
    for folder in ("blobs", "refs", f"snapshots/{COMMIT}", f"snapshots/{OLDER}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "refs" / "old").write_text(OLDER)
    save_file(tensors(), repo / "blobs" / "weights")
    save_file(tensors(seed=1), repo / "blobs" / "oldweights")
    (repo / "blobs" / "config").write_text('{"rows": 4}')
    for commit, weights in ((COMMIT, "weights"), (OLDER, "oldweights")):
        (repo / "snapshots" / commit / "model.safetensors").symlink_to(f"../../blobs/{weights}")
        (repo / "snapshots" / commit / "config.json").symlink_to("../../blobs/config")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))

    def no_network(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", no_network)
    (tmp_path / "none.yaml").write_text(NONE)
    return home


@pytest.mark.parametrize(
    ("word", "seed"),
    [("hf://owner/repo", 0), ("hf://owner/repo@main", 0), ("hf://owner/repo@old", 1), (f"hf://owner/repo@{OLDER}", 1),
     ("hf://owner/repo@old/model.safetensors", 1)],
)  # fmt: skip
def test_what_the_cache_holds_is_read_and_its_commit_recorded(cache, tmp_path, word, seed):
    report = ckptconv.run(tmp_path / "none.yaml", word, tmp_path / "out.safetensors")
    assert all(torch.equal(load_file(tmp_path / "out.safetensors")[key], value) for key, value in tensors(seed).items())
    place = f"hf://owner/repo@{OLDER if seed else COMMIT}" + ("/model.safetensors" if word.endswith(".safetensors") else "")
    assert report.source["path"] == place
    raw = (tmp_path / "out.safetensors").read_bytes()
    assert json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["ckptconv.source"] == place
    assert str(cache) not in json.dumps(report.to_json())


def test_the_config_is_found(cache, tmp_path):
    (tmp_path / "config.yaml").write_text(
        "version: 1\nname: config\nsummary: c\nvars: {N: config.rows}\nsteps:\n  - reshape: {keys: module.first, shape: [N, -1]}\n"
    )
    for word in ("hf://owner/repo", "hf://owner/repo/model.safetensors"):
        assert ckptconv.plan(tmp_path / "config.yaml", word).plan.manifest["module.first"].shape == (4, 16)


def test_two_revisions_compared(cache):
    assert ckptconv.diff("hf://owner/repo", "hf://owner/repo@old").equal


@pytest.mark.parametrize(
    ("word", "found"),
    [("hf://owner/other", "LocalEntryNotFoundError"), ("hf://owner/repo@next", "LocalEntryNotFoundError"),
     ("hf://owner/repo/other.safetensors", f"the cache holds the revision {COMMIT[:12]}, without this file")],
)  # fmt: skip
def test_what_the_cache_does_not_hold_is_not_fetched(cache, word, found):
    with pytest.raises(ckptconv.CkptconvError) as caught:
        ckptconv.inspect(word)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("CK310", word)
    assert problem.what == "the Hugging Face cache does not hold it, and the network is used only when it is asked for"
    assert found in problem.found
    assert problem.try_ == "--online, or first: hf download OWNER/REPO"


def test_online_fetches_only_when_it_is_said(cache, monkeypatch):
    asked = []

    def fetch(repo, *, revision, **words):
        asked.append((repo, revision, words))
        return str(cache / "models--owner--repo" / "snapshots" / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(
        huggingface_hub, "HfApi", type("Api", (), {"list_repo_files": lambda self, repo, revision: ["model.bin", "config.json"]})
    )
    ckptconv.inspect("hf://owner/repo@main")
    with using(online=True):
        ckptconv.inspect("hf://owner/repo@main")
        ckptconv.inspect("hf://owner/repo/model.safetensors")
    small = ["*.json", "*.txt", "*.model"]
    assert asked == [
        ("owner/repo", "main", {"local_files_only": True}),
        ("owner/repo", "main", {"allow_patterns": ["*.bin", *small]}),
        ("owner/repo", None, {"allow_patterns": ["model.safetensors", "model.safetensors/*", *small]}),
    ]


def test_online_and_offline_contradict_each_other(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ckptconv.inspect("hf://owner/repo")
    with using(online=True), pytest.raises(ckptconv.CkptconvError, match=r"(?s)CK107.*HF_HUB_OFFLINE is set"):
        ckptconv.inspect("hf://owner/repo")


@pytest.mark.parametrize(
    "word", ["hf://", "hf://owner/repo@", "hf://owner/../repo", "hf://owner/repo/../../other", "hf://owner/repo@main/a//b", "hf://-x/y"]
)
def test_words_that_are_no_model(word):
    with pytest.raises(ckptconv.CkptconvError, match=r"CK107\]\n  want hf://owner/repo"):
        hub.parse(word)


def test_the_package_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ckptconv.CkptconvError, match=r"CK505\]\n  hf:// needs the package huggingface_hub\n  try: pip install 'ckptconv\[hub\]'"
    ):
        ckptconv.inspect("hf://owner/repo")


def test_the_environment_says_where_the_cache_is(cache, cli, tmp_path):
    (cache.parent / "home").mkdir()
    cache.rename(cache.parent / "home" / "hub")
    found = cli("inspect", "hf://owner/repo", env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"})
    assert found.code == 0, found.err
    assert "hf://owner/repo" in found.out
    assert cli("inspect", "hf://owner/repo", env={"HF_HUB_CACHE": str(tmp_path / "home" / "hub"), "HF_HUB_OFFLINE": "1"}).code == 0
    missing = cli("inspect", "hf://owner/repo", env={"HF_HOME": str(tmp_path / "nowhere"), "HF_HUB_OFFLINE": "1"})
    assert missing.code == 3
    assert "CK310" in missing.err
