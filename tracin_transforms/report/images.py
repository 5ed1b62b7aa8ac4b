"""Images of examples as text that stands in a page."""

import base64
import io

import numpy as np
from PIL import Image


def png_data_uri(image: np.ndarray) -> str:
    """Returns an image as a PNG in a data: URI.

    Args:
        image: Shape [height, width] grey or [height, width, 3] RGB, uint8, 0 black to 255 white.

    Raises:
        ValueError: Another shape or dtype.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(
            f"image has shape {image.shape} and dtype {image.dtype}, expected [height, width] or "
            "[height, width, 3] in uint8"
        )
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
