"""Examples in a NumPy archive: arrays of inputs, targets and, if there are any, ids and weights."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.example_ids import check_unique
from tracin_transforms.core.protocols import ExampleBatch, ExampleSource, Shard
from tracin_transforms.examples.npy_rows import Rows, open_rows, verify
from tracin_transforms.storage.files import AnyPath, any_path, existing_file, sha256, version

# Several blocks, so that one can be read while another is scored; and a few shards at least, so
# that workers share even small data.
_SHARD_SIZE = 8192
_FEWEST_SHARDS = 4
_SMALLEST_SHARD = 256


@dataclass(frozen=True)
class NpzExamples(ExampleSource):
    """Examples from the arrays of an ``.npz`` file.

    Rows are read when they are wanted, if `numpy.savez` wrote the file; what
    `numpy.savez_compressed` wrote, each process reads into memory. Without an array of ids, the
    example in row i of ``train.npz`` has the id ``train:i``.

    Attributes:
        path: The file.
        inputs: Name of the array of model inputs, shape [n, ...], or pairs of the names of a
            model's inputs and of their arrays.
        targets: Name of the array of labels, shape [n] integer or [n, C] one-hot.
        example_ids: Name of the array of ids, shape [n], strings or integers; None for none.
        sample_weights: Name of the array of weights of the examples' losses, shape [n]; None for
            none.
        shard_size: Examples per shard; by default up to 8,192.
    """

    path: str
    inputs: str | tuple[tuple[str, str], ...] = "x"
    targets: str = "y"
    example_ids: str | None = None
    sample_weights: str | None = None
    shard_size: int | None = None

    def __post_init__(self) -> None:
        if self.shard_size is not None and self.shard_size < 1:
            raise InputError(f"shard_size is {self.shard_size}, expected at least 1")

    def shards(self) -> tuple[Shard, ...]:
        """Returns runs of `shard_size` consecutive examples, in order, after checking the file.

        Raises:
            InputError: The file is missing, no archive or damaged; an array is missing, empty, not
                numeric or of another length; an example id occurs twice.
        """
        file = existing_file(self.path, "examples file")
        arrays = self._arrays()
        verify(file, list(arrays))
        count = arrays[self.targets].shape[0]
        if self.example_ids is not None:
            try:
                check_unique(arrays[self.example_ids][:].astype(str))
            except InputError as error:
                raise InputError(f"{str(file)!r}: {error}") from error
        size = self.shard_size or min(
            _SHARD_SIZE, max(_SMALLEST_SHARD, -(-count // _FEWEST_SHARDS))
        )
        number = -(-count // size)
        return tuple(
            Shard(
                name=f"{file.stem}-{i:05d}-of-{number:05d}",
                path=str(file),
                start=i * size,
                count=min(size, count - i * size),
                size=version(file)[0] * min(size, count - i * size) // count,
            )
            for i in range(number)
        )

    def read(self, shard: Shard, batch_size: int) -> Iterator[ExampleBatch]:
        """Yields the shard's examples in order, `batch_size` at a time; the last may be smaller."""
        arrays = self._arrays()
        end = shard.start + (shard.count or 0)
        for start in range(shard.start, end, batch_size):
            rows = slice(start, min(start + batch_size, end))
            indices = np.arange(rows.start, rows.stop) - shard.start
            weights = self.sample_weights
            yield ExampleBatch(
                shard=shard.name,
                indices=indices,
                example_ids=self._ids(arrays, rows),
                inputs=arrays[self.inputs][rows]
                if isinstance(self.inputs, str)
                else {name: arrays[array][rows] for name, array in self.inputs},
                targets=arrays[self.targets][rows],
                sample_weights=None if weights is None else arrays[weights][rows].astype(float),
            )

    def describe(self) -> dict[str, Any]:
        """Returns the file's name and content hash, and which arrays are read."""
        file = existing_file(self.path, "examples file")
        arrays = [self.inputs, self.targets, self.example_ids]
        return {
            "kind": "npz",
            "file": file.name,
            "sha256": sha256(file),
            "arrays": [*arrays, *filter(None, [self.sample_weights])],
        }

    def _ids(self, arrays: dict[str, Rows], rows: slice) -> np.ndarray:
        if self.example_ids is not None:
            return arrays[self.example_ids][rows].astype(str)
        stem = any_path(self.path).stem
        return np.array([f"{stem}:{i}" for i in range(rows.start, rows.stop)])

    def _arrays(self) -> dict[str, Rows]:
        file = existing_file(self.path, "examples file")
        return _open_arrays(file, version(file), self)


# The training examples and the queries of one job.
@functools.lru_cache(maxsize=2)
def _open_arrays(file: AnyPath, _version: tuple[int, int], source: NpzExamples) -> dict[str, Rows]:
    inputs = source.inputs if not isinstance(source.inputs, str) else (("", source.inputs),)
    input_names = [array for _, array in inputs]
    ids, weights = source.example_ids, source.sample_weights
    names = [*input_names, source.targets, *filter(None, (ids, weights))]
    hint = f"name the arrays as in npz:{file.name}?x=images&y=labels&id=ids"
    arrays = open_rows(file, list(dict.fromkeys(names)), hint)
    lengths = {name: rows.shape[0] if rows.shape else 0 for name, rows in arrays.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
        raise InputError(f"{str(file)!r}: arrays differ in length: {listed}; expected the same")
    if not lengths[source.targets]:
        raise InputError(f"{str(file)!r}: array {source.targets!r} is empty: expected examples")
    for name in input_names:
        _check_kind(file, name, arrays[name], "iufbUS", "numbers or strings")
    for name in filter(None, (source.targets, weights)):
        _check_kind(file, name, arrays[name], "iufb", "numbers")
    for name in filter(None, (ids, weights)):
        if len(arrays[name].shape) != 1:
            raise InputError(
                f"{str(file)!r}: array {name!r} has shape {arrays[name].shape}, expected one value "
                "for each example"
            )
    if ids is not None:
        _check_kind(file, ids, arrays[ids], "iuUS", "one string or integer for each example")
    return arrays


def _check_kind(file: AnyPath, name: str, rows: Rows, kinds: str, expected: str) -> None:
    if rows.dtype.kind not in kinds:
        raise InputError(
            f"{str(file)!r}: array {name!r} has dtype {rows.dtype}, expected {expected}"
        )
