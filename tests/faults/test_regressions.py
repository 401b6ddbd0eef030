"""What the fuzzer once found, again and again; and, without the fuzzer, a few thousand mutations of its seeds."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "fuzz"))

from seeds import WORDS, seeds
from targets import TARGETS

FOUND = sorted((Path(__file__).parent / "regressions").glob("*/*"))


@pytest.mark.parametrize("path", FOUND, ids=[f"{path.parent.name}-{path.name}" for path in FOUND])
def test_what_the_fuzzer_found_stays_mended(path):
    assert path.stat().st_size < 10_000
    TARGETS[path.parent.name](path.read_bytes())


def mutated(rng, data, words):
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(5)
        if kind == 0 and out:
            out[at % len(out)] = rng.randrange(256)
        elif kind == 1:
            del out[at : at + rng.randint(1, 8)]
        elif kind == 2:
            out[at:at] = rng.choice(words) if words else rng.randbytes(4)
        elif kind == 3 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        else:
            start = rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + rng.randint(1, 40)]
    return bytes(out)


@pytest.mark.parametrize("name", TARGETS)
def test_c017_mutants_are_read_or_refused(name):
    """The fuzzer does this for hours, and by what it sees; here it is done for a second, so that no change escapes it."""
    rng = random.Random(0)
    words = WORDS.get("pickle" if name in ("legacy", "zipped-pickle") else name, [])
    inputs = seeds()[name]
    for _ in range(400):
        TARGETS[name](mutated(rng, rng.choice(inputs), words))


def test_every_target_has_seeds():
    assert seeds().keys() == TARGETS.keys()
