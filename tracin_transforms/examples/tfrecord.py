"""Examples in TFRecord files, as `tf.train.Example` or as a function of the user's parses them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tracin_transforms.core.protocols import ExampleBatch, ExampleSource, Shard
from tracin_transforms.examples.assembly import assemble, chunks
from tracin_transforms.examples.decoding import Broken
from tracin_transforms.examples.fields import Fields, Record, examples_of
from tracin_transforms.examples.parsing import examples_parsed
from tracin_transforms.examples.record_file import read_records
from tracin_transforms.examples.shard_files import named_files, unchanged_file


@dataclass(frozen=True)
class TFRecordExamples(ExampleSource):
    """Examples from TFRecord files, each of which is a shard.

    Without a feature of ids, record i of the shard ``train-00000`` has the id ``train-00000:i``;
    records that cannot be used keep their place in that count.

    Attributes:
        pattern: The files, as in ``data/train-*.tfrecord``; gzipped or not.
        fields: Which features are the example.
        parse: ``module:function``, which makes (x, y) of a serialized record, instead of `fields`.
    """

    pattern: str
    fields: Fields = Fields()
    parse: str | None = None

    def shards(self) -> tuple[Shard, ...]:
        """Returns the files by name; how many examples are in them, only reading tells.

        Raises:
            InputError: No file matches, or two would have the same name.
        """
        return tuple(
            Shard(name, str(path), size=size)
            for name, path, size in named_files(self.pattern, "tfrecord")
        )

    def read(self, shard: Shard, batch_size: int) -> Iterator[ExampleBatch]:
        """Yields the file's examples in order, `batch_size` at a time; the last may be fewer.

        Raises:
            InputError: The file changed since it was listed; a record's length is damaged, so that
                those after it cannot be found; inputs are of different shapes.
        """
        records = enumerate(read_records(unchanged_file(shard)))
        for chunk in chunks(records, batch_size):
            found = [Record(i, f"{shard.name}:{i}", data) for i, data in chunk]
            if self.parse is None:
                found = [replace(record, values=_features(record.values)) for record in found]
                examples = examples_of(shard.name, found, self.fields)
            else:
                examples = examples_parsed(shard.name, found, _serialized, self.parse)
            yield assemble(shard.name, examples)

    def describe(self) -> dict[str, Any]:
        """Returns which features are read and how."""
        how = self.fields.describe() if self.parse is None else {"parse": self.parse}
        return {"kind": "tfrecord", **how}


def _features(data: Any) -> Any:
    """Returns the features of a serialized `tf.train.Example` by name."""
    import tensorflow as tf
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if isinstance(data, Broken):
        return data
    try:
        example = tf.train.Example.FromString(data)
    except DecodeError:
        return Broken("it is not a tf.train.Example: name a function that parses it, with --parse")
    return {name: _value(name, feature) for name, feature in example.features.feature.items()}


def _value(name: str, feature: Any) -> Any:
    kind = feature.WhichOneof("kind")
    values = getattr(feature, kind).value if kind else ()
    if not values:
        return Broken(f"{name!r} is empty: expected a value")
    if kind == "bytes_list":
        if len(values) > 1:
            return Broken(f"{name!r} has {len(values)} byte strings, expected one, or --parse")
        return values[0]
    return np.array(values, dtype=np.int64 if kind == "int64_list" else np.float32)


def _serialized(records: list[bytes]) -> Any:
    import tensorflow as tf

    return tf.constant(records, tf.string)
