"""Catalogue H: rule files from strangers. Whatever is in one, there is an answer within a second and within 200 MB, and it is a sentence."""

import json

import pytest
from building import entry, pairs, pickled, safetensors_file, table, tensor, text, torch_file
from harness import message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptconv.errors import UsageError
from ckptconv.ruleset import builtin, model
from ckptconv.ruleset.yamlfile import MAX_BYTES

HEAD = "version: 1\nname: rules\nsummary: s\n"
LIMITS = {"seconds": 1, "mb": 200}


def steps(*lines):
    return HEAD + "steps:\n" + "".join(f"- {line}\n" for line in lines)


def bomb(mark, of):
    """Nine lines, each of which is nine times the one before."""
    lines = [f"a: &a {of}"] + [f"{b}: &{b} {mark(a)}" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    return HEAD + "\n".join(lines) + "\n"


REFUSED = [
    ("c087-laughing-aliases", bomb(lambda name: "[" + ",".join([f"*{name}"] * 9) + "]", "[x,x,x]"), "error: rules.yaml:4:4  [CK101]\n  anchors are not allowed\n  found: &a\n  try: write the value out where it is used\nerror: rules.yaml:5:4  [CK101]\n  anchors are not allowed\n  found: &b\n  try: write the value out where it is used\nerror: rules.yaml:5:8  [CK101]\n  aliases are not allowed\n  found: *a\n  try: write the value out\nerror: rules.yaml:5:11  [CK101]\n  aliases are not allowed\n  found: *a\n  try: write the value out\nerror: rules.yaml:5:14  [CK101]\n  aliases are not allowed\n  found: *a\n  try: write the value out\nerror: rules.yaml:5:17  [CK101]\n  aliases are not allowed\n  found: *a\n  try: write the value out\nerror: rules.yaml:5:20  [CK101]\n  aliases are not allowed\n  found: *a\n  try: write the value out\nerror: rules.yaml:5:23  [CK101]\n  aliases are not allowed\n  found: *a\n  try: write the value out\nerror: rules.yaml:5:26  [CK101]\n  aliases are not allowed\n  found: *a\n  try: write the value out\nerror: rules.yaml:5:29  [CK101]\n  aliases are not allowed\n  found: *a\n  try: write the value out\nerror: rules.yaml:5:32  [CK101]\n  aliases are not allowed\n  found: *a\n  try: write the value out\nerror: rules.yaml:6:4  [CK101]\n  anchors are not allowed\n  found: &c\n  try: write the value out where it is used\nerror: rules.yaml:6:8  [CK101]\n  aliases are not allowed\n  found: *b\n  try: write the value out\nerror: rules.yaml:6:11  [CK101]\n  aliases are not allowed\n  found: *b\n  try: write the value out\nerror: rules.yaml:6:14  [CK101]\n  aliases are not allowed\n  found: *b\n  try: write the value out\n"),
    ("c088-merging-bombs", bomb(lambda name: "{" + ", ".join([f"<<: *{name}"] * 9) + "}", "{x: 1}"), "error: rules.yaml:4:4  [CK101]\n  anchors are not allowed\n  found: &a\n  try: write the value out where it is used\nerror: rules.yaml:5:4  [CK101]\n  anchors are not allowed\n  found: &b\n  try: write the value out where it is used\nerror: rules.yaml:5:8  [CK101]\n  merge keys are not allowed\n  found: <<\n  try: write the entries out\nerror: rules.yaml:5:12  [CK101]\n  aliases are not allowed\n  found: *a\n  try: write the value out\nerror: rules.yaml:5:16  [CK101]\n  merge keys are not allowed\n  found: <<\n  try: write the entries out\nerror: rules.yaml:5:16  [CK101]\n  key '<<' stands twice\n  found: first on line 5\nerror: rules.yaml:5:20  [CK101]\n  aliases are not allowed\n  found: *a\n  try: write the value out\nerror: rules.yaml:5:24  [CK101]\n  merge keys are not allowed\n  found: <<\n  try: write the entries out\nerror: rules.yaml:5:24  [CK101]\n  key '<<' stands twice\n  found: first on line 5\nerror: rules.yaml:5:28  [CK101]\n  aliases are not allowed\n  found: *a\n  try: write the value out\nerror: rules.yaml:5:32  [CK101]\n  merge keys are not allowed\n  found: <<\n  try: write the entries out\nerror: rules.yaml:5:32  [CK101]\n  key '<<' stands twice\n  found: first on line 5\nerror: rules.yaml:5:36  [CK101]\n  aliases are not allowed\n  found: *a\n  try: write the value out\nerror: rules.yaml:5:40  [CK101]\n  merge keys are not allowed\n  found: <<\n  try: write the entries out\nerror: rules.yaml:5:40  [CK101]\n  key '<<' stands twice\n  found: first on line 5\n"),
    ("c089-100000-brackets", "[" * 100_000, ("rules.yaml:1:1001", "CK101", "nested deeper than 32")),
    ("c089-100000-braces", "{a: " * 100_000, ("rules.yaml:1:129", "CK101", "nested deeper than 32")),
    ("c089-100000-dashes", "- " * 100_000, ("rules.yaml:1:65", "CK101", "nested deeper than 32")),
    ("c089-33-deep", HEAD + "vars: {a: " + "[" * 40 + "]" * 40 + "}\n", ("rules.yaml:4:41", "CK101", "nested deeper than 32")),
    ("c090-5-MB", steps(*["drop: x"] * 600_000), ("rules.yaml", "CK101", "a rule file has at most 1,048,576 bytes; this one has 1,048,577")),
    ("c090-one-byte-over-the-limit", HEAD + "#" * (MAX_BYTES + 1 - len(HEAD)), ("rules.yaml", "CK101", "a rule file has at most 1,048,576 bytes; this one has 1,048,577")),
    ("c090-more-steps-than-the-limit", steps(*["drop: x"] * 10_001), ("rules.yaml:4:1", "CK211", "a rule file has at most 10,000 steps", "10,001")),
    ("c090-a-megabyte-of-one-list", HEAD + "steps: [" + "x," * 500_000 + "]\n", ("rules.yaml:4:199999", "CK101", "a rule file has at most 100,000 values")),
    ("c091-a-key-twice", HEAD + "name: other\nsteps: [drop: x]\n", ("rules.yaml:4:1", "CK101", "key 'name' stands twice", "first on line 2")),
    ("c091-a-key-twice-in-a-step", steps("rename: {a: b, a: c}"), ("rules.yaml:5:18", "CK101", "key 'a' stands twice", "first on line 5")),
    ("c092-python-tag", steps("drop: !!python/object/apply:os.system [touch marker]"), ("rules.yaml:5:9", "CK101", "tags are not allowed", "tag:yaml.org,2002:python/object/apply:os.system")),
    ("c092-unknown-tag", steps("drop: !thing x"), ("rules.yaml:5:9", "CK101", "tags are not allowed", "!thing")),
    ("c092-two-documents", HEAD + "steps: [drop: x]\n---\na: 1\n", ("rules.yaml:5:1", "CK101", "a rule file holds one document", "a second `---`")),
    ("c092-tabs", HEAD + "steps:\n\t- drop: x\n", ("rules.yaml:5:1", "CK101", "not YAML: found character that cannot start any token", "", "indent with spaces, not tabs")),
    ("c092-utf-16", steps("drop: x").encode("utf-16"), ("rules.yaml", "CK101", "a rule file is UTF-8 text", "byte 0xff at offset 0")),
    ("c092-latin-1", steps("drop: caf\xe9").encode("latin-1"), ("rules.yaml", "CK101", "a rule file is UTF-8 text", "byte 0xe9 at offset 52")),
    ("c092-NUL", steps("drop: 'a\0b'"), ("rules.yaml", "CK101", "not YAML: unacceptable character #x0000: control characters are not allowed\\n  in \"<unicode string>\", position 51")),
    ("c092-half-a-character", steps('drop: "\\ud800"'), ("rules.yaml:5:12", "CK101", "not YAML: found invalid Unicode character escape code")),
    ("c092-escape-sequence", steps('dro\\x1b: x', 'drop: "\\e[31mred"'), "error: rules.yaml:5:3  [CK102]\n  there is no step 'dro\\\\x1b'\n  try: ckptconv schema lists them: strip_prefix, add_prefix, strip_infix, rename, drop, keep, copy, tie, check, reshape, rearrange, slice, index, pad, repeat, cast, affine, split, concat, stack, unstack, fill, resize, adapt_channels, resize_rows, combine, merge_lora, weight_norm, fold_batchnorm, apply_mask, decode, convert, include\nerror: rules.yaml:6:3  [CK103]\n  a pattern holds no control characters and no lone surrogates\n  found: \\x1b[31mred\n"),
    ("c092-nothing", "", ("rules.yaml", "CK102", "a rule file is a mapping that starts with `version: 1`", "None")),
    ("c092-only-a-comment", "# nothing\n", ("rules.yaml", "CK102", "a rule file is a mapping that starts with `version: 1`", "None")),
    ("c092-a-list", "- 1\n", ("rules.yaml", "CK102", "a rule file is a mapping that starts with `version: 1`", "[1]")),
    ("c093-no", HEAD + "expect_all: no\nsteps: [drop: x]\n", ("rules.yaml:4:13", "CK101", "'no' means different things to different YAML readers", "", "\"no\" for the text, or true, false, null in lower case")),
    ("c093-on-as-a-key", HEAD + "on: 1\nsteps: [drop: x]\n", ("rules.yaml:4:1", "CK101", "'on' means different things to different YAML readers", "", "\"on\" for the text, or true, false, null in lower case")),
    ("c093-1e3", HEAD + "vars: {eps: 1e3}\nsteps: [drop: x]\n", ("rules.yaml:4:13", "CK101", "'1e3' looks like a number or a date, and YAML readers disagree on which", "", "\"1e3\" for the text, or 1.0e-3 form for the number")),
    ("c093-017", HEAD + "revision: 017\nsteps: [drop: x]\n", ("rules.yaml:4:11", "CK101", "'017' looks like a number or a date, and YAML readers disagree on which", "", "\"017\" for the text")),
    ("c093-a-date", HEAD.replace("summary: s", "summary: 2020-01-01") + "steps: [drop: x]\n", ("rules.yaml:3:10", "CK101", "'2020-01-01' looks like a number or a date, and YAML readers disagree on which", "", "\"2020-01-01\" for the text")),
    ("c093-a-number-for-text", HEAD.replace("summary: s", "summary: 12") + "steps: [drop: x]\n", ("rules.yaml:3:1", "CK102", "summary: input should be a valid string", "12")),
    ("c093-a-number-for-a-name", steps("rename: {a: 12}"), ("rules.yaml:5:12", "CK102", "a: input should be a valid string", "12")),
    ("c094-misspelt-step", steps("renam: {a: b}"), ("rules.yaml:5:3", "CK102", "there is no step 'renam'", "", "did you mean rename?")),
    ("c094-misspelt-field", HEAD + "sumary: s\nsteps: [drop: x]\n", ("rules.yaml:4:1", "CK102", "unknown field 'sumary'", "", "did you mean summary?")),
    ("c094-misspelt-field-of-a-step", steps("cast: {keys: x, dtyp: float16}"), "error: rules.yaml:5:3  [CK102]\n  field 'dtype' is missing\nerror: rules.yaml:5:19  [CK102]\n  unknown field 'dtyp'\n  try: did you mean dtype?\n"),
    ("c094-misspelt-dtype", steps("cast: {keys: x, dtype: float17}"), ("rules.yaml:5:19", "CK102", "there is no dtype 'float17'", "", "did you mean float16?")),
    ("c094-version-2", steps("drop: x").replace("version: 1", "version: 2"), ("rules.yaml:1:1", "CK102", "version: input should be 1", "2")),
    ("c094-requires-a-later-ckptconv", HEAD + "requires: '>=99'\nsteps: [drop: x]\n", ("rules.yaml:4:1", "CK102", "the rule requires ckptconv >=99; this is 0.1.0", "", "pip install -U ckptconv")),
    ("c095-split-into-a-billion", steps('split: {from: x, to: "{i:int}.y", dim: 0, parts: 1000000000}'), ("rules.yaml:5:3", "CK102", "unknown field 'parts'", "", "fields: from, to, sizes, when, optional, note, dim, layout, along")),
    ("c095-split-by-sizes-that-do-not-fit", steps("split: {from: x, to: [a, b], dim: 0, sizes: [1000000000, 1]}"), ("rules.yaml:5:3  split (step 1)", "CK206", "x: the sizes [1000000000, 1] add up to 1000000001, but axis 0 has 8", "[8] float32")),
    ("c095-repeat-a-billion-times-a-billion", steps("repeat: {keys: x, dim: 0, times: 1000000000000000000}", "repeat: {keys: x, dim: 0, times: 1000000000}"), ("rules.yaml:6:3  repeat (step 2)", "CK206", "x: repeat would make a tensor past the limits of 64 axes and 2^63 elements", "[8000000000000000000] float32")),
    ("c095-negative-size", steps("reshape: {keys: x, shape: [-8]}"), ("rules.yaml:5:3  reshape (step 1)", "CK104", "x: a size must be at least -1", "-8")),
    ("c095-two-sizes-left-open", steps("reshape: {keys: x, shape: [-1, -1]}"), ("rules.yaml:5:3  reshape (step 1)", "CK206", "x: reshape to [-1, -1]: sizes are not negative, and -1 stands at most once", "[8] float32")),
    ("c095-axis-out-of-range", steps("concat: {from: [x, y], to: z, dim: 7}"), ("rules.yaml:5:3  concat (step 1)", "CK206", "z: there is no dim 7 in a tensor of rank 1", "[8] float32")),
    ("c095-a-product-over-64-bits", steps("fill: {to: z, shape: [9000000000000000000, 9000000000000000000], value: zeros}"), ("rules.yaml:5:3  fill (step 1)", "CK211", "z: the tensor is too large to exist", "[9000000000000000000, 9000000000000000000] float32")),
    ("c096-a-command-as-target", HEAD + "target: {model: 'py:os:system'}\nsteps: [drop: x]\n", ("py:os:system", "CK106", "a rule file cannot name code as its target", "", "--target py:os:system, or --allow-code if you trust the file")),
    ("c096-a-target-above", HEAD + "target: {model: '../x.json'}\nsteps: [drop: x]\n", ("../x.json", "CK106", "a rule file's target must not leave its folder", "", "--target on the command line")),
    ("c096-an-absolute-target", HEAD + "target: {model: /etc/hostname}\nsteps: [drop: x]\n", ("/etc/hostname", "CK106", "a rule file's target must not leave its folder", "", "--target on the command line")),
    ("c096-a-home-target", HEAD + "target: {model: 'hf:~/x'}\nsteps: [drop: x]\n", ("hf:~/x", "CK106", "a rule file's target must not leave its folder", "", "--target on the command line")),
    ("c096-include-above", steps("include: ../../x.yaml"), ("rules.yaml:5:3", "CK102", "an included file lies in the rule's own folder", "../../x.yaml", "a plain relative path")),
    ("c096-include-absolute", steps("include: /etc/x.yaml"), ("rules.yaml:5:3", "CK102", "an included file lies in the rule's own folder", "/etc/x.yaml", "a plain relative path")),
    ("c096-include-of-itself", steps("include: rules.yaml"), ("rules.yaml:5:3", "CK102", "a rule file includes itself", "rules.yaml")),
    ("c096-an-environment-variable", steps('rename: {"{p}": "${HOME}"}'), "error: rules.yaml:5:3  rename (step 1)  [CK104]\n  x -> ${HOME}: variable 'HOME' has no value\n  y -> ${HOME}: variable 'HOME' has no value\n  try: give it with --set NAME=VALUE, --config FILE, or vars: in the rule file\n"),
    ("c096-another-environment-variable", steps('rename: {"{p}": "$HOME.x"}', "check: {keys: '$HOME.x', count: 9}"), "error: rules.yaml:5:3  rename (step 1)  [CK202]\n  two results under one name: $HOME.x\n  found: rules.yaml:5  rename (step 1) and rules.yaml:5  rename (step 1)\n  try: drop or rename one of them first\nerror: rules.yaml:6:3  check (step 2)  [CK207]\n  want 9 names, found 1\n"),
    ("c098-look-ahead", steps('drop: "regex:(?=a)a"'), ("rules.yaml:5:3", "CK103", "the regular expression does not compile: invalid perl operator: (?=", "regex:(?=a)a", "RE2 has no look-around, back-references or possessive repeats; use a template with {x:a|b} or two entries")),
    ("c098-back-reference", steps('drop: "regex:(a)\\\\1"'), ("rules.yaml:5:3", "CK103", "the regular expression does not compile: invalid escape sequence: \\1", "regex:(a)\\1", "RE2 has no look-around, back-references or possessive repeats; use a template with {x:a|b} or two entries")),
    ("c098-1001-repeats", steps('drop: "regex:a{1,1001}"'), ("rules.yaml:5:3", "CK103", "the regular expression does not compile: invalid repetition size: {1,1001}", "regex:a{1,1001}", "RE2 has no look-around, back-references or possessive repeats; use a template with {x:a|b} or two entries")),
    ("c098-repeats-of-repeats", steps('drop: "regex:((((a{1,100}){1,100}){1,100}){1,100})"'), ("rules.yaml:5:3", "CK103", "the regular expression does not compile: invalid repetition size: {1,100}", "regex:((((a{1,100}){1,100}){1,100}){1,100})", "RE2 has no look-around, back-references or possessive repeats; use a template with {x:a|b} or two entries")),
    ("c098-end-of-text-as-in-python", steps('drop: "regex:a\\\\Z"'), ("rules.yaml:5:3", "CK103", "the regular expression does not compile: invalid escape sequence: \\Z", "regex:a\\Z", "RE2 has no look-around, back-references or possessive repeats; use a template with {x:a|b} or two entries")),
    ("c098-a-pattern-of-100-kB", steps(f'drop: "regex:{"a" * 100_000}"'), ("rules.yaml:5:3", "CK103", "a pattern has at most 1,024 characters; this one has 100,006", "regex:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa…")),
    ("c098-unclosed", steps('drop: "regex:(a"'), ("rules.yaml:5:3", "CK103", "the regular expression does not compile: missing ): (?:(a)", "regex:(a", "RE2 has no look-around, back-references or possessive repeats; use a template with {x:a|b} or two entries")),
    ("c098-a-brace-that-is-never-closed", steps('drop: "a.{p"'), ("rules.yaml:5:3", "CK103", "a `{` is never closed", "a.{p", "write {{ for a brace in a name")),
    ("c099-a-name-that-doubles-30-times", steps(*['rename: {"{p}": "{p}{p}"}'] * 30), "error: rules.yaml:15:3  rename (step 11)  [CK209]\n  the name has 2,048 characters; at most 1,024 are allowed: 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…'\n  found: made from xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…\n  the name has 2,048 characters; at most 1,024 are allowed: 'yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy…'\n  found: made from yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy…\n"),
    ("c099-a-template-of-a-million-names", steps('copy: {from: x, to: "' + "".join("{" + name + ":0|1|2|3|4|5|6|7|8|9}" for name in "abcdef") + '"}'), ("rules.yaml:5:3", "CK211", "a template stands for 1,000,000 names; at most 1,000 are allowed", "{a:0|1|2|3|4|5|6|7|8|9}{b:0|1|2|3|4|5|6|7|8|9}{c:0|1|2|3|4|5|6|7|8|9}{d:0|1|2|3|4|5|6|7|8|9}{e:0|1|2|3|4|5|6|7|8|9}{f:0|1|2|3|4|5|6|7|8|9}")),
    ("c099-unstacking-what-has-a-billion-rows", steps("fill: {to: z, shape: [1000000000, 1], value: zeros}", 'unstack: {from: z, over: i, to: "z.{i}", dim: 0}'), ("rules.yaml:6:3  unstack (step 2)", "CK211", "the step would give 1,000,000,000 names; at most 1,000,000 are allowed")),
    ("c099-nine-to-the-nine-to-the-nine", steps('reshape: {keys: x, shape: ["9**9**9"]}'), ("rules.yaml:5:30", "CK104", "unexpected '**'; `**` does not exist here", "9**9**9")),
    ("c099-products-without-end", steps('reshape: {keys: x, shape: ["' + "*".join(["9999999999"] * 20) + '"]}'), ("rules.yaml:5:3  reshape (step 1)", "CK104", "x: a result must fit into 64 bits", "9999999999 * 9999999999")),
    ("c099-lists-of-lists-of-lists", HEAD + "vars:\n  a0: '[1, 1]'\n" + "".join(f"  a{at + 1}: '[a{at}, a{at}]'\n" for at in range(60)) + "steps:\n- reshape: {keys: x, shape: [a60]}\n", ("rules.yaml:67:3  reshape (step 1)", "CK104", "x: variables need each other more than 32 deep", "a28")),
    ("c099-a-variable-that-is-itself", HEAD + "vars: {a: b, b: a}\nsteps:\n- reshape: {keys: x, shape: [a]}\n", ("rules.yaml:6:3  reshape (step 1)", "CK104", "x: variable 'a' is defined by itself")),
    ("c099-brackets-in-an-expression", steps('reshape: {keys: x, shape: ["' + "(" * 500 + "1" + ")" * 500 + '"]}'), ("rules.yaml:5:30", "CK104", "an expression nests at most 32 deep", "((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((…")),
    ("c099-code-in-an-expression", steps("""reshape: {keys: x, shape: ["__import__('os').system('touch marker')"]}"""), ("rules.yaml:5:30", "CK104", "there is no function '__import__' (there are by_name, count_below, first, has, len, max, min, shape)", "__import__('os').system('touch marker')")),
    ("c099-attributes-in-an-expression", steps("""reshape: {keys: x, shape: ["().__class__.__base__"]}"""), ("rules.yaml:5:30", "CK104", "unexpected ')'", "().__class__.__base__")),
]  # fmt: skip
SOURCE = torch_file(pickled(table(x=tensor([8]), y=tensor([2, 4], [4, 1]))))
RUN = "run", "rules.yaml", "in.pth", "out.pth"


def made(box, rules):
    box.write("in.pth", SOURCE)
    box.write("rules.yaml", rules)


@pytest.mark.parametrize(("rules", "said"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(box, rules, said):
    made(box, rules)
    box.refuses(2, said if isinstance(said, str) else message(*said), *RUN, **LIMITS)


def test_c092_a_byte_order_mark_is_accepted(box):
    made(box, b"\xef\xbb\xbf" + steps("rename: {x: z}").encode())
    box.converts(*RUN)


def test_c096_nothing_is_taken_from_the_environment(box):
    made(box, steps('rename: {x: "$HOME.%PATH%.~"}'))
    box.env = {"HOME": "/marker"}
    assert "x → $HOME.%PATH%.~" in box.converts(*RUN).out


CATASTROPHES = [
    ("c097-nested-repeats", "regex:^(a+)+$"), ("c097-alternatives-that-are-alike", "regex:^(a|a)*$"), ("c097-optional-pieces", "regex:" + "a?" * 40 + "a" * 40),
    ("c097-layers", r"regex:^(.*)\.(.*)\.(.*)\.(.*)\.(.*)\.weight$"), ("c097-templates", "{a}{b}{c}{d}{e}{f}!x"), ("c097-deep", "{a:**}.{b:**}.{c:**}.{d:**}.x"),
]  # fmt: skip


@pytest.mark.parametrize("pattern", [row[1] for row in CATASTROPHES], ids=[row[0] for row in CATASTROPHES])
def test_c097_matching_takes_no_longer_than_the_name_is_long(box, pattern):
    names = {"a" * 40 + "!": b"", "a." * 500 + "!": b"", "a" * 1000: b""}
    box.write("in.pth", torch_file(pickled(pairs(*((text(name), tensor()) for name in names)))))
    box.write("rules.yaml", steps(f"drop: {{keys: {json.dumps(pattern)}, optional: true}}", "rename: {nothing: x}"))
    outcome = box.run(*RUN, **LIMITS)
    assert outcome.code == 2
    assert outcome.seconds < 1


def test_c099_a_thousand_rules_and_fifty_thousand_names(box):
    """Each name is looked up, not tried against each pattern."""
    box.write("in.safetensors", safetensors_file({f"layers.{at}.w": entry([0], [0, 0]) for at in range(50_000)}))
    box.write(
        "rules.yaml",
        steps("rename: {" + ", ".join(f'"block{at}.{{p}}": "b{at}.{{p}}"' for at in range(1000)) + ', "layers.{i:int}.w": "l.{i}"}'),
    )
    outcome = box.run("plan", "rules.yaml", "in.safetensors", seconds=30)
    assert outcome.code == 0, outcome.err


def test_c095_more_output_than_is_allowed(box):
    made(box, steps("repeat: {keys: x, dim: 0, times: 1000000000}"))
    said = (
        "CK211",
        "the output would have 32,000,002,389 bytes; --max-output allows 10,000,000,000",
        "",
        "--max-output 32001MB, if that is meant",
    )
    box.refuses(2, message("out.pth", *said), *RUN, "--max-output", "10GB", **LIMITS)


def test_c095_as_much_output_as_is_allowed(box):
    made(box, steps("drop: y"))
    size = len(box.converts(*RUN).out) and (box.folder / "out.pth").stat().st_size
    box.converts(*RUN, "--force", "--max-output", str(size))
    said = "CK211", f"the output would have {size:,} bytes; --max-output allows {size - 1:,}", "", "--max-output 1MB, if that is meant"
    box.refuses(2, message("out.pth", *said), *RUN, "--force", "--max-output", str(size - 1))


VALID = [path.read_bytes() for path in sorted(builtin.folder().glob("*.yaml")) if path.stat().st_size < 3000][:8]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    raw=st.sampled_from(VALID),
    edits=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=4),
)
def test_c100_a_mutated_rule_file_is_right_or_gets_its_sentences(raw, edits):
    for at, length, new in edits:
        at = at % (len(raw) + 1)  # noqa: PLW2901
        raw = raw[:at] + new + raw[at + length :]
    try:
        rules = model.parse(raw, "r.yaml")
    except UsageError as error:
        problems = error.problems
    else:
        assert rules.steps
        return
    assert problems
    assert all(problem.code in ("CK101", "CK102", "CK103", "CK104", "CK105", "CK211") for problem in problems)
    assert all(problem.where.startswith("r.yaml") for problem in problems)
