"""The second stage of `tracin influence --rescore`: a shortlist by sketches, scored exactly."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam

from pipelines.execution import Progress, run_pipeline
from pipelines.queries import Asked, check_same, kept_of_each
from pipelines.training import Training
from tracin_transforms.beam.influence import (
    Question,
    RescoreShortlist,
    WriteInfluence,
    read_pairs,
)
from tracin_transforms.core.errors import InputError
from tracin_transforms.storage.factor_file import read_factor_block
from tracin_transforms.storage.factor_store import FactorStore
from tracin_transforms.storage.files import AnyPath
from tracin_transforms.storage.job_notes import JobNotes
from tracin_transforms.storage.rescoring import Shortlist, lacking


@dataclass(frozen=True, eq=False)
class Rescoring:
    """How a shortlist is scored again.

    Attributes:
        options: The command's.
        store: Has the gradient factors themselves.
        checkpoint_ids: The checkpoints of the job, in order.
        count: Number of examples in the store.
    """

    options: argparse.Namespace
    store: FactorStore
    checkpoint_ids: tuple[str, ...]
    count: int

    def described(self) -> dict[str, Any]:
        """Returns what determines the stage's result, for a manifest."""
        document = self.store.description.to_json()
        return {
            "rescore": {key: document[key] for key in ("factors", "shards")},
            "shortlist": kept_of_each(self.options),
        }

    def run(
        self, question: Question, found: AnyPath, beam_args: Sequence[str]
    ) -> tuple[int, float]:
        """Scores a shortlist, and writes the strongest of it as `WriteInfluence` does.

        The result goes to a directory ``again`` beside the shortlist.

        Args:
            question: With the gradient factors themselves of the queries of the first stage.
            found: Directory of the first stage's result.
            beam_args: Beam's options.

        Returns:
            The number of pairs on the shortlist, and the seconds that it took.

        Raises:
            InputError: The store lacks an example of the shortlist.
        """
        work = found / "again"
        notes = JobNotes(work / "notes")
        notes.create()

        def build(pipeline: beam.Pipeline) -> None:
            names = [shard.name for shard in self.store.description.shards]
            rescore = RescoreShortlist(question, self.store, self.checkpoint_ids, found, notes)
            top = pipeline | "Shards" >> beam.Create(names) | rescore
            _ = top | WriteInfluence(question, work)

        progress = Progress(notes, self.count, shard_seconds=self.options.shard_timeout)
        seconds = run_pipeline(build, beam_args, progress)
        shortlist = Shortlist.read(found, read_factor_block(question.queries))
        if read_pairs(work) < len(shortlist):
            missing = lacking(self.store, shortlist.example_ids).tolist()
            raise InputError(
                f"--rescore {self.options.rescore!r} lacks {len(missing)} of the "
                f"{len(shortlist.example_ids)} examples on the shortlist (first: {missing[0]!r}): "
                "expected a store of the same examples as in --store"
            )
        return len(shortlist), seconds


def open_rescoring(
    options: argparse.Namespace, training: Training, asked: Asked
) -> Rescoring | None:
    """Reads and validates what the options say of scoring a shortlist again; None if nothing.

    Raises:
        InputError: The store does not fit the training examples or queries.
    """
    if options.rescore is None:
        return None
    name = f"--rescore {options.rescore!r}"
    if training.sketch is None:
        raise InputError(
            f"{name}: store {options.store!r} holds gradient factors themselves, whose influence "
            "need not be computed again: leave it out"
        )
    if asked.sketch is None:
        raise InputError(
            f"{name}: the queries in {options.queries!r} are sketches: expected the query "
            "examples, or a store without --sketch"
        )
    store = FactorStore.open(options.rescore)
    if store.description.sketch is not None:
        raise InputError(f"{name}: it holds sketches, too: expected a store without --sketch")
    checkpoint_ids = check_same(store, training, name)
    count = sum(sidecar.count for sidecar in store.stored().values())
    return Rescoring(options, store, checkpoint_ids, count)
