"""From single examples, some of them bad, to batches."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import BadExample, ExampleBatch, Inputs

T = TypeVar("T")
# The name of a model's input where there is only one, which has none.
ONLY_INPUT = ""


@dataclass(frozen=True, eq=False)
class Example:
    """One example.

    Attributes:
        index: Its index within the shard.
        example_id: Its id.
        inputs: Arrays by the name of the model's input, or under `ONLY_INPUT`.
        target: What the loss takes, shape [] or [C].
        weight: What its loss is multiplied with, or None for 1.
    """

    index: int
    example_id: str
    inputs: Mapping[str, np.ndarray]
    target: np.ndarray
    weight: float | None = None


def assemble(shard: str, examples: Sequence[Example | BadExample]) -> ExampleBatch:
    """Returns the examples, which all come from one shard, as a batch.

    Raises:
        InputError: Inputs or targets are of different shapes.
    """
    good = [example for example in examples if isinstance(example, Example)]
    ids = [example.example_id for example in good]
    weights = [example.weight for example in good if example.weight is not None]
    remedy = "give shape=, or for images resize=HxW, or resize=N and crop=N"
    columns = {
        name: _stacked(shard, "inputs", [example.inputs[name] for example in good], ids, remedy)
        for name in (good[0].inputs if good else [ONLY_INPUT])
    }
    inputs: Inputs = columns.get(ONLY_INPUT, columns)
    targets = [example.target for example in good]
    return ExampleBatch(
        shard=shard,
        indices=np.array([example.index for example in good], dtype=np.int64),
        example_ids=np.array(ids, dtype=str),
        inputs=inputs,
        targets=_stacked(shard, "targets", targets, ids, "correct the data, or leave these out"),
        sample_weights=np.array(weights, dtype=np.float64) if weights else None,
        bad=tuple(example for example in examples if isinstance(example, BadExample)),
    )


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yields the items in lists of `size`; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _stacked(
    shard: str, what: str, rows: Sequence[np.ndarray], ids: Sequence[str], remedy: str
) -> np.ndarray:
    if not rows:
        return np.zeros(0)
    for row, example_id in zip(rows, ids, strict=True):
        if row.shape != rows[0].shape:
            raise InputError(
                f"shard {shard!r}: {what} differ in shape: {list(rows[0].shape)} for example "
                f"{ids[0]!r}, {list(row.shape)} for {example_id!r}; expected the same for all: "
                f"{remedy}"
            )
    return np.stack(rows)
