"""Compare runs, or the results of one run, on their held-out streams: which is better, and by what interval.

    sightline report RUN [RUN ...] [--result NAME] [--json OUT]     # RUN: a run_root
    python -m evals.report ...                                      # the same, in a checkout

Of one run all results are compared with its first, so `rl` with `sft`; of several runs one result each, with the first run's.
Exit status: 0, or 2 if a result cannot be read.

Invariants:
* "better" is said only where the interval of the difference excludes 0;
* what stands in the way of a comparison is said: other streams, other rewards, few streams.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evals.compare import FEW, METRICS, Estimate, Paired, difference, mean, of_category, paired
from evals.results import FOLDER, Kept, read_result
from streams.support.files import write_atomic
from streams.support.paths import user_path
from streams.support.strict_json import dumps
from streams.support.terminal import escape_unprintable_output, visible

USUAL = ("sft", "rl")
"""Results of a run's own stages, in their order."""


@dataclass(frozen=True)
class Labelled:
    """A result and what it is called in the report."""

    label: str
    kept: Kept


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report, and write it as JSON if asked to."""
    escape_unprintable_output()
    parser = argparse.ArgumentParser(prog="sightline report", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", type=user_path, help="run_root of a run that was evaluated")
    parser.add_argument("--result", help="which result of each run, for example sft (default: rl, or what there is)")
    parser.add_argument(
        "--json", metavar="OUT", type=user_path, help="write the report there, too; - is standard output, alone"
    )
    given = parser.parse_args(arguments)
    try:
        results = chosen(given.runs, given.result)
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    made = report(results)
    if given.json == Path("-"):
        print(dumps(made, indent=2))
        return
    show(Console(soft_wrap=True, highlight=False), made)
    if given.json:
        try:
            write_atomic(given.json, dumps(made, indent=2) + "\n")
        except OSError as error:
            print(f"report: {given.json} cannot be written: {error.strerror}", file=sys.stderr)
            raise SystemExit(2) from None


def chosen(runs: Sequence[Path], name: str | None) -> list[Labelled]:
    """Return the results to compare. Raises ValueError for a run without them."""
    if len(runs) == 1 and name is None:
        return [Labelled(found, read_result(path)) for found, path in _results(runs[0]).items()]
    made = []
    for run in runs:
        found = _results(run)
        usual = [known for known in reversed(USUAL) if known in found]
        own = name or (usual or [*found])[0]
        if own not in found:
            raise ValueError(f"{run}: there is no result {own!r}, only {', '.join(found)}")
        made.append(Labelled(f"{run} {own}" if len(set(runs)) > 1 else own, read_result(found[own])))
    return made


def _results(run: Path) -> dict[str, Path]:
    """Return the files of a run's results by name, those of its stages first."""
    paths = {path.stem: path for path in sorted((run / FOLDER).glob("*.json"))}
    if not paths:
        raise ValueError(
            f"{run}: there is no {FOLDER}/*.json: it is no run_root, or it was not evaluated since results are kept; "
            "job=eval makes them from its checkpoints"
        )
    own = [name for name in USUAL if name in paths]
    return {name: paths[name] for name in (*own, *(name for name in paths if name not in own))}


def report(results: Sequence[Labelled]) -> dict[str, Any]:
    """Return the means of all results, and each of the others compared with the first."""
    first = results[0]
    return {
        "results": [
            {"label": result.label, **{metric: _plain(mean(result.kept.streams, metric)) for metric in METRICS}}
            for result in results
        ],
        "comparisons": [_comparison(first, other) for other in results[1:]],
    }


def _comparison(first: Labelled, other: Labelled) -> dict[str, Any]:
    pair = paired(first.kept.streams, other.kept.streams)
    same = first.kept.reward == other.kept.reward
    found = {metric: difference(pair, metric) for metric in METRICS}
    categories = sorted({stream.category for stream in pair.before})
    deciding = found["reward" if same else "accuracy"]
    return {
        "before": first.label,
        "after": other.label,
        "verdict": _verdict(deciding),
        "by": "reward" if same else "accuracy",
        **{metric: _plain(estimate) for metric, estimate in found.items()},
        "accuracy_by_category": {
            name: _plain(difference(of_category(pair, name), "accuracy")) for name in categories if len(categories) > 1
        },
        "notes": _notes(pair, same=same),
    }


def _verdict(estimate: Estimate | None) -> str:
    if estimate is None:
        return "nothing to compare"
    if not estimate.shown:
        return "no difference shown"
    return "better" if estimate.value > 0 else "worse"


def _notes(pair: Paired, *, same: bool) -> list[str]:
    notes = []
    if pair.left_out:
        notes.append(f"{pair.left_out} streams that only one of the two watched are left out")
    if 0 < len(pair.before) < FEW:
        notes.append(f"with {len(pair.before)} streams the intervals are too narrow to be trusted")
    if not same:
        notes.append(
            "their rewards are defined differently: accuracy decides, and a difference in reward or timing says little"
        )
    if failed := sum(stream.failed for stream in (*pair.before, *pair.after)):
        notes.append(f"{failed} streams failed, and count as silent")
    return notes


def _plain(estimate: Estimate | None) -> dict[str, float | int] | None:
    return None if estimate is None else asdict(estimate)


def show(console: Console, made: dict[str, Any]) -> None:
    """Print a report: a table of the results, then each comparison in words."""
    table = Table(title="held-out streams, mean and 95 % interval", title_justify="left")
    table.add_column("")
    for result in made["results"]:
        table.add_column(Text(visible(result["label"])), justify="right")
    table.add_row("streams", *[str((result["reward"] or {}).get("streams", 0)) for result in made["results"]])
    for metric in METRICS:
        table.add_row(metric, *[_words(result[metric]) for result in made["results"]])
    console.print(table)
    for comparison in made["comparisons"]:
        before, after = (visible(comparison[key]) for key in ("before", "after"))
        verdict = {
            "better": f"{after} is better than {before}",
            "worse": f"{after} is worse than {before}",
            "no difference shown": f"no difference is shown between {after} and {before}",
            "nothing to compare": f"{after} and {before} have no stream in common",
        }[comparison["verdict"]]
        # Text: a label may hold what looks like the console's markup.
        console.print(Text(f"{verdict} (by {comparison['by']})"))
        rows = [(metric, comparison[metric]) for metric in METRICS]
        rows += [(f"accuracy, {name}", found) for name, found in comparison["accuracy_by_category"].items()]
        for name, found in rows:
            if found is not None:
                console.print(Text(f"  {visible(name)}: {_words(found, signed=True)}"))
        for note in comparison["notes"]:
            console.print(Text(f"  {note}"))


def _words(found: dict[str, Any] | None, *, signed: bool = False) -> str:
    if found is None:
        return "-"
    form = "+.3f" if signed else ".3f"
    return f"{found['value']:{form}} ({found['low']:{form}} to {found['high']:{form}})"


if __name__ == "__main__":
    main()
