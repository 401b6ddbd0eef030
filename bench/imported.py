"""Every key of transformers' conversion mapping: is the rule made from it proved?

    python bench/imported.py [KEY ...] [--jobs 2] [--seconds 180]

Each key in a process of its own, with a time limit. Prints one line per key that is not proved, and the counts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

_CHILD = """
import sys
from ckptconv.importing.proving import prove
for key in sys.stdin.read().split():
    try:
        reason = prove(key)
    except Exception as error:
        reason = f"failed: {type(error).__name__}: {error}"
    print(f"{key}\\t" + " ".join(reason.split()), flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("keys", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=180, help="for one key")
    arguments = parser.parse_args()
    from ckptconv.importing.transformers_mapping import model_types

    keys = arguments.keys or model_types()
    found: dict[str, str] = {}
    batches = [keys[at : at + 8] for at in range(0, len(keys), 8)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for answers in pool.map(lambda batch: _batch(batch, arguments.seconds), batches):
            for key, reason in answers.items():
                found[key] = reason
                if reason:
                    print(f"{key}: {reason}", flush=True)
    proved = sum(not reason for reason in found.values())
    refused = sum(reason.startswith("refused:") for reason in found.values())
    print(f"{proved} proved, {refused} refused, {len(found) - proved - refused} failed, of {len(found)}")
    return 0


def _batch(keys: list[str], seconds: int) -> dict[str, str]:
    """The answers of one process; where it ends early, the key that it was at has failed, and the rest have another process."""
    answers: dict[str, str] = {}
    while len(answers) < len(keys):
        rest = [key for key in keys if key not in answers]
        command = [sys.executable, "-W", "ignore", "-c", _CHILD]
        try:
            text = subprocess.run(command, input=" ".join(rest), capture_output=True, text=True, timeout=seconds * len(rest), check=False)
            lines, end = text.stdout.splitlines(), (text.stderr.strip().splitlines() or ["no answer"])[-1]
        except subprocess.TimeoutExpired as late:
            lines, end = (late.stdout or b"").decode().splitlines(), f"not done in {seconds} s"
        answers |= {key: reason for key, _, reason in (line.partition("\t") for line in lines) if key in rest}
        if len(answers) < len(keys) and rest[len(lines) :]:
            answers[next(key for key in keys if key not in answers)] = f"failed: {end}"
    return answers


if __name__ == "__main__":
    sys.exit(main())
