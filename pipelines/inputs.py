"""What a job starts from: checkpoints, their weights, models, queries."""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines.stderr import captured_stderr
from tracin_transforms.core.checkpoints import CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.losses import LOSSES, QUERY_LOSSES
from tracin_transforms.core.protocols import (
    ExampleSource,
    FactorExtractor,
    LoadedExtractor,
)
from tracin_transforms.core.sketching import Sketch
from tracin_transforms.core.specs import parse_loss
from tracin_transforms.examples.spec import parse_spec
from tracin_transforms.storage.checkpoint_series import (
    checkpoint_hash,
    is_run,
    read_checkpoint_series,
    series_of_files,
)
from tracin_transforms.storage.files import existing_file, sha256

# Rows that are extracted and scored together: large enough for matrix products at full speed.
BLOCK_ROWS = 2048


def open_series(options: argparse.Namespace) -> CheckpointSeries:
    """Returns the checkpoints of a run's directory, or those of plain files.

    Raises:
        InputError: They cannot be read, or what should be said of them is not, or twice.
    """
    described = {
        "--loss": options.loss,
        "--learning-rates": options.learning_rates,
        "--model-output": options.model_output,
    }
    if is_run(options.checkpoints):
        series = read_checkpoint_series(options.checkpoints)
        given = [flag for flag, value in described.items() if value is not None]
        if given:
            raise InputError(
                f"{given[0]} is for checkpoint files without checkpoints.json, but "
                f"{options.checkpoints!r} has one: change it there"
            )
        return series
    if options.loss is None:
        raise InputError(
            f"--checkpoints {options.checkpoints!r} are files that do not say how they were "
            "trained: expected the directory of a training run, or --loss as in "
            "--loss 'sparse_categorical_crossentropy?from_logits=true'"
        )
    loss = parse_loss(options.loss)
    return series_of_files(
        options.checkpoints,
        options.learning_rates,
        loss=loss.name,
        from_logits=loss.from_logits,
        loss_options=loss.options,
        output=options.model_output,
    )


def weighted_series(series: CheckpointSeries, weights: str) -> tuple[CheckpointSeries, np.ndarray]:
    """Returns the checkpoints to use, and their weights, shape [K].

    Args:
        series: The run.
        weights: ``recorded``, ``equal``, or a JSON file with weights by checkpoint id.

    Raises:
        InputError: The file cannot be read, or does not fit the run.
    """
    if weights in ("recorded", "equal"):
        return series, series.weights(weights)
    file = existing_file(weights, "--checkpoint-weights: expected recorded, equal or a file; file")
    try:
        by_id = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(by_id, dict):
            raise InputError(f"expected an object of weights by checkpoint id, found {by_id!r:.60}")
        return series.chosen(by_id)
    except ValueError as error:
        raise InputError(f"--checkpoint-weights {weights!r}: {error}") from error


def query_series(series: CheckpointSeries, query_loss: str | None) -> CheckpointSeries:
    """Returns the run as its queries are asked about it.

    Raises:
        InputError: The loss is not of the form that `core.specs` reads.
    """
    if query_loss is None:
        return series
    loss = parse_loss(query_loss)
    from_logits = loss.from_logits
    known = LOSSES.get(loss.name) or QUERY_LOSSES.get(loss.name)
    if from_logits is None and known is not None and known.end:
        # The model's end is that of the training loss.
        from_logits = series.from_logits
        if from_logits is None:
            raise InputError(
                f"--query-loss {query_loss!r}: whether the model ends in logits does not follow "
                f"from the training loss {series.loss!r}: expected '{loss.name}?from_logits=true' "
                "or =false"
            )
    return replace(
        series,
        loss=loss.name,
        from_logits=from_logits,
        loss_options=loss.options,
        class_weights={},
    )


def describe_run(
    options: argparse.Namespace, series: CheckpointSeries, weights: np.ndarray, **more: Any
) -> dict[str, Any]:
    """Returns what determines a result, for its manifest. Batch and shard sizes do not.

    Args:
        options: The command's.
        series: The checkpoints.
        weights: Weight of each, shape [K].
        more: What else determines the result, such as the examples' fingerprint.
    """
    checkpoints = [
        {
            "id": checkpoint.id,
            "step": checkpoint.step,
            "weight": weight,
            "sha256": checkpoint_hash(checkpoint.path),
        }
        for checkpoint, weight in zip(series.checkpoints, weights.tolist(), strict=True)
    ]
    return {
        "command": options.command,
        **describe_gradients(options, series),
        "checkpoints": checkpoints,
        **more,
    }


def describe_gradients(options: argparse.Namespace, series: CheckpointSeries) -> dict[str, Any]:
    """Returns what determines an example's gradients but for the checkpoints."""
    return {
        "model": _described_model(options.model or series.model),
        "output": series.output,
        "layers": options.layers,
        "precision": options.precision,
        "loss": series.loss,
        "from_logits": series.from_logits,
        "loss_options": dict(series.loss_options),
        "class_weights": {str(index): w for index, w in series.class_weights.items()},
    }


def _described_model(model: str | None) -> str | None:
    """Returns where the network comes from; of a file, what is in it."""
    if model is None or not model.endswith(".keras"):
        return model
    return f"sha256:{sha256(existing_file(model, '--model: file'))}"


def keras_extractor(
    series: CheckpointSeries, options: argparse.Namespace, float64: bool = False
) -> FactorExtractor:
    """Returns the extractor that the options describe, see `KerasFactorExtractor`."""
    start_tensorflow()
    # TensorFlow takes seconds to import: bad inputs are reported before.
    from tracin_transforms.models.extractor import KerasFactorExtractor
    from tracin_transforms.models.loading import ModelLoading

    loading = ModelLoading(options.model, tuple(options.imports), options.allow_unsafe_model)
    return KerasFactorExtractor(
        series,
        options.layers,
        options.batch_size,
        float64,
        loading,
        options.precision,
        options.xla,
    )


def wanted_sketch(options: argparse.Namespace) -> Sketch | None:
    """Returns the sketch that a store is to hold, None where it is the factors themselves.

    Raises:
        InputError: The option does not name one.
    """
    if options.sketch is None:
        return None
    try:
        return Sketch.parse(options.sketch)
    except InputError as error:
        raise InputError(f"--sketch: {error}") from error


def start_tensorflow() -> None:
    """Imports TensorFlow and finds its devices, without what it prints on every start."""
    with captured_stderr():
        import tensorflow as tf

        tf.config.list_physical_devices()
        # Warns of many compiled functions: one for each checkpoint is what is wanted here.
        tf.get_logger().setLevel("ERROR")


def query_blocks(source: ExampleSource, extractor: LoadedExtractor) -> Iterator[FactorBlock]:
    """Yields the gradient factors of all query examples, in their order.

    Raises:
        InputError: A query cannot be used.
    """
    rows = extractor.block_rows(BLOCK_ROWS)
    for shard in source.shards():
        for batch in source.read(shard, rows):
            if batch.bad:
                bad = batch.bad[0]
                raise InputError(f"query {bad.example_id!r} of shard {bad.shard!r}: {bad.error}")
            yield extractor.extract(batch)


def sources(options: argparse.Namespace) -> Callable[[str], ExampleSource]:
    """Returns what makes a source of a SPEC, as the options say examples are to be read."""
    if options.parse or options.preprocess:
        # Their modules import it, with all that it prints.
        start_tensorflow()
    return lambda spec: parse_spec(spec, options.parse, options.preprocess)
