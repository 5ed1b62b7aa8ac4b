"""`tracin self-influence`: ranks the training examples by self-influence."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import apache_beam as beam

from pipelines.execution import Progress, run_pipeline
from pipelines.outputs import (
    check_any,
    metrics_line,
    open_output,
    shown,
    skipped_line,
    staged_output,
)
from pipelines.training import FromStore, open_training
from tracin_transforms.beam.self_influence import ScoreSelfInfluence, ScoreStored
from tracin_transforms.storage.files import AnyPath
from tracin_transforms.storage.manifest import write_manifest
from tracin_transforms.storage.results import write_self_influence, write_skipped

# Rows of the ranking in the summary.
_SHOWN = 10


def run(options: argparse.Namespace, beam_args: Sequence[str] = ()) -> str:
    """Runs the job and returns its summary for the user.

    Raises:
        InputError: An input or the output directory cannot be used.
    """
    training = open_training(options)
    described = training.described()
    output = open_output(options, described)
    if done := output.already_done():
        return done
    with staged_output(output) as staging, training.ready() as ready:

        def build(pipeline: beam.Pipeline) -> None:
            if isinstance(ready, FromStore):
                names = pipeline | "Shards" >> beam.Create(ready.shard_names)
                _ = names | ScoreStored(
                    ready.store, ready.checkpoint_ids, ready.weights, staging.work
                )
            else:
                blocks = ready.blocks(pipeline, staging.notes)
                _ = blocks | ScoreSelfInfluence(ready.weights, staging.work)

        progress = Progress(staging.notes, ready.count, shard_seconds=options.shard_timeout)
        seconds = run_pipeline(build, beam_args, progress)
        count, bad = ready.finished(staging.notes)
        check_any(count)
        top = write_self_influence(staging.work, staging.result, count, _SHOWN)
        write_skipped(staging.result, bad)
        summary = {"examples": count, "skipped": len(bad), "seconds": seconds}
        write_manifest(staging.result, described, summary)
        size = 0 if isinstance(ready, FromStore) else ready.size
        metrics = metrics_line(count, size, seconds, len(bad), staging.notes.repeated())
    return _summary(top, [*skipped_line(len(bad), output.path), metrics], count, output.path)


def _summary(
    top: list[dict[str, Any]], how_it_went: Sequence[str], count: int, output: AnyPath
) -> str:
    lines = [
        f"Self-influence of {count:,} training examples, highest first:",
        f"  {'rank':>4}  {'self-influence':>14}  {'label':>5}  {'predicted':>9}  example",
    ]
    for row in top:
        lines.append(
            f"  {row['rank']:>4}  {row['self_influence']:>14.6g}  {shown(row['label']):>5}  "
            f"{shown(row['prediction']):>9}  {shown(row['example_id'])}"
        )
    return "\n".join(
        [
            *lines,
            *how_it_went,
            f"All of them, in this order: {output}/self_influence-*.parquet",
            "Next: look at the first ones; wrong labels and odd examples gather there.",
        ]
    )


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["self-influence", *sys.argv[1:]]))
