"""A reduced configuration of any class of transformers: its own fields, small; every kind of layer once or more."""

from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from sp_attention.cli.reduced.overrides import OVERRIDES
from sp_attention.cli.reduced.sizes import DOUBLED, FIRST_TOKEN, HEADS, SIZES, STAGES

# How many layers are tried until every kind of layer of the default configuration occurs.
DEPTHS = (2, 3, 4, 6, 8)
_DEPTH_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
_KINDS_OF_LAYERS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attention_layers")
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2}


class NotBuildableError(Exception):
    """No reduced model of this type can be built here; the text has the reason."""


def reduced(config_class: type[PreTrainedConfig], **settings: Any) -> PreTrainedConfig:
    """A small configuration, without dropout, of as few layers as show every kind of layer.

    settings: fields to set beyond those that the names tell, such as `is_decoder`; ignored where there is none.
    """
    errors: list[str] = []
    best: PreTrainedConfig | None = None
    wanted = _kinds_of_layers(_default(config_class))
    for depth in DEPTHS:
        try:
            config = _reduced(config_class, depth, settings)
        except Exception as error:  # a configuration checks itself in its own ways
            errors.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        if _kinds_of_layers(config) == wanted:
            return config
        if best is None or len(_kinds_of_layers(config)) > len(_kinds_of_layers(best)):
            best = config
    if best is None:
        raise NotBuildableError(errors[0])
    return best


def _reduced(config_class: type[PreTrainedConfig], depth: int, settings: dict[str, Any]) -> PreTrainedConfig:
    known = {field.name: _value(field) for field in fields(config_class)} if is_dataclass(config_class) else {}
    values = {name: value for name, default in known.items() if (value := _small(name, default)) is not None}
    values |= {name: depth for name in _DEPTH_NAMES if name in known and isinstance(values.get(name), int)}
    if "kv_lora_rank" in known and "num_key_value_heads" in known:
        values["num_key_value_heads"] = HEADS  # latent attention has keys for every head
    for name, value in settings.items():
        if name in known:
            values[name] = [value] * len(known[name]) if isinstance(known[name], (list, tuple)) else value
    inside = {name: value for name, value in settings.items() if name != "is_decoder"}
    for name, part in _parts(config_class).items():
        # The decoder of two that are put together says that it is one.
        decodes = {flag: True for flag in ("is_decoder", "add_cross_attention") if getattr(part, flag, False)}
        values[name] = _reduced(type(part), depth, inside | decodes)
    values |= OVERRIDES.get(config_class.model_type) or OVERRIDES.get(config_class.__name__, {})
    # Not every expert of transformers keeps float64 in its fast implementations.
    config = config_class(**values | {"experts_implementation": "eager"})
    _without_dropout(config)
    return config


def _small(name: str, default: Any) -> Any:
    """What a field becomes, None to leave it as it is."""
    if isinstance(default, (tuple, list)) and default and all(isinstance(item, int) for item in default):
        if name in DOUBLED:
            return [DOUBLED[name] * 2**stage for stage in range(len(default))]
        if name in STAGES:
            return [STAGES[name]] * len(default)
        return [SIZES[name]] * len(default) if name == "image_size" else None
    if isinstance(default, bool) or not isinstance(default, (int, float, type(None), str)):
        return None
    if name in _SPECIAL:
        return _SPECIAL[name]
    if name.endswith(("_token_id", "_token_index")) and default is not None:
        return 3 + sum(map(ord, name)) % (FIRST_TOKEN - 3)
    if isinstance(default, str) and default != "auto":
        return None
    return SIZES.get(name)


def _value(field: "Field[Any]") -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else None


def _parts(config_class: type[PreTrainedConfig]) -> dict[str, PreTrainedConfig]:
    """The configurations inside one of this class, as they are by default."""
    default = _default(config_class)
    names = [*config_class.sub_configs, *getattr(config_class, "sub_configs_defaults", {})]
    parts = {name: getattr(default, name, None) for name in names}
    return {name: part for name, part in parts.items() if isinstance(part, PreTrainedConfig)}


def _default(config_class: type[PreTrainedConfig]) -> PreTrainedConfig | None:
    try:
        return config_class()
    except Exception:  # some have no defaults
        return None


def configurations(config: PreTrainedConfig | None) -> list[PreTrainedConfig]:
    """A configuration and all those inside it."""
    if config is None:
        return []
    inside = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(found for part in inside for found in configurations(part))]


def _kinds_of_layers(config: PreTrainedConfig | None) -> set[str]:
    return {
        f"{type(part).__name__}.{name}.{kind}"
        for part in configurations(config)
        for name in _KINDS_OF_LAYERS
        for kind in (getattr(part, name, None) or [])
    }


def _without_dropout(config: PreTrainedConfig) -> None:
    for part in configurations(config):
        for name, value in list(vars(part).items()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(part, name, 0.0)
            elif name in ("output_router_logits", "apply_spec_augment") and value:
                setattr(part, name, False)
            elif isinstance(value, float) and name == "mask_time_prob":
                setattr(part, name, 0.0)
