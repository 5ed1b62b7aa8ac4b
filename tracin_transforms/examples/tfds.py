"""Examples in data sets that TensorFlow Datasets has prepared."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import ExampleBatch, ExampleSource, Shard
from tracin_transforms.examples.assembly import assemble, chunks
from tracin_transforms.examples.decoding import (
    ImageDecoding,
    each_element,
    image_decoder,
    tensorflow_reason,
)
from tracin_transforms.examples.fields import Fields, InputField, Record, examples_of
from tracin_transforms.examples.parsing import example_of, parsed
from tracin_transforms.examples.prepared_data import (
    SUPERVISED,
    PreparedData,
    SplitFile,
    file_sizes,
)


@dataclass(frozen=True)
class TFDSExamples(ExampleSource):
    """Examples from a data set that TensorFlow Datasets has prepared, with its ids.

    Attributes:
        name: Its name, perhaps with configuration and version, as in ``mnist:3.0.1``.
        split: A split, as in ``train``, ``train[:10%]`` or ``train+test``.
        data_dir: Where it is; None for the default of TensorFlow Datasets.
        fields: Which features are the example; an empty name stands for the input or label that
            the data set says it has.
        parse: ``module:function``, which makes (x, y) of a dict of features, instead of `fields`.
    """

    name: str
    split: str
    data_dir: str | None = None
    fields: Fields = Fields(InputField(SUPERVISED), SUPERVISED)
    parse: str | None = None

    def shards(self) -> tuple[Shard, ...]:
        """Returns the files, or those parts of them that are in the split, in order.

        Raises:
            InputError: The data set is not prepared, has no such split or feature, or a file of it
                is missing; TensorFlow Datasets is not installed.
        """
        return tuple(self._files())

    def read(self, shard: Shard, batch_size: int) -> Iterator[ExampleBatch]:
        """Yields the shard's examples in order, `batch_size` at a time; the last may be fewer.

        Raises:
            InputError: The data set changed since its shards were listed; the file is damaged;
                inputs are of different shapes.
        """
        file = self._files().get(shard)
        if file is None:
            raise InputError(
                f"{self._data} changed: shard {shard.name!r} is no longer what it was when the "
                "shards were listed; run the job again"
            )
        for chunk in chunks(enumerate(self._elements(file)), batch_size):
            records = [Record(i, file.example_id(i), element) for i, element in chunk]
            if self.parse is None:
                examples = examples_of(shard.name, records, self._data.resolved(self.fields))
            else:
                examples = [example_of(shard.name, record, record.values) for record in records]
            yield assemble(shard.name, examples)

    def describe(self) -> dict[str, Any]:
        """Returns data set, version and split, and which features are read and how."""
        if self.parse is None:
            how = self._data.resolved(self.fields).describe()
        else:
            how = {"parse": self.parse}
        return {"kind": "tfds", "name": self._data.full_name, "split": self.split, **how}

    @property
    def _data(self) -> PreparedData:
        return PreparedData(self.name, self.data_dir)

    def _files(self) -> dict[Shard, SplitFile]:
        if self.parse is None:
            self._data.resolved(self.fields)
        files = self._data.files(self.split)
        sizes = file_sizes([file.path for file in files])
        return {
            Shard(
                name=file.name,
                path=file.path,
                start=file.first + file.skip,
                count=file.count,
                size=size * file.count // file.total,
            ): file
            for file, size in zip(files, sizes, strict=True)
        }

    def _elements(self, file: SplitFile) -> Iterator[Any]:
        """Yields the features of each example, or what `parse` makes of them, as NumPy arrays."""
        import tensorflow as tf

        if self.parse is None:
            dataset = self._data.dataset(file, self._data.resolved(self.fields))
        else:
            dataset = self._data.dataset(file, None).map(_decoded(self._data.encoded_images))
            dataset = parsed(dataset, self.parse)
        # Wrong checksums, and fewer examples than there should be.
        fatal = (tf.errors.DataLossError, tf.errors.FailedPreconditionError)
        read = 0
        try:
            for element in each_element(dataset, file.count, fatal):
                yield element
                read += 1
        except fatal as error:
            raise InputError(
                f"{file.path!r} is damaged after {read} of the {file.count} examples of shard "
                f"{file.name!r}: {tensorflow_reason(error.message)}; copy it again, or prepare "
                "the data again"
            ) from error


def _decoded(images: Mapping[str, int]) -> Any:
    """Returns a function that decodes the images among an example's features."""

    def decode(features: dict[str, Any]) -> dict[str, Any]:
        decoded = {
            name: image_decoder(ImageDecoding(channels=channels))(features[name])
            for name, channels in images.items()
        }
        return {**features, **decoded}

    return decode
