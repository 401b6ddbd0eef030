"""Conversions that are worked on by many: sources of every kind, and what one run makes of them."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckptconv

#: Copies, slices, and what must be computed: transposed, cast, joined along an inner axis, stacked from experts.
RULES = """
version: 1
name: many
summary: s
steps:
  - split: {from: "l.{i:int}.qkv.{p}", to: "l.{i}.{x:q|k|v}.{p}"}
  - stack: {from: "l.{i:int}.e.{e:int}.w", over: e, to: "l.{i}.experts"}
  - rearrange: {keys: "l.{i:int}.up", pattern: "i o -> o i"}
  - cast: {keys: "l.{i:int}.up", dtype: bfloat16}
  - concat: {from: ["l.{i:int}.a", "l.{i:int}.b"], to: "l.{i}.ab", dim: 1}
  - split: {from: "l.{i:int}.fused", to: "l.{i}.{x:gate|up2}", dim: 1}
  - rename: {norm: n}
  - fill: {to: made, shape: [3], value: arange, dtype: int64}
  - drop: gone
"""
LAYERS = 4


def state_dict():
    torch.manual_seed(0)
    state = {"norm": torch.randn(9), "gone": torch.ones(3), "mask": torch.tensor([True, False])}
    for i in range(LAYERS):
        state[f"l.{i}.qkv.weight"], state[f"l.{i}.qkv.bias"] = torch.randn(12, 5), torch.randn(12)
        state[f"l.{i}.up"], state[f"l.{i}.fused"] = torch.randn(7, 4), torch.randn(6, 8)
        state |= {f"l.{i}.e.{e}.w": torch.randn(2, 3) for e in range(3)}
        state[f"l.{i}.a"], state[f"l.{i}.b"] = torch.randn(4, 2), torch.randn(4, 3)
    return state


@dataclass(frozen=True)
class Case:
    """A kind of conversion in a folder of its own."""

    folder: Path
    source: str
    destination: str
    options: dict

    @property
    def out(self):
        return self.folder / self.destination

    @property
    def plan(self):
        return self.folder / "plan.json"

    def planned(self, **more):
        """The plan file, written anew."""
        ckptconv.plan(
            self.folder / "many.yaml",
            self.folder / self.source,
            self.out,
            out=self.plan,
            force=True,
            task_size="300",
            **self.options,
            **more,
        )
        return self.plan

    def data(self):
        return json.loads(self.plan.read_text())

    def contents(self, name=None):
        """A file's bytes, a folder's files with theirs, or None."""
        path = self.folder / (name or self.destination)
        if path.is_dir():
            return {each.name: each.read_bytes() for each in sorted(path.iterdir())}
        return path.read_bytes() if path.exists() else None

    @property
    def wanted(self):
        """What one run makes."""
        name = f"wanted{Path(self.destination).suffix}"
        if not (self.folder / name).exists():
            ckptconv.run(self.folder / "many.yaml", self.folder / self.source, self.folder / name, **self.options)
        return self.contents(name)

    def left(self):
        """Hidden names beside the output."""
        return sorted(path.name for path in self.folder.iterdir() if path.name.startswith("."))


def write_source(folder, source):
    state = state_dict()
    if source == "in":
        (folder / source).mkdir()
        names = list(state)
        halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for name, part in halves.items():
            save_file({key: state[key] for key in part}, folder / source / name)
        where = {key: name for name, part in halves.items() for key in part}
        (folder / source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        (folder / source / "config.json").write_text('{"model_type": "x"}')
    elif source == "training.pth":
        moments = {"exp_avg": torch.randn(20), "step": torch.tensor(3)}
        torch.save({"state_dict": state, "optimizer": {"state": {0: moments}}, "epoch": 3}, folder / source)
    else:
        torch.save(state, folder / source)


CASES = {
    "file": ("in.pth", "out.pth", {}),
    "shards": ("in", "out", {"shard_size": "700"}),
    "torch shards": ("in.pth", "out", {"shard_size": "700", "format": "torch"}),
    "safetensors": ("in.pth", "out.safetensors", {}),
    "distributed": ("in.pth", "out", {"shard_size": "700", "format": "dcp"}),
    "kept": ("training.pth", "out.pth", {"keep_extras": True, "select": ["state_dict"]}),
}


def made(folder, kind):
    source, destination, options = CASES[kind]
    (folder / "many.yaml").write_text(RULES)
    write_source(folder, source)
    return Case(folder, source, destination, options)


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    return made(tmp_path, request.param)


@pytest.fixture
def file(tmp_path):
    return made(tmp_path, "file")


@pytest.fixture
def shards(tmp_path):
    return made(tmp_path, "shards")
