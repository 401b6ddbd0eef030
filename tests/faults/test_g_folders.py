"""Catalogue G: folders of shards. The index and the names in it come from strangers; every file must be a plain one of the folder."""

import json
import os

import pytest
from building import ONE, entry, safetensors_file, torch_file
from harness import message

from ckptconv.formats.sharded import MAX_INDEX

INDEX = "in/model.safetensors.index.json"
ONE_OF, TWO_OF = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARD = safetensors_file({"a": entry()}, bytes(8))
OTHER = safetensors_file({"b": entry()}, bytes(8))


def index(weight_map, **more):
    return json.dumps({"metadata": {"total_size": 16, **more}, "weight_map": weight_map})


RIGHT = {"a": ONE_OF, "b": TWO_OF}
USUAL = {INDEX: index(RIGHT), f"in/{ONE_OF}": SHARD, f"in/{TWO_OF}": OTHER}


def made(box, files):
    """Writes the usual folder with some files replaced; None leaves one out, a tuple is a link, a function does what it likes."""
    for name, data in {**USUAL, **files}.items():
        path = box.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(data):
            data(path)
        elif isinstance(data, tuple):
            path.symlink_to(data[0])
        elif data is not None:
            box.write(name, data)


def pointing(name):
    return {INDEX: index({"a": ONE_OF, "b": name}), f"in/{TWO_OF}": None}


