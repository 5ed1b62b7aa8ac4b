"""Images of all formats, sizes and states."""

import numpy as np
import pytest
from PIL import Image

from tests.examples.writers import encoded_image
from tracin_transforms.core.errors import InputError
from tracin_transforms.examples.decoding import Broken, ImageDecoding, decode_images

RNG = np.random.default_rng(0)


def _pixels(height, width, channels=3):
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def _photograph(height, width):
    """Returns something smooth, which JPEG keeps nearly as it is."""
    y, x = np.mgrid[:height, :width] * (200 / max(height, width))
    return np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})]
)
def test_lossless_formats_give_their_pixels(kind, options):
    pixels = _pixels(7, 9)
    (found,) = decode_images([encoded_image(pixels, kind, **options)], ImageDecoding())
    np.testing.assert_array_equal(found, pixels)
    assert found.dtype == np.uint8


def test_jpeg_gives_nearly_its_pixels():
    pixels = _photograph(40, 30)
    (found,) = decode_images([encoded_image(pixels, "JPEG", quality=95)], ImageDecoding())
    assert np.abs(found.astype(int) - pixels).mean() < 3


def test_of_a_gif_the_first_frame_counts():
    frames = [Image.fromarray(np.full((6, 5, 3), value, np.uint8)) for value in (10, 200)]
    content = encoded_image(
        np.asarray(frames[0]), "GIF", save_all=True, append_images=[frames[1]], duration=10
    )
    (found,) = decode_images([content], ImageDecoding())
    np.testing.assert_array_equal(found, np.full((6, 5, 3), 10))


def test_channels():
    grey, colour = _pixels(5, 5, 1)[..., 0], _pixels(5, 5)
    encoded = [encoded_image(grey), *(encoded_image(colour, k) for k in ("PNG", "BMP", "GIF"))]
    three = decode_images(encoded, ImageDecoding())
    assert {image.shape for image in three} == {(5, 5, 3)}
    np.testing.assert_array_equal(three[0], np.repeat(grey[..., None], 3, axis=-1))
    one = decode_images(encoded, ImageDecoding(channels=1))
    np.testing.assert_array_equal(one[0][..., 0], grey)
    weights = [0.299, 0.587, 0.114]
    for image in one[1:3]:
        assert np.abs(image[..., 0] - colour @ weights).max() < 2
    alpha = _pixels(5, 5, 4)
    (found,) = decode_images([encoded_image(alpha)], ImageDecoding(channels=4))
    np.testing.assert_array_equal(found, alpha)


@pytest.mark.parametrize(
    ("size", "resize", "expected"),
    [
        ((40, 60), (20,), (20, 30)),
        ((60, 40), (20,), (30, 20)),
        ((45, 30), (20,), (30, 20)),
        ((10, 13), (20,), (20, 26)),
        ((40, 60), (7, 9), (7, 9)),
        ((333, 500), (256,), (256, 384)),
    ],
)
def test_resize(size, resize, expected):
    pixels = _photograph(*size)
    (found,) = decode_images([encoded_image(pixels)], ImageDecoding(resize=resize))
    assert found.shape == (*expected, 3)
    reference = Image.fromarray(pixels).resize(expected[::-1], Image.Resampling.BILINEAR)
    assert np.abs(found.astype(int) - np.asarray(reference)).max() <= 2


def test_crop_keeps_the_middle():
    pixels = _pixels(9, 8)
    (found,) = decode_images([encoded_image(pixels)], ImageDecoding(crop=(3, 4)))
    np.testing.assert_array_equal(found, pixels[3:6, 2:6])
    (found,) = decode_images(
        [encoded_image(_photograph(30, 60))], ImageDecoding(resize=(20,), crop=(16, 16))
    )
    assert found.shape == (16, 16, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
def test_a_truncated_image_is_broken_and_the_others_are_not(kind, share):
    whole = encoded_image(_photograph(64, 48), kind)
    good = encoded_image(_photograph(64, 48))
    found = decode_images([good, whole[: int(share * len(whole))], good], ImageDecoding())
    assert isinstance(found[1], Broken)
    assert found[1].reason
    assert "{{" not in found[1].reason
    assert found[0].shape == found[2].shape == (64, 48, 3)


def test_what_is_no_image_is_broken():
    reasons = decode_images([b"", b"no image, but text" * 9], ImageDecoding(channels=1))
    assert all(isinstance(reason, Broken) for reason in reasons)
    assert reasons[1].reason.startswith("Unknown image file format")
    small, large = (encoded_image(_pixels(n, n)) for n in (5, 20))
    found = decode_images([small, large], ImageDecoding(crop=(8, 6)))
    assert found[0] == Broken("the image is 5x5, smaller than crop=8x6")
    assert found[1].shape == (8, 6, 3)


def test_images_of_different_sizes_come_as_they_are():
    encoded = [encoded_image(_pixels(n, 4)) for n in (3, 8)]
    assert [i.shape for i in decode_images(encoded, ImageDecoding())] == [(3, 4, 3), (8, 4, 3)]
    assert decode_images([], ImageDecoding()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 2}, "channels is 2, expected 1, 3 or 4"),
        ({"resize": (1, 2, 3)}, r"resize is \(1, 2, 3\), expected positive"),
        ({"crop": (0, 2)}, r"crop is \(0, 2\), expected positive"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        ImageDecoding(**options)
