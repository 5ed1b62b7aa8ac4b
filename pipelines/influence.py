"""`tracin influence`: proponents and opponents of each query."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.execution import run_pipeline
from pipelines.inputs import (
    BLOCK_ROWS,
    check_unchanged,
    describe_run,
    keras_extractor,
    open_inputs,
    query_factors,
    query_series,
)
from pipelines.outputs import open_output, shown, staged_output
from tracin_transforms.beam.extract import ExtractFactors, SharedExtractor
from tracin_transforms.beam.influence import ScoreInfluence, WriteInfluence
from tracin_transforms.examples.spec import parse_spec
from tracin_transforms.storage.factor_file import write_factor_block
from tracin_transforms.storage.manifest import write_manifest
from tracin_transforms.storage.results import read_result


def run(options: argparse.Namespace, beam_args: Sequence[str] = ()) -> str:
    """Runs the job and returns its summary for the user.

    Raises:
        InputError: An input or the output directory cannot be used.
    """
    inputs = open_inputs(options)
    query_source = parse_spec(options.queries)
    query_source.shards()
    asked = query_series(inputs.series, options.query_loss)
    described = describe_run(
        options,
        inputs.series,
        inputs.weights,
        examples=inputs.source.fingerprint(),
        queries=query_source.fingerprint(),
        query_loss=[asked.loss, asked.from_logits, dict(asked.loss_options)],
        k=options.k,
    )
    output = open_output(options, described)
    if done := output.already_done():
        return done
    extractor = SharedExtractor(keras_extractor(inputs.series, options))
    exact = keras_extractor(asked, options, float64=True)
    # Held from before the pipeline starts, see self_influence.
    with staged_output(output) as staging, extractor.loaded():
        queries = query_factors(query_source, exact.load())
        factors = staging.work / "queries.npz"
        write_factor_block(factors, queries)

        def build(pipeline: beam.Pipeline) -> None:
            _ = (
                pipeline
                | "Shards" >> beam.Create(inputs.shards)
                | ExtractFactors(inputs.source, extractor, BLOCK_ROWS, staging.progress)
                | ScoreInfluence(factors, inputs.weights, options.k)
                | WriteInfluence(factors, staging.result)
            )

        seconds = run_pipeline(build, beam_args, staging.progress, inputs.count)
        check_unchanged(inputs.source, described["examples"])
        rows = read_result(staging.result, "influence")
        fewer = _count_fewer(rows, options.k, len(queries))
        write_manifest(
            staging.result,
            described,
            {
                "examples": inputs.count,
                "queries": len(queries),
                "fewer_than_k": fewer,
                "seconds": seconds,
            },
        )
    return _summary(rows, options.k, len(queries), fewer, inputs.count / seconds, output.path)


def _count_fewer(rows: pa.Table, k: int, queries: int) -> dict[str, int]:
    """Returns for each direction how many queries have fewer than k rows."""
    full = rows.filter(pc.equal(rows["rank"], k))
    return {
        direction: queries - pc.sum(pc.equal(full["direction"], direction)).as_py()
        if len(full)
        else queries
        for direction in ("proponent", "opponent")
    }


def _summary(
    rows: pa.Table, k: int, queries: int, fewer: dict[str, int], rate: float, output: Path
) -> str:
    lines = [
        f"The {k} strongest proponents and opponents of each of {queries:,} queries "
        f"({rate:,.0f} training examples a second):"
    ]
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
    return "\n".join(
        [
            *lines,
            f"All of them: {output}/influence-*.parquet",
            "Next: compare the labels of a misread query's proponents with what they show.",
        ]
    )


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["influence", *sys.argv[1:]]))
