import numpy as np

from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.report.demo_page import (
    DemoResults,
    Picture,
    Query,
    Ranking,
    render_demo_page,
    shares_found,
)

EVIL = "<script>alert('x')</script>\"&"


def test_all_text_is_escaped():
    picture = Picture(EVIL, "data:image/png;base64,AA==", 1, 2, 0.5, 3)
    found = np.arange(20) < 3
    page = render_demo_page(
        DemoResults(
            series=CheckpointSeries(
                (Checkpoint(EVIL, EVIL, 0.1, 1, 1, 0.5),),
                "sparse_categorical_crossentropy",
                True,
                32,
                EVIL,
            ),
            rankings=[Ranking(EVIL, found), Ranking("loss", found)],
            top=[picture],
            queries=[Query(picture, [picture], [])],
            before=[0.5, 0.6],
            after=[0.7, 0.8],
            corrected=3,
            test_size=500,
        )
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 6
    assert "default-src 'none'" in page
    assert "(none)" in page
    assert "55.0&nbsp;%" in page
    assert "75.0&nbsp;%" in page


def test_shares_found():
    assert shares_found(Ranking("r", np.arange(20) < 3)) == [1 / 3, 2 / 3, 1.0]
