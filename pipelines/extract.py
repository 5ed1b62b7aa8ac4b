"""`tracin extract`: fills a factor store."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import apache_beam as beam

from pipelines.execution import Progress, run_pipeline
from pipelines.inputs import BLOCK_ROWS, describe_gradients, keras_extractor, wanted_sketch
from pipelines.outputs import WORK, metrics_line, skipped_line, work_directory
from pipelines.training import FromExamples, known_count, open_training
from tracin_transforms.beam.extract import Extraction, SharedExtractor
from tracin_transforms.beam.store import WriteFactors
from tracin_transforms.core.protocols import Shard
from tracin_transforms.core.sketching import Sketch
from tracin_transforms.storage.checkpoint_series import checkpoint_hash
from tracin_transforms.storage.factor_store import FactorStore, replaced_store
from tracin_transforms.storage.files import AnyPath, any_path, others_at_work
from tracin_transforms.storage.job_notes import JobNotes
from tracin_transforms.storage.sidecar import Sidecar
from tracin_transforms.storage.store_description import StoreDescription


def run(options: argparse.Namespace, beam_args: Sequence[str] = ()) -> str:
    """Runs the job and returns its summary for the user.

    Raises:
        InputError: An input or the store cannot be used.
    """
    sketch = wanted_sketch(options)
    training = open_training(options)
    assert isinstance(training, FromExamples)
    wanted = _described(training, options, sketch)
    directory = any_path(options.output).resolve()
    making_room = replaced_store(directory) if options.overwrite else contextlib.nullcontext()
    with making_room, work_directory(directory) as (work, _):
        store = FactorStore.prepare(directory, wanted, others_at_work(directory, WORK))
        groups = _groups(store, store.stored(whole=True))
        if not groups and store.is_finished():
            return f"Already done: {store.directory} holds these gradient factors."
        try:
            metrics = [
                _fill(training, store, checkpoint_ids, shards, options, beam_args, work)
                for checkpoint_ids, shards in groups.items()
            ]
        except KeyboardInterrupt:
            store.remove_temporary()
            raise
        training.check_unchanged()
        computed = {shard.name for shards in groups.values() for shard in shards}
        return _summary(store, store.finish(), metrics, len(computed))


def _described(
    training: FromExamples, options: argparse.Namespace, sketch: Sketch | None
) -> StoreDescription:
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
            **({} if sketch is None else {"sketch": sketch.to_json()}),
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
    work: AnyPath,
) -> str:
    """Computes some shards at some checkpoints, and returns how it went."""
    chosen = tuple(c for c in training.series.checkpoints if c.id in checkpoint_ids)
    series = replace(training.series, checkpoints=chosen)
    extractor = SharedExtractor(keras_extractor(series, options))
    to_do = {shard.name for shard in shards}
    kept = [sidecar for name, sidecar in store.stored().items() if name not in to_do]
    bad = sum(len(sidecar.bad) for sidecar in kept)
    done = sum(sidecar.count for sidecar in kept)
    total = known_count(shards)
    # Its own: another group's blocks have the same names.
    notes = JobNotes(work / f"notes-{len(checkpoint_ids)}-{checkpoint_ids[0]}")
    notes.create()
    with extractor.loaded():
        extraction = Extraction(
            training.source, extractor, BLOCK_ROWS, notes, options.max_bad_examples, bad
        )

        def build(pipeline: beam.Pipeline) -> None:
            write = WriteFactors(extraction, checkpoint_ids, store, options.dtype)
            _ = pipeline | "Shards" >> beam.Create(shards) | write

        progress = Progress(
            notes,
            None if total is None else done + total,
            done,
            options.shard_timeout,
            len(kept) + len(shards),
            len(kept),
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
    sketch = description.sketch
    what = "Gradient factors" if sketch is None else f"Sketches of {sketch.numbers:,} numbers"
    return "\n".join(
        [
            f"{what} of {examples:,} training examples at "
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
