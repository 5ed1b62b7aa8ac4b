import base64
import io

import numpy as np
import pytest
from PIL import Image

from tracin_transforms.report.charts import Line, line_chart, number_axis, share_axis
from tracin_transforms.report.images import png_data_uri


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 3)])
def test_images_survive(shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    head, _, data = png_data_uri(image).partition(",")
    assert head == "data:image/png;base64"
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(base64.b64decode(data)))), image)


@pytest.mark.parametrize("image", [np.zeros((2, 2)), np.zeros((2, 2, 4), np.uint8), np.zeros(3)])
def test_other_arrays_are_no_images(image):
    with pytest.raises(ValueError, match="expected"):
        png_data_uri(image)


def test_chart_places_points_and_escapes_text():
    x = np.linspace(0, 1, 11)
    svg = line_chart(
        [Line("<b>me</b>", "series-1", x, x**2)],
        share_axis("a & b"),
        share_axis('"found"'),
        marks=[0.5],
        tip=lambda line, x, y: f"{line.name}: {y:.2f} at {x:.1f}",
    )

    assert 'cx="332.0" cy="223.5"' in svg  # the middle of 52..612, a quarter up of 294..12
    assert "&lt;b&gt;me&lt;/b&gt;: 0.25 at 0.5" in svg
    assert "<b>" not in svg
    assert "a &amp; b" in svg
    assert "&#34;found&#34;" in svg
    assert svg.count("75 %") == 2


def test_a_line_has_points_only_where_it_is():
    x = np.array([0.5, 1.0])
    line = Line("short", "series-1", x, x)
    axis = share_axis("x")
    svg = line_chart([line], axis, axis, marks=[0, 0.5, 1], tip=lambda line, x, y: f"at {x}")
    assert "at 0.5" in svg
    assert svg.count("<circle") == 2


@pytest.mark.parametrize(
    ("largest", "ticks"),
    [(2.3, (0, 1, 2, 3)), (5628, (0, 2000, 4000, 6000)), (1, (0, 0.25, 0.5, 0.75, 1)), (0, None)],
)
def test_axes_have_round_steps(largest, ticks):
    axis = number_axis("steps", np.array([0.0, largest]))
    assert axis.ticks == pytest.approx(ticks or (0, 0.25, 0.5, 0.75, 1))
    assert axis.place(axis.ticks[-1]) == 1
