"""Models of every shape, all dense layers, against float64 automatic differentiation."""

import dataclasses

import keras
import numpy as np
import pytest

from tests.models.conftest import batch_of, save_series
from tests.models.reference import assert_factors, example_gradients, load_model
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.influence import influence, self_influence
from tracin_transforms.models.extractor import KerasFactorExtractor
from tracin_transforms.models.layers import all_layers, candidate_layers

layers = keras.layers
CLASSES = 3


def _plain(bias=True):
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(7, "relu", use_bias=bias),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.Dense(6, "tanh", use_bias=bias),
            layers.Dense(CLASSES, use_bias=bias),
        ]
    )


def _nested(bias=True):
    inner = keras.Sequential([keras.Input((8,)), layers.Dense(7, "relu", use_bias=bias)])
    deeper = keras.Sequential([keras.Input((8,)), inner, layers.Dense(6, use_bias=bias)])
    source = keras.Input((8,))
    return keras.Model(source, layers.Dense(CLASSES, use_bias=bias)(deeper(source)))


def _shared(bias=True):
    """One layer that is called twice, once after itself."""
    shared, source = layers.Dense(8, "tanh", use_bias=bias), keras.Input((8,))
    return keras.Model(source, layers.Dense(CLASSES, use_bias=bias)(shared(shared(source))))


def _shared_at_the_end(bias=True):
    shared, source = layers.Dense(CLASSES, use_bias=bias), keras.Input((8,))
    halves = layers.Reshape((2, 4))(source)
    return keras.Model(source, shared(halves[:, 0]) + shared(halves[:, 1]))


def _many_positions(bias=True):
    """Narrow layers at four positions each: the gradient itself is smaller."""
    source = keras.Input((8,))
    x = layers.Dense(2, "relu", use_bias=bias)(layers.Reshape((4, 2))(source))
    return keras.Model(source, layers.Dense(CLASSES, use_bias=bias)(layers.Flatten()(x)))


def _few_positions(bias=True):
    """Wide layers at two positions each: the factors are smaller."""
    source = keras.Input((8,))
    x = layers.Dense(9, "relu", use_bias=bias)(layers.Reshape((2, 4))(source))
    x = layers.GlobalAveragePooling1D()(layers.Dense(8, "relu", use_bias=bias)(x))
    return keras.Model(source, layers.Dense(CLASSES, use_bias=bias)(x))


def _transformer_block(bias=True):
    source = keras.Input((8,))
    x = layers.Reshape((2, 4))(source)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 3)(x, x))
    x += layers.Dense(4, use_bias=bias)(layers.Dense(5, "gelu", use_bias=bias)(x))
    return keras.Model(source, layers.Dense(CLASSES, use_bias=bias)(layers.Flatten()(x)))


def _convolutional(bias=True):
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Reshape((8, 1)),
            layers.Conv1D(4, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(5, "relu", use_bias=bias),
            layers.Dense(CLASSES, use_bias=bias),
        ]
    )


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, bias=True, **kwargs):
        super().__init__(**kwargs)
        # Keras would name them anew each time that the model is loaded.
        self.hidden = [layers.Dense(8, "relu", use_bias=bias, name=name) for name in "ab"]
        self.head = layers.Dense(CLASSES, use_bias=bias, name="head")
        self.bias = bias

    def call(self, inputs):
        for layer in self.hidden:
            inputs = inputs + layer(inputs)
        return self.head(inputs)

    def get_config(self):
        return {**super().get_config(), "bias": self.bias}


def _subclassed(bias=True):
    model = Subclassed(bias)
    model(np.zeros((1, 8), np.float32))
    return model


MODELS = [
    _plain,
    _nested,
    _shared,
    _shared_at_the_end,
    _many_positions,
    _few_positions,
    _transformer_block,
    _convolutional,
    _subclassed,
]


def _batch(n=10):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((n, 8)).astype(np.float32)
    return batch_of(inputs, rng.integers(0, CLASSES, n))


