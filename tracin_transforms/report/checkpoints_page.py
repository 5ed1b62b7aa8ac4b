"""A training run's checkpoints as a table, as text and as a page with plots."""

from collections.abc import Mapping, Sequence

import numpy as np

from tracin_transforms.core.checkpoint_choice import CheckpointSummary
from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.report.charts import Line, line_chart, number_axis, share_axis
from tracin_transforms.report.pages import render_page


def checkpoint_table(
    summaries: Sequence[CheckpointSummary],
) -> tuple[list[str], list[list[str]]]:
    """Returns the heads of columns and the rows; columns of which nothing is known are left out."""
    columns = {
        "checkpoint": [s.checkpoint.id for s in summaries],
        "epoch": [_text(s.checkpoint.epoch, "d") for s in summaries],
        "step": [_text(s.checkpoint.step, "d") for s in summaries],
        "learning rate": [_text(s.checkpoint.learning_rate, ".3g") for s in summaries],
        "loss": [_text(s.loss, ".4f") for s in summaries],
        "loss drop": [_text(s.loss_drop, ".4f") for s in summaries],
        "validation loss": [_text(s.checkpoint.validation_loss, ".4f") for s in summaries],
        "gradient norm": [_text(s.gradient_norm, ".3g") for s in summaries],
        "influence": [_text(s.influence_share, ".1%") for s in summaries],
    }
    known = {head: column for head, column in columns.items() if any(column)}
    return list(known), [list(row) for row in zip(*known.values(), strict=True)]


def render_checkpoints_page(
    run: str,
    series: CheckpointSeries,
    summaries: Sequence[CheckpointSummary],
    proposals: Mapping[str, Sequence[Checkpoint]],
    source: str,
) -> str:
    """Returns the page's HTML. All text in it is escaped.

    Args:
        run: Name of the run.
        series: Its checkpoints.
        summaries: What is known of each.
        proposals: Chosen checkpoints by rule.
        source: A sentence on where the losses come from.
    """
    heads, rows = checkpoint_table(summaries)
    steps = np.array([summary.checkpoint.step for summary in summaries], dtype=float)
    losses = [summary.loss for summary in summaries]
    validation = [summary.checkpoint.validation_loss for summary in summaries]
    shares = [summary.influence_share for summary in summaries]
    return render_page(
        "checkpoints.html",
        run=run,
        series=series,
        summaries=summaries,
        source=source,
        heads=heads,
        rows=rows,
        proposals=[(rule, [c.id for c in chosen]) for rule, chosen in proposals.items()],
        has_validation=None not in validation,
        loss_chart=_loss_chart(steps, losses, validation),
        share_chart=None if None in shares else _share_chart(steps, summaries),
    )


def _loss_chart(
    steps: np.ndarray, losses: Sequence[float | None], validation: Sequence[float | None]
) -> object:
    named = {"training loss": losses, "validation loss": validation}
    lines = [
        Line(name, f"series-{i}", steps, np.array(values, dtype=float))
        for i, (name, values) in enumerate(named.items(), start=1)
        if None not in values
    ]
    if not lines:
        return None
    return line_chart(
        lines,
        number_axis("step", steps),
        number_axis("loss", np.concatenate([line.y for line in lines])),
        marks=steps.tolist(),
        tip=lambda line, x, y: f"{line.name} at step {x:,.0f}: {y:.4f}",
    )


def _share_chart(steps: np.ndarray, summaries: Sequence[CheckpointSummary]) -> object:
    # The first has none before it.
    drops = np.array([max(0.0, summary.loss_drop or 0.0) for summary in summaries[1:]])
    shares = np.array([summary.influence_share for summary in summaries], dtype=float)
    lines = [
        Line("loss drop", "series-2", steps[1:], drops / (drops.sum() or 1.0)),
        Line("self-influence", "series-1", steps, shares),
    ]
    lines = [line for line in lines if len(line.x)]
    return line_chart(
        lines,
        number_axis("step", steps),
        share_axis("share"),
        marks=steps.tolist(),
        tip=lambda line, x, y: f"{line.name} at step {x:,.0f}: {100 * y:.1f} %",
    )


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
