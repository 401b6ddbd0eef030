"""Stores that fail, lie, or change: each has its sentence, and nothing half-read is taken for a checkpoint."""

import json

import pytest
import torch
from placing import tensors
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv.errors import InputError, named
from ckptconv.places.settings import using
from ckptconv.places.stores import TRIES, Entry, Store

WHERE = "slow://bucket/in.safetensors"
AGAIN = "run again later; look at the network and at the store's endpoint"


class Answer(Exception):
    """What a client raises for a status."""

    def __init__(self, status):
        super().__init__("Slow Down" if status == 503 else "no")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


class ConnectionTimeoutError(Exception):
    """As aiohttp has one that is no OSError."""


@pytest.fixture
def run(store, scratch, tmp_path, source):
    store.put("bucket/in.safetensors", source)
    return lambda **options: ckptconv.run("dataparallel", WHERE, tmp_path / "out.safetensors", **options)


def failing(error, kind="get", times=1000, after=0):
    """A hook that fails ``times`` requests of a kind, after so many that were answered."""
    seen = 0

    def hook(request):
        nonlocal seen
        if request.kind == kind:
            seen += 1
            if after < seen <= after + times:
                raise error

    return hook


@pytest.mark.parametrize(
    "error", [Answer(503), Answer(429), Answer(500), TimeoutError("late"), ConnectionResetError("cut"), ConnectionTimeoutError()]
)
@pytest.mark.parametrize("kind", ["head", "get"])
def test_what_passes_is_asked_again(store, run, tmp_path, error, kind):
    store.hook = failing(error, kind, times=TRIES - 1)
    run()
    assert load_file(tmp_path / "out.safetensors").keys() == {"first", "big", "half", "last"}


@pytest.mark.parametrize(
    ("error", "kind", "problem"),
    [
        (Answer(503), "head", ("CK313", f"the store does not say what is there, after {TRIES} tries", "Answer: Slow Down (status 503)", AGAIN)),
        (Answer(503), "get", ("CK313", f"the store did not give the bytes, after {TRIES} tries", "bytes 0 to 65,536: Answer: Slow Down (status 503)", AGAIN)),
        (TimeoutError(), "get", ("CK313", f"the store did not give the bytes, after {TRIES} tries", "bytes 0 to 65,536: TimeoutError", AGAIN)),
        (Answer(400), "get", ("CK313", "the store did not give the bytes", "bytes 0 to 65,536: Answer: no (status 400)", AGAIN)),
        (Answer(403), "head", ("CK310", "the store does not say what is there: access is denied", "Answer: no (status 403)",
                               "look at the credentials that the store's client finds, and at what they may do")),
        (PermissionError("Forbidden"), "get", ("CK310", "the store did not give the bytes: access is denied", "bytes 0 to 65,536: Forbidden",
                                               "look at the credentials that the store's client finds, and at what they may do")),
        (Answer(404), "head", ("CK310", "the source cannot be opened: nothing is there", "", "")),
        (NotImplementedError(), "get", ("CK310", "the store did not give the bytes: this kind of store cannot do it", "bytes 0 to 65,536: NotImplementedError",
                                        "copy the file to a disk first")),
    ],
)  # fmt: skip
def test_what_stays_is_told(store, run, tmp_path, error, kind, problem):
    store.hook = failing(error, kind)
    with pytest.raises(InputError) as caught:
        run()
    code, what, found, try_ = problem
    assert [(each.code, each.where, each.what, each.found, each.try_) for each in caught.value.problems] == [
        (code, WHERE, what, found, try_)
    ]
    assert not (tmp_path / "out.safetensors").exists()


