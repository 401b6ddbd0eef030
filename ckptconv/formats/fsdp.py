"""What FSDP leaves in files of one rank, and which call of torch saves something that others can read."""

from __future__ import annotations

import re

from ckptconv.errors import Refusal, printable
from ckptconv.formats.base import Container

_FLAT = re.compile(r"(?:.*\.)?_?flat_param(?:_[0-9]+)?")
_PARTS = ("DTensor", "ShardedTensor")
SHARDED_TENSOR = "torch.distributed._shard.sharded_tensor.api.ShardedTensor"
WAY_OUT = (
    "on all ranks: torch.distributed.checkpoint.save({'model': get_model_state_dict(model)}, checkpoint_id=FOLDER); the folder is read. "
    "Or StateDictOptions(full_state_dict=True) for a whole state_dict on one rank"
)


def refuse_flat(container: Container) -> None:
    """Raises :class:`~ckptconv.errors.Refusal` CK305 for FSDP1's flat parameters: the shapes that they were made from are nowhere in the file."""
    flat = [name for name in (*container.tensors, *container.composites, *container.unsupported) if _FLAT.fullmatch(name)]
    if flat:
        raise Refusal("FSDP1's flat parameters: the names and shapes of what was flattened into them are not in the file", code="CK305",
                      found=printable(", ".join(flat[:3])), try_=WAY_OUT)  # fmt: skip


def way_out(container: Container) -> str:
    """What to try where the tensors that cannot be converted are one rank's parts; empty for other kinds."""
    return WAY_OUT if any(part in kind for kind in container.unsupported.values() for part in _PARTS) else ""


def sharded_tensors(at: int) -> Refusal:
    """The refusal of a pickle that asks for a process group, which is what a ShardedTensor does."""
    return Refusal("the file holds one rank's ShardedTensors of FSDP1, which only their own process group can load; nothing of it was run",
                   code="CK305", found=f"at byte {at:,} of the pickle", try_=WAY_OUT)  # fmt: skip
