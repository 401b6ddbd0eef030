"""Every moment goes where its parameter goes, or the run stops and says which cannot, why, and what to do."""

import json

import pytest
import torch
from making import Net, problems, rules, run, save, step, target
from torch import nn

import ckptconv
from ckptconv import api
from ckptconv.errors import FitError, InputError, UsageError

SPLIT = """
  - split: {from: "qkv.{p}", to: "{x:q|k|v}.{p}", dim: 0}"""
JOIN = """
  - concat: {from: "{x:q|k|v}.{p}", to: "qkv.{p}", dim: 0}"""
DROP = "--optimizer drop writes everything else, and the optimizer starts anew"


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 2)


def test_split_moments_and_a_step_for_each(tmp_path):
    model = Fused()
    state = save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters(), amsgrad=True)))
    written, report = run(tmp_path, SPLIT)
    names = list(written["model"])
    assert names == ["q.weight", "k.weight", "v.weight", "q.bias", "k.bias", "v.bias", "head.weight", "head.bias"]
    optimizer = written["optimizer"]
    assert optimizer["param_groups"] == [{**state["param_groups"][0], "params": list(range(8))}]
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        for at, part in enumerate(state["state"][0][key].chunk(3)):
            assert torch.equal(optimizer["state"][at][key], part)
        assert torch.equal(optimizer["state"][6][key], state["state"][2][key])
    assert all(torch.equal(each["step"], torch.tensor(2.0)) for each in optimizer["state"].values())
    assert report.ladder.reached == "L0 L1 L3 L4"
    assert report.to_json()["optimizer"] == {
        "optimizer": "follow", "at": ["optimizer"], "parameters": 8, "moments": 24, "counters": 8, "dropped": 0, "groups": 1,
    }  # fmt: skip
    assert "24 moments of 8 parameters follow the weights" in report.notes
    assert "the optimizer's numbers follow the order of the output; --target takes the model's" in report.notes


def test_joined_moments_in_the_targets_order(tmp_path):
    model = Net()
    state = save(tmp_path / "in.pth", model, step(model, torch.optim.AdamW(model.parameters())))["state"]
    order = ["head.bias", "norm.weight", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "qkv.bias", "qkv.weight", "norm.bias",
             "head.weight"]  # fmt: skip
    other = Fused()
    other.norm = nn.BatchNorm1d(4)
    written, report = run(tmp_path, JOIN, target=target(tmp_path, other, order))
    found = written["optimizer"]["state"]
    assert list(found) == [0, 1, 2, 3, 4, 5]
    assert torch.equal(found[0]["exp_avg"], state[9]["exp_avg"])
    assert torch.equal(found[1]["exp_avg"], state[6]["exp_avg"])
    assert torch.equal(found[3]["exp_avg_sq"], torch.cat([state[at]["exp_avg_sq"] for at in (0, 2, 4)]))
    assert torch.equal(found[5]["exp_avg"], state[8]["exp_avg"])
    assert "order of the output" not in "".join(report.notes)


def test_steps_of_what_becomes_one_must_agree(tmp_path):
    model = Net()
    state = step(model, torch.optim.Adam(model.parameters())).state_dict()
    state["state"][2]["step"] = torch.tensor(7.0)
    save(tmp_path / "in.pth", model, state)
    error = problems(tmp_path, JOIN)
    assert isinstance(error, FitError)
    (problem,) = error.problems
    assert (problem.code, problem.what, problem.found) == (
        "CK207", "::optimizer.state.qkv.weight.step: the tensors are not equal", "2.0 and 7.0",
    )  # fmt: skip


def test_plain_numbers_of_what_becomes_one_must_agree(tmp_path):
    model = Net()
    state = step(model, torch.optim.Adam(model.parameters())).state_dict()
    for entries in state["state"].values():  # as torch before 1.12 counted
        entries["step"] = 2
    save(tmp_path / "in.pth", model, state)
    written, _ = run(tmp_path, JOIN)
    assert written["optimizer"]["state"][0]["step"] == 2
    (tmp_path / "out.pth").unlink()
    state["state"][2]["step"] = 3
    save(tmp_path / "in.pth", model, state)
    (problem,) = problems(tmp_path, JOIN).problems
    assert problem.what == (
        "the optimizer's state cannot follow qkv.weight: `step` differs between q.weight and k.weight, which become one"
    )
    assert (problem.code, problem.try_) == ("CK417", DROP)


