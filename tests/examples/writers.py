"""The same small images, written in every form that sources read."""

import csv
import gzip
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tracin_transforms.examples.record_file import checksum

CLASSES = ("cat", "dog", "eel", "fox")


@dataclass(frozen=True, eq=False)
class Images:
    """Some images of random pixels, labelled.

    Attributes:
        pixels: Shape [n, 12, 12, 3], uint8.
        labels: Shape [n], of `CLASSES`.
        ids: Shape [n], so that sorting by class and id keeps the order.
    """

    pixels: np.ndarray
    labels: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def encoded(self) -> list[bytes]:
        """Returns the images as PNG."""
        return [encoded_image(pixels) for pixels in self.pixels]


def random_images(n: int) -> Images:
    rng = np.random.default_rng(n)
    labels = np.sort(rng.integers(0, len(CLASSES), n))
    ids = np.array([f"{CLASSES[label]}/{i:05d}.png" for i, label in enumerate(labels)])
    return Images(rng.integers(0, 256, (n, 12, 12, 3), dtype=np.uint8), labels, ids)


def encoded_image(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def serialized(**features: object) -> bytes:
    """Returns a `tf.train.Example` of bytes and numbers, or lists of them."""
    import tensorflow as tf

    example = tf.train.Example()
    for name, value in features.items():
        feature = example.features.feature[name]
        values = np.atleast_1d(value)
        if values.dtype.kind == "S":
            feature.bytes_list.value.extend(value if isinstance(value, list) else [value])
        else:
            kind = feature.float_list if values.dtype.kind == "f" else feature.int64_list
            kind.value.extend(values.tolist())
    return example.SerializeToString()


def record(data: bytes) -> bytes:
    """Returns the bytes of a record in a TFRecord file."""
    length = struct.pack("<Q", len(data))
    ends = [struct.pack("<I", checksum(part)) for part in (length, data)]
    return length + ends[0] + data + ends[1]


def shares(n: int, shards: int) -> list[slice]:
    """Returns n rows in as many runs."""
    ends = np.linspace(0, n, shards + 1).astype(int).tolist()
    return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def write_tfrecords(directory: Path, images: Images, shards: int, suffix: str = ".tfrecord") -> str:
    """Writes files of records and returns their SPEC."""
    encoded = images.encoded()
    for i, rows in enumerate(shares(len(images), shards)):
        content = b"".join(
            record(serialized(image=image, label=label, name=name.encode()))
            for image, label, name in zip(
                encoded[rows], images.labels[rows], images.ids[rows].tolist(), strict=True
            )
        )
        path = directory / f"data-{i:05d}{suffix}"
        path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    return f"tfrecord:{directory}/data-*{suffix}?x=image&y=label&id=name"


def write_parquet(directory: Path, images: Images, shards: int) -> str:
    """Writes files of rows and returns their SPEC."""
    encoded = images.encoded()
    for i, rows in enumerate(shares(len(images), shards)):
        columns = {
            "image": [{"bytes": image, "path": "a.png"} for image in encoded[rows]],
            "label": images.labels[rows],
            "name": images.ids[rows].tolist(),
        }
        pq.write_table(pa.table(columns), directory / f"data-{i:05d}.parquet", row_group_size=300)
    return f"parquet:{directory}/data-*.parquet?x=image&y=label&id=name"


def write_image_files(directory: Path, images: Images) -> str:
    """Writes a file for each image, in a folder for each class, and returns their SPEC."""
    for name in CLASSES:
        (directory / name).mkdir(parents=True)
    for name, content in zip(images.ids.tolist(), images.encoded(), strict=True):
        (directory / name).write_bytes(content)
    return f"images:{directory}"


def write_labels(path: Path, images: Images) -> Path:
    """Writes the table of the labels of `write_image_files`."""
    with path.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["file", "label"])
        writer.writerows(zip(images.ids.tolist(), images.labels.tolist(), strict=True))
    return path


def write_npz(directory: Path, images: Images) -> str:
    """Writes an archive and returns its SPEC."""
    np.savez(directory / "data.npz", x=images.pixels, y=images.labels, id=images.ids)
    return f"npz:{directory}/data.npz?id=id"


def write_tfds(directory: Path, splits: dict[str, tuple[Images, int]], name: str = "tiny") -> str:
    """Writes a data set as TensorFlow Datasets prepares them and returns the SPEC of "train".

    Args:
        directory: The DATA_DIR.
        splits: Images and number of files of each split.
        name: Of the data set.
    """
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=CLASSES),
            "name": tfds.features.Text(),
        }
    )
    place = directory / name / "1.0.0"
    place.mkdir(parents=True)
    infos = []
    for split, (images, shards) in splits.items():
        lengths, total = [], 0
        for i, rows in enumerate(shares(len(images), shards)):
            records = _tfds_records(features, images, rows)
            lengths.append(len(records))
            total += sum(map(len, records))
            path = place / f"{name}-{split}.tfrecord-{i:05d}-of-{shards:05d}"
            path.write_bytes(b"".join(map(record, records)))
        info = tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=total)
        infos.append(info)
    tfds.folder_dataset.write_metadata(
        data_dir=str(place),
        features=features,
        split_infos=infos,
        supervised_keys=("image", "label"),
        check_data=False,
    )
    return f"tfds:{name}:train@{directory}?id=name"


def _tfds_records(features: object, images: Images, rows: slice) -> Sequence[bytes]:
    values = zip(images.pixels[rows], images.labels[rows], images.ids[rows].tolist(), strict=True)
    return [
        features.serialize_example(
            features.encode_example({"image": pixels, "label": int(label), "name": name})
        )
        for pixels, label, name in values
    ]


# How a SPEC comes of a directory, images and a number of shards.
FORMS = {
    "npz": lambda path, images, shards: write_npz(path, images),
    "tfrecord": write_tfrecords,
    "tfrecord.gz": lambda *a: write_tfrecords(*a, suffix=".tfrecord.gz"),
    "parquet": write_parquet,
    "images": lambda path, images, shards: write_image_files(path / "images", images),
    "tfds": lambda path, images, shards: write_tfds(path, {"train": (images, shards)}),
}
