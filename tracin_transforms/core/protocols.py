"""What the rooms that read examples, run models and build pipelines know of each other.

Sources and extractors are small, picklable descriptions; what is large (arrays, models) comes
into being where it is used.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from tracin_transforms.core.factors import FactorBlock

# What a model takes: an array of shape [n, ...], or several by name.
Inputs = np.ndarray | Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Shard:
    """The unit of work: some consecutive examples of a source.

    Attributes:
        name: Unique within the source, and the same in every job.
        start: Index of the first example within the source.
        count: Number of examples.
    """

    name: str
    start: int
    count: int


@dataclass(frozen=True, eq=False)
class ExampleBatch:
    """Some consecutive examples of a shard.

    Attributes:
        shard: Name of the shard.
        start: Index of the first example within the shard.
        example_ids: Shape [n], unicode.
        inputs: What the model takes.
        targets: What the loss takes, shape [n] or [n, C].
        sample_weights: What each example's loss is multiplied with, shape [n], or None for 1.
    """

    shard: str
    start: int
    example_ids: np.ndarray
    inputs: Inputs
    targets: np.ndarray
    sample_weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.example_ids)

    def rows(self, selection: slice | np.ndarray) -> "ExampleBatch":
        """Returns the selected examples; `start` stays that of the whole batch."""
        weights = self.sample_weights
        return replace(
            self,
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
    """Training or query examples with stable ids, read shard by shard."""

    def shards(self) -> tuple[Shard, ...]:
        """Returns the shards in order, after validating the source.

        Raises:
            InputError: The source cannot be read or is not consistent.
        """
        ...

    def read(self, shard: Shard, batch_size: int) -> Iterator[ExampleBatch]:
        """Yields the shard's examples in order, `batch_size` at a time; the last may be smaller."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Returns what identifies the source's content, for a result's manifest; JSON values."""
        ...


class LoadedExtractor(Protocol):
    """Models in memory, ready to turn examples into gradient factors."""

    def block_rows(self, limit: int) -> int:
        """Returns how many examples, at most `limit`, make a block that memory has room for."""
        ...

    def extract(self, batch: ExampleBatch) -> FactorBlock:
        """Returns the batch's gradient factors at all checkpoints.

        Raises:
            InputError: An example does not fit the model or gives a non-finite number.
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