def test_what_only_moves_elements_carries(tmp_path):
    model = Fused()
    state = save(tmp_path / "in.pth", model, step(model, torch.optim.RMSprop(model.parameters(), momentum=0.9, centered=True)))
    written, _ = run(tmp_path, """
  - rearrange: {keys: head.weight, pattern: "o i -> i o"}
  - index: {keys: head.weight, dim: 0, take: [2, 0, 1, 3]}
  - slice: {keys: head.bias, dim: 0, start: 0, stop: 1}
  - reshape: {keys: qkv.bias, shape: [3, 4]}
  - unstack: {from: qkv.bias, over: e, to: "bias.{e}", dim: 0}
  - stack: {from: "bias.{e:int}", over: e, to: both.bias}
  - rename: {"{m}.{p}": "net.{m}.{p}"}""", verify=3)  # fmt: skip
    found = written["optimizer"]["state"]
    names = list(written["model"])
    for key in ("square_avg", "grad_avg", "momentum_buffer"):
        old = {at: state["state"][at][key] for at in range(4)}
        assert torch.equal(found[names.index("net.head.weight")][key], old[2].T[[2, 0, 1, 3]])
        assert torch.equal(found[names.index("net.head.bias")][key], old[3][:1])
        assert torch.equal(found[names.index("net.both.bias")][key], old[1].reshape(3, 4))


def test_a_cast_is_of_the_weights_alone(tmp_path):
    model = Fused()
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    written, _ = run(tmp_path, "  - cast: {keys: '**', dtype: bfloat16}\n  - check: {keys: '**', finite: true}", verify=3)
    assert {value.dtype for value in written["model"].values()} == {torch.bfloat16}
    assert {each["exp_avg_sq"].dtype for each in written["optimizer"]["state"].values()} == {torch.float32}


@pytest.mark.parametrize(
    ("steps", "named", "reason"),
    [
        pytest.param("  - affine: {keys: head.weight, add: 1}", "head.weight", "affine: values that are scaled or shifted have other gradients", id="affine"),
        pytest.param("  - pad: {keys: head.weight, dim: 0, after: 1}", "head.weight",
                     "pad: the new elements have no history, and zeros would make their first steps too large", id="pad"),
        pytest.param("  - repeat: {keys: head.bias, dim: 0, times: 2}", "head.bias", "repeat: copies share what was one gradient, in parts that nothing tells",
                     id="repeat"),
        pytest.param("  - index: {keys: head.bias, dim: 0, take: [1, 1]}", "head.bias",
                     "index: positions that are taken twice share what was one gradient", id="index"),
        pytest.param("  - adapt_channels: {keys: head.weight, channels: 1, how: sum}", "head.weight",
                     "reduce: a sum or a mean has other gradients than what goes into it", id="reduce"),
        pytest.param("  - resize: {keys: head.weight, dim: 1, size: [6], grid: [4], prefix: 0, mode: linear}", "head.weight",
                     "resize: positions between the old ones have no history", id="resize"),
        pytest.param('  - combine: {from: {w: qkv.weight, b: qkv.bias}, to: w, formula: "w + rows(b, w)"}', "w",
                     "combine: a formula's result has other gradients than what goes into it", id="combine"),
        pytest.param("  - fill: {to: more, shape: [1, 4], dtype: float32, value: zeros}\n  - concat: {from: [head.weight, more], to: head.weight, dim: 0}",
                     "head.weight", "a part of it is new and has no history; zeros would make its first steps too large", id="fill"),
        pytest.param("  - copy: {from: head.weight, to: again.weight}", "again.weight",
                     "one parameter would become two, each with all of its history: tie them", id="copy"),
    ],
)  # fmt: skip
def test_what_stops_a_moment_is_named(tmp_path, steps, named, reason):
    model = Fused()
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    error = problems(tmp_path, steps)
    assert isinstance(error, FitError)
    assert [(each.code, each.what, each.try_) for each in error.problems] == [
        ("CK417", f"the optimizer's state cannot follow {named}: {reason}", DROP)
    ]
    assert error.problems[0].where.startswith(str(tmp_path / "mine.yaml") + ":")
    ckptconv.run(tmp_path / "mine.yaml", tmp_path / "in.pth", tmp_path / "out.pth", optimizer="drop")  # the way out is one
    assert "optimizer" not in torch.load(tmp_path / "out.pth")


def test_everything_that_stops_is_said_at_once_as_templates(tmp_path):
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    save(tmp_path / "in.pth", model, step(model, torch.optim.SGD(model.parameters(), momentum=0.9)))
    error = problems(tmp_path, '  - affine: {keys: "{i:int}.weight", mul: 2}\n  - pad: {keys: "3.bias", dim: 0, after: 1}')
    assert [each.what.partition(": ")[0].removeprefix("the optimizer's state cannot follow ") for each in error.problems] == [
        "{0-3}.weight ×4",
        "3.bias",
    ]


