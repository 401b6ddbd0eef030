"""`ckptconv explain CK101`: what each error code means, an example of its message, and what to do."""

from __future__ import annotations

import re
from typing import Any

from msgspec import Struct

from ckptconv.errors import CODES, Problem, UsageError, printable
from ckptconv.names import nearest

_CODE = re.compile(r"CK\d{3}", re.IGNORECASE)


class CodeHelp(Struct, frozen=True):
    """One code, explained."""

    code: str
    sentence: str
    meaning: str
    example: str
    todo: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "ckptconv_code": 1, "code": self.code, "sentence": self.sentence, "meaning": self.meaning, "example": self.example,
            "todo": list(self.todo),
        }  # fmt: skip


def is_code(word: str) -> bool:
    """Whether a word of the command line is an error code rather than a file: ``CK101``, also in small letters.

    >>> is_code("ck101"), is_code("in.pth")
    (True, False)
    """
    return _CODE.fullmatch(word) is not None


def explain_code(word: str) -> CodeHelp:
    """The explanation of a code. Raises :class:`~ckptconv.errors.UsageError` CK107 for one that does not exist.

    >>> explain_code("CK501").todo[0]
    'choose another DST, or say --force to replace it'
    """
    code = word.upper()
    if code not in _HELP:
        close = nearest(code, CODES)
        raise UsageError(Problem("CK107", f"there is no error code {printable(code)}", try_=f"ckptconv explain {close or 'CK101'}"))
    meaning, example, todo = _HELP[code]
    return CodeHelp(code, CODES[code], meaning, example, todo)


