"""From a file or folder to tensors and plain facts, without ever running what the file asks for.

torch archives are read with ``weights_only=True``; objects of other software (a trainer's ``Namespace``, a yacs config)
become inert stand-ins, so that nothing foreign is imported or called.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import tarfile
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mto_analysis.errors import CheckpointError, CheckpointNotFoundError

__all__ = ["RawCheckpoint", "checkpoint_sha256", "read_checkpoint", "weight_files"]

# First match wins; a file without any of them is a flat dict of tensors (Hugging Face, timm).
_ROOT_KEYS = ("model", "state_dict", "model_state", "module", "student")

_LEGACY_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

# Standard-library objects that trainers really save. Anything else of the standard library in a checkpoint (os.system,
# builtins.eval, subprocess.Popen ...) is there to be called, and the file is refused rather than read around.
_HARMLESS_STDLIB = {
    "argparse", "collections", "copyreg", "datetime", "decimal", "enum", "fractions", "functools", "logging", "pathlib",
    "random", "types", "typing", "uuid", "zoneinfo",
}  # fmt: skip
_HARMLESS_BUILTINS = {"bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
                      "slice", "str", "tuple"}  # fmt: skip

# Read without their names being known beforehand: the old torch format cannot list what it holds.
_KNOWN_FOREIGN = (
    "argparse.Namespace",
    "yacs.config.CfgNode",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


@dataclass(frozen=True)
class RawCheckpoint:
    """What a checkpoint holds, before anybody decides which model it is.

    Args:
        path: The file or folder that was asked for.
        tensors: The model's state dict, wrapping prefixes of data-parallel training stripped.
        extras: Other entries of a training dict (``epoch``, ``args``, ``config`` ...) as plain values.
        config: A Hugging Face folder's ``config.json``.
        metadata: A safetensors file's own metadata.
    """

    path: Path
    tensors: dict[str, Tensor]
    extras: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_checkpoint(source: str | Path, *, mmap: bool = False) -> RawCheckpoint:
    """Read a checkpoint file or folder safely.

    Args:
        source: A torch file (``.pth``, ``.pt``, ``.bin``), a ``.safetensors`` file, or a Hugging Face folder.
        mmap: Map a torch archive instead of reading it: enough to look at names and shapes.

    Raises:
        CheckpointNotFoundError: If nothing is there.
        CheckpointError: If it is not a checkpoint, is damaged, or asks for code to be run.
    """
    path = Path(source).expanduser()
    files = weight_files(path)
    tensors: dict[str, Tensor] = {}
    extras: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if file.suffix == ".safetensors":
            more, about = _read_safetensors(file)
            metadata |= about
        else:
            more, extras = _split_root(_read_torch(file, mmap=mmap), file)
        tensors |= more
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, path)
    return RawCheckpoint(path, _strip_prefixes(tensors), extras, _read_config(path), metadata)


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
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def _read_config(path: Path) -> dict[str, Any] | None:
    folder = path if path.is_dir() else path.parent
    config = folder / "config.json"
    # A lone torch file beside somebody's config.json is not a Hugging Face checkpoint.
    named_so = path.is_dir() or path.name in ("model.safetensors", "pytorch_model.bin")
    return _read_json(config) if named_so and config.is_file() else None


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # the library raises its own type, and plain ones for odd dtypes
        _refuse_other_content(path)
        raise CheckpointError(f"{path} is damaged or truncated ({error}); download it again") from error


def _read_torch(path: Path, *, mmap: bool) -> Any:
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_TORCH_MAGIC))
    is_archive = start.startswith(b"PK\x03\x04")
    if not is_archive and (start != _LEGACY_TORCH_MAGIC or tarfile.is_tarfile(path)):
        _refuse_other_content(path)
        raise CheckpointError(
            f"{path} is not a torch or safetensors file (it starts with {start[:8]!r}); "
            "a checkpoint ends in .pth, .pt, .bin or .safetensors"
        )
    foreign = _foreign_objects(path) if is_archive else list(_KNOWN_FOREIGN)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_stand_ins(foreign)):
            warnings.simplefilter("ignore")  # about pickle protocols, which are no matter of the user's
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_archive)
    except Exception as error:  # a damaged pickle can fail in any way; none of them ran anything
        raise CheckpointError(f"{path} is damaged or not a state dict ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]


def _refuse_other_content(path: Path) -> None:
    """Name what people often have instead of weights."""
    with path.open("rb") as file:
        start = file.read(512).lstrip()
    if not start:
        raise CheckpointError(f"{path} is empty; download it again")
    if start[:1] == b"<":
        raise CheckpointError(f"{path} is a web page, not weights: the download failed; fetch the file itself")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not weights; run `git lfs pull`")
    with contextlib.suppress(UnicodeDecodeError):
        if start[:256].decode("ascii").isprintable() or b"\n" in start[:256]:
            raise CheckpointError(f"{path} is a text file, not weights")


def _foreign_objects(path: Path) -> list[str]:
    """Names of objects beyond tensors that an archive asks for; refuses those that are only there to be called."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); download it again") from error
    # torch stores its entries uncompressed, so together they cannot be larger than the file.
    if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > size:
        raise CheckpointError(f"{path} declares more data than it holds; it was not written by torch.save")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # see _read_torch
        raise CheckpointError(f"{path} is damaged or not written by torch.save ({_first_line(error)})") from error
    for name in names:
        # torch.save writes modules under their names in Python 2: subprocess.Popen as commands.Popen.
        module, _, attribute = name.rpartition(".")
        module, attribute = NAME_MAPPING.get((module, attribute), (IMPORT_MAPPING.get(module, module), attribute))
        module = module.split(".")[0]
        harmless = (
            attribute in _HARMLESS_BUILTINS
            if module == "builtins"
            else module in _HARMLESS_STDLIB or module not in sys.stdlib_module_names
        )
        if not harmless or module in ("nt", "posix"):
            raise CheckpointError(
                f"{path} asks for {name} to be called, which no checkpoint needs: it may be an attack; nothing was run"
            )
    return names


