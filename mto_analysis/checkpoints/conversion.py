"""What all converters share: what the user gives, renaming, fusing query/key/value, shapes, strict loading."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mto_analysis.errors import CheckpointError, HeadCountError, OptionNeededError
from mto_analysis.models import MaskedImageModel, ModelInfo
from mto_analysis.models.interface import HEADS_ASSUMED, ImageSize

#: Attention heads of published widths, where no shape tells (formats differ in name only): width -> heads.
ENCODER_HEADS = {768: 12, 1024: 16, 1280: 16}
MAE_DECODER_HEADS = {512: 16}

_LISTED = 6

#: Ends of the names of mask tokens.
MASK_TOKENS = ("mask_token", "mask_tokens", "masked_embed")


@dataclass(frozen=True)
class Given:
    """What the user gives, for files that do not hold it.

    Args:
        num_heads: Attention heads of the encoder.
        decoder_num_heads: Attention heads of the decoder.
        image_size: Side of the images in pixels, or height and width.
        mask_ratio: Fraction masked.
    """

    num_heads: int | None = None
    decoder_num_heads: int | None = None
    image_size: ImageSize | None = None
    mask_ratio: float | None = None
    #: Where each number that was chosen comes from: ``file``, ``given`` or ``published``.
    origins: dict[str, str] = field(default_factory=dict, compare=False)

    def choose(
        self,
        option: str,
        width: int,
        *,
        stated: object = None,
        published: Mapping[int, int] | None = None,
        fitting: Sequence[int] = (1,),
    ) -> int:
        """The number of heads: what the file states, else what the user gave, else what is published for the width.

        Args:
            option: ``num_heads`` or ``decoder_num_heads``.
            width: Channels that the heads share.
            stated: What the file itself says: a number, or a list of one for each block.
            published: Heads by width of the family's published files.
            fitting: Numbers that fit the file's shapes, where not all that divide the width do.
        """
        given: int | None = getattr(self, option)
        flag = f"--{option.replace('_', '-')}"
        known = one_count(stated)
        if stated is not None and known is None and given is None:
            raise OptionNeededError(
                f"the file states {option}={stated!r}, only one number for all blocks is read; "
                f"give {flag} if they have the same one",
                option,
                fitting[0],
            )
        if known is not None and given is not None and given != known:
            raise CheckpointError(f"{option}={given} contradicts the file, which has {known} heads; leave {flag} out")
        heads = known or given or (published or {}).get(width)
        if heads is None:
            raise HeadCountError(
                f"the number of attention heads is not in the file and not published for width {width}; "
                f"give it as {option}=... ({flag} on the command line)",
                option,
                fitting[0],
            )
        if heads < 1 or width % heads:
            raise CheckpointError(f"{option}={heads} does not divide the width {width}")
        self.origins.setdefault(option, "file" if known else "given" if given else "published")
        return heads

    @property
    def assumed_heads(self) -> tuple[str, ...]:
        """What is assumed of head counts, in words."""
        return tuple(HEADS_ASSUMED[name] for name, origin in self.origins.items() if origin == "published")

    @property
    def unsettled_heads(self) -> tuple[str, ...]:
        """The head counts that the file does not state."""
        return tuple(name for name in HEADS_ASSUMED if self.origins.get(name, "file") != "file")


@dataclass
class StateDict:
    """Tensors on their way from a file's names to ours; remembers what each was called in the file.

    Args:
        tensors: By the name they have now.
        origin: The name in the file for each name now.
        dropped: Names in the file that were left out on purpose.
    """

    tensors: dict[str, Tensor]
    origin: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """At first every tensor has the name it has in the file."""
        self.origin = self.origin or {name: name for name in self.tensors}

    def drop(self, *patterns: str) -> None:
        """Leave out tensors whose whole name matches one of the patterns."""
        for name in [name for name in self.tensors if any(re.fullmatch(pattern, name) for pattern in patterns)]:
            del self.tensors[name]
            self.dropped.append(self.origin.pop(name))

    def rename(self, *rules: tuple[str, str]) -> None:
        """Apply regular expressions in order to every name."""
        renamed: dict[str, Tensor] = {}
        origin: dict[str, str] = {}
        for name, tensor in self.tensors.items():
            new = name
            for pattern, replacement in rules:
                new = re.sub(pattern, replacement, new)
            if new in renamed:
                raise CheckpointError(f"{self.origin[name]} and {origin[new]} are the same tensor under two names")
            renamed[new], origin[new] = tensor, self.origin[name]
        self.tensors, self.origin = renamed, origin

    def fuse_qkv(self, *prefixes: str) -> None:
        """Join query, key and value: from ``X.q``, ``X.k``, ``X.v``, or biases ``X.q_bias``, ``X.v_bias`` to ``X.qkv``.

        A key bias that the file does not have is zero.

        Args:
            prefixes: Of the names to look at; all by default.
        """
        for name in [name for name in self.tensors if re.search(r"\.(q\.(weight|bias)|q_bias)$", name)]:
            if prefixes and not name.startswith(prefixes):
                continue
            stem, _, last = name.rpartition(".")
            key_name: str | None = None
            if last == "q_bias":
                value_name, fused = f"{stem}.v_bias", f"{stem}.qkv.bias"
            else:
                stem = stem.rpartition(".")[0]
                key_name, value_name, fused = f"{stem}.k.{last}", f"{stem}.v.{last}", f"{stem}.qkv.{last}"
            origin = self.origin[name]
            query, value = self.take(name), self.take(value_name)
            if key_name is None or (last == "bias" and key_name not in self.tensors):
                key = torch.zeros_like(query)
            else:
                key = self.take(key_name)
            if 0 in (query.ndim, key.ndim, value.ndim) or not query.shape[1:] == key.shape[1:] == value.shape[1:]:
                raise CheckpointError(f"query, key and value of {origin} have different widths")
            self.tensors[fused], self.origin[fused] = torch.cat([query, key, value]), origin

    def split_qkv(self, *prefixes: str) -> None:
        """Take query, key and value apart: the opposite of :meth:`fuse_qkv`, also for ``X.kv``.

        Args:
            prefixes: Of the names to look at.
        """
        for name in [name for name in self.tensors if name.startswith(prefixes)]:
            stem, _, last = name.rpartition(".")
            stem, _, fused = stem.rpartition(".") if last in ("weight", "bias") else (stem, "", last)
            origin = self.origin[name]
            if fused in ("qkv", "kv"):
                tensor = self.take(name)
                if tensor.ndim == 0:
                    raise CheckpointError(f"{origin} is a single number, not a matrix")
                pieces = tensor.chunk(len(fused))
                self.put({f"{stem}.{part}.{last}": piece for part, piece in zip(fused, pieces, strict=False)}, origin)
            elif fused in ("q_bias", "v_bias"):
                bias = self.take(name)
                self.put({f"{stem}.{fused[0]}.bias": bias}, origin)
                if fused == "q_bias":  # a key bias would shift every logit of a query alike
                    self.put({f"{stem}.k.bias": torch.zeros_like(bias)}, origin)

    def put(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Add tensors that were made from one of the file."""
        for name, tensor in tensors.items():
            if name in self.tensors:
                raise CheckpointError(f"{origin} and {self.origin[name]} are the same tensor under two names")
            self.tensors[name], self.origin[name] = tensor, origin

    def take(self, name: str) -> Tensor:
        """Remove and return a tensor."""
        if name not in self.tensors:
            raise CheckpointError(f"the file lacks {name}")
        self.origin.pop(name)
        return self.tensors.pop(name)

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """Shape of a tensor that the architecture is read from."""
        if name not in self.tensors:
            raise CheckpointError(f"the file lacks {name}")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != ndim or 0 in shape:
            raise CheckpointError(f"{self.origin[name]} must have {ndim} axes, none empty, got {list(shape)}")
        return shape


