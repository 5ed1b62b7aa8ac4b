"""What the rooms that read examples, run models and build pipelines know of each other.

Sources and extractors are small, picklable descriptions; what is large (arrays, models) comes
into being where it is used.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from tracin_transforms.core.factors import FactorBlock

# What a model takes: an array of shape [n, ...], or several by name.
Inputs = np.ndarray | Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Shard:
    """The unit of work: some consecutive examples of a file or directory.

    Attributes:
        name: Unique within the source, the same in every job, and fit for a file name.
        path: File or directory that the examples are in.
        start: Index of the first example within it.
        count: Number of examples; None where only reading them would tell.
        size: Bytes to read, about; with the name, it tells whether a shard is still the same.
    """

    name: str
    path: str = ""
    start: int = 0
    count: int | None = None
    size: int = 0


@dataclass(frozen=True)
class BadExample:
    """An example that cannot be used.

    Attributes:
        example_id: Its id or, where the id itself cannot be read, shard and index.
        shard: Name of its shard.
        index: Its index within the shard.
        error: What is wrong with it.
    """

    example_id: str
    shard: str
    index: int
    error: str


@dataclass(frozen=True, eq=False)
class ExampleBatch:
    """Some examples of a shard, in order.

    Attributes:
        shard: Name of the shard.
        indices: Index of each example within the shard, shape [n].
        example_ids: Shape [n], unicode.
        inputs: What the model takes.
        targets: What the loss takes, shape [n] or [n, C].
        sample_weights: What each example's loss is multiplied with, shape [n], or None for 1.
        bad: Examples that should be among these and cannot be read.
    """

    shard: str
    indices: np.ndarray
    example_ids: np.ndarray
    inputs: Inputs
    targets: np.ndarray
    sample_weights: np.ndarray | None = None
    bad: tuple[BadExample, ...] = ()

    def __len__(self) -> int:
        return len(self.example_ids)

    def rows(self, selection: slice | np.ndarray) -> "ExampleBatch":
        """Returns the selected examples."""
        weights = self.sample_weights
        return replace(
            self,
            indices=self.indices[selection],
            example_ids=self.example_ids[selection],
            inputs=input_rows(self.inputs, selection),
            targets=self.targets[selection],
            sample_weights=None if weights is None else weights[selection],
        )


def input_rows(inputs: Inputs, selection: slice | np.ndarray) -> Inputs:
    """Returns the inputs of the selected examples."""
    if isinstance(inputs, Mapping):
        return {name: array[selection] for name, array in inputs.items()}
    return inputs[selection]


class ExampleSource(Protocol):
    """Training or query examples with stable ids, read shard by shard.

    A class of your own derives from this one and has two methods, `shards` and `read`. Its
    instances are pickled: they describe where the examples are, and hold none.
    """

    def shards(self) -> tuple[Shard, ...]:
        """Returns the shards in order, after validating the source.

        Raises:
            InputError: The source cannot be read or is not consistent.
        """
        ...

    def read(self, shard: Shard, batch_size: int) -> Iterator[ExampleBatch]:
        """Yields the shard's examples in order, `batch_size` at a time; the last may be fewer.

        Examples that cannot be read are named in `ExampleBatch.bad`, and count for `batch_size`.

        Raises:
            InputError: The rest of the shard cannot be read.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Returns what else tells these examples from others than their shards; JSON values.

        Two sources with the same description whose shards have the same names, counts and sizes
        are taken to be the same examples.
        """
        fields = getattr(self, "__dict__", {})
        return {
            "kind": f"{type(self).__module__}:{type(self).__qualname__}",
            **{name: repr(value) for name, value in sorted(fields.items()) if name[0] != "_"},
        }


def fingerprint(source: ExampleSource, shards: Sequence[Shard]) -> dict[str, Any]:
    """Returns what identifies the content of a source, for a manifest; JSON values."""
    return {
        **source.describe(),
        "shards": [[shard.name, shard.count, shard.size] for shard in shards],
    }


class LoadedExtractor(Protocol):
    """Models in memory, ready to turn examples into gradient factors."""

    def block_rows(self, limit: int) -> int:
        """Returns how many examples, at most `limit`, make a block that memory has room for."""
        ...

    def extract(self, batch: ExampleBatch) -> FactorBlock:
        """Returns the batch's gradient factors at all checkpoints.

        Raises:
            ExampleError: Examples that do not fit the model or give a non-finite number.
            InputError: None of them fits.
        """
        ...


class FactorExtractor(Protocol):
    """Describes how to get gradient factors; `load` is called once per process."""

    def load(self) -> LoadedExtractor:
        """Returns the extractor with its models loaded.

        Raises:
            InputError: A checkpoint cannot be loaded, or its model is not supported.
        """
        ...
