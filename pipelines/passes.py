"""The passes over the training examples that it takes to answer queries."""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import apache_beam as beam

from pipelines.execution import Progress, run_pipeline, threads_per_process
from pipelines.outputs import Staging
from pipelines.queries import Asked, groups, kept_of_each
from pipelines.rescoring import Rescoring
from pipelines.training import FromExamples, FromStore, Training
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


@dataclass(frozen=True, eq=False)
class Pass:
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
class Passes:
    """The passes over the training examples that it takes to answer the queries.

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

    def run(self) -> list[Pass]:
        """Makes them, one after the other.

        Raises:
            InputError: There are no queries; or more than one pass has room for, where there can
                be but one.
        """
        found = [self._pass_over(group) for group in self._groups()]
        if not found:
            raise InputError(
                f"--queries {self.options.queries!r}: no query example can be used: expected at "
                "least one"
            )
        return found

    def _groups(self) -> Iterator[_Group]:
        found = groups(self.asked.blocks(), kept_of_each(self.options))
        if isinstance(self.ready, FromExamples):
            found = self._only_one(
                found,
                "store their gradient factors first, with 'tracin extract', and ask with --store, "
                "which takes queries in groups",
            )
        elif self.options.score_matrix:
            found = self._only_one(found, "ask fewer at a time, or leave out --score-matrix")
        # Not `enumerate`, which holds on to what it gave last.
        number = itertools.count()
        for queries in found:
            group = self._written(queries, self.staging.work / f"pass-{next(number):05d}")
            del queries
            yield group

    def _only_one(self, found: Iterator[FactorBlock], what_to_do: str) -> Iterator[FactorBlock]:
        """Yields the only group, before whose pass it is known that there is no other."""
        first = list(itertools.islice(found, 2))
        if len(first) > 1:
            raise InputError(
                f"--queries {self.options.queries!r} with --k {self.options.k}: more than memory "
                f"has room for in one pass over the training examples: {what_to_do}"
            )
        yield from first

    def _written(self, queries: FactorBlock, work: AnyPath) -> _Group:
        work.mkdir(parents=True, exist_ok=True)
        # On a query without gradient nothing has influence: it need not be asked, if others are,
        # but in a matrix it has a column.
        has_gradient = with_gradient(absolute_gradient_norms(queries), self.ready.weights)
        group = _Group(work, len(queries), int((~has_gradient).sum()))
        is_asked = has_gradient.any() and not self.options.score_matrix
        some = queries.rows(has_gradient) if is_asked else queries
        write_factor_block(group.asked, self.asked.as_stored(some))
        if self.rescoring is not None:
            write_factor_block(group.exact, some)
        return group

    def _pass_over(self, group: _Group) -> Pass:
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
        found = Pass(work, notes, group.count, group.without_gradient, pairs, seconds)
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
        _ = top | WriteInfluence(question, work)
        if self.options.score_matrix:
            if isinstance(ready, FromStore):
                blocks = names | ReadFactors(ready.store, ready.checkpoint_ids)
            _ = blocks | WriteScoreMatrix(question, self.staging.result)
