"""Stacks in other people's models, found by structure: mask tokens, lists of blocks and positions of one width.

Nothing is decided by class names or imports. A mask token may enter any list of blocks of its width, with any position
of its width: all of these are candidates, and the first forward shows which of them sees tokens that equal a masked
row bit for bit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mto_analysis.taps.stacks import StackSpec

_MASK_TOKEN = re.compile(r"mask\w*(token|embed|vector|query)|(token|embed|vector|query)\w*mask", re.IGNORECASE)
_PREFIX_TOKEN = re.compile(r"(^|_)(cls|class|dist|distillation|reg|register|storage|prefix)s?_?(token|embed)")
_DECODES = re.compile(r"decod|predict|pixel_|feature_")

# More vectors are a table of something else.
_MOST_TOKENS = 16

# Modules that cannot be a block: a list of these is a part of one.
_LAYERS = (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.GELU, nn.ReLU)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, FullyShardedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError("nn.DataParallel copies the model in every step; use DistributedDataParallel")
        if getattr(model, "_use_orig_params", True) is False:
            raise ValueError(
                "FullyShardedDataParallel with use_orig_params=False joins the mask token with other parameters; "
                "pass use_orig_params=True, or use fully_shard"
            )
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def find_stacks(model: nn.Module) -> list[StackSpec]:
    """Candidates for the stacks of a model: each of its mask tokens with each list of blocks that it may enter.

    Frozen copies (teachers) are left out where something else is trained.
    """
    tokens, lists = _mask_tokens(model), _block_lists(model)
    found = [
        (path, lists_path, several, blocks)
        for path, several in tokens.items()
        for lists_path, blocks in lists.items()
        if several[0].shape[-1] in _widths(blocks[0])
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no known structure with masked tokens: {_seen(model, tokens, lists)}; give "
            "stacks=[StackSpec(name, blocks, mask_token=..., position=...)], or taps=[...] instead of blocks"
        )
    _refuse_copies(model, tokens)
    kinds = len({path for path, *_ in found})
    names: dict[str, tuple[str, str]] = {}
    for path, lists_path, *_ in sorted(found, key=lambda each: -_shared(each[0], each[1])):  # the nearest first
        name = _stack_name(path, lists_path, kinds > 1)
        if name in names:
            name = f"{name} {lists_path}" if f"{name} {lists_path}" not in names else f"{name} {lists_path} {path}"
        names[name] = path, lists_path
    named = {pair: name for name, pair in names.items()}
    return [
        StackSpec(
            named[path, lists_path], blocks, several, position=_tables(model, path, several[0].shape[-1], lists_path)
        )
        for path, lists_path, several, blocks in found
    ]


def _mask_tokens(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Learned vectors whose name says that they stand for masked patches, by path; those of one list together."""
    found: dict[str, list[nn.Parameter]] = {}
    known: set[int] = set()
    for path, parameter in model.named_parameters(remove_duplicate=False):
        path = re.sub(r"\.(\d+|weight)$", "", path)  # of a list, or of an embedding
        vectors = parameter.numel() // parameter.shape[-1] if parameter.ndim else 0
        flat = vectors == 1 or (vectors <= _MOST_TOKENS and set(parameter.shape[1:-1]) <= {1})
        named = _MASK_TOKEN.search(path.rpartition(".")[2])
        if named and flat and parameter.is_floating_point() and id(parameter) not in known:
            known.add(id(parameter))
            found.setdefault(path, []).append(parameter)
    trained = {path: tokens for path, tokens in found.items() if any(token.requires_grad for token in tokens)}
    return trained or found


