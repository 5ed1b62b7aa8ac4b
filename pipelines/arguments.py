"""The options of commands, in groups that several share."""

import argparse

_EXAMPLES = (
    "training examples: npz:PATH, tfrecord:GLOB, parquet:GLOB, images:DIR (a folder per class), "
    "tfds:NAME:SPLIT[@DATA_DIR] or source:MODULE:FUNCTION, with options such as "
    "?x=image&y=label&id=name (see docs/examples.md); local paths, or gs://BUCKET/PATH"
)


def job_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the options of a job over training examples, or over a store of their factors."""
    _add_inputs(parser, required=False)
    parser.add_argument(
        "--store",
        metavar="STORE",
        help="gradient factors that 'tracin extract' stored, instead of --checkpoints and "
        "--examples; with --checkpoints, where the run has been moved to",
    )
    parser.add_argument(
        "--output", metavar="DIR", required=required, help="directory for the result; made anew"
    )
    _add_overwrite(parser)
    _add_weights(parser)
    _add_extraction_options(parser)
    _add_reading_options(parser)


def extract_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `tracin extract`."""
    parser.set_defaults(store=None)
    _add_inputs(parser, required=True)
    parser.add_argument(
        "--output",
        metavar="STORE",
        required=True,
        help="directory of the store; one that is there is filled up, with checkpoints and shards "
        "that it lacks",
    )
    _add_storing(parser)
    parser.add_argument(
        "--checkpoint-weights",
        metavar="FILE",
        help="JSON file with a weight for each checkpoint id to use, such as one of 'tracin "
        "checkpoints'; the others are left out",
    )
    _add_overwrite(parser)
    _add_extraction_options(parser)
    _add_reading_options(parser)


def _add_storing(parser: argparse.ArgumentParser) -> None:
    """Adds what says how gradient factors are stored."""
    parser.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="how to store: float16 with a scale for each row, or float32 (default: %(default)s)",
    )
    parser.add_argument(
        "--sketch",
        metavar="NUMBERS|two-sided:NUMBERS",
        help="store random projections of the gradient factors, of so many numbers per example, "
        "checkpoint and layer, from which influence is estimated; two-sided, where a layer has "
        "more outputs than that (default: the factors themselves)",
    )


def _add_inputs(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--checkpoints",
        metavar="RUN",
        required=required,
        help="directory of the training run, with checkpoints.json (see CheckpointRecorder); or "
        "checkpoint files, separated by commas or as a pattern, with --loss and --learning-rates",
    )
    parser.add_argument("--examples", metavar="SPEC", required=required, help=_EXAMPLES)


def _add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says how examples are read, and what happens where one cannot be."""
    _add_record_functions(parser)
    parser.add_argument(
        "--max-bad-examples",
        metavar="N",
        type=_whole_number,
        default=0,
        help="leave out examples that cannot be used, as many as N, and list them in "
        "skipped-*.parquet (default: the first one ends the job)",
    )
    parser.add_argument(
        "--shard-timeout",
        metavar="SECONDS",
        type=_positive_int,
        help="end the job, naming the shard, when one takes longer than this",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="measure a sample, say what the job will take, and end; see 'tracin plan'",
    )
    parser.add_argument(
        "--workers", metavar="N", type=_positive_int, help="plan for this number of workers, too"
    )
    parser.add_argument(
        "--worker-kind", metavar="NAME", help="plan for workers of this kind, of --worker-kinds"
    )
    parser.add_argument(
        "--worker-kinds",
        metavar="FILE",
        help="JSON table of kinds of workers: cores, speed and, with date and source, price",
    )


def _add_record_functions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parse",
        metavar="MODULE:FUNCTION",
        help="function that makes (x, y) of a record of tfrecord:, parquet: or tfds:",
    )
    parser.add_argument(
        "--preprocess",
        metavar="MODULE:FUNCTION",
        help="function that makes the model's input of a batch of x",
    )


def checkpoints_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `tracin checkpoints`."""
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
    _add_weights(parser)
    _add_extraction_options(parser)
    _add_record_functions(parser)


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint-weights",
        metavar="recorded|equal|FILE",
        default="recorded",
        help="weigh checkpoints by their recorded learning rates, as TracInCP does, or alike, or "
        "as a JSON file says, with a weight for each checkpoint id to use (default: %(default)s)",
    )


def _add_extraction_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says which gradients are taken, and how."""
    _add_model_options(parser)
    parser.add_argument(
        "--layers",
        metavar="last|all-dense|all|NAME,...",
        help="layers whose gradients count: the last dense one, all dense ones, also convolutions "
        "and embeddings, or those named; frozen ones only if named (default: last)",
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


def influence_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the options of `tracin influence`."""
    job_options(parser, required)
    parser.add_argument(
        "--queries",
        metavar="SPEC",
        required=required,
        help="query examples, given as for --examples; or store:STORE, their gradient factors",
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
    parser.add_argument(
        "--no-prune",
        dest="prune",
        action="store_false",
        help="multiply all pairs, also those that cannot be among the strongest; the result is "
        "the same, and later",
    )
    parser.add_argument(
        "--score-matrix",
        action="store_true",
        help="also write the influence of every training example on every query, as "
        "scores-*.parquet with a column for each query",
    )
    parser.add_argument(
        "--rescore",
        metavar="STORE",
        help="where --store holds sketches: score the strongest by the sketches again, with the "
        "gradient factors in this store, and rank them by that",
    )
    parser.add_argument(
        "--shortlist",
        metavar="N",
        type=_positive_int,
        help="how many, on each side of each query, --rescore scores again (default: 10 times --k)",
    )


def plan_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `tracin plan`: those of the jobs that it is for."""
    influence_options(parser, required=False)
    _add_storing(parser)


def store_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `tracin store`."""
    parser.add_argument("action", choices=("info", "verify"), help="what to do")
    parser.add_argument("directory", metavar="STORE", help="directory of the store")


def demo_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `tracin demo`."""
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
    return _whole_number(text, least=1)


def _whole_number(text: str, least: int = 0) -> int:
    """Converts an option's value to a whole number."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least {least}")
    return value


def _rates(text: str) -> list[float]:
    """Converts an option's value to learning rates."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected numbers separated by commas"
        ) from error
