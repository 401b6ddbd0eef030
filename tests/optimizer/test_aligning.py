"""Which number is which parameter: told by names, or by an order that shapes leave only one way; else refused with a way out."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import Net, problems, run, save, step, target
from torch import nn

import ckptconv
from ckptconv.errors import InputError, Refusal
from ckptconv.optimizer.aligning import Ambiguous, Unplaced, parameter_of, parameters_of, place
from ckptconv.optimizer.reading import parse
from ckptconv.spec import DType, Manifest, TensorSpec

RENAME = '  - rename: {"{m}.{p}": "net.{m}.{p}"}'


def all_ways(groups, entries):
    """Every way, by trying all."""
    found = []
    for owners in itertools.product([None, *range(len(groups))], repeat=len(entries)):
        places, counts = [], [0] * len(groups)
        for owner in owners:
            places.append(None if owner is None else (owner, counts[owner]))
            if owner is not None:
                counts[owner] += 1
        if counts == list(map(len, groups)) and all(
            at is None or groups[at[0]][at[1]] in (shape, None) for at, shape in zip(places, entries, strict=True)
        ):
            found.append(places)
    return found


SHAPES = st.sampled_from([(2,), (3,), (2, 3)])


@given(entries=st.lists(SHAPES, min_size=1, max_size=6), owners=st.lists(st.sampled_from([None, 0, 1]), min_size=6, max_size=6),
       blank=st.lists(st.booleans(), min_size=6, max_size=6))  # fmt: skip
def test_a_placement_is_the_only_one_or_refused(entries, owners, blank):
    groups = [[None if hidden and shape == (2,) else shape for shape, owner, hidden in zip(entries, owners, blank, strict=False) if owner == group]
              for group in (0, 1)]  # fmt: skip
    ways = all_ways(groups, entries)
    if len(ways) == 1:
        assert [place(groups, entries)] == ways
        return
    with pytest.raises(Ambiguous if ways else Unplaced) as found:
        place(groups, entries)
    if ways:
        assert len({str(way[found.value.entry]) for way in ways}) > 1


def test_there_may_be_no_way():
    with pytest.raises(Unplaced):
        place([[(3,), (2,)]], [(2,), (3,)])


def test_a_large_model_is_placed_at_once():
    entries = [(4096, 4096), (4096,)] * 20_000
    assert place([[(4096, 4096)] * 20_000, [(4096,)] * 20_000], entries)[-1] == (1, 19_999)


def test_an_order_that_nobody_could_tell_is_given_up():
    with pytest.raises(Ambiguous):
        place([[(4,)] * 12] * 12, [(4,)] * 144)


def test_statistics_are_no_parameters(tmp_path):
    model = Net()
    state = save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    written, _ = run(tmp_path, RENAME)
    assert list(model.state_dict())[8:11] == ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert torch.equal(written["optimizer"]["state"][9]["exp_avg"], state["state"][9]["exp_avg"])


class Buffered(nn.Module):
    """A buffer that looks like a parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.first.register_buffer("mask", torch.ones(3, 3))
        self.second = nn.Linear(3, 3, bias=False)


def test_a_buffer_that_looks_like_a_parameter_needs_the_model(tmp_path):
    model = Buffered()
    state = save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    error = problems(tmp_path, RENAME)
    assert isinstance(error, InputError)
    (problem,) = error.problems
    assert (problem.code, problem.what, problem.found) == (
        "CK314",
        "second.weight may be one of several of the optimizer's 2 numbered parameters, or none: their order and shapes leave it open",
        "2 parameters in 1 groups, 3 in the state_dict",
    )
    assert problem.try_ == (
        "--source-model MODEL tells which are parameters; or save it with names: torch.optim.AdamW(model.named_parameters(), …), from torch 2.6 on; "
        "or --optimizer drop writes everything else, and the optimizer starts anew"
    )
    written, _ = run(tmp_path, RENAME, source_model=target(tmp_path, model))
    assert written["optimizer"]["param_groups"][0]["params"] == [0, 1]
    assert torch.equal(written["optimizer"]["state"][1]["exp_avg"], state["state"][1]["exp_avg"])