def test_a_dropped_parameters_state_is_dropped_and_said(tmp_path):
    model = Fused()
    state = save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    written, report = run(tmp_path, "  - drop: qkv.{p}", verify=3)
    found = written["optimizer"]
    assert found["param_groups"][0]["params"] == [0, 1]
    assert torch.equal(found["state"][1]["exp_avg"], state["state"][3]["exp_avg"])
    assert "4 moments of 2 parameters follow the weights; 6 entries of dropped parameters do not" in report.notes
    said = [change for change in report.changes if change.verb == "dropped"]
    assert sorted(str(template) for change in said for template in change.sources) == sorted(
        [f"qkv.{p}" for p in ("weight", "bias")]
        + [f"::optimizer.state.qkv.{p}.{key}" for p in ("weight", "bias") for key in ("step", "exp_avg", "exp_avg_sq")]
    )


def groups_of(model):
    return [{"params": [each for each in model.parameters() if each.ndim > 1], "lr": 0.1},
            {"params": [each for each in model.parameters() if each.ndim < 2], "lr": 0.2}]  # fmt: skip


def test_membership_goes_with_the_parameter(tmp_path):
    model = Fused()
    save(tmp_path / "in.pth", model, step(model, torch.optim.SGD(groups_of(model), momentum=0.9)))
    written, _ = run(tmp_path, SPLIT)
    assert [(group["lr"], group["params"]) for group in written["optimizer"]["param_groups"]] == [(0.1, [0, 1, 2, 3]), (0.2, [4, 5, 6, 7])]
    shapes = [tuple(written["optimizer"]["state"][at]["momentum_buffer"].shape) for at in range(8)]
    assert shapes == [(4, 4), (4, 4), (4, 4), (2, 4), (4,), (4,), (4,), (2,)]


def test_two_groups_do_not_become_one_parameter(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False), "b": nn.Linear(3, 4, bias=False)})
    groups = [{"params": model["a"].parameters(), "lr": 0.1}, {"params": model["b"].parameters(), "lr": 0.2}]
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(groups)))
    (problem,) = problems(tmp_path, '  - concat: {from: ["a.weight", "b.weight"], to: ab, dim: 0}').problems
    assert problem.what == "the optimizer's state cannot follow ab: it is made of parameters of 2 groups, which are trained differently"


def test_a_trained_and_a_frozen_parameter_do_not_become_one(tmp_path):
    model = Net()
    model.k.requires_grad_(False)
    optimizer = torch.optim.Adam((name, each) for name, each in model.named_parameters() if each.requires_grad)
    save(tmp_path / "in.pth", model, step(model, optimizer))
    what = [each.what for each in problems(tmp_path, JOIN).problems]
    assert what[0] == "the optimizer's state cannot follow qkv.weight: a part of it is k.weight, which the optimizer does not train"


def test_a_parameter_that_was_never_stepped_has_no_state_and_keeps_its_number(tmp_path):
    model = Net()
    model.k.requires_grad_(False)
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    written, _ = run(tmp_path, '  - rename: {"{m}.{p}": "net.{m}.{p}"}')
    assert written["optimizer"]["param_groups"][0]["params"] == list(range(10))
    assert sorted(written["optimizer"]["state"]) == [0, 1, 4, 5, 6, 7, 8, 9]
    (tmp_path / "out.pth").unlink()
    error = problems(tmp_path, JOIN)
    assert error.problems[0].what == (
        "the optimizer's state cannot follow qkv.weight: the optimizer keeps step, exp_avg, exp_avg_sq of q.weight, and nothing of k.weight"
    )


def test_plain_momentum_may_be_none(tmp_path):
    model = Fused()
    state = step(model, torch.optim.SGD(model.parameters())).state_dict()
    state["state"] = {at: {"momentum_buffer": None} for at in range(4)}
    save(tmp_path / "in.pth", model, state)
    written, _ = run(tmp_path, SPLIT)
    assert written["optimizer"]["state"] == {at: {"momentum_buffer": None} for at in range(8)}


