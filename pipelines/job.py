"""What every job over training examples does around its pipeline: inputs, output, manifest."""

import argparse
import contextlib
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.options import INTERRUPTS
from pipelines.stderr import captured_stderr
from tracin_transforms.core.checkpoints import CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import FactorBlock, concatenate_blocks
from tracin_transforms.core.protocols import (
    ExampleSource,
    FactorExtractor,
    LoadedExtractor,
    Shard,
)
from tracin_transforms.examples.spec import parse_spec
from tracin_transforms.storage.checkpoint_series import read_checkpoint_series
from tracin_transforms.storage.files import StagedDirectory, local_path, sha256
from tracin_transforms.storage.manifest import is_finished

# Rows that are extracted and scored together: large enough for matrix products at full speed.
BLOCK_ROWS = 2048


@dataclass(frozen=True, eq=False)
class Inputs:
    """The validated inputs of a job.

    Attributes:
        series: The run's checkpoints.
        weights: Weight of each, shape [K].
        source: The training examples.
        shards: Their shards.
    """

    series: CheckpointSeries
    weights: np.ndarray
    source: ExampleSource
    shards: tuple[Shard, ...]

    @property
    def count(self) -> int:
        """Number of training examples."""
        return sum(shard.count for shard in self.shards)


def open_inputs(options: argparse.Namespace) -> Inputs:
    """Reads and validates checkpoints.json and the training examples.

    Raises:
        InputError: Something is missing or inconsistent.
    """
    series = read_checkpoint_series(options.checkpoints)
    weights = series.weights(options.checkpoint_weights)
    source = parse_spec(options.examples)
    return Inputs(series, weights, source, source.shards())


def describe_run(options: argparse.Namespace, inputs: Inputs, **more: Any) -> dict[str, Any]:
    """Returns what determines a result, for its manifest. Batch and shard sizes do not.

    Args:
        options: The command's.
        inputs: What `open_inputs` returned.
        more: What else determines the result.
    """
    series = inputs.series
    checkpoints = [
        {"id": checkpoint.id, "step": checkpoint.step, "weight": weight, "sha256": sha256(path)}
        for checkpoint, weight, path in zip(
            series.checkpoints,
            inputs.weights.tolist(),
            [Path(checkpoint.path) for checkpoint in series.checkpoints],
            strict=True,
        )
    ]
    return {
        "command": options.command,
        "layers": options.layers,
        "loss": series.loss,
        "from_logits": series.from_logits,
        "loss_options": dict(series.loss_options),
        "checkpoints": checkpoints,
        "examples": inputs.source.fingerprint(),
        **more,
    }


@dataclass(frozen=True)
class Output:
    """The directory that a job's result goes to.

    Attributes:
        path: The directory, links resolved.
        run: What determines the result, see `describe_run`.
        overwrite: Whether an earlier result there may be replaced.
    """

    path: Path
    run: dict[str, Any]
    overwrite: bool

    def already_done(self) -> str | None:
        """Returns what to tell the user if the directory holds this very result, else None.

        Raises:
            InputError: It holds something else that is not to be overwritten.
        """
        if not is_finished(self.path, self.run, self.overwrite):
            return None
        return (
            f"Already done: {self.path} holds the result of this command. "
            "--overwrite computes it anew."
        )


def open_output(options: argparse.Namespace, run: dict[str, Any]) -> Output:
    """Returns the job's output directory; whether it can be used, `already_done` finds out."""
    return Output(local_path(options.output).resolve(), run, options.overwrite)


def keras_extractor(
    series: CheckpointSeries, options: argparse.Namespace, float64: bool = False
) -> FactorExtractor:
    """Returns the extractor that the options describe, see `KerasFactorExtractor`."""
    start_tensorflow()
    # TensorFlow takes seconds to import: bad inputs are reported before.
    from tracin_transforms.models.extractor import KerasFactorExtractor

    return KerasFactorExtractor(series, options.layers, options.batch_size, float64)


def start_tensorflow() -> None:
    """Imports TensorFlow and finds its devices, without what it prints on every start."""
    with captured_stderr():
        import tensorflow as tf

        tf.config.list_physical_devices()
        # Warns of many compiled functions: one for each checkpoint is what is wanted here.
        tf.get_logger().setLevel("ERROR")


def query_factors(source: ExampleSource, extractor: LoadedExtractor) -> FactorBlock:
    """Returns the gradient factors of all query examples, in their order."""
    rows = extractor.block_rows(BLOCK_ROWS)
    return concatenate_blocks(
        [
            extractor.extract(batch)
            for shard in source.shards()
            for batch in source.read(shard, rows)
        ]
    )


def shown(value: str | int | float | list[float]) -> str:
    """Returns an id, a label or a prediction as a summary shows it, on one line."""
    if isinstance(value, str):
        return value if value.isprintable() else ascii(value)
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value[:4]))}{', ...' if len(value) > 4 else ''}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Staging:
    """Directories of a job in progress.

    Attributes:
        result: Becomes the output directory.
        work: For intermediate files.
        progress: Where finished blocks are noted.
    """

    result: Path
    work: Path
    progress: Path


@contextlib.contextmanager
def staged_output(output: Output) -> Iterator[Staging]:
    """Gives directories to fill; the result appears at its place when the block succeeds.

    Otherwise nothing remains, except a complete result that could not be moved there.

    Raises:
        InputError: The output cannot be written, or was taken while the job ran.
    """
    path = output.path
    result, work = StagedDirectory(path), StagedDirectory(path.with_name(f"{path.name}.work"))
    try:
        staging = Staging(result.create(), work.create(), work.path / "progress")
        staging.progress.mkdir()
        yield staging
    except BaseException:
        result.discard()
        raise
    finally:
        work.discard()
    with _uninterrupted():
        try:
            # Once more: hours may have passed, and another job may have finished here.
            is_finished(path, output.run, output.overwrite)
            previous = result.publish()
        except (InputError, OSError) as error:
            raise InputError(f"{error}. The finished result was kept in {result.path}") from error
        try:
            if previous is not None:
                shutil.rmtree(previous)
        except OSError as error:
            print(
                f"tracin: warning: the result that was replaced could not be removed: {error}",
                file=sys.stderr,
            )


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets the moment pass in which a Ctrl-C would leave neither the old result nor the new."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def check_unchanged(source: ExampleSource, fingerprint: dict[str, Any]) -> None:
    """Raises InputError if the examples are not those that the job began with."""
    if source.fingerprint() != fingerprint:
        raise InputError(
            f"examples {fingerprint.get('file', '')!r} changed while the job ran: run it again"
        )
