"""Single examples by their ids, for those who want to look at them."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import numpy as np

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import ExampleBatch, ExampleSource, Shard

_BATCH_SIZE = 64


def find_examples(
    source: ExampleSource, example_ids: Sequence[str], shard_names: Collection[str] | None = None
) -> list[ExampleBatch]:
    """Returns the examples with these ids, each a batch of one, in the order of the ids.

    Ids of the form ``shard:index`` lead to their shards; the others are looked for from the first
    shard on, until all are found.

    Args:
        source: Where they are.
        example_ids: Their ids.
        shard_names: The shards that they are in, where that is known; None for all.

    Raises:
        InputError: There is no example of an id, or it cannot be read.
    """
    shards = [
        shard for shard in source.shards() if shard_names is None or shard.name in shard_names
    ]
    wanted = set(example_ids)
    found: dict[str, ExampleBatch] = {}
    for shard in shards:
        _search(source, shard, {i for i in wanted if _names(i, shard)}, found)
    for shard in shards:
        _search(source, shard, wanted - found.keys(), found)
    for example_id in example_ids:
        if example_id not in found:
            raise InputError(
                f"example id {example_id!r} is not in any of {len(shards)} shards: expected the id "
                "of an example; are these the examples that it was taken from?"
            )
    return [found[example_id] for example_id in example_ids]


def _names(example_id: str, shard: Shard) -> bool:
    """Returns whether an id is of the form ``shard:index``, or ``file:index`` of a shard's file."""
    name, _, index = example_id.rpartition(":")
    if not index.isdecimal():
        return False
    if shard.count is None:
        return name == shard.name
    in_shard = shard.start <= int(index) < shard.start + shard.count
    return in_shard and bool(name) and shard.name.startswith(f"{name}-")


def _search(
    source: ExampleSource, shard: Shard, wanted: Iterable[str], found: dict[str, ExampleBatch]
) -> None:
    """Adds to `found` those wanted that are in a shard, which is read as far as necessary."""
    left = set(wanted)
    if not left:
        return
    for batch in source.read(shard, _BATCH_SIZE):
        for bad in batch.bad:
            if bad.example_id in left:
                raise InputError(
                    f"example {bad.example_id!r} of shard {bad.shard!r} cannot be read: {bad.error}"
                )
        for row, example_id in enumerate(batch.example_ids.tolist()):
            if example_id in left:
                # A copy, so that the rest of the batch can go.
                found[example_id] = replace(batch.rows(np.array([row])), bad=())
                left.remove(example_id)
        if not left:
            return
