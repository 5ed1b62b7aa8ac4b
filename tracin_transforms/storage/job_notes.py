"""What the processes of a running job note for each other, as small files in one directory."""

import contextlib
import json
import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from tracin_transforms.core.protocols import BadExample
from tracin_transforms.storage.files import AnyPath, files_below, mark, written_atomically


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
        for part in ("blocks", "running", "begun", "bad"):
            (self.directory / part).mkdir(parents=True, exist_ok=True)

    def finished(self, shard: str, start: int, rows: int) -> None:
        """Notes that a block is finished."""
        mark(self.directory / "blocks" / f"{shard}-{start:012d}-{rows}")

    def examples(self) -> int:
        """Returns the number of examples in finished blocks."""
        names = (path.name for path in (self.directory / "blocks").iterdir())
        return sum(int(name.rpartition("-")[2]) for name in names)

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
