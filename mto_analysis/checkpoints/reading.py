"""From a file or folder to tensors and plain settings, without ever running what the file asks for.

torch archives are read with ``weights_only=True``; objects of other software (a trainer's ``Namespace``, a yacs config)
become inert stand-ins that record name and arguments, so that nothing foreign is imported or called.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
import tarfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from torch import Tensor

from mto_analysis.checkpoints.containers import (
    ARCHIVE,
    LEGACY_TORCH_MAGIC,
    MOST_HEADER_BYTES,
    check_safetensors_header,
    first_bytes,
    first_line,
    holds_safetensors,
    pickle_of_archive,
    refuse_other_content,
)
from mto_analysis.checkpoints.pickles import foreign_names
from mto_analysis.errors import CheckpointError, CheckpointNotFoundError

# First match wins; a file without any of them is a flat dict of tensors (Hugging Face, timm).
_ROOT_KEYS = ("model", "state_dict", "model_state", "module", "student")
_EMA_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema", "model_average")

#: Which of a file's weights: those that were trained, or the average or momentum teacher that followed them.
Weights = Literal["model", "model_ema"]

# What wrappers put in front of names says nothing about the model. Parts of compiled, checkpointed and sharded models
# may stand anywhere in a name, the attribute that held the model only in front of every name.
_WRAPPER_PARTS = re.compile(r"(^|(?<=\.))(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_WRAPPER_PREFIXES = ("module.", "model.", "net.")
_IS_EMA = "mto_analysis.ema"
_CLASS = "mto_analysis.class"
_EMA_PART = re.compile(r"^((?:\w+\.)*?)ema_model\.(module\.)?")

# The pickles of that format: magic number, version, system, the saved object, names of storages.
_LEGACY_PICKLES = 5

# Real settings are some hundred values, real names some 50 letters.
_MOST_SETTINGS = 100_000
_LONGEST_NAME = 500


@dataclass(frozen=True)
class RawCheckpoint:
    """What a checkpoint holds, before anybody decides which model it is.

    Args:
        path: The file or folder that was asked for.
        tensors: The model's state dict, without prefixes of wrappers.
        extras: Other entries of a training dict (``epoch``, ``args``, ``config`` ...) as plain values.
        config: A Hugging Face folder's ``config.json``.
        preprocessor: Its ``preprocessor_config.json``.
        metadata: A safetensors file's own metadata.
        mapped: Whether weights are mapped from the file, which may change, and not read.
    """

    path: Path
    tensors: dict[str, Tensor]
    extras: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    mapped: bool = False

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the weights, over all files of a folder in order; read when it is first asked for."""
        return checkpoint_sha256(self.path)


