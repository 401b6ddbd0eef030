"""What two ranks save, as we read it; what we write, as two ranks load it; and the layouts of trainers that are not here, built by hand."""

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import ckptconv
from ckptconv import formats
from ckptconv.errors import InputError, Refusal


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    program = Path(__file__).with_name("two_ranks.py")
    done = subprocess.run([sys.executable, program, folder], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


@pytest.fixture
def full(ranks):
    return torch.load(ranks[0] / "full.pt", weights_only=True)


def converted(source, tmp_path, **options):
    ckptconv.run("plain-tensors", source, tmp_path / "out.pth", force=True, **options)
    return torch.load(tmp_path / "out.pth", weights_only=True)


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_two_ranks_load_what_we_wrote(ranks):
    """FSDP2 models with torch's own readers: from a folder of ours in torch's format, and from safetensors shards."""
    assert ranks[1].splitlines() == ["loaded FileSystemReader 9 of 9", "loaded HuggingFaceStorageReader 9 of 9"]


@pytest.mark.parametrize("name", ["fsdp2", "async", "titan", "shares"])
def test_what_two_ranks_saved_is_whole(ranks, full, tmp_path, name):
    assert_equal(converted(ranks[0] / name, tmp_path), full[0])


def test_columns_of_two_ranks_and_a_copy_of_each(ranks, tmp_path):
    assert_equal(converted(ranks[0] / "columns", tmp_path), {"w": torch.arange(30.0).view(5, 6), "same": torch.arange(3.0)})


def test_the_moments_of_two_ranks_are_a_state_of_their_own(ranks, full):
    tree = formats.read(ranks[0] / "fsdp2").tree
    assert (tree["step"], tree["optim"]["param_groups"][0]["lr"]) == (5, 0.125)
    assert tree["optim"]["state"].keys() == full[1]["state"].keys()
    assert str(tree["optim"]["state"]["first.weight"]["exp_avg"].spec) == "[7, 5] float32"


def test_weights_beside_an_optimizer_are_the_state_dict(ranks, full):
    contents = formats.read(ranks[0] / "titan")
    assert next(iter(contents.containers)) == "."
    assert set(contents.containers["."].manifest.tensors) == full[0].keys()


def test_a_row_that_one_rank_has_alone_is_no_empty_part(ranks):
    container = formats.read(ranks[0] / "fsdp2").containers["model"]
    assert str(container.tensors["last.weight"].spec) == "[1, 7] float32"
    assert set(container.composites) == {"first.weight", "first.bias", "norm.weight", "norm.bias"}


def test_a_file_of_one_rank_is_refused_with_the_way_out(ranks):
    for name, found in (
        ("dtensor0.pt", "first.weight (DTensor shard)"),
        ("SHARDED_STATE_DICT1.pt", "at byte"),
        ("LOCAL_STATE_DICT0.pt", "at byte"),
    ):
        with pytest.raises(InputError) as caught:
            ckptconv.plan("plain-tensors", ranks[0] / name)
        (problem,) = caught.value.problems
        assert problem.code == "CK305"
        assert found in problem.found
        assert "torch.distributed.checkpoint.save" in problem.try_


def test_flat_parameters_are_refused_and_fsdp1_chunks_are_not(ranks, tmp_path):
    with pytest.raises(InputError, match="FSDP1's flat parameters"):
        ckptconv.plan("plain-tensors", ranks[0] / "LOCAL_STATE_DICT")
    assert_equal(converted(ranks[0] / "SHARDED_STATE_DICT", tmp_path), torch.load(ranks[0] / "fsdp1.pt", weights_only=True))
    torch.save({"model": {"_fsdp_wrapped_module.flat_param_0": torch.ones(4)}}, tmp_path / "flat.pth")
    with pytest.raises(InputError, match="FSDP1's flat parameters"):
        ckptconv.plan("plain-tensors", tmp_path / "flat.pth")
    torch.save({"flat_params.weight": torch.ones(4)}, tmp_path / "fine.pth")
    ckptconv.plan("plain-tensors", tmp_path / "fine.pth")


def test_a_share_is_not_taken_for_the_whole(ranks, tmp_path):
    for name in ("shard-00001-model-00001-of-00001.safetensors", "shard-00002-model-00001-of-00001.safetensors"):
        with pytest.raises(Refusal, match="one rank's parts of larger tensors"):
            formats.read(ranks[0] / "shares" / name)
    (tmp_path / "one").mkdir()
    second = tmp_path / "one" / "shard-00002-model-00001-of-00001.safetensors"
    second.write_bytes((ranks[0] / "shares" / second.name).read_bytes())
    with pytest.raises(Refusal, match="files of a rank are missing"):
        formats.read(tmp_path / "one")
    second.rename(tmp_path / "one" / "model.safetensors")
    with pytest.raises(Refusal, match="one rank's parts of larger tensors"):
        formats.read(tmp_path / "one")


def test_a_rename_of_shares_says_nothing_of_their_offsets(ranks, full, tmp_path):
    """torch believes the offsets of a safetensors file, and would look its tensors up under their old names."""
    ckptconv.run("plain-tensors", ranks[0] / "shares", tmp_path / "out")
    assert "DCP_SHARDING_INFO" not in formats.read(tmp_path / "out").metadata
    state = {name: torch.zeros_like(value) for name, value in full[0].items()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(tmp_path / "out"), no_dist=True)
    assert_equal(state, full[0])


def test_what_torch_writes_in_hugging_face_style_is_read(full, tmp_path):
    index = {name: 1 + at % 2 for at, name in enumerate(full[0])}
    dcp.save(full[0], storage_writer=HuggingFaceStorageWriter(tmp_path / "hf", fqn_to_index_mapping=index), no_dist=True)
    assert (tmp_path / "hf" / "model-00002-of-00002.safetensors").is_file()
    assert_equal(converted(tmp_path / "hf", tmp_path), full[0])


def test_the_names_of_a_file_that_torch_wrote_may_change(tmp_path):
    """torch looks up every name of a file in the offsets that the file's metadata holds: the old ones must not come along."""
    dcp.save({"w": torch.ones(2)}, storage_writer=HuggingFaceStorageWriter(tmp_path / "hf"), no_dist=True)
    (tmp_path / "r.yaml").write_text('{"version": 1, "name": "r", "summary": "t", "steps": [{"rename": {"w": "model.w"}}]}')
    ckptconv.run(tmp_path / "r.yaml", tmp_path / "hf", tmp_path / "out")
    state = {"model.w": torch.zeros(2)}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(tmp_path / "out"), no_dist=True)
    assert torch.equal(state["model.w"], torch.ones(2))