def test_short_answers_are_asked_again_and_never_taken(store, run, tmp_path, monkeypatch):
    filesystem = Store(WHERE).fs.__class__
    whole, cut = filesystem.cat_file, [1]

    def short(self, path, start=None, end=None, **words):
        found = whole(self, path, start, end, **words)
        return found[: len(found) // 2] if cut.pop() else found

    monkeypatch.setattr(filesystem, "cat_file", short)
    cut[:] = [0] * 100 + [1]
    run()
    assert load_file(tmp_path / "out.safetensors").keys() == {"first", "big", "half", "last"}
    cut[:] = [1] * 100
    with pytest.raises(
        InputError, match=r"(?s)in.safetensors  \[CK313\].*after 5 tries\n  found: bytes 0 to 65,536: 32,768 of 65,536 bytes came"
    ):
        run(force=True)


def test_a_server_that_ignores_ranges_is_refused(store, run, monkeypatch):
    filesystem = Store(WHERE).fs.__class__
    whole = filesystem.cat_file
    monkeypatch.setattr(filesystem, "cat_file", lambda self, path, start=None, end=None: whole(self, path))
    with pytest.raises(InputError, match=r"1,0[0-9,]+ of 65,536 bytes came"):
        run()


def test_a_store_that_does_not_say_how_long_the_file_is(store, run, monkeypatch):
    monkeypatch.setattr(Store(WHERE).fs.__class__, "_entry", lambda self, path: {"name": path, "size": None, "type": "file"})
    with pytest.raises(InputError, match=r"\[CK313\]\n  the store does not say how long the file is\n  try: copy the file to a disk first"):
        run()


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("how", ["replaced", "longer", "removed"])
def test_a_source_that_changes_between_header_and_data(store, run, tmp_path, how, after):
    other = tmp_path / "other.safetensors"
    save_file(tensors(seed=1), other)
    gets = 0

    def hook(request):
        nonlocal gets
        gets += request.kind == "get"
        if gets == after and request.kind == "get":
            if how == "removed":
                del store.objects["bucket/in.safetensors"]
            else:
                store.put("bucket/in.safetensors", other.read_bytes() + (b"more" if how == "longer" else b""))

    store.hook = hook
    with pytest.raises(InputError) as caught:
        run()
    (problem,) = caught.value.problems
    assert (problem.code, problem.what, problem.where) == ("CK311", "the file changed while it was read", WHERE)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_source_that_changes_at_the_very_end(store, run, tmp_path, monkeypatch):
    from ckptconv.stage import producing

    climb = producing.climb

    def and_then(*arguments):
        found = climb(*arguments)
        store.put("bucket/in.safetensors", store.body("bucket/in.safetensors"))  # the same bytes, written again
        return found

    monkeypatch.setattr(producing, "climb", and_then)
    with pytest.raises(InputError, match="CK311"):
        run()


def test_a_change_is_told_rather_than_what_it_led_to(store, scratch, tmp_path):
    """Other bytes under the same offsets fail a checksum of the file's; the reason is the change."""
    torch.save(tensors(), tmp_path / "in.pth")
    raw = (tmp_path / "in.pth").read_bytes()
    store.put("bucket/in.pth", raw)
    at = raw.index(tensors()["module.big"].numpy().tobytes()[:64]) + (300 << 10)

    def hook(request):
        if request.kind == "get" and request.start <= at < request.start + request.nbytes:
            store.put("bucket/in.pth", raw[:at] + bytes(64) + raw[at + 64 :])

    store.hook = hook
    with pytest.raises(InputError) as caught:
        ckptconv.run("dataparallel", "slow://bucket/in.pth", tmp_path / "out.pth")
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("CK311", "slow://bucket/in.pth")
    assert problem.found == "module.big: the checksum that the file records does not match its bytes"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (Entry("a", False, 1, {"etag": "x", "mtime": "1"}), Entry("a", False, 1, {"etag": "x", "mtime": "2"}), True),
        (Entry("a", False, 1, {"etag": "x", "mtime": "1"}), Entry("a", False, 1, {"etag": "y", "mtime": "1"}), False),
        (Entry("a", False, 1, {"etag": "x", "mtime": "1"}), Entry("a", False, 1, {"mtime": "2"}), False),
        (Entry("a", False, 1, {"etag": "x"}), Entry("a", False, 1, {"mtime": "1"}), True),
        (Entry("a", False, 1), Entry("a", False, 2), False),
    ],
)
def test_what_a_version_is_told_by(one, other, same):
    assert one.is_version_of(other) is other.is_version_of(one) is same


SECRETS = [
    ("slow://me:hunter2@bucket/in.safetensors", "slow://***@bucket/in.safetensors"),
    ("slow://bucket/in.safetensors?X-Amz-Signature=hunter2&part=1", "slow://bucket/in.safetensors?X-Amz-Signature=***&part=***"),
]


@pytest.mark.parametrize(("url", "shown"), SECRETS)
def test_credentials_are_never_shown_and_never_written(store, scratch, tmp_path, source, url, shown):
    assert named(url) == shown
    store.put(url.removeprefix("slow://"), source)
    report = ckptconv.run("dataparallel", url, tmp_path / "out.safetensors")
    said = json.dumps(
        [report.to_json(), ckptconv.inspect(url).to_json(), ckptconv.diff(url, url).to_json(), ckptconv.explain(url).to_json()]
    )
    assert shown in said
    assert "hunter2" not in said
    assert b"hunter2" not in (tmp_path / "out.safetensors").read_bytes()
    store.hook = failing(OSError(f"cannot reach {url} as hunter2"))
    with pytest.raises(InputError) as caught:
        ckptconv.inspect(url)
    assert shown in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_package_that_is_missing(monkeypatch, scratch):
    import sys

    with pytest.raises(
        ckptconv.CkptconvError, match=r"gs://b/in.pth  \[CK505\]\n  gs:// needs the package gcsfs\n  try: pip install gcsfs"
    ):
        ckptconv.inspect("gs://b/in.pth")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ckptconv.CkptconvError, match=r"try: pip install 'ckptconv\[remote\]'"):
        ckptconv.inspect("memory://in.pth")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nothing://in.pth", "CK107.*the URL is not understood"),
        ("http://localhost/models/", "CK107.*web servers do not list folders.*name the file"),
    ],
)
def test_urls_that_mean_nothing(scratch, url, message):
    with pytest.raises(ckptconv.CkptconvError, match=f"(?s){message}"):
        ckptconv.inspect(url)


def test_a_scratch_folder_that_cannot_be_used(store, tmp_path):
    store.put("bucket/in.pth", b"x")
    with (
        using(scratch=tmp_path / "none"),
        pytest.raises(ckptconv.CkptconvError, match=r"(?s)none  \[CK503\].*No such file.*try: --scratch DIR"),
    ):
        ckptconv.inspect("slow://bucket/in.pth")


def test_what_is_needed_whole_and_does_not_fit(store, scratch, tmp_path, source):
    store.put("bucket/in/model.safetensors", source)
    store.put("bucket/in/tokenizer.json", bytes(300_000))
    with using(scratch_size=200_000), pytest.raises(ckptconv.CkptconvError) as caught:
        ckptconv.run("dataparallel", "slow://bucket/in", tmp_path / "out")
    assert str(caught.value) == (
        "slow://bucket/in/tokenizer.json  [CK503]\n  the file is needed as a whole, and the scratch folder may not hold as much\n"
        "  found: 300,000 bytes; 200,000 are allowed\n  try: --scratch-size SIZE"
    )
