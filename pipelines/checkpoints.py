"""`tracin checkpoints`: the checkpoints of a run, what each contributes, and which to use."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pipelines.inputs import describe_run, keras_extractor, open_series, sources, weighted_series
from pipelines.outputs import open_output, staged_output
from tracin_transforms.core.checkpoint_choice import (
    RULES,
    CheckpointSummary,
    propose,
    summarise,
)
from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.influence import squared_gradient_norms
from tracin_transforms.core.protocols import ExampleBatch, ExampleSource, fingerprint
from tracin_transforms.report.checkpoints_page import checkpoint_table, render_checkpoints_page
from tracin_transforms.storage.files import AnyPath
from tracin_transforms.storage.manifest import write_manifest

# The sample comes from so many shards at most, evenly spaced.
_SAMPLED_SHARDS = 16


def run(options: argparse.Namespace, beam_args: Sequence[str] = ()) -> str:
    """Lists the checkpoints and returns the table for the user.

    Raises:
        InputError: An input or the output directory cannot be used.
    """
    series = open_series(options)
    source = None if options.examples is None else sources(options)(options.examples)
    series, weights = _weights(series, options.checkpoint_weights, needed=source is not None)
    more = {"choose": options.choose, "sample": options.sample}
    if source is not None:
        more["examples"] = fingerprint(source, source.shards())
    output = None
    if options.output is not None:
        output = open_output(options, describe_run(options, series, weights, **more))
        if done := output.already_done():
            return done
    summaries, origin = _summaries(series, weights, source, options)
    proposals = _proposals(summaries, options.choose)
    if output is not None:
        weight_of = dict(zip((c.id for c in series.checkpoints), weights.tolist(), strict=True))
        with staged_output(output) as staging:
            page = render_checkpoints_page(
                options.checkpoints, series, summaries, proposals, origin
            )
            (staging.result / "checkpoints.html").write_text(page, encoding="utf-8")
            for rule, chosen in proposals.items():
                text = json.dumps({c.id: weight_of[c.id] for c in chosen}, indent=2)
                (staging.result / f"{rule}.json").write_text(text + "\n", encoding="utf-8")
            write_manifest(staging.result, output.run, {"checkpoints": len(summaries)})
    path = None if output is None else output.path
    return _text(options, series, summaries, proposals, origin, path)


def _weights(
    series: CheckpointSeries, weights: str, needed: bool
) -> tuple[CheckpointSeries, np.ndarray]:
    """Returns the checkpoints to list, and their weights: alike, where no rates are known."""
    try:
        return weighted_series(series, weights)
    except InputError:
        if needed or weights != "recorded":
            raise
        return weighted_series(series, "equal")


def _summaries(
    series: CheckpointSeries,
    weights: np.ndarray,
    source: ExampleSource | None,
    options: argparse.Namespace,
) -> tuple[list[CheckpointSummary], str]:
    """Returns what is known of each checkpoint, and a sentence on where it comes from."""
    if source is None:
        by_epoch = all(checkpoint.epoch is not None for checkpoint in series.checkpoints)
        over = "an epoch" if by_epoch else "the steps since the checkpoint before"
        return summarise(series, weights), f"Losses are means over {over}, as recorded."
    extractor = keras_extractor(series, options).load()
    losses, norms = [], []
    for batch in _sample(source, options.sample, extractor.block_rows(options.sample)):
        block = extractor.extract(batch)
        losses.append(block.losses)
        norms.append(squared_gradient_norms(block).sum(axis=2))
    count = sum(map(len, losses))
    origin = (
        f"Losses, gradient norms and influence are of a sample of {count:,} training examples, "
        f"layers: {options.layers}."
    )
    return summarise(series, weights, np.concatenate(losses), np.concatenate(norms)), origin


def _sample(source: ExampleSource, number: int, batch_size: int) -> Iterator[ExampleBatch]:
    """Yields `number` examples, if there are so many in the shards, from evenly spaced ones."""
    shards = source.shards()
    places = np.unique(np.linspace(0, len(shards) - 1, _SAMPLED_SHARDS).round().astype(int))
    # Small shards first: what they lack, the others give.
    for i, place in enumerate(sorted(places, key=lambda place: shards[place].size)):
        wanted = -(-number // (len(places) - i))
        for batch in source.read(shards[place], min(batch_size, wanted)):
            taken = batch.rows(slice(0, wanted))
            yield taken
            wanted -= len(taken)
            number -= len(taken)
            if not wanted:
                break


def _proposals(summaries: Sequence[CheckpointSummary], number: int) -> dict[str, list[Checkpoint]]:
    """Returns the choices of all rules for which enough is known."""
    found = {}
    for rule in RULES:
        try:
            found[rule] = propose(summaries, number, rule)
        except InputError:
            # No validation loss, for example: the table shows that it is not known.
            continue
    return found


def _text(
    options: argparse.Namespace,
    series: CheckpointSeries,
    summaries: Sequence[CheckpointSummary],
    proposals: Mapping[str, Sequence[Checkpoint]],
    origin: str,
    output: AnyPath | None,
) -> str:
    heads, rows = checkpoint_table(summaries)
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    table = [
        "  "
        + "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [heads, *rows]
    ]
    choices = [
        f"  {rule + ':':<17}{', '.join(checkpoint.id for checkpoint in chosen)}"
        for rule, chosen in proposals.items()
    ]
    if output is None:
        last = (
            "Next: --output DIR writes plots, and these choices as files for --checkpoint-weights."
        )
    else:
        last = (
            f"Plots: {output / 'checkpoints.html'}\n"
            f"Next: use a choice with --checkpoint-weights {output}/{next(iter(proposals))}.json"
        )
    if len(summaries) <= options.choose:
        choices = ["  all, as there are no more"]
    return "\n".join(
        [
            f"{len(summaries)} checkpoints, loss {series.loss}. {origin}",
            *table,
            f"To use {min(options.choose, len(summaries))} of them:",
            *choices,
            last,
        ]
    )


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["checkpoints", *sys.argv[1:]]))
