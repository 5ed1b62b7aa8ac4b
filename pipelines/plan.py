"""`tracin plan`, and `--dry-run` of other commands: what a job will take, before it runs."""

import argparse
import itertools
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from pipelines.inputs import BLOCK_ROWS, wanted_sketch
from pipelines.queries import groups, kept_of_each, open_queries
from pipelines.training import FromExamples, FromStore, Training, known_count, open_training
from tracin_transforms.beam.extract import Extraction
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.influence import self_influence
from tracin_transforms.core.planning import (
    Sample,
    WorkerKind,
    seconds_here,
    seconds_on_workers,
    worker_kinds,
)
from tracin_transforms.core.protocols import Shard
from tracin_transforms.core.queries import Queries
from tracin_transforms.core.threads import Threads
from tracin_transforms.core.top_scan import TopScan
from tracin_transforms.storage.factor_shard import ShardPaths
from tracin_transforms.storage.files import any_path, existing_file
from tracin_transforms.storage.job_notes import JobNotes
from tracin_transforms.storage.shard_writer import ShardWriter

# With what comes before and after, a minute.
_SAMPLE_SECONDS = 40.0
# A small data set is not run through in whole.
_SAMPLE_SHARE = 0.5
_COUNTED_ROWS = 256
# Several blocks, so that the first, which takes compiling, is not all.
_FEWEST_BLOCKS = 8
_FEWEST_ROWS = 32


def run(options: argparse.Namespace, beam_args: Sequence[str] = ()) -> str:
    """Measures a sample and returns the plan.

    Raises:
        InputError: An input cannot be used.
    """
    training = open_training(options)
    shards = _shards(training)
    with training.ready() as ready:
        examples, is_exact = _count(ready, shards)
        sample = _measure(ready, shards, examples, options)
    command = options.command
    if command == "plan":
        command = "influence" if options.queries else "extract"
    lines = [
        f"'tracin {command}' will take:",
        *_size(training, shards, examples, is_exact),
        *_time(sample, examples, len(shards), options),
        *_space(sample, examples, options),
    ]
    return "\n".join(lines)


def _shards(training: Training) -> tuple[Shard, ...]:
    if isinstance(training, FromExamples):
        return training.shards
    return tuple(
        Shard(name, count=sidecar.count, size=sidecar.file.size)
        for name, sidecar in training.store.stored().items()
    )


def _count(training: Training, shards: Sequence[Shard]) -> tuple[int, bool]:
    """Returns the number of examples, and whether it is exact.

    Where only reading would tell, the smallest shard is read and says how large an example is.
    """
    known = known_count(shards)
    if known is not None or isinstance(training, FromStore):
        return known or 0, True
    smallest = min(shards, key=lambda shard: shard.size)
    batches = training.source.read(smallest, _COUNTED_ROWS)
    rows = sum(len(batch) + len(batch.bad) for batch in batches)
    return round(sum(shard.size for shard in shards) * rows / max(1, smallest.size)), False


@dataclass(eq=False)
class _Job:
    """Does with blocks what the command would, and gathers what it would write."""

    training: Training
    options: argparse.Namespace
    work: Path
    scan: TopScan | None = None
    writer: ShardWriter | None = None

    def __post_init__(self) -> None:
        if getattr(self.options, "queries", None):
            asked, kept = open_queries(self.options, self.training), kept_of_each(self.options)
            block = asked.as_stored(next(groups(asked.blocks(), kept)))
            queries = Queries.prepare(block, self.training.weights)
            self.scan = TopScan(queries, kept, Threads(len(os.sched_getaffinity(0))))
        elif self.options.command != "self-influence":
            ids = [checkpoint.id for checkpoint in self.training.series.checkpoints]
            paths = ShardPaths(self.work / "factors", self.work / "sidecar")
            weights, sketch = dict.fromkeys(ids, 1.0), wanted_sketch(self.options)
            shard, dtype = Shard("sample"), self.options.dtype
            self.writer = ShardWriter(paths, shard, weights, dtype, sketch=sketch)

    def take(self, block: FactorBlock) -> None:
        if self.scan is not None:
            self.scan.add(block)
        elif self.writer is not None:
            self.writer.add(block)
        else:
            self_influence(block, self.training.weights)

    def end(self) -> float:
        """Ends what is begun, and returns the bytes written."""
        if self.scan is not None:
            self.scan.top()
        if self.writer is None:
            return 0.0
        with self.writer:
            self.writer.finish([])
        return float(sum(file.stat().st_size for file in self.work.iterdir()))


