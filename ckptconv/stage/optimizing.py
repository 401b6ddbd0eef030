"""The optimizer's state of a prepared conversion: found, understood, and put into the plan; or left out, if that is wished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field
from msgspec.structs import replace

from ckptconv import formats, target
from ckptconv.errors import FitError, InputError, Problem, Refusal, printable
from ckptconv.formats.base import Composite, Container, Contents, FileLayout, Placed
from ckptconv.formats.joining import shifted
from ckptconv.layout import carried_tree
from ckptconv.names import collapse, nearest, unusable
from ckptconv.optimizer.aligning import parameter_of, parameters_of
from ckptconv.optimizer.following import follow
from ckptconv.optimizer.reading import DROP, Key, OptimizerState, dotted, find, parse
from ckptconv.optimizer.writing import members, read_back, replaced, written
from ckptconv.plan import Plan, Read, reads
from ckptconv.spec import Manifest
from ckptconv.stage.opening import contents_of

if TYPE_CHECKING:
    from ckptconv.stage.preparing import Options, Prepared

FOLLOW, LEAVE = "follow", "drop"
APART = "optimizer.pt"  #: the file of a state that has one of its own, as trainers call it
_ORDERED = ("torch", "torch-legacy")  #: formats that keep a state_dict's order; safetensors sorts the names
_TRAINER = ("scheduler.pt", "scaler.pt", "trainer_state.json")  #: what trainers keep beside it, and that is right as it is
#: Words of groups whose optimizers look at a tensor as a whole: Muon, LAMB, LARS.
_MEASURES = frozenset({"ns_steps", "trust_clip", "trust_coeff", "trust_coefficient"})
_Nodes = list[tuple[tuple[Key, ...], dict[Any, Any]]]


class Carried(Struct, frozen=True):
    """What becomes of the optimizers of a checkpoint."""

    word: str  #: of ``--optimizer``
    bare: Plan  #: the plan of the weights alone
    changes: Mapping[tuple[Key, ...], Any]  #: path in the source's tree -> what is written there; None: nothing
    counts: Mapping[str, int] = field(default_factory=dict)  #: parameters, groups, moments, counters, dropped
    notes: tuple[str, ...] = ()
    model: Manifest | None = None  #: the source's model, where one was named
    order: Manifest | None = None  #: what gives the parameters' numbers; None: the outputs
    alone: Any = None  #: the tree of the file of its own that the state comes from, and goes to

    @property
    def is_apart(self) -> bool:
        """True where the state gets a file of its own."""
        return self.alone is not None

    def put_into(self, contents: Contents) -> Contents:
        """The contents with the new states in the place of the old ones."""
        return contents if self.is_apart else replace(contents, tree=replaced(contents.tree, self.changes))

    def file_of_its_own(self, contents: Contents, metadata: Mapping[str, str]) -> tuple[FileLayout, dict[str, Placed]]:
        """The layout of the file that holds the new state and no weights, and the tensors that it keeps as they are."""
        tree, kept, _ = carried_tree(replace(contents, tree=replaced(self.alone, self.changes)), Container("::", {}))
        return formats.WRITERS["torch"].lay_out(APART, Manifest({}), metadata=metadata, tree=tree), kept

    def read_back(self, written: Contents, folder: Path) -> tuple[dict[str, Placed], tuple[Path, ...]]:
        """Where the moments lie in what was written, by their slots, and the files that these places count.

        Raises :class:`~ckptconv.errors.Refusal` CK407 where the written state is not the planned one.
        """
        tree, files = written.tree, written.files
        if self.is_apart:
            other = formats.read(folder / APART)
            tree, files = _shifted(other.tree, len(files)), (*files, *other.files)
        placed: dict[str, Placed] = {}
        for path, planned in self.changes.items():
            if planned is not None:
                placed.update(read_back(planned, _at(tree, path)))
        return placed, files

    def to_json(self) -> dict[str, Any]:
        at = [APART if self.is_apart else dotted(path) for path in self.changes]
        return {"optimizer": self.word, "at": at, **self.counts}


def with_optimizer(prepared: Prepared, options: Options) -> Prepared:
    """The conversion with the moments in its plan, or with the optimizer's state left out.

    Raises :class:`~ckptconv.errors.InputError` CK314 where it cannot be told what belongs to what, and
    :class:`~ckptconv.errors.FitError` CK417, with everything that stops a moment, where a step does.
    """
    assert options.optimizer is not None, "else there is nothing to do"
    where = printable(options.optimizer_file or prepared.source.path)
    contents, alone = _contents(prepared, options)
    nodes = _found(contents.tree if alone is None else alone, where, options.optimizer)
    if options.optimizer == LEAVE:
        note = f"left out: the optimizer's state at {printable(', '.join(dotted(path) for path, _ in nodes))}"
        return replace(prepared, optimizer=Carried(LEAVE, prepared.plan, dict.fromkeys((path for path, _ in nodes), None), notes=(note,)))
    try:
        states = [parse(node, path) for path, node in nodes]
        model = _model(options)
        ordered = prepared.source.contents.format in _ORDERED
        owners = [parameter_of(state, prepared.source.container.manifest, model, ordered=ordered) for state in states]
        if any(state.form == "number" for state in states):
            _check_order(prepared)
    except Refusal as refusal:
        kind = FitError if refusal.code == "CK417" else InputError
        raise kind(refusal.at(where)) from None
    prepared = replace(prepared, source=replace(prepared.source, contents=contents))
    order = list(parameters_of(prepared.source.container.manifest, model)) if model is not None else []
    like = options.optimizer_order
    wanted = prepared.wanted if like == "target" else None if like == "outputs" else like
    carried = Carried(options.optimizer, prepared.plan, {}, model=model, order=wanted, alone=alone)
    return _followed(prepared, carried, list(zip(states, owners, strict=True)), where, order)


def kept_as_it_is(plan: Plan, contents: Contents) -> str:
    """What to know where extras are kept, an optimizer's state is among them, and the weights get another order or shape; else empty text."""
    before = list(plan.source.stored)
    if [output.expr.name if isinstance(output.expr, Read) else "" for output in plan.stored] == before:
        return ""
    path = next((dotted(path) for path, _ in find(contents.tree)), None)
    return (
        "" if path is None else f"{printable(path)} is kept as it is, in the order and shapes of the source; --optimizer follow converts it"
    )