REFUSED = [
    ("c079-a-shard-above", pointing("../x.safetensors"), ("CK308", "a shard must be a plain file name, in the folder of the index", "'../x.safetensors'")),
    ("c079-an-absolute-shard", pointing("/etc/hostname"), ("CK308", "a shard must be a plain file name, in the folder of the index", "'/etc/hostname'")),
    ("c079-a-device", pointing("/dev/zero"), ("CK308", "a shard must be a plain file name, in the folder of the index", "'/dev/zero'")),
    ("c079-NUL", pointing("a\0b"), ("CK308", "a shard must be a plain file name, in the folder of the index", "'a\\x00b'")),
    ("c079-below", pointing("a/b.safetensors"), ("CK308", "a shard must be a plain file name, in the folder of the index", "'a/b.safetensors'")),
    ("c079-backslash", pointing("a\\b.safetensors"), ("CK308", "a shard must be a plain file name, in the folder of the index", "'a\\\\b.safetensors'")),
    ("c079-drive", pointing("C:x.safetensors"), ("CK308", "a shard must be a plain file name, in the folder of the index", "'C:x.safetensors'")),
    ("c079-dot", pointing("."), ("CK308", "a shard must be a plain file name, in the folder of the index", "'.'")),
    ("c079-empty", pointing(""), ("CK308", "a shard must be a plain file name, in the folder of the index", "''")),
    ("c079-escape-sequence", pointing("\x1b[2Jx"), ("CK308", "a shard must be a plain file name, in the folder of the index", "'\\x1b[2Jx'")),
    ("c079-a-number", pointing(3), ("CK308", "a shard must be a plain file name, in the folder of the index", "3")),
    ("c079-the-index-itself", {INDEX: index({"a": "a.safetensors", "b": "model.safetensors.index.json"}), "in/a.safetensors": SHARD,
     f"in/{ONE_OF}": None, f"in/{TWO_OF}": None}, ("CK301", "model.safetensors.index.json: this is JSON, not a checkpoint", "", "a config or an index? name the folder, or the model's file")),
    ("c079-another-index", {INDEX: index({"a": ONE_OF, "b": "other.safetensors.index.json"}), "in/other.safetensors.index.json": index({"b": "model.safetensors.index.json"})}, ("CK308", "ambiguous: the folder holds more than one model", "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, model.safetensors.index.json, … (4)", "name the file or the index that is meant")),
    ("c080-a-link-out-of-the-folder", {f"in/{TWO_OF}": ("../elsewhere",), "elsewhere": OTHER}, ("CK308", "a link leads out of the folder", "model-00002-of-00002.safetensors")),
    ("c080-a-link-to-a-device", {f"in/{TWO_OF}": ("/dev/zero",)}, ("CK308", "a link leads out of the folder", "model-00002-of-00002.safetensors")),
    ("c080-a-link-to-itself", {f"in/{TWO_OF}": (TWO_OF,)}, ("CK308", "a file is missing", "model-00002-of-00002.safetensors", "download the checkpoint again")),
    ("c080-a-link-to-nothing", {f"in/{TWO_OF}": ("nowhere",)}, ("CK308", "a file is missing", "model-00002-of-00002.safetensors", "download the checkpoint again")),
    ("c080-blobs-of-another-place", {f"in/{TWO_OF}": ("../blobs/x",), "blobs/x": OTHER}, ("CK308", "a link leads out of the folder", "model-00002-of-00002.safetensors")),
    ("c080-the-index-is-a-link-out", {INDEX: ("../elsewhere.json",), "elsewhere.json": index(RIGHT)}, ("CK308", "a link leads out of the folder", "model.safetensors.index.json")),
    ("c080-a-pipe", {f"in/{TWO_OF}": os.mkfifo}, ("CK308", "not a regular file", "model-00002-of-00002.safetensors")),
    ("c080-a-folder", {f"in/{TWO_OF}": os.mkdir}, ("CK308", "not a regular file", "model-00002-of-00002.safetensors")),
    ("c081-a-shard-is-missing", {f"in/{TWO_OF}": None}, ("CK308", "a file is missing", "model-00002-of-00002.safetensors", "download the checkpoint again")),
    ("c081-an-empty-index", {INDEX: ""}, ("CK308", "model.safetensors.index.json: not valid JSON", "Expecting value at character 0")),
    ("c081-an-index-of-nothing", {INDEX: index({})}, ("CK308", "model.safetensors.index.json: \"weight_map\" must map tensor names to shard files, and name at least one")),
    ("c081-a-list", {INDEX: "[]"}, ("CK308", "model.safetensors.index.json: \"weight_map\" must map tensor names to shard files, and name at least one")),
    ("c081-no-weight-map", {INDEX: "{}"}, ("CK308", "model.safetensors.index.json: \"weight_map\" must map tensor names to shard files, and name at least one")),
    ("c081-a-weight-map-that-is-a-list", {INDEX: '{"weight_map": ["a"]}'}, ("CK308", "model.safetensors.index.json: \"weight_map\" must map tensor names to shard files, and name at least one")),
    ("c081-100000-deep", {INDEX: '{"weight_map": ' + "[" * 100_000}, ("CK308", "model.safetensors.index.json: the JSON is nested too deep")),
    ("c081-a-key-twice", {INDEX: f'{{"weight_map": {{"a": "{ONE_OF}", "a": "{TWO_OF}"}}}}'}, ("CK308", "model.safetensors.index.json: the key 'a' occurs twice")),
    ("c081-NaN", {INDEX: '{"metadata": NaN}'}, ("CK308", "model.safetensors.index.json: NaN is not JSON")),
    ("c081-over-the-limit", {INDEX: " " * (MAX_INDEX + 1)}, ("CK308", "the index is larger than 50,000,000 bytes", "50,000,001 bytes")),
    ("c082-a-tensor-in-two-shards", {f"in/{TWO_OF}": safetensors_file({"a": entry(), "b": entry(offsets=(8, 16))}, bytes(16))}, ("CK308", "a tensor is in two shards", "a in model-00001-of-00002.safetensors and model-00002-of-00002.safetensors")),
    ("c083-a-tensor-that-the-index-does-not-know", {f"in/{TWO_OF}": safetensors_file({"b": entry(), "z": entry(offsets=(8, 16))}, bytes(16))}, ("CK308", "a tensor is in a shard but not in the index", "z in model-00002-of-00002.safetensors")),
    ("c083-a-tensor-that-no-shard-has", {INDEX: index({**RIGHT, "z": TWO_OF})}, ("CK308", "a tensor is in the index but not in its shard", "z, wanted in model-00002-of-00002.safetensors")),
    ("c083-a-tensor-in-the-other-shard", {INDEX: index({"a": TWO_OF, "b": ONE_OF})}, ("CK308", "a tensor is in the index but not in its shard", "a, b, wanted in model-00002-of-00002.safetensors")),
    ("c084-a-model-beside-the-index", {"in/model.safetensors": SHARD}, ("CK308", "ambiguous: the folder holds more than one model", "model.safetensors, model.safetensors.index.json", "name the file or the index that is meant")),
    ("c084-two-formats", {"in/pytorch_model.bin": torch_file(ONE)}, ("CK308", "ambiguous: the folder holds models in more than one format", "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, model.safetensors.index.json, … (4)", "name the index or the model file that is meant")),
    ("c084-two-of-three-shards", {INDEX: index({"a": "model-00001-of-00003.safetensors", "b": "model-00002-of-00003.safetensors"}),
     "in/model-00001-of-00003.safetensors": SHARD, "in/model-00002-of-00003.safetensors": OTHER, f"in/{ONE_OF}": None, f"in/{TWO_OF}": None}, ("CK308", "ambiguous: the index names 2 of 3 shards", "model-…")),
    ("c084-shards-without-an-index", {INDEX: None}, ("CK308", "ambiguous: the folder holds more than one model", "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors", "name the file or the index that is meant")),
    ("c084-one-shard-alone", {INDEX: None, f"in/{TWO_OF}": None}, ("CK308", "a shard without the others and without an index", "model-00001-of-00002.safetensors", "download the checkpoint again")),
    ("c081-a-shard-that-is-cut", {f"in/{TWO_OF}": OTHER[:-1]}, ("CK302", "model-00002-of-00002.safetensors: the file is cut off", "7 bytes of tensors, the header says 8")),
    ("c081-a-shard-that-is-a-web-page", {f"in/{TWO_OF}": "<html>"}, ("CK301", "model-00002-of-00002.safetensors: this is a web page, not a checkpoint: a download that went wrong", "", "open it in a browser to see why, and fetch the file again")),
]  # fmt: skip
RUN = "run", "pass.yaml", "in", "out"