@pytest.mark.parametrize(
    "text", ["[", '{"w": 1}', '{"w": {"saved_offsets": [-1, 0]}}', '{"w": {"saved_offsets": [0.5]}}', '{"w": {"saved_offsets": [true]}}']
)
def test_offsets_that_are_none_are_refused(tmp_path, text):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2, 2)}, tmp_path / "in.safetensors", {"DCP_SHARDING_INFO": text})
    with pytest.raises(Refusal) as caught:
        formats.read(tmp_path / "in.safetensors")
    assert caught.value.code == "CK307"


def shares(folder, *parts):
    """A file for each rank: (name, tensor, offsets)."""
    from safetensors.torch import save_file

    folder.mkdir()
    for rank, (name, tensor, start) in enumerate(parts, 1):
        info = json.dumps({name: {"saved_offsets": start}})
        save_file({name: tensor}, folder / f"shard-{rank:05d}-model-00001-of-00001.safetensors", {"DCP_SHARDING_INFO": info})
    return folder


def test_a_share_that_leads_out_of_the_folder_is_refused(tmp_path):
    folder = shares(tmp_path / "in", ("w", torch.ones(2, 3), [0, 0]), ("w", torch.ones(1, 3), [2, 0]))
    assert str(ckptconv.plan("plain-tensors", folder).plan.manifest["w"]) == "[3, 3] float32"
    second = folder / "shard-00002-model-00001-of-00001.safetensors"
    second.rename(tmp_path / "elsewhere")
    second.symlink_to("../elsewhere")
    with pytest.raises(Refusal, match="a link leads out of the folder"):
        formats.read(folder)


