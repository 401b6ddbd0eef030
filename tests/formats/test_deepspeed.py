"""DeepSpeed ZeRO folders, written by torch alone from the layout's description. Real ones of DeepSpeed 0.19 gave the same tensors."""

from enum import IntEnum
from math import prod

import pytest
import torch

import ckptconv
from ckptconv import formats
from ckptconv.errors import Refusal


class Stage(IntEnum):
    """In DeepSpeed's files the stage is a member of an enum."""

    weights = 3
    gradients = 2
    optimizer_states = 1


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {"embed": normal(7, 3), "w": normal(3, 2, 2, seed=2)}
BIASES = {"b": normal(5, seed=1), "norm": normal(1, seed=3)}
FROZEN = {"base.w": normal(5, 3, seed=4).bfloat16(), "base.none": torch.empty(0, 2)}
BUFFERS = {"steps": torch.arange(3), "mean": normal(2, seed=5)}
EVERYTHING = {**WEIGHTS, **BIASES, **FROZEN, **BUFFERS, "head": WEIGHTS["embed"]}


def cut(flat, world):
    """Equal parts, the last one padded."""
    width = -(-flat.numel() // world)
    return (
        list(torch.cat([flat, torch.full((width * world - flat.numel(),), torch.nan, dtype=flat.dtype)]).split(width))
        if width
        else [flat] * world
    )


def flat_rows(stage, world, groups, paddings, sub_group):
    """Each rank's rows."""
    if stage < 3:
        rows = [[] for _ in range(world)]
        for group, padding in zip(groups, paddings or [[0] * len(group) for group in groups], strict=True):
            flat = torch.cat([torch.cat([value.flatten(), torch.full((behind,), torch.nan)])
                              for value, behind in zip(group.values(), padding, strict=True)])  # fmt: skip
            flat = torch.cat([flat, torch.full((-flat.numel() % (2 * world),), torch.nan)])
            for row, part in zip(rows, flat.split(flat.numel() // world), strict=True):
                row.append(part.clone())
        return rows
    parts = [[cut(value.flatten(), world)[rank] for group in groups for value in group.values()] for rank in range(world)]
    return [list(torch.cat(part).split(sub_group)) for part in parts]


def zero(folder, stage, world, *, groups=(WEIGHTS, BIASES), prefix="", paddings=None, sub_group=7, optimizer=None, model=None, listed=True):
    """A ZeRO folder; ``optimizer`` and ``model`` replace entries of the files (None takes one away)."""
    step = folder / "global_step1"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    rows = flat_rows(stage, world, groups, paddings, sub_group)
    for rank, row in enumerate(rows):
        state = {"zero_stage": Stage(stage), "partition_count": world if stage == 3 else [world] * len(groups)}
        state["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] = [part.clone() for part in row]
        if paddings:
            state["param_alignment_paddings"] = paddings
        state = {key: value for key, value in {**state, **(optimizer or {})}.items() if value is not None}
        torch.save(
            {"optimizer_state_dict": state, "ds_version": "0.19.8"}, step / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
        half = {name: (value.bfloat16() if stage < 3 else torch.empty(0)) for group in groups for name, value in group.items()}
        parts = {name: cut(value.flatten(), world)[rank].clone() if stage == 3 else value for name, value in FROZEN.items()}
        whole = {
            "module": {**BUFFERS, **half, **({name: torch.empty(0) for name in FROZEN} if stage == 3 else FROZEN)},
            "param_shapes": [{name: value.shape for name, value in group.items()} for group in groups], "buffer_names": list(BUFFERS),
            "frozen_param_shapes": {name: value.shape for name, value in FROZEN.items()} if listed else None,
            "frozen_param_fragments": parts if listed else None, "shared_params": {"head": "embed"},
        }  # fmt: skip
        if stage == 3 or not rank:
            name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
            torch.save({**whole, **(model or {})}, step / name)
    return folder


def through(folder, tmp_path):
    ckptconv.run("plain-tensors", folder, tmp_path / "out.pth", force=True, verify=4)
    return torch.load(tmp_path / "out.pth", weights_only=True)


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_partitions_are_put_together(tmp_path, stage, world):
    found = through(zero(tmp_path / "in", stage, world), tmp_path)
    assert_equal(found, EVERYTHING)
    assert found["head"].data_ptr() == found["embed"].data_ptr(), "shared parameters stay one tensor"


@pytest.mark.parametrize("prefix", ["bf16_", "fp16_"])
@pytest.mark.parametrize("stage", [1, 3])
def test_the_names_of_half_precision_runs(tmp_path, stage, prefix):
    assert_equal(through(zero(tmp_path / "in", stage, 12, prefix=prefix), tmp_path), EVERYTHING)


def test_parameters_with_padding_behind_each(tmp_path):
    assert_equal(through(zero(tmp_path / "in", 2, 2, paddings=[[3, 0], [1, 2]]), tmp_path), EVERYTHING)


@pytest.mark.parametrize("sub_group", [1, 2, 1000])
def test_sub_groups_that_cut_through_parameters(tmp_path, sub_group):
    assert_equal(through(zero(tmp_path / "in", 3, 2, sub_group=sub_group), tmp_path), EVERYTHING)


def test_frozen_parameters_that_are_not_listed_come_from_the_module(tmp_path):
    """Stage 1 does not list them; DeepSpeed's own script leaves them out."""
    assert_equal(through(zero(tmp_path / "in", 1, 2, listed=False), tmp_path), EVERYTHING)


def test_shared_parameters_as_older_files_have_them(tmp_path):
    folder = zero(tmp_path / "in", 2, 2, model={"shared_params": [["head", "embed"], ["gone", "nowhere"]]})
    assert_equal(through(folder, tmp_path), EVERYTHING)


def test_the_step_s_own_folder_and_the_one_that_latest_names(tmp_path):
    zero(tmp_path / "in", 2, 2)
    assert_equal(through(tmp_path / "in" / "global_step1", tmp_path), EVERYTHING)
    (tmp_path / "in" / "latest").write_text("../in/global_step1")
    with pytest.raises(Refusal, match="no model file"):
        formats.read(tmp_path / "in")


def test_a_rename_keeps_what_is_shared_and_copies_the_rest(tmp_path):
    folder = zero(tmp_path / "in", 2, 2)
    plan = ckptconv.plan("plain-tensors", folder).plan
    assert plan.manifest.ties == (("embed", "head"),)
    assert plan.manifest.nbytes == sum(4 * prod(value.shape) for value in {**WEIGHTS, **BIASES}.values()) + 30 + 24 + 8


RANK = "{}zero_pp_rank_{}_mp_rank_00_{}.pt"


def other(**changes):
    """Makes one rank's optimizer file say something else than the others."""

    def spoil(step):
        path = step / RANK.format("", 1, "optim_states")
        whole = torch.load(path, weights_only=False)
        whole["optimizer_state_dict"] |= changes
        torch.save(whole, path)

    return spoil


REFUSED = [
    ("a rank of another run", 2, {}, other(partition_count=[2, 2]), "do not belong together"),
    ("a rank of another stage", 2, {}, other(zero_stage=1), "do not belong together"),
    ("a rank is missing", 2, {}, lambda step: (step / RANK.format("", 1, "optim_states")).unlink(), "are missing, or there twice"),
    ("the last rank is missing", 2, {}, lambda step: (step / RANK.format("", 2, "optim_states")).unlink(), "files of ranks are missing"),
    ("the last rank of stage 3", 3, {}, lambda step: (step / RANK.format("", 2, "optim_states")).unlink(), "files of ranks are missing"),
    ("two precisions at once", 2, {}, lambda step: (step / RANK.format("bf16_", 1, "optim_states")).write_bytes((step / RANK.format("", 1, "optim_states")).read_bytes()), "or there twice"),
    ("no model file", 2, {}, lambda step: (step / "mp_rank_00_model_states.pt").unlink(), "files of the ZeRO checkpoint are missing"),
    ("a model file that is a link", 2, {}, lambda step: (step / "mp_rank_00_model_states.pt").rename(step.parent / "m.pt") and (step / "mp_rank_00_model_states.pt").symlink_to("../m.pt"), "files of the ZeRO checkpoint are missing"),
    ("a rank's frozen parts are missing", 3, {}, lambda step: (step / RANK.format("", 2, "model_states")).unlink(), "files of the ZeRO checkpoint are missing"),
    ("tensor-parallel ranks", 2, {}, lambda step: torch.save({}, step / "mp_rank_01_model_states.pt"), "tensor-parallel ranks too"),
    ("experts in files of their own", 2, {}, lambda step: torch.save({}, step / "layer_0_expert_0_mp_rank_00_model_states.pt"), "in files of their own"),
    ("stages of layers", 2, {}, lambda step: torch.save({}, step / "layer_00-model_00-model_states.pt"), "in files of their own"),
    ("experts cut over fewer ranks", 2, {"optimizer": {"partition_count": [3, 1]}}, None, "over some of the ranks only"),
    ("no count", 2, {"optimizer": {"partition_count": None}}, None, "does not say how many ranks"),
    ("a count that is none", 2, {"optimizer": {"partition_count": ["3"]}}, None, "does not say how many ranks"),
    ("no stage", 2, {"optimizer": {"zero_stage": None}}, None, "no flat fp32 weights of ZeRO stage"),
    ("no rows", 2, {"optimizer": {"single_partition_of_fp32_groups": []}}, None, "no flat fp32 weights of ZeRO stage"),
    ("rows of another number", 2, {"optimizer": {"single_partition_of_fp32_groups": [torch.zeros(12)]}}, None, "other groups of parameters"),
    ("rows that are too short", 2, {"optimizer": {"single_partition_of_fp32_groups": [torch.zeros(2), torch.zeros(2)]}}, None, "end before embed"),
    ("rows that are too long", 2, {"optimizer": {"single_partition_of_fp32_groups": [torch.zeros(99), torch.zeros(2)]}}, None, "do not use the flat partitions up"),
    ("rows that are too long in stage 3", 3, {"optimizer": {"fp32_flat_groups": [torch.zeros(99)]}}, None, "do not use the flat partitions up"),
    ("rows of two dtypes", 2, {"optimizer": {"single_partition_of_fp32_groups": [torch.zeros(12), torch.zeros(2).half()]}}, None, "of different dtypes"),
    ("paddings that do not fit", 2, {"optimizer": {"param_alignment_paddings": [[0]]}}, None, "param_alignment_paddings does not fit"),
    ("paddings that go back", 2, {"optimizer": {"param_alignment_paddings": [[-1, 0], [0, 0]]}}, None, "param_alignment_paddings does not fit"),
    ("shapes that are none", 2, {"model": {"param_shapes": [{"embed": [7, 3]}]}}, None, "no table of shapes"),
    ("no shapes", 2, {"model": {"param_shapes": None}}, None, "no table of shapes"),
    ("shared names that are none", 2, {"model": {"shared_params": [["head", {}]]}}, None, "no table of names"),
    ("a frozen parameter of another shape", 2, {"model": {"frozen_param_shapes": {"base.w": torch.Size((3, 5))}}}, None, "has another shape"),
    ("a frozen parameter that is not there", 2, {"model": {"frozen_param_shapes": {"gone": torch.Size((3,))}}}, None, "gone is missing, or has another shape"),
    ("a frozen parameter without its part", 3, {"model": {"frozen_param_fragments": {}}}, None, "no part in some rank"),
    ("a frozen part that is too short", 3, {"model": {"frozen_param_fragments": {name: torch.zeros(1) for name in FROZEN}}}, None, "end before base.w"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "changes", "spoil", "what"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(tmp_path, stage, changes, spoil, what):
    zero(tmp_path / "in", stage, 3, **changes)
    if spoil:
        spoil(tmp_path / "in" / "global_step1")
    with pytest.raises(Refusal, match=what) as caught:
        formats.read(tmp_path / "in")
    assert caught.value.code == "CK308"