def _assert_dense_factors(found, exact, batch):
    layer = next(layer for layer in all_layers(exact) if layer.name == found.name)
    kernel, *bias = example_gradients(exact, batch, layer.trainable_variables)
    # Attention's layers to heads and back have more axes: the contracted ones come first.
    contracted = 2 if layer.name == "attention_output" else 1
    kernel = kernel.reshape(len(kernel), np.prod(kernel.shape[1 : 1 + contracted]), -1)
    assert_factors(found, kernel.transpose(0, 2, 1), *bias)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("choice", ["last", "all-dense"])
@pytest.mark.parametrize("make", MODELS)
def test_factors_equal_float64_automatic_differentiation(tmp_path, make, choice, bias):
    series, batch = save_series(tmp_path, [make(bias), make(bias)]), _batch()
    block = KerasFactorExtractor(series, choice, batch_size=4).load().extract(batch)
    for checkpoint, gradient in zip(series.checkpoints, block.gradients, strict=True):
        exact = load_model(checkpoint, exact=True)
        kinds = (layers.Dense, layers.EinsumDense)
        dense = [layer for layer in all_layers(exact) if isinstance(layer, kinds)]
        assert len(gradient.layers) == (1 if choice == "last" else len(dense))
        for layer in gradient.layers:
            _assert_dense_factors(layer, exact, batch)


def test_the_smaller_form_is_kept(tmp_path):
    def widths(make):
        (tmp_path / make.__name__).mkdir()
        series = save_series(tmp_path / make.__name__, [make()])
        block = KerasFactorExtractor(series, "all-dense").load().extract(_batch())
        return [layer.activations.shape[1:] for layer in block.gradients[0].layers]

    assert widths(_many_positions) == [(2 * 2 + 2,), (8,)]
    assert widths(_few_positions) == [(2, 4), (2, 9), (8,)]


def test_blocks_are_as_large_as_memory_has_room_for(tmp_path):
    """Two checkpoints, 8 + 3 numbers in float32 for an example at each; 3 in float64 for labels."""
    series = save_series(tmp_path, [_shared(), _shared()])
    loaded = KerasFactorExtractor(series).load()
    assert loaded.block_rows(2048) == 2048
    room = 2**27 // (4 * 2 * (8 + CLASSES) + 8 * CLASSES)
    assert loaded.block_rows(10**9) == room
    # A loss without a formula, whose labels may have any shape.
    another = dataclasses.replace(series, loss="cosine_similarity", from_logits=None)
    assert KerasFactorExtractor(another).load().block_rows(10**9) == room
    subclassed = tmp_path / "subclassed"
    subclassed.mkdir()
    loaded = KerasFactorExtractor(save_series(subclassed, [_subclassed()])).load()
    assert loaded.block_rows(2048) == 256
    loaded.extract(_batch())
    assert loaded.block_rows(2048) == 256


def test_a_loss_at_every_position(tmp_path):
    """As of a token: Keras averages it over the positions."""
    source = keras.Input((8,))
    outputs = layers.Dense(CLASSES)(layers.Dense(5, "relu")(layers.Reshape((4, 2))(source)))
    series = save_series(tmp_path, [keras.Model(source, outputs)])
    rng = np.random.default_rng(1)
    batch = batch_of(_batch().inputs, rng.integers(0, CLASSES, (10, 4)))
    block = KerasFactorExtractor(series, "all-dense").load().extract(batch)
    exact = load_model(series.checkpoints[0], exact=True)
    assert block.labels.tolist() == batch.targets.tolist()
    assert block.predictions.shape == (10, 1, 4)
    for layer in block.gradients[0].layers:
        _assert_dense_factors(layer, exact, batch)


