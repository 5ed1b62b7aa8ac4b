"""Loading checkpoints as Keras models, without running what an untrusted file may contain."""

import json
import re
import zipfile
from dataclasses import dataclass, replace
from typing import Any

import keras
import tensorflow as tf

from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.user_code import load_function, load_module
from tracin_transforms.models.layers import all_layers, check_not_quantised
from tracin_transforms.models.tf_checkpoints import is_tf_checkpoint, read_tf_checkpoint
from tracin_transforms.storage.checkpoint_series import fetched_checkpoint
from tracin_transforms.storage.files import any_path, fetched


@dataclass(frozen=True)
class ModelLoading:
    """How to turn checkpoints into models.

    Attributes:
        model: Where the network comes from if the checkpoints hold weights alone, or are not to
            be trusted with more: ``module:function``, which returns a built model, or a ``.keras``
            file. None: each checkpoint is a ``.keras`` file with its own.
        imports: Modules to import before, which register custom layers or losses.
        allow_unsafe: Load Lambda layers, which run code that the file contains.
    """

    model: str | None = None
    imports: tuple[str, ...] = ()
    allow_unsafe: bool = False


@dataclass(frozen=True, eq=False)
class LoadedCheckpoint:
    """A checkpoint in memory.

    Attributes:
        checkpoint: Which.
        model: The network; checkpoints of the same one share it.
        values: The values of the model's variables at the checkpoint, in their order.
    """

    checkpoint: Checkpoint
    model: keras.Model
    values: tuple[tf.Tensor, ...]


def load_checkpoints(series: CheckpointSeries, loading: ModelLoading) -> list[LoadedCheckpoint]:
    """Returns all checkpoints of a run, with one model for all whose networks are the same.

    Raises:
        InputError: Not a Keras model, or one that safe mode refuses; weights that do not fit; Keras
            runs on a backend other than TensorFlow.
    """
    if keras.backend.backend() != "tensorflow":
        raise InputError(
            f"Keras runs on the backend {keras.backend.backend()!r}, expected 'tensorflow': "
            "set KERAS_BACKEND=tensorflow"
        )
    for name in loading.imports:
        load_module(name, "--import")
    series = _fetched(series)
    source = loading.model or series.model
    if source is not None:
        model = _network(source, loading)
        return [_with_weights(checkpoint, model) for checkpoint in series.checkpoints]
    loaded: list[LoadedCheckpoint] = []
    networks: list[tuple[Any, keras.Model]] = []
    for checkpoint in series.checkpoints:
        config = _network_config(checkpoint.path)
        same = [model for known, model in networks if known == config and _is_all_variables(model)]
        if same:
            loaded.append(_with_weights(checkpoint, same[0]))
            continue
        model = _load_keras_file(
            checkpoint.path, f"checkpoint {checkpoint.id!r}: ", loading.allow_unsafe
        )
        networks.append((config, model))
        loaded.append(LoadedCheckpoint(checkpoint, model, _values(model)))
    return loaded


def _fetched(series: CheckpointSeries) -> CheckpointSeries:
    """Returns the run with local files for what is in an object store."""
    return replace(
        series,
        checkpoints=tuple(replace(c, path=fetched_checkpoint(c.path)) for c in series.checkpoints),
        model=series.model and str(fetched(any_path(series.model))),
    )


def _network(source: str, loading: ModelLoading) -> keras.Model:
    if source.endswith(".keras"):
        return _load_keras_file(str(fetched(any_path(source))), "--model ", loading.allow_unsafe)
    if ":" not in source:
        raise InputError(
            f"--model {source!r}: expected module:function, which returns the model, or a .keras "
            "file"
        )
    model = load_function(source, "--model")()
    if not isinstance(model, keras.Model) or not model.built:
        raise InputError(
            f"--model {source!r} returned {model!r:.60}: expected a Keras model that is built, as "
            "one with an Input is, or after a first call"
        )
    check_not_quantised(model, f"--model {source!r}")
    return model


