import base64
import io

import numpy as np
import pytest
from PIL import Image

from tracin_transforms.report.charts import Line, share_chart
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
    svg = share_chart([Line("<b>me</b>", "series-1", x, x**2)], "a & b", '"found"', marks=[0.5])

    assert 'cx="332.0" cy="223.5"' in svg  # the middle of 52..612, a quarter up of 294..12
    assert "&lt;b&gt;me&lt;/b&gt;: 25 % found after inspecting 50 %" in svg
    assert "<b>" not in svg
    assert "a &amp; b" in svg
    assert "&#34;found&#34;" in svg