def test_inputs_of_any_length(tmp_path):
    source = keras.Input((None, 2))
    x = layers.GlobalAveragePooling1D()(layers.Dense(5, "relu")(source))
    series = save_series(tmp_path, [keras.Model(source, layers.Dense(CLASSES)(x))])
    loaded = KerasFactorExtractor(series, "all-dense").load()
    exact = load_model(series.checkpoints[0], exact=True)
    for length in (4, 2):
        batch = _batch()
        inputs = batch.inputs.reshape(10, 4, 2)[:, :length]
        batch = batch_of(np.ascontiguousarray(inputs), batch.targets)
        for layer in loaded.extract(batch).gradients[0].layers:
            _assert_dense_factors(layer, exact, batch)


def test_another_length_does_not_change_the_form_of_factors(tmp_path):
    """Training examples of 20 positions, where the gradient itself is smaller, and queries of 2."""
    source = keras.Input((None, 2))
    x = layers.GlobalAveragePooling1D()(layers.Dense(5, "relu", name="it")(source))
    series = save_series(tmp_path, [keras.Model(source, layers.Dense(CLASSES)(x))])
    rng = np.random.default_rng(0)
    few, many = (
        batch_of(rng.standard_normal((6, n, 2)).astype(np.float32), np.arange(6) % CLASSES)
        for n in (2, 20)
    )
    loaded = KerasFactorExtractor(series, "it").load()
    before, block, after = (loaded.extract(batch) for batch in (few, many, few))
    np.testing.assert_array_equal(*(self_influence(b, np.ones(1)) for b in (before, after)))
    queries = KerasFactorExtractor(series, "it", float64=True).load().extract(few)

    exact = load_model(series.checkpoints[0], exact=True)
    variables = exact.get_layer("it").trainable_variables
    sides = []
    for batch in (many, few):
        parts = example_gradients(exact, batch, variables)
        sides.append(np.hstack([part.reshape(6, -1) for part in parts]))
    expected = sides[0] @ sides[1].T
    found = influence(block, queries, np.ones(1))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_large_layer_that_is_also_applied_at_positions(tmp_path):
    one, many = keras.Input((128,), name="one"), keras.Input((200, 128), name="many")
    shared = layers.Dense(128, name="shared")
    pooled = layers.GlobalAveragePooling1D()(shared(many))
    x = layers.Concatenate()([shared(one), pooled])
    model = keras.Model({"one": one, "many": many}, layers.Dense(CLASSES)(x))
    series = save_series(tmp_path, [model])
    rng = np.random.default_rng(0)
    shapes = {"one": (5, 128), "many": (5, 200, 128)}
    inputs = {name: rng.random(shape).astype(np.float32) for name, shape in shapes.items()}
    batch = batch_of(inputs, np.arange(5) % CLASSES)
    found = KerasFactorExtractor(series).load().extract(batch).losses[:, 0]
    expected = keras.losses.sparse_categorical_crossentropy(
        batch.targets, model(inputs), from_logits=True
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_named_and_frozen_layers():
    model = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(4, name="first", trainable=False),
            layers.Dense(4, name="second"),
            layers.Dense(CLASSES, name="third"),
        ]
    )
    names = [layer.name for layer in candidate_layers(model, "all-dense")]
    assert sorted(names) == ["second", "third"]
    assert [layer.name for layer in candidate_layers(model, "first,third")] == ["first", "third"]
    assert [layer.name for layer in candidate_layers(model, "first, first")] == ["first"]
    with pytest.raises(InputError, match="0 layers are called 'fourth': expected one of"):
        candidate_layers(model, "first,fourth")
    model.trainable = False
    with pytest.raises(InputError, match="all Dense or EinsumDense layers are frozen"):
        candidate_layers(model, "all-dense")


def test_named_layers_are_those_of_the_factors(tmp_path):
    series = save_series(tmp_path, [_plain()])
    model = load_model(series.checkpoints[0])
    hidden = model.layers[3]
    block = KerasFactorExtractor(series, hidden.name).load().extract(_batch())
    assert [layer.name for layer in block.gradients[0].layers] == [hidden.name]
