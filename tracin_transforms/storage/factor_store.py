"""A factor store: the gradient factors of a training set, computed once.

    STORE/store.json                what the factors are of; written first
    STORE/factors/SHARD.arrow       gradient factors of a shard, all checkpoints
    STORE/examples/SHARD.parquet    its sidecar; where it is, the shard is complete
    STORE/skipped-*.parquet         examples that could not be used, if there are any
    STORE/manifest.json             all files with their checksums; written last

What a shard's files are called follows from the shard, so that work that is done twice overwrites
itself with the same bytes.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.example_ids import check_unique
from tracin_transforms.core.protocols import BadExample, Shard
from tracin_transforms.storage.factor_shard import ShardPaths, StoredShard
from tracin_transforms.storage.files import (
    AnyPath,
    any_path,
    files_below,
    is_temporary_name,
    remove_dead,
    remove_tree,
    sha256,
    temporary_name,
    version,
    written_atomically,
    written_once,
)
from tracin_transforms.storage.manifest import FILE_NAME as MANIFEST
from tracin_transforms.storage.manifest import read_manifest, write_manifest
from tracin_transforms.storage.remote import RemotePath
from tracin_transforms.storage.results import write_skipped
from tracin_transforms.storage.sidecar import Sidecar, read_sidecar
from tracin_transforms.storage.store_description import FORMAT, StoreDescription

_FILE_NAME = "store.json"
_READERS = 16


@dataclass(frozen=True)
class FactorStore:
    """The directory of gradient factors.

    Attributes:
        directory: Where it is.
        description: What its factors are of.
    """

    directory: AnyPath
    description: StoreDescription

    @classmethod
    def open(cls, directory: str | os.PathLike[str] | RemotePath) -> "FactorStore":
        """Returns the store in a directory.

        Raises:
            InputError: There is none, or of another format.
        """
        path = any_path(directory)
        file = path / _FILE_NAME
        if not file.is_file():
            raise InputError(
                f"{str(directory)!r} is no factor store: it has no {_FILE_NAME}; write one with "
                "'tracin extract'"
            )
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            if document["format"] != FORMAT:
                raise InputError(
                    f"{str(file)!r} has format {document['format']}, expected {FORMAT}"
                )
            return cls(path, StoreDescription.from_json(document))
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{str(file)!r} is damaged: {error!r}") from error

    @classmethod
    def prepare(
        cls, directory: AnyPath, wanted: StoreDescription, others: bool = False
    ) -> "FactorStore":
        """Returns the store in a directory, made or extended to hold what is wanted.

        What dead processes left half written is removed. Nothing is changed where the wanted
        factors do not belong into the store.

        Args:
            directory: Where the store is, or is to be.
            wanted: What it is to hold, beside what it holds.
            others: Whether another process is filling it now.

        Raises:
            InputError: The directory holds something else, or factors of another kind.
        """
        _check_is_store_or_empty(directory)
        store = cls(directory, wanted)
        try:
            for part in (store._factors, store._examples):
                part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output {str(directory)!r} cannot be written: {error}") from error
        for part in (store._factors, store._examples):
            remove_dead(part)
        if written_once(directory / _FILE_NAME, _as_text(wanted.to_json())):
            return store
        known = cls.open(directory)
        stored = {name: s.layout.checkpoint_ids for name, s in known.stored().items()}
        try:
            joined = wanted
            # A first try that came to nothing does not bind the next one.
            if stored or others:
                joined = known.description.extended(wanted, stored)
            if others and joined.to_json() != known.description.to_json():
                raise InputError(
                    "is being filled by another run with other checkpoints or shards: wait for "
                    "its end, or choose another directory"
                )
        except InputError as error:
            raise InputError(f"output {str(directory)!r} {error}") from error
        # As both are written: files may lie elsewhere now.
        if joined.to_json() != known.description.to_json():
            (directory / MANIFEST).unlink(missing_ok=True)
            with written_atomically(directory / _FILE_NAME) as temporary:
                temporary.write_text(_as_text(joined.to_json()), encoding="utf-8")
        return cls(directory, joined)

    def paths(self, shard: str) -> ShardPaths:
        """Returns where a shard of that name lies."""
        return ShardPaths(self._factors / f"{shard}.arrow", self._examples / f"{shard}.parquet")

    def shard(self, name: str, with_peaks: bool = False) -> StoredShard:
        """Returns a shard, without its factors; with the peaks of its rows if they are wanted."""
        return StoredShard.open(self.paths(name), with_peaks)

    def stored(self, whole: bool = False) -> dict[str, Sidecar]:
        """Returns the complete shards by name, without their rows.

        A shard is complete when its sidecar is there and its factor file has the size that the
        sidecar says; it may lack checkpoints.

        Args:
            whole: Read sidecars to the end, so that one that is damaged anywhere counts as none.
        """
        there = {path.name for path in self._examples.iterdir()} if self._examples.is_dir() else ()
        sizes = {path.name: size for path, size in _files(self._factors)}

        def read(shard: Shard) -> Sidecar | None:
            paths = self.paths(shard.name)
            if paths.sidecar.name not in there or paths.factors.name not in sizes:
                return None
            with contextlib.suppress(InputError, FileNotFoundError):
                found = replace(read_sidecar(paths.sidecar, with_rows=whole), rows=None)
                if found.is_of(shard) and found.file.size == sizes[paths.factors.name]:
                    return found
            return None

        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(read, self.description.shards))
        return {sidecar.shard.name: sidecar for sidecar in found if sidecar is not None}

    def stored_shard(self, shard: Shard) -> StoredShard | None:
        """Returns a shard as it is stored now, with whatever checkpoints; None if it is not."""
        with contextlib.suppress(InputError, FileNotFoundError):
            found = self.shard(shard.name)
            size, _ = version(found.paths.factors)
            if found.sidecar.is_of(shard) and size == found.sidecar.file.size:
                return found
        return None

    def missing(
        self, checkpoint_ids: Sequence[str], stored: dict[str, Sidecar]
    ) -> dict[str, list[Shard]]:
        """Returns for each checkpoint the shards that have no factors of it."""
        return {
            checkpoint_id: [
                shard
                for shard in self.description.shards
                if shard.name not in stored
                or checkpoint_id not in stored[shard.name].layout.checkpoint_ids
            ]
            for checkpoint_id in checkpoint_ids
        }

    def check_complete(self, checkpoint_ids: Sequence[str]) -> dict[str, Sidecar]:
        """Returns all shards by name, without their rows.

        Raises:
            InputError: Shards lack factors of these checkpoints, or checkpoints are unknown.
        """
        unknown = [name for name in checkpoint_ids if name not in self.description.checkpoint_ids]
        if unknown:
            raise InputError(
                f"store {str(self.directory)!r} has no checkpoint {unknown[0]!r}: it has "
                f"{', '.join(self.description.checkpoint_ids)}; 'tracin extract' adds others"
            )
        stored = self.stored()
        for checkpoint_id, shards in self.missing(checkpoint_ids, stored).items():
            if shards:
                raise InputError(
                    f"store {str(self.directory)!r}: checkpoint {checkpoint_id!r} has no factors "
                    f"for {len(shards)} of {len(self.description.shards)} shards (first: "
                    f"{shards[0].name}); run the same 'tracin extract' again to fill them"
                )
        return stored

    def remove_temporary(self) -> None:
        """Removes what this process, which is about to end, and dead ones left half written."""
        for part in (self.directory, self._factors, self._examples):
            remove_dead(part, own=True)

    def check_finished(self) -> None:
        """Raises InputError if the command that fills the store did not come to its end."""
        if not self.is_finished():
            raise InputError(
                f"store {str(self.directory)!r} is not finished: run the same 'tracin extract' "
                "again"
            )

    def is_finished(self) -> bool:
        """Returns whether the manifest is that of this very store."""
        if not (self.directory / MANIFEST).is_file():
            return False
        run: dict[str, Any] = read_manifest(self.directory)["run"]
        return run == json.loads(json.dumps(self._run))

    def checksums(self) -> dict[str, str] | None:
        """Returns the SHA-256 of each shard's sidecar, None where there is no manifest."""
        if not (self.directory / MANIFEST).is_file():
            return None
        shards = read_manifest(self.directory).get("shards", [])
        return {name: digest for name, _, _, digest in shards}

    @property
    def _run(self) -> dict[str, Any]:
        return {"command": "extract", **self.description.to_json()}

    def finish(self) -> dict[str, Any]:
        """Checks that all is there, writes skipped examples and manifest, and returns a summary.

        Raises:
            InputError: Shards are missing, or example ids occur twice.
        """
        self.check_complete(self.description.checkpoint_ids)
        shards: list[tuple[str, int, int, str]] = []
        bad: list[BadExample] = []
        ids = []

        def read(shard: Shard) -> tuple[Sidecar, pa.Array, str]:
            found = self.shard(shard.name)
            names = pa.array(found.rows.example_ids.tolist(), pa.string())
            return replace(found.sidecar, rows=None), names, sha256(found.paths.sidecar)

        with ThreadPoolExecutor(_READERS) as pool:
            for sidecar, names, digest in pool.map(read, self.description.shards):
                bad += sidecar.bad
                ids.append(names)
                shards.append((sidecar.shard.name, sidecar.count, sidecar.file.size, digest))
        examples = sum(count for _, count, _, _ in shards)
        joined = pa.chunked_array(ids)
        if pc.count_distinct(joined).as_py() < examples:
            check_unique(np.array(joined.to_pylist()))
        if not examples:
            raise InputError("no training example can be used: expected at least one")
        write_skipped(self.directory, bad)
        summary = {
            "examples": examples,
            "skipped": len(bad),
            "bytes": sum(size for _, _, size, _ in shards),
        }
        write_manifest(self.directory, self._run, summary, shards=shards)
        return summary

    @property
    def _factors(self) -> AnyPath:
        return self.directory / "factors"

    @property
    def _examples(self) -> AnyPath:
        return self.directory / "examples"


