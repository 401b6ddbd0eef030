"""What the tests of optimizers share: checkpoints after a few steps, and runs of rules that are written in place."""

import json

import torch
from torch import nn

import ckptconv
from ckptconv.errors import CkptconvError
from ckptconv.spec import DType, Manifest, TensorSpec


def step(model, optimizer, times=2):
    """Gives every parameter a history of its own."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(times):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return optimizer


class Net(nn.Module):
    """Queries, keys and values, a norm with its statistics, and a head."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)


def save(path, model, optimizer, **more):
    state = optimizer.state_dict() if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    torch.save({"model": model if isinstance(model, dict) else model.state_dict(), "optimizer": state, **more}, path)
    return state


def rules(folder, steps):
    (folder / "mine.yaml").write_text(f"version: 1\nname: mine\nsummary: s\nsteps:\n{steps}\n")
    return folder / "mine.yaml"


def run(folder, steps, **options):
    """The written file and the report."""
    report = ckptconv.run(
        rules(folder, steps), folder / "in.pth", folder / "out.pth", **{"optimizer": "follow", "verify": 4, "force": True, **options}
    )
    return torch.load(folder / "out.pth", weights_only=True), report


def problems(folder, steps, **options):
    """What it is refused for; nothing is written."""
    try:
        run(folder, steps, **options)
    except CkptconvError as error:
        assert not (folder / "out.pth").exists()
        return error
    raise AssertionError("it was not refused")


def target(folder, model, order=None):
    """A saved manifest of the model, with its buffers and ties."""
    tensors, ties = {}, {}
    for name, value in model.state_dict(keep_vars=True).items():
        tensors[name] = TensorSpec(tuple(value.shape), DType(str(value.dtype).removeprefix("torch.")))
        ties.setdefault(id(value), []).append(name)
    parameters = {id(each) for each in model.parameters()}
    buffers = frozenset(name for name, value in model.state_dict(keep_vars=True).items() if id(value) not in parameters)
    made = Manifest(
        {name: tensors[name] for name in order or tensors}, tuple(tuple(names) for names in ties.values() if len(names) > 1), buffers
    )
    path = folder / "target.json"
    path.write_text(json.dumps(made.to_json()))
    return str(path)
