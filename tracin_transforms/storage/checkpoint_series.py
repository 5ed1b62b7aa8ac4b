"""The checkpoints of a training run: ``checkpoints.json``, or files without it."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from tracin_transforms.core.checkpoints import (
    Checkpoint,
    CheckpointSeries,
    series_from_json,
    series_to_json,
)
from tracin_transforms.core.errors import InputError
from tracin_transforms.storage.files import (
    AnyPath,
    any_path,
    existing_file,
    fetched,
    files_below,
    local_path,
    matching_files,
    sha256,
    written_atomically,
)
from tracin_transforms.storage.remote import RemotePath, is_remote

FILE_NAME = "checkpoints.json"
_SAVED_MODEL = "saved_model.pb"


def is_run(path: str) -> bool:
    """Returns whether a path is to be read as the directory of a run, not as checkpoint files."""
    if "," in path or has_magic(path):
        return False
    return not checkpoint_files(any_path(path))


def read_checkpoint_series(directory: str | Path | RemotePath) -> CheckpointSeries:
    """Returns the checkpoints of a run, with absolute paths to files that exist.

    Raises:
        InputError: No ``checkpoints.json``, or one that is not valid, or a missing checkpoint.
    """
    run = any_path(directory)
    file = run / FILE_NAME
    if not file.is_file():
        raise InputError(
            f"{str(directory)!r} has no {FILE_NAME}: expected the directory of a training run; "
            "write one by training with the callback CheckpointRecorder(directory), or name "
            f"checkpoint files, as in '{directory}/ckpt-*', and their --loss"
        )
    try:
        series = series_from_json(json.loads(file.read_text(encoding="utf-8")))
    except InputError as error:
        raise InputError(f"{str(file)!r}: {error}") from error
    except ValueError as error:
        raise InputError(f"{str(file)!r} is not JSON: {error}") from error
    model = series.model
    return replace(
        series,
        checkpoints=tuple(replace(c, path=_existing(run, c)) for c in series.checkpoints),
        model=model and str(existing_file(run / model, "'model' in checkpoints.json: file")),
    )


def write_checkpoint_series(directory: Path, series: CheckpointSeries) -> None:
    """Writes ``checkpoints.json``; the checkpoints' paths are relative to the directory."""
    with written_atomically(directory / FILE_NAME) as temporary:
        text = json.dumps(series_to_json(series), indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")


def series_of_files(
    paths: str, learning_rates: Sequence[float] | None, **training: Any
) -> CheckpointSeries:
    """Returns checkpoint files without ``checkpoints.json`` as the checkpoints of a run.

    Args:
        paths: Files in the order of training, separated by commas; or a pattern such as
            ``ckpt-*.weights.h5``, whose files are ordered by the numbers in their names. A
            TensorFlow checkpoint is named by its prefix, or its ``.index``.
        learning_rates: Of each, or None.
        training: What else `CheckpointSeries` has, such as the loss.

    Raises:
        InputError: There are no such files, or not as many learning rates.
    """
    found = [path for part in paths.split(",") for path in _matching(part.strip())]
    if learning_rates is not None and len(learning_rates) != len(found):
        raise InputError(
            f"--learning-rates gives {len(learning_rates)} for {len(found)} checkpoints "
            f"({', '.join(Path(path).name for path in found[:3])}, ...): expected one for each"
        )
    checkpoints = []
    for i, path in enumerate(found):
        checkpoint = Checkpoint(
            # In a directory each, SavedModels and checkpoints may have the same name.
            id=_stem(path) if len({_stem(p) for p in found}) == len(found) else path,
            path=path,
            learning_rate=None if learning_rates is None else learning_rates[i],
            step=i,
        )
        checkpoints.append(replace(checkpoint, path=_existing(local_path("."), checkpoint)))
    return CheckpointSeries(checkpoints=tuple(checkpoints), **training)


def checkpoint_hash(path: str) -> str:
    """Returns the SHA-256 of a checkpoint's file or, where it has several, of their hashes."""
    files = checkpoint_files(any_path(path))
    if len(files) == 1:
        return sha256(fetched(files[0]))
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def checkpoint_files(path: AnyPath) -> list[Any]:
    """Returns the files of a checkpoint: one, or those of a SavedModel or of a prefix."""
    if path.is_file():
        return [path]
    if (path / _SAVED_MODEL).is_file():
        return [file for file, _ in files_below(path)]
    return sorted(path.parent.glob(f"{path.name}.index")) + sorted(
        path.parent.glob(f"{path.name}.data-*-of-*")
    )


def fetched_checkpoint(path: str) -> str:
    """Returns the local path of a checkpoint, or of a copy of a remote one.

    Raises:
        InputError: It is in an object store and has several files.
    """
    files = checkpoint_files(any_path(path))
    if len(files) > 1 and isinstance(files[0], RemotePath):
        raise InputError(
            f"checkpoint {path!r} has {len(files)} files: expected one file, .keras or "
            ".weights.h5, where checkpoints are in an object store; or copy them to a local disk"
        )
    return str(fetched(files[0])) if len(files) == 1 else path


def _existing(directory: AnyPath, checkpoint: Checkpoint) -> str:
    path = any_path(directory / checkpoint.path)
    if not checkpoint_files(path):
        existing_file(path, f"checkpoint {checkpoint.id!r}: file")
    return str(path)


def _matching(pattern: str) -> list[str]:
    if not has_magic(pattern):
        return [pattern.removesuffix(".index")]
    paths = (
        [str(path) for path, _ in matching_files(pattern)]
        if is_remote(pattern)
        # Also directories, which SavedModels are.
        else glob(str(local_path(pattern)))
    )
    found = {path.removesuffix(".index") for path in paths if not re.search(r"\.data-\d+-", path)}
    if not found:
        raise InputError(f"--checkpoints {pattern!r}: no such files")
    # epoch-10 after epoch-9.
    return sorted(found, key=_text_and_numbers)


def _text_and_numbers(path: str) -> list[tuple[str, int]]:
    parts = re.findall(r"(\D*)(\d*)", path)
    return [(text, int(number or -1)) for text, number in parts]


def _stem(path: str) -> str:
    return re.sub(r"(\.weights)?\.(h5|keras)$", "", Path(path).name)
