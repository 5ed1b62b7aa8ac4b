"""What a job over all examples will take, from what a sample of them took."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tracin_transforms.core.errors import InputError


@dataclass(frozen=True)
class Sample:
    """What a sample took on this machine.

    Attributes:
        examples: Number of examples after the first block.
        seconds: What they took.
        startup_seconds: From the start of the process to the end of the first block: imports,
            models, compilation.
        written_bytes: What the job writes for each example.
        memory_bytes: The process's largest resident memory.
        cores: Cores that it could use.
    """

    examples: int
    seconds: float
    startup_seconds: float
    written_bytes: float
    memory_bytes: int
    cores: int

    @property
    def rate(self) -> float:
        """Examples a second, once everything is loaded."""
        return self.examples / self.seconds


@dataclass(frozen=True)
class WorkerKind:
    """A kind of machine.

    Attributes:
        name: What it is called.
        cores: Its cores.
        speed: How fast one of them is beside one of this machine's.
        price_per_hour: Of one machine, or None.
        currency: Of the price.
        origin: Date and source of the price.
    """

    name: str
    cores: int
    speed: float = 1.0
    price_per_hour: float | None = None
    currency: str = ""
    origin: str = ""


def seconds_here(sample: Sample, examples: int) -> float:
    """Returns what a job over that many examples takes on this machine, start-up included."""
    return sample.startup_seconds + examples / sample.rate


def seconds_on_workers(
    sample: Sample, examples: int, workers: int, kind: WorkerKind, shards: int
) -> float:
    """Returns what the job takes on some workers, their own start not counted.

    Assumes that the rate grows with cores and speed, and that a shard is never split: no more
    workers than shards have work.
    """
    one_worker = sample.rate * kind.cores * kind.speed / sample.cores
    busy = min(workers, shards)
    # The last round of shards may leave workers idle.
    rounds = -(-shards // busy)
    return sample.startup_seconds + examples / shards * rounds / one_worker


def worker_kinds(text: str) -> Mapping[str, WorkerKind]:
    """Returns kinds of machines from a JSON table.

    Args:
        text: ``{"date": "2026-11-01", "source": "https://…", "currency": "USD",
            "kinds": {"NAME": {"cores": 8, "speed": 1.0, "price_per_hour": 0.4}}}``; date, source
            and currency belong to prices, which may be left out, as may speed.

    Raises:
        InputError: It is not of that form.
    """
    try:
        document = json.loads(text)
        kinds = document["kinds"]
        found = {name: _worker_kind(name, entry, document) for name, entry in kinds.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"not a table of worker kinds: {error!r}") from error
    return found


def _worker_kind(name: str, entry: dict[str, Any], document: dict[str, Any]) -> WorkerKind:
    price = entry.get("price_per_hour")
    if price is not None and not {"date", "source", "currency"} <= document.keys():
        raise InputError(
            f"worker kind {name!r} has a price: expected the table to have 'date', 'source' and "
            "'currency', too"
        )
    for key in entry:
        if key not in ("cores", "speed", "price_per_hour") or not isinstance(
            entry[key], int | float
        ):
            raise InputError(
                f"worker kind {name!r}: {key!r} is {entry[key]!r}, expected the numbers 'cores', "
                "'speed' and 'price_per_hour'"
            )
    kind = WorkerKind(
        name,
        int(entry["cores"]),
        float(entry.get("speed", 1.0)),
        None if price is None else float(price),
        str(document.get("currency", "")),
        f"{document.get('source', '')}, {document.get('date', '')}",
    )
    if kind.cores < 1 or kind.speed <= 0:
        raise InputError(f"worker kind {name!r}: expected cores >= 1 and speed > 0, got {entry}")
    return kind
