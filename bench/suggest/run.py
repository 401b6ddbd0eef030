"""How good are suggested rules? `python bench/suggest/run.py [--only tuned|heldout|negatives|mutations] [--json] [--cases FOLDER]`

The README beside this file says what the columns mean. Exit 1 where the suggester is certain of something wrong, accepts a pair that has no
conversion, or refuses one that has.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout that this file lies in is the one that is measured

import baselines
import large
from mutations import mutations
from negatives import negatives
from pairs import cases, pairs
from scoring import POSITIVE, Judge, Score, shipped_entries

from ckptconv.spec import Manifest

Suggester = Callable[[Manifest, Manifest], Any]
OURS = "ckptconv"


def suggesters(chosen: Sequence[str]) -> dict[str, Suggester]:
    """Ours, where it is there, and the baselines."""
    found: dict[str, Suggester] = {}
    if importlib.util.find_spec("ckptconv.suggest") is not None:
        from ckptconv.suggest import suggest

        found[OURS] = lambda source, target: suggest(source, target, name="suggested")
    for name, match in baselines.MATCHERS.items():
        found[name] = lambda source, target, match=match: baselines.guess(match, source, target)
    return {name: each for name, each in found.items() if not chosen or name in chosen}


def asked(suggester: Suggester, source: Manifest, target: Manifest) -> tuple[Any, float, str]:
    """Its suggestion, the seconds, and what went wrong."""
    started = time.perf_counter()
    try:
        found = suggester(source, target)
    except Exception as error:
        return None, time.perf_counter() - started, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found, time.perf_counter() - started, ""


def judged(name: str, group: str, family: str, rule: str, built: Any, among: dict[str, Suggester], note: str = "") -> dict[str, Any]:
    """One pair and every suggester's score."""
    judge = Judge(built.source, built.target, built.truth)
    scores: dict[str, Score] = {}
    texts: dict[str, str] = {}
    for who, suggester in among.items():
        suggestion, seconds, error = asked(suggester, built.source, built.target)
        found = Score(len(judge.wanted), refused=True, error=error) if error else judge.score(suggestion)
        found.seconds = seconds
        scores[who] = found
        texts[who] = "" if suggestion is None else suggestion.text
    shipped = shipped_entries(rule) if rule else 0
    return {
        "name": name, "group": group, "family": family, "rule": rule, "shipped": shipped, "note": note, "scores": scores,
        "text": texts.get(OURS, ""),
    }  # fmt: skip


def refused(name: str, reason: str, source: Manifest, target: Manifest, among: dict[str, Suggester]) -> dict[str, Any]:
    """One negative pair: who accepts it, and with how much certainty."""
    answers = {}
    for who, suggester in among.items():
        suggestion, seconds, error = asked(suggester, source, target)
        accepted = suggestion is not None and suggestion.verdict in POSITIVE
        certain = sum(level == "certain" for level in suggestion.confidence.values()) if accepted else 0
        why = error or (suggestion.reason if suggestion is not None else "")
        answers[who] = {"refused": not accepted and not error, "certain": certain, "why": why, "error": error, "seconds": seconds}
    return {"name": name, "reason": reason, "answers": answers}


def total(rows: Iterable[dict[str, Any]], who: str) -> dict[str, Any]:
    """The sums over pairs, and the ratios of the sums."""
    of = [(row, row["scores"][who]) for row in rows]
    scores = [score for _, score in of]
    targets, mapped = sum(score.targets for score in scores), sum(score.mapped for score in scores)
    right, exact = sum(score.right for score in scores), sum(score.exact for score in scores)
    written = [(score.entries, row["shipped"]) for row, score in of if score.perfect and row["shipped"]]
    return {
        "pairs": len(scores), "perfect": sum(score.perfect for score in scores), "refused": sum(score.refused for score in scores),
        "targets": targets, "recall": right / targets if targets else 1.0, "precision": right / mapped if mapped else 1.0, "mapped": mapped,
        "exact": exact / targets if targets else 1.0, "certain": sum(score.certain for score in scores),
        "certain_wrong": sum(score.certain_wrong for score in scores), "errors": sum(bool(score.error) for score in scores),
        "levels": _levels(scores), "entries": sum(mine for mine, _ in written), "shipped": sum(theirs for _, theirs in written),
        "seconds": sum(score.seconds for score in scores),
    }  # fmt: skip