def test_the_source_model_as_python_code(tmp_path, cli):
    """The child process that builds it knows which are buffers."""
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Buffered(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.first = nn.Linear(3, 3, bias=False)\n        self.first.register_buffer('mask', torch.ones(3, 3))\n"
        "        self.second = nn.Linear(3, 3, bias=False)\n\n\ndef net():\n    return nn.ModuleDict({'net': Buffered()})\n"
    )
    (tmp_path / "mine.yaml").write_text(f"version: 1\nname: mine\nsummary: s\nsteps:\n{RENAME}\n")
    model = Buffered()
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    words = ["run", "mine.yaml", "in.pth", "out.pth", "--optimizer", "follow"]
    refused = cli(*words, cwd=tmp_path)
    assert (refused.code, "[CK314]" in refused.err, "try: --source-model MODEL" in refused.err) == (3, True, True)
    assert not (tmp_path / "out.pth").exists()
    done = cli(*words, "--source-model", "py:nets:Buffered", "--target", "py:nets:net", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.json["verification"]["reached"] == "L0 L1 L2 L3"
    assert done.json["optimizer"] == {
        "optimizer": "follow", "at": ["optimizer"], "parameters": 2, "moments": 4, "counters": 2, "dropped": 0, "groups": 1,
    }  # fmt: skip


def test_another_source_model_is_refused(tmp_path):
    model = Buffered()
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    (problem,) = problems(tmp_path, RENAME, source_model=target(tmp_path, Net())).problems
    assert (problem.what, problem.found) == ("the source model has the parameter q.weight, and the state_dict has not", "10 of 10")


def test_another_order_is_refused(tmp_path):
    model = Net()
    optimizer = torch.optim.Adam(
        [*model.head.parameters(), *model.q.parameters(), *model.k.parameters(), *model.v.parameters(), *model.norm.parameters()]
    )
    save(tmp_path / "in.pth", model, step(model, optimizer))
    (problem,) = problems(tmp_path, RENAME).problems
    assert (problem.code, problem.what) == ("CK314", "the moments' shapes do not go with the state_dict's parameters in their order")


def test_two_groups_that_cannot_be_told_apart_are_refused(tmp_path):
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(2)))
    groups = [{"params": model[1].parameters()}, {"params": model[0].parameters()}]
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(groups)))
    assert problems(tmp_path, "  - add_prefix: net.").problems[0].code == "CK314"


def test_names_tell_it_whatever_the_order_is(tmp_path):
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(2)))
    groups = [{"params": [("1.weight", model[1].weight)]}, {"params": [("0.weight", model[0].weight)], "lr": 0.5}]
    state = save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(groups)))
    written, _ = run(tmp_path, "  - add_prefix: net.")
    found = written["optimizer"]
    assert [(group["param_names"], group["params"]) for group in found["param_groups"]] == [
        (["net.1.weight"], [0]),
        (["net.0.weight"], [1]),
    ]
    assert torch.equal(found["state"][1]["exp_avg"], state["state"][1]["exp_avg"])


@pytest.mark.parametrize(("saved", "named"), [("module.", ""), ("", "module."), ("net.", "net.")])
def test_a_wrapper_may_be_in_one_of_both(tmp_path, saved, named):
    model = Net()
    state = step(model, torch.optim.Adam((named + name, each) for name, each in model.named_parameters())).state_dict()
    save(tmp_path / "in.pth", {saved + name: value for name, value in model.state_dict().items()}, state)
    written, _ = run(tmp_path, "  - add_prefix: to.")
    assert written["optimizer"]["param_groups"][0]["param_names"][0] == f"to.{saved}q.weight"


def test_names_that_are_not_there_are_refused(tmp_path):
    model = Net()
    state = step(model, torch.optim.Adam((f"{name}.x", each) for name, each in model.named_parameters())).state_dict()
    save(tmp_path / "in.pth", model, state)
    (problem,) = problems(tmp_path, RENAME).problems
    assert (problem.what, problem.found) == (
        "the optimizer has a parameter q.weight.x, and the state_dict has not", "10 of 10, as in 'q.weight'",
    )  # fmt: skip


def test_a_safetensors_target_fixes_no_order(tmp_path):
    from safetensors.torch import save_file

    model = Net()
    save(tmp_path / "in.pth", model, step(model, torch.optim.Adam(model.parameters())))
    save_file(model.state_dict(), tmp_path / "like.safetensors")
    (problem,) = problems(tmp_path, "  - rename: {q.weight: q.weight}", target=str(tmp_path / "like.safetensors")).problems
    assert (
        problem.what == "the target keeps its tensors in an order of its own, not the model's, and the optimizer's parameters have numbers"
    )
    specs = {name: TensorSpec(tuple(value.shape), DType(str(value.dtype)[6:])) for name, value in sorted(model.state_dict().items())}
    (tmp_path / "like.json").write_text(json.dumps(Manifest(specs).to_json()))
    _, report = run(tmp_path, "  - rename: {q.weight: q.weight}", target=str(tmp_path / "like.json"))
    assert any(note.startswith("the target's names are in alphabetical order") for note in report.notes)