def _block_lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Lists of blocks by path; stages with blocks of their own are one list. Frozen ones only where all are."""
    found: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(path.startswith(f"{p}.") for p in found):
            continue
        # Public code fills chunks of blocks up with nn.Identity, so that their names count all blocks (DINOv2).
        blocks = [each for each in _blocks_of_stages(module) or module if not isinstance(each, nn.Identity)]
        if blocks and all(type(block) is type(blocks[0]) and _is_block(block) for block in blocks):
            found[path] = blocks
    trained = {path: blocks for path, blocks in found.items() if any(_is_trained(block) for block in blocks)}
    return trained or found


def _blocks_of_stages(module: nn.Module) -> list[nn.Module]:
    blocks = []
    for stage in module.children():
        inner = stage if isinstance(stage, (nn.ModuleList, nn.Sequential)) else None
        for name in ("blocks", "layers", "layer"):
            inner = inner or getattr(stage, name, None)
        if not isinstance(inner, (nn.ModuleList, nn.Sequential)):
            return []
        blocks += list(inner)
    return blocks


def _is_block(module: nn.Module) -> bool:
    """Whether a module can be a block: several learned parts, and a forward of its own."""
    parts = [part for part in module.modules() if any(True for _ in part.parameters(recurse=False))]
    return not isinstance(module, (*_LAYERS, nn.ModuleList, nn.ModuleDict)) and len(parts) > 1


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _widths(block: nn.Module) -> set[int]:
    """Widths of tokens that a block can take."""
    found: set[int] = set()
    for part in block.modules():
        shape = getattr(part, "normalized_shape", None)
        if isinstance(shape, (tuple, list)):
            found.add(shape[-1])
        for name in ("in_features", "embed_dim"):
            if isinstance(getattr(part, name, None), int):
                found.add(getattr(part, name))
        if isinstance(weight := getattr(part, "weight", None), Tensor) and weight.ndim == 1:
            found.add(len(weight))
    return found


def _refuse_copies(model: nn.Module, tokens: dict[str, list[nn.Parameter]]) -> None:
    """Mask tokens of two equal modules: a student and a teacher that is not frozen, or two branches."""
    kinds: dict[tuple[type[nn.Module], torch.Size, str], list[str]] = {}
    for path, several in tokens.items():
        owner, _, name = path.rpartition(".")
        kinds.setdefault((type(model.get_submodule(owner)), several[0].shape, name), []).append(path)
    for paths in kinds.values():
        if len(paths) > 1:
            raise ValueError(
                f"{type(model).__name__} has several modules with masked tokens: {', '.join(paths)}; freeze the copies "
                "(requires_grad_(False)), attach to the module that is meant, or give stacks=[StackSpec(...)]"
            )


def _stack_name(token: str, blocks: str, several: bool) -> str:
    """``encoder`` or ``decoder``; the kind in front where a model has several mask tokens."""
    role = "decoder" if _DECODES.search(f"{token}.{blocks}") or "decode" in blocks else "encoder"
    if not several:
        return role
    kind = re.search(r"(pixel|feature)_", f"{token}.{blocks}")
    if kind is None and "decode_blocks" in blocks:  # BootMAE counts its decoders
        return "feature_decoder" if blocks.endswith("_1") else "pixel_decoder"
    return f"{kind[1]}_{role}" if kind else role


def _tables(model: nn.Module, token: str, width: int, blocks: str) -> Callable[[], list[Tensor]]:
    """Candidates for positions of a mask token: tables of its width, the nearest first."""
    places = sorted(
        (path for path, tensor in _positions(model) if _is_position(tensor, width)),
        key=lambda path: -max(_shared(path, token), _shared(path, blocks)),
    )
    # Read anew in each forward, as sharded parameters are replaced there.
    return lambda: [_position_rows(_at(model, path), width) for path in places]


def _positions(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    plain = (  # fixed tables that are neither parameters nor buffers (VideoMAE)
        (f"{path}.{name}".lstrip("."), value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    )
    for named in (model.named_parameters(), model.named_buffers(), plain):
        yield from ((path, tensor) for path, tensor in named if "pos" in path.lower() and tensor.is_floating_point())


def _is_position(tensor: Tensor, width: int) -> bool:
    """Whether a tensor has several rows of a width: a table, or a grid with its channels first or last."""
    grid = tensor.ndim == 4 and tensor.shape[:2] == (1, width)
    return tensor.ndim > 1 and tensor.numel() > width and (tensor.shape[-1] == width or grid)


def _position_rows(tensor: Tensor, width: int) -> Tensor:
    """Positions as rows ``num_positions dim``."""
    return tensor.reshape(-1, width) if tensor.shape[-1] == width else tensor[0].flatten(1).mT


def _at(model: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)


def _shared(path: str, other: str) -> int:
    """How many parts two paths share from the front, then how many words of their names."""
    parts, others = path.split("."), other.split(".")
    depth = next(
        (i for i, (a, b) in enumerate(zip(parts, others, strict=False)) if a != b), min(len(parts), len(others))
    )
    return 16 * depth + len(set(re.split(r"[._]", path)) & set(re.split(r"[._]", other)))


def path_of(model: nn.Module, wanted: object) -> str:
    """Path of a module, parameter or buffer inside a model, or ``"?"``."""
    for named in (model.named_modules, model.named_parameters, model.named_buffers):
        for path, found in named(remove_duplicate=False):
            if found is wanted:
                return path or type(model).__name__
    return "?"


def holders_of(model: nn.Module, wanted: Sequence[object]) -> list[nn.Module]:
    """The modules in whose forward some parameters and modules are used: their owners and all around them."""
    paths = [path_of(model, each) for each in wanted]
    around = {""}
    for path in paths:
        parts = path.split(".")[:-1]
        around |= {".".join(parts[:count]) for count in range(len(parts) + 1)}
    modules = [model.get_submodule(path) for path in sorted(around)]
    return [module for module in modules if not isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict))]


def hinted_prefix(model: nn.Module, near: Sequence[object]) -> int | None:
    """How many prefix tokens a model says to have: its own number, else its class and register tokens.

    Looked for near the mask token or the blocks first, then around them; ``None`` where nothing says so.
    """
    for holder in reversed(holders_of(model, near)):
        for module in holder.modules():
            said = getattr(module, "num_prefix_tokens", None)
            if isinstance(said, int) and not isinstance(said, bool):
                return said
        count = 0
        for path, parameter in holder.named_parameters():
            if _PREFIX_TOKEN.search(path.rpartition(".")[2]):
                count += parameter.numel() // parameter.shape[-1]
        if count:
            return count
    return None


def hinted_patches(model: nn.Module) -> set[int]:
    """Numbers of patches that a model says to have: ``num_patches``, or the product of ``grid_size``."""
    found = {getattr(module, "num_patches", None) for module in model.modules()}
    return {each for each in found if isinstance(each, int)} | {math.prod(grid) for grid in hinted_grids(model)}


class Sizes(NamedTuple):
    """Of images and patches, as a configuration or a patch embedding says: rows and columns in pixels, and frames."""

    image: tuple[int, int]
    patch: tuple[int, int]
    frames: int = 1
    tubelet: int = 1

    @property
    def grid(self) -> tuple[int, ...]:
        """Rows and columns of patches, with those in time in front for videos."""
        rows, columns = (side // cell for side, cell in zip(self.image, self.patch, strict=True))
        return (self.frames // self.tubelet, rows, columns) if self.frames > 1 else (rows, columns)


def sizes_of(place: object) -> Sizes | None:
    """What a configuration or a patch embedding says, under the usual names."""

    def said(*names: str) -> Any:
        return next((value for name in names if (value := getattr(place, name, None)) is not None), None)

    found = said("image_size", "img_size", "crop_size"), said("patch_size")
    sides = [(each, each) if isinstance(each, int) else each for each in found]
    if not all(isinstance(each, (tuple, list)) and all(isinstance(side, int) for side in each) for each in sides):
        return None
    frames, tubelet = said("num_frames", "frames_per_clip"), said("tubelet_size")
    times = (frames, tubelet) if isinstance(frames, int) and isinstance(tubelet, int) and tubelet > 0 else (1, 1)
    (top, side), (cell, width) = (tuple(each)[-2:] for each in sides)
    return Sizes((top, side), (cell, width), *times) if min(cell, width) > 0 else None


def hinted_grids(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Grids of patches that a model says to have: by its ``config``, and ``grid_size`` of its modules."""
    if (said := sizes_of(getattr(model, "config", None))) is not None:
        yield said.grid
    for module in model.modules():
        grid = getattr(module, "grid_size", None)
        if isinstance(grid, (tuple, list)) and all(isinstance(side, int) for side in grid):
            yield tuple(grid)


def _seen(model: nn.Module, tokens: dict[str, list[nn.Parameter]], lists: dict[str, list[nn.Module]]) -> str:
    """What a search saw, for its refusal."""
    found = [f"mask token at {path} (width {several[0].shape[-1]})" for path, several in tokens.items()]
    found += [
        f"{path} {list(each.shape)}, which is no vector with its width last: maps with channels first are not followed"
        for path, each in model.named_parameters()
        if not tokens and _MASK_TOKEN.search(path.rpartition(".")[2]) and each.shape[-1:] == (1,)
    ]
    blocks = [f"{path} ({len(blocks)})" for path, blocks in lists.items()]
    others = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if blocks:
        found.append(f"block lists: {', '.join(blocks)}")
    elif others:
        found.append(f"lists whose elements are no blocks: {', '.join(others[:5])}")
    return "; ".join(["no mask token"] * (not tokens) + found + ["no list of blocks"] * (not blocks))
