"""Examples that are image files, in a folder for each class or listed in a table of labels."""

import csv
import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import ExampleBatch, ExampleSource, Shard
from tracin_transforms.examples.assembly import assemble, chunks
from tracin_transforms.examples.decoding import ImageDecoding
from tracin_transforms.examples.fields import Fields, InputField, Record, examples_of
from tracin_transforms.storage.files import AnyPath, any_path, existing_file, files_below
from tracin_transforms.storage.remote import refusals_named

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
_SHARD_SIZE = 2048
# A few shards at least, so that workers share even small data.
_FEWEST_SHARDS = 4
_SMALLEST_SHARD = 64
# Files of object stores take long to begin, so several are opened at a time.
_READERS = 16


@dataclass(frozen=True)
class ImageExamples(ExampleSource):
    """Examples that are image files below a directory, with their relative paths as ids.

    The label of an image is the rank of its folder's name among those directly below the
    directory, or the folder's line in a file of classes, or what a table of labels says.

    Attributes:
        directory: Where the images are.
        classes: A file with the name of a folder in each line, the first that of class 0.
        labels: A CSV file with columns ``file``, a path below the directory, and ``label``, a
            class index or a number; files that it does not list are ignored.
        images: How images are decoded.
    """

    directory: str
    classes: str | None = None
    labels: str | None = None
    images: ImageDecoding = ImageDecoding()

    def __post_init__(self) -> None:
        if self.classes is not None and self.labels is not None:
            raise InputError("examples images: classes and labels: expected one or the other")

    def shards(self) -> tuple[Shard, ...]:
        """Returns runs of up to 2,048 images in the order of their relative paths.

        Raises:
            InputError: There is no such directory; it has no images, or none in folders; a folder
                is not among the classes; the table lists a file that is not there.
        """
        return _listed(self).shards

    def read(self, shard: Shard, batch_size: int) -> Iterator[ExampleBatch]:
        """Yields the shard's images in order, `batch_size` at a time; the last may be fewer.

        Raises:
            InputError: The directory changed since the shards were listed; images are of
                different sizes.
        """
        listing = _known_listing(self)
        if shard not in listing.shards:
            raise InputError(
                f"examples images: {self.directory!r} changed: shard {shard.name!r} is no longer "
                "what it was when the shards were listed; run the job again"
            )
        fields = Fields(InputField("image", decode="image"), "label", images=self.images)
        directory = any_path(self.directory)
        files = enumerate(listing.files(listing.shards.index(shard)))
        with ThreadPoolExecutor(_READERS) as readers:
            for chunk in chunks(files, batch_size):
                contents = readers.map(lambda row: _content(directory, *row[1]), chunk)
                records = [
                    Record(i, path, {"image": content, "label": listing.label(path)})
                    for (i, (path, _)), content in zip(chunk, contents, strict=True)
                ]
                yield assemble(shard.name, examples_of(shard.name, records, fields))

    def describe(self) -> dict[str, Any]:
        """Returns what tells the files and labels from others, and how many files are ignored."""
        listing = _known_listing(self)
        options = {name: size for name, size in asdict(self.images).items() if size is not None}
        return {"kind": "images", **options, "sha256": listing.digest, "ignored": listing.ignored}


class _Listing(NamedTuple):
    """The images of a directory, millions perhaps, in little memory.

    Attributes:
        shards: The shards.
        paths: The relative paths of each shard, between zero characters.
        sizes: Of all files in bytes, shape [n].
        labels: By path, or by the name of a folder.
        digest: SHA-256 of paths, sizes and labels.
        ignored: Number of files that are no images, or have no label.
    """

    shards: tuple[Shard, ...]
    paths: tuple[str, ...]
    sizes: np.ndarray
    labels: Mapping[str, float]
    digest: str
    ignored: int

    def files(self, shard: int) -> list[tuple[str, int]]:
        """Returns the relative paths and sizes of a shard's images."""
        paths = self.paths[shard].split("\0")
        start = self.shards[shard].start
        return list(zip(paths, self.sizes[start : start + len(paths)].tolist(), strict=True))

    def label(self, path: str) -> float:
        """Returns the label of the image at a relative path."""
        return self.labels[path] if path in self.labels else self.labels[_folder(path)]


# What each process has listed: the training examples and the queries of one job.
_LISTINGS: dict[ImageExamples, _Listing] = {}
_KEPT_LISTINGS = 2


def _known_listing(source: ImageExamples) -> _Listing:
    return _LISTINGS.get(source) or _listed(source)


def _listed(source: ImageExamples) -> _Listing:
    _LISTINGS.pop(source, None)
    listing = _LISTINGS[source] = _list(source)
    for oldest in list(_LISTINGS)[:-_KEPT_LISTINGS]:
        del _LISTINGS[oldest]
    return listing