def test_a_parameter_without_axes_has_moments_and_a_step(tmp_path):
    model = nn.ParameterDict({"scale": nn.Parameter(torch.tensor(2.0)), "w": nn.Parameter(torch.ones(3))})
    state = save(tmp_path / "in.pth", model, step(model, torch.optim.NAdam(model.parameters())))
    written, report = run(tmp_path, "  - rename: {scale: s, w: t}")
    assert report.to_json()["optimizer"]["moments"] == 4 + 1  # NAdam's mu_product of the scale looks like one, and goes the same way
    for at in (0, 1):
        assert {key: value.tolist() for key, value in written["optimizer"]["state"][at].items()} == {
            key: value.tolist() for key, value in state["state"][at].items()
        }


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        pytest.param({"exp_avg_sq_row": torch.ones(2), "exp_avg_sq_col": torch.ones(4)},
                     "`exp_avg_sq_row` [2] has not the parameter's shape [2, 4]: it is no moment of its elements", id="Adafactor"),
        pytest.param({"exp_avg": torch.ones(2, 4), "history": [torch.ones(2)]}, "`history` is neither a tensor nor a number (list)", id="a list"),
        pytest.param({"state1": torch.ones(2, 4, dtype=torch.uint8), "absmax1": torch.ones(1)},
                     "`absmax1` [1] has not the parameter's shape [2, 4]: it is no moment of its elements", id="8-bit"),
    ],
)  # fmt: skip
def test_other_states_are_refused_by_name(tmp_path, entries, reason):
    model = nn.Linear(4, 2, bias=False)
    save(tmp_path / "in.pth", model, {"state": {0: entries}, "param_groups": [{"lr": 0.1, "params": [0], "param_names": ["weight"]}]})
    error = problems(tmp_path, "  - rename: {weight: w}")
    assert error.problems[0].what == f"the optimizer's state cannot follow w: {reason}"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.inner = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_a_tie_is_one_parameter(tmp_path):
    model = Tied()
    state = save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    written, _ = run(tmp_path, '  - rename: {"{m}.{p}": "net.{m}.{p}"}')
    assert written["optimizer"]["param_groups"][0]["params"] == [0, 1, 2]
    assert torch.equal(written["optimizer"]["state"][2]["exp_avg"], state["state"][2]["exp_avg"])
    (tmp_path / "out.pth").unlink()
    (problem,) = problems(tmp_path, '  - rename: {"{m}.{p}": "net.{m}.{p}"}', untie=True).problems
    assert "net.head.weight: one parameter would become two" in problem.what


def test_the_head_first_in_the_target_is_the_same_parameter(tmp_path):
    model = Tied()
    state = save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    path = target(tmp_path, model, ["head.weight", "inner.weight", "inner.bias", "embed.weight"])
    written, _ = run(tmp_path, "  - rename: {inner.weight: inner.weight}", target=path)
    assert torch.equal(written["optimizer"]["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    path = target(tmp_path, model, ["inner.weight", "inner.bias", "head.weight", "embed.weight"])
    written, _ = run(tmp_path, "  - rename: {inner.weight: inner.weight}", target=path)
    assert torch.equal(written["optimizer"]["state"][2]["exp_avg"], state["state"][0]["exp_avg"])


def test_two_trained_tensors_are_not_one_parameter_of_the_target(tmp_path):
    apart = Tied()
    apart.head = nn.Linear(3, 5, bias=False)
    save(tmp_path / "in.pth", apart, step(apart, torch.optim.Adam(apart.parameters())))
    error = problems(tmp_path, "  - rename: {inner.weight: inner.weight}", target=target(tmp_path, Tied()))
    assert error.problems[0].what == (
        "the optimizer's state cannot follow: embed.weight and head.weight are one parameter in the target, and have a state each"
    )


def test_what_is_new_in_the_target_joins_the_only_group(tmp_path):
    model = Fused()
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    new = "  - drop: head.weight\n  - fill: {to: head.weight, shape: [2, 4], dtype: float32, value: zeros}"
    written, report = run(tmp_path, new, target=target(tmp_path, model), verify=3)
    assert written["optimizer"]["param_groups"][0]["params"] == [0, 1, 2, 3]
    assert sorted(written["optimizer"]["state"]) == [0, 1, 3]
    assert "new in the optimizer, without a history: head.weight" in report.notes
    torch.optim.Adam(model.parameters()).load_state_dict(written["optimizer"])
    written, report = run(tmp_path, new, verify=3)  # nothing says that it is a parameter
    assert written["optimizer"]["param_groups"][0]["params"] == [0, 1, 2]
    assert "not in the optimizer, because it is new and no --target says that it is a parameter: head.weight" in report.notes


def test_what_is_new_in_the_target_is_in_neither_of_two_groups(tmp_path):
    model = Fused()
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(groups_of(model))))
    new = "  - drop: head.weight\n  - fill: {to: head.weight, shape: [2, 4], dtype: float32, value: zeros}"
    (problem,) = problems(tmp_path, new, target=target(tmp_path, model)).problems
    assert problem.what == "the target's head.weight is new, and nothing tells which of the parameter groups has it"
    states = [{"state": {}, "param_groups": [{"params": [0], "param_names": [f"qkv.{p}"]}]} for p in ("weight", "bias")]
    torch.save({"model": model.state_dict(), "optimizers": states}, tmp_path / "in.pth")
    (problem,) = problems(tmp_path, new, target=target(tmp_path, model)).problems
    assert problem.what == "the target's head.weight is new, and nothing tells which of the parameter groups has it"


