"""Files and directories that are either complete or not there, on disk or in object stores."""

import contextlib
import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from fnmatch import translate
from glob import glob
from pathlib import Path
from typing import Any

import psutil

from tracin_transforms.core.errors import InputError
from tracin_transforms.storage.remote import RemotePath, is_remote, refusals_named

# A file or directory on disk or in an object store. Both kinds have the methods used here.
AnyPath = Path | RemotePath

_MAGIC = re.compile(r"[*?\[]")
_TEMPORARY = re.compile(r"\.(?P<host>[^~]*)~(?P<pid>\d+)~[0-9a-f]{32}.*")
# After a day, a temporary file of another machine is taken to be one of a dead process.
_FOREIGN_SECONDS = 86_400


def any_path(path: str | os.PathLike[str] | RemotePath) -> AnyPath:
    """Returns a local path, absolute and without ``..``, or that of an object store.

    Raises:
        InputError: It is empty, or not of the form of a path.
    """
    if isinstance(path, RemotePath):
        return path
    text = os.fspath(path)
    return RemotePath(text) if is_remote(text) else local_path(text)


def local_path(path: str | os.PathLike[str]) -> Path:
    """Returns the path, absolute and without ``..``.

    Raises:
        InputError: It is empty, or names another file system, such as ``gs://``.
    """
    text = os.fspath(path)
    if not text:
        raise InputError("the path is empty: expected a file or directory")
    if is_remote(text):
        raise InputError(f"{text!r}: expected a local path")
    return Path(os.path.abspath(Path(text.removeprefix("file://")).expanduser()))


def existing_file(path: str | os.PathLike[str] | RemotePath, what: str) -> AnyPath:
    """Returns the absolute path of a file that exists.

    Raises:
        InputError: There is no such file; the message begins with `what`.
    """
    file = any_path(path)
    if not file.is_file():
        found = "is a directory" if file.is_dir() else "does not exist"
        raise InputError(f"{what} {str(path)!r} {found}: expected a file")
    return file


def version(path: AnyPath) -> tuple[int, int]:
    """Returns size in bytes and time of the last change in ns, which tell versions apart."""
    if isinstance(path, RemotePath):
        return path.version()
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def files_below(directory: AnyPath) -> list[tuple[AnyPath, int]]:
    """Returns all files below a directory, and their sizes in bytes, by name."""
    if isinstance(directory, RemotePath):
        return list(directory.files())
    files = (path for path in directory.rglob("*") if not path.is_dir())
    return [(path, path.stat().st_size) for path in sorted(files)]


def matching_files(pattern: str) -> list[tuple[AnyPath, int]]:
    """Returns all files that match a pattern, and their sizes in bytes, by name.

    Args:
        pattern: With ``*``, ``?`` and ``[...]`` within a part of a path, ``**`` across parts.
    """
    if not is_remote(pattern):
        found = [Path(path) for path in glob(str(local_path(pattern)), recursive=True)]
        return [(path, path.stat().st_size) for path in sorted(found) if path.is_file()]
    if not _MAGIC.search(pattern):
        file = RemotePath(pattern)
        return [(file, file.version()[0])] if file.is_file() else []
    parts = re.split(r"(\*\*/|[^/]+)", str(RemotePath(pattern)))
    expression = "".join(
        "(?:.*/)?" if part == "**/" else translate(part)[4:-3].replace(".*", "[^/]*")
        for part in parts
    )
    files = fixed_directory(pattern)
    assert isinstance(files, RemotePath)
    return [(file, size) for file, size in files.files() if re.fullmatch(expression, str(file))]


def fixed_directory(pattern: str) -> AnyPath:
    """Returns the directory that all files are in that can match a pattern."""
    before = _MAGIC.split(pattern)[0]
    return any_path(before.rpartition("/")[0] or ("/" if before.startswith("/") else "."))


def temporary_name(suffix: str = "") -> str:
    """Returns a hidden name, unique, by which `remove_dead` knows whose it is."""
    return f".{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex}{suffix}"


def is_temporary(path: AnyPath) -> bool:
    """Returns whether a file has a name of `temporary_name`."""
    return is_temporary_name(path.name)


