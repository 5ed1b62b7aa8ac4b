"""`tracin demo`: from training to a cleaned data set, on real handwritten digits."""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import influence, self_influence
from pipelines.inputs import start_tensorflow
from pipelines.options import parse
from pipelines.outputs import open_output, staged_output
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.evaluation import inspected_count
from tracin_transforms.report.demo_page import (
    INSPECTED,
    DemoResults,
    Picture,
    Query,
    Ranking,
    render_demo_page,
    shares_found,
)
from tracin_transforms.report.images import png_data_uri
from tracin_transforms.storage.checkpoint_series import read_checkpoint_series
from tracin_transforms.storage.files import local_path
from tracin_transforms.storage.manifest import write_manifest
from tracin_transforms.storage.results import read_result

# TensorFlow first, without its start-up messages; the demo's network needs it at once.
start_tensorflow()

from pipelines.demo_training import (  # noqa: E402
    FLIPPED_SHARE,
    Digits,
    accuracy,
    load_flipped_digits,
    train,
)

SEED = 0
TRAININGS = 3
QUERIES = 8
SHOWN = 6
TOP = 32


def run(options: argparse.Namespace, beam_args: Sequence[str] = ()) -> str:
    """Runs the demo, with the commands that a user would run, and returns its summary.

    Raises:
        InputError: The output directory holds something else.
    """
    described = {"command": "demo", "seed": SEED}
    if "?" in options.output:
        raise InputError(f"output {options.output!r}: a '?' cannot be part of a SPEC's path")
    place = local_path(options.output)
    output = open_output(options, described)
    if done := output.already_done():
        return done
    with staged_output(output) as staging:
        directory = local_path(str(staging.result))
        print(f"[1/5] Flipping {FLIPPED_SHARE:.0%} of the labels, to the most likely wrong digit")
        digits = load_flipped_digits(SEED)
        print(
            f"      {int(digits.flipped.sum())} of {len(digits.ids):,} training digits have a "
            "wrong label now"
        )
        print("[2/5] Training a small CNN on them, recording checkpoints")
        model = train(digits.images, digits.labels, SEED, directory / "run")
        print(f"      test accuracy {accuracy(model, digits):.1%}")
        _write_examples(digits, model, directory)
        common = [
            f"--checkpoints={directory / 'run'}",
            f"--examples=npz:{directory / 'train.npz'}?x=images&y=labels&id=ids",
        ]
        print("[3/5] Ranking the training digits by self-influence: tracin self-influence")
        summary = _run_command(self_influence, "self-influence", common, directory, beam_args)
        _show(summary, directory, place)
        print("[4/5] Finding proponents and opponents of test digits: tracin influence")
        queries = f"--queries=npz:{directory / 'queries.npz'}?x=images&y=labels&id=ids"
        summary = _run_command(influence, "influence", [*common, queries], directory, beam_args)
        _show(summary, directory, place)
        print(
            "[5/5] Correcting the wrong labels among the first "
            f"{max(INSPECTED):.0%}, and training again"
        )
        results = _collect(digits, directory)
        (directory / "report.html").write_text(render_demo_page(results), encoding="utf-8")
        write_manifest(directory, described, {"examples": len(digits.ids)})
    return _summary(results, place)


def _run_command(
    module: Any, name: str, arguments: list[str], directory: Path, beam_args: Sequence[str]
) -> str:
    options, _ = parse(name, [*arguments, f"--output={directory / name}"])
    summary: str = module.run(options, beam_args)
    return summary


def _show(summary: str, staging: Path, output: Path) -> None:
    """Prints a command's summary, with the place its files will have when the demo is done."""
    print(textwrap.indent(summary.replace(str(staging), str(output)), "      "))


def _write_examples(digits: Digits, model: Any, directory: Path) -> None:
    """Writes the training digits, and the test digits to ask about: misread ones first."""
    np.savez(directory / "train.npz", images=digits.images, labels=digits.labels, ids=digits.ids)
    predictions = model.predict(digits.test_images, verbose=0).argmax(axis=1)
    chosen = np.argsort(predictions == digits.test_labels, kind="stable")[:QUERIES]
    np.savez(
        directory / "queries.npz",
        images=digits.test_images[chosen],
        labels=digits.test_labels[chosen],
        ids=digits.test_ids[chosen],
    )


