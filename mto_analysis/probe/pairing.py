"""Fair comparisons: masks that leave equally many patches visible, and the paired difference of two checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from mto_analysis.errors import DataError
from mto_analysis.masks import MaskRule
from mto_analysis.models import ModelInfo
from mto_analysis.probe.engine import mean_and_interval


def _unit(info: ModelInfo) -> int:
    """Patches that are masked or left visible together."""
    rule = info.mask_rule
    if rule.kind == "blockwise":
        raise ValueError(
            f"the masks of {info.family} differ in their number of visible patches, so none can be matched"
        )
    times = info.frames // info.tubelet  # of a video, all masked alike
    return times * ((rule.unit // info.patch_size) ** 2 if rule.kind == "block" else 1)


def _native(info: ModelInfo) -> int:
    unit = _unit(info)
    if info.mask_rule.kind in ("random", "topped_up"):
        return int(info.num_patches // unit * (1 - info.mask_rule.ratio)) * unit
    units = info.num_patches // unit
    return (units - math.ceil(units * info.mask_rule.ratio)) * unit


def common_num_visible(infos: Sequence[ModelInfo]) -> int:
    """The largest number of visible patches, up to the smallest native one, that the masks of all models can leave.

    Example:
        >>> mae = ModelInfo("mae", "decoder", 224, 16, MaskRule("random", 0.75, 16))
        >>> simmim = ModelInfo("simmim_vit", "inpainting", 224, 16, MaskRule("block", 0.6, 32))
        >>> common_num_visible([mae, simmim])  # 49 and 76 natively; SimMIM's come in fours
        48
    """
    step = math.lcm(*(_unit(info) for info in infos))
    number = min(_native(info) for info in infos) // step * step
    if number < 1:
        raise ValueError("no number of visible patches fits the mask units of all models; leave --match-visible out")
    return number


def rule_leaving(info: ModelInfo, num_visible: int) -> MaskRule:
    """The model's own mask rule, with the ratio that leaves so many patches visible.

    Example:
        >>> from mto_analysis.masks import mask_keys
        >>> info = ModelInfo("mae", "decoder", 32, 4, MaskRule("random", 0.75, 4))
        >>> rule_leaving(info, 24).sample(mask_keys(["a"]), info.grid, info.patch_size).sum()
        tensor(40)
    """
    unit = _unit(info)
    if not 0 < num_visible < info.num_patches or num_visible % unit:
        raise ValueError(f"masks in units of {unit} patches cannot leave {num_visible} of {info.num_patches} visible")
    units = info.num_patches // unit
    # Half a unit below where the next one would be masked: both rules round the number of masked units up.
    return replace(info.mask_rule, ratio=(units - num_visible // unit - 0.5) / units)


def check_stacks(stacks: Mapping[str, Iterable[str]]) -> None:
    """Whether layer depths of models mean the same.

    Args:
        stacks: The stacks of each model that hold masked tokens, by its name.
    """
    words = {name: ", ".join(each) for name, each in stacks.items()}
    if len({frozenset(each.split(", ")) for each in words.values() if each}) > 1:
        found = " and ".join(f"in {each} of {name}" for name, each in words.items())
        raise DataError(f"masked tokens are {found}, whose layer depths do not correspond; leave --difference out")


def paired_difference(per_image: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Second minus first, image by image: mean and 95 % interval of H and of H / log(num_visible).

    Layer depths that both have are compared, stack by stack. The interval is that of the pairs, far narrower
    than the two models' own: images on which H is high are high in both.
    """
    frame = per_image.assign(
        normalized=per_image["heterogeneity"] / np.log(np.maximum(per_image["num_visible"], 2)),
    )
    sides = []
    for model in (first, second):
        mine = frame[frame["model"] == model]
        columns = ["heterogeneity", "normalized", "num_visible"]
        means = mine.groupby(["stack", "layer_depth", "image"], sort=False)[columns].mean().reset_index()
        sides.append(means)
    check_stacks({name: side["stack"].unique() for name, side in zip((first, second), sides, strict=True)})
    both = sides[0].merge(sides[1], on=["stack", "layer_depth", "image"], suffixes=("_first", "_second"))
    if both.empty:
        raise DataError(f"{first} and {second} were measured on no common image")
    difference = pd.DataFrame(
        {
            "stack": both["stack"],
            "layer_depth": both["layer_depth"],
            "image": both["image"],
            "difference": both["heterogeneity_second"] - both["heterogeneity_first"],
            "normalized_difference": both["normalized_second"] - both["normalized_first"],
            "num_visible": both["num_visible_first"],
            "other": both["num_visible_second"],
        }
    )
    table = mean_and_interval(difference, ["stack", "layer_depth"], ["difference", "normalized_difference"])
    table = table.rename(columns={"num_visible": "num_visible_first"})
    other = difference.groupby(["stack", "layer_depth"], sort=False)["other"].mean()
    table["num_visible_second"] = other.to_numpy()
    table.insert(0, "second", second)
    table.insert(0, "first", first)
    return table
