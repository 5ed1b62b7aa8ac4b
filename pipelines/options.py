"""The commands and their options, ours and Beam's. Imports nothing heavy: --help is instant."""

import argparse
import difflib
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from pipelines.arguments import (
    checkpoints_options,
    demo_options,
    extract_options,
    influence_options,
    job_options,
    plan_options,
    store_options,
)
from pipelines.option_checks import check_job, check_workers

# What ends a command: Ctrl-C, `kill`, and the terminal being closed.
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_EPILOG = """\
Beam's own options may follow, for example --runner=FnApiRunner (the default),
--direct_num_workers=2 --direct_running_mode=multi_processing, or those of another runner.
"""


@dataclass(frozen=True)
class Command:
    """A subcommand of `tracin`.

    Attributes:
        module: Module with ``run(options, beam_args)``, which returns a summary to print.
        summary: One line for `tracin --help`.
        description: For the command's own --help.
        add_options: Adds its options to a parser.
        uses_beam: Whether it runs a pipeline, which Beam's options may be for.
        check: Returns what is wrong with options that do not fit each other, or None.
    """

    module: str
    summary: str
    description: str
    add_options: Callable[[argparse.ArgumentParser], None]
    uses_beam: bool = True
    check: Callable[[argparse.Namespace], str | None] = lambda _: None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


COMMANDS = {
    "demo": Command(
        "pipelines.demo",
        "the whole thing on real handwritten digits, in half a minute",
        "Flips 10 % of the labels of scikit-learn's handwritten digits, trains a small network,\n"
        "finds the flipped labels, corrects them, trains again, and writes DIR/report.html.",
        demo_options,
    ),
    "checkpoints": Command(
        "pipelines.checkpoints",
        "list the checkpoints of a training run, and propose which to use",
        "Lists the checkpoints of a run: loss, learning rate, how much the loss fell, and with\n"
        "--examples their gradients and part of the influence. Proposes some of them: those\n"
        "where the loss fell most, those of lowest validation loss, and evenly spaced ones.",
        checkpoints_options,
        uses_beam=False,
    ),
    "extract": Command(
        "pipelines.extract",
        "store the gradient factors of the training examples, for any number of later questions",
        "Computes the gradient factors of the training examples at every checkpoint and stores\n"
        "them in STORE, for self-influence and influence with --store. Run again after a crash,\n"
        "it does what is missing.",
        extract_options,
        check=check_workers,
    ),
    "plan": Command(
        "pipelines.plan",
        "say what a job will take, before it runs: time, bytes, memory",
        "Measures a sample for up to a minute, and says what 'tracin extract' will take with\n"
        "these options, or with --queries 'tracin influence': examples, bytes, hours here and on\n"
        "--workers, disk and memory, and a warning where it does not fit.",
        plan_options,
        uses_beam=False,
        check=check_job,
    ),
    "store": Command(
        "pipelines.store",
        "say what a factor store holds, or verify that it is whole",
        "info lists checkpoints, layers, counts and sizes. verify reads everything and compares\n"
        "checksums and counts, finite numbers and unique example ids.",
        store_options,
        uses_beam=False,
    ),
    "self-influence": Command(
        "pipelines.self_influence",
        "rank the training examples by self-influence: wrong labels come first",
        "Ranks the training examples by self-influence, the influence of an example on its own\n"
        "prediction, summed over checkpoints. Mislabelled and odd examples come first.\n"
        "Writes DIR/self_influence-*.parquet and DIR/manifest.json.",
        job_options,
        check=check_job,
    ),
    "influence": Command(
        "pipelines.influence",
        "find the proponents and opponents of each query among the training examples",
        "Finds, for each query example, the training examples that lowered its loss most\n"
        "(proponents) and those that raised it most (opponents).\n"
        "Writes DIR/influence-*.parquet and DIR/manifest.json.",
        influence_options,
        check=check_job,
    ),
}


def parse(name: str, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options of a command and the arguments that are Beam's.

    Wrong usage, which includes an argument that neither we nor Beam know, prints what is wrong
    and exits with status 2. (Beam alone would ignore an option that it does not know.)
    """
    command = COMMANDS[name]
    parser = _Parser(
        prog=f"tracin {name}",
        description=command.description,
        epilog=_EPILOG if command.uses_beam else None,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_options(parser)
    parser.set_defaults(command=name)
    options, rest = parser.parse_known_args(argv)
    if rest and not command.uses_beam:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        _check_beam_arguments(parser, rest)
    if problem := command.check(options):
        parser.error(problem)
    if "layers" in options and options.layers is None:
        options.layers = "last"
    return options, rest


def _check_beam_arguments(parser: argparse.ArgumentParser, rest: list[str]) -> None:
    # Beam takes a second to import and is needed only for arguments that are not ours.
    from apache_beam.options.pipeline_options import PipelineOptions

    beam_parser = _Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    for group in PipelineOptions.__subclasses__():
        group._add_argparse_args(beam_parser)
    beam_options, unknown = beam_parser.parse_known_args(rest)
    if not unknown:
        _check_runner(parser, beam_options.runner)
        return
    known = [*parser._option_string_actions, *beam_parser._option_string_actions]
    described = []
    for argument in unknown:
        name = argument.split("=")[0]
        close = difflib.get_close_matches(name, known, n=1)
        described.append(f"{name} (did you mean {close[0]}?)" if close else name)
    parser.error(f"unknown option(s): {', '.join(described)}")


def _check_runner(parser: argparse.ArgumentParser, name: str | None) -> None:
    from apache_beam.runners.runner import create_runner

    try:
        create_runner(name or "FnApiRunner")
    except (ValueError, ImportError, AttributeError) as error:
        parser.error(f"argument --runner: {name!r} cannot be used: {' '.join(str(error).split())}")
