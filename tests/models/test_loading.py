"""Checkpoints of every kind hold the weights of the model that was saved."""

import json
import sys
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from tests.models.conftest import SPARSE, conv_model, save_series
from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.models.loading import ModelLoading, load_checkpoints

layers = keras.layers
X = np.random.default_rng(0).standard_normal((5, 6, 6, 2)).astype(np.float32)


def _outputs(loaded, inputs=X):
    scope = keras.StatelessScope(
        state_mapping=list(zip(loaded.model.variables, loaded.values, strict=True))
    )
    with scope:
        return loaded.model(inputs, training=False).numpy()


def _series(path, **more):
    return CheckpointSeries((Checkpoint("c", str(path), 0.1, 1),), SPARSE, True, **more)


def _load(path, model, **options):
    (loaded,) = load_checkpoints(_series(path), ModelLoading(str(model), **options))
    return loaded


@pytest.fixture
def model_and_file(tmp_path):
    """A model, and a file with its network and other weights."""
    conv_model().save(tmp_path / "network.keras")
    return conv_model(), tmp_path / "network.keras"


def _fitted(model):
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(X, np.arange(5), verbose=0)
    return model


SAVES = {
    "keras": lambda model, path: model.save(f"{path}.keras") or f"{path}.keras",
    "weights": lambda m, path: m.save_weights(f"{path}.weights.h5") or f"{path}.weights.h5",
    "root": lambda model, path: tf.train.Checkpoint(model).write(str(path)),
    "named": lambda model, path: tf.train.Checkpoint(
        net=model, step=tf.Variable(1), optimizer=_fitted(model).optimizer
    ).save(str(path)),
    "saved model": lambda model, path: model.export(str(path), verbose=False) or str(path),
}


@pytest.mark.parametrize("kind", SAVES)
def test_weights_into_a_network(tmp_path, model_and_file, kind):
    model, network = model_and_file
    path = SAVES[kind](model, tmp_path / "saved")
    loaded = _load(path, network)
    np.testing.assert_array_equal(_outputs(loaded), model(X, training=False))


def _branches(k):
    """A network with branches of equal shapes, which order alone tells apart."""
    source = k.Input((6, 6, 2))
    x = k.layers.Conv2D(4, 3, padding="same", use_bias=False)(source)
    left = k.layers.Conv2D(4, 3, padding="same")(k.layers.BatchNormalization()(x))
    right = k.layers.Conv2D(4, 3, padding="same")(k.layers.BatchNormalization()(x))
    inner = k.Sequential([k.layers.InputLayer((6, 6, 4)), k.layers.Conv2D(4, 3, padding="same")])
    x = k.layers.Dropout(0.5)(k.layers.Add()([left, right, inner(x)]))
    x = k.layers.Dense(5)(k.layers.Flatten()(x))
    return k.Model(source, k.layers.Activation("softmax")(x))


