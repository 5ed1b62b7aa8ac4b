"""The demo's report: one self-contained page, without scripts, network or server."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tracin_transforms.core.checkpoints import CheckpointSeries
from tracin_transforms.core.evaluation import average_precision, recovery_curve, share_found
from tracin_transforms.report.charts import Line, line_chart, share_axis
from tracin_transforms.report.pages import render_page

INSPECTED = (0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Picture:
    """An example as the page shows it.

    Attributes:
        example_id: The example.
        image: data: URI.
        label: Label as given.
        prediction: What the model reads at the last checkpoint.
        score: Influence or self-influence, for the caption.
        true_label: The right label where the given one was flipped, else None.
    """

    example_id: str
    image: str
    label: int
    prediction: int
    score: float | None
    true_label: int | None = None


@dataclass(frozen=True)
class Query:
    """A query with its strongest training examples."""

    picture: Picture
    proponents: Sequence[Picture]
    opponents: Sequence[Picture]


@dataclass(frozen=True, eq=False)
class Ranking:
    """A ranking of the training set: its name, and whether each in order was flipped, [n] bool."""

    name: str
    found: np.ndarray


@dataclass(frozen=True, eq=False)
class DemoResults:
    """What the page shows.

    Attributes:
        series: The run's checkpoints.
        rankings: By self-influence first, then what it is compared with.
        top: The training examples of highest self-influence.
        queries: Test examples.
        before: Test accuracy of each training on the labels as given.
        after: Test accuracy of each training on the corrected labels.
        corrected: Number of labels corrected.
        test_size: Number of test digits.
    """

    series: CheckpointSeries
    rankings: Sequence[Ranking]
    top: Sequence[Picture]
    queries: Sequence[Query]
    before: Sequence[float]
    after: Sequence[float]
    corrected: int
    test_size: int


def shares_found(ranking: Ranking) -> list[float]:
    """Returns the share of the flipped labels within the first `INSPECTED` of a ranking."""
    return [share_found(ranking.found, inspected) for inspected in INSPECTED]


def render_demo_page(results: DemoResults) -> str:
    """Returns the page's HTML. All text in it is escaped."""
    first = results.rankings[0]
    return render_page(
        "demo.html",
        results=results,
        inspected=INSPECTED,
        table=[
            (ranking.name, shares_found(ranking), average_precision(ranking.found))
            for ranking in results.rankings
        ],
        chart=_recovery_chart(results.rankings),
        examples=len(first.found),
        flipped=int(first.found.sum()),
        before=float(np.mean(results.before)),
        after=float(np.mean(results.after)),
    )


def _recovery_chart(rankings: Sequence[Ranking]) -> object:
    count, sought = len(rankings[0].found), int(rankings[0].found.sum())
    inspected = np.arange(count + 1) / count
    lines = [
        Line("best possible", "reference", inspected, np.minimum(1, inspected * count / sought)),
        Line("random order", "reference", inspected, inspected),
    ]
    # The first ranking is drawn last, on top.
    for number, ranking in reversed(list(enumerate(rankings, start=1))):
        lines.append(
            Line(ranking.name, f"series-{number}", inspected, recovery_curve(ranking.found))
        )
    return line_chart(
        lines,
        share_axis("training examples inspected"),
        share_axis("flipped labels found"),
        marks=INSPECTED,
        tip=lambda line, x, y: (
            f"{line.name}: {100 * y:.0f} % found after inspecting {100 * x:.0f} %"
        ),
    )
