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


_EXAMPLES = (
    "training examples: npz:PATH?x=ARRAY&y=ARRAY&id=ARRAY&weight=ARRAY (x, y by default, ids made "
    "from the row and equal weights where no array is named; x.NAME=ARRAY for each of several "
    "inputs)"
)


@dataclass(frozen=True)
class Command:
    """A subcommand of `tracin`.

    Attributes:
        module: Module with ``run(options, beam_args)``, which returns a summary to print.
        summary: One line for `tracin --help`.
        description: For the command's own --help.
        add_options: Adds its options to a parser.
        uses_beam: Whether it runs a pipeline, which Beam's options may be for.
    """

    module: str
    summary: str
    description: str
    add_options: Callable[[argparse.ArgumentParser], None]
    uses_beam: bool = True


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _job_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that every job over training examples has."""
    parser.add_argument(
        "--checkpoints",
        metavar="RUN",
        required=True,
        help="directory of the training run, with checkpoints.json (see CheckpointRecorder); or "
        "checkpoint files, separated by commas or as a pattern, with --loss and --learning-rates",
    )
    parser.add_argument("--examples", metavar="SPEC", required=True, help=_EXAMPLES)
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="directory for the result; made anew"
    )
    _add_overwrite(parser)
    _add_extraction_options(parser)


def _checkpoints_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoints",
        metavar="RUN",
        help="directory of the training run, with checkpoints.json; or checkpoint files, with "
        "--loss and --learning-rates",
    )
    parser.add_argument(
        "--examples",
        metavar="SPEC",
        help="measure losses, gradients and influence on a sample of these training examples "
        "(npz:PATH?x=ARRAY&y=ARRAY)",
    )
    parser.add_argument(
        "--sample",
        type=_positive_int,
        default=1000,
        help="how many examples to measure them on (default: %(default)s)",
    )
    parser.add_argument(
        "--choose",
        type=_positive_int,
        default=3,
        help="how many checkpoints to propose (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="directory for checkpoints.html and, for each proposal, a file for "
        "--checkpoint-weights",
    )
    _add_overwrite(parser)
    _add_extraction_options(parser)


def _add_extraction_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says which gradients are taken, and how."""
    _add_model_options(parser)
    parser.add_argument(
        "--checkpoint-weights",
        metavar="recorded|equal|FILE",
        default="recorded",
        help="weigh checkpoints by their recorded learning rates, as TracInCP does, or alike, or "
        "as a JSON file says, with a weight for each checkpoint id to use (default: %(default)s)",
    )
    parser.add_argument(
        "--layers",
        metavar="last|all-dense|all|NAME,...",
        default="last",
        help="layers whose gradients count: the last dense one, all dense ones, also convolutions "
        "and embeddings, or those named; frozen ones only if named (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=("float64", "float32", "mixed_bfloat16", "mixed_float16"),
        help="what the network computes in for training examples: float64 to be exact to the last "
        "digits, the mixed ones to be fast on GPUs; queries are computed in float64 anyway "
        "(default: as the model was saved)",
    )
    parser.add_argument("--xla", action="store_true", help="compile with XLA, for speed on GPUs")
    parser.add_argument(
        "--batch-size",
        type=_positive_int,
        help="examples per call of the model; does not change the result (default: as many as "
        "memory has room for)",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says how checkpoints become models."""
    parser.add_argument(
        "--model",
        metavar="MODULE:FUNCTION|FILE",
        help="where the network comes from, if the checkpoints hold weights alone "
        "(.weights.h5, TensorFlow checkpoints, SavedModels): a function that returns a built "
        "model, or a .keras file",
    )
    parser.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE",
        action="append",
        default=[],
        help="import a module that registers custom layers or losses; may be repeated",
    )
    parser.add_argument(
        "--allow-unsafe-model",
        action="store_true",
        help="load Lambda layers, which run code that the checkpoint contains",
    )
    parser.add_argument(
        "--loss",
        metavar="NAME?OPTION=VALUE",
        help="loss that the checkpoint files were trained with, where no checkpoints.json says it, "
        "such as sparse_categorical_crossentropy?from_logits=true",
    )
    parser.add_argument(
        "--learning-rates",
        metavar="RATE,...",
        type=_rates,
        help="learning rate of each checkpoint file, where no checkpoints.json says them",
    )
    parser.add_argument(
        "--model-output",
        metavar="NAME",
        help="the output that the loss is taken of, where the model has several and no "
        "checkpoints.json says it",
    )


def _influence_options(parser: argparse.ArgumentParser) -> None:
    _job_options(parser)
    parser.add_argument(
        "--queries", metavar="SPEC", required=True, help="query examples, given as for --examples"
    )
    parser.add_argument(
        "--query-loss",
        metavar="NAME?OPTION=VALUE",
        help="what the query examples are asked about, instead of the training loss: another "
        "loss, or margin, binary_margin, logit or entropy",
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


def _rates(text: str) -> list[float]:
    """Converts an option's value to learning rates."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected numbers separated by commas"
        ) from error


COMMANDS = {
    "demo": Command(
        "pipelines.demo",
        "the whole thing on real handwritten digits, in half a minute",
        "Flips 10 % of the labels of scikit-learn's handwritten digits, trains a small network,\n"
        "finds the flipped labels, corrects them, trains again, and writes DIR/report.html.",
        _demo_options,
    ),
    "checkpoints": Command(
        "pipelines.checkpoints",
        "list the checkpoints of a training run, and propose which to use",
        "Lists the checkpoints of a run: loss, learning rate, how much the loss fell, and with\n"
        "--examples their gradients and part of the influence. Proposes some of them: those\n"
        "where the loss fell most, those of lowest validation loss, and evenly spaced ones.",
        _checkpoints_options,
        uses_beam=False,
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
        epilog=_EPILOG if command.uses_beam else None,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_options(parser)
    parser.set_defaults(command=name)
    if not command.uses_beam:
        return parser.parse_args(argv), []
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
