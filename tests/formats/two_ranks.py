"""Two processes that train a small model under FSDP and save it in every way that torch has; then they load what we made of it.

Run as a program: ``two_ranks.py FOLDER``.
"""

import os
import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


class Net(nn.Module):
    """Sizes that two ranks cannot share evenly, and one of which the second rank gets nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.last = nn.Linear(7, 1)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def sharded(folder, mesh):
    model = Net()
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 0.125)
    model(torch.arange(20.0).view(4, 5)).square().mean().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": moments, "step": 5}, checkpoint_id=f"{folder}/fsdp2")
    dcp.async_save({"model": weights}, checkpoint_id=f"{folder}/async").result()
    flat = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    dcp.save({**flat[0], "optimizer": flat[1], "train_state": {"step": torch.tensor(5)}}, checkpoint_id=f"{folder}/titan")
    dcp.save(weights, storage_writer=HuggingFaceStorageWriter(f"{folder}/shares", save_distributed=True))
    columns = distribute_tensor(torch.arange(30.0).view(5, 6), mesh, [Shard(1)])
    dcp.save({"w": columns, "same": distribute_tensor(torch.arange(3.0), mesh, [Replicate()])}, checkpoint_id=f"{folder}/columns")
    torch.save(model.state_dict(), f"{folder}/dtensor{dist.get_rank()}.pt")
    full = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    if not dist.get_rank():
        torch.save(full, f"{folder}/full.pt")


def flattened(folder):
    model = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
    for kind in (StateDictType.LOCAL_STATE_DICT, StateDictType.SHARDED_STATE_DICT):
        with FullyShardedDataParallel.state_dict_type(model, kind):
            state = model.state_dict()
            torch.save(state, f"{folder}/{kind.name}{dist.get_rank()}.pt")
            dcp.save({"model": state}, checkpoint_id=f"{folder}/{kind.name}")
    with FullyShardedDataParallel.summon_full_params(model):
        if not dist.get_rank():
            torch.save(Net().state_dict(), f"{folder}/fsdp1.pt")


def converted(folder):
    """One process converts; the others wait."""
    import ckptconv

    torch.save(torch.load(f"{folder}/full.pt")[0], f"{folder}/whole.pt")
    ckptconv.run("plain-tensors", f"{folder}/whole.pt", f"{folder}/ours", format="dcp", shard_size="100B")
    ckptconv.run("plain-tensors", f"{folder}/whole.pt", f"{folder}/ours-hf", format="safetensors", shard_size="100B")


def loaded(folder, mesh):
    """What we wrote, loaded into models that are cut over the ranks."""
    full = torch.load(f"{folder}/full.pt")[0]
    for reader in (dcp.FileSystemReader(f"{folder}/ours"), HuggingFaceStorageReader(f"{folder}/ours-hf")):
        model = Net()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        fully_shard(model, mesh=mesh)
        state = get_model_state_dict(model)
        dcp.load(state, storage_reader=reader)
        found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if not dist.get_rank():
            assert found.keys() == full.keys()
            same = [name for name in full if torch.equal(found[name], full[name])]
            print("loaded", type(reader).__name__, len(same), "of", len(full))


def work(rank, folder):
    warnings.filterwarnings("ignore")
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    sharded(folder, mesh)
    flattened(folder)
    if not rank:
        converted(folder)
    dist.barrier()
    loaded(folder, mesh)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of the process group would abort an orderly end now and then


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
