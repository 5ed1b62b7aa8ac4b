"""`tracin influence`: proponents and opponents of each query."""

import argparse
import sys
from collections.abc import Sequence

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.execution import Progress, run_pipeline
from pipelines.outputs import (
    check_any,
    metrics_line,
    open_output,
    shown,
    skipped_line,
    staged_output,
)
from pipelines.queries import open_queries
from pipelines.training import open_training
from tracin_transforms.beam.influence import ScoreInfluence, WriteInfluence
from tracin_transforms.storage.factor_file import write_factor_block
from tracin_transforms.storage.files import AnyPath
from tracin_transforms.storage.manifest import write_manifest
from tracin_transforms.storage.results import read_result, write_skipped


def run(options: argparse.Namespace, beam_args: Sequence[str] = ()) -> str:
    """Runs the job and returns its summary for the user.

    Raises:
        InputError: An input or the output directory cannot be used.
    """
    training = open_training(options)
    asked = open_queries(options, training)
    described = training.described(**asked.described(), k=options.k)
    output = open_output(options, described)
    if done := output.already_done():
        return done
    with staged_output(output) as staging, training.ready() as ready:
        queries = asked.factors()
        factors = staging.work / "queries.npz"
        write_factor_block(factors, queries)

        def build(pipeline: beam.Pipeline) -> None:
            blocks = ready.blocks(pipeline, staging.notes)
            top = blocks | ScoreInfluence(factors, ready.weights, options.k)
            _ = top | WriteInfluence(factors, staging.result)

        progress = Progress(staging.notes, ready.count, shard_seconds=options.shard_timeout)
        seconds = run_pipeline(build, beam_args, progress)
        count, bad = ready.finished(staging.notes)
        check_any(count)
        rows = read_result(staging.result, "influence")
        fewer = _count_fewer(rows, options.k, len(queries))
        write_skipped(staging.result, bad)
        write_manifest(
            staging.result,
            described,
            {
                "examples": count,
                "skipped": len(bad),
                "queries": len(queries),
                "fewer_than_k": fewer,
                "seconds": seconds,
            },
        )
        metrics = metrics_line(count, ready.size, seconds, len(bad), staging.notes.repeated())
    text = _summary(rows, options.k, len(queries), fewer)
    notes = skipped_line(len(bad), output.path)
    if asked.skipped:
        notes.append(f"{asked.skipped:,} query examples could not be used: see their store.")
    return "\n".join([text, *notes, metrics, *_ending(output.path)])


def _count_fewer(rows: pa.Table, k: int, queries: int) -> dict[str, int]:
    """Returns for each direction how many queries have fewer than k rows."""
    full = rows.filter(pc.equal(rows["rank"], k))
    return {
        direction: queries - pc.sum(pc.equal(full["direction"], direction)).as_py()
        if len(full)
        else queries
        for direction in ("proponent", "opponent")
    }


def _summary(rows: pa.Table, k: int, queries: int, fewer: dict[str, int]) -> str:
    lines = [f"The {k} strongest proponents and opponents of each of {queries:,} queries:"]
    for row in rows.filter(pc.equal(rows["rank"], 1)).slice(0, 10).to_pylist():
        lines.append(
            f"  query {shown(row['query_id'])} (label {shown(row['query_label'])}, predicted "
            f"{shown(row['query_prediction'])}): first {row['direction']} "
            f"{shown(row['example_id'])} (label {shown(row['label'])}), "
            f"influence {row['influence']:.4g}"
        )
    for direction, count in fewer.items():
        if count:
            lines.append(
                f"{count:,} of {queries:,} queries have fewer than {k} {direction}s: no more "
                "training examples have an influence of that sign on them."
            )
    return "\n".join(lines)


def _ending(output: AnyPath) -> list[str]:
    return [
        f"All of them: {output}/influence-*.parquet",
        "Next: compare the labels of a misread query's proponents with what they show.",
    ]


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["influence", *sys.argv[1:]]))
