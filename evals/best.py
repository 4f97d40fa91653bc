"""Which metric `eval.best` names, checked against the held-out rows before anything starts.

Pure.

Invariants:
* a run that keeps its best checkpoint has the metric that decides which one it is.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace

from conf.schema import RunConfig
from evals.categories import ALL, category_name
from runtime.tracking.metric_names import metric_name
from streams.data.synthetic.questions import MODES
from streams.task import StreamTask

ACCURACY = "accuracy_"
SHOWN = 30
"""Names that an error lists at most."""


def evaluated(config: RunConfig, tasks: Sequence[StreamTask]) -> Sequence[StreamTask]:
    """Return the held-out tasks that an evaluation while training watches."""
    return tasks[: config.eval.tasks] if config.eval.tasks else tasks


def best_metric(config: RunConfig, categories: Iterable[str]) -> str:
    """Return the metric by which `checkpoints/rl/best` is chosen: `eval.best` as it is logged, below `eval/`.

    categories: those of the rows that are evaluated. An accuracy may be given by the category as the rows spell it or by
    its metric's name. Raises ValueError, with the names that there are, if no evaluation would have it.
    """
    given = config.eval.best
    names = ["reward", "timing", *(ACCURACY + name for name in (ALL, *sorted(set(map(category_name, categories)))))]
    logged = [metric_name(f"eval/{name}") for name in names]
    # As the rows spell it first: a category may be called like another one's chart.
    for spelled in (names, [metric.removeprefix("eval/") for metric in logged]):
        if given in spelled:
            return logged[spelled.index(given)]
    # An accent may be typed composed where the rows have it in two characters.
    alike = [metric for name, metric in zip(names, logged, strict=True) if _composed(name) == _composed(given)]
    if len(alike) == 1:
        return alike[0]
    # What cannot be seen is listed as its metric is written.
    names = [n if n.isprintable() else m.removeprefix("eval/") for n, m in zip(names, logged, strict=True)]
    close = [n for n in names if n == ACCURACY + given] or difflib.get_close_matches(given, names, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    rows = f"the first {config.eval.tasks} held-out rows (eval.tasks)" if config.eval.tasks else "the held-out rows"
    raise ValueError(
        f"eval.best={given!r}: no evaluation while training has that{hint}; {rows} give {', '.join(names[:SHOWN])}{more}"
    )


def check_best(config: RunConfig, tasks: Sequence[StreamTask] | None) -> None:
    """Raise ValueError if no evaluation has what `eval.best` names. tasks: held-out rows, None = generated ones."""
    if config.eval.every and "rl" in config.job.stages:
        best_metric(config, MODES if tasks is None else [task.category for task in evaluated(config, tasks)])


def named_best(config: RunConfig, heldout: Sequence[StreamTask]) -> RunConfig:
    """Return the config with `eval.best` as its metric is logged, below `eval/`. Raises ValueError (`best_metric`)."""
    if not config.eval.every or not heldout:
        return config
    metric = best_metric(config, [task.category for task in evaluated(config, heldout)])
    return replace(config, eval=replace(config.eval, best=metric.removeprefix("eval/")))


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)
