"""Files and directories that are either complete or not there."""

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from tracin_transforms.core.errors import InputError


def local_path(path: str | os.PathLike[str]) -> Path:
    """Returns the path, absolute and without ``..``.

    Raises:
        InputError: It is empty, or names another file system, such as ``gs://``.
    """
    text = os.fspath(path)
    if not text:
        raise InputError("the path is empty: expected a file or directory")
    if "://" in text:
        raise InputError(f"{text!r}: only local paths are supported so far")
    return Path(os.path.abspath(Path(text).expanduser()))


def existing_file(path: str | os.PathLike[str], what: str) -> Path:
    """Returns the absolute path of a file that exists.

    Raises:
        InputError: There is no such file; the message begins with `what`.
    """
    file = local_path(path)
    if not file.is_file():
        found = "is a directory" if file.is_dir() else "does not exist"
        raise InputError(f"{what} {os.fspath(path)!r} {found}: expected a file")
    return file


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to, which becomes `path` if the block succeeds.

    The temporary file lies in the same directory, so the move is atomic and the last writer wins.

    Raises:
        InputError: The system refuses, for example because the disk is full.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        with _refusals_named(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
    """Moves a file to its place in the same directory; the last writer wins.

    Raises:
        InputError: The system refuses.
    """
    with _refusals_named(target):
        os.replace(source, target)


@contextlib.contextmanager
def _refusals_named(path: Path) -> Iterator[None]:
    """Turns an OSError into an InputError; Beam cannot raise a worker's OSError as what it is."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error}") from error


def mark(path: Path) -> None:
    """Makes an empty file; the same mark twice is one.

    Raises:
        InputError: The system refuses.
    """
    with _refusals_named(path):
        path.touch()


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class StagedDirectory:
    """An output directory that is filled beside its place and moved there when it is complete.

    Args:
        output: Where the complete directory is to be.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(f".{output.name}.{uuid.uuid4().hex}.partial")

    def create(self) -> Path:
        """Makes the empty staging directory and returns it.

        Raises:
            InputError: The directory that is to hold the output cannot be written to.
        """
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"output {str(self.output)!r} cannot be written: {error}") from error
        return self.path

    def publish(self) -> Path | None:
        """Moves the directory into place.

        Returns:
            Where the directory is now that was there before, for the caller to remove; or None.

        Raises:
            OSError: It cannot be moved; then both directories are where they were.
        """
        previous = None
        if self.output.exists():
            previous = self.output.with_name(f".{uuid.uuid4().hex}.old")
            os.rename(self.output, previous)
        try:
            os.rename(self.path, self.output)
        except OSError:
            if previous is not None:
                os.rename(previous, self.output)
            raise
        return previous

    def discard(self) -> None:
        """Removes the staging directory with all that is in it, if it is still there."""
        # Under a name that no thread of an interrupted pipeline knows and could write into.
        doomed = self.path.with_suffix(".gone")
        with contextlib.suppress(OSError):
            os.rename(self.path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
