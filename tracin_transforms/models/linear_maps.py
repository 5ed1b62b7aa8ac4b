"""What layers with trained weights compute before their activation: einsum(input, kernel) + bias.

A dense layer does so as it is. A convolution does on the patches of its input, in groups. To add
a kind of layer, write its function and register it in `_KINDS`.
"""

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

DENSE_KINDS = (keras.layers.Dense, keras.layers.EinsumDense)


@dataclass(frozen=True, eq=False)
class LinearMap:
    """``einsum(equation, inputs, kernel) + bias``, before an activation.

    Attributes:
        equation: Of einsum, with the examples' axis first; may have an ellipsis for positions.
        kernel: The layer's variable.
        lora: The variables A and B where ``kernel + scale A B`` takes the kernel's place and they
            are trained instead of it, else None.
        lora_scale: The scale.
        bias: The layer's variable, or None.
        bias_axes: The output's axes that the bias varies along, in the equation's letters.
        inputs: From what the layer is given to what the equation takes.
        outputs: From error signals, of the shape that the layer gives, to the equation's.
        kernel_view: From an array of the kernel's shape, or of A's, to the equation's.
    """

    equation: str
    kernel: keras.Variable
    lora: tuple[keras.Variable, keras.Variable] | None
    lora_scale: float
    bias: keras.Variable | None
    bias_axes: str
    inputs: Callable[[tf.Tensor], tf.Tensor]
    outputs: Callable[[tf.Tensor], tf.Tensor]
    kernel_view: Callable[[Any], Any]


def linear_map(layer: keras.layers.Layer) -> LinearMap | None:
    """Returns what a layer computes, or None if it is of no kind that is known."""
    for kind, function in _KINDS.items():
        if isinstance(layer, kind):
            return function(layer)
    return None


def expanded(equation: str, rank: int | None = None) -> tuple[str, str, str]:
    """Returns the axes of inputs, kernel and outputs, a letter each, without an ellipsis.

    Args:
        equation: Of einsum, with two operands.
        rank: Number of axes of the inputs; by default, an ellipsis stands for one.
    """
    operands, outputs = equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    named = len(inputs.replace("...", ""))
    unused = [letter for letter in string.ascii_lowercase if letter not in equation]
    elided = "".join(unused[: 1 if rank is None else rank - named])
    return inputs.replace("...", elided), kernel, outputs.replace("...", elided)


def _dense(layer: keras.layers.Dense) -> LinearMap:
    return LinearMap(
        equation="...x,xy->...y",
        kernel=layer._kernel,
        lora=_lora(layer),
        lora_scale=_lora_scale(layer),
        bias=layer.bias,
        bias_axes="y",
        inputs=_unchanged,
        outputs=_unchanged,
        kernel_view=_unchanged,
    )


def _einsum_dense(layer: keras.layers.EinsumDense) -> LinearMap:
    return LinearMap(
        equation=layer.equation,
        kernel=layer._kernel,
        lora=_lora(layer),
        lora_scale=_lora_scale(layer),
        bias=layer.bias,
        bias_axes=layer.bias_axes or "",
        inputs=_unchanged,
        outputs=_unchanged,
        kernel_view=_unchanged,
    )


def _convolution(layer: keras.layers.Conv1D | keras.layers.Conv2D) -> LinearMap:
    groups = layer.groups

    def kernel_view(kernel: Any) -> Any:
        flat = np.reshape(kernel, (-1, groups, kernel.shape[-1] // groups))
        return flat[:, 0] if groups == 1 else flat.transpose(1, 0, 2)

    return LinearMap(
        equation="nhwx,xy->nhwy" if groups == 1 else "nhwgx,gxy->nhwgy",
        kernel=layer._kernel,
        lora=_lora(layer),
        lora_scale=_lora_scale(layer),
        bias=layer.bias if layer.use_bias else None,
        bias_axes="y" if groups == 1 else "gy",
        inputs=lambda inputs: _patches(layer, inputs, groups),
        outputs=lambda outputs: _grouped(_channels_last(layer, outputs), groups),
        kernel_view=kernel_view,
    )


def _depthwise(layer: keras.layers.DepthwiseConv1D | keras.layers.DepthwiseConv2D) -> LinearMap:
    channels, multiplier = layer.kernel.shape[-2:]
    return LinearMap(
        equation="nhwgx,gxy->nhwgy",
        kernel=layer.kernel,
        lora=None,
        lora_scale=1.0,
        bias=layer.bias if layer.use_bias else None,
        bias_axes="gy",
        inputs=lambda inputs: _patches(layer, inputs, channels),
        outputs=lambda outputs: _grouped(_channels_last(layer, outputs), channels),
        kernel_view=lambda k: np.reshape(k, (-1, channels, multiplier)).transpose(1, 0, 2),
    )


_KINDS: dict[Any, Callable[[Any], LinearMap]] = {
    keras.layers.Dense: _dense,
    keras.layers.EinsumDense: _einsum_dense,
    keras.layers.Conv1D: _convolution,
    keras.layers.Conv2D: _convolution,
    keras.layers.DepthwiseConv1D: _depthwise,
    keras.layers.DepthwiseConv2D: _depthwise,
}


def _unchanged(array: Any) -> Any:
    return array


def _lora(layer: keras.layers.Layer) -> tuple[keras.Variable, keras.Variable] | None:
    return (layer.lora_kernel_a, layer.lora_kernel_b) if layer.lora_enabled else None


def _lora_scale(layer: keras.layers.Layer) -> float:
    return layer.lora_alpha / layer.lora_rank if layer.lora_enabled else 1.0


def _channels_last(layer: keras.layers.Layer, images: tf.Tensor) -> tf.Tensor:
    """Returns rows or images with their channels last; shape [n, height, width, channels]."""
    if layer.data_format == "channels_first":
        rank = images.shape.rank
        images = tf.transpose(images, [0, *range(2, rank), 1])
    return images[:, None] if images.shape.rank == 3 else images


def _patches(layer: keras.layers.Layer, inputs: tf.Tensor, groups: int) -> tf.Tensor:
    """Returns what the kernel meets at each place, [n, height, width, d] or [.., G, d/G]."""
    images = _channels_last(layer, inputs)
    sizes, strides, rates = (
        [1, *[1] * (2 - len(per_axis)), *per_axis, 1]
        for per_axis in (layer.kernel_size, layer.strides, layer.dilation_rate)
    )
    padding = layer.padding
    if padding == "causal":
        images = tf.pad(images, [[0, 0], [0, 0], [rates[2] * (sizes[2] - 1), 0], [0, 0]])
        padding = "valid"
    patches = tf.image.extract_patches(images, sizes, strides, rates, padding.upper())
    if groups == 1:
        return patches
    _, height, width, depth = patches.shape
    channels = images.shape[-1] // groups
    places = depth // (groups * channels)
    by_group = tf.reshape(patches, [-1, height, width, places, groups, channels])
    by_group = tf.transpose(by_group, [0, 1, 2, 4, 3, 5])
    return tf.reshape(by_group, [-1, height, width, groups, places * channels])


def _grouped(images: tf.Tensor, groups: int) -> tf.Tensor:
    if groups == 1:
        return images
    _, height, width, channels = images.shape
    return tf.reshape(images, [-1, height, width, groups, channels // groups])
