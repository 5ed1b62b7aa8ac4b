"""Data sets as TensorFlow Datasets has prepared them: their files, features and reader."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tracin_transforms.core.errors import InputError
from tracin_transforms.examples.decoding import ImageDecoding
from tracin_transforms.examples.fields import Fields, InputField

# An empty name stands for the input or label that the data set says it has.
SUPERVISED = ""
# Files in object stores take long to answer.
_READERS = 16


@dataclasses.dataclass(frozen=True)
class SplitFile:
    """A file of a data set, or that part of it which is in a split.

    Attributes:
        path: The file.
        split: The split that the whole file is part of.
        first: Index within that split of the file's first example.
        skip: Examples of the file before the part.
        count: Examples of the part.
        total: Examples of the file.
    """

    path: str
    split: str
    first: int
    skip: int
    count: int
    total: int

    @property
    def name(self) -> str:
        """The file's name, and which part it is, unless it is the whole."""
        name = self.path.rpartition("/")[2]
        part = f"-{self.skip}-{self.skip + self.count}" if self.count < self.total else ""
        return f"{name}{part}"

    def example_id(self, index: int) -> str:
        """Returns the id that TensorFlow Datasets gives an example of the part."""
        return f"{self.path.rpartition('/')[2]}__{self.skip + index}"


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """A data set that is read as it lies there: nothing is downloaded, its code is not needed.

    Attributes:
        name: Its name, perhaps with configuration and version.
        data_dir: Where it is; None for the default of TensorFlow Datasets.

    Raises:
        InputError: Of all methods: it is not there, or TensorFlow Datasets is not installed.
    """

    name: str
    data_dir: str | None

    def __str__(self) -> str:
        return f"examples tfds: data set {self.name!r}"

    @property
    def full_name(self) -> str:
        """Its name with configuration and version."""
        return str(self._builder.info.full_name)

    def files(self, split: str) -> list[SplitFile]:
        """Returns the files that the examples of a split are in, in order.

        Raises:
            InputError: There is no such split.
        """
        splits = self._builder.info.splits
        try:
            parts = splits[split].file_instructions
        except (ValueError, KeyError, AssertionError) as error:
            raise InputError(
                f"{self} has no split {split!r}: found {', '.join(sorted(splits))}; expected one "
                "of them, or a part as in train[:10%]"
            ) from error
        first = {}
        for name, whole in splits.items():
            index = 0
            for path, count in zip(whole.filepaths, whole.shard_lengths, strict=True):
                first[str(path)] = (name, index)
                index += count
        return [
            SplitFile(
                part.filename, *first[part.filename], part.skip, part.take, part.examples_in_shard
            )
            for part in parts
            if part.take
        ]

    def resolved(self, fields: Fields) -> Fields:
        """Returns the fields by their names, decoded as the data set says where they do not.

        Raises:
            InputError: There is no such feature.
        """
        supervised = self._builder.info.supervised_keys or (None, None)
        inputs = tuple((name, self._input(field, supervised[0])) for name, field in fields.by_input)
        for option, name in (("id", fields.example_ids), ("weight", fields.sample_weights)):
            if name is not None:
                self._feature(name, None, option)
        return dataclasses.replace(
            fields,
            inputs=inputs[0][1] if isinstance(fields.inputs, InputField) else inputs,
            targets=self._feature(fields.targets, supervised[1], "y"),
            images=self._images(fields.images, [field.field for _, field in inputs]),
        )

    def dataset(self, file: SplitFile, fields: Fields | None) -> Any:
        """Returns a file's examples as a `tf.data.Dataset`, with images still encoded.

        Args:
            file: Which.
            fields: What to read, by their names; None for all features.
        """
        tfds = _tensorflow_datasets()
        names = self.encoded_images
        decoders: Any = {name: tfds.decode.SkipDecoding() for name in names}
        if fields is not None:
            read = dict.fromkeys(fields.names, True)
            decoders = {name: skip for name, skip in decoders.items() if name in read}
            decoders = tfds.decode.PartialDecoding(read, decoders=decoders)
        start = file.first + file.skip
        return self._builder.as_dataset(
            split=tfds.core.ReadInstruction(
                file.split, from_=start, to=start + file.count, unit="abs"
            ),
            shuffle_files=False,
            decoders=decoders,
            read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
        )

    @property
    def encoded_images(self) -> dict[str, int]:
        """The features that are images of 8 bits, and their numbers of channels."""
        tfds = _tensorflow_datasets()
        return {
            name: feature.shape[-1] or 3
            for name, feature in self._builder.info.features.items()
            if isinstance(feature, tfds.features.Image) and feature.np_dtype == "uint8"
        }

    @property
    def _builder(self) -> Any:
        read_only = _tensorflow_datasets().core.read_only_builder
        try:
            return read_only.builder_from_files(self.name, data_dir=self.data_dir)
        # What is raised for data that are not there, and for names that are none.
        except (ValueError, AssertionError) as error:
            where = "" if self.data_dir is None else f", data_dir={self.data_dir!r}"
            raise InputError(
                f"{self} is not prepared in {self.data_dir or '~/tensorflow_datasets'!r}: run once "
                'python -c "import tensorflow_datasets as tfds; '
                f'tfds.builder({self.name!r}{where}).download_and_prepare()"'
            ) from error

    def _input(self, field: InputField, supervised: Any) -> InputField:
        name = self._feature(field.field, supervised, "x")
        decode = field.decode
        is_text = self._builder.info.features[name].tf_dtype.name == "string"
        if decode is None and is_text:
            decode = "text"
        return dataclasses.replace(field, field=name, decode=decode)

    def _feature(self, name: str, supervised: Any, option: str) -> str:
        features = self._builder.info.features
        found = supervised if name == SUPERVISED else name
        if not isinstance(found, str) or found not in features:
            wanted = f"feature {name!r}" if name else "input or label that it names itself"
            raise InputError(
                f"{self} has no {wanted}, for {option}: found {', '.join(sorted(features))}; name "
                "them as in ?x=image&y=label"
            )
        return found

    def _images(self, images: ImageDecoding, inputs: Sequence[str]) -> ImageDecoding:
        """Returns the decoding with as many channels as the first image has."""
        found = [channels for name, channels in self.encoded_images.items() if name in inputs]
        if images.channels is None and found:
            return dataclasses.replace(images, channels=found[0])
        return images


def file_sizes(paths: Sequence[str]) -> list[int]:
    """Returns the sizes of files in bytes.

    Raises:
        InputError: One is not there.
    """
    import tensorflow as tf

    def size(path: str) -> int:
        try:
            return int(tf.io.gfile.stat(path).length)
        except tf.errors.OpError as error:
            raise InputError(f"{path!r} cannot be read: {error.message}") from error

    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(size, paths))


def _tensorflow_datasets() -> Any:
    try:
        import tensorflow_datasets as tfds  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError(
            f"examples tfds: TensorFlow Datasets is not installed ({error}): run pip install "
            "'tracin-transforms[tfds]'"
        ) from error
    return tfds