def _followed(
    prepared: Prepared, carried: Carried, found: Sequence[tuple[OptimizerState, Mapping[Any, str]]], where: str, order: Sequence[str]
) -> Prepared:  # fmt: skip
    source, plan, wanted = prepared.source, prepared.plan, carried.order
    twice = _twice([list(owners.values()) for _, owners in found])
    if twice:
        raise InputError(
            Problem("CK314", f"two optimizers train {printable(twice)}", where=where, try_=f"--optimizer PATH of one; or {DROP}")
        )
    whole, placed = plan, dict[str, Placed]()
    changes: dict[tuple[Key, ...], Any] = {}
    counts = dict.fromkeys(("parameters", "groups", "moments", "counters", "dropped"), 0)
    names: list[list[str]] = [list(dict.fromkeys([*plan.source, *plan.manifest]))]
    problems: list[Problem] = []
    notes: list[str] = []
    for state, owners in found:
        moments, stopped = follow(plan, state, owners, source.composites)
        parameters, homeless = members(plan, state, moments, wanted, order, alone=len(found) == 1)
        problems += stopped + [problem.at(where) for problem in homeless]
        changes[state.path] = written(state, parameters)
        placed.update(moments.placed)
        names += [list(dict.fromkeys([*moments.placed, *(output.name for output in moments.outputs)]))]
        whole = replace(whole, moments=(*whole.moments, *moments.outputs), dropped=(*whole.dropped, *moments.dropped))
        for name, count in {**moments.counts, "groups": len(state.groups)}.items():
            counts[name] += count
        new = [each.name for each in parameters if each.trained is None]
        notes += _notes(state, plan, new, [] if wanted is not None else moments.idle)
    if problems:
        raise FitError(dict.fromkeys(problems), about=prepared)
    _check_names(names, where)
    whole = replace(
        whole, source=replace(plan.source, tensors={**plan.source.tensors, **{name: each.spec for name, each in placed.items()}})
    )
    left = f"; {counts['dropped']:,} entries of dropped parameters do not" if counts["dropped"] else ""
    sentence = f"{counts['moments']:,} moments of {counts['parameters']:,} parameters follow the weights{left}"
    if wanted is None and any(state.form == "number" for state, _ in found):
        notes.append("the optimizer's numbers follow the order of the output; --target takes the model's")
    elif wanted is not None and prepared.target is not None and prepared.target.kind == "manifest" and list(wanted) == sorted(wanted):
        notes.append(
            "the target's names are in alphabetical order, and so are the optimizer's numbers: name the model itself, if it has another"
        )
    carried = replace(carried, changes=changes, counts=counts, notes=(sentence, *notes))
    return replace(prepared, source=replace(source, placed={**source.placed, **placed}), plan=whole, optimizer=carried)


def _contents(prepared: Prepared, options: Options) -> tuple[Contents, Any]:
    """The source's contents; where the state is in a file of its own, with that among its files, and the tree of that file."""
    contents = prepared.source.contents
    if options.optimizer_file is None:
        return contents, None
    file = Path(options.optimizer_file)
    other = contents_of(file)
    known = {path.name for path in contents.neighbours}
    joined = replace(
        contents, files=(*contents.files, *other.files), identities={**contents.identities, **other.identities},
        warnings=(*contents.warnings, *other.warnings), neighbours=(*contents.neighbours, *(path for path in _beside(file) if path.name not in known)),
    )  # fmt: skip
    return joined, _shifted(other.tree, len(contents.files))


