"""Hugging Face folders of models that are not ours: transformers builds them, and taps read their tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from mto_analysis.checkpoints.conversion import MASK_TOKENS, Conversion, Given, StateDict, some_names
from mto_analysis.checkpoints.metadata import whole
from mto_analysis.checkpoints.positions import Grid
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.errors import CheckpointError
from mto_analysis.masks import MaskRule
from mto_analysis.models import ModelInfo
from mto_analysis.models.live import LiveModel, inferred_info

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LISTED = 4
_MASK_ARGUMENTS = {"bool_masked_pos", "noise", "target_mask"}
_TOKEN_OPTION = "use_mask_token"


@dataclass(frozen=True)
class LibraryConfig:
    """A model that transformers builds.

    Args:
        architecture: Name of its class.
        version: Of transformers.
        channels: Of an image.
        image_size: Height and width in pixels, or the side of a square.
        patch_size: Side of a patch in pixels.
        num_heads: Attention heads, where all blocks have the same number.
    """

    architecture: str
    version: str
    channels: int
    image_size: int | tuple[int, int]
    patch_size: int
    num_heads: int | None


def architecture(raw: RawCheckpoint) -> str | None:
    """The class that a ``config.json`` names, if any."""
    named = (raw.config or {}).get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) and first.isidentifier() else None


def convert_library(raw: RawCheckpoint, given: Given) -> Conversion:
    """A model as transformers builds it from ``config.json``: its own classes only, never code of the folder.

    Weights are those that were read safely before; transformers gets them as tensors.
    """
    name, settings = architecture(raw) or "", dict(raw.config or {})
    cls, version = _class_named(name)
    if "quantization_config" in settings:
        raise CheckpointError("its weights are quantized (quantization_config); save them in float32")
    if (named := next(_outside(settings), None)) or name.startswith("Timm"):
        raise CheckpointError(
            f"config.json asks for a model of another library ({named or name}), which is not fetched"
        )
    if (whole(settings, "num_hidden_layers") or 0) > len(raw.tensors):
        raise CheckpointError(f"num_hidden_layers of config.json is more than the file's {len(raw.tensors)} tensors")
    # What config.json may ask for is code of somebody's repository; "eager" rounds float64 to float32 in its softmax.
    settings = {key: value for key, value in settings.items() if "attn_implementation" not in key}
    attention = "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"
    # Some classes have a mask token only if their constructor is asked for one, which no config.json says.
    options = {_TOKEN_OPTION: True} if _TOKEN_OPTION in inspect.signature(cls).parameters else {}
    with _failures(name):
        config = cls.config_class.from_dict(settings, attn_implementation=attention)
        with torch.device("meta"):
            info = inferred_info(_masked_part(cls(config, **options)))
    size = info.image_size if given.image_size is None else Grid.of(given.image_size, info.patch_size).image_size
    assumptions = ["masks are random patches, as config.json does not say how the model was masked"]
    assumptions += info.assumptions[1:]
    if size != info.image_size:
        assumptions.append(
            f"images of {replace(info, image_size=size).pixels} in place of {info.pixels} are what the model is for: "
            "transformers adapts its positions"
        )
    heads = whole(settings, "num_attention_heads")
    if heads is not None:
        given.choose("num_heads", heads, stated=heads)
    elif given.num_heads is not None:
        raise CheckpointError("config.json states the attention heads; leave --num-heads out")
    if given.decoder_num_heads is not None:
        raise CheckpointError("config.json states the attention heads; leave --decoder-num-heads out")
    # Merged tokens are masked or visible as a whole, so masks are made of units of the last stage.
    merged = 2 ** max(len(getattr(config, "depths", ())) - 1, 0)
    rule = info.mask_rule if merged == 1 else MaskRule("block", info.mask_ratio, info.patch_size * merged)
    info = replace(info, family=name, image_size=size, mask_rule=rule, assumptions=tuple(assumptions))
    about = LibraryConfig(name, version, info.channels, info.image_size, info.patch_size, heads)

    def make(_: Any, known: ModelInfo) -> LiveModel:
        tensors = {key: tensor.clone() if raw.mapped else tensor for key, tensor in raw.tensors.items()}
        model = _loaded(cls, config, tensors, options)
        live = LiveModel(_masked_part(model), known, factory=lambda: _masked_part(_fresh(cls(config, **options))))
        live.verify()
        return live

    return Conversion(make, about, info, StateDict(dict(raw.tensors)), loaded=True)


def _outside(settings: Any) -> Iterator[str]:
    """Settings, at any depth, with which transformers would build or download a backbone of timm or of the hub."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            if (value and key in ("backbone", "use_timm_backbone", "use_pretrained_backbone")) or (
                key == "model_type" and str(value).startswith("timm")
            ):
                yield f"{key} {value!r}"
            yield from _outside(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _outside(value)


def _class_named(name: str) -> tuple[type[PreTrainedModel], str]:
    """A class of transformers, and the version of that."""
    try:
        import transformers
    except ImportError:
        raise CheckpointError(
            f"{name} is built by the package transformers, which is missing: pip install 'mto-analysis[libraries]'"
        ) from None
    found = getattr(transformers, name, None)
    if not (inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"transformers {transformers.__version__} has no class {name}; code of a folder is never run, so measure "
            "the model live: mto_analysis.measure(model, images, mask)"
        )
    return found, transformers.__version__


def _masked_part(model: PreTrainedModel) -> PreTrainedModel:
    """The innermost model that takes a mask and holds all mask tokens: a classifier's encoder, a vision tower."""
    from transformers import PreTrainedModel

    tokens = {id(each) for path, each in model.named_parameters() if path.endswith(MASK_TOKENS)}
    if not tokens:
        raise CheckpointError(f"{type(model).__name__} has no mask token as config.json describes it")
    found = [
        part
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
        and _MASK_ARGUMENTS & set(inspect.signature(part.forward).parameters)
        and tokens <= {id(each) for each in part.parameters()}
    ]
    if not found:
        raise CheckpointError(
            f"no part of {type(model).__name__} with a mask token takes a mask "
            f"({' or '.join(sorted(_MASK_ARGUMENTS))}); measure it live with call=..."
        )
    return found[-1]


@contextmanager
def _failures(name: str) -> Iterator[None]:
    """Settings that no real model has can make its code fail in any way."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        raise CheckpointError(f"transformers builds no {name} from config.json ({words})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and reports of transformers inside: what is wrong is said in our one line."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _fresh(model: PreTrainedModel) -> PreTrainedModel:
    """New weights; transformers starts most mask tokens as zeros, where pre-training starts them near zero."""
    for path, parameter in model.named_parameters():
        if path.endswith(MASK_TOKENS) and not bool(parameter.count_nonzero()):
            torch.nn.init.trunc_normal_(parameter, std=getattr(model.config, "initializer_range", 0.02))
    return model


def _loaded(
    cls: type[PreTrainedModel], config: Any, tensors: dict[str, torch.Tensor], options: dict[str, bool]
) -> PreTrainedModel:
    """The model with exactly these weights, in float32."""
    with _quiet(), _failures(cls.__name__):
        model, found = cls.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are listed, and refused below
            output_loading_info=True,
            **options,
        )
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in found[kind])
        if names:
            problems.append(f"{kind.removesuffix('_keys')}: {some_names(names, _LISTED)}")
    if problems:
        raise CheckpointError(f"the weights are not those of a {cls.__name__}; {'; '.join(problems)}")
    return model.eval()
