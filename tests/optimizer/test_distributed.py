"""torch.distributed.checkpoint folders with an optimizer's state, nested and flat, in and out again, read by torch itself."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from making import Net, rules, step
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import ckptconv

JOIN = """
  - concat: {from: "{x:q|k|v}.{p}", to: "qkv.{p}", dim: 0}"""


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("top", [False, True], ids=["model", "weights at the top"])
def test_a_distributed_checkpoints_state_follows(tmp_path, flat, top):
    model, options = Net(), StateDictOptions(flatten_optimizer_state_dict=flat)
    optimizer = step(model, torch.optim.AdamW(model.parameters(), lr=0.25))
    state = get_optimizer_state_dict(model, optimizer, options=options)
    weights = model.state_dict() if top else {"model": model.state_dict()}
    dcp.save({**weights, "optimizer": state, "epoch": 3}, checkpoint_id=tmp_path / "in", no_dist=True)
    report = ckptconv.run(rules(tmp_path, JOIN), tmp_path / "in", tmp_path / "out", format="dcp", optimizer="follow", verify=4)
    assert report.ladder.reached == "L0 L1 L3 L4"
    other = Joined()
    fresh = torch.optim.AdamW(other.parameters())
    step(other, fresh, times=1)
    wanted = {"optimizer": get_optimizer_state_dict(other, fresh, options=options)}
    dcp.load(wanted, checkpoint_id=tmp_path / "out", no_dist=True)
    set_optimizer_state_dict(other, fresh, wanted["optimizer"], options=options)
    moments = [optimizer.state[getattr(model, name).weight]["exp_avg"] for name in "qkv"]
    assert torch.equal(fresh.state[other.qkv.weight]["exp_avg"], torch.cat(moments))
    assert fresh.param_groups[0]["lr"] == 0.25