def read_checkpoint(source: str | Path, *, mmap: bool = False, weights: Weights = "model") -> RawCheckpoint:
    """Read a checkpoint file or folder safely.

    Args:
        source: A torch file (``.pth``, ``.pt``, ``.bin``), a ``.safetensors`` file, or a Hugging Face folder.
        mmap: Map a torch archive instead of reading it: enough to look at names and shapes.
        weights: ``model_ema`` for the moving average (or momentum teacher) that some trainers keep beside the model.

    Raises:
        CheckpointNotFoundError: If nothing is there.
        CheckpointError: If it is not a checkpoint, is damaged, asks for code to be run, or lacks these weights.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights must be one of {', '.join(get_args(Weights))}, got {weights!r}")
    path, ema = Path(source).expanduser(), weights == "model_ema"
    files = weight_files(path)
    tensors: dict[str, Tensor] = {}
    extras: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for file in files:
        start = first_bytes(file)
        if holds_safetensors(file, start):
            more, about = _read_safetensors(file)
            metadata |= about
        else:
            more, extras = _split_root(_read_torch(file, start, mmap=mmap), file, ema=ema)
        tensors |= more
    _check_tensors(tensors, path, sum(file.stat().st_size for file in files))
    config, preprocessor = _read_config(path, "config.json"), _read_config(path, "preprocessor_config.json")
    tensors = _unwrapped(tensors, path, ema=ema and _IS_EMA not in extras)
    return RawCheckpoint(path, tensors, extras, config, preprocessor or {}, metadata, mmap)


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint: the file itself, or those of a Hugging Face folder."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointNotFoundError(f"no checkpoint at {path}")
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (path / stem).is_file():
            return [path / stem]
        index = path / f"{stem}.index.json"
        if index.is_file():
            shards = _read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise CheckpointError(f"{index} has no weight_map; download the folder again")
            # Only names inside the folder: an index may not point elsewhere on the disk.
            files = [path / Path(name).name for name in sorted(set(shards.values()))]
            for file in files:
                if not file.is_file():
                    raise CheckpointError(f"{path} lacks {file.name}, which its index names; download the folder again")
            return files
    raise CheckpointError(f"{path} holds neither model.safetensors nor pytorch_model.bin; give a checkpoint file")


def checkpoint_sha256(source: str | Path) -> str:
    """SHA-256 of the weights, over all files of a folder in order."""
    digest = hashlib.sha256()
    for file in weight_files(Path(source).expanduser()):
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_HEADER_BYTES:
            raise ValueError("too large for settings")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def _read_config(path: Path, name: str) -> dict[str, Any] | None:
    folder = path if path.is_dir() else path.parent
    config = folder / name
    # A lone torch file beside somebody's config.json is not a Hugging Face checkpoint.
    named_so = path.is_dir() or path.name in ("model.safetensors", "pytorch_model.bin")
    return _read_json(config) if named_so and config.is_file() else None


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    check_safetensors_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # as above
        raise CheckpointError(f"{path} is damaged or truncated ({first_line(error)}); download it again") from error


def _read_torch(path: Path, start: bytes, *, mmap: bool) -> Any:
    is_archive = start.startswith(ARCHIVE)
    if not is_archive and (start[: len(LEGACY_TORCH_MAGIC)] != LEGACY_TORCH_MAGIC or tarfile.is_tarfile(path)):
        refuse_other_content(path, start)
    foreign = _foreign_names(path, is_archive=is_archive)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_stand_ins(foreign)):
            warnings.simplefilter("ignore")  # about pickle protocols, which are no matter of the user's
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_archive)
    except Exception as error:  # a damaged pickle can fail in any way; none of them ran anything
        raise CheckpointError(f"{path} is damaged or not a state dict ({first_line(error)})") from error


def _foreign_names(path: Path, *, is_archive: bool) -> list[str]:
    """Names of all objects the file asks for; refuses those that are only there to be called."""
    try:
        if not is_archive:
            with path.open("rb") as file:
                return foreign_names(file, count=_LEGACY_PICKLES)
        return foreign_names(io.BytesIO(pickle_of_archive(path)))
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(path) in str(error) else f"{path} {error}") from error
    except Exception as error:  # see _read_torch
        raise CheckpointError(f"{path} is damaged or not written by torch.save ({first_line(error)})") from error


class Inert:
    """In the place of an object of other software: its name and arguments, and nothing that could be run."""

    def __init__(self, name: str, arguments: tuple[object, ...] = ()) -> None:
        self.name = name
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        """Keep attributes as such, and forget any other state."""
        if isinstance(state, dict) and not self.arguments:
            self.arguments = (state,)


class _StandInType(type):
    """Of stand-ins for foreign classes and functions; calling one as a function calls nothing."""

    def __call__(cls, *args: object, **kwargs: object) -> Inert:
        return Inert(cls.__name__, args)


class _StandIn(metaclass=_StandInType):
    """An instance is an empty mapping that takes items and attributes, and remembers the name of its class.

    torch's unpickler fills only exact ``OrderedDict`` objects with items, so that is what ``__new__`` gives.
    """

    def __new__(cls, *args: object) -> OrderedDict[str, Any]:  # type: ignore[misc]
        instance: OrderedDict[str, Any] = OrderedDict()
        vars(instance)[_CLASS] = Inert(cls.__name__, args)
        return instance


def _stand_ins(names: list[str]) -> list[Any]:
    special: dict[str, Any] = {
        "collections.deque": lambda *_: [],
        "collections.defaultdict": lambda *_: OrderedDict(),
        "copyreg._reconstructor": lambda kind, *_: kind.__new__(kind),
    }
    own = {name: special.get(name) or _StandInType(name, (_StandIn,), {}) for name in names}
    return [(Inert, "mto_analysis.Inert"), *((stand_in, name) for name, stand_in in own.items())]


def _split_root(root: Any, path: Path, *, ema: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict inside what was unpickled, and the entries around it."""
    kind = root if isinstance(root, Inert) else _kind_of(root)
    if kind is not None and not (isinstance(root, dict) and root):
        raise CheckpointError(f"{path} holds an object of {kind.name}, not its weights: save its state_dict()")
    if isinstance(root, Tensor) or not isinstance(root, dict) or not root:
        raise CheckpointError(f"{path} holds a {type(root).__name__}, not a dict of tensors")
    if all(isinstance(value, Tensor) for value in root.values()):
        return _named(root, path), {}
    if (parts := _separate_parts(root, ema=ema)) is not None:
        return parts
    held = [key for key, value in root.items() if _holds_tensors(value)]
    unknown = [key for key in held if key not in _EMA_KEYS]  # the only one there is, whatever its name
    for key in (*(_EMA_KEYS if ema else ()), *_ROOT_KEYS, *(unknown if len(unknown) == 1 else ())):
        if key in held:
            inner = root[key]
            around = {name: value for name, value in root.items() if name not in (key, "optimizer")}
            extras = _plain(around, itertools.count())
            return _named(inner, path), extras | ({_IS_EMA: True} if key in _EMA_KEYS else {})
    entries = ", ".join(ascii(name)[:40] for name in list(root)[:8] if isinstance(name, (str, int)))
    advice = f"; {held[0]} is a moving average: --weights model_ema" if held and held[0] in _EMA_KEYS else ""
    raise CheckpointError(f"{path} holds no state dict under {', '.join(_ROOT_KEYS)}; it has {entries}{advice}")


