"""Checkpoints of every kind, to be put into stores."""

import torch
from safetensors.torch import save_file

import ckptconv

NONE = "version: 1\nname: none\nsummary: leaves all as it is\nsteps:\n  - drop: {keys: nothing, optional: true}\n"


def tensors(seed=0, big=1 << 20):
    """Small tensors around a big one of ``big`` bytes."""
    made = torch.Generator().manual_seed(seed)
    return {
        "module.first": torch.randn(64, generator=made), "module.big": torch.randn(big // 4, generator=made),
        "module.half": torch.randn(3, 5, generator=made).bfloat16(), "module.last": torch.randn(2, 2, generator=made),
    }  # fmt: skip


def put_folder(store, folder, path):
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            store.put(f"{path}/{file.relative_to(folder).as_posix()}", file)


def write_safetensors(folder):
    save_file(tensors(), folder / "in.safetensors")
    return "in.safetensors"


def write_pth(folder):
    torch.save({"epoch": 3, "state_dict": tensors()}, folder / "in.pth")
    return "in.pth"


def write_legacy(folder):
    torch.save(tensors(), folder / "old.pth", _use_new_zipfile_serialization=False)
    return "old.pth"


def write_shards(folder):
    save_file(tensors(), folder / "whole.safetensors")
    (folder / "none.yaml").write_text(NONE)
    ckptconv.run(folder / "none.yaml", folder / "whole.safetensors", folder / "in", shard_size="500KB")
    (folder / "in" / "config.json").write_text('{"hidden_size": 64}')
    return "in"


def write_index(folder):
    return f"{write_shards(folder)}/model.safetensors.index.json"


def write_dcp(folder):
    import torch.distributed.checkpoint as dcp

    dcp.save(tensors(), checkpoint_id=folder / "dcp", no_dist=True)
    return "dcp"


def write_ranks(folder):
    for rank in range(2):
        (folder / "tp").mkdir(exist_ok=True)
        torch.save(tensors(rank), folder / "tp" / f"consolidated.{rank:02}.pth")
    return "tp"
