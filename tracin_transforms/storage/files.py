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
    """Returns the path, absolute.

    Raises:
        InputError: It names another file system, such as ``gs://``.
    """
    if "://" in os.fspath(path):
        raise InputError(f"{os.fspath(path)!r}: only local paths are supported so far")
    return Path(path).expanduser().absolute()


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
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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

    def publish(self) -> None:
        """Moves the directory into place; what was there before is replaced."""
        previous = None
        if self.output.exists():
            previous = self.output.with_name(f".{self.output.name}.{uuid.uuid4().hex}.old")
            os.rename(self.output, previous)
        os.rename(self.path, self.output)
        if previous is not None:
            shutil.rmtree(previous)

    def discard(self) -> None:
        """Removes the staging directory with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