@dataclass(frozen=True)
class Conversion:
    """A model as a file describes it.

    Args:
        make: Builds the model (class of the family).
        config: Its architecture.
        info: Metadata for the user.
        state: Tensors under the model's names.
        loaded: Whether ``make`` gives a model that has its weights already, as another library loads them.
    """

    make: Callable[[Any, ModelInfo], MaskedImageModel]
    config: Any
    info: ModelInfo
    state: StateDict
    loaded: bool = False


def one_count(value: object) -> int | None:
    """A positive whole number, or the one that a list repeats for each block; ``None`` for anything else.

    Example:
        >>> one_count(12), one_count([6, 6]), one_count([3, 6])
        (12, 6, None)
    """
    if isinstance(value, (list, tuple)):
        value = value[0] if len({*map(repr, value)}) == 1 else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def block_numbers(names: Iterable[str], prefix: str) -> int:
    """Number of blocks ``prefix0``, ``prefix1``, ...

    Example:
        >>> block_numbers(["blocks.0.norm1.weight", "blocks.1.norm1.weight"], "blocks.")
        2
    """
    numbers = {
        int(match[1]) for name in names if (match := re.match(rf"{re.escape(prefix)}(\d{{1,4}})\.", name)) is not None
    }
    if numbers != set(range(len(numbers))) or not numbers:
        raise CheckpointError(
            f"the file's {prefix}N are not numbered from 0 without a gap: {sorted(numbers)[:_LISTED]}"
        )
    return len(numbers)


