"""The commands and their options, ours and Beam's. Imports nothing heavy: --help is instant."""

import argparse
import difflib
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

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
    """

    module: str
    summary: str
    description: str
    add_options: Callable[[argparse.ArgumentParser], None]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _job_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that every job over training examples has."""
    parser.add_argument(
        "--checkpoints",
        metavar="RUN",
        required=True,
        help="directory of the training run, with checkpoints.json (see CheckpointRecorder)",
    )
    parser.add_argument(
        "--examples",
        metavar="SPEC",
        required=True,
        help="training examples: npz:PATH?x=ARRAY&y=ARRAY&id=ARRAY (x, y by default, and ids "
        "made from the row where no array is named)",
    )
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="directory for the result; made anew"
    )
    _add_overwrite(parser)
    parser.add_argument(
        "--checkpoint-weights",
        choices=("recorded", "equal"),
        default="recorded",
        help="weigh checkpoints by their recorded learning rates, as TracInCP does, or alike "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--layers",
        metavar="last|all-dense|NAME,...",
        default="last",
        help="dense layers whose gradients count: the last, all that are trained, or those named "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=_positive_int,
        default=512,
        help="examples per call of the model; does not change the result (default: %(default)s)",
    )


def _influence_options(parser: argparse.ArgumentParser) -> None:
    _job_options(parser)
    parser.add_argument(
        "--queries", metavar="SPEC", required=True, help="query examples, given as for --examples"
    )
    parser.add_argument(
        "--k",
        type=_positive_int,
        default=20,
        help="proponents, and opponents, of each query (default: %(default)s)",
    )


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        metavar="DIR",
        default="demo-output",
        help="directory for the data, results and report.html (default: %(default)s)",
    )
    _add_overwrite(parser)


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a result of this command in DIR"
    )


def _positive_int(text: str) -> int:
    """Converts an option's value to a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return value


COMMANDS = {
    "demo": Command(
        "pipelines.demo",
        "the whole thing on real handwritten digits, in half a minute",
        "Flips 10 % of the labels of scikit-learn's handwritten digits, trains a small network,\n"
        "finds the flipped labels, corrects them, trains again, and writes DIR/report.html.",
        _demo_options,
    ),
    "self-influence": Command(
        "pipelines.self_influence",
        "rank the training examples by self-influence: wrong labels come first",
        "Ranks the training examples by self-influence, the influence of an example on its own\n"
        "prediction, summed over checkpoints. Mislabelled and odd examples come first.\n"
        "Writes DIR/self_influence-*.parquet and DIR/manifest.json.",
        _job_options,
    ),
    "influence": Command(
        "pipelines.influence",
        "find the proponents and opponents of each query among the training examples",
        "Finds, for each query example, the training examples that lowered its loss most\n"
        "(proponents) and those that raised it most (opponents).\n"
        "Writes DIR/influence-*.parquet and DIR/manifest.json.",
        _influence_options,
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
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_options(parser)
    parser.set_defaults(command=name)
    options, rest = parser.parse_known_args(argv)
    if rest:
        _check_beam_arguments(parser, rest)
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
