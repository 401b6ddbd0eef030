"""Sharded folders, and whole folders of checkpoints through the Makefile."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    shards = {
        f"model-0000{at}-of-00003.safetensors": {f"module.l.{at}.w": torch.full((50, 10), float(at)), f"module.l.{at}.b": torch.ones(3)}
        for at in (1, 2, 3)
    }
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 6036}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "x"}')
    return folder


@pytest.mark.parametrize(
    ("format", "suffix", "index"),
    [("safetensors", "safetensors", "model.safetensors.index.json"), ("torch", "bin", "pytorch_model.bin.index.json")],
)
def test_a_sharded_folder_becomes_a_sharded_folder(model, cli, format, suffix, index):
    out = model.parent / "out"
    result = cli("run", "dataparallel", model, out, "--format", format, "--shard-size", "4kB", "--json")
    assert result.code == 0, result.err + result.out
    assert result.json["verification"]["reached"] == "L0 L1 L3"
    written = json.loads((out / index).read_text())
    assert written["metadata"]["total_size"] == 3 * (2000 + 12)
    assert set(written["weight_map"]) == {f"l.{at}.{p}" for at in (1, 2, 3) for p in "wb"}
    assert (out / "config.json").read_text() == '{"model_type": "x"}'
    shards = sorted(path.name for path in out.glob(f"*.{suffix}"))
    assert len(shards) >= 2
    assert set(written["weight_map"].values()) == set(shards)
    for name, shard in written["weight_map"].items():
        state = load_file(out / shard) if format == "safetensors" else torch.load(out / shard, weights_only=True, mmap=True)
        at = float(name.split(".")[1])
        assert torch.equal(state[name], torch.full((50, 10), at) if name.endswith("w") else torch.ones(3))


def test_a_sharded_folder_becomes_one_file_and_back(model, cli):
    one = model.parent / "one.pth"
    assert cli("run", "dataparallel", model, one).code == 0
    assert len(torch.load(one)) == 6
    assert cli("diff", one, model).code == 1


def test_where_the_output_goes_is_told_by_its_name(tmp_path, cli):
    torch.save({"module.a": torch.ones(2)}, tmp_path / "in.pth")
    assert cli("run", "dataparallel", tmp_path / "in.pth", tmp_path / "folder").code == 0
    assert list(torch.load(tmp_path / "folder" / "pytorch_model.bin")) == ["a"]
    assert cli("run", "dataparallel", tmp_path / "in.pth", tmp_path / "file.xyz", "--format", "safetensors").code == 0
    assert list(load_file(tmp_path / "file.xyz")) == ["a"]


def test_ties_are_kept_in_pth_and_recorded_in_safetensors(tmp_path, cli):
    weight = torch.randn(5, 2)
    torch.save({"module.embed.weight": weight, "module.head.weight": weight}, tmp_path / "in.pth")
    assert cli("run", "dataparallel", tmp_path / "in.pth", tmp_path / "out.pth").code == 0
    loaded = torch.load(tmp_path / "out.pth")
    assert loaded["embed.weight"].data_ptr() == loaded["head.weight"].data_ptr()
    assert (tmp_path / "out.pth").stat().st_size < 2500
    assert cli("run", "dataparallel", tmp_path / "in.pth", tmp_path / "out.safetensors").code == 0
    assert list(load_file(tmp_path / "out.safetensors")) == ["embed.weight"]
    from safetensors import safe_open

    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        assert opened.metadata()["head.weight"] == "embed.weight"
        assert opened.metadata()["format"] == "pt"
    assert cli("diff", tmp_path / "out.pth", tmp_path / "out.safetensors").code == 0
    assert cli("run", "dataparallel", tmp_path / "in.pth", tmp_path / "untied.safetensors", "--untie").code == 0
    assert sorted(load_file(tmp_path / "untied.safetensors")) == ["embed.weight", "head.weight"]


def convert(source, out, *options):
    """`make convert`, with the Python that runs these tests in the place of the Makefile's own environment."""
    tools = out.parent / "venv"
    (tools / "bin").mkdir(parents=True, exist_ok=True)
    for name, line in (
        ("python", f'exec {sys.executable} "$@"'),
        ("ckptconv", f'exec {sys.executable} -m ckptconv "$@"'),
        ("pip", "exit 0"),
    ):
        (tools / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / "bin" / name).chmod(0o755)
    (tools / ".ready").touch()
    command = [
        "make",
        "--no-print-directory",
        "-j2",
        "convert",
        f"IN={source}",
        f"OUT={out}",
        "RULES=dataparallel",
        f"VENV={tools}",
        *options,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def test_make_converts_a_zoo_goes_past_bad_files_and_does_only_what_changed(tmp_path):
    zoo, out = tmp_path / "zoo", tmp_path / "out"
    (zoo / "sub folder").mkdir(parents=True)
    torch.save({"module.a": torch.ones(2)}, zoo / "one.pth")
    torch.save({"module.a": torch.ones(3)}, zoo / "sub folder" / "it's $two.pth")
    (zoo / "bad.pth").write_text("no checkpoint")
    (zoo / "README.md").write_text("not one either")
    first = convert(zoo, out)
    assert first.returncode != 0
    assert f"not converted: {zoo / 'bad.pth'}\n" in first.stderr, first.stdout + first.stderr
    assert torch.load(out / "one.pth")["a"].shape == (2,)
    assert torch.load(out / "sub folder" / "it's $two.pth")["a"].shape == (3,)
    (zoo / "bad.pth").unlink()
    made = (out / "one.pth").stat().st_mtime_ns
    torch.save({"module.a": torch.ones(4)}, zoo / "sub folder" / "it's $two.pth")
    second = convert(zoo, out)
    assert second.returncode == 0, second.stdout + second.stderr
    assert torch.load(out / "sub folder" / "it's $two.pth")["a"].shape == (4,)
    assert (out / "one.pth").stat().st_mtime_ns == made
    assert not list(out.glob(".*"))
