"""Runs a pipeline to its end, showing progress, so that Ctrl-C ends everything at once."""

import contextlib
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

import apache_beam as beam
import psutil
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions
from tqdm import tqdm

from pipelines.stderr import captured_stderr
from tracin_transforms.core.errors import AbandonedError, InputError
from tracin_transforms.storage.job_notes import JobNotes, Running
from tracin_transforms.storage.remote import RemotePath

_POLL_SECONDS = 0.2
_REMOTE_POLL_SECONDS = 2.0
_LOG_SECONDS = 10.0


@dataclass(frozen=True)
class Progress:
    """What a running job has done, and how its shards fare.

    Attributes:
        notes: What its processes note.
        total: Number of examples, those done before included; None where it is not known.
        done: Examples done before, by an earlier run.
        shard_seconds: How long a shard may take; None for any time.
        shards: Number of shards that a store will have; None for a job that fills none.
        shards_done: Shards of it that are there already.
    """

    notes: JobNotes
    total: int | None
    done: int = 0
    shard_seconds: float | None = None
    shards: int | None = None
    shards_done: int = 0

    def examples(self) -> int:
        """Returns the number of examples done so far."""
        return self.done + self.notes.examples()

    def stored(self) -> str:
        """Returns how many shards would survive the end of the job now, if it fills a store."""
        if self.shards is None:
            return ""
        return f"{self.shards_done + self.notes.shards_stored()} of {self.shards} shards stored"


def threads_per_process(beam_args: Sequence[str]) -> int:
    """Returns how many threads a worker process may keep busy: its share of the cores.

    A runner that is not on this machine is taken to have a process for each core, as Dataflow has.
    """
    options = PipelineOptions([*beam_args])
    if options.view_as(StandardOptions).runner not in (None, "FnApiRunner", "DirectRunner"):
        return 1
    local = options.view_as(DirectOptions)
    cores = len(os.sched_getaffinity(0))
    if local.direct_running_mode == "in_memory":
        return cores
    # 0 stands for as many as there are cores.
    return max(1, cores // (local.direct_num_workers or cores))


def run_pipeline(
    build: Callable[[beam.Pipeline], object], beam_args: Sequence[str], progress: Progress
) -> float:
    """Builds and runs a pipeline, waits for it, and returns how many seconds it took.

    Args:
        build: Adds the steps to the pipeline.
        beam_args: Beam's options; the runner is FnApiRunner unless they name one.
        progress: Of the job.

    Raises:
        KeyboardInterrupt: The user ended it; the worker processes are gone.
        InputError: An example or a checkpoint cannot be used, also where another process found
            it; a worker process died, or a shard took too long.
        Exception: Whatever else the pipeline raised.
    """
    # DirectRunner would first try to download the Prism runner, without a time limit.
    options = PipelineOptions(["--runner=FnApiRunner", *beam_args])

    def run() -> None:
        with beam.Pipeline(options=options) as pipeline:
            build(pipeline)

    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    # The runner blocks, so it gets a thread of its own; a daemon does not outlive an interrupt.
    thread = threading.Thread(target=_report_end, args=(run, done), daemon=True)
    start = time.monotonic()
    with captured_stderr() as terminal:
        thread.start()
        try:
            error = _wait(done, progress, terminal)
        except (KeyboardInterrupt, AbandonedError):
            # Beam's threads would tell of the workers that are ended here.
            threading.excepthook = lambda _: None
            for process in psutil.Process().children(recursive=True):
                # A terminal's Ctrl-C reaches the workers too; some may be gone already.
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            raise
        if error is not None:
            raise as_input_error(error) or error
    return time.monotonic() - start


def as_input_error(error: BaseException) -> InputError | None:
    """Returns the InputError that made a pipeline fail, or None if it was something else.

    Beam adds the step's name to the message, and gives an exception of another process as the
    text of its traceback.
    """
    text = str(error)
    if not isinstance(error, InputError):
        name = re.escape(f"{InputError.__module__}.{InputError.__qualname__}: ")
        found = re.search(rf"^{name}(.*)", text, re.M)
        if found is None:
            return None
        text = found[1]
    return InputError(re.sub(r" \[while running '.*", "", text, flags=re.S))


def _report_end(run: Callable[[], None], done: "queue.SimpleQueue[BaseException | None]") -> None:
    try:
        run()
    except BaseException as error:
        done.put(error)
    else:
        done.put(None)


def _wait(
    done: "queue.SimpleQueue[BaseException | None]", progress: Progress, terminal: TextIO
) -> BaseException | None:
    """Shows progress until the pipeline ends, and returns what it raised."""
    start = logged = time.monotonic()
    on_terminal = terminal.isatty()
    is_remote = isinstance(progress.notes.directory, RemotePath)
    watch = _ShardWatch(progress)
    with tqdm(
        total=progress.total,
        initial=progress.done,
        unit=" examples",
        file=terminal,
        disable=not on_terminal,
        dynamic_ncols=True,
        mininterval=0.2,
    ) as bar:
        while True:
            try:
                error = done.get(timeout=_REMOTE_POLL_SECONDS if is_remote else _POLL_SECONDS)
            except queue.Empty:
                pass
            else:
                bar.update(progress.examples() - bar.n)
                return error
            watch.check()
            finished = progress.examples()
            bar.set_postfix_str(progress.stored(), refresh=False)
            bar.update(finished - bar.n)
            if not on_terminal and time.monotonic() - logged >= _LOG_SECONDS:
                logged = time.monotonic()
                line = _log_line(finished, progress, logged - start)
                parts = [line, progress.stored(), watch.running()]
                print("; ".join(filter(None, parts)), file=terminal)


class _ShardWatch:
    """Notices shards whose process is dead, and shards that take too long."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._since: dict[Running, float] = {}

    def check(self) -> None:
        """Raises AbandonedError where a shard will not be finished."""
        now = time.monotonic()
        running = self._progress.notes.all_running()
        self._since = {shard: self._since.get(shard, now) for shard in running}
        for shard, since in self._since.items():
            if shard.host == socket.gethostname() and not psutil.pid_exists(shard.pid):
                raise AbandonedError(
                    f"shard {shard.shard!r}: its worker process died, perhaps killed because "
                    "memory ran out: give the job more memory or fewer worker processes, and run "
                    "the same command again"
                )
            limit = self._progress.shard_seconds
            if limit is not None and now - since > limit:
                raise AbandonedError(
                    f"shard {shard.shard!r} took longer than the {limit:g} s that --shard-timeout "
                    "allows: look at its file, or allow more"
                )

    def running(self) -> str:
        """Returns which shards are being worked on, for a line of the log."""
        names = sorted(shard.shard for shard in self._since)
        if not names:
            return ""
        return f"at {', '.join(names[:2])}{', ...' if len(names) > 2 else ''}"


def _log_line(finished: int, progress: Progress, seconds: float) -> str:
    rate = (finished - progress.done) / seconds
    if progress.total is None:
        return f"{finished:,} examples, {rate:,.0f}/s"
    left = f"{(progress.total - finished) / rate:,.0f} s left" if rate else "no block finished yet"
    return f"{finished:,} of {progress.total:,} examples, {rate:,.0f}/s, {left}"