def _load_keras_file(path: str, what: str, allow_unsafe: bool) -> keras.Model:
    if not path.endswith(".keras"):
        raise InputError(
            f"{what}{path!r} holds no network, or none that Keras loads: expected a .keras file as "
            "written by model.save, or --model for files that hold weights"
        )
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=not allow_unsafe)
    # Keras raises many kinds of exceptions for files that are not what it expects.
    except Exception as error:
        raise InputError(
            f"{what}{path!r} cannot be loaded as a Keras model: {_reason(error)}"
        ) from error
    if not isinstance(model, keras.Model):
        raise InputError(f"{what}{path!r} holds a {type(model).__name__}, expected a Keras model")
    check_not_quantised(model, f"{what}{path!r}")
    _restore_lora_scales(model, _network_config(path))
    return model


def _restore_lora_scales(model: keras.Model, config: Any) -> None:
    """Sets what Keras 3.15 forgets when it loads Dense and Embedding layers: their lora_alpha."""
    if isinstance(config, list):
        for part in config:
            _restore_lora_scales(model, part)
    elif isinstance(config, dict):
        if config.get("lora_rank") and config.get("lora_alpha"):
            for layer in all_layers(model):
                if layer.name == config.get("name"):
                    layer.lora_alpha = config["lora_alpha"]
        for part in config.values():
            _restore_lora_scales(model, part)


def _reason(error: Exception) -> str:
    reason = " ".join(str(error).split())
    # Keras says which class it does not know at the end of a long description of the layer.
    unknown = re.search(r"Could not locate (class|function) '[^']*'", reason)
    if unknown:
        return f"{unknown[0]}: name the module that registers it with --import"
    if "lambda" in reason.lower():
        return (
            "it has a Lambda layer, which runs code that the file contains. If you trust the file, "
            "load it with --allow-unsafe-model; or give the network with --model"
        )
    return f"{reason:.300}; expected a .keras file as written by model.save"


def _with_weights(checkpoint: Checkpoint, model: keras.Model) -> LoadedCheckpoint:
    what = f"checkpoint {checkpoint.id!r}: {checkpoint.path!r}"
    if is_tf_checkpoint(checkpoint.path):
        try:
            read_tf_checkpoint(model, checkpoint.path)
        except InputError as error:
            raise InputError(f"{what}: {error}") from error
    else:
        try:
            model.load_weights(checkpoint.path)
        # As above.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{what}: its weights cannot be loaded into model {model.name!r}: {reason:.300}; "
                "expected a .keras file, a .weights.h5 file or a TensorFlow checkpoint of this "
                "very network"
            ) from error
    return LoadedCheckpoint(checkpoint, model, _values(model))


def _values(model: keras.Model) -> tuple[tf.Tensor, ...]:
    """Returns what the variables hold now, whatever is assigned to them later."""
    for layer in all_layers(model):
        if getattr(layer, "lora_enabled", False) and _is_without_lora(layer):
            raise InputError(
                f"layer {layer.name!r} has LoRA, whose weights are all 0: Keras merges them into "
                "the kernel in .keras and .weights.h5 files. Write checkpoints with "
                "CheckpointRecorder or tf.train.Checkpoint(model=model), which keep them"
            )
    return tuple(tf.convert_to_tensor(variable.value) for variable in model.variables)


def _is_without_lora(layer: keras.layers.Layer) -> bool:
    matrices = [v for v in layer.variables if v.name.startswith("lora_")]
    return not any(tf.reduce_any(variable.value != 0) for variable in matrices)


def _network_config(path: str) -> Any:
    """Returns what a .keras file says of its network, without weights and training."""
    try:
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        # Whoever loads it finds out what is wrong.
        return None
    return _without_object_ids({k: config[k] for k in config if k != "compile_config"})


def _without_object_ids(config: Any) -> Any:
    """Leaves out where shared objects, such as policies of dtypes, lay in memory."""
    if isinstance(config, list):
        return [_without_object_ids(part) for part in config]
    if isinstance(config, dict):
        return {
            key: _without_object_ids(part)
            for key, part in config.items()
            if key != "shared_object_id"
        }
    return config


def _is_all_variables(model: keras.Model) -> bool:
    """Returns whether the variables are all that tells checkpoints of a network apart."""
    for layer in all_layers(model):
        # Preprocessing layers make constants of what they have learned.
        if hasattr(layer, "finalize_state"):
            return False
        for name in ("save_own_variables", "save_assets"):
            method = getattr(type(layer), name, None)
            if method is not None and not method.__module__.startswith("keras."):
                return False
    return True