def test_what_the_target_does_not_know_is_not_trained_on(tmp_path):
    model = Fused()
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    path = target(tmp_path, model.qkv)
    steps = "  - strip_prefix: {prefix: qkv., where: some}\ntarget: {allow: {unexpected: ['head.{p}']}}"
    error = problems(tmp_path, steps, target=path)
    assert {each.what for each in error.problems} == {
        f"the optimizer's state cannot follow head.{p}: the target does not know it" for p in ("weight", "bias")
    }


def test_a_parameter_does_not_become_a_buffer(tmp_path):
    model, other = Fused(), Fused()
    del other.head.bias
    other.head.register_buffer("bias", torch.zeros(2))
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    (problem,) = problems(tmp_path, "  - rename: {qkv.bias: qkv.bias}", target=target(tmp_path, other)).problems
    assert problem.what == "the optimizer's state cannot follow head.bias: it is a buffer in the target, which no optimizer trains"


def test_everything_else_stays_as_it_is(tmp_path):
    model = Fused()
    optimizer = step(model, torch.optim.Adam(model.parameters(), lr=torch.tensor(0.25), capturable=False, foreach=False))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    more = {"epoch": 5, "scheduler": scheduler.state_dict(), "rng": torch.get_rng_state(), "best": (0.5, "acc")}
    save(tmp_path / "in.pth", model, optimizer, **more)
    written, _ = run(tmp_path, SPLIT)
    assert list(written) == ["model", "optimizer", *more]
    assert written["optimizer"]["param_groups"][0]["lr"] == 0.25
    assert written["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert torch.equal(written["rng"], more["rng"])
    assert (written["epoch"], written["best"]) == (5, (0.5, "acc"))


def test_lightning_keeps_them_in_a_list(tmp_path):
    model = Fused()
    state = step(model, torch.optim.Adam(model.parameters())).state_dict()
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [state], "lr_schedulers": [{"last_epoch": 2}]}, tmp_path / "in.pth")
    written, report = run(tmp_path, SPLIT)
    assert report.to_json()["optimizer"]["at"] == ["optimizer_states.0"]
    assert torch.equal(written["optimizer_states"][0]["state"][1]["exp_avg"], state["state"][0]["exp_avg"][4:8])
    written, _ = run(tmp_path, SPLIT, optimizer="drop")
    assert written["optimizer_states"] == []
    assert written["lr_schedulers"] == [{"last_epoch": 2}]


def test_one_of_several_optimizers_by_its_place(tmp_path):
    one, other = Fused(), nn.Linear(3, 3)
    states = [step(each, torch.optim.Adam(each.parameters())).state_dict() for each in (one, other)]
    torch.save({"G": one.state_dict(), "D": other.state_dict(), "opt": {"G": states[0], "D": states[1]}}, tmp_path / "in.pth")
    error = problems(tmp_path, SPLIT, select=["G"])
    assert isinstance(error, InputError)
    assert error.problems[0].code == "CK314"
    written, _ = run(tmp_path, SPLIT, select=["G"], optimizer="opt.G")
    assert len(written["opt"]["G"]["state"]) == 8
    assert torch.equal(written["opt"]["D"]["state"][0]["exp_avg"], states[1]["state"][0]["exp_avg"])
    (tmp_path / "out.pth").unlink()
    (problem,) = problems(tmp_path, SPLIT, select=["G"], optimizer="opt.H").problems
    assert (problem.what, problem.found, problem.try_) == ("there is no optimizer's state at opt.H", "opt.G, opt.D", "--optimizer opt.G")


def test_two_optimizers_of_one_model(tmp_path):
    model = Fused()
    optimizers = [torch.optim.Adam(part.named_parameters()) for part in (model.qkv, model.head)]
    states = [step(model, each).state_dict() for each in optimizers]
    states[0]["param_groups"][0]["param_names"] = ["qkv.weight", "qkv.bias"]
    states[1]["param_groups"][0]["param_names"] = ["head.weight", "head.bias"]
    torch.save({"model": model.state_dict(), "optimizers": states}, tmp_path / "in.pth")
    written, _ = run(tmp_path, SPLIT)
    first, second = written["optimizers"]
    assert first["param_groups"][0]["param_names"] == ["q.weight", "k.weight", "v.weight", "q.bias", "k.bias", "v.bias"]
    assert (second["param_groups"][0]["params"], second["param_groups"][0]["param_names"]) == ([0, 1], ["head.weight", "head.bias"])
    assert torch.equal(second["state"][1]["exp_avg"], states[1]["state"][1]["exp_avg"])
    (tmp_path / "out.pth").unlink()
    states[1] = states[0]
    torch.save({"model": model.state_dict(), "optimizers": states}, tmp_path / "in.pth")
    assert problems(tmp_path, SPLIT).problems[0].what == "two optimizers train qkv.weight"


