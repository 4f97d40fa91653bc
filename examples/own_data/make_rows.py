"""Rows from a table with one question a line: docs/data.md explains it."""

import csv
from pathlib import Path

import sightline  # an installed Sightline: makes its packages importable
from streams.data.dataset import write_tasks
from streams.task import ExpectedAnswer, StreamTask, TimedQuery

folder = Path("videos")
tasks = []
for i, row in enumerate(csv.DictReader((folder / "questions.csv").open())):
    query = TimedQuery(float(row["asked"]), row["question"])
    answer = ExpectedAnswer(float(row["due"]), row["answer"], kind="text")
    tasks.append(StreamTask(f"q{i}", str(folder / row["file"]), 0.0, float("inf"), (query,), (answer,)))
write_tasks(folder / "train.jsonl", tasks)
