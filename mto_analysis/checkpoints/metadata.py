"""Settings that lie beside the weights: a trainer's arguments or config, a Hugging Face ``config.json``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal

import yaml

from mto_analysis.checkpoints.conversion import Given, one_count
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.errors import CheckpointError, OptionNeededError
from mto_analysis.models.interface import HEADS_ASSUMED, ImageSize, as_image_size

# Where training scripts, Lightning and Hydra keep their settings; later ones count first.
_SETTINGS = ("cfg", "config", "hparams", "args", "hyper_parameters")
#: Settings that must be known, and the argument that gives each.
_SETTLED_BY = {
    "num_heads": "num_heads",
    "decoder_num_heads": "decoder_num_heads",
    "img_size": "image_size",
    "image_size": "image_size",
    "input_size": "image_size",
}
_OF_A_DECODER = ("num_heads", "depth", "num_layers")
# Parts of settings that are of other models, or of none.
_OTHER_PARTS = re.compile(
    r"^(tch|ema)|teacher|target|probe|classif|discrim|predictor|optim|sched|trainer|callback|augment"
)
_STAND_IN_RATIO = 0.75
_LISTED = 3

# Real configs have some 20 kB; parsing needs a hundred times the memory of the text.
_LONGEST_CONFIG = 2**20

#: Names of depths in settings, and in our configurations.
_DEPTHS = {
    "num_hidden_layers": "depth",
    "num_layers": "depth",
    "DEPTH": "depth",
    "DEPTHS": "depths",
    "depths": "depths",
    "stages": "depths",
    "decoder_num_hidden_layers": "decoder_depth",
    "decoder_depth": "decoder_depth",
}


def section(settings: Any, *path: str) -> Mapping[str, Any]:
    """A mapping inside mappings; empty where something on the way is missing.

    Example:
        >>> section({"DATA": {"IMG_SIZE": 192}}, "DATA")
        {'IMG_SIZE': 192}
    """
    for name in path:
        settings = settings.get(name) if isinstance(settings, Mapping) else None
    return settings if isinstance(settings, Mapping) else {}


def arguments(raw: RawCheckpoint, given: Given) -> dict[str, Any]:
    """The arguments of a training script (``args``), and what Lightning calls ``hyper_parameters``, without nesting.

    Of a decoder's part, depth and head count have ``decoder_`` in front. A name on the outside counts before the same
    name in a part; parts that differ give the list of their values.
    """
    found: dict[str, Any] = {}
    for name, places in _stated(raw).items():
        values = [(name in HEADS_ASSUMED and one_count(value)) or value for value in places.values()]
        differ = any(value != values[0] for value in values)
        option = _SETTLED_BY.get(name)
        if option and (differ or isinstance(values[0], str)):
            if getattr(given, option) is None:
                words = " and ".join(f"{place} = {value!r}" for place, value in list(places.items())[:_LISTED])
                raise OptionNeededError(f"its settings state {words}; give --{option.replace('_', '-')}", option)
        else:
            found[name] = values if differ else values[0]
    return found


def _stated(raw: RawCheckpoint) -> dict[str, dict[str, Any]]:
    """What the settings of a training script state by name, each value with its place."""
    outside: dict[str, dict[str, Any]] = {}
    inside: dict[str, dict[str, Any]] = {}
    for key in _SETTINGS:
        for place, value in _leaves(section(raw.extras, key), (key,)):
            *parts, name = place
            within_decoder = any("decoder" in part for part in parts)
            own = f"decoder_{name}" if within_decoder and name in _OF_A_DECODER else name
            if len(parts) == 1:
                outside[own] = {".".join(place): value}
            elif not any(_OTHER_PARTS.search(part) for part in parts):
                inside.setdefault(own, {})[".".join(place)] = value
    return inside | outside


def _leaves(settings: Mapping[str, Any], place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Values of mappings inside mappings, each with the names on the way."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*place, name))
        elif value is not None:
            yield (*place, name), value


def whole(settings: Mapping[str, Any], name: str) -> int | None:
    """A positive whole number, or ``None`` where there is none."""
    value = settings.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def count(settings: Mapping[str, Any], name: str) -> int | None:
    """A positive whole number of a ``config.json``, or ``None`` where it is not named."""
    if settings.get(name) is None:
        return None
    if (value := whole(settings, name)) is None:
        raise CheckpointError(f"config.json: {name} must be a positive whole number, got {settings[name]!r}")
    return value


def flag(settings: Mapping[str, Any], name: str) -> bool | None:
    """True or false, also as 1 and 0; ``None`` for anything else, as where there is none.

    Example:
        >>> flag({"norm_pix_loss": 0}, "norm_pix_loss"), flag({}, "norm_pix_loss")
        (False, None)
    """
    value = settings.get(name)
    return bool(value) if isinstance(value, int) and value in (0, 1) else None


def within(settings: Mapping[str, Any], name: str, default: float) -> float:
    """A number, or the default where there is none: numpy scalars of a pickle count as absent, as does ``None``."""
    value = settings.get(name)
    if isinstance(value, (str, list)):
        raise CheckpointError(f"the file's {name} must be a number, got {value!r}")
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else default


def ratio(settings: Mapping[str, Any], given: Given, name: str = "mask_ratio") -> float | None:
    """A fraction between 0 and 1, or ``None`` where there is none; given in place of one that is not read."""
    value = settings.get(name)
    if isinstance(value, (str, list, tuple)) or not 0 < within(settings, name, 0.5) < 1:
        if given.mask_ratio is None:
            raise OptionNeededError(
                f"the file states a {name} of {value!r}, which must lie between 0 and 1; give --mask-ratio",
                "mask_ratio",
                _STAND_IN_RATIO,
            )
        given.origins["mask_ratio"] = "given"
        return given.mask_ratio
    return within(settings, name, 0.0) or None


def size(settings: Mapping[str, Any], *names: str) -> ImageSize | None:
    """The first image size among settings: a side, or height and width; ``None`` where there is none.

    Example:
        >>> size({"input_size": 224}, "img_size", "input_size"), size({"img_size": [64, 96]}, "img_size")
        (224, (64, 96))
    """
    for name in names:
        if (side := whole(settings, name)) is not None:
            return side
        sides = settings.get(name)
        if isinstance(sides, (list, tuple)) and len(sides) == 2 and all(whole({"": each}, "") for each in sides):
            return as_image_size(sides[0], sides[1])
    return None


def numbers(value: Any) -> tuple[float, ...] | None:
    """A list of numbers as a tuple, or ``None`` for anything else.

    Example:
        >>> numbers([0.5, 1])
        (0.5, 1.0)
    """
    if not isinstance(value, (list, tuple)) or not value:
        return None
    plain = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in value)
    return tuple(float(each) for each in value) if plain else None


def criterion(loss: Mapping[str, Any]) -> Literal["l1", "l2"] | None:
    """Error that a loss of OpenMMLab names, if any."""
    stated = loss.get("criterion")
    if stated is None:
        return None
    if stated not in ("L1", "L2"):
        raise CheckpointError(f"the file's config has criterion={stated!r}, only 'L1' and 'L2' are read")
    return "l1" if stated == "L1" else "l2"


def refuse_other(settings: Mapping[str, Any], where: str, **known: Any) -> None:
    """Refuse settings that change the numbers of a model and have another value than the one that is read.

    What is not named, or is ``None``, has its default.

    Example:
        >>> refuse_other({"act": "gelu"}, "its config", act="gelu")
    """
    for name, value in known.items():
        stated = value if settings.get(name) is None else settings[name]
        stated = list(stated) if isinstance(stated, tuple) else stated
        if stated != value:
            raise CheckpointError(f"{where} has {name}={stated!r}, only {value!r} is read")


def refuse_other_depth(raw: RawCheckpoint, model: Any) -> None:
    """Refuse weights of fewer or more blocks than the settings beside them state: a truncated file loads, too."""
    swin = [section(raw.extras, "config", "MODEL", name) for name in ("VIT", "SWIN", "SWINV2")]
    mm, settings = openmmlab_config(raw), raw.config or section(raw.extras, "config")
    slowfast = section(slowfast_config(raw), "MVIT")
    own = {name: next(iter(places.values())) for name, places in _stated(raw).items() if len(places) == 1}
    for stated in (settings, section(mm, "backbone", "arch"), section(mm, "neck"), own, *swin, slowfast):
        # CAE's own decoder_depth is that of a part which is not read.
        names = {"regressor_depth": "decoder_depth"} if "regressor_depth" in stated else _DEPTHS
        for name, ours in names.items():
            depth, found = stated.get(name), getattr(model, ours, None)
            found = list(found) if isinstance(found, tuple) else found
            depth = [int(each) for each in numbers(depth) or ()] or (whole(stated, name) if found is not None else None)
            if type(depth) is type(found) and depth != found:
                raise CheckpointError(
                    f"the settings beside the weights state {name}={depth}, the weights have {found}: the file is "
                    "truncated, or the settings are another model's"
                )


def hf_config(raw: RawCheckpoint) -> Mapping[str, Any]:
    """The ``config.json`` of a Hugging Face folder."""
    if raw.config is None:
        raise CheckpointError("needs its config.json beside it; give the whole folder")
    refuse_other(raw.config, "config.json", hidden_act="gelu", decoder_hidden_act="gelu")
    biases = [name for name in raw.tensors if re.search(r"\.(query|q_proj|qkv)\.bias$", name)]
    if biases and raw.config.get("qkv_bias") is False:
        raise CheckpointError(f"config.json has qkv_bias=False, but there is {biases[0]}")
    return raw.config


def openmmlab_config(raw: RawCheckpoint) -> Mapping[str, Any]:
    """The ``model`` of the config that mmengine (``meta.cfg``) or mmcv (``meta.config``) stores as Python text."""
    meta = section(raw.extras, "meta")
    text = next((meta[name] for name in ("cfg", "config") if isinstance(meta.get(name), str)), "")
    return _openmmlab_model(text) if len(text) <= _LONGEST_CONFIG else {}


@lru_cache(maxsize=1)  # a conversion asks for it many times
def _openmmlab_model(text: str) -> Mapping[str, Any]:
    try:
        for statement in ast.parse(text).body:
            if isinstance(statement, ast.Assign) and [ast.unparse(each) for each in statement.targets] == ["model"]:
                model = section({"model": _python_value(statement.value)}, "model")
                _check_openmmlab(model)
                return model
    except (SyntaxError, RecursionError, MemoryError):
        pass
    return {}


def _check_openmmlab(model: Mapping[str, Any]) -> None:
    """Refuse layers and channel orders that no converter builds."""
    data = section(model, "data_preprocessor")
    colours = numbers(data.get("mean")) or (0.0,) * 3
    if data and len(colours) > 1 and not (data.get("to_rgb") or data.get("bgr_to_rgb")):
        raise CheckpointError("the file's config (data_preprocessor) has no bgr_to_rgb=True, so images were BGR")
    for part in ("backbone", "neck"):
        where = f"the file's config ({part})"
        refuse_other(section(model, part, "norm_cfg"), where, type="LN", eps=1e-6)
        layers = section(model, part, "layer_cfgs")
        refuse_other(section(layers, "act_cfg"), where, type="GELU")
        refuse_other(layers, where, ffn_type="origin")


def _python_value(node: ast.expr) -> Any:
    """A literal, or ``dict(name=literal)``, without running anything; other expressions are ``None``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {each.arg: _python_value(each.value) for each in node.keywords if each.arg is not None}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {key.value: _python_value(value) for key, value in pairs if isinstance(key, ast.Constant)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_python_value(each) for each in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return None


def slowfast_config(raw: RawCheckpoint) -> Mapping[str, Any]:
    """The config that PySlowFast stores as YAML text."""
    text = raw.extras.get("cfg")
    if not isinstance(text, str) or len(text) > _LONGEST_CONFIG or "&" in text:  # aliases could grow without bound
        return {}
    return _slowfast_model(text)


@lru_cache(maxsize=1)  # as above
def _slowfast_model(text: str) -> Mapping[str, Any]:
    try:
        return section({"cfg": yaml.load(text, Loader=yaml.SafeLoader)}, "cfg")
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