class _Opaque:
    """What a foreign function would have returned: nothing to be read from it."""

    def __setstate__(self, state: object) -> None:
        """Forget the state."""


class _StandInType(type):
    def __call__(cls, *args: object, **kwargs: object) -> _Opaque:
        return _Opaque()


class _StandIn(metaclass=_StandInType):
    """In the place of a foreign class: an instance is an empty mapping that takes items and attributes.

    torch's unpickler fills only exact ``OrderedDict`` objects with items, so that is what ``__new__`` gives; called as
    a function, it gives an opaque object.
    """

    def __new__(cls, *args: object) -> OrderedDict[str, Any]:  # type: ignore[misc]
        return OrderedDict()


def _stand_ins(names: list[str]) -> list[Any]:
    special: dict[str, Any] = {"collections.deque": lambda *_: [], "collections.defaultdict": lambda *_: OrderedDict()}
    return [(_Opaque, "mto_analysis.Opaque"), *((special.get(name, _StandIn), name) for name in names)]


def _split_root(root: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict inside what was unpickled, and the entries around it."""
    if isinstance(root, Tensor) or not isinstance(root, dict) or not root:
        raise CheckpointError(f"{path} holds a {type(root).__name__}, not a dict of tensors")
    if all(isinstance(value, Tensor) for value in root.values()):
        return _named(root, path), {}
    for key in _ROOT_KEYS:
        inner = root.get(key)
        if isinstance(inner, dict) and any(isinstance(value, Tensor) for value in inner.values()):
            around = {str(name): _plain(value) for name, value in root.items() if name not in (key, "optimizer")}
            return _named(inner, path), around
    raise CheckpointError(
        f"{path} holds no state dict under {', '.join(_ROOT_KEYS)}; it has {', '.join(map(str, list(root)[:8]))}"
    )


def _named(tensors: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: entry {name!r} is not a tensor with a name")
    return {name: value.detach() for name, value in tensors.items()}


def _plain(value: Any, depth: int = 0) -> Any:
    """Settings as plain dicts; a stand-in's items and attributes become one dict."""
    if isinstance(value, dict) and depth < 8:
        content = {**vars(value), **value} if isinstance(value, OrderedDict) else value
        return {str(name): _plain(item, depth + 1) for name, item in content.items()}
    return value if isinstance(value, (str, int, float, bool, list, tuple, type(None))) else None


def _check_tensor(name: str, tensor: Tensor, path: Path) -> None:
    """Refuse tensors whose declared size is not backed by data."""
    dense = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_quantized
    if not dense or tensor.device.type != "cpu" or tensor.is_complex():
        raise CheckpointError(
            f"{path}: {name} is not a plain tensor ({tensor.dtype}, {tensor.layout}, {tensor.device})"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: {name} declares {list(tensor.shape)} but the file holds less data")


def _strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove what data-parallel wrappers put in front of every name, and of every name only."""
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors
