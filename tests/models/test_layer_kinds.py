"""Each kind of layer, against float64 automatic differentiation."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.models.conftest import SPARSE, batch_of, save_series
from tests.models.reference import assert_factors, example_gradients, load_model
from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.products import pair_products
from tracin_transforms.models.extractor import KerasFactorExtractor
from tracin_transforms.models.loading import ModelLoading
from tracin_transforms.models.recorder import CheckpointRecorder

layers = keras.layers
CLASSES, N = 3, 8


def _grouped_convolution(groups):
    """[n, kh, kw, channels/G, filters] to [n, G, filters/G, kh·kw·channels/G]."""

    def arrange(g):
        n, filters = len(g), g.shape[-1]
        flat = g.reshape(n, -1, groups, filters // groups)
        return flat.transpose(0, 2, 3, 1)

    return arrange


def _depthwise(g):
    """[n, kh, kw, channels, multiplier] to [n, channels, multiplier, kh·kw]."""
    flat = g.reshape(len(g), -1, *g.shape[-2:])
    return flat.transpose(0, 2, 3, 1)


# A layer, the shape of its input, and its kernel's gradient [n, ...] as [n, (G,) C, d].
KINDS = {
    "dense": (lambda **k: layers.Dense(4, **k), (5,), lambda g: g.transpose(0, 2, 1)),
    "dense at positions": (
        lambda **k: layers.Dense(40, **k),
        (2, 3, 50),
        lambda g: g.transpose(0, 2, 1),
    ),
    "einsum": (
        lambda **k: layers.EinsumDense("abc,cd->abd", (6, 4), bias_axes="d", **k),
        (6, 5),
        lambda g: g.transpose(0, 2, 1),
    ),
    "einsum with ellipsis": (
        lambda **k: layers.EinsumDense("...x,xy->...y", 9, bias_axes="y", **k),
        (2, 3, 8),
        lambda g: g.transpose(0, 2, 1),
    ),
    "einsum to heads": (
        lambda **k: layers.EinsumDense("abc,cde->abde", (2, 2, 3), bias_axes="de", **k),
        (2, 5),
        lambda g: g.reshape(N, 5, 6).transpose(0, 2, 1),
    ),
    "einsum from heads": (
        lambda **k: layers.EinsumDense("abcd,cde->abe", (2, 7), bias_axes="e", **k),
        (2, 3, 4),
        lambda g: g.reshape(N, 12, 7).transpose(0, 2, 1),
    ),
    "einsum transposed": (
        lambda **k: layers.EinsumDense("abc,dc->adb", (4, 2), bias_axes="d", **k),
        (2, 5),
        lambda g: g,
    ),
    "einsum with a weight for each position": (
        lambda **k: layers.EinsumDense("abc,bcd->abd", (3, 4), bias_axes="bd", **k),
        (3, 5),
        lambda g: g.transpose(0, 1, 3, 2),
    ),
    "einsum that sums positions": (
        lambda **k: layers.EinsumDense("abc,cd->ad", 4, bias_axes="d", **k),
        (3, 5),
        lambda g: g.transpose(0, 2, 1),
    ),
    "conv": (lambda **k: layers.Conv2D(4, 3, **k), (6, 5, 2), _grouped_convolution(1)),
    "conv same strides": (
        lambda **k: layers.Conv2D(4, (3, 2), strides=2, padding="same", **k),
        (6, 5, 2),
        _grouped_convolution(1),
    ),
    "conv dilated": (
        lambda **k: layers.Conv2D(4, (3, 2), dilation_rate=2, **k),
        (7, 6, 2),
        _grouped_convolution(1),
    ),
    "conv groups": (
        lambda **k: layers.Conv2D(6, 3, groups=2, **k),
        (6, 5, 4),
        _grouped_convolution(2),
    ),
    "conv of few positions": (
        lambda **k: layers.Conv2D(20, 3, **k),
        (3, 3, 10),
        _grouped_convolution(1),
    ),
    "conv of few positions in groups": (
        lambda **k: layers.Conv2D(20, 3, groups=2, **k),
        (3, 4, 10),
        _grouped_convolution(2),
    ),
    "conv 1D": (
        lambda **k: layers.Conv1D(4, 3, strides=2, padding="same", **k),
        (7, 3),
        _grouped_convolution(1),
    ),
    "conv 1D causal": (
        lambda **k: layers.Conv1D(4, 3, padding="causal", dilation_rate=2, **k),
        (7, 3),
        _grouped_convolution(1),
    ),
    "depthwise": (
        lambda **k: layers.DepthwiseConv2D(3, depth_multiplier=2, **k),
        (5, 5, 3),
        _depthwise,
    ),
    "depthwise 1D": (lambda **k: layers.DepthwiseConv1D(3, **k), (5, 3), _depthwise),
}


def _model(layer, shape, dtype="float32"):
    source = keras.Input(shape, dtype=dtype)
    x = layers.Dense(CLASSES, name="logits")(layers.Flatten()(layer(source)))
    return keras.Model(source, x)


def _batch(shape, vocabulary=None):
    rng = np.random.default_rng(0)
    inputs = (
        rng.standard_normal((N, *shape)).astype(np.float32)
        if vocabulary is None
        else rng.integers(0, vocabulary, (N, *shape)).astype(np.int32)
    )
    return batch_of(inputs, rng.integers(0, CLASSES, N))


def _shaken(model):
    for variable in model.trainable_variables:
        variable.assign(variable + 0.2 * keras.random.normal(variable.shape, seed=3))
    return model


def _factors(series, batch, choice="it", **options):
    loading = ModelLoading(**options)
    block = KerasFactorExtractor(series, choice, 5, loading=loading).load().extract(batch)
    return block.gradients[0].layers


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_factors_equal_float64_automatic_differentiation(tmp_path, kind, bias):
    make, shape, arrange = KINDS[kind]
    options = {} if "einsum" in kind else {"use_bias": bias}
    if "einsum" in kind and not bias:
        make = _without_bias(make)
    series = save_series(
        tmp_path, [_shaken(_model(make(name="it", activation="tanh", **options), shape))]
    )
    batch = _batch(shape)
    (found,) = _factors(series, batch)
    exact = load_model(series.checkpoints[0], exact=True)
    layer = exact.get_layer("it")
    kernel, *biases = example_gradients(exact, batch, layer.trainable_variables)
    assert len(biases) == bias
    assert_factors(found, arrange(kernel), *biases)


def _without_bias(make):
    def changed(**options):
        config = make(**options).get_config() | {"bias_axes": None}
        return layers.EinsumDense.from_config(config)

    return changed


@pytest.mark.parametrize("axes", ["e", "d", "bd"])
def test_biases_that_some_axes_share(tmp_path, axes):
    layer = layers.EinsumDense("abc,cde->abde", (2, 3, 4), bias_axes=axes, name="it")
    series = save_series(tmp_path, [_shaken(_model(layer, (2, 5)))])
    batch = _batch((2, 5))
    kernel, bias = _factors(series, batch)
    exact = load_model(series.checkpoints[0], exact=True)
    expected, biases = example_gradients(exact, batch, exact.get_layer("it").trainable_variables)
    assert (kernel.name, bias.name) == ("it", "it/bias")
    assert_factors(kernel, expected.reshape(N, 5, 12).transpose(0, 2, 1))
    assert_factors(bias, biases.reshape(N, -1, 1))


@pytest.mark.parametrize("vocabulary", [3, 50])
@pytest.mark.parametrize("shape", [(), (6,), (2, 3)])
def test_embeddings(tmp_path, shape, vocabulary):
    embedding = layers.Embedding(vocabulary, 4, name="it", mask_zero=len(shape) == 1)
    if len(shape) == 1:
        # Tokens that are 0 do not count.
        source = keras.Input(shape, dtype="int32")
        pooled = layers.GlobalAveragePooling1D()(embedding(source))
        model = keras.Model(source, layers.Dense(CLASSES, name="logits")(pooled))
    else:
        model = _model(embedding, shape, "int32")
    series = save_series(tmp_path, [_shaken(model)])
    batch = _batch(shape, vocabulary)
    (found,) = _factors(series, batch)
    exact = load_model(series.checkpoints[0], exact=True)
    (table,) = example_gradients(exact, batch, exact.get_layer("it").trainable_variables)
    assert found.is_one_hot == (vocabulary == 50 or shape == ())
    assert_factors(found, table.transpose(0, 2, 1))


def test_an_embedding_of_floats_and_one_that_is_shared(tmp_path):
    source = keras.Input((4,))
    embedding = layers.Embedding(30, 4, name="it")
    x = embedding(source[:, :2]) + embedding(source[:, 2:])
    model = keras.Model(source, layers.Dense(CLASSES)(layers.Flatten()(x)))
    series = save_series(tmp_path, [_shaken(model)])
    batch = _batch((4,), 30)
    (found,) = _factors(series, batch)
    exact = load_model(series.checkpoints[0], exact=True)
    (table,) = example_gradients(exact, batch, exact.get_layer("it").trainable_variables)
    assert found.positions == 4
    assert_factors(found, table.transpose(0, 2, 1))


def test_negative_indices_count_from_the_end(tmp_path):
    series = save_series(tmp_path, [_shaken(_model(layers.Embedding(50, 4, name="it"), (3,)))])
    batch = _batch((3,), 50)
    batch.inputs[::2, 1], batch.inputs[1::2, 1] = -1, 49
    (found,) = _factors(series, batch)
    exact = load_model(series.checkpoints[0], exact=True)
    (table,) = example_gradients(exact, batch, exact.get_layer("it").trainable_variables)
    matrix = table.reshape(N, -1)
    every = np.repeat(np.arange(N), N), np.tile(np.arange(N), N)
    expected = (matrix @ matrix.T).ravel()
    np.testing.assert_allclose(pair_products(found, found, *every), expected, rtol=1e-4, atol=1e-7)


def test_indices_that_an_embedding_does_not_have(tmp_path):
    series = save_series(tmp_path, [_shaken(_model(layers.Embedding(50, 4, name="it"), (3,)))])
    batch = _batch((3,), 50)
    batch.inputs[4, 1] = 50
    with pytest.raises(InputError, match=r"'epoch-0': .*\[4,1\] = 50 is not in \[0, 50\)"):
        _factors(series, batch)


@keras.saving.register_keras_serializable("tests")
class _WithItsOwnCall(layers.Dense):
    def call(self, inputs):
        return self.activation(keras.ops.matmul(inputs, self.kernel) + self.bias)


def test_a_dense_layer_with_a_call_of_its_own(tmp_path):
    series = save_series(tmp_path, [_model(_WithItsOwnCall(4, "tanh", name="it"), (5,))])
    batch = _batch((5,))
    (found,) = _factors(series, batch)
    exact = load_model(series.checkpoints[0])
    kernel, bias = example_gradients(exact, batch, exact.get_layer("it").trainable_variables)
    assert_factors(found, kernel.transpose(0, 2, 1), bias)


LORA = {
    "dense": (lambda: layers.Dense(4, name="it"), (5,), None),
    "dense at positions": (lambda: layers.Dense(9, name="it"), (2, 8), None),
    "einsum to heads": (
        lambda: layers.EinsumDense("abc,cde->abde", (2, 2, 3), bias_axes="de", name="it"),
        (2, 5),
        None,
    ),
    "einsum from heads": (
        lambda: layers.EinsumDense("abcd,cde->abe", (2, 7), bias_axes="e", name="it"),
        (2, 3, 4),
        None,
    ),
    "conv": (lambda: layers.Conv2D(4, 3, name="it"), (5, 5, 2), None),
    "embedding": (lambda: layers.Embedding(50, 4, name="it"), (3,), 50),
}


def _save_with_lora(directory, model):
    """Keras's own files merge LoRA into the kernel; TensorFlow's checkpoints keep it."""
    model.save(directory / "model.keras")
    tf.train.Checkpoint(model=model).write(str(directory / "epoch-0"))
    checkpoint = Checkpoint("epoch-0", str(directory / "epoch-0"), 0.1, 0)
    return CheckpointSeries((checkpoint,), SPARSE, True), str(directory / "model.keras")


@pytest.mark.parametrize("kind", LORA)
def test_lora(tmp_path, kind):
    make, shape, vocabulary = LORA[kind]
    layer = make()
    model = _model(layer, shape, "float32" if vocabulary is None else "int32")
    layer.enable_lora(2, lora_alpha=3)
    _shaken(model)
    series, network = _save_with_lora(tmp_path, model)
    batch = _batch(shape, vocabulary)
    found = {layer.name: layer for layer in _factors(series, batch, "all", model=network)}
    names = [f"it/{part}" for part in ("lora_a", "lora_b", "bias")[: 2 if vocabulary else 3]]
    assert list(found) == [*names, "logits"]

    variables = [v for v in layer.trainable_variables if v.name != "bias"]
    variables += [v for v in layer.trainable_variables if v.name == "bias"]
    gradients = example_gradients(model, batch, variables)
    for name, gradient in zip(names, gradients, strict=True):
        size = gradient[0].size
        layer_factors = found[name]
        expected = gradient.reshape(N, -1, gradient.shape[-1]) if gradient.ndim > 2 else gradient
        if name.endswith("bias"):
            expected = expected.reshape(N, size, 1)
        elif kind == "einsum to heads" and name.endswith("lora_a"):
            expected = gradient.reshape(N, 5, -1).transpose(0, 2, 1)
        else:
            expected = expected.transpose(0, 2, 1)
        assert_factors(layer_factors, expected)


def test_lora_that_keras_has_merged_is_refused(tmp_path):
    layer = layers.Dense(4, name="it")
    model = _model(layer, (5,))
    layer.enable_lora(2)
    series = save_series(tmp_path, [model])
    with pytest.raises(InputError, match="layer 'it' has LoRA, whose weights are all 0: Keras"):
        _factors(series, _batch((5,)))


@pytest.mark.parametrize("options", [{}, {"float64": True}, {"precision": "float32"}])
def test_a_quantised_layer_is_refused_also_where_it_does_not_count(tmp_path, options):
    layer = layers.Embedding(9, 4, name="it")
    model = _model(layer, (3,))
    layer.quantize("int8")
    series = save_series(tmp_path, [model])
    with pytest.raises(InputError, match=r"epoch-0.keras': layer 'it' is quantised to int8"):
        KerasFactorExtractor(series, **options).load()
    model.compile("sgd", "mean_squared_error")
    with pytest.raises(InputError, match="layer 'it' is quantised to int8"):
        model.fit(
            np.zeros((2, 3)),
            np.zeros((2, CLASSES)),
            verbose=0,
            callbacks=[CheckpointRecorder(tmp_path / "run")],
        )


def test_equations_with_a_weight_for_each_example_are_refused(tmp_path):
    layer = layers.EinsumDense("abc,acd->abd", (2, 4), name="it")
    source = keras.Input((2, 5), batch_size=N)
    model = keras.Model(source, layers.Dense(CLASSES)(layers.Flatten()(layer(source))))
    series = save_series(tmp_path, [model])
    with pytest.raises(InputError, match="layer 'it' computes .*expected an equation"):
        _factors(series, _batch((2, 5)))


def test_other_kinds_are_named(tmp_path):
    series = save_series(tmp_path, [_model(layers.LSTM(4, name="it"), (3, 2))])
    with pytest.raises(InputError, match="layer 'it' is a LSTM: expected a Dense"):
        _factors(series, _batch((3, 2)))
