"""Where a job's result goes: staged beside its place, moved there when it is complete."""

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.options import INTERRUPTS
from tracin_transforms.core.errors import InputError
from tracin_transforms.storage.files import (
    AnyPath,
    StagedDirectory,
    any_path,
    remove_dead,
    remove_tree,
)
from tracin_transforms.storage.job_notes import JobNotes
from tracin_transforms.storage.manifest import FILE_NAME, is_finished
from tracin_transforms.storage.remote import RemotePath

# Purpose of the directory that a job works in.
WORK = "work"


@dataclass(frozen=True)
class Output:
    """The directory that a job's result goes to.

    Attributes:
        path: The directory, links resolved.
        run: What determines the result, see `describe_run`.
        overwrite: Whether an earlier result there may be replaced.
    """

    path: AnyPath
    run: dict[str, Any]
    overwrite: bool

    def already_done(self) -> str | None:
        """Returns what to tell the user if the directory holds this very result, else None.

        Raises:
            InputError: It holds something else that is not to be overwritten.
        """
        if not is_finished(self.path, self.run, self.overwrite):
            return None
        return (
            f"Already done: {self.path} holds the result of this command. "
            "--overwrite computes it anew."
        )


def open_output(options: argparse.Namespace, run: dict[str, Any]) -> Output:
    """Returns the job's output directory; whether it can be used, `already_done` finds out."""
    return Output(any_path(options.output).resolve(), run, options.overwrite)


def shown(value: str | int | float | list[float]) -> str:
    """Returns an id, a label or a prediction as a summary shows it, on one line."""
    if isinstance(value, str):
        return value if value.isprintable() else ascii(value)
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value[:4]))}{', ...' if len(value) > 4 else ''}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def metrics_line(examples: int, size: int, seconds: float, skipped: int, repeated: int) -> str:
    """Returns what a summary says of how the job went.

    Args:
        examples: That were used.
        size: Bytes of the shards that were read; 0 where it was but their sidecars.
        seconds: That the pipeline took.
        skipped: Examples that could not be used.
        repeated: How often a shard was begun again.
    """
    read = f" and {size / seconds / 1e6:,.1f} MB read" if size else ""
    return (
        f"{seconds:,.1f} s: {examples / seconds:,.0f} examples{read} a second; {skipped:,} "
        f"skipped, {repeated:,} shards begun again."
    )


def check_any(examples: int) -> None:
    """Raises InputError if there are no examples to give a result for."""
    if not examples:
        raise InputError("no training example can be used: expected at least one")


def skipped_line(skipped: int, output: AnyPath) -> list[str]:
    """Returns what a summary says of examples that could not be used, if there are any."""
    if not skipped:
        return []
    return [f"{skipped:,} examples could not be used: {output}/skipped-*.parquet says why."]


@dataclass(frozen=True)
class Staging:
    """Directories of a job in progress.

    Attributes:
        result: Becomes the output directory.
        work: For intermediate files.
        notes: What the job's processes note.
    """

    result: AnyPath
    work: AnyPath
    notes: JobNotes


@contextlib.contextmanager
def work_directory(output: AnyPath) -> Iterator[tuple[AnyPath, JobNotes]]:
    """Gives a directory for intermediate files, and the job's notes in it.

    It is removed afterwards, and now what dead processes left beside the output or in it.

    Raises:
        InputError: It cannot be written.
    """
    remove_dead(output if isinstance(output, RemotePath) else output.parent)
    work = StagedDirectory(output, WORK)
    try:
        notes = JobNotes(work.create() / "notes")
        notes.create()
        yield work.path, notes
    finally:
        work.discard()


@contextlib.contextmanager
def staged_output(output: Output) -> Iterator[Staging]:
    """Gives directories to fill; the result appears at its place when the block succeeds.

    Otherwise nothing remains, except a complete result that could not be moved there.

    Raises:
        InputError: The output cannot be written, or was taken while the job ran.
    """
    path = output.path
    result = StagedDirectory(path)
    try:
        with work_directory(path) as (work, notes):
            yield Staging(result.create(), work, notes)
    except BaseException:
        result.discard()
        raise
    with _uninterrupted():
        try:
            # Once more: hours may have passed, and another job may have finished here.
            is_finished(path, output.run, output.overwrite)
            previous = result.publish(FILE_NAME)
        except (InputError, OSError) as error:
            raise InputError(f"{error}. The finished result was kept in {result.path}") from error
        try:
            if previous is not None:
                remove_tree(previous)
        except OSError as error:
            print(
                f"tracin: warning: the result that was replaced could not be removed: {error}",
                file=sys.stderr,
            )


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets the moment pass in which a Ctrl-C would leave neither the old result nor the new."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
