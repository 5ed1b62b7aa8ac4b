import numpy as np

from tracin_transforms.core.checkpoint_choice import propose, summarise
from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.report.checkpoints_page import checkpoint_table, render_checkpoints_page

EVIL = "<script>alert(1)</script>"


def _series(validation=None, loss=0.5, count=3):
    return CheckpointSeries(
        tuple(
            Checkpoint(f"{EVIL}{i}", "c.keras", None, 10 * i, None, loss / (i + 1), validation)
            for i in range(count)
        ),
        EVIL,
        None,
        optimizer=EVIL,
    )


def _page(series, *measured):
    summaries = summarise(series, np.ones(len(series.checkpoints)), *measured)
    proposals = {"evenly": propose(summaries, 2, "evenly")}
    return render_checkpoints_page(EVIL, series, summaries, proposals, EVIL)


def test_text_is_escaped_and_what_is_known_is_drawn():
    page = _page(_series(validation=0.7), np.ones((5, 3)), np.ones((5, 3)))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 6
    assert page.count("<svg") == 2
    assert page.count("●") == 2
    assert "validation loss" in page


def test_nothing_is_drawn_of_what_is_not_known():
    page = _page(_series())
    assert page.count("<svg") == 1
    assert "<i style" not in page.replace("training loss", "", 1).split("training loss")[-1]
    nothing = CheckpointSeries((Checkpoint("a", "a.keras", None, 1),), "huber", None)
    assert "No loss was recorded" in _page(nothing)


def test_a_single_checkpoint():
    page = _page(_series(count=1), np.ones((5, 1)), np.ones((5, 1)))
    assert page.count("<svg") == 2


def test_columns_of_which_nothing_is_known_are_left_out():
    heads, rows = checkpoint_table(summarise(_series(), np.ones(3)))
    assert heads == ["checkpoint", "step", "loss", "loss drop"]
    assert [row[3] for row in rows] == ["", "0.2500", "0.0833"]
