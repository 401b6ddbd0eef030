import pytest

from ckptconv.errors import UsageError
from ckptconv.ruleset.model import parse

HEAD = "version: 1\nname: r\nsummary: s\n"


def problems(body, head=HEAD):
    with pytest.raises(UsageError) as error:
        parse((head + body).encode(), "r.yaml", stem="r")
    return [str(problem) for problem in error.value.problems]


def test_a_good_file_is_read_with_its_places():
    rules = parse((HEAD + "steps:\n  - strip_prefix: module.\n  - drop: [a, b]\n").encode(), "r.yaml", stem="r")
    assert rules.label == "r@1"
    assert [(step.step.op, step.number, step.where) for step in rules.steps] == [
        ("strip_prefix", 1, "r.yaml:5:5  strip_prefix (step 1)"),
        ("drop", 2, "r.yaml:6:5  drop (step 2)"),
    ]


def test_the_digest_is_that_of_the_meaning():
    def digest(text):
        return parse((HEAD + text).encode(), "r.yaml").digest

    assert digest("steps:\n  - drop: a\n") == digest("# why\nsteps: [{drop: a}]\n")
    assert digest("steps:\n  - drop: a\n") != digest("steps:\n  - drop: b\n")
    assert digest("steps:\n  - drop: a\n") == digest("steps:\n  - drop: a\ntests:\n  - {name: t, given: {a: [1]}, refuses: CK201}\n")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("steps: [{drop: a}]\nsumary: x\n", "r.yaml:5:1  [CK102]\n  unknown field 'sumary'\n  try: did you mean summary?"),
        ("steps:\n  - strip_prefx: module.\n", "r.yaml:5:5  [CK102]\n  there is no step 'strip_prefx'\n  try: did you mean strip_prefix?"),
        ("steps:\n  - strip_prefix: {prefix: m., repeet: true}\n", "r.yaml:5:32  [CK102]\n  unknown field 'repeet'\n  try: did you mean repeat?"),
        ("steps:\n  - drop: [{a: b}]\n", "r.yaml:5:5  [CK103]\n  a pattern is text\n  found: {'a': 'b'}\n  try: quote it"),
        ("steps:\n  - rename: {'a.{p': b}\n", "r.yaml:5:5  [CK103]\n  a `{` is never closed\n  found: a.{p\n  try: write {{ for a brace in a name"),
        ("steps:\n  - cast: {keys: '**', dtype: float33}\n", "r.yaml:5:24  [CK102]\n  there is no dtype 'float33'\n  try: did you mean float32?"),
        ("steps:\n  - rearrange: {keys: a, pattern: 'a b -> b a', c: 3}\n",
         "r.yaml:5:5  [CK102]\n  'c' is no axis of 'a b -> b a'\n  try: fields: keys, from, to, pattern, and the axes"),
        ("steps:\n  - stack: {from: 'a.{e:int}.w', over: x, to: a}\n", "r.yaml:5:5  [CK102]\n  `over: x` is no placeholder of 'a.{e:int}.w'"),
        ("steps:\n  - split: {from: a, to: [b, c], sizes: [1, 2, 3]}\n", "r.yaml:5:5  [CK102]\n  3 sizes for 2 names"),
        ("steps:\n  - concat: {from: ['{m:**}.a', '{n:**}.b'], to: '{m}.{n}.c'}\n",
         "r.yaml:5:5  [CK102]\n  '{m:**}.a' and '{n:**}.b' must have the same placeholders\n  found: ['m'] and ['n']"),
        ("steps:\n  - check: {keys: a}\n", "r.yaml:5:5  [CK102]\n  check wants at least one of shape, dtype, rank, count, finite, equal"),
        ("steps:\n  - drop: a\n    keep: b\n",
         "r.yaml:5:5  [CK102]\n  a step is one word with its fields, as in `- drop: [\"head.{p}\"]`\n  found: {'drop': 'a', 'keep': 'b'}"),
        ("steps:\n  - reshape: {keys: a, from: b, shape: [1]}\n", "r.yaml:5:5  [CK102]\n  reshape wants either keys, or from and to"),
        ("steps: []\n", "r.yaml:4:1  [CK102]\n  a rule file has a list of steps\n  found: []"),
        ("steps: [{drop: a}]\nvars: {H: '1 +'}\n", "r.yaml:5:1  [CK104]\n  the expression ends too early\n  found: 1 +"),
        ("steps: [{drop: a}]\nrequires: '>=99'\n",
         "r.yaml:5:1  [CK102]\n  the rule requires ckptconv >=99; this is 0.1.0\n  try: pip install -U ckptconv"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_line_and_nearest_word(body, message):
    assert problems(body) == [message]


def test_all_mistakes_are_named_at_once():
    found = problems("sumary: x\nsteps:\n  - drp: a\n  - cast: {keys: '**'}\n")
    assert [line.split("\n")[1].strip() for line in found] == [
        "unknown field 'sumary'",
        "there is no step 'drp'",
        "field 'dtype' is missing",
    ]


def test_the_version_is_enforced():
    assert problems("steps: [{drop: a}]\n", head="version: 2\nname: r\nsummary: s\n") == [
        "r.yaml:1:1  [CK102]\n  version: input should be 1\n  found: 2"
    ]


def test_the_name_is_the_stem():
    assert problems("steps: [{drop: a}]\n", head="version: 1\nname: other\nsummary: s\n") == [
        "r.yaml:2:1  [CK102]\n  name must be the file's stem: 'r'\n  found: 'other'"
    ]
