"""Names that are the right ones under something: a wrapper's prefix, an attribute of a trainer, a copy that flattened them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ckptconv.compare import shared_prefix
from ckptconv.errors import printable
from ckptconv.explain.sides import Cause, Sides, count_of, sides
from ckptconv.spec import Manifest

#: Segments that only wrappers make -> who makes them.
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_fpw_module": "FSDP (fairscale)",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
    "module": "nn.DataParallel or DistributedDataParallel",
}
#: Attributes under which trainers keep the network -> what the user calls that.
_TRAINERS = {
    "model.": "a LightningModule or a trainer keeps its network as self.model",
    "net.": "a LightningModule or a trainer keeps its network as self.net",
    "network.": "a trainer keeps its network as self.network",
    "backbone.": "a larger model (a detector, a self-supervised learner) has it as its backbone",
    "encoder.": "a larger model has it as its encoder",
    "student.": "a distillation or self-supervised trainer has it as its student",
    "teacher.": "a distillation or self-supervised trainer has it as its teacher",
    "base_model.model.": "PEFT wraps the model so",
    "encoder_q.": "MoCo has it as its trained encoder",
    "target_encoder.": "a self-supervised trainer has it as its target encoder",
}


def unwrapped(name: str) -> tuple[str, tuple[str, ...]]:
    """A name without what wrappers add, and which segments these were. ``module`` counts at the front only: people call modules so too.

    >>> unwrapped("_orig_mod.module.layers.0._checkpoint_wrapped_module.weight")
    ('layers.0.weight', ('_orig_mod', 'module', '_checkpoint_wrapped_module'))
    """
    kept: list[str] = []
    seen: list[str] = []
    for part in name.split("."):
        if part in WRAPPERS and (part != "module" or (not kept and "module" not in seen)):
            seen.append(part)
        else:
            kept.append(part)
    return ".".join(kept), tuple(seen)


def wrapper(both: Sides) -> Cause | None:
    """Segments of wrappers in names of one side."""
    for names, others, where in (
        (both.unexpected, both.missing, "in the checkpoint"),
        (both.missing, both.unexpected, "in the model"),
    ):
        found: Counter[tuple[str, ...]] = Counter()
        for name in names:
            bare, seen = unwrapped(name)
            # `module` alone may be somebody's own word: it is a wrapper where the bare name is wanted, or every name has it.
            if seen and (seen != ("module",) or bare in others or all(each.startswith("module.") for each in names)):
                found[seen] += 1
        if not found:
            continue
        seen = tuple(dict.fromkeys(part for parts in found for part in parts))
        carried = [name for name in names if unwrapped(name)[1] in found]
        total = sum(1 for _ in (both.found if where == "in the checkpoint" else both.wanted))
        share = "every key" if len(carried) == total else f"{len(carried):,} of {total:,} keys"
        makers = ", then ".join(f"{part}. ({WRAPPERS[part]})" for part in seen)
        bare_names = {unwrapped(name)[0] for name in carried}
        names_explained = (*carried, *(name for name in others if name in bare_names))
        order = f", in {len(found)} different orders" if len(found) > 1 else ""
        return Cause(
            "wrapper", f"{share} {where} {'carries' if share == 'every key' else 'carry'} what a wrapper adds: {makers}{order}",
            names_explained,
            "save model.module.state_dict() (DataParallel) or model._orig_mod.state_dict() (compile) next time"
            if where == "in the checkpoint"
            else "load into the bare model before it is wrapped: model.module.load_state_dict(…)",
        )  # fmt: skip
    return None


def without_wrappers(both: Sides) -> Sides:
    """The sides with the names of both as they are without wrappers; as they were where that would make two names one."""
    found, wanted = ({name: unwrapped(name)[0] for name in manifest} for manifest in (both.found, both.wanted))
    return renamed_sides(both, found, wanted)


def without_prefix(both: Sides, found: str) -> Sides:
    """The sides with a prefix taken from the checkpoint's names, or put before them."""
    if any(name.startswith(found) for name in both.unexpected):
        return renamed_sides(both, {name: name.removeprefix(found) for name in both.found}, {})
    return renamed_sides(both, {name: found + name for name in both.found}, {})


def renamed_sides(both: Sides, found: Mapping[str, str], wanted: Mapping[str, str]) -> Sides:
    """The same sides under other names."""
    manifests: list[Manifest] = []
    unknown = set(both.unknown)
    for manifest, names in ((both.found, found), (both.wanted, wanted)):
        if len(set(names.values())) < len(names):
            return both
        unknown |= {names[name] for name in both.unknown if name in names}
        ties = tuple(tuple(names.get(name, name) for name in group) for group in manifest.ties)
        buffers = frozenset(names.get(name, name) for name in manifest.buffers)
        manifests.append(Manifest({names.get(name, name): spec for name, spec in manifest.tensors.items()}, ties, buffers))
    return sides(manifests[0], manifests[1], frozenset(unknown))


def prefix(both: Sides) -> Cause | None:
    """One prefix by which most names of one side become the other's: an attribute of a trainer, or a missing one."""
    for longer, shorter, there in ((both.unexpected, both.missing, True), (both.missing, both.unexpected, False)):
        found = shared_prefix(longer, shorter)
        if not found:
            continue
        have, want = set(longer), set(shorter)
        under = [name for name in longer if name.startswith(found) and name.removeprefix(found) in want]
        explained = (*under, *(name for name in shorter if found + name in have))
        who = f" ({_TRAINERS[found]})" if found in _TRAINERS else ""
        if there:
            rest = len(longer) - sum(name.startswith(found) for name in longer)
            beside = f"; beside it stand {rest:,} keys of something else" if rest else ""
            sentence = f"the model's keys stand under {printable(found)!r} in the checkpoint{who}{beside}"
            return Cause("prefix", sentence, explained, f"- strip_prefix: {printable(found)}")
        sentence = f"the model's keys start with {printable(found)!r}, the checkpoint's do not{who}"
        return Cause("prefix", sentence, explained, f"- add_prefix: {printable(found)}")
    return None


def flattened(both: Sides) -> Cause | None:
    """Names whose dots were taken out: how LitEma and its kin register their copies."""
    flat = {name.replace(".", ""): name for name in both.wanted}
    pairs = []
    for name in both.unexpected:
        leaf = name.rpartition(".")[2]
        if "." not in leaf and leaf in flat and flat[leaf] != leaf:
            pairs.append((name, flat[leaf]))
    if len(pairs) < 2:
        return None
    first, same = pairs[0]
    return Cause(
        "flattened", f"{count_of(len(pairs), 'key', 'be')} an averaged copy (EMA) under names without dots: {printable(first)} is {printable(same)}",
        tuple(name for name, _ in pairs), "each name has to be said in a rule: `ckptconv suggest` writes it",
    )  # fmt: skip


def doubled(both: Sides) -> Cause | None:
    """A segment that stands twice: a mapping that was applied twice, or backwards."""
    missing = set(both.missing)
    pairs = []
    for name in both.unexpected:
        parts = name.split(".")
        once = [part for at, part in enumerate(parts) if at == 0 or part != parts[at - 1] or part.isdigit()]
        if len(once) < len(parts) and ".".join(once) in missing:
            pairs.append((name, ".".join(once)))
    if not pairs:
        return None
    return Cause(
        "doubled",
        f"{count_of(len(pairs), 'key', 'have')} a part twice: {printable(pairs[0][0])} is {printable(pairs[0][1])}; a mapping ran twice, or its inverse is wrong",
        tuple(name for pair in pairs for name in pair), "convert from the original file; ckptconv derives inverses and proves them by a round trip",
    )  # fmt: skip