@contextlib.contextmanager
def replaced_store(directory: AnyPath) -> Iterator[None]:
    """Makes room for another store in place of the one in a directory, if there is one.

    Where the block fails before a shard of the new store is complete, the old one is there again;
    in an object store, it is gone.

    Raises:
        InputError: The directory holds something else, too.
    """
    if not (directory / _FILE_NAME).is_file():
        yield
        return
    _check_replaceable(directory)
    if isinstance(directory, RemotePath):
        remove_tree(directory)
        yield
        return
    aside = directory.with_name(temporary_name(".old"))
    directory.rename(aside)
    try:
        yield
    except BaseException:
        if not any((directory / "examples").glob("[!.]*")):
            shutil.rmtree(directory, ignore_errors=True)
            aside.rename(directory)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_is_store_or_empty(directory: AnyPath) -> None:
    if directory.exists() and not directory.is_dir():
        raise InputError(f"output {str(directory)!r} is a file: expected a directory")
    if (directory / _FILE_NAME).is_file() or not directory.is_dir():
        return
    if [path.name for path in directory.iterdir() if not path.name.startswith(".")]:
        raise InputError(
            f"output {str(directory)!r} is not empty and holds no factor store: choose another "
            "directory"
        )


def _check_replaceable(directory: AnyPath) -> None:
    """Raises InputError if a directory holds more than a store."""
    suffixes = {"factors": ".arrow", "examples": ".parquet"}
    for path, _ in files_below(directory):
        name = str(path).removeprefix(f"{directory}/")
        part, _, rest = name.partition("/")
        is_shard = part in suffixes and rest.endswith(suffixes[part]) and "/" not in rest
        is_own = name in (_FILE_NAME, MANIFEST) or re.fullmatch(r"skipped-.*\.parquet", name)
        if not (is_shard or is_own or any(map(is_temporary_name, name.split("/")))):
            raise InputError(
                f"output {str(directory)!r} holds {name!r}, which is no part of the store: move it "
                "away or choose another directory"
            )


def _files(directory: AnyPath) -> list[tuple[AnyPath, int]]:
    if isinstance(directory, RemotePath):
        return list(directory.files())
    found: list[tuple[AnyPath, int]] = []
    for path in directory.iterdir() if directory.is_dir() else ():
        # Another run may remove its temporary files meanwhile.
        with contextlib.suppress(FileNotFoundError):
            found.append((path, path.stat().st_size))
    return found


def _as_text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1) + "\n"