def build(conversion: Conversion, *, materialize: bool = True, copy: bool = False) -> MaskedImageModel:
    """Build the model and load its weights strictly, in float32, on the CPU, in eval mode.

    Args:
        conversion: From a family's converter.
        materialize: Without it only names and shapes are checked, and the model keeps no weights.
        copy: Copy weights that are float32 already, as they are mapped from a file that may change.
    """
    state = conversion.state
    try:
        with torch.device("cpu" if conversion.loaded else "meta"):
            model = conversion.make(conversion.config, conversion.info)
    except (ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"the file describes no working {conversion.info.family} model: {error}") from error
    if conversion.loaded:
        check_finite(state)
        return model.eval()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _add_zero_biases(state, expected)
    problems = []
    if missing := [name for name in expected if name not in state.tensors]:
        problems.append(f"missing: {some_names(missing)}")
    if unknown := [state.origin[name] for name in state.tensors if name not in expected]:
        problems.append(f"unknown: {some_names(unknown)}")
    for name, shape in expected.items():
        if name in state.tensors and tuple(state.tensors[name].shape) != shape:
            have = list(state.tensors[name].shape)
            problems.append(f"wrong shape: {state.origin[name]} is {have}, must be {list(shape)}")
        elif name in state.tensors and not state.tensors[name].is_floating_point():
            problems.append(f"wrong type: {state.origin[name]} is {state.tensors[name].dtype}, must be floating point")
    if problems:
        raise CheckpointError(
            f"the file is not a whole {conversion.info.family} model; {'; '.join(problems[:_LISTED])}"
        )
    if not materialize:
        return model
    weights = {name: state.tensors[name].to(torch.float32, copy=copy).contiguous() for name in expected}
    check_finite(state)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.load_state_dict(weights, strict=True, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
    return model.eval()


def _add_zero_biases(state: StateDict, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Zeros for the biases of query, key and value, where a stack of blocks has none at all (``qkv_bias=False``)."""
    stacks: dict[str, list[str]] = {}
    for name in expected:
        if re.search(r"\.(qkv|q|k|v)\.bias$", name):
            stacks.setdefault(name.partition(".")[0], []).append(name)
    for names in stacks.values():
        if not any(name in state.tensors for name in names):
            for name in names:
                state.put({name: torch.zeros(expected[name])}, f"{name} (absent, so zero)")


def zero_biases(names: Iterable[str]) -> tuple[str, ...]:
    """What is said where a stack of blocks has no biases of query, key and value.

    Example:
        >>> zero_biases(["blocks.0.attn.qkv.weight", "decoder_blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"])
        ('biases of query, key and value are zero in decoder_blocks: the file has none',)
    """
    found = [match for name in names if (match := re.match(r"(\w+)\..*\bq(?:kv)?\.(weight|bias)$", name))]
    stacks = {match[1] for match in found} - {match[1] for match in found if match[2] == "bias"}
    words = "biases of query, key and value are zero in {}: the file has none"
    return (words.format(", ".join(sorted(stacks))),) if stacks else ()


def untrained_tokens(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What is said where a mask token is all zeros, as before training.

    Example:
        >>> untrained_tokens({"mask_token": torch.ones(1, 1, 4)})
        ()
    """
    zero = [name for name, each in tensors.items() if name.endswith(MASK_TOKENS) and not bool(each.count_nonzero())]
    words = (
        "a mask token that is all zeros ({}) is of use; it was probably never trained, so the curves "
        "say how visible tokens fill empty ones, not what the model learned of masks"
    )
    return (words.format(zero[0]),) if zero else ()


def check_finite(state: StateDict) -> None:
    """Refuse weights that are not numbers."""
    for name, tensor in state.tensors.items():
        # A float64 sum of what is stored in 32 bits cannot overflow; it needs no mask as large as the tensor.
        if tensor.is_floating_point() and not math.isfinite(tensor.sum(dtype=torch.float64).item()):
            raise CheckpointError(f"{state.origin[name]} holds values that are not finite; the file is damaged")


def some_names(names: Sequence[str], most: int = _LISTED) -> str:
    """The first names, and how many more there are.

    Example:
        >>> some_names(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