def test_the_order_of_a_model_is_that_of_its_parameters():
    spec = TensorSpec((2,), DType.float32)
    source = Manifest({"module.b": spec, "module.a": spec, "module.m": spec})
    model = Manifest({"a": spec, "m": spec, "b": spec}, buffers=frozenset({"m"}))
    assert parameters_of(source, model) == {"module.a": (2,), "module.b": (2,)}
    state = parse({"state": {}, "param_groups": [{"params": [0, 1]}]}, ())
    assert parameter_of(state, source, model) == {0: "module.a", 1: "module.b"}


@pytest.mark.parametrize(
    ("node", "what"),
    [
        ({"state": [], "param_groups": []}, "`state` is a dict, `param_groups` a list of dicts: these are not"),
        ({"state": {}, "param_groups": {"a": {}}}, "`state` is a dict, `param_groups` a list of dicts: these are not"),
        ({"state": {}, "param_groups": [{"lr": 1}]}, "a parameter group lists its `params` by number or by name: one does not"),
        ({"state": {}, "param_groups": [{"params": [True]}]}, "a parameter group lists its `params` by number or by name: one does not"),
        ({"state": {}, "param_groups": [{"params": [0], "param_names": []}]}, "a parameter group has other `param_names` than `params`"),
        (
            {"state": {}, "param_groups": [{"params": [0, 0]}]},
            "the parameter groups list a parameter twice, or some by number and some by name",
        ),
        (
            {"state": {}, "param_groups": [{"params": [0, "a"]}]},
            "the parameter groups list a parameter twice, or some by number and some by name",
        ),
        ({"state": {7: {}}, "param_groups": [{"params": [0]}]}, "there is a state for 7, which no parameter group lists"),
        ({"state": {0: 3}, "param_groups": [{"params": [0]}]}, "the state of parameter 0 is no dict of named entries"),
        ({"state": {0: {"a.b": 3}}, "param_groups": [{"params": [0]}]}, "the state of parameter 0 is no dict of named entries"),
        ({"state.x": 1, "param_groups.a.lr": 1}, "'state.x' names no parameter and entry"),
    ],
)
def test_what_is_no_state_is_refused(node, what):
    with pytest.raises(Refusal) as refused:
        parse(node, ("optimizer",))
    assert (refused.value.code, refused.value.what) == ("CK314", what)


def test_two_entries_of_one_name_are_refused(tmp_path):
    """A stranger's state_dict may be called like a place that a moment is read from."""
    model = nn.ParameterDict({"w": nn.Parameter(torch.ones(2))})
    state = step(model, torch.optim.Adam(model.parameters())).state_dict()
    save(tmp_path / "in.pth", {"w": torch.ones(2), "::optimizer.state.w.exp_avg": torch.ones(2, dtype=torch.int64)}, state)
    assert problems(tmp_path, "  - rename: {w: v}").problems[0].what == "two entries are called '::optimizer.state.w.exp_avg'"
    model = nn.ParameterDict({"v": nn.Parameter(torch.ones(2))})
    state = step(model, torch.optim.Adam(model.parameters())).state_dict()
    save(tmp_path / "in.pth", model, state, **{"optimizer.state.w": [{"step": torch.ones(2)}]})
    assert run(tmp_path, "  - rename: {v: w}")[1].ladder.reached == "L0 L1 L3 L4"  # those are other places
    (tmp_path / "out.pth").unlink()
    save(tmp_path / "in.pth", model, state, **{"optimizer.state.w": {"exp_avg": torch.ones(2)}})
    assert (
        problems(tmp_path, "  - rename: {v: w}", select=["model"]).problems[0].what == "two entries are called ::optimizer.state.w.exp_avg"
    )
    twice = {"a.b": [{"c": torch.ones(2)}], "a": {"b": [{"c": torch.ones(1)}]}}
    save(tmp_path / "in.pth", model, state, **twice)
    assert problems(tmp_path, "  - rename: {v: w}").problems[0].what == "two entries are called ::a.b.0.c"


def test_a_state_beside_weights_at_the_files_top_is_none_of_them(tmp_path):
    model = Net()
    optimizer = step(model, torch.optim.Adam(model.parameters()))
    torch.save({**model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "in.pth")
    report = ckptconv.inspect(tmp_path / "in.pth")
    (found,) = report.candidates
    assert (list(found.manifest), found.skipped) == (list(model.state_dict()), {"optimizer": "dict"})
