"""Paths in object stores, ``gs://bucket/file``, with the methods of `pathlib.Path` used here.

Reads and writes go through `pyarrow.fs`, which retries what fails in passing.
"""

import contextlib
import functools
import os
import posixpath
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow import ArrowException
from pyarrow import fs as arrow_fs

from tracin_transforms.core.errors import InputError

# How long a request that fails in passing (503, a cut connection) is tried again.
RETRY_LIMIT = timedelta(minutes=5)
_URI = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<authority>[^/]*)(?P<path>/.*)?", re.S)
# Set by those who run an emulator instead of Google Cloud Storage.
_EMULATOR = "STORAGE_EMULATOR_HOST"
_CREDENTIALS = "GOOGLE_APPLICATION_CREDENTIALS"
_METADATA_SERVER = "metadata.google.internal"


def is_remote(path: str) -> bool:
    """Returns whether a path names another file system, as ``gs://bucket/file`` does."""
    found = _URI.fullmatch(path)
    return found is not None and found["scheme"] != "file"


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or directory in an object store.

    Files appear when they are complete. Directories are what the names of files share; they
    need not be made.

    Attributes:
        uri: ``scheme://authority/path``, without a slash at the end. ``gs://anonymous@bucket``
            reads a public bucket without credentials.

    Raises:
        InputError: The URI is not of that form. Of all methods: the object store refuses.
    """

    uri: str

    def __post_init__(self) -> None:
        found = _URI.fullmatch(self.uri)
        if found is None or not (found["authority"] or found["path"]):
            raise InputError(f"{self.uri!r}: expected a URI such as gs://bucket/directory")
        path = posixpath.normpath(found["path"] or "/").lstrip("/")
        if path in (".", "..") or path.startswith("../"):
            path = ""
        root = f"{found['scheme']}://{found['authority']}"
        object.__setattr__(self, "uri", f"{root}/{path}" if path else root)

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(name if is_remote(name) else f"{self.uri}/{name}")

    @property
    def name(self) -> str:
        """The part after the last slash."""
        return self._pure.name

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return self._pure.stem

    @property
    def suffix(self) -> str:
        """What follows the name's last dot, with the dot."""
        return self._pure.suffix

    @property
    def parent(self) -> "RemotePath":
        """The directory that holds this."""
        return self / ".."

    def with_name(self, name: str) -> "RemotePath":
        """Returns the path of that name in the same directory."""
        return self.parent / name

    def resolve(self) -> "RemotePath":
        """Returns the path: there are no links."""
        return self

    def is_mount(self) -> bool:
        """Returns whether this is a whole bucket."""
        return not self._pure.name

    def is_file(self) -> bool:
        """Returns whether there is a file of this name."""
        return bool(self._info().type == arrow_fs.FileType.File)

    def is_dir(self) -> bool:
        """Returns whether there are files below this name."""
        return bool(self._info().type == arrow_fs.FileType.Directory)

    def exists(self) -> bool:
        """Returns whether there is a file or directory of this name."""
        return bool(self._info().type != arrow_fs.FileType.NotFound)

    def version(self) -> tuple[int, int]:
        """Returns size in bytes and time of the last change in ns, which tell versions apart."""
        info = self._info()
        return info.size or 0, info.mtime_ns or 0

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: directories need not be made."""

    def files(self) -> "list[tuple[RemotePath, int]]":
        """Returns all files below this directory with their sizes in bytes, by name."""
        with refusals_named(self, "read"):
            selector = arrow_fs.FileSelector(self._path, allow_not_found=True, recursive=True)
            infos = self._filesystem.get_file_info(selector)
        root = len(self._path.rstrip("/")) + 1
        found = [
            (self / info.path[root:], info.size)
            for info in infos
            if info.type == arrow_fs.FileType.File
        ]
        return sorted(found)

    def iterdir(self) -> "Iterator[RemotePath]":
        """Yields what is directly in this directory."""
        root = len(self.uri) + 1
        names = (file.uri[root:].partition("/")[0] for file, _ in self.files())
        yield from (self / name for name in dict.fromkeys(names))

    def glob(self, pattern: str) -> "Iterator[RemotePath]":
        """Yields what is directly in this directory and matches a pattern."""
        yield from (p for p in self.iterdir() if PurePosixPath(p.name).match(pattern))

    def open(self, mode: str = "rb", buffering: int = -1) -> Any:
        """Opens the file for reading bytes at any place."""
        if mode != "rb":
            raise ValueError(f"mode is {mode!r}, expected 'rb'")
        with refusals_named(self, "read"):
            return self._filesystem.open_input_file(self._path)

    def stream(self) -> Any:
        """Opens the file for reading bytes from the beginning to the end."""
        with refusals_named(self, "read"):
            return self._filesystem.open_input_stream(self._path, compression=None)

    def read_bytes(self) -> bytes:
        """Returns the file's content."""
        with refusals_named(self, "read"), self.stream() as stream:
            content: bytes = stream.read()
            return content

    def read_text(self, encoding: str = "utf-8") -> str:
        """Returns the file's content as text."""
        return self.read_bytes().decode(encoding)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Writes a file of this text."""
        self.write_bytes(text.encode(encoding))

    def write_bytes(self, content: bytes) -> None:
        """Writes a file of this content."""
        with (
            refusals_named(self, "written"),
            # Without what Arrow would do to a name that ends in .gz.
            self._filesystem.open_output_stream(self._path, compression=None) as stream,
        ):
            stream.write(content)

    def upload(self, file: Path) -> None:
        """Makes this a copy of a local file."""
        with refusals_named(self, "written"):
            arrow_fs.copy_files(str(file), self._path, destination_filesystem=self._filesystem)

    def download(self, file: Path) -> None:
        """Makes a local copy of this file."""
        with refusals_named(self, "read"):
            arrow_fs.copy_files(self._path, str(file), source_filesystem=self._filesystem)

    def rename(self, target: "RemotePath") -> None:
        """Moves the file to another place in the same object store."""
        with refusals_named(target, "written"):
            self._filesystem.move(self._path, target._path)

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the file."""
        try:
            with refusals_named(self, "removed"):
                self._filesystem.delete_file(self._path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self) -> None:
        """Removes all files below this directory."""
        for file, _ in self.files():
            file.unlink(missing_ok=True)

    @property
    def _pure(self) -> PurePosixPath:
        found = _URI.fullmatch(self.uri)
        assert found is not None
        return PurePosixPath(found["path"] or "/")

    @property
    def _filesystem(self) -> arrow_fs.FileSystem:
        return self._opened[0]

    @property
    def _path(self) -> str:
        base = self._opened[1].rstrip("/")
        return f"{base}{self._pure}".rstrip("/") or "/"

    @property
    def _opened(self) -> tuple[arrow_fs.FileSystem, str]:
        found = _URI.fullmatch(self.uri)
        assert found is not None
        return _open_filesystem(found["scheme"], found["authority"], os.environ.get(_EMULATOR))

    def _info(self) -> arrow_fs.FileInfo:
        with refusals_named(self, "read"):
            return self._filesystem.get_file_info(self._path)


