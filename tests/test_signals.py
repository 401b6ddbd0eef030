"""How a process of ours begins and ends."""

import subprocess
import sys

COUNTED = """
import gc, sys
from ckptconv import signals

signals.begin()
class Node: pass
for _ in range(10_000):
    one, other = Node(), Node()
    one.other, other.one = other, one
signals.let_go()
print(gc.collect() < 100, gc.get_freeze_count() > 20_000)
"""


def test_cycles_are_not_looked_for_at_the_end():
    done = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