def _list(source: ImageExamples) -> _Listing:
    directory = any_path(source.directory)
    if not directory.is_dir():
        raise InputError(f"examples images: {source.directory!r} is no directory: expected one")
    root = len(str(directory).rstrip("/")) + 1
    below = ((str(path)[root:], size) for path, size in files_below(directory))
    files = sorted(file for file in below if not _is_hidden(file[0]))
    images = [(path, size) for path, size in files if path.lower().endswith(_SUFFIXES)]
    if not images:
        raise InputError(
            f"examples images: {source.directory!r} has no images among its {len(files)} files: "
            f"expected names that end in {', '.join(_SUFFIXES)}"
        )
    if source.labels is not None:
        labels = _labels(source.labels, {path for path, _ in images})
        images = [(path, size) for path, size in images if path in labels]
    else:
        labels = _class_indices(source, directory, [path for path, _ in files])
        images = [(path, size) for path, size in images if "/" in path]
    return _listing_of(images, labels, len(files) - len(images))


def _listing_of(
    images: list[tuple[str, int]], labels: Mapping[str, float], ignored: int
) -> _Listing:
    sizes = np.array([size for _, size in images], dtype=np.int64)
    fair = max(_SMALLEST_SHARD, -(-len(images) // _FEWEST_SHARDS))
    runs = list(chunks([path for path, _ in images], min(_SHARD_SIZE, fair)))
    starts = np.arange(len(runs)) * min(_SHARD_SIZE, fair)
    shards = tuple(
        Shard(
            f"images-{i:05d}-of-{len(runs):05d}",
            start=start,
            count=len(run),
            size=int(sizes[start : start + len(run)].sum()),
        )
        for i, (run, start) in enumerate(zip(runs, starts.tolist(), strict=True))
    )
    digest = hashlib.sha256(repr(sorted(labels.items())).encode())
    for path, size in images:
        digest.update(f"{path}\0{size}\0".encode(errors="surrogateescape"))
    paths = tuple("\0".join(run) for run in runs)
    return _Listing(shards, paths, sizes, labels, digest.hexdigest(), ignored)


def _class_indices(source: ImageExamples, directory: AnyPath, files: list[str]) -> dict[str, float]:
    """Returns the class index of each folder's name."""
    folders = {_folder(path) for path in files if "/" in path}
    if isinstance(directory, Path):
        # Those without any file are classes, too.
        folders |= {path.name for path in directory.iterdir() if path.is_dir()}
    folders = {folder for folder in folders if not _is_hidden(folder)}
    if not any("/" in path and path.lower().endswith(_SUFFIXES) for path in files):
        raise InputError(
            f"examples images: the images of {source.directory!r} are in no folders, so their "
            "classes are not known: expected a folder for each class, or ?labels=FILE.csv with "
            "columns file,label"
        )
    if source.classes is None:
        return {folder: i for i, folder in enumerate(sorted(folders))}
    classes = _lines(source.classes, "classes file")
    indices = {name: i for i, name in enumerate(classes)}
    if len(indices) < len(classes):
        twice = next(name for i, name in enumerate(classes) if indices[name] != i)
        raise InputError(f"classes file {source.classes!r} lists {twice!r} twice: expected once")
    unknown = sorted(folders - indices.keys())
    if unknown:
        raise InputError(
            f"examples images: folder {unknown[0]!r} is not in classes file {source.classes!r}: "
            "expected each folder's name on a line of its own, in the order of the class indices; "
            "add it, or move the folder away"
        )
    return {name: index for name, index in indices.items() if name in folders}


def _labels(table: str, images: set[str]) -> dict[str, float]:
    """Returns the label of each file that a table lists."""
    rows = csv.DictReader(_lines(table, "labels file"), restval="")
    if not {"file", "label"} <= set(rows.fieldnames or ()):
        raise InputError(
            f"labels file {table!r} has columns {rows.fieldnames}, expected file and label"
        )
    labels: dict[str, float] = {}
    for row in rows:
        file, text = row["file"], row["label"]
        if file not in images:
            raise InputError(
                f"labels file {table!r} line {rows.line_num}: there is no image {file!r}: expected "
                "a path below the directory"
            )
        try:
            labels[file] = int(text) if text.lstrip("+-").isdigit() else float(text)
        except ValueError as error:
            raise InputError(
                f"labels file {table!r} line {rows.line_num}: label {text!r}: expected a class "
                "index or a number"
            ) from error
    if not labels:
        raise InputError(f"labels file {table!r} lists no file: expected one on each line")
    if any(isinstance(label, float) for label in labels.values()):
        # One value that is no integer makes it a regression, in all batches alike.
        return {file: float(label) for file, label in labels.items()}
    return labels


def _lines(path: str, what: str) -> list[str]:
    text = existing_file(path, what).read_text(encoding="utf-8-sig")
    return [line.strip() for line in text.rstrip().splitlines()]


def _folder(path: str) -> str:
    return path.partition("/")[0]


def _is_hidden(path: str) -> bool:
    return path.startswith(".") or "/." in path


def _content(directory: AnyPath, path: str, size: int) -> bytes:
    file = directory / path
    try:
        with refusals_named(file, "read"):
            content = file.read_bytes()
    except FileNotFoundError:
        content = b""
    if len(content) != size:
        raise InputError(
            f"{str(file)!r} changed: it has {len(content):,} bytes and had {size:,} when the "
            "images were listed; run the job again"
        )
    return content