@pytest.mark.parametrize(("second", "start", "what"), [
    (torch.ones(2, 3), [1, 0], "the chunks of w overlap"),
    (torch.ones(2, 3), [3, 0], "the chunks of w do not make it up"),
    (torch.ones(2, 3).half(), [2, 0], "the chunks of w are of different dtypes"),
    (torch.ones(2), [2], "the chunks of w have different ranks"),
    (torch.ones(2, 3), [2], "does not say where its part of w begins"),
])  # fmt: skip
def test_shares_that_do_not_fit_are_refused(tmp_path, second, start, what):
    folder = shares(tmp_path / "in", ("w", torch.ones(2, 3), [0, 0]), ("w", second, start))
    with pytest.raises((Refusal, InputError), match=what):
        ckptconv.plan("plain-tensors", folder)


def test_the_layout_of_megatron_core(tmp_path):
    """torch_dist: flat names, layers stacked along an axis of their own, extra states in bytes, nothing said of a tree."""
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    weights = {
        "decoder.layers.self_attention.linear_qkv.weight": torch.randn(3, 8, 4),
        "embedding.word_embeddings.weight": torch.randn(10, 4),
    }
    moments = {f"optimizer.state.exp_avg.{name}": torch.randn(value.shape) for name, value in weights.items()}
    extra = {
        f"decoder.layers.{part}._extra_state/shard_{at}_3": BytesIO(b"state") for at in range(3) for part in ("attention", "mlp", "norm")
    }
    dcp.save({**weights, **moments, **extra}, checkpoint_id=tmp_path / "iter_1", planner=planner, no_dist=True)
    torch.save({"args": 1}, tmp_path / "iter_1" / "common.pt")
    (tmp_path / "iter_1" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert_equal(converted(tmp_path / "iter_1", tmp_path), weights | moments)
    (tmp_path / "take.yaml").write_text(json.dumps({
        "version": 1, "name": "take", "summary": "t", "steps": [
            {"drop": "optimizer.**"},
            {"unstack": {"from": "decoder.layers.{m:**}.weight", "over": "i", "to": "model.layers.{i}.{m}.weight", "dim": 0}},
            {"rename": {"embedding.word_embeddings.weight": "model.embed_tokens.weight"}},
        ],
    }))  # fmt: skip
    ckptconv.run(tmp_path / "take.yaml", tmp_path / "iter_1", tmp_path / "hf", format="safetensors")
    back = {
        "version": 1, "name": "back", "summary": "t", "steps": [
            {"stack": {"from": "model.layers.{i:int}.{m:**}.weight", "over": "i", "to": "decoder.layers.{m}.weight", "dim": 0}},
            {"rename": {"model.embed_tokens.weight": "embedding.word_embeddings.weight"}},
        ],
    }  # fmt: skip
    (tmp_path / "back.yaml").write_text(json.dumps(back))
    ckptconv.run(tmp_path / "back.yaml", tmp_path / "hf", tmp_path / "again", format="dcp")
    dcp_to_torch_save(tmp_path / "again", tmp_path / "again.pth")
    assert_equal(torch.load(tmp_path / "again.pth", weights_only=True), weights)


def test_a_loss_at_the_top_is_no_state_dict(tmp_path):
    dcp.save({"model": {"a.w": torch.ones(2)}, "loss": torch.ones(())}, checkpoint_id=tmp_path / "c", no_dist=True)
    assert list(formats.read(tmp_path / "c").containers) == ["model"]
