"""`tracin influence`: proponents and opponents of each query."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.execution import Progress, run_pipeline, threads_per_process
from pipelines.outputs import (
    Staging,
    check_any,
    metrics_line,
    open_output,
    shown,
    skipped_line,
    staged_output,
)
from pipelines.queries import Asked, groups, kept_of_each, open_queries
from pipelines.rescoring import Rescoring, open_rescoring
from pipelines.training import FromExamples, FromStore, Training, open_training
from tracin_transforms.beam.influence import (
    Question,
    ScoreInfluence,
    ScoreStoredInfluence,
    WriteInfluence,
    WriteScoreMatrix,
    read_pairs,
)
from tracin_transforms.beam.store import ReadFactors
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.influence import absolute_gradient_norms, with_gradient
from tracin_transforms.storage.factor_file import write_factor_block
from tracin_transforms.storage.files import AnyPath
from tracin_transforms.storage.job_notes import JobNotes
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
        job = _Job(options, beam_args, ready, asked, rescoring, staging)
        passes = [job.pass_over(group) for group in job.groups()]
        count, bad = ready.finished(passes[0].notes)
        check_any(count)
        parts = [found.directory for found in passes]
        rows = join_influence(parts, staging.result)
        write_skipped(staging.result, bad)
        queries = sum(found.queries for found in passes)
        seconds = sum(found.seconds for found in passes)
        facts = {
            "examples": count,
            "skipped": len(bad),
            "queries": queries,
            "without_gradient": sum(found.without_gradient for found in passes),
            "fewer_than_k": _count_fewer(parts, options.k, queries),
            "passes": len(passes),
            "scored_share": sum(found.pairs for found in passes) / (count * queries),
            "seconds": seconds,
        }
        if rescoring is not None:
            facts["rescored_pairs"] = sum(found.rescored_pairs for found in passes)
            facts["rescoring_seconds"] = sum(found.rescoring_seconds for found in passes)
        write_manifest(staging.result, described, facts)
        repeated = sum(found.notes.repeated() for found in passes)
        size = ready.size * len(passes)
        metrics = metrics_line(count * len(passes), size, seconds, len(bad), repeated)
    notes = [
        *_shares(facts, options),
        *_estimates(facts, training, options),
        *skipped_line(len(bad), output.path),
    ]
    if asked.skipped:
        notes.append(f"{asked.skipped:,} query examples could not be used: see their store.")
    ending = _ending(output.path, options.score_matrix)
    return "\n".join([_summary(rows, options.k, facts), *notes, metrics, *ending])


@dataclass(frozen=True, eq=False)
class _Pass:
    """A pass over the training examples for some of the queries.

    Attributes:
        directory: Has what `WriteInfluence` writes of the strongest pairs.
        notes: Of its processes.
        queries: Number of queries.
        without_gradient: How many of them have no gradient.
        pairs: How many pairs were scored.
        seconds: What the pipeline took.
        rescored_pairs: How many pairs of a shortlist were scored again.
        rescoring_seconds: What that took.
    """

    directory: AnyPath
    notes: JobNotes
    queries: int
    without_gradient: int
    pairs: int
    seconds: float
    rescored_pairs: int = 0
    rescoring_seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class _Group:
    """Queries of one pass, in files: in memory they are once, in each worker process.

    Attributes:
        work: Directory of the pass.
        count: Number of queries.
        without_gradient: How many of them have no gradient.
    """

    work: AnyPath
    count: int
    without_gradient: int

    @property
    def asked(self) -> AnyPath:
        """File with the gradient factors that are asked about, as the store has its own."""
        return self.work / "queries.npz"

    @property
    def exact(self) -> AnyPath:
        """File with the gradient factors themselves, where they are to be scored again."""
        return self.work / "exact.npz"


@dataclass(frozen=True, eq=False)
class _Job:
    """What all passes share.

    Attributes:
        options: The command's.
        beam_args: Beam's options.
        ready: The training examples.
        asked: The queries.
        rescoring: How the strongest are scored again, or None.
        staging: Where results go.
    """

    options: argparse.Namespace
    beam_args: Sequence[str]
    ready: Training
    asked: Asked
    rescoring: Rescoring | None
    staging: Staging

    def groups(self) -> Iterator[_Group]:
        """Yields the queries of each pass.

        Raises:
            InputError: They are more than one pass has room for, and each pass would compute the
                training examples' factors anew.
        """
        found = groups(self.asked.blocks(), kept_of_each(self.options))
        if isinstance(self.ready, FromExamples):
            found = self._only_one(found)
        for i, queries in enumerate(found):
            group = self._written(queries, self.staging.work / f"pass-{i:05d}")
            del queries
            yield group

    def _only_one(self, found: Iterator[FactorBlock]) -> Iterator[FactorBlock]:
        first = next(found)
        if next(found, None) is not None:
            raise InputError(
                f"--queries {self.options.queries!r} with --k {self.options.k}: more than memory "
                "has room for in one pass over the training examples: store their gradient factors "
                "first, with 'tracin extract', and ask with --store, which takes queries in groups"
            )
        yield first

    def _written(self, queries: FactorBlock, work: AnyPath) -> _Group:
        work.mkdir(parents=True, exist_ok=True)
        # On a query without gradient nothing has influence: it need not be asked, if others are.
        has_gradient = with_gradient(absolute_gradient_norms(queries), self.ready.weights)
        group = _Group(work, len(queries), int((~has_gradient).sum()))
        some = queries.rows(has_gradient) if has_gradient.any() else queries
        write_factor_block(group.asked, self.asked.as_stored(some))
        if self.rescoring is not None:
            write_factor_block(group.exact, some)
        return group

    def pass_over(self, group: _Group) -> _Pass:
        """Makes a pass for a group of queries."""
        work = group.work
        notes = JobNotes(work / "notes")
        notes.create()
        kept, threads = kept_of_each(self.options), threads_per_process(self.beam_args)
        question = Question(group.asked, self.ready.weights, kept, threads)
        timeout = self.options.shard_timeout
        progress = Progress(notes, self.ready.count, shard_seconds=timeout)
        seconds = run_pipeline(
            lambda pipeline: self._build(pipeline, question, work, notes), self.beam_args, progress
        )
        pairs = read_pairs(work)
        found = _Pass(work, notes, group.count, group.without_gradient, pairs, seconds)
        if self.rescoring is None:
            return found
        again = replace(question, queries=group.exact, k=self.options.k)
        pairs, seconds = self.rescoring.run(again, work, self.beam_args)
        return replace(
            found, directory=work / "again", rescored_pairs=pairs, rescoring_seconds=seconds
        )

    def _build(
        self, pipeline: beam.Pipeline, question: Question, work: AnyPath, notes: JobNotes
    ) -> None:
        ready = self.ready
        if isinstance(ready, FromStore):
            score = ScoreStoredInfluence(
                question, ready.store, ready.checkpoint_ids, self.options.prune, notes
            )
            names = ready.names(pipeline)
            top = names | score
        else:
            blocks = ready.blocks(pipeline, notes)
            top = blocks | ScoreInfluence(question)
        _ = top | WriteInfluence(question.queries, work)
        if self.options.score_matrix:
            if isinstance(ready, FromStore):
                blocks = names | ReadFactors(ready.store, ready.checkpoint_ids)
            _ = blocks | WriteScoreMatrix(question, self.staging.result)


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
        lines.append(
            f"{facts['scored_share']:.1%} of all pairs were multiplied; the others cannot be among "
            "the strongest."
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
