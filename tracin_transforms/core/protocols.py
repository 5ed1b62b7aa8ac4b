"""What the rooms that read examples, run models and build pipelines know of each other.

Sources and extractors are small, picklable descriptions; what is large (arrays, models) comes
into being where it is used.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tracin_transforms.core.factors import FactorBlock


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
        inputs: What the model takes, shape [n, ...].
        targets: What the loss takes, shape [n] or [n, C].
    """

    shard: str
    start: int
    example_ids: np.ndarray
    inputs: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.example_ids)


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