def _found(tree: Any, where: str, word: str) -> _Nodes:
    """The optimizers' states that are meant, with their paths."""
    nodes = list(find(tree))
    if not nodes:
        raise InputError(
            Problem("CK314", "the file holds no optimizer's state (a dict with `state` and `param_groups`)", where=where,
                    try_="--optimizer-file FILE, where it is in a file of its own; else leave --optimizer out")
        )  # fmt: skip
    if word in (FOLLOW, LEAVE):
        return nodes
    there = [dotted(path) for path, _ in nodes]
    if word not in there:
        raise InputError(
            Problem("CK314", f"there is no optimizer's state at {printable(word)}", where=where, found=printable(", ".join(there[:20])),
                    try_=f"--optimizer {printable(nearest(word, there) or FOLLOW)}")
        )  # fmt: skip
    return [node for node, path in zip(nodes, there, strict=True) if path == word]


def _at(tree: Any, path: tuple[Key, ...]) -> Any:
    for key in path:
        there = key in tree if isinstance(tree, Mapping) else isinstance(tree, (list, tuple)) and isinstance(key, int) and key < len(tree)
        if not there:
            raise Refusal(f"the written file has no optimizer's state at {printable(dotted(path))}", code="CK407")
        tree = tree[key]
    return tree


def _shifted(node: Any, by: int) -> Any:
    """A tree whose tensors lie in files that are counted ``by`` further on."""
    if isinstance(node, Placed):
        return shifted(Container(".", {"": node}), by).tensors[""]
    if isinstance(node, Composite):
        return shifted(Container(".", {}, composites={"": node}), by).composites[""]
    if isinstance(node, Mapping):
        return {key: _shifted(value, by) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_shifted(value, by) for value in node)
    return node


def _beside(file: Path) -> tuple[Path, ...]:
    """What lies beside an optimizer's file of its own and belongs to it: the scheduler's state, the trainer's, random number generators."""
    names = [*_TRAINER, *sorted(path.name for path in file.parent.glob("rng_state*.pth"))]
    return tuple(path for name in names if (path := file.parent / name).is_file() and not path.is_symlink())


def _model(options: Options) -> Manifest | None:
    if options.source_model is None or isinstance(options.source_model, Manifest):
        return options.source_model
    word = target.parse(options.source_model, origin="command line", base=None)
    return target.manifest_of(word, timeout=options.timeout)


def _check_order(prepared: Prepared) -> None:
    """Refuses a target that fixes no order of its parameters: numbers would be given in a wrong one, and nothing would show it."""
    wanted = prepared.target
    if wanted is not None and wanted.kind == "checkpoint" and formats.read(wanted.path).format not in _ORDERED:
        raise Refusal("the target keeps its tensors in an order of its own, not the model's, and the optimizer's parameters have numbers", code="CK314",
                      try_=f"--target MODEL (timm:…, hf:…, py:…); or {DROP}")  # fmt: skip


def _notes(state: OptimizerState, plan: Plan, new: Sequence[str], idle: Sequence[str]) -> list[str]:
    found = []
    if new:
        found.append(f"new in the optimizer, without a history: {_few(new)}")
    unknown = [name for name in idle if plan.manifest[name].dtype.kind == "float"]
    if unknown:
        found.append(f"not in the optimizer, because it is new and no --target says that it is a parameter: {_few(unknown)}")
    measures = _MEASURES.intersection(key for group in state.groups for key in group.options)
    if measures and any(len(island) > 1 or len(reads(island[0].expr)) > 1 for island in plan.islands()):
        found.append("this optimizer looks at tensors as a whole: what is split or joined is stepped differently from now on")
    return found


def _few(names: Sequence[str]) -> str:
    return printable(", ".join(map(str, collapse(names)[:4])))


def _twice(lists: Sequence[Sequence[str]]) -> str:
    """A name that two of the lists have; empty text where there is none."""
    seen: set[str] = set()
    for names in lists:
        again = next((name for name in names if name in seen), "")
        if again:
            return again
        seen.update(names)
    return ""


def _check_names(lists: Sequence[Sequence[str]], where: str) -> None:
    """The names under which moments are read and written are names of nothing else, and can be written down."""
    twice = _twice(lists)
    if twice:
        raise InputError(Problem("CK314", f"two entries are called {printable(twice)!r}", where=where, try_=DROP))
    for name in (name for names in lists[1:] for name in names):
        reason = unusable(name)
        if reason:
            raise InputError(Problem("CK314", f"{reason}: {printable(name)!r}", where=where, try_=DROP))