@pytest.mark.parametrize("kind", ["weights", "fitted weights", "checkpoint", "saved model", "h5"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_checkpoints_of_keras_2(tmp_path, kind):
    """What the paper's own code writes."""
    old = _branches(tf_keras)
    rng = np.random.default_rng(1)
    old.set_weights([rng.random(w.shape).astype(np.float32) / 9 for w in old.get_weights()])
    path = str(tmp_path / "old")
    if kind == "fitted weights":
        old.compile("adam", "mse")
        old.fit(X, np.zeros((5, 5)), verbose=0)
    if kind == "checkpoint":
        path = tf.train.Checkpoint(model=old, step=tf.Variable(3)).save(path)
    elif kind == "saved model":
        old.save(path, save_format="tf")
    elif kind == "h5":
        path += ".weights.h5"
        old.save_weights(path)
    else:
        old.save_weights(path)
    _branches(keras).save(tmp_path / "network.keras")
    found = _outputs(_load(path, tmp_path / "network.keras"))
    np.testing.assert_allclose(found, old(X, training=False), rtol=1e-5)


def test_a_function_that_returns_the_network(tmp_path, monkeypatch, model_and_file):
    model, _ = model_and_file
    (tmp_path / "my_networks.py").write_text(
        "from tests.models.conftest import conv_model\n"
        "def network(): return conv_model()\n"
        "def nothing(): return None\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = SAVES["weights"](model, tmp_path / "saved")
    loaded = _load(path, "my_networks:network")
    np.testing.assert_array_equal(_outputs(loaded), model(X, training=False))
    for name, message in [
        ("my_networks:other", "module 'my_networks' has no function 'other'"),
        ("my_networks:nothing", "returned None: expected a Keras model that is built"),
        ("no_networks:network", "--model 'no_networks' cannot be imported.*as from the directory"),
        ("network", "'network': expected module:function, which returns the model, or a .keras"),
    ]:
        with pytest.raises(InputError, match=message):
            _load(path, name)


@pytest.mark.parametrize("kind", SAVES)
def test_weights_of_another_network_are_refused(tmp_path, model_and_file, kind):
    model, _ = model_and_file
    path = SAVES[kind](model, tmp_path / "saved")
    other = keras.Sequential([keras.Input((6, 6, 2)), layers.Flatten(), layers.Dense(5)])
    other.save(tmp_path / "other.keras")
    with pytest.raises(InputError, match="checkpoint 'c': .*expected .*this very network"):
        _load(path, tmp_path / "other.keras")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_keras_2_weights_of_another_network_are_refused(tmp_path):
    _branches(tf_keras).save_weights(str(tmp_path / "old"))
    other = keras.Sequential([keras.Input((6, 6, 2)), layers.Conv2D(5, 3), layers.Flatten()])
    other.save(tmp_path / "other.keras")
    with pytest.raises(InputError, match=r"'conv2d.*kernel' of the model has shape \(3, 3, 2, 5\)"):
        _load(tmp_path / "old", tmp_path / "other.keras")


def test_files_without_a_network_need_one(tmp_path, model_and_file):
    model, _ = model_and_file
    path = SAVES["weights"](model, tmp_path / "saved")
    with pytest.raises(InputError, match="saved.weights.h5' holds no network.*or --model for"):
        load_checkpoints(_series(path), ModelLoading())


def test_checkpoints_of_one_network_share_it(tmp_path):
    one = conv_model()
    other = keras.models.clone_model(one)
    other.set_weights([w + 1 for w in one.get_weights()])
    series = save_series(tmp_path, [one, other])
    first, second = load_checkpoints(series, ModelLoading())
    assert first.model is second.model
    np.testing.assert_array_equal(_outputs(first), one(X, training=False))
    np.testing.assert_array_equal(_outputs(second), other(X, training=False))


def test_checkpoints_of_other_networks_do_not(tmp_path):
    first, second = load_checkpoints(save_series(tmp_path, [conv_model(), conv_model()]), _PLAIN)
    # Keras has given the second one other names.
    assert first.model is not second.model


_PLAIN = ModelLoading()


def _normalised(mean):
    normalization = layers.Normalization(name="norm")
    normalization.adapt(np.random.default_rng(0).standard_normal((50, 3)) + mean)
    model = keras.Sequential([keras.Input((3,)), normalization, layers.Dense(5, name="d")])
    model.name = "same"
    return model


def test_what_preprocessing_has_learned_is_kept(tmp_path):
    """Keras makes constants of it, which are no variables."""
    models = [_normalised(0), _normalised(9)]
    inputs = np.ones((2, 3), np.float32)
    for loaded, model in zip(
        load_checkpoints(save_series(tmp_path, models), _PLAIN), models, strict=True
    ):
        np.testing.assert_allclose(_outputs(loaded, inputs), model(inputs), rtol=1e-6)


@keras.saving.register_keras_serializable("tests")
class WithState(layers.Layer):
    """Keeps something beside its variables."""

    state = 0.0

    def call(self, inputs):
        return inputs + self.state

    def save_own_variables(self, store):
        store["state"] = np.float32(self.state)

    def load_own_variables(self, store):
        self.state = float(store["state"][()])


def test_what_a_layer_keeps_beside_its_variables_is_kept(tmp_path):
    models = []
    for state in (1.0, 2.0):
        layer = WithState(name="state")
        layer.state = state
        models.append(
            keras.Sequential([keras.Input((3,)), layer, layers.Dense(5, name="d")], name="same")
        )
    inputs = np.ones((2, 3), np.float32)
    for loaded, model in zip(
        load_checkpoints(save_series(tmp_path, models), _PLAIN), models, strict=True
    ):
        np.testing.assert_array_equal(_outputs(loaded, inputs), model(inputs))


def test_lambda_layers_need_a_flag(tmp_path):
    model = keras.Sequential(
        [keras.Input((6, 6, 2)), layers.Flatten(), layers.Lambda(lambda x: 2 * x), layers.Dense(5)]
    )
    series = save_series(tmp_path, [model])
    with pytest.raises(InputError, match="'epoch-0': .*a Lambda layer.*--allow-unsafe-model"):
        load_checkpoints(series, _PLAIN)
    (loaded,) = load_checkpoints(series, ModelLoading(allow_unsafe=True))
    np.testing.assert_array_equal(_outputs(loaded), model(X))


def test_custom_layers_are_imported(tmp_path, monkeypatch):
    (tmp_path / "my_layers.py").write_text(
        "import keras\n"
        "@keras.saving.register_keras_serializable('my_layers')\n"
        "class Doubled(keras.layers.Layer):\n"
        "    def call(self, inputs): return 2 * inputs\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    plain = keras.Sequential([keras.Input((3,)), layers.ReLU(name="doubled"), layers.Dense(5)])
    plain.save(tmp_path / "plain.keras")
    # As another process wrote it, which knew the class.
    with zipfile.ZipFile(tmp_path / "plain.keras") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(files["config.json"])
    layer = next(x for x in config["config"]["layers"] if x["config"]["name"] == "doubled")
    layer.update(
        module=None,
        class_name="Doubled",
        registered_name="my_layers>Doubled",
        config={"name": "doubled", "trainable": True, "dtype": "float32"},
    )
    with zipfile.ZipFile(tmp_path / "custom.keras", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, json.dumps(config) if name == "config.json" else content)
    series = _series(tmp_path / "custom.keras")
    with pytest.raises(InputError, match="Could not locate class 'Doubled': name the module"):
        load_checkpoints(series, _PLAIN)
    (loaded,) = load_checkpoints(series, ModelLoading(imports=("my_layers",)))
    inputs = np.ones((2, 3), np.float32)
    np.testing.assert_allclose(_outputs(loaded, inputs), plain(2 * inputs), rtol=1e-6)
    with pytest.raises(InputError, match="--import 'no_layers' cannot be imported"):
        load_checkpoints(series, ModelLoading(imports=("no_layers",)))