def _measure(
    training: Training, shards: Sequence[Shard], examples: int, options: argparse.Namespace
) -> Sample:
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as notes_directory:
        job = _Job(training, options, Path(work))
        notes = JobNotes(Path(notes_directory))
        notes.create()
        block_rows = min(BLOCK_ROWS, max(_FEWEST_ROWS, examples // _FEWEST_BLOCKS))
        blocks = _blocks(training, shards, notes, block_rows)
        begun = time.monotonic()
        first = next(blocks, None)
        if first is None:
            raise InputError("no example of the sample can be used")
        job.take(first)
        warm = time.monotonic()
        rows = 0
        for block in blocks:
            job.take(block)
            rows += len(block)
            if time.monotonic() - warm > _SAMPLE_SECONDS or rows > examples * _SAMPLE_SHARE:
                break
        if not rows:
            # A single block: its time, with that of compiling, is all there is.
            rows, warm = len(first), begun
        written = job.end()
        seconds = time.monotonic() - warm
    total = rows if warm == begun else rows + len(first)
    return Sample(
        examples=rows,
        seconds=seconds,
        startup_seconds=time.time() - psutil.Process().create_time() - seconds,
        written_bytes=written / total,
        memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        cores=len(os.sched_getaffinity(0)),
    )


def _blocks(
    training: Training, shards: Sequence[Shard], notes: JobNotes, block_rows: int
) -> Iterator[FactorBlock]:
    """Yields the blocks of the shards, beginning in the middle of them."""
    order = [*shards[len(shards) // 2 :], *shards[: len(shards) // 2]]
    if isinstance(training, FromStore):
        ids = training.checkpoint_ids
        return itertools.chain.from_iterable(
            training.store.shard(shard.name).blocks(ids) for shard in order
        )
    assert training.extractor is not None
    allowed = training.options.max_bad_examples
    extraction = Extraction(training.source, training.extractor, block_rows, notes, allowed)
    loaded = training.extractor.acquire()
    return itertools.chain.from_iterable(extraction.blocks(loaded, shard, []) for shard in order)


def _size(training: Training, shards: Sequence[Shard], examples: int, is_exact: bool) -> list[str]:
    size = sum(shard.size for shard in shards)
    return [
        f"  examples      {'' if is_exact else 'about '}{examples:,} in {len(shards):,} shard(s)",
        f"  checkpoints   {len(training.series.checkpoints)}",
        f"  to read       {_bytes(size)}",
    ]


def _time(sample: Sample, examples: int, shards: int, options: argparse.Namespace) -> list[str]:
    lines = [
        f"  sample        {sample.examples:,} examples at {sample.rate:,.1f} a second, after "
        f"{sample.startup_seconds:.0f} s for imports, models and compiling",
        f"  here          {_duration(seconds_here(sample, examples))} on {sample.cores} cores",
    ]
    if options.workers is not None:
        kind = _kind(options, sample)
        seconds = seconds_on_workers(sample, examples, options.workers, kind, shards)
        lines.append(
            f"  on workers    {_duration(seconds)} on {options.workers} of {kind.name!r} "
            f"({kind.cores} cores each), if the rate grows with the cores"
        )
        if kind.price_per_hour is not None:
            price = kind.price_per_hour * options.workers * seconds / 3600
            lines.append(f"  price         {price:,.2f} {kind.currency} ({kind.origin})")
        if shards < options.workers:
            lines.append(
                f"  warning: {options.workers} workers have {shards} shards to share: "
                f"{options.workers - shards} of them have nothing to do"
            )
    return lines


def _kind(options: argparse.Namespace, sample: Sample) -> WorkerKind:
    if options.worker_kinds is None:
        return WorkerKind("this machine", sample.cores)
    file = existing_file(options.worker_kinds, "--worker-kinds: file")
    try:
        kinds = worker_kinds(file.read_text(encoding="utf-8"))
    except InputError as error:
        raise InputError(f"--worker-kinds {options.worker_kinds!r}: {error}") from error
    if options.worker_kind not in kinds:
        raise InputError(
            f"--worker-kind {options.worker_kind!r}: expected one of {', '.join(sorted(kinds))}, "
            f"the kinds in {options.worker_kinds!r}"
        )
    return kinds[options.worker_kind]


def _space(sample: Sample, examples: int, options: argparse.Namespace) -> list[str]:
    memory = psutil.virtual_memory()
    lines = [f"  memory        {_bytes(sample.memory_bytes)} a process"]
    if sample.memory_bytes > memory.total * 0.9:
        lines.append(
            f"  warning: this machine has {_bytes(memory.total)} of memory, hardly more than a "
            "process takes: use a smaller --batch-size"
        )
    written = sample.written_bytes * examples
    if not written:
        return lines
    lines.append(f"  to write      {_bytes(written)}, {sample.written_bytes:,.0f} bytes an example")
    place = any_path(options.output or ".")
    if isinstance(place, Path):
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        lines.append(f"  free          {_bytes(free)} at {place}")
        if np.ceil(written) > free:
            lines.append(
                f"  warning: the store does not fit: it takes {_bytes(written)}, and "
                f"{_bytes(free)} are free; choose another place, or fewer checkpoints"
            )
    return lines


def _bytes(number: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["plan", *sys.argv[1:]]))
