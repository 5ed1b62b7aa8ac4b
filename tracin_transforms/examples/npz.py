"""Examples in a NumPy archive: arrays of inputs, targets and, if there are any, ids."""

import functools
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.example_ids import check_unique
from tracin_transforms.core.protocols import ExampleBatch, Shard
from tracin_transforms.storage.files import existing_file, sha256


@dataclass(frozen=True)
class NpzExamples:
    """Examples from the arrays of an ``.npz`` file.

    Each process reads the arrays into memory once. Without an array of ids, the example in row i
    of ``train.npz`` has the id ``train:i``.

    Attributes:
        path: The file.
        inputs: Name of the array of model inputs, shape [n, ...], numeric.
        targets: Name of the array of labels, shape [n] integer or [n, C] one-hot.
        example_ids: Name of the array of ids, shape [n], strings or integers; None for none.
        shard_size: Examples per shard.
    """

    path: str
    inputs: str = "x"
    targets: str = "y"
    example_ids: str | None = None
    shard_size: int = 2048

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise InputError(f"shard_size is {self.shard_size}, expected at least 1")

    def shards(self) -> tuple[Shard, ...]:
        """Returns runs of `shard_size` consecutive examples, in order, after reading the file.

        Raises:
            InputError: The file is missing, no archive or truncated; an array is missing, empty,
                not numeric or of another length; an example id occurs twice.
        """
        count = len(self._arrays().example_ids)
        number = -(-count // self.shard_size)
        return tuple(
            Shard(
                name=f"{Path(self.path).stem}-{i:05d}-of-{number:05d}",
                start=i * self.shard_size,
                count=min(self.shard_size, count - i * self.shard_size),
            )
            for i in range(number)
        )

    def read(self, shard: Shard, batch_size: int) -> Iterator[ExampleBatch]:
        """Yields the shard's examples in order, `batch_size` at a time; the last may be smaller."""
        arrays = self._arrays()
        end = shard.start + shard.count
        for start in range(shard.start, end, batch_size):
            rows = slice(start, min(start + batch_size, end))
            yield ExampleBatch(
                shard=shard.name,
                start=start - shard.start,
                example_ids=arrays.example_ids[rows],
                inputs=arrays.inputs[rows],
                targets=arrays.targets[rows],
            )

    def fingerprint(self) -> dict[str, Any]:
        """Returns the file's name and content hash, and which arrays are read."""
        file = existing_file(self.path, "examples file")
        return {
            "kind": "npz",
            "file": file.name,
            "sha256": sha256(file),
            "arrays": [self.inputs, self.targets, self.example_ids],
        }

    def _arrays(self) -> "_Arrays":
        file = existing_file(self.path, "examples file")
        changed = file.stat().st_mtime_ns
        return _read_arrays(file, changed, self.inputs, self.targets, self.example_ids)


class _Arrays(NamedTuple):
    inputs: np.ndarray
    targets: np.ndarray
    example_ids: np.ndarray


# The training examples and the queries of one job.
@functools.lru_cache(maxsize=2)
def _read_arrays(
    file: Path, _changed: int, inputs_name: str, targets_name: str, ids_name: str | None
) -> _Arrays:
    names = [inputs_name, targets_name] + ([ids_name] if ids_name is not None else [])
    found = _load(file, names)
    inputs, targets = found[inputs_name], found[targets_name]
    lengths = {name: len(found[name]) if found[name].ndim else 0 for name in names}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
        raise InputError(f"{str(file)!r}: arrays differ in length: {listed}; expected the same")
    count = lengths[inputs_name]
    if not count:
        raise InputError(f"{str(file)!r}: array {inputs_name!r} is empty: expected examples")
    for name in (inputs_name, targets_name):
        if found[name].dtype.kind not in "iufb":
            raise InputError(
                f"{str(file)!r}: array {name!r} has dtype {found[name].dtype}, expected numbers"
            )
    if ids_name is None:
        example_ids = np.array([f"{file.stem}:{i}" for i in range(count)])
    elif found[ids_name].ndim == 1 and found[ids_name].dtype.kind in "iuU":
        example_ids = found[ids_name].astype(str)
    else:
        raise InputError(
            f"{str(file)!r}: array {ids_name!r} has shape {found[ids_name].shape} and dtype "
            f"{found[ids_name].dtype}, expected one string or integer for each example"
        )
    try:
        check_unique(example_ids)
    except InputError as error:
        raise InputError(f"{str(file)!r}: {error}") from error
    return _Arrays(inputs, targets, example_ids)


# What NumPy raises for files that are not whole, or hold more than plain arrays.
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def _load(file: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Returns the named arrays; nothing is unpickled."""
    # Opened here because NumPy leaves a file open that it cannot read.
    with file.open("rb") as opened:
        try:
            archive = np.load(opened, allow_pickle=False)
        except _UNREADABLE as error:
            raise InputError(
                f"{str(file)!r} is not a NumPy archive, or truncated: expected an .npz file as "
                f"written by numpy.savez ({error})"
            ) from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"{str(file)!r} holds a single array: expected an .npz file")
        for name in names:
            if name not in archive.files:
                raise InputError(
                    f"{str(file)!r} has no array {name!r}: found {', '.join(archive.files)}; name "
                    f"the arrays as in npz:{file.name}?x=images&y=labels&id=ids"
                )
        return {name: _array(file, archive, name) for name in names}


def _array(file: Path, archive: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    try:
        found: np.ndarray = archive[name]
    except _UNREADABLE as error:
        raise InputError(
            f"{str(file)!r}: array {name!r} cannot be read: expected plain numbers or strings in a "
            f"complete file, such as ids.astype(str) instead of objects ({error})"
        ) from error
    return found
