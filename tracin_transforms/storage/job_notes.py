"""What the processes of a running job note for each other, as small files in one directory."""

import contextlib
import hashlib
import json
import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import BadExample
from tracin_transforms.storage.files import AnyPath, files_below, mark, written_atomically

_DIGEST = 8


@dataclass(frozen=True)
class Running:
    """A shard that a process is working on.

    Attributes:
        host: The process's machine.
        pid: Its number there.
        shard: The shard's name.
    """

    host: str
    pid: int
    shard: str


@dataclass(frozen=True)
class JobNotes:
    """The notes of a job.

    Notes are named by what they are about, so that work that is done again notes nothing twice.

    Attributes:
        directory: Where they are, on a file system that all processes of the job share.
    """

    directory: AnyPath

    def create(self) -> None:
        """Makes the directories."""
        for part in ("blocks", "running", "begun", "bad", "stored"):
            (self.directory / part).mkdir(parents=True, exist_ok=True)

    def finished(
        self, shard: str, start: int, rows: int, example_ids: np.ndarray | None = None
    ) -> None:
        """Notes that a block is finished.

        Args:
            shard: Name of the shard.
            start: Index of the block's first row within it.
            rows: Number of its rows.
            example_ids: Shape [n], unicode, for `check_unique`; None where that is known.
        """
        note = self.directory / "blocks" / f"{shard}-{start:012d}-{rows}"
        if example_ids is None:
            mark(note)
            return
        digests = b"".join(
            hashlib.blake2b(name.encode(), digest_size=_DIGEST).digest()
            for name in example_ids.tolist()
        )
        with written_atomically(note) as temporary:
            temporary.write_bytes(digests)

    def examples(self) -> int:
        """Returns the number of examples in finished blocks."""
        names = (path.name for path in (self.directory / "blocks").iterdir())
        return sum(int(name.rpartition("-")[2]) for name in names if not name.startswith("."))

    def check_unique(self) -> None:
        """Raises InputError if an example id occurs twice in finished blocks.

        Reads 8 bytes for each example.
        """
        blocks = [path for path, _ in files_below(self.directory / "blocks")]
        parts = [np.frombuffer(path.read_bytes(), dtype=f"V{_DIGEST}") for path in blocks]
        digests = np.concatenate(parts).view(np.uint64) if parts else np.empty(0, np.uint64)
        order = np.argsort(digests, kind="stable")
        again = np.flatnonzero(np.diff(digests[order]) == 0)
        if len(again):
            ends = np.cumsum([len(part) for part in parts])
            first, second = (
                blocks[int(np.searchsorted(ends, place, side="right"))].name.rsplit("-", 2)
                for place in np.sort(order[again[0] : again[0] + 2])
            )
            raise InputError(
                f"{len(again)} example ids occur more than once, first in shard {first[0]!r}, in "
                f"the block that begins at example {int(first[1])}, and in shard {second[0]!r}, "
                f"at {int(second[1])}: expected every example id once"
            )

    @contextlib.contextmanager
    def running(self, shard: str) -> Iterator[None]:
        """Notes that this process is working on a shard, while the block runs."""
        note = self.directory / "running" / f"{socket.gethostname()}~{os.getpid()}~{shard}"
        mark(self.directory / "begun" / f"{shard}~{uuid.uuid4().hex}")
        mark(note)
        try:
            yield
        finally:
            # The job may have been given up, and its directory removed.
            note.unlink(missing_ok=True)

    def repeated(self) -> int:
        """Returns how often a shard was begun again, as after a worker died."""
        shards = [path.name.rpartition("~")[0] for path in (self.directory / "begun").iterdir()]
        return len(shards) - len(set(shards))

    def stored(self, shard: str) -> None:
        """Notes that a shard is complete in a store."""
        mark(self.directory / "stored" / shard)

    def shards_stored(self) -> int:
        """Returns the number of shards that are complete in a store."""
        return sum(1 for _ in (self.directory / "stored").iterdir())

    def all_running(self) -> list[Running]:
        """Returns the shards that processes are working on, or were when they died."""
        notes = (path.name.split("~", 2) for path in (self.directory / "running").iterdir())
        return [Running(host, int(pid), shard) for host, pid, shard in notes]

    def bad(self, found: Sequence[BadExample]) -> int:
        """Notes examples of a shard that cannot be used; returns how many are noted in all."""
        directory = self.directory / "bad"
        name = f"{found[0].shard}-{found[0].index:012d}-{len(found)}.json"
        with written_atomically(directory / name) as temporary:
            text = json.dumps([asdict(example) for example in found])
            temporary.write_text(text, encoding="utf-8")
        names = (path.name for path in directory.iterdir() if not path.name.startswith("."))
        return sum(int(name.removesuffix(".json").rpartition("-")[2]) for name in names)

    def all_bad(self) -> list[BadExample]:
        """Returns all examples that cannot be used, by shard and index."""
        found = [
            BadExample(**example)
            for path, _ in files_below(self.directory / "bad")
            for example in json.loads(path.read_text(encoding="utf-8"))
        ]
        return sorted(found, key=lambda example: (example.shard, example.index))