def _levels(scores: Iterable[Score]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for score in scores:
        for level, (count, wrong) in score.levels.items():
            so_far = found.setdefault(level, [0, 0])
            found[level] = [so_far[0] + count, so_far[1] + wrong]
    return found


def _share(ratio: float, of: int) -> str:
    return f"{ratio:.1%}" if of else "–"


def shown_pairs(rows: Sequence[dict[str, Any]], who: str) -> None:
    print(f"\n{who}")
    print(
        f"  {'pair':<52}{'tensors':>8}{'recall':>8}{'precis.':>8}{'exact':>7}{'certain':>8}{'wrong':>6}{'entries':>8}{'rule':>5}{'sec':>7}"
    )
    for row in rows:
        score: Score = row["scores"][who]
        mark = "✓" if score.perfect else "–" if score.refused else " "
        print(
            f"{mark} {row['name'][:51]:<52}{score.targets:>8}{score.recall:>8.1%}{_share(score.precision, score.mapped):>8}{score.exact / max(score.targets, 1):>7.0%}"
            f"{score.certain:>8}{score.certain_wrong or '':>6}{score.entries:>8}{row['shipped'] or '':>5}{score.seconds:>7.2f}"
            + (f"  {row['note']}" if row["note"] and not score.perfect else "")
            + (f"  ! {score.error}" if score.error else "")
        )
        for kind, names in (("other sources", score.certain_names), ("other values", score.certain_values)):
            if names:
                print(f"    CERTAIN AND WRONG, {kind}: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}")


def shown_totals(rows: Sequence[dict[str, Any]], among: Iterable[str]) -> None:
    groups = {group: [row for row in rows if row["group"] == group] for group in dict.fromkeys(row["group"] for row in rows)}
    for group, members in groups.items():
        print(f"\n{group}: {len(members)} pairs, {sum(next(iter(row['scores'].values())).targets for row in members)} tensors")
        print(
            f"  {'':<12}{'perfect':>12}{'recall':>8}{'precis.':>8}{'exact':>7}{'refused':>8}{'certain':>8}{'wrong':>6}{'entries / rule':>16}{'sec':>8}"
        )
        for who in among:
            t = total(members, who)
            ratio = f"{t['entries']}/{t['shipped']}={t['entries'] / t['shipped']:.1f}" if t["shipped"] else ""
            print(
                f"  {who:<12}{t['perfect']:>5} of {t['pairs']:>3}{t['recall']:>8.1%}{_share(t['precision'], t['mapped']):>8}{t['exact']:>7.0%}{t['refused']:>8}"
                f"{t['certain']:>8}{t['certain_wrong']:>6}{ratio:>16}{t['seconds']:>8.2f}"
            )
            if who == OURS:
                print(
                    "    wrong by level: "
                    + ", ".join(f"{level} {wrong} of {count}" for level, (count, wrong) in sorted(t["levels"].items()))
                )


def shown_families(rows: Sequence[dict[str, Any]], among: Sequence[str]) -> None:
    families = dict.fromkeys((row["group"], row["family"]) for row in rows if row["family"])
    if not families:
        return
    print("\nperfect pairs and recall by family")
    print(f"  {'':<24}" + "".join(f"{who:>18}" for who in among))
    for group, family in families:
        members = [row for row in rows if (row["group"], row["family"]) == (group, family)]
        totals = [total(members, who) for who in among]
        print(f"  {group:<9}{family:<15}" + "".join(f"{t['perfect']:>8} of {t['pairs']:<2}{t['recall']:>5.0%}" for t in totals))


def shown_negatives(rows: Sequence[dict[str, Any]], among: Sequence[str]) -> None:
    print(f"\nmust be refused{'':<23}" + "".join(f"{who:>12}" for who in among))
    for row in rows:
        marks = ["failed" if row["answers"][who]["error"] else "refused" if row["answers"][who]["refused"] else "ACCEPTED" for who in among]
        print(f"  {row['name']:<36}" + "".join(f"{mark:>12}" for mark in marks) + f"  {row['reason']}")
    counts = [sum(row["answers"][who]["refused"] for row in rows) for who in among]
    print(f"  {'refused, of ' + str(len(rows)):<36}" + "".join(f"{count:>12}" for count in counts))


def shown_ratios(rows: Sequence[dict[str, Any]], among: Sequence[str]) -> None:
    if OURS not in among or len(among) < 2 or not rows:
        return
    print("\nours to theirs, over all pairs")
    ours = total(rows, OURS)
    for who in among:
        if who != OURS:
            t = total(rows, who)
            ratios = [
                f"{word} ×{ours[word] / t[word]:.2f}" if t[word] else f"{word} {ours[word]:.4g} to 0"
                for word in ("perfect", "recall", "exact", "seconds")
            ]
            print(f"  {who:<12}{', '.join(ratios)}")


def main() -> int:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["tuned", "heldout", "negatives", "mutations"])
    parser.add_argument("--big", action="store_true", help="only large manifests: how long they take")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cases", type=Path, metavar="FOLDER", help="reference conversions to add, as scripts/cases.py takes them")
    parser.add_argument("--pair", default="", metavar="TEXT", help="only pairs whose name holds this")
    parser.add_argument(
        "--with", dest="who", action="append", default=[], metavar="NAME", help=f"only {OURS}, suffix, hungarian, alignment"
    )
    parser.add_argument("--text", action="store_true", help=f"print what {OURS} suggests")
    given = parser.parse_args()
    if given.big:
        large.shown()
        return 0
    if given.cases is not None and not given.cases.is_dir():
        parser.error(f"there is no folder {given.cases}")
    among = suggesters(given.who)
    unknown = [name for name in given.who if name not in among]
    if unknown:
        print(f"not here: {', '.join(unknown)}", file=sys.stderr)
        if not among:
            return 2
    elif OURS not in among and not given.who:
        print("ckptconv.suggest is not there: baselines only", file=sys.stderr)
    if "weightbridge" not in baselines.MATCHERS:
        print("weightbridge is not installed: left out", file=sys.stderr)

    def wanted(group: str, name: str) -> bool:
        return given.only in (None, group) and given.pair.lower() in name.lower()

    rows: list[dict[str, Any]] = []
    for pair in [*pairs(), *(cases(given.cases) if given.cases is not None else ())]:
        if wanted("heldout" if pair.held_out else "tuned", pair.name):
            group = "held out" if pair.held_out else "tuned"
            rows.append(judged(pair.name, group, pair.family, pair.rule, pair.build(), among, pair.note))
    rows.sort(key=lambda row: row["group"] == "held out")
    for mutation in mutations():
        if wanted("mutations", mutation.name):
            rows.append(judged(mutation.name, "mutations", "", "", mutation.build(), among))
    turned = [
        refused(negative.name, negative.reason, *negative.build(), among) for negative in negatives() if wanted("negatives", negative.name)
    ]
    if given.json:
        groups = {group: [row for row in rows if row["group"] == group] for group in dict.fromkeys(row["group"] for row in rows)}
        totals = {group: {who: total(members, who) for who in among} for group, members in groups.items()}
        plain = [{**row, "scores": {who: asdict(score) for who, score in row["scores"].items()}} for row in rows]
        print(json.dumps({"pairs": plain, "negatives": turned, "totals": totals}, ensure_ascii=False, indent=1))
    else:
        for row in rows if given.text else ():
            print(f"# {row['name']}\n{row['text']}")
        for who in among:
            if rows:
                shown_pairs(rows, who)
        shown_families(rows, list(among))
        shown_totals(rows, among)
        if turned:
            shown_negatives(turned, list(among))
        shown_ratios(rows, list(among))
    if OURS not in among:
        return 0
    bad = sum(row["scores"][OURS].certain_wrong for row in rows), sum(row["scores"][OURS].refused for row in rows)
    accepted = sum(not row["answers"][OURS]["refused"] for row in turned)
    return 1 if any(bad) or accepted else 0


if __name__ == "__main__":
    sys.exit(main())