def _collect(digits: Digits, directory: Path) -> DemoResults:
    """Reads the commands' results, corrects what they found, and trains again."""
    table = read_result(directory / "self-influence", "self_influence")
    row_of = {name: row for row, name in enumerate(digits.ids)}
    order = np.array([row_of[name] for name in table["example_id"].to_pylist()])
    losses = np.empty(len(order))
    losses[order] = table["loss"].to_numpy()
    by_loss = np.lexsort((digits.ids, -losses))

    inspected = order[: inspected_count(max(INSPECTED), len(order))]
    corrected = digits.labels.copy()
    corrected[inspected] = digits.true_labels[inspected]
    seeds = range(SEED, SEED + TRAININGS)
    return DemoResults(
        series=read_checkpoint_series(directory / "run"),
        rankings=[
            Ranking("self-influence", digits.flipped[order]),
            Ranking("loss of the last checkpoint", digits.flipped[by_loss]),
        ],
        top=[
            _picture(digits, row, row["self_influence"]) for row in table.slice(0, TOP).to_pylist()
        ],
        queries=_queries(digits, read_result(directory / "influence", "influence").to_pylist()),
        before=[accuracy(train(digits.images, digits.labels, s), digits) for s in seeds],
        after=[accuracy(train(digits.images, corrected, s), digits) for s in seeds],
        corrected=int((corrected != digits.labels).sum()),
        test_size=len(digits.test_ids),
    )


def _queries(digits: Digits, rows: list[dict[str, Any]]) -> list[Query]:
    image_of = dict(zip(digits.test_ids, digits.test_images, strict=True))
    queries = []
    for query_id in dict.fromkeys(row["query_id"] for row in rows):
        own = [row for row in rows if row["query_id"] == query_id and row["rank"] <= SHOWN]
        ends = {
            direction: [
                _picture(digits, row, row["influence"])
                for row in own
                if row["direction"] == direction
            ]
            for direction in ("proponent", "opponent")
        }
        picture = Picture(
            query_id,
            _image(image_of[query_id]),
            own[0]["query_label"],
            own[0]["query_prediction"],
            score=None,
        )
        queries.append(Query(picture, ends["proponent"], ends["opponent"]))
    return queries


def _picture(digits: Digits, row: dict[str, Any], score: float) -> Picture:
    at = int(np.flatnonzero(digits.ids == row["example_id"])[0])
    return Picture(
        example_id=row["example_id"],
        image=_image(digits.images[at]),
        label=row["label"],
        prediction=row["prediction"],
        score=score,
        true_label=int(digits.true_labels[at]) if digits.flipped[at] else None,
    )


def _image(digit: np.ndarray) -> str:
    """Returns black on white: the digits' 0 is white and 16 black."""
    return png_data_uri((255 - digit.astype(np.float32) * 255 / 16).astype(np.uint8))


def _summary(results: DemoResults, output: Path) -> str:
    heads = "".join(f"{f'{share:.0%}':>6}" for share in INSPECTED)
    lines = ["", f"Flipped labels found among the first{heads}   of the training digits"]
    for ranking in results.rankings:
        values = "".join(f"{f'{share:.0%}':>6}" for share in shares_found(ranking))
        lines.append(f"  by {ranking.name:<31}{values}")
    lines.append(f"  in random order{'':19}{heads}")
    return "\n".join(
        [
            *lines,
            f"Test accuracy {np.mean(results.before):.1%} with the labels as given, "
            f"{np.mean(results.after):.1%} with {results.corrected} labels corrected "
            f"(mean of {len(results.before)} trainings each)",
            f"Report: {output / 'report.html'}",
            "Next: the same with your own model, see README.md, 'Your own model'.",
        ]
    )


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["demo", *sys.argv[1:]]))
