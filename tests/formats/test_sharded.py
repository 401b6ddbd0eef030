from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from written import bytes_of, write

from ckptconv import formats
from ckptconv.errors import Refusal
from ckptconv.formats.sharded import index_json, plan_shards, read_folder, read_index
from ckptconv.spec import DType, Manifest, TensorSpec

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def save(path: Path, **tensors: torch.Tensor) -> None:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "shard": path.name})
    else:
        torch.save(tensors, path)


def write_index(folder: Path, weight_map: Any, name: str = INDEX, **metadata: Any) -> None:
    (folder / name).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, a proper index, and what lies beside a model."""
    made = tmp_path / "model"
    made.mkdir()
    save(made / ONE, a=torch.ones(2), b=torch.zeros(3))
    save(made / TWO, c=torch.arange(4))
    write_index(made, {"a": ONE, "b": ONE, "c": TWO}, total_size=52)
    (made / "config.json").write_text("{}")
    (made / "tokenizer.model").write_bytes(b"x")
    return made


def refusal_of(action: Callable[[], object]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        action()
    assert (caught.value.what + caught.value.found + caught.value.try_).isprintable()
    return caught.value


# ------------------------------------------------------------------------------------------------------------ what is read


def test_shards_are_one_container_and_know_their_file(folder: Path) -> None:
    contents = formats.read(folder)
    container = contents.containers["."]
    assert contents.format == "safetensors"
    assert [path.name for path in contents.files] == [ONE, TWO]
    assert {name: placed.storage.file for name, placed in container.tensors.items()} == {"a": 0, "b": 0, "c": 1}
    assert container.manifest["c"] == TensorSpec((4,), DType.int64)
    at = container.tensors["c"].storage.offset
    assert contents.files[1].read_bytes()[at : at + 32] == bytes_of(torch.arange(4))
    assert contents.neighbours == (folder / "config.json", folder / "tokenizer.model")
    assert contents.metadata == {"format": "pt"}
    assert contents.warnings == ()
    assert formats.read(folder / INDEX) == contents


def test_torch_shards_are_read_by_the_same_rules(tmp_path: Path) -> None:
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    save(tmp_path / names[0], a=torch.ones(2))
    save(tmp_path / names[1], b=torch.ones(3))
    write_index(tmp_path, {"a": names[0], "b": names[1]}, "pytorch_model.bin.index.json", total_size=20)
    contents = formats.read(tmp_path)
    assert contents.format == "torch"
    assert contents.warnings == ()
    assert {name: (placed.spec.shape, placed.storage.file) for name, placed in contents.containers["."].tensors.items()} == {
        "a": ((2,), 0), "b": ((3,), 1),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "weights.pth"])
def test_a_single_model_file_is_enough(tmp_path: Path, name: str) -> None:
    save(tmp_path / name, a=torch.ones(2))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".hidden").write_text("")
    (tmp_path / "original").mkdir()
    contents = formats.read(tmp_path)
    assert list(contents.containers["."].tensors) == ["a"]
    assert contents.files == (tmp_path / name,)
    assert contents.neighbours == (tmp_path / "config.json",)


def test_what_does_not_come_along_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("")
    (folder / "vocab.json").symlink_to(tmp_path / "secret")
    (folder / "link.txt").symlink_to("config.json")
    for name in ("training_args.bin", "optimizer.pt", "tf_model.h5"):
        (folder / name).write_bytes(b"")
    contents = read_folder(folder)
    assert [path.name for path in contents.neighbours] == ["config.json", "link.txt", "tokenizer.model"]
    assert contents.warnings == ("not taken along from the folder: optimizer.pt, tf_model.h5, training_args.bin, … (4)",)


def test_aliases_may_be_missing_from_the_index(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / ONE, metadata={"format": "pt", "alias": "a"})
    save(tmp_path / TWO, c=torch.ones(1))
    write_index(tmp_path, {"a": ONE, "c": TWO}, total_size=12)
    contents = read_folder(tmp_path)
    assert contents.containers["."].manifest.ties == (("a", "alias"),)
    assert contents.warnings == ()


def test_a_wrong_total_size_is_a_warning(folder: Path) -> None:
    write_index(folder, {"a": ONE, "b": ONE, "c": TWO}, total_size=53)
    assert read_folder(folder).warnings == (f"{INDEX}: total_size is 53, the tensors have 52 bytes",)


def test_the_cache_of_the_hub_is_read(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "0123abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"blob{number}")
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", f"blob{number}"))
    contents = formats.read(snapshot)
    assert list(contents.containers["."].tensors) == ["a", "b", "c"]
    assert [path.name for path in contents.files] == [ONE, TWO]
    assert [path.name for path in contents.neighbours] == ["config.json", "tokenizer.model"]
    assert formats.read(snapshot / INDEX) == contents


# --------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "/dev/zero", "a\0b", "a/b", "a\\b", "C:x", "", ".", "..", "a\nb", 3, None, ["x"]]
)
def test_a_shard_must_be_a_plain_name(folder: Path, name: object) -> None:
    write_index(folder, {"a": ONE, "b": name})
    refusal = refusal_of(lambda: read_folder(folder))
    assert (refusal.code, refusal.what) == ("CK308", "a shard must be a plain file name, in the folder of the index")


def test_a_shard_must_not_be_a_link_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    (folder / TWO).rename(tmp_path / "elsewhere.safetensors")
    (folder / TWO).symlink_to(tmp_path / "elsewhere.safetensors")
    refusal = refusal_of(lambda: read_folder(folder))
    assert (refusal.code, refusal.what, refusal.found) == ("CK308", "a link leads out of the folder", TWO)


def test_blobs_of_another_place_are_out_of_the_folder_too(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (folder / TWO).rename(tmp_path / "blobs" / "x")
    (folder / TWO).symlink_to(tmp_path / "blobs" / "x")
    assert refusal_of(lambda: read_folder(folder)).what == "a link leads out of the folder"


def test_a_single_model_file_is_confined_too(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "model.safetensors").symlink_to(folder / ONE)
    assert refusal_of(lambda: read_folder(tmp_path / "alone")).what == "a link leads out of the folder"


def test_a_missing_shard(folder: Path) -> None:
    (folder / TWO).unlink()
    refusal = refusal_of(lambda: read_folder(folder))
    assert (refusal.code, refusal.what, refusal.found) == ("CK308", "a file is missing", TWO)


def test_links_in_a_circle_and_pipes_end_at_once(folder: Path) -> None:
    (folder / TWO).unlink()
    (folder / TWO).symlink_to(TWO)
    assert refusal_of(lambda: read_folder(folder)).what == "a file is missing"
    (folder / TWO).unlink()
    os.mkfifo(folder / TWO)
    assert refusal_of(lambda: read_folder(folder)).what == "not a regular file"


@pytest.mark.parametrize(("text", "what"), [
    ("", "not valid JSON"),
    ("[]", '"weight_map" must map tensor names to shard files, and name at least one'),
    ("{}", '"weight_map" must map tensor names to shard files, and name at least one'),
    ('{"weight_map": {}}', '"weight_map" must map tensor names to shard files, and name at least one'),
    ('{"weight_map": ["a"]}', '"weight_map" must map tensor names to shard files, and name at least one'),
    ('{"weight_map": {"a": "x", "a": "y"}}', "the key 'a' occurs twice"),
    ('{"weight_map": {}, "weight_map": {"a": "x"}}', "the key 'weight_map' occurs twice"),
    ('{"weight_map": ' + "[" * 100_000, "the JSON is nested too deep"),
    ('{"metadata": NaN}', "NaN is not JSON"),
], ids=["empty", "list", "no map", "empty map", "map is a list", "key twice", "map twice", "deep", "NaN"])  # fmt: skip
def test_an_index_that_is_none(folder: Path, text: str, what: str) -> None:
    (folder / INDEX).write_text(text)
    refusal = refusal_of(lambda: read_folder(folder))
    assert (refusal.code, refusal.what) == ("CK308", f"{INDEX}: {what}")


def test_a_tensor_in_two_shards(folder: Path) -> None:
    save(folder / TWO, c=torch.arange(4), a=torch.ones(2))
    refusal = refusal_of(lambda: read_folder(folder))
    assert (refusal.code, refusal.what, refusal.found) == ("CK308", "a tensor is in two shards", f"a in {ONE} and {TWO}")


def test_a_tensor_that_the_index_does_not_know(folder: Path) -> None:
    save(folder / TWO, c=torch.arange(4), extra=torch.ones(2))
    refusal = refusal_of(lambda: read_folder(folder))
    assert (refusal.code, refusal.what, refusal.found) == ("CK308", "a tensor is in a shard but not in the index", f"extra in {TWO}")


@pytest.mark.parametrize(("weight_map", "found"), [
    ({"a": ONE, "b": ONE, "c": TWO, "d": TWO}, f"d, wanted in {TWO}"),
    ({"a": ONE, "b": TWO, "c": TWO}, f"b, wanted in {TWO}"),
])  # fmt: skip
def test_a_tensor_that_is_not_where_the_index_says(folder: Path, weight_map: dict[str, str], found: str) -> None:
    write_index(folder, weight_map)
    refusal = refusal_of(lambda: read_folder(folder))
    assert (refusal.code, refusal.what, refusal.found) == ("CK308", "a tensor is in the index but not in its shard", found)


def test_a_damaged_shard_is_named(folder: Path) -> None:
    (folder / TWO).write_bytes((folder / TWO).read_bytes()[:-1])
    refusal = refusal_of(lambda: read_folder(folder))
    assert (refusal.code, refusal.what) == ("CK302", f"{TWO}: the file is cut off")


def test_a_model_file_beside_an_index_is_ambiguous(folder: Path) -> None:
    save(folder / "model.safetensors", a=torch.ones(2))
    refusal = refusal_of(lambda: read_folder(folder))
    assert (refusal.code, refusal.what) == ("CK308", "ambiguous: the folder holds more than one model")
    assert refusal.found == f"model.safetensors, {INDEX}"
    assert list(read_index(folder / INDEX).containers["."].tensors) == ["a", "b", "c"]


def test_shards_that_the_index_does_not_name_are_ambiguous(folder: Path) -> None:
    save(folder / "model-00003-of-00003.safetensors", z=torch.ones(2))
    assert refusal_of(lambda: read_folder(folder)).what == "ambiguous: the folder holds more than one model"


def test_too_few_shards_are_ambiguous(folder: Path) -> None:
    for name in (ONE, TWO):
        (folder / name).rename(folder / name.replace("of-00002", "of-00003"))
    write_index(folder, {name: shard.replace("of-00002", "of-00003") for name, shard in {"a": ONE, "b": ONE, "c": TWO}.items()})
    refusal = refusal_of(lambda: read_folder(folder))
    assert (refusal.code, refusal.what) == ("CK308", "ambiguous: the index names 2 of 3 shards")


def test_shards_without_an_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    assert refusal_of(lambda: read_folder(folder)).what == "ambiguous: the folder holds more than one model"
    (folder / TWO).unlink()
    assert refusal_of(lambda: read_folder(folder)).what == "a shard without the others and without an index"


def test_two_formats_side_by_side_need_a_word(folder: Path) -> None:
    save(folder / "pytorch_model.bin", p=torch.ones(2))
    refusal = refusal_of(lambda: read_folder(folder))
    assert (refusal.code, refusal.what) == ("CK308", "ambiguous: the folder holds models in more than one format")
    assert refusal.try_ == "name the index or the model file that is meant"
    assert list(formats.read(folder, "safetensors").containers["."].tensors) == ["a", "b", "c"]
    assert list(formats.read(folder, "torch").containers["."].tensors) == ["p"]


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    refusal = refusal_of(lambda: read_folder(tmp_path))
    assert (refusal.code, refusal.what, refusal.found) == ("CK301", "the folder holds no model file and no shard index", "no file")
    (tmp_path / "config.json").write_text("{}")
    assert refusal_of(lambda: read_folder(tmp_path, "torch")).what == "the folder holds no model file and no shard index of format torch"


def test_a_format_that_the_file_is_not(folder: Path) -> None:
    refusal = refusal_of(lambda: formats.read(folder / ONE, "torch"))
    assert (refusal.code, refusal.what) == ("CK301", "the file is safetensors, not torch")


# ----------------------------------------------------------------------------------------------------------------- writing


def specs(**nbytes: int) -> dict[str, TensorSpec]:
    return {name: TensorSpec((size,), DType.uint8) for name, size in nbytes.items()}


@pytest.mark.parametrize(("sizes", "limit", "wanted"), [
    ({"a": 4, "b": 4, "c": 4}, 8, ["ab", "c"]),
    ({"a": 4, "b": 4, "c": 4}, 7, ["a", "b", "c"]),
    ({"a": 1, "big": 100, "c": 1, "d": 1}, 8, [["a"], ["big"], ["c", "d"]]),
    ({"big": 100, "c": 1}, 8, [["big"], ["c"]]),
    ({"a": 8, "empty": 0, "c": 0}, 8, [["a", "empty", "c"]]),
    ({"empty": 0, "a": 100}, 8, [["empty", "a"]]),
    ({"a": 4, "b": 4}, None, ["ab"]),
    ({}, 8, [""]),
])  # fmt: skip
def test_shards_are_filled_in_order(sizes: dict[str, int], limit: int | None, wanted: list[Any]) -> None:
    shards = plan_shards(Manifest(specs(**sizes)), "safetensors", limit, "model")
    assert [list(part) for _, part in shards] == [list(names) for names in wanted]


def test_shard_names_are_those_of_hugging_face() -> None:
    manifest = Manifest(specs(a=4, b=4))
    assert [name for name, _ in plan_shards(manifest, "safetensors", 4, "model")] == [ONE, TWO]
    assert [name for name, _ in plan_shards(manifest, "torch", 4, "pytorch_model")][1] == "pytorch_model-00002-of-00002.bin"
    assert [name for name, _ in plan_shards(manifest, "torch", 8, "pytorch_model")] == ["pytorch_model.bin"]


def test_ties_and_buffers_stay_with_their_tensors() -> None:
    manifest = Manifest(specs(a=4, b=4, c=4, d=4), (("a", "d"), ("b", "c")), frozenset({"c"}))
    (_, first), (_, second) = plan_shards(manifest, "torch", 4, "pytorch_model")
    assert (list(first), first.ties, first.buffers) == (["a", "d"], (("a", "d"),), frozenset())
    assert (list(second), second.ties, second.buffers) == (["b", "c"], (("b", "c"),), frozenset({"c"}))


@pytest.mark.parametrize(("kind", "names"), [("safetensors", ["a", "b"]), ("torch", ["a", "alias", "b"])])
def test_the_index_names_every_tensor(kind: str, names: list[str]) -> None:
    shards = plan_shards(Manifest(specs(a=4, b=4, alias=4), (("a", "alias"),)), kind, 4, "model")
    index = json.loads(index_json(shards, 8))
    assert index["metadata"] == {"total_size": 8}
    assert list(index["weight_map"]) == names
    assert index_json(shards, 8) == index_json(list(shards), 8)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_what_is_written_in_shards_is_read_back(tmp_path: Path, kind: str) -> None:
    tensors = {f"layers.{at}.weight": torch.full((at + 1, 2), float(at)) for at in range(9)} | {"tied": torch.full((4, 2), 3.0)}
    ties = (("layers.3.weight", "tied"),)
    manifest = Manifest({name: TensorSpec(tuple(tensor.shape), DType.float32) for name, tensor in tensors.items()}, ties)
    shards = plan_shards(manifest, kind, 100, "model")
    assert len(shards) > 3
    for name, part in shards:
        write(tmp_path / name, formats.WRITERS[kind], {key: tensors[key] for key in part}, ties=part.ties)
    suffix = {"safetensors": ".safetensors", "torch": ".bin"}[kind]
    (tmp_path / f"model{suffix}.index.json").write_bytes(index_json(shards, manifest.nbytes))
    contents = formats.read(tmp_path)
    found = contents.containers["."].manifest
    assert (dict(found.tensors), found.ties, contents.warnings) == (dict(manifest.tensors), ties, ())
