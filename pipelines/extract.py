"""`tracin extract`: fills a factor store."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import apache_beam as beam

from pipelines.execution import Progress, run_pipeline
from pipelines.inputs import BLOCK_ROWS, describe_gradients, keras_extractor
from pipelines.outputs import metrics_line, skipped_line, work_directory
from pipelines.training import FromExamples, known_count, open_training
from tracin_transforms.beam.extract import Extraction, SharedExtractor
from tracin_transforms.beam.store import WriteFactors
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import Shard
from tracin_transforms.storage.checkpoint_series import checkpoint_hash
from tracin_transforms.storage.factor_store import FactorStore, remove_store
from tracin_transforms.storage.files import any_path
from tracin_transforms.storage.sidecar import Sidecar
from tracin_transforms.storage.store_description import StoreDescription


def run(options: argparse.Namespace, beam_args: Sequence[str] = ()) -> str:
    """Runs the job and returns its summary for the user.

    Raises:
        InputError: An input or the store cannot be used.
    """
    training = open_training(options)
    assert isinstance(training, FromExamples)
    wanted = _described(training, options)
    directory = any_path(options.output).resolve()
    if options.overwrite:
        remove_store(directory)
    store = FactorStore.prepare(directory, wanted)
    stored = store.stored()
    groups = _groups(store, stored)
    if not groups and store.is_finished():
        return f"Already done: {store.directory} holds these gradient factors."
    metrics = [
        _fill(training, store, checkpoint_ids, shards, options, beam_args)
        for checkpoint_ids, shards in groups.items()
    ]
    training.check_unchanged()
    computed = {shard.name for shards in groups.values() for shard in shards}
    return _summary(store, store.finish(), metrics, len(computed))


def _described(training: FromExamples, options: argparse.Namespace) -> StoreDescription:
    series = training.series
    checkpoints = []
    for checkpoint in series.checkpoints:
        known = asdict(checkpoint)
        entry = {key: known[key] for key in ("id", "path", "step", "learning_rate")}
        checkpoints.append({**entry, "sha256": checkpoint_hash(checkpoint.path)})
    return StoreDescription(
        factors={
            **describe_gradients(options, series),
            "dtype": options.dtype,
            "examples": training.source.describe(),
        },
        checkpoints=tuple(checkpoints),
        shards=training.shards,
        loading={"model": options.model, "imports": options.imports, "network": series.model},
    )


def _groups(store: FactorStore, stored: dict[str, Sidecar]) -> dict[tuple[str, ...], list[Shard]]:
    """Returns the shards to compute, by the checkpoints that they lack."""
    lacking: dict[Shard, list[str]] = {}
    for checkpoint_id, shards in store.missing(store.description.checkpoint_ids, stored).items():
        for shard in shards:
            lacking.setdefault(shard, []).append(checkpoint_id)
    groups: dict[tuple[str, ...], list[Shard]] = {}
    for shard, checkpoint_ids in lacking.items():
        groups.setdefault(tuple(checkpoint_ids), []).append(shard)
    return groups


def _fill(
    training: FromExamples,
    store: FactorStore,
    checkpoint_ids: tuple[str, ...],
    shards: Sequence[Shard],
    options: argparse.Namespace,
    beam_args: Sequence[str],
) -> str:
    """Computes some shards at some checkpoints, and returns how it went."""
    at_hand = {checkpoint.id: checkpoint for checkpoint in training.series.checkpoints}
    for checkpoint_id in checkpoint_ids:
        if checkpoint_id not in at_hand:
            raise InputError(
                f"store {str(store.directory)!r} lacks factors of checkpoint {checkpoint_id!r} "
                f"for {len(shards)} shards (first: {shards[0].name}), and this command does not "
                "name that checkpoint: name all that the store has"
            )
    chosen = tuple(at_hand[checkpoint_id] for checkpoint_id in checkpoint_ids)
    series = replace(training.series, checkpoints=chosen)
    extractor = SharedExtractor(keras_extractor(series, options))
    to_do = {shard.name for shard in shards}
    kept = [sidecar for name, sidecar in store.stored().items() if name not in to_do]
    bad = sum(len(sidecar.bad) for sidecar in kept)
    done = sum(sidecar.count for sidecar in kept)
    total = known_count(shards)
    with work_directory(store.directory) as (_, notes), extractor.loaded():
        extraction = Extraction(
            training.source, extractor, BLOCK_ROWS, notes, options.max_bad_examples, bad
        )

        def build(pipeline: beam.Pipeline) -> None:
            write = WriteFactors(extraction, checkpoint_ids, store, options.dtype)
            _ = pipeline | "Shards" >> beam.Create(shards) | write

        progress = Progress(
            notes, None if total is None else done + total, done, options.shard_timeout
        )
        seconds = run_pipeline(build, beam_args, progress)
        size = sum(shard.size for shard in shards)
        skipped = len(notes.all_bad())
        return metrics_line(notes.examples(), size, seconds, skipped, notes.repeated())


def _summary(
    store: FactorStore, summary: dict[str, Any], metrics: Sequence[str], computed: int
) -> str:
    description = store.description
    shards, examples = len(description.shards), summary["examples"]
    kept = f", {shards - computed} of them from before" if computed < shards else ""
    return "\n".join(
        [
            f"Gradient factors of {examples:,} training examples at "
            f"{len(description.checkpoint_ids)} checkpoints, {summary['bytes'] / 1e6:,.1f} MB in "
            f"{shards} shard(s){kept}.",
            *metrics,
            *skipped_line(summary["skipped"], store.directory),
            f"Store: {store.directory}",
            f"Next: tracin influence --store {store.directory} --queries SPEC --output DIR",
        ]
    )


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["extract", *sys.argv[1:]]))