def is_temporary_name(name: str) -> bool:
    """Returns whether a name is one of `temporary_name`."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_dead(directory: AnyPath, own: bool = False) -> None:
    """Removes what dead processes left under temporary names directly in a directory.

    Args:
        directory: Where to look.
        own: This process is about to end: what it left, too.
    """
    paths: list[AnyPath] = list(directory.iterdir()) if directory.is_dir() else []
    for path in paths:
        # Others may remove it, too, or it may be finished meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if is_temporary(path) and (not _is_alive(path) or (own and _pid(path) == os.getpid())):
                remove_tree(path)


def others_at_work(output: AnyPath, purpose: str) -> bool:
    """Returns whether another process has a `StagedDirectory` of that purpose for an output."""
    place = _staging_place(output)
    paths: list[AnyPath] = list(place.iterdir()) if place.is_dir() else []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            same = is_temporary(path) and path.name.endswith(f".{output.name}.{purpose}")
            if same and _is_alive(path) and _pid(path) != os.getpid():
                return True
    return False


def _is_alive(path: AnyPath) -> bool:
    """Returns whether the process that gave a temporary name may still be at it."""
    found = _TEMPORARY.fullmatch(path.name)
    assert found is not None
    if found["host"] == socket.gethostname():
        return psutil.pid_exists(int(found["pid"]))
    if isinstance(path, RemotePath):
        changed = max((version(file)[1] for file, _ in path.files()), default=0) / 1e9
    else:
        changed = path.stat().st_mtime
    return time.time() - changed < _FOREIGN_SECONDS


def _pid(path: AnyPath) -> int | None:
    """Returns the process of this machine that gave a temporary name, or None."""
    found = _TEMPORARY.fullmatch(path.name)
    assert found is not None
    return int(found["pid"]) if found["host"] == socket.gethostname() else None


def _staging_place(output: AnyPath) -> AnyPath:
    """Returns where an output's staging directories are: beside it, so that it can be moved.

    Object stores move file by file; there they are within it, where they are easily found.
    """
    return output if isinstance(output, RemotePath) else output.parent


def remove_tree(path: AnyPath) -> None:
    """Removes a directory with all that is in it, or a file."""
    if isinstance(path, RemotePath):
        path.rmtree()
        path.unlink(missing_ok=True)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def written_atomically(path: AnyPath) -> Iterator[Path]:
    """Gives a temporary local path to write to, which becomes `path` if the block succeeds.

    The last writer wins. In the same file system, the move is atomic; in an object store, a file
    appears when all of it has arrived.

    Raises:
        InputError: The system refuses, for example because the disk is full.
    """
    name = temporary_name(path.suffix)
    with contextlib.ExitStack() as stack:
        if isinstance(path, RemotePath):
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory())) / name
        else:
            temporary = path.with_name(name)
            stack.callback(temporary.unlink, missing_ok=True)
        with refusals_named(path, "written"):
            yield temporary
            if isinstance(path, RemotePath):
                path.upload(temporary)
            else:
                os.replace(temporary, path)


def written_once(path: AnyPath, text: str) -> bool:
    """Writes a file unless there is one of that name, and returns whether it did.

    Raises:
        InputError: The system refuses.
    """
    if isinstance(path, RemotePath):
        # Object stores are not asked for more: of two processes that come at the same moment,
        # the last one wins.
        if path.is_file():
            return False
        path.write_text(text)
        return True
    temporary = path.with_name(temporary_name(path.suffix))
    with refusals_named(path, "written"):
        try:
            temporary.write_text(text, encoding="utf-8")
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
    return True


def move(source: Path, target: Path) -> None:
    """Moves a file to its place in the same directory; the last writer wins.

    Raises:
        InputError: The system refuses.
    """
    with refusals_named(target, "written"):
        os.replace(source, target)


def mark(path: AnyPath) -> None:
    """Makes an empty file; the same mark twice is one.

    Raises:
        InputError: The system refuses.
    """
    with refusals_named(path, "written"):
        if isinstance(path, RemotePath):
            path.write_bytes(b"")
        else:
            path.touch()


def sha256(path: AnyPath) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open_stream(path) as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def open_stream(path: AnyPath) -> Any:
    """Opens a file for reading bytes from the beginning to the end."""
    return path.stream() if isinstance(path, RemotePath) else path.open("rb")


def fetched(path: AnyPath) -> Path:
    """Returns a local file of the same content: the file itself, or a copy of a remote one.

    Copies are kept in the directory for temporary files, where all processes of this user find
    them.

    Raises:
        InputError: The file cannot be read, or its copy not be written.
    """
    if not isinstance(path, RemotePath):
        return path
    identity = hashlib.sha256(repr((path.uri, path.version())).encode()).hexdigest()[:32]
    directory = Path(tempfile.gettempdir()) / f"tracin-{os.getuid()}" / identity
    with refusals_named(directory, "written"):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    copy = directory / path.name
    if not copy.is_file():
        with written_atomically(copy) as temporary:
            path.download(temporary)
    return copy


class StagedDirectory:
    """An output directory that is filled elsewhere and moved into place when it is complete.

    Args:
        output: Where the complete directory is to be.
        purpose: Part of the name, to tell it from others for the same output.
    """

    def __init__(self, output: AnyPath, purpose: str = "partial") -> None:
        self.output = output
        self.path: AnyPath = _staging_place(output) / temporary_name(f".{output.name}.{purpose}")

    def create(self) -> AnyPath:
        """Makes the empty staging directory and returns it.

        Raises:
            InputError: The directory that is to hold the output cannot be written to.
        """
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"output {str(self.output)!r} cannot be written: {error}") from error
        return self.path

    def publish(self, last: str) -> AnyPath | None:
        """Moves the directory into place.

        A local directory moves as a whole. In an object store files move one by one, and what was
        there before is removed.

        Args:
            last: Name of the file that comes last, whose presence says that all are there.

        Returns:
            Where the directory is now that was there before, for the caller to remove; or None.

        Raises:
            OSError: It cannot be moved; then both directories are where they were.
        """
        if isinstance(self.path, RemotePath):
            assert isinstance(self.output, RemotePath)
            _publish_remote(self.path, self.output, last)
            return None
        assert isinstance(self.output, Path)
        previous = None
        if self.output.exists():
            previous = self.output.with_name(temporary_name(".old"))
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
        if isinstance(self.path, RemotePath):
            self.path.rmtree()
            return
        # Under a name that no thread of an interrupted pipeline knows and could write into.
        doomed = self.path.with_suffix(".gone")
        with contextlib.suppress(OSError):
            os.rename(self.path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _publish_remote(staged: RemotePath, output: RemotePath, last: str) -> None:
    (output / last).unlink(missing_ok=True)
    files = [file for file, _ in staged.files()]
    for path in output.iterdir():
        if not is_temporary(path):
            remove_tree(path)
    for file in sorted(files, key=lambda file: file.name == last):
        file.rename(output / file.uri.removeprefix(f"{staged.uri}/"))
