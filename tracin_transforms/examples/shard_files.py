"""The files that a pattern names, as shards are made of them."""

from typing import NamedTuple

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import Shard
from tracin_transforms.storage.files import (
    AnyPath,
    any_path,
    existing_file,
    fixed_directory,
    matching_files,
    version,
)

_SUFFIXES = (".tfrecord", ".tfrecords", ".parquet", ".gz")


class NamedFile(NamedTuple):
    """A file of examples.

    Attributes:
        name: What its shards are named after: its path below the pattern's fixed part.
        path: The file.
        size: Its size in bytes.
    """

    name: str
    path: AnyPath
    size: int


def named_files(pattern: str, kind: str) -> list[NamedFile]:
    """Returns the files that match a pattern, by name.

    Args:
        pattern: Path of a file, or with ``*`` and ``[...]``.
        kind: What kind of source they are for, for the message.

    Raises:
        InputError: No file matches, or two would have the same name.
    """
    root = str(fixed_directory(pattern)).rstrip("/")
    found: dict[str, NamedFile] = {}
    for path, size in matching_files(pattern):
        file = NamedFile(_name(str(path).removeprefix(root)), path, size)
        other = found.setdefault(file.name, file)
        if other is not file:
            raise InputError(
                f"examples {kind}: {str(other.path)!r} and {str(path)!r} would both be named "
                f"{file.name!r}: rename one of them"
            )
    if not found:
        hint = f"{pattern.rstrip('/')}/*" if any_path(pattern).is_dir() else "a file or a pattern"
        raise InputError(f"examples {kind}: no file matches {pattern!r}: expected {hint}")
    return [found[name] for name in sorted(found)]


def unchanged_file(shard: Shard) -> AnyPath:
    """Returns the file of a shard that is a whole file.

    Raises:
        InputError: It is no longer there, or no longer of the size that it had.
    """
    file = existing_file(shard.path, "examples file")
    size = version(file)[0]
    if size != shard.size:
        raise InputError(
            f"examples file {shard.path!r} changed: it has {size:,} bytes and had {shard.size:,} "
            "when its shards were listed; run the job again"
        )
    return file


def _name(path: str) -> str:
    name = path.lstrip("/").replace("/", "-")
    while suffix := next((s for s in _SUFFIXES if name.endswith(s) and name != s), None):
        name = name.removesuffix(suffix)
    return name