@contextlib.contextmanager
def refusals_named(path: Path | RemotePath, what: str) -> Iterator[None]:
    """Turns what a system refuses into an InputError with the path; files missing stay so.

    Beam cannot raise a worker's OSError as what it is.
    """
    try:
        yield
    except (OSError, ArrowException) as error:
        # Google's client adds a page of metadata.
        reason = str(error).partition(" error_info=")[0]
        if isinstance(error, FileNotFoundError) and what != "written":
            raise FileNotFoundError(f"{str(path)!r} is not there: {reason}") from error
        raise InputError(f"{str(path)!r} cannot be {what}: {reason}") from error


@functools.cache
def _open_filesystem(
    scheme: str, authority: str, emulator: str | None
) -> tuple[arrow_fs.FileSystem, str]:
    """Returns the file system of a URI and the path of its root in it."""
    if scheme in ("gs", "gcs"):
        bucket = authority.rpartition("@")[2]
        if emulator:
            protocol, _, host = emulator.rpartition("://")
            return arrow_fs.GcsFileSystem(
                anonymous=True,
                endpoint_override=host.rstrip("/"),
                scheme=protocol or "http",
                retry_time_limit=RETRY_LIMIT,
            ), bucket
        is_public = authority.startswith("anonymous@")
        if not is_public:
            _check_google_credentials(f"{scheme}://{authority}")
        return arrow_fs.GcsFileSystem(anonymous=is_public, retry_time_limit=RETRY_LIMIT), bucket
    uri = f"{scheme}://{authority}/"
    try:
        filesystem, path = arrow_fs.FileSystem.from_uri(uri)
    except (OSError, ArrowException) as error:
        raise InputError(
            f"{uri!r} cannot be used: {error}; expected a local path, gs://, s3://, or hdfs:// "
            "with Hadoop's library installed"
        ) from error
    return filesystem, path


def _check_google_credentials(uri: str) -> None:
    """Raises InputError where there are none; a request would try to find some for minutes."""
    config = os.environ.get("CLOUDSDK_CONFIG", "~/.config/gcloud")
    file = Path(config).expanduser() / "application_default_credentials.json"
    if os.environ.get(_CREDENTIALS) or file.is_file():
        return
    try:
        # The machines of Google's cloud have credentials of their own.
        socket.getaddrinfo(_METADATA_SERVER, 80)
    except OSError as error:
        raise InputError(
            f"{uri!r}: no Google credentials found: run 'gcloud auth application-default login', "
            f"or set {_CREDENTIALS} to a key file; a public bucket is read without, as "
            f"{uri.replace('://', '://anonymous@')}"
        ) from error
