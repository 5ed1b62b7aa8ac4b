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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
    is_temporary,
    remove_dead,
    remove_tree,
    sha256,
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
_PARTS = {_FILE_NAME, MANIFEST, "factors", "examples"}
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
            known = document["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{str(file)!r} is damaged: {error}") from error
        if known != FORMAT:
            raise InputError(f"{str(file)!r} has format {known}, expected {FORMAT}")
        return cls(path, StoreDescription.from_json(document))

    @classmethod
    def prepare(cls, directory: AnyPath, wanted: StoreDescription) -> "FactorStore":
        """Returns the store in a directory, made or extended to hold what is wanted.

        What dead processes left half written is removed.

        Raises:
            InputError: The directory holds something else, or factors of another kind.
        """
        if directory.exists() and not directory.is_dir():
            raise InputError(f"output {str(directory)!r} is a file: expected a directory")
        if not (directory / _FILE_NAME).is_file():
            foreign = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
            if [name for name in foreign if not name.startswith(".")]:
                raise InputError(
                    f"output {str(directory)!r} is not empty and holds no factor store: choose "
                    "another directory"
                )
        store = cls(directory, wanted)
        try:
            for part in (store._factors, store._examples):
                part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output {str(directory)!r} cannot be written: {error}") from error
        for part in (directory, store._factors, store._examples):
            remove_dead(part)
        if written_once(directory / _FILE_NAME, _as_text(wanted.to_json())):
            return store
        known = cls.open(directory)
        try:
            joined = known.description.joined(wanted)
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

    def shard(self, name: str) -> StoredShard:
        """Returns a shard, without its factors."""
        return StoredShard.open(self.paths(name))

    def stored(self) -> dict[str, Sidecar]:
        """Returns the complete shards by name, without their rows.

        A shard is complete when its sidecar is there and its factor file has the size that the
        sidecar says; it may lack checkpoints. A damaged sidecar counts as none.
        """
        there = {path.name for path in self._examples.iterdir()} if self._examples.is_dir() else ()
        sizes = {path.name: size for path, size in _files(self._factors)}

        def read(shard: Shard) -> Sidecar | None:
            paths = self.paths(shard.name)
            if paths.sidecar.name not in there or paths.factors.name not in sizes:
                return None
            with contextlib.suppress(InputError, FileNotFoundError):
                found = read_sidecar(paths.sidecar, with_rows=False)
                same = (found.shard.count, found.shard.size) == (shard.count, shard.size)
                if same and found.file.size == sizes[paths.factors.name]:
                    return found
            return None

        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(read, self.description.shards))
        return {sidecar.shard.name: sidecar for sidecar in found if sidecar is not None}

    def stored_shard(self, shard: Shard) -> StoredShard | None:
        """Returns a shard as it is stored now, with whatever checkpoints; None if it is not."""
        with contextlib.suppress(InputError, FileNotFoundError):
            found = self.shard(shard.name)
            same = (found.sidecar.shard.count, found.sidecar.shard.size) == (
                shard.count,
                shard.size,
            )
            if same and version(found.paths.factors)[0] == found.sidecar.file.size:
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
        return {name: digest for name, _, _, digest in read_manifest(self.directory)["shards"]}

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
        for shard in self.description.shards:
            paths = self.paths(shard.name)
            sidecar = self.shard(shard.name).sidecar
            assert sidecar.rows is not None
            bad += sidecar.bad
            ids.append(pa.array(sidecar.rows.example_ids.tolist(), pa.string()))
            shards.append((shard.name, sidecar.count, sidecar.file.size, sha256(paths.sidecar)))
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


def remove_store(directory: AnyPath) -> None:
    """Removes the store in a directory, if there is one.

    Raises:
        InputError: The directory holds something else, too.
    """
    if not (directory / _FILE_NAME).is_file():
        return
    for path in directory.iterdir():
        if not (path.name in _PARTS or path.name.startswith("skipped-") or is_temporary(path)):
            raise InputError(
                f"output {str(directory)!r} holds {path.name!r}, which is no part of the store: "
                "move it away or choose another directory"
            )
    # What it is goes last: a store that is half removed can be removed again.
    parts: list[AnyPath] = list(directory.iterdir())
    for path in sorted(parts, key=lambda path: path.name == _FILE_NAME):
        remove_tree(path)


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