#: Code -> (what it means, an example of its message, what to do).
_HELP: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "CK101": (
        "Rule files are read by a strict YAML reader: a key that stands twice, an anchor, a tag or a tab would otherwise silently mean "
        "something else than was written.",
        "rules/mine.yaml:7:1  [CK101]\n  the key 'steps' stands twice",
        ("go to the line and column of the message", "quote names with special characters: \"layers.{i:int}.weight\"",
         "ckptconv schema > rule-v1.schema.json gives editors completion and checks"),
    ),
    "CK102": (
        "Every field is known and typed, so that a slip of the pen is an error and not a setting that nobody reads.",
        "rules/mine.yaml:5:5  [CK102]\n  there is no step 'strip_prefx'\n  try: did you mean strip_prefix?",
        ("use the word that the message proposes", "docs/rules.md explains every step and its fields"),
    ),
    "CK103": (
        "A pattern matches whole names: {p} is one part, {i:int} a number, {m:**} any number of parts, {x:q|k|v} one of these. A template may "
        "use only what its pattern captured.",
        "rules/mine.yaml:6:7  rename (step 1)  [CK103]\n  the template uses {j}, which the pattern does not capture",
        ("quote the pattern in the YAML", "try it on your file: ckptconv inspect SRC --match 'layers.{i:int}.{p}'"),
    ),
    "CK104": (
        "Expressions in rules are small and safe: arithmetic, comparisons, first(), has(), shape(), and variables from --set, vars and "
        "config.json. A name in one has no value here.",
        "rules/timm-vit-to-hf-vit.yaml:20:9  [CK104]\n  variable 'H' has no value",
        ("say it: --set H=12", "name the model's config: --config config.json", "give it a value under vars: in the rule file"),
    ),
    "CK105": (
        "RULES is the path of a rule file or the name of a built-in rule.",
        "[CK105]\n  there is no built-in rule 'dataparalel'\n  try: did you mean 'dataparallel'?",
        ("ckptconv rules list names all that are built in", "for a file of your own give its path, with .yaml"),
    ),
    "CK106": (
        "Rule files are shared, so they may not make your machine run code or read outside their folder: a py: target imports a program, "
        "and only the command line may ask for that.",
        "py:nets:make  [CK106]\n  a rule file cannot name code as its target\n  try: --target py:nets:make",
        ("give the target on the command line", "or save its manifest once and name that: ckptconv inspect py:nets:make --save-manifest m.json"),
    ),
    "CK107": (
        "Two words of the command contradict each other, one is missing, or a value cannot be read.",
        "[CK107]\n  --set H: want NAME=VALUE\n  try: --set H=32",
        ("read the line that begins with try", "ckptconv COMMAND --help ends with examples"),
    ),
    "CK108": (
        "A rule file carries tests: names and shapes in, names and shapes out. A test failed, or there is none, which proves nothing.",
        "rules/mine.yaml:12:5  [CK108]\n  test 'one block': 'norm1.weight' is missing",
        ("mend the rule, or the expectation: ckptconv test rules/mine.yaml --update rewrites it", "a new rule gets a test with a handful of names"),
    ),
    "CK109": (
        "Outputs record NAME@REVISION of their rule. LOCK.json holds what each revision means, so that the same words never mean two things.",
        "rules/mine.yaml  [CK109]\n  the rule changed its meaning, and is still revision 1",
        ("raise `revision:` by one", "ckptconv rules lock writes the lock anew"),
    ),
    "CK110": (
        "A mapping of another library does something that rules cannot say, or its proof by a round trip failed.",
        "transformers:foo  [CK110]\n  the mapping uses an operation that rules do not have",
        ("write the rule by hand from the parts that can be said: ckptconv suggest helps",),
    ),
    "CK111": (
        "ckptconv.lock.json in a batch's folder says which output was made from what. Where it is cut off, edited into something else, or names files "
        "outside of its folder, nothing of it is believed.",
        "converted/ckptconv.lock.json  [CK111]\n  this is no lock of a batch: not valid JSON",
        ("restore it from a copy", "or remove it: with --force the batch makes every output again"),
    ),
    "CK201": (
        "A step is there for a reason. When it matches nothing, either the rule is for another checkpoint or a name in it is wrong, and going on "
        "would give a file that only looks converted.",
        "rules/mine.yaml:4:5  rename (step 1)  [CK201]\n  the step matched nothing: blocks.{i:int}.{p}\n  found: layers.{0-11}.attn.qkv.weight ×12",
        ("compare the names: ckptconv inspect SRC --match '**'", "optional: true, if the step may have nothing to do",
         "ckptconv explain SRC lists the rules that are meant for the file"),
    ),
    "CK202": (
        "Two tensors would be written under one name, and one of them would be lost.",
        "rules/mine.yaml:5:5  rename (step 2)  [CK202]\n  two results under one name: layers.0.weight",
        ("drop or rename one of them in a step before", "make the pattern narrower"),
    ),
    "CK203": (
        "Inside one step all entries match at once, so the order of lines means nothing; then no name may be claimed twice.",
        "rules/mine.yaml:5:5  rename (step 2)  [CK203]\n  two entries claim layers.0.norm.weight",
        ("make one entry narrower", "or move the general one into a step of its own, after the special one"),
    ),
    "CK204": (
        "strip_prefix strips from every name or from none: a prefix that only some names carry is usually part of a name, or the file holds two "
        "networks.",
        "rules/dataparallel.yaml:10:5  strip_prefix (step 1)  [CK204]\n  120 of 122 names carry 'module.'",
        ("look at those that do not: ckptconv inspect SRC", "drop them first, or say where: some", "lightning-network picks one of several networks"),
    ),
    "CK205": (
        "Tensors that are joined to one (experts, q/k/v, ranks) must be complete: one that is missing would shift all after it.",
        "rules/mixtral-to-fused-experts.yaml:14:5  stack (step 1)  [CK205]\n  experts 0 to 7: 5 is missing",
        ("is the file one of several shards? name the folder", "compare with ckptconv inspect SRC --match '**.experts.**'"),
    ),
    "CK206": (
        "An operation met shapes or dtypes that it cannot work on. Shapes are inferred while planning, so nothing was read or written.",
        "rules/mine.yaml:14:9  concat (step 3)  [CK206]\n  pieces must agree on every axis but 0\n  found: q [4096, 4096], k [1024, 4095]",
        ("look at the tensors that the message names: ckptconv inspect SRC --match …", "a rule for another variant of the model is the usual reason"),
    ),
    "CK207": (
        "A rule's own check: its author knew that the rule is right only under this condition.",
        "rules/torchvision-resnet-to-timm-resnet.yaml:12:5  check (step 1)  [CK207]\n  conv1.weight has the shape [32, 3, 3, 3]: a deep stem is another model",
        ("the file is another variant than the rule is for", "ckptconv explain SRC --target T looks for a rule that is"),
    ),
    "CK208": (
        "`when` says by names which checkpoints a rule is for; this one has other names.",
        "rules/hf-llama-to-litgpt.yaml  when  [CK208]\n  the rule is not for this checkpoint: no name matches 'model.embed_tokens.weight'",
        ("ckptconv explain SRC lists the rules that are meant for it", "wrapped names (module., model.)? strip them by a rule first"),
    ),
    "CK209": (
        "Names go into files that other programs read; some names cannot be written there.",
        "rules/mine.yaml:5:5  rename (step 2)  [CK209]\n  the name is empty: ''",
        ("change the template that makes the name",),
    ),
    "CK210": (
        "With expect_all a rule promises to know every name of its checkpoints; this one has a name that it does not know.",
        "rules/timm-vit-to-hf-vit.yaml  [CK210]\n  no step touches blocks.{0-11}.ls1.gamma ×12",
        ("the file is a variant that the rule is not for", "rename or drop the name in a rule of your own: ckptconv rules show NAME > rules/mine.yaml"),
    ),
    "CK211": (
        "Limits keep a mistake in a rule, or a file made to hurt, from filling memory.",
        "rules/mine.yaml:5:5  repeat (step 2)  [CK211]\n  a step gives more than 2,000,000 names",
        ("look at the step's sizes",),
    ),
    "CK212": (
        "The way back is derived from the plan. What the rule drops, rounds or averages is not in its output and cannot come back.",
        "rules/mine.yaml  [CK212]\n  head.weight cannot come back: it was dropped",
        ("--lossy leaves it out", "keep the original file: it is the only source of what was dropped"),
    ),
    "CK301": (
        "The file's first bytes are not those of a checkpoint. Usually a download gave something else.",
        "model.pth  [CK301]\n  this is a git-lfs pointer (134 bytes), not the file itself\n  try: git lfs pull",
        ("git lfs pull for a pointer; fetch it again for a web page", "unpack an archive first", "for JSON name the folder that it lies in"),
    ),
    "CK302": (
        "The file ends too early or its parts do not fit together: a download or a copy that was interrupted, or a full disk while saving.",
        "model.pth  [CK302]\n  the archive's end is missing: the file is cut off",
        ("compare its size with the original's, and fetch it again", "a training that is still writing? wait for it"),
    ),
    "CK303": (
        "Pickles can run programs. ckptconv never runs anything of one; a file that asks for a command, a socket or a module loader is made to harm "
        "whoever loads it.",
        "model.pth  [CK303]\n  the file asks for posix.system, which runs commands or code; nothing of it was run",
        ("do not load the file with anything else", "fetch the model from its author, as safetensors if there is one"),
    ),
    "CK304": (
        "The pickle is not well-formed, or it passes a limit of depth or size that honest checkpoints do not reach.",
        "model.pth  [CK304]\n  the file nests deeper than 64\n  found: at byte 1,024 of the pickle",
        ("fetch the file again", "save it again with torch.save(model.state_dict(), FILE)"),
    ),
    "CK305": (
        "A tensor says that it lies where the file has no bytes, or it is of a kind that is not read.",
        "model.pth  [CK305]\n  a tensor reaches past the end of its storage",
        ("damaged: fetch the file again", "an unknown kind: load and save it as a plain tensor where it was made",
         "one rank's part of a model (FSDP): save it on all ranks with torch.distributed.checkpoint"),
    ),
    "CK306": (
        "The container's lists contradict each other; reading one of them would be a guess.",
        "model.pth  [CK306]\n  record 'data/3' occurs twice",
        ("fetch the file again, or save it again with torch.save",),
    ),
    "CK307": (
        "The header of safetensors has strict rules: offsets without gaps, sizes that fit, text metadata.",
        "model.safetensors  [CK307]\n  the tensors leave a gap before 'b.weight'",
        ("save it again with the safetensors library",),
    ),
    "CK308": (
        "A sharded checkpoint is an index and its files, a parallel one all of its ranks; something of it is not there, or not as the index says.",
        "model/  [CK308]\n  model-00002-of-00003.safetensors is in the index and not in the folder",
        ("fetch the missing file; name the folder that holds them all", "a file that the index does not know may be left from another version"),
    ),
    "CK309": (
        "A training checkpoint holds several things. Where more than one is a state_dict, only you know which is meant: `model` and `ema` are "
        "different weights.",
        "last.ckpt  [CK309]\n  the file holds several state_dicts, and none was selected\n  found: model (122 tensors), ema (122 tensors)",
        ("--select ema", "or `select:` in the rule file", "ckptconv explain SRC --target T says which of them fit"),
    ),
    "CK310": (
        "The operating system does not give the file.",
        "in.pth  [CK310]\n  the source cannot be opened: No such file or directory",
        ("look at the path, and at the rights of the file and its folders", "a link may point to nothing"),
    ),
    "CK311": (
        "The source is not what it was when the plan was made, or it changed while it was read: something else writes to it.",
        "in.pth  [CK311]\n  the source is not the one that the plan was made for",
        ("plan again: ckptconv plan … --out", "wait until the training has written its file"),
    ),
    "CK312": (
        "The file records a checksum of a tensor's bytes, and they are not those bytes: the disk or the transfer changed them.",
        "in.pth  [CK312]\n  the checksum of storage 'data/7' does not match its bytes",
        ("fetch or copy the file again", "check the disk if it happens twice"),
    ),
    "CK313": (
        "The store was asked again and again, and failed every time: it is overloaded or out of reach, or it does not know ranges.",
        "s3://bucket/in.pth  [CK313]\n  the store did not give the bytes, after 5 tries\n  found: bytes 0 to 65,536: TimeoutError",
        ("run again later", "look at the network, at the proxy, and at the endpoint that is configured for the store"),
    ),
    "CK314": (
        "An optimizer knows its parameters by number. Which number is which tensor is told by the order of the state_dict and by the moments' shapes, "
        "and here they leave several ways, or none. Or the file holds no optimizer's state where one is asked for.",
        "in.pth  [CK314]\n  the moments' shapes do not go with the state_dict's parameters in their order\n  found: 61 parameters in 1 groups, 62 in the state_dict",
        ("--source-model timm:NAME (or py:…, hf:…): the model that was trained tells which are its parameters",
         "save it with names: torch.optim.AdamW(model.named_parameters(), …), from torch 2.6 on", "--optimizer drop leaves the optimizer's state out"),
    ),
    "CK401": (
        "The model has parameters that the result does not fill. strict=False would leave them random without a word.",
        "timm:resnet18  [CK401]\n  the target needs fc.weight, which the result does not have",
        ("ckptconv explain SRC --target T says why", "if it is to be trained anew, allow it by name: target: {allow: {missing: [\"fc.{p}\"]}}"),
    ),
    "CK402": (
        "The result has tensors that the model does not know: they would be lost, or the file is for another model.",
        "timm:resnet18  [CK402]\n  the result has aux.{0-3}.weight ×4, which the target does not know",
        ("ckptconv explain SRC --target T says why", "drop them by a step, so that the report lists them"),
    ),
    "CK403": (
        "A tensor has the right name and another shape: another number of classes, another vocabulary or resolution, or another model.",
        "py:nets:net  [CK403]\n  size mismatch for head.weight: [5, 10] in the checkpoint, [6, 10] in the target",
        ("ckptconv explain SRC --target T says which of these it is", "drop the layer and allow it as missing; or resize_rows, resize, adapt_channels"),
    ),
    "CK404": (
        "load_state_dict would round the values into the model's dtype without a word.",
        "timm:resnet18  [CK404]\n  fc.weight: float32 in the checkpoint would lose values in the target's float16",
        ("- cast: {keys: '**', dtype: float16} in the rule file says that it is meant, and counts overflows",),
    ),
    "CK405": (
        "The model has one tensor under several names (tied weights); the result brings values that cannot be one tensor.",
        "hf:model  [CK405]\n  one tensor in the target, and two dtypes in the checkpoint: lm_head.weight float32, wte.weight float16",
        ("drop all names but one: the target ties the others to it",),
    ),
    "CK406": (
        "The target is built on the meta device in a process of its own; that failed, or took longer than --timeout.",
        "timm:resnet19  [CK406]\n  timm has no model 'resnet19'\n  try: did you mean resnet18?",
        ("look at the reason in the message", "build it once in Python to see its own traceback", "--timeout for slow constructors"),
    ),
    "CK407": (
        "What was written is not what was planned. This is a fault of the disk or of ckptconv; nothing was left under the final name.",
        "out.pth  [CK407]\n  the digest of fc.weight differs from the plan's",
        ("run it again on another disk", "report it, with the message and the rule"),
    ),
    "CK408": (
        "The model itself refused the result, though names and shapes fit: a hook of its own, or a value that it checks.",
        "timm:resnet18  [CK408]\n  loading failed: RuntimeError: …",
        ("read the model's own message", "a custom _load_from_state_dict may rename keys itself: convert to what it expects"),
    ),
    "CK409": (
        "The elements of the output are not those of the source: something was lost or doubled on the way.",
        "out.pth  [CK409]\n  blocks.0.qkv.weight: 3 elements are not in the source",
        ("look at the step that makes this tensor: ckptconv plan … -v", "a slice that overlaps or leaves a gap is the usual reason"),
    ),
    "CK410": (
        "A value is larger than the new dtype can hold, and would become infinite.",
        "rules/mine.yaml  cast (step 2)  [CK410]\n  fc.weight: 12 values overflow float16",
        ("cast to bfloat16, which has float32's range", "leave these tensors as they are"),
    ),
    "CK411": (
        "To compare outputs both models are built and run in a process of their own, and that failed.",
        "py:old:model  [CK411]\n  the source model cannot be run: forward() wants 2 arguments",
        ("--parity inputs=FILE, a .pt file with the arguments of forward()", "run the model once in Python with these inputs"),
    ),
    "CK412": (
        "Both models ran on the same inputs and gave different outputs. All names and shapes fit, so a mapping is wrong (q and k exchanged, rows "
        "in another order) or a hyper-parameter differs (eps, heads, activation).",
        "[CK412]\n  the outputs differ by 0.31 of their range\n  found: first at blocks.0.attn",
        ("--verify 6 names the first module that differs", "compare the configs of both models"),
    ),
    "CK413": (
        "Quantised numbers mean nothing without their scales: a block whose scale is missing, zero, NaN or infinite cannot be made float again.",
        "rules/mine.yaml:12  decode (step 1)  [CK413]\n  layers.0.w: a scale is not finite\n  found: 1 of 48 scales",
        ("look at the scales: ckptconv inspect in.safetensors --match '**_scale_inv'", "the file may be damaged: fetch it again, and compare its digest"),
    ),
    "CK414": (
        "--forbid-nonfinite was given, and a tensor of the output holds NaN or an infinity: from the source, or made by a step.",
        "out.pth  [CK414]\n  head.weight holds values that are not finite\n  found: 3 of 7,680",
        ("the notes of a run say how many of them a step made", "leave --forbid-nonfinite out, if they are meant"),
    ),
    "CK415": (
        "Names, shapes and order allow more than one answer (two encoders alike, q and k of one size), so the suggestion is a guess in these places. A "
        "wrong guess loads without an error.",
        "rules/mine.yaml  [CK415]\n  4 of 120 tensors are ambiguous: layers.{0-1}.norm_b.weight may also come from blocks.{0-1}.norm1.weight",
        ("--pair 'norm1=norm_b' says which belongs to which", "--parity source=… lets the models' outputs decide",
         "read the rule, and --accept-ambiguous if it is right"),
    ),
    "CK416": (
        "`finish` puts the receipts of all tasks together. Where one is missing, damaged or of another plan, or its bytes are not those that it tells of, "
        "nothing is published, and that task is to be done again.",
        ".out.ckptconv-work  [CK416]\n  1 of 8 tasks are not done\n  found: tasks 3\n  try: ckptconv work plan.json",
        ("ckptconv work plan.json does what is left; what is done is not done again", "ckptconv status plan.json names every task"),
    ),
    "CK417": (
        "An optimizer's moments follow their parameters through steps that only move elements. A step that computes (affine, resize, decode, combine), "
        "adds elements (pad, repeat, fill) or joins parameters that are trained differently would leave the moments without a meaning.",
        "rules/mine.yaml:9  affine (step 2)  [CK417]\n  the optimizer's state cannot follow norm.weight: affine: values that are scaled or shifted have other gradients",
        ("--optimizer drop writes everything else, and the optimizer starts anew", "leave the step out, where the target can do without it"),
    ),
    "CK501": (
        "Nothing is ever overwritten unless you say so.",
        "out.pth  [CK501]\n  the destination exists\n  try: --force",
        ("choose another DST, or say --force to replace it",),
    ),
    "CK502": (
        "The destination is the source, or lies inside it: writing would destroy what is read.",
        "in.pth  [CK502]\n  the destination is the source",
        ("choose another DST",),
    ),
    "CK503": (
        "The operating system refused to write: no space, no rights, no such folder.",
        "out.pth  [CK503]\n  the output cannot be written: No space left on device",
        ("free space: ckptconv plan says how many bytes are needed", "look at the folder's rights"),
    ),
    "CK504": (
        "The format has no place for something that the plan makes: a dtype, a name, or entries beside the tensors.",
        "out.safetensors  [CK504]\n  safetensors cannot hold complex32",
        ("--format torch", "or cast it in the rule"),
    ),
    "CK505": (
        "A target or format needs a package that is not installed.",
        "timm:resnet18  [CK505]\n  timm: targets need the package timm\n  try: pip install 'ckptconv[timm]'",
        ("install what the message names",),
    ),
    "CK506": (
        "Two runs would write one output; the second is refused, so that nobody gets half of each.",
        "out.pth  [CK506]\n  another run is writing this output",
        ("wait until the other run is done, or choose another DST",
         "work in tasks that nobody goes on with: finish it by the command that the message names, or remove its folder"),
    ),
    "CK507": (
        "Work in tasks goes on where it was left, so everybody must write the same bytes to the same places: the same rules, plan, source files, options, "
        "ckptconv, and torch where something is computed.",
        ".out.ckptconv-work  [CK507]\n  the work that is under way was begun with something else: the rules",
        ("go on with the words and versions that it was begun with", "--force begins anew, and so does removing the folder"),
    ),
    "CK510": (
        "A batch works in several processes, and one of them was ended from outside: by hand, or by the system because memory ran out. Only the "
        "checkpoint that it was converting is missing.",
        "zoo/large.pth  [CK510]\n  the process that converted it ended by signal 9",
        ("run the same batch again: what is done is not done again", "--jobs 1, or --max-memory SIZE, where memory ran out"),
    ),
    "CK511": (
        "--engine ray hands work to a Ray cluster. It does not answer at the address, or asks more of a machine than any of its machines has.",
        "10.0.0.7:6379  [CK511]\n  the cluster cannot be reached: timed out",
        ("ray status --address ADDRESS", "leave --ray-address out: a cluster of this machine alone is begun", "--threads 1 needs less memory"),
    ),
}  # fmt: skip
