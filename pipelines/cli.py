"""The console script `tracin`: finds the command, runs it, turns errors into exit statuses."""

import ctypes
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from pipelines.about import about
from pipelines.options import COMMANDS, INTERRUPTS, parse
from tracin_transforms.core.errors import AbandonedError, InputError

# Of glibc's malloc.h.
_M_ARENA_MAX = -8

USAGE = """\
usage: tracin COMMAND [options]

Finds the training examples behind a Keras model's predictions (TracIn), as Beam pipelines.

commands:
{commands}

tracin COMMAND --help lists a command's options. tracin --version --verbose says what a report
of a defect needs.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `tracin` and returns its exit status.

    Args:
        argv: Arguments after the program's name; those of the process by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("--version", "-V"):
        print(about(verbose="--verbose" in arguments))
        return 0
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage(), end="")
        return 0 if arguments else 2
    _set_up_libraries()
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"tracin: error: unknown command {command!r}\n\n{_usage()}", end="", file=sys.stderr)
        return 2
    # Also where a shell starts this in the background, with SIGINT ignored.
    _on_interrupt(_interrupt)
    try:
        options, beam_args = parse(command, rest)
        is_plan = getattr(options, "dry_run", False)
        module = COMMANDS["plan" if is_plan else command].module
        print(importlib.import_module(module).run(options, beam_args))
    except SystemExit as end:
        return int(end.code or 0)
    except KeyboardInterrupt:
        print(
            "\ntracin: interrupted; nothing half done is left in the output. Run the same command "
            "again: 'tracin extract' goes on, the others start over.",
            file=sys.stderr,
        )
        _leave(130)
    except AbandonedError as error:
        print(f"tracin: error: {error}", file=sys.stderr)
        _leave(1)
    except BrokenPipeError:
        # As with `| head`; Python would complain of it once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, OSError) as error:
        print(f"tracin: error: {error}", file=sys.stderr)
        return 1
    return 0


def _leave(status: int) -> NoReturn:
    """Ends the process while threads of Beam and TensorFlow may still compute."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _on_interrupt(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    for number in INTERRUPTS:
        signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    # A second Ctrl-C would only keep the first from tidying up.
    _on_interrupt(signal.SIG_IGN)
    raise KeyboardInterrupt


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return USAGE.format(commands="\n".join(lines))


def _share_heaps() -> None:
    """Has threads, and Arrow, share heaps: each of their own keeps what was ever used of it."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    # For worker processes; glibc has looked at it in this one already.
    heaps = os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    # Other C libraries have no such function.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and heaps.isdecimal():
        mallopt(_M_ARENA_MAX, int(heaps))


def _set_up_libraries() -> None:
    """Chooses Keras's backend; keeps libraries from hoarding memory and telling of themselves."""
    _share_heaps()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Whatever backend a checkpoint was trained on; .keras files do not depend on it.
    os.environ["KERAS_BACKEND"] = "tensorflow"
    # Beam logs a worker's exception with its traceback before it raises it to us, and warns of
    # Google Cloud clients that a local run does not need.
    logging.getLogger().addHandler(logging.NullHandler())
    # Our own messages go to the terminal, also while what libraries say is kept from it.
    terminal = logging.StreamHandler(os.fdopen(os.dup(2), "w", buffering=1))
    terminal.setFormatter(logging.Formatter("tracin: %(message)s"))
    logging.getLogger("tracin_transforms").addHandler(terminal)
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
