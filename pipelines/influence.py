"""`tracin influence`: proponents and opponents of each query."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.outputs import (
    check_any,
    metrics_line,
    open_output,
    shown,
    skipped_line,
    staged_output,
)
from pipelines.passes import Pass, Passes
from pipelines.queries import kept_of_each, open_queries
from pipelines.rescoring import open_rescoring
from pipelines.training import Training, open_training
from tracin_transforms.storage.files import AnyPath
from tracin_transforms.storage.manifest import write_manifest
from tracin_transforms.storage.results import join_influence, read_result, write_skipped


def run(options: argparse.Namespace, beam_args: Sequence[str] = ()) -> str:
    """Runs the job and returns its summary for the user.

    Raises:
        InputError: An input or the output directory cannot be used.
    """
    training = open_training(options)
    asked = open_queries(options, training)
    rescoring = open_rescoring(options, training, asked)
    more = {} if rescoring is None else rescoring.described()
    more |= {"score_matrix": True} if options.score_matrix else {}
    described = training.described(**asked.described(), k=options.k, **more)
    output = open_output(options, described)
    if done := output.already_done():
        return done
    with staged_output(output) as staging, training.ready() as ready:
        passes = Passes(options, beam_args, ready, asked, rescoring, staging).run()
        count, bad = ready.finished(passes[0].notes)
        check_any(count)
        rows = join_influence([found.directory for found in passes], staging.result)
        write_skipped(staging.result, bad)
        facts = _facts(passes, count, len(bad), options)
        write_manifest(staging.result, described, facts)
        repeated = sum(found.notes.repeated() for found in passes)
        read = (count * len(passes), ready.size * len(passes))
        metrics = metrics_line(*read, facts["seconds"], len(bad), repeated)
    notes = [
        *_shares(facts, options),
        *_estimates(facts, training, options),
        *skipped_line(len(bad), output.path),
    ]
    if asked.skipped:
        notes.append(f"{asked.skipped:,} query examples could not be used: see their store.")
    ending = _ending(output.path, options.score_matrix)
    return "\n".join([_summary(rows, options.k, facts), *notes, metrics, *ending])


def _facts(
    passes: Sequence[Pass], count: int, skipped: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Returns what is worth knowing of a result, for its manifest and summary.

    Args:
        passes: That were made.
        count: Number of training examples.
        skipped: How many could not be used.
        options: The command's.
    """
    queries = sum(found.queries for found in passes)
    facts = {
        "examples": count,
        "skipped": skipped,
        "queries": queries,
        "without_gradient": sum(found.without_gradient for found in passes),
        "fewer_than_k": _count_fewer([found.directory for found in passes], options.k, queries),
        "passes": len(passes),
        "scored_share": sum(found.pairs for found in passes) / (count * queries),
        "seconds": sum(found.seconds for found in passes),
    }
    if options.rescore is not None:
        facts["rescored_pairs"] = sum(found.rescored_pairs for found in passes)
        facts["rescoring_seconds"] = sum(found.rescoring_seconds for found in passes)
    return facts


def _count_fewer(parts: Sequence[AnyPath], k: int, queries: int) -> dict[str, int]:
    """Returns for each direction how many queries have fewer than k rows."""
    fewer = dict.fromkeys(("proponent", "opponent"), queries)
    for part in parts:
        rows = read_result(part, "influence", ["rank", "direction"])
        full = rows.filter(pc.equal(rows["rank"], k))
        for direction in fewer:
            fewer[direction] -= pc.sum(pc.equal(full["direction"], direction)).as_py() or 0
    return fewer


def _shares(facts: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """Returns what the summary says of how the queries were answered."""
    lines = []
    if options.store is not None and options.prune:
        share = facts["scored_share"]
        lines.append(
            f"{share:.1%} of all pairs were multiplied; the others cannot be among the strongest."
            if share < 1
            else "All pairs were multiplied: any could be among the strongest."
        )
    if facts["passes"] > 1:
        lines.append(f"The queries took {facts['passes']} passes over the store.")
    return lines


def _estimates(facts: dict[str, Any], training: Training, options: argparse.Namespace) -> list[str]:
    """Returns what the summary says of influences from sketches."""
    if training.sketch is None:
        return []
    sketches = f"sketches of {training.sketch.numbers:,} numbers"
    if options.rescore is None:
        return [f"Influences are estimates from {sketches}; --rescore makes them exact."]
    return [
        f"Found by {sketches}: the {kept_of_each(options):,} strongest of each query and "
        f"direction, {facts['rescored_pairs']:,} pairs. They were scored again in "
        f"{facts['rescoring_seconds']:,.1f} s: influences are exact."
    ]


def _summary(first: pa.Table, k: int, facts: dict[str, Any]) -> str:
    queries = facts["queries"]
    lines = [f"The {k} strongest proponents and opponents of each of {queries:,} queries:"]
    for row in first.to_pylist():
        lines.append(
            f"  query {shown(row['query_id'])} (label {shown(row['query_label'])}, predicted "
            f"{shown(row['query_prediction'])}): first {row['direction']} "
            f"{shown(row['example_id'])} (label {shown(row['label'])}), "
            f"influence {row['influence']:.4g}"
        )
    if facts["without_gradient"]:
        lines.append(
            f"{facts['without_gradient']:,} of {queries:,} queries have a gradient of 0, as those "
            "that are fitted perfectly: no training example has influence on them."
        )
    for direction, count in facts["fewer_than_k"].items():
        count -= facts["without_gradient"]
        if count:
            among = "on the shortlist " if "rescored_pairs" in facts else ""
            lines.append(
                f"{count:,} of {queries:,} queries have fewer than {k} {direction}s: no more "
                f"training examples {among}have an influence of that sign on them."
            )
    return "\n".join(lines)


def _ending(output: AnyPath, score_matrix: bool) -> list[str]:
    return [
        f"All of them: {output}/influence-*.parquet",
        *([f"All scores: {output}/scores-*.parquet"] if score_matrix else []),
        "Next: compare the labels of a misread query's proponents with what they show.",
    ]


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["influence", *sys.argv[1:]]))