def _holds_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(each, Tensor) for each in value.values())


def _separate_parts(root: dict[Any, Any], *, ema: bool) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The parts of I-JEPA, which its trainer saves one by one: encoder, its moving average, and predictor."""
    chosen = {"encoder": "target_encoder" if ema else "encoder", "predictor": "predictor"}
    parts = {part: root.get(key) for part, key in chosen.items()}
    if not all(_holds_tensors(part) for part in parts.values()):
        return None
    tensors = {
        f"{part}.{str(name).removeprefix('module.')}": tensor
        for part, content in parts.items()
        for name, tensor in (content or {}).items()
    }
    around = {
        name: value for name, value in root.items() if name not in ("encoder", "predictor", "target_encoder", "opt")
    }
    return tensors, _plain(around, itertools.count()) | ({_IS_EMA: True} if ema else {})


def _named(tensors: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: entry {ascii(name)[:40]} is not a tensor with a name")
    return {name: value.detach() for name, value in tensors.items()}


def _plain(value: Any, seen: Iterator[int], depth: int = 0) -> Any:
    """Settings as plain dicts; a stand-in's items and attributes become one dict. Loops and excess are cut off.

    OmegaConf's containers and their entries are objects, which hold what they stand for as an attribute.
    """
    if (kind := _kind_of(value)) is not None and kind.name.startswith("omegaconf."):
        content = vars(value).get("_content", vars(value).get("_val"))
        if _kind_of(content) is not None:  # no such object holds another one directly
            return None
        if isinstance(content, list):
            return [_plain(item, seen, depth + 1) for item in content if depth < 8 and next(seen) < _MOST_SETTINGS]
        return None if content == "???" else _plain(content, seen, depth)  # three question marks: missing
    if isinstance(value, Inert) and len(value.arguments) == 1 and isinstance(value.arguments[0], dict):
        value = value.arguments[0]  # a mapping of other software, made from a plain one
    if isinstance(value, dict) and depth < 8:
        content = {**vars(value), **value} if isinstance(value, OrderedDict) else value
        return {
            str(name): _plain(item, seen, depth + 1)
            for name, item in content.items()
            if isinstance(name, (str, int)) and name != _CLASS and next(seen) < _MOST_SETTINGS
        }
    return value if isinstance(value, (str, int, float, bool, list, tuple, type(None))) else None


def _kind_of(value: Any) -> Inert | None:
    """The class that a stand-in is for, if it is one."""
    kind = getattr(value, "__dict__", {}).get(_CLASS)
    return kind if isinstance(kind, Inert) else None


def _check_tensors(tensors: Mapping[str, Tensor], path: Path, size: int) -> None:
    """Refuse names that cannot be printed, and tensors whose declared size is not backed by data in the file."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if not name.isprintable() or len(name) > _LONGEST_NAME:
            raise CheckpointError(f"{path} has a tensor name that is no name ({ascii(name)[:40]}); it is damaged")
        dense = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_quantized
        if not dense or tensor.device.type != "cpu" or tensor.is_complex():
            raise CheckpointError(
                f"{path}: {name} is not a plain tensor ({tensor.dtype}, {tensor.layout}, {tensor.device})"
            )
        storage = tensor.untyped_storage()
        size -= storage.nbytes() if storage.data_ptr() not in seen else 0
        seen.add(storage.data_ptr())
        if tensor.numel() * tensor.element_size() > storage.nbytes() or size < 0:
            raise CheckpointError(f"{path}: {name} declares {list(tensor.shape)} but the file holds less data")


def _unwrapped(tensors: dict[str, Tensor], path: Path, *, ema: bool) -> dict[str, Tensor]:
    """Tensors without what wrappers put in front of their names; the model's own, or its moving average."""
    # torch's AveragedModel counts its updates beside the model.
    bare = {_WRAPPER_PARTS.sub("", name): tensor for name, tensor in tensors.items() if name != "n_averaged"}
    while prefix := next((each for each in _WRAPPER_PREFIXES if bare and all(n.startswith(each) for n in bare)), None):
        bare = {name.removeprefix(prefix): tensor for name, tensor in bare.items()}
    if len(bare) < len(tensors.keys() - {"n_averaged"}):
        raise CheckpointError(f"{path} holds tensors twice, under names with and without the prefix of a wrapper")
    average = {_EMA_PART.sub(r"\1", name): each for name, each in bare.items() if _EMA_PART.match(name)}
    if ema and not average:
        raise CheckpointError(f"{path} holds no moving average of the weights (ema_model, {', '.join(_EMA_KEYS)})")
    if average and not ema:
        bare = {name: tensor for name, tensor in bare.items() if not _EMA_PART.match(name)}
        return _unwrapped(bare, path, ema=False)
    return _unwrapped(average, path, ema=False) if average else bare