def test_a_state_in_a_file_of_its_own(tmp_path):
    from safetensors.torch import save_file

    model, folder = Fused(), tmp_path / "checkpoint-2"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    optimizer = step(model, torch.optim.AdamW(groups_of(model)))
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save({"last_epoch": 2}, folder / "scheduler.pt")
    rule = rules(tmp_path, SPLIT)
    words = {"optimizer": "follow", "optimizer_file": folder / "optimizer.pt"}
    with pytest.raises(InputError) as sorted_:
        ckptconv.run(rule, folder, tmp_path / "out", **words)
    assert sorted_.value.problems[0].what == (
        "the optimizer knows its parameters by number, and this format keeps the tensors in an order of its own, not the model's"
    )
    words["source_model"] = target(tmp_path, model)
    report = ckptconv.run(rule, folder, tmp_path / "out", **words, verify=4)
    assert report.ladder.reached == "L0 L1 L3 L4"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
    ]
    written = torch.load(tmp_path / "out" / "optimizer.pt", weights_only=True)
    assert [group["params"] for group in written["param_groups"]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.equal(written["state"][1]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"][4:8])
    again = ckptconv.verify(tmp_path / "out", against=folder, rules=rule, **words, level=4)
    assert again.ladder.reached == "L0 L1 L3 L4"
    with pytest.raises(UsageError) as refused:
        ckptconv.run(rule, folder, tmp_path / "one.pth", **words)
    assert (refused.value.problems[0].what, refused.value.problems[0].try_) == (
        "the optimizer's state is in a file of its own, and gets one", "a folder as DST",
    )  # fmt: skip
    with pytest.raises(InputError) as missing:
        ckptconv.run(rule, folder, tmp_path / "other", optimizer="follow")
    assert missing.value.problems[0].try_ == "--optimizer-file FILE, where it is in a file of its own; else leave --optimizer out"


def test_safetensors_has_no_place_for_it(tmp_path):
    model = Fused()
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    with pytest.raises(UsageError) as refused:
        ckptconv.run(rules(tmp_path, SPLIT), tmp_path / "in.pth", tmp_path / "out.safetensors", optimizer="follow")
    assert refused.value.problems[0].what == (
        "--optimizer keeps a training checkpoint's entries, in a single .pth output or by --format dcp; or, from --optimizer-file, beside a folder's weights"
    )


def test_words_that_do_not_go_together(tmp_path):
    for options in ({"optimizer_file": tmp_path / "o.pt"}, {"source_model": "timm:x"}):
        with pytest.raises(UsageError, match="is about the optimizer's state"):
            ckptconv.run("ddp", tmp_path / "in.pth", tmp_path / "out.pth", **options)
    with pytest.raises(UsageError, match="nothing is read"):
        ckptconv.run("ddp", tmp_path / "in.pth", tmp_path / "out.pth", optimizer="drop", optimizer_file=tmp_path / "o.pt")


def test_an_optimizer_that_measures_whole_tensors_is_said(tmp_path):
    model = Fused()
    state = step(model, torch.optim.Adam(model.parameters())).state_dict()
    state["param_groups"][0]["trust_clip"] = False  # as LAMB has it
    save(tmp_path / "in.pth", model, state)
    note = "this optimizer looks at tensors as a whole: what is split or joined is stepped differently from now on"
    assert note in run(tmp_path, SPLIT)[1].notes
    assert note not in run(tmp_path, '  - rename: {"{m}.{p}": "net.{m}.{p}"}')[1].notes


def test_extras_that_are_kept_while_the_weights_change_are_said(tmp_path):
    model = Fused()
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    note = "optimizer is kept as it is, in the order and shapes of the source; --optimizer follow converts it"
    assert note in run(tmp_path, SPLIT, optimizer=None, keep_extras=True)[1].notes
    assert note not in run(tmp_path, '  - rename: {"{m}.{p}": "net.{m}.{p}"}', optimizer=None, keep_extras=True)[1].notes


def test_the_way_back_carries_the_state_back(tmp_path):
    model = Fused()
    state = save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    run(tmp_path, SPLIT)
    ckptconv.run(
        tmp_path / "mine.yaml", tmp_path / "out.pth", tmp_path / "back.pth", reverse=True, like=str(tmp_path / "in.pth"), optimizer="follow"
    )
    back = torch.load(tmp_path / "back.pth", weights_only=True)["optimizer"]
    assert back["param_groups"] == state["param_groups"]
    assert all(torch.equal(back["state"][at][key], value) for at, entries in state["state"].items() for key, value in entries.items())


def test_a_saved_plan_takes_the_state_along(tmp_path):
    model = Fused()
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    run(tmp_path, SPLIT)
    ckptconv.plan(tmp_path / "mine.yaml", tmp_path / "in.pth", out=tmp_path / "plan.json", optimizer="follow")
    ckptconv.run(None, tmp_path / "in.pth", tmp_path / "planned.pth", plan_file=tmp_path / "plan.json", optimizer="follow", verify=4)
    assert (tmp_path / "planned.pth").read_bytes() == (tmp_path / "out.pth").read_bytes()


def test_a_run_that_may_be_interrupted_takes_it_along(tmp_path):
    model = Fused()
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    run(tmp_path, SPLIT)
    words = {"optimizer": "follow", "verify": 4}
    ckptconv.run(tmp_path / "mine.yaml", tmp_path / "in.pth", tmp_path / "resumed.pth", resume=True, task_size="200B", **words)
    assert (tmp_path / "resumed.pth").read_bytes() == (tmp_path / "out.pth").read_bytes()


def test_the_work_of_many_takes_it_along(tmp_path):
    """Workers build no target: the plan file tells them the order of its parameters."""
    model, other = Fused(), nn.Module()
    for name in ("v", "head", "k", "q"):
        setattr(other, name, nn.Linear(4, 2 if name == "head" else 4))
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    words = {"optimizer": "follow", "target": target(tmp_path, other), "source_model": target(tmp_path, model)}
    (tmp_path / "target.json").rename(tmp_path / "source.json")
    words = {"optimizer": "follow", "target": target(tmp_path, other), "source_model": str(tmp_path / "source.json"), "verify": 4}
    written, _ = run(tmp_path, SPLIT, **words)
    assert torch.equal(written["optimizer"]["state"][2]["step"], torch.tensor(2.0))
    assert written["optimizer"]["state"][2]["exp_avg"].shape == (2, 4), "the target's order, not the output's"
    ckptconv.plan(tmp_path / "mine.yaml", tmp_path / "in.pth", tmp_path / "many.pth", out=tmp_path / "plan.json", task_size="200B", **words)
    assert api.work(tmp_path / "plan.json").total > 3
    assert api.finish(tmp_path / "plan.json").ladder.reached == "L0 L1 L3 L4"
    assert (tmp_path / "many.pth").read_bytes() == (tmp_path / "out.pth").read_bytes()


def test_a_plan_file_with_a_strange_optimizer_is_refused(tmp_path):
    model = Fused()
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    ckptconv.plan(rules(tmp_path, SPLIT), tmp_path / "in.pth", tmp_path / "many.pth", out=tmp_path / "plan.json", optimizer="follow")
    whole = json.loads((tmp_path / "plan.json").read_text())
    for strange in (None, 3, {}, {"model": None, "order": {"ckptconv_manifest": 1}}, {"model": [], "order": None}):
        (tmp_path / "plan.json").write_text(json.dumps({**whole, "optimizer": strange}))
        with pytest.raises(UsageError, match="not a plan of"):
            api.work(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text(json.dumps({**whole, "work": {**whole["work"], "optimizer_file": "/etc/hostname"}}))
    with pytest.raises(UsageError, match="outside of the folders"):
        api.work(tmp_path / "plan.json")


def test_a_large_folder_is_cut_into_shards_beside_it(tmp_path):
    model = Fused()
    torch.save(model.state_dict(), tmp_path / "in.pth")
    optimizer = step(model, torch.optim.Adam(model.parameters()))
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    words = {"optimizer": "follow", "optimizer_file": str(tmp_path / "o.pt"), "shard_size": "200B", "verify": 4}
    report = ckptconv.run(rules(tmp_path, SPLIT), tmp_path / "in.pth", tmp_path / "out", **words)
    assert report.ladder.reached == "L0 L1 L3 L4"
    assert len(list((tmp_path / "out").glob("*.bin"))) > 1
    found = torch.load(tmp_path / "out" / "optimizer.pt", weights_only=True)
    assert torch.equal(found["state"][1]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"][4:8])


def test_planning_says_it_and_counts_it(tmp_path):
    model = Fused()
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    whole = ckptconv.plan(rules(tmp_path, SPLIT), tmp_path / "in.pth", tmp_path / "out.pth", optimizer="follow")
    bare = ckptconv.plan(tmp_path / "mine.yaml", tmp_path / "in.pth", tmp_path / "out.pth", optimizer="drop")
    assert not (tmp_path / "out.pth").exists()
    assert whole.destination["nbytes"] > bare.destination["nbytes"] + 2 * model.qkv.weight.nbytes
    assert whole.to_json()["optimizer"]["moments"] == 16


@pytest.fixture
def verified(tmp_path):
    model = Fused()
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    written, _ = run(tmp_path, SPLIT)

    def again(change):
        change(written)
        torch.save(written, tmp_path / "changed.pth")
        return ckptconv.verify(
            tmp_path / "changed.pth", against=tmp_path / "in.pth", rules=tmp_path / "mine.yaml", optimizer="follow"
        ).ladder

    return again


def test_verify_knows_by_itself_that_the_state_was_to_follow(tmp_path, verified):
    ladder = ckptconv.verify(tmp_path / "out.pth", against=tmp_path / "in.pth", rules=tmp_path / "mine.yaml").ladder
    assert (ladder.reached, ladder.rungs[0].sentence[:26]) == ("L0 L1 L3", "32 tensors read back, dige")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        pytest.param(lambda each: each["optimizer"]["state"][0]["exp_avg"].add_(1), "the bytes differ from the source's|the written values|not those of the plan",
                     id="a value"),
        pytest.param(lambda each: each["optimizer"]["state"][3]["exp_avg"].copy_(each["optimizer"]["state"][4]["exp_avg"]),
                     "not those of the plan", id="two exchanged"),
        pytest.param(lambda each: each["optimizer"]["param_groups"][0].update(lr=1.0), "param_groups.0.lr of the written optimizer is not what", id="a rate"),
        pytest.param(lambda each: each["optimizer"]["param_groups"][0]["params"].reverse(), "is not what was planned", id="the order"),
        pytest.param(lambda each: each["optimizer"]["state"].pop(2), "state of the written optimizer has other entries", id="one missing"),
        pytest.param(lambda each: each["optimizer"]["state"][2].update(exp_avg=torch.ones(5)), "is not the tensor that was planned", id="a shape"),
        pytest.param(lambda each: each.pop("optimizer"), "no optimizer's state at optimizer", id="nothing"),
    ],
)  # fmt: skip
def test_a_changed_state_is_found(verified, change, what):
    import re

    ladder = verified(change)
    assert ladder.failed is not None
    assert any(re.search(what, problem.what) for problem in ladder.problems), ladder.problems


def test_a_moment_in_chunks_follows_a_parameter_in_chunks():
    """As torch.distributed.checkpoint keeps them: neither has to be cut alike."""
    from ckptconv.execute.memory_run import computed
    from ckptconv.formats.base import Composite, Placed, Storage
    from ckptconv.optimizer.aligning import parameter_of
    from ckptconv.optimizer.following import follow
    from ckptconv.optimizer.reading import parse
    from ckptconv.planner import make_plan
    from ckptconv.ruleset.model import parse as parse_rules
    from ckptconv.spec import Box, DType, Manifest, TensorSpec

    def chunks(name, value, sizes):
        parts, boxes, at = {}, [], 0
        for size in sizes:
            spec = TensorSpec((size, 4), DType.float32)
            parts[str(at)] = Placed(spec, Storage(0, 0, spec.nbytes), 0, (4, 1))
            tensors[f"{name}::{at}"] = value[at : at + size]
            boxes.append(Box((at, 0), (size, 4)))
            at += size
        return Composite("chunks", TensorSpec((12, 4), DType.float32), parts, tuple(boxes))

    tensors = {}
    weight, moment = torch.randn(2, 12, 4)
    composites = {"qkv.weight": chunks("qkv.weight", weight, [6, 6])}
    source = Manifest({name: TensorSpec(tuple(value.shape), DType.float32) for name, value in tensors.items()})
    rule = parse_rules(f"version: 1\nname: mine\nsummary: s\nsteps:{SPLIT}\n".encode(), "mine.yaml", stem="mine")
    plan = make_plan(rule, source, composites=composites)
    entries = {"exp_avg": chunks("::optimizer.state.qkv.weight.exp_avg", moment, [5, 5, 2])}
    state = parse({"state": {"qkv.weight": entries}, "param_groups": [{"params": ["qkv.weight"]}]}, ("optimizer",))
    owners = parameter_of(state, Manifest({"qkv.weight": composites["qkv.weight"].spec}))
    moments, stopped = follow(plan, state, owners, composites)
    assert not stopped
    assert set(moments.placed) == {f"::optimizer.state.qkv.weight.exp_avg::{at}" for at in (0, 5, 10)}
    values = {output.name: value for output, value in computed(moments.outputs, lambda node: tensors[node.name])}
    for at, name in enumerate("qkv"):
        assert torch.equal(values[f"::optimizer.state.{name}.weight.exp_avg"], moment.chunk(3)[at])
