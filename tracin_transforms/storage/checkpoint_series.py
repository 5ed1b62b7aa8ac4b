"""The directory of a training run: checkpoints, and ``checkpoints.json`` that describes them."""

import json
from dataclasses import replace
from pathlib import Path

from tracin_transforms.core.checkpoints import CheckpointSeries, series_from_json, series_to_json
from tracin_transforms.core.errors import InputError
from tracin_transforms.storage.files import existing_file, local_path, written_atomically

FILE_NAME = "checkpoints.json"


def read_checkpoint_series(directory: str | Path) -> CheckpointSeries:
    """Returns the checkpoints of a run, with absolute paths to files that exist.

    Raises:
        InputError: No ``checkpoints.json``, or one that is not valid, or a missing checkpoint.
    """
    run = local_path(directory)
    file = run / FILE_NAME
    if not file.is_file():
        raise InputError(
            f"{str(directory)!r} has no {FILE_NAME}: expected the directory of a training run; "
            "write one by training with the callback CheckpointRecorder(directory)"
        )
    try:
        series = series_from_json(json.loads(file.read_text(encoding="utf-8")))
    except InputError as error:
        raise InputError(f"{str(file)!r}: {error}") from error
    except ValueError as error:
        raise InputError(f"{str(file)!r} is not JSON: {error}") from error
    return replace(
        series,
        checkpoints=tuple(
            replace(c, path=str(existing_file(run / c.path, f"checkpoint {c.id!r}: file")))
            for c in series.checkpoints
        ),
    )


def write_checkpoint_series(directory: Path, series: CheckpointSeries) -> None:
    """Writes ``checkpoints.json``; the checkpoints' paths are relative to the directory."""
    with written_atomically(directory / FILE_NAME) as temporary:
        text = json.dumps(series_to_json(series), indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")
