"""`tracin self-influence`: ranks the training examples by self-influence."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam

from pipelines.execution import run_pipeline
from pipelines.inputs import BLOCK_ROWS, check_unchanged, describe_run, keras_extractor, open_inputs
from pipelines.outputs import open_output, shown, staged_output
from tracin_transforms.beam.extract import ExtractFactors, SharedExtractor
from tracin_transforms.beam.self_influence import ScoreSelfInfluence
from tracin_transforms.storage.manifest import write_manifest
from tracin_transforms.storage.results import write_self_influence


def run(options: argparse.Namespace, beam_args: Sequence[str] = ()) -> str:
    """Runs the job and returns its summary for the user.

    Raises:
        InputError: An input or the output directory cannot be used.
    """
    inputs = open_inputs(options)
    described = describe_run(
        options, inputs.series, inputs.weights, examples=inputs.source.fingerprint()
    )
    output = open_output(options, described)
    if done := output.already_done():
        return done
    extractor = SharedExtractor(keras_extractor(inputs.series, options))
    # Held from before the pipeline starts: a bad checkpoint is an error of this process, and
    # workers that are threads of it find the models loaded.
    with staged_output(output) as staging, extractor.loaded():

        def build(pipeline: beam.Pipeline) -> None:
            _ = (
                pipeline
                | "Shards" >> beam.Create(inputs.shards)
                | ExtractFactors(inputs.source, extractor, BLOCK_ROWS, staging.progress)
                | ScoreSelfInfluence(inputs.weights, staging.work)
            )

        seconds = run_pipeline(build, beam_args, staging.progress, inputs.count)
        check_unchanged(inputs.source, described["examples"])
        ranking = write_self_influence(staging.work, staging.result, inputs.count)
        write_manifest(staging.result, described, {"examples": inputs.count, "seconds": seconds})
    return _summary(ranking.slice(0, 10).to_pylist(), inputs.count, seconds, output.path)


def _summary(top: list[dict[str, Any]], count: int, seconds: float, output: Path) -> str:
    lines = [
        f"Self-influence of {count:,} training examples ({count / seconds:,.0f} a second), "
        "highest first:",
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
            f"All of them, in this order: {output}/self_influence-*.parquet",
            "Next: look at the first ones; wrong labels and odd examples gather there.",
        ]
    )


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["self-influence", *sys.argv[1:]]))
