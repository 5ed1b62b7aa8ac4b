"""From encoded images to arrays: one decoder for all sources, in TensorFlow."""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tracin_transforms.core.errors import InputError

# What TensorFlow writes around the reason: where in its graph, and in which dataset.
_AROUND_REASON = re.compile(
    r"(\{\{.*?\}\} )?(Error in user-defined function passed to .*? with iterator: \S+ )?"
    r"(?P<reason>.*?)( \[Op:.*|\n.*)?",
    re.S,
)
_ASSERTION = re.compile(r"assertion failed: \[([^]]*)\]")


class Broken(NamedTuple):
    """Stands where a value should be.

    Attributes:
        reason: Why there is none.
    """

    reason: str


@dataclass(frozen=True)
class ImageDecoding:
    """How encoded images become arrays of one size.

    Attributes:
        resize: (N,) for a shorter side of N pixels, the other in proportion; (height, width) for
            exactly that; None to leave images as they are.
        crop: (height, width) of the part in the middle to keep, after resizing; None for all.
        channels: 3, 1 for grey, or 4 with alpha; None for 3, or what the data set says.
    """

    resize: tuple[int, ...] | None = None
    crop: tuple[int, int] | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        if self.channels not in (None, 1, 3, 4):
            raise InputError(f"channels is {self.channels}, expected 1, 3 or 4")
        for name, size, lengths in (("resize", self.resize, (1, 2)), ("crop", self.crop, (2,))):
            if size is not None and (len(size) not in lengths or min(size) < 1):
                raise InputError(f"{name} is {size}, expected positive numbers of pixels")


def decode_images(encoded: Sequence[bytes], decoding: ImageDecoding) -> list[np.ndarray | Broken]:
    """Returns images, uint8, each [height, width, channels], or why there is none.

    Args:
        encoded: JPEG, PNG, WebP, BMP or GIF, of which the first frame counts.
        decoding: How to decode them.
    """
    import tensorflow as tf

    if not encoded:
        return []
    try:
        return list(_batch_decoder(decoding)(list(encoded)).numpy())
    except tf.errors.OpError:
        # Some are broken, or of another size: one by one, to tell which.
        images = tf.data.Dataset.from_tensor_slices(list(encoded)).map(image_decoder(decoding))
        return list(each_element(images, len(encoded)))


def each_element(
    dataset: Any, count: int, fatal: type[Exception] | tuple[type[Exception], ...] = ()
) -> Iterator[Any]:
    """Yields the elements of a dataset as NumPy arrays, and why where one cannot be had.

    Args:
        dataset: A `tf.data.Dataset` that goes on after an element fails, as one does that ends in
            `map`.
        count: Number of its elements.
        fatal: Errors to raise, because no element follows.
    """
    import tensorflow as tf

    iterator = iter(dataset)
    for _ in range(count):
        try:
            element = next(iterator)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            if isinstance(error, fatal):
                raise
            yield Broken(tensorflow_reason(error.message))
        except UnicodeDecodeError as error:
            # TensorFlow quotes the data, which are no text, and fails to raise what it means to.
            yield Broken(tensorflow_reason(error.object.decode(errors="replace")))
        else:
            yield tf.nest.map_structure(lambda tensor: tensor.numpy(), element)


def tensorflow_reason(message: str) -> str:
    """Returns what the message of an error says, without where in TensorFlow it arose."""
    found = _AROUND_REASON.fullmatch(message)
    assert found is not None  # Each of its parts may be missing.
    return _ASSERTION.sub(r"\1", found["reason"])


# Traced once per process, not once per batch.
@functools.cache
def _batch_decoder(decoding: ImageDecoding) -> Callable[[list[bytes]], Any]:
    import tensorflow as tf

    decode = image_decoder(decoding)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def decode_batch(encoded: Any) -> Any:
        images = tf.data.Dataset.from_tensor_slices(encoded)
        images = images.map(decode, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        return images.batch(tf.shape(encoded, out_type=tf.int64)[0]).get_single_element()

    return decode_batch


@functools.cache
def image_decoder(decoding: ImageDecoding) -> Callable[[Any], Any]:
    """Returns the function that decodes one image, a scalar string tensor."""
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)])
    def decode(encoded: Any) -> Any:
        image = _decoded(encoded, decoding.channels or 3)
        if decoding.resize is not None:
            image = _resized(image, decoding.resize)
        if decoding.crop is not None:
            image = _cropped(image, decoding.crop)
        return image

    return decode


def _decoded(encoded: Any, channels: int) -> Any:
    import tensorflow as tf

    def decode(channels: int) -> Any:
        image = tf.io.decode_image(encoded, channels=channels, expand_animations=False)
        return tf.ensure_shape(image, [None, None, channels])

    if channels != 1:
        return decode(channels)
    # TensorFlow makes grey images of these two only.
    start = tf.strings.substr(encoded, 0, 2)
    return tf.cond(
        tf.reduce_any(start == [b"\xff\xd8", b"\x89P"]),
        lambda: decode(1),
        lambda: tf.image.rgb_to_grayscale(decode(3)),
    )


def _resized(image: Any, size: tuple[int, ...]) -> Any:
    import tensorflow as tf

    if len(size) == 1:
        sides = tf.cast(tf.shape(image)[:2], tf.float64)
        size = tf.cast(tf.round(sides * (size[0] / tf.reduce_min(sides))), tf.int32)
    resized = tf.image.resize(image, size, antialias=True)
    return tf.saturate_cast(tf.round(resized), tf.uint8)


def _cropped(image: Any, crop: tuple[int, int]) -> Any:
    import tensorflow as tf

    sides = tf.shape(image)[:2]
    message = tf.strings.format(
        "the image is {}x{}, smaller than crop={}x{}", (sides[0], sides[1], *crop)
    )
    with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(sides >= crop), [message])]):
        top, left = tf.unstack((sides - crop) // 2)
    return image[top : top + crop[0], left : left + crop[1]]
