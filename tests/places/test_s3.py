"""A real S3 client against a real HTTP server on this machine."""

import logging

import pytest
import s3fs
import torch
from moto import server
from placing import NONE, tensors
from safetensors.torch import load, save_file

import ckptconv
from ckptconv.places import leaving, stores


@pytest.fixture(scope="module")
def endpoint():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    made = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    made.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*made.get_host_and_port()))
        yield
    s3fs.S3FileSystem.clear_instance_cache()
    made.stop()


@pytest.fixture
def bucket(endpoint, tmp_path, monkeypatch):
    """A client of the test's own, and a bucket."""
    monkeypatch.setattr(stores, "WAIT", 0)
    monkeypatch.setattr(leaving, "PART", 5 << 20)  # S3's least
    (tmp_path / "none.yaml").write_text(NONE)
    fs = s3fs.S3FileSystem()
    fs.mkdir("bucket")
    yield fs
    fs.rm("bucket", recursive=True)


def uploads(fs):
    return fs.call_s3("list_multipart_uploads", Bucket="bucket").get("Uploads", [])


def test_a_folder_there_and_back(bucket, scratch, tmp_path):
    (tmp_path / "in").mkdir()
    save_file(tensors(big=12 << 20), tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text('{"hidden_size": 64}')
    bucket.put(str(tmp_path / "in"), "bucket/in", recursive=True)
    report = ckptconv.run(tmp_path / "none.yaml", "s3://bucket/in/", "s3://bucket/out/", shard_size="1MB")
    assert report.ladder.reached == "L0 L1 L3"
    assert report.source["path"] == "s3://bucket/in"
    names = ["config.json", *report.destination["files"], "model.safetensors.index.json"]
    assert sorted(name.removeprefix("bucket/out/") for name in bucket.ls("bucket/out", refresh=True, detail=False)) == sorted(names)
    found = {key: value for name in report.destination["files"] for key, value in load(bucket.cat(f"bucket/out/{name}")).items()}
    assert all(torch.equal(found[key], value) for key, value in tensors(big=12 << 20).items())
    assert ckptconv.verify("s3://bucket/out", against="s3://bucket/in", rules=tmp_path / "none.yaml").ladder.reached == "L0 L1 L3"
    assert not uploads(bucket)
    with pytest.raises(ckptconv.CkptconvError, match="CK501"):
        ckptconv.run(tmp_path / "none.yaml", "s3://bucket/in/", "s3://bucket/out/")


def test_only_what_is_needed_is_asked_for(bucket, scratch, tmp_path, monkeypatch):
    save_file(tensors(big=6 << 20), tmp_path / "in.safetensors")
    bucket.put_file(str(tmp_path / "in.safetensors"), "bucket/in.safetensors")
    asked = []
    call = s3fs.S3FileSystem._call_s3

    async def counted(self, method, *arguments, **words):
        if method == "get_object":
            begin, end = words["Range"].removeprefix("bytes=").split("-")
            asked.append(int(end) + 1 - int(begin))
        return await call(self, method, *arguments, **words)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    (tmp_path / "drops.yaml").write_text("version: 1\nname: drops\nsummary: drops\nsteps:\n  - drop: module.big\n")
    ckptconv.run(tmp_path / "drops.yaml", "s3://bucket/in.safetensors", tmp_path / "out.safetensors")
    assert 0 < sum(asked) < 200_000


@pytest.mark.parametrize("how", ["part", "interrupt"])
def test_an_upload_that_fails_leaves_no_part(bucket, scratch, tmp_path, monkeypatch, how):
    save_file(tensors(big=16 << 20), tmp_path / "in.safetensors")
    call = s3fs.S3FileSystem.call_s3
    begun = []

    def failing(self, method, **words):
        if method == "upload_part" and words["PartNumber"] == 3:
            begun.append(uploads(self))
            raise PermissionError("no") if how == "part" else KeyboardInterrupt
        return call(self, method, **words)

    monkeypatch.setattr(s3fs.S3FileSystem, "call_s3", failing)
    with pytest.raises(KeyboardInterrupt if how == "interrupt" else ckptconv.CkptconvError):
        ckptconv.run(tmp_path / "none.yaml", tmp_path / "in.safetensors", "s3://bucket/out.safetensors")
    assert begun[0]
    assert not uploads(bucket)
    assert not bucket.exists("bucket/out.safetensors")


@pytest.mark.parametrize("big", [1 << 20, 6 << 20])
def test_an_object_that_appears_is_not_overwritten(bucket, scratch, tmp_path, monkeypatch, big):
    save_file(tensors(big=big), tmp_path / "in.safetensors")
    call = s3fs.S3FileSystem.call_s3

    def meanwhile(self, method, **words):
        if method in ("put_object", "complete_multipart_upload"):
            call(self, "put_object", Bucket="bucket", Key="out.safetensors", Body=b"theirs")
        return call(self, method, **words)

    monkeypatch.setattr(s3fs.S3FileSystem, "call_s3", meanwhile)
    with pytest.raises(
        ckptconv.CkptconvError, match=r"s3://bucket/out.safetensors  \[CK501\]\n  the output appeared while it was being made"
    ):
        ckptconv.run(tmp_path / "none.yaml", tmp_path / "in.safetensors", "s3://bucket/out.safetensors")
    assert bucket.cat("bucket/out.safetensors") == b"theirs"
    assert not uploads(bucket)


def test_what_is_not_there(bucket, scratch, tmp_path):
    for word in ("s3://bucket/none.pth", "s3://no-such-bucket/in.pth"):
        with pytest.raises(ckptconv.CkptconvError, match=rf"{word}  \[CK310\]\n  the source cannot be opened: nothing is there"):
            ckptconv.inspect(word)
    save_file(tensors(), tmp_path / "in.safetensors")
    with pytest.raises(
        ckptconv.CkptconvError, match=r"CK503\]\n  the output cannot be sent: there is no such bucket\n  try: make it first"
    ):
        ckptconv.run(tmp_path / "none.yaml", tmp_path / "in.safetensors", "s3://no-such-bucket/out.pth")