@pytest.mark.parametrize(("files", "said"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(box, files, said):
    made(box, files)
    box.refuses(3, message("in", *said), *RUN)


def test_c080_the_cache_of_the_hub(box):
    made(box, {f"in/{TWO_OF}": None, INDEX: None, f"in/{ONE_OF}": None})
    for number, (name, data) in enumerate(USUAL.items()):
        box.write(f"hub/blobs/{number}", data)
        link = box.folder / "hub/snapshots/abc" / name.partition("/")[2]
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"../../blobs/{number}")
    box.converts("run", "pass.yaml", "hub/snapshots/abc", "out")


@pytest.mark.parametrize("chosen", ["safetensors", "torch"])
def test_c084_the_file_or_the_index_that_is_named_is_the_one_that_is_meant(box, chosen):
    made(box, {"in/pytorch_model.bin": torch_file(ONE)})
    box.converts("run", "pass.yaml", INDEX if chosen == "safetensors" else "in/pytorch_model.bin", "out")
    assert (box.folder / "out" / ("model.safetensors" if chosen == "safetensors" else "pytorch_model.bin")).is_file()


def test_c085_a_wrong_total_is_a_warning(box):
    made(box, {INDEX: index(RIGHT, total_size=17)})
    assert "model.safetensors.index.json: total_size is 17, the tensors have 16 bytes" in box.converts(*RUN).out


@pytest.mark.parametrize("name", ["A.safetensors", "model.safetensors"])
def test_c086_names_that_differ_in_case_only_are_two_files_here(box, name):
    """Our own shards are numbered, so that no disk takes two of them for one."""
    weights = {"a": "a.safetensors", "b": name}
    made(box, {INDEX: index(weights), f"in/{ONE_OF}": None, f"in/{TWO_OF}": None, "in/a.safetensors": SHARD, f"in/{name}": OTHER})
    box.converts(*RUN, "--shard-size", "8")
    assert sorted(path.name for path in (box.folder / "out").iterdir()) == [ONE_OF, TWO_OF, "model.safetensors.index.json"]
