"""Runs a pipeline to its end, showing progress, so that Ctrl-C ends everything at once."""

import contextlib
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import apache_beam as beam
import psutil
from apache_beam.options.pipeline_options import PipelineOptions
from tqdm import tqdm

from pipelines.stderr import captured_stderr
from tracin_transforms.core.errors import InputError

_POLL_SECONDS = 0.2
_LOG_SECONDS = 10.0


def run_pipeline(
    build: Callable[[beam.Pipeline], object],
    beam_args: Sequence[str],
    progress: Path,
    total: int,
) -> float:
    """Builds and runs a pipeline, waits for it, and returns how many seconds it took.

    Args:
        build: Adds the steps to the pipeline.
        beam_args: Beam's options; the runner is FnApiRunner unless they name one.
        progress: Directory where `ExtractFactors` notes finished blocks.
        total: Number of examples.

    Raises:
        KeyboardInterrupt: The user ended it; the worker processes are gone.
        InputError: An example or a checkpoint cannot be used; also where another process found it.
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
            error = _wait(done, progress, total, terminal)
        except KeyboardInterrupt:
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
    done: "queue.SimpleQueue[BaseException | None]", progress: Path, total: int, terminal: TextIO
) -> BaseException | None:
    """Shows progress until the pipeline ends, and returns what it raised."""
    start = logged = time.monotonic()
    on_terminal = terminal.isatty()
    with tqdm(
        total=total,
        unit=" examples",
        file=terminal,
        disable=not on_terminal,
        dynamic_ncols=True,
        mininterval=0.2,
    ) as bar:
        while True:
            try:
                error = done.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                pass
            else:
                bar.update(_finished(progress) - bar.n)
                return error
            finished = _finished(progress)
            bar.update(finished - bar.n)
            if not on_terminal and time.monotonic() - logged >= _LOG_SECONDS:
                logged = time.monotonic()
                print(_log_line(finished, total, logged - start), file=terminal)


def _finished(progress: Path) -> int:
    """Returns the number of examples in finished blocks; a repeated block counts once."""
    return sum(int(file.name.rpartition("-")[2]) for file in progress.iterdir())


def _log_line(finished: int, total: int, seconds: float) -> str:
    rate = finished / seconds
    left = f"{(total - finished) / rate:,.0f} s left" if finished else "no block finished yet"
    return f"{finished:,} of {total:,} examples, {rate:,.0f}/s, {left}"
