"""Equal numbers of visible patches, the paired difference of two checkpoints, and the three properties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner
from watched_models import batch_of, small_mae, small_simmim

from mto_analysis.checkpoints import LoadOptions
from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_IMAGES
from mto_analysis.errors import DataError, OptionNeededError
from mto_analysis.images import open_images
from mto_analysis.masks import MaskRule, mask_keys
from mto_analysis.models import ModelInfo
from mto_analysis.probe import masks_from_rule, probe
from mto_analysis.probe.pairing import common_num_visible, paired_difference, rule_leaving
from mto_analysis.probe.properties import PropertyMeasure
from mto_analysis.probe.request import Request, Settings
from mto_analyze import app

GOLDEN = Path(__file__).parent / "golden"
MAE_B = ModelInfo("mae", "decoder", 224, 16, MaskRule("random", 0.75, 16))
SIMMIM_B = ModelInfo("simmim_vit", "inpainting", 224, 16, MaskRule("block", 0.6, 32))


@pytest.mark.parametrize("info", [MAE_B, SIMMIM_B])
@pytest.mark.parametrize("num_visible", [4, 48, 76, 192])
def test_rule_leaving__leaves_exactly_so_many_visible(info: ModelInfo, num_visible: int) -> None:
    mask = rule_leaving(info, num_visible).sample(mask_keys(["a", "b"]), info.grid, info.patch_size)
    assert (~mask).sum(dim=1).tolist() == [num_visible] * 2


def test_rule_leaving__numbers_between_units_and_ragged_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="units of 4 patches cannot leave 49"):
        rule_leaving(SIMMIM_B, 49)
    with pytest.raises(ValueError, match="none can be matched"):
        common_num_visible([MAE_B, ModelInfo("beit", "inpainting", 224, 16, MaskRule("blockwise", 0.4, 16))])
    assert common_num_visible([SIMMIM_B]) == 76
    with pytest.raises(ValueError, match="match_visible decides"):
        Settings(match_visible=True, mask_ratio=0.5)


def test_request__options_of_one_file_among_several(tmp_path: Path) -> None:
    stored = torch.load(GOLDEN / "mae" / "checkpoint.pth", weights_only=True)
    for name, args in {"a": {"num_heads": [2, 4], "mask_ratio": [0.5, 0.9]}, "b": {"num_heads": 4}}.items():
        torch.save({"model": stored.get("model", stored), "args": args}, tmp_path / name)
    images, matched = open_images(DEMO_IMAGES), Settings(limit=2, match_visible=True)
    files = [tmp_path / "a", tmp_path / "b"]
    heads: dict[str, Any] = {"num_heads": 4, "decoder_num_heads": 2}
    with pytest.raises(OptionNeededError, match=r"mask_ratio of .* give --mask-ratio"):
        list(Request(files, images, matched, loading=LoadOptions(**heads)).models([]))
    request = Request(files, images, matched, loading=LoadOptions(**heads, mask_ratio=0.9))
    assert [each.metadata["mask_rule"]["ratio"] for each in request.models([])] == [pytest.approx(57.5 / 64)] * 2
    with pytest.raises(ValueError, match="no file needs a ratio; leave mask_ratio out"):
        list(Request(files[1:], images, matched, loading=LoadOptions(**heads, mask_ratio=0.9)).models([]))
    with pytest.raises(OptionNeededError, match=r"num_heads=\[2, 4\]"):
        list(Request(files, images, Settings(limit=2, mask_ratio=0.5)).models([]))


def test_paired_difference__is_that_of_the_pairs_and_narrower_than_both() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(2, 0.5, 200)
    rows = [
        {"model": model, "stack": "encoder", "layer_depth": 0, "image": str(image), "mask": 0, "num_visible": 16}
        | {"heterogeneity": value + shift}
        for model, shift in (("a", 0.0), ("b", 0.1))
        for image, value in enumerate(base + generator.normal(0, 0.01, 200))
    ]
    table = paired_difference(pd.DataFrame(rows), "a", "b")
    assert table["difference"].item() == pytest.approx(0.1, abs=0.005)
    assert table["difference_ci_low"].item() < table["difference"].item() < table["difference_ci_high"].item()
    assert table["difference_ci_high"].item() - table["difference_ci_low"].item() < 0.01
    with pytest.raises(DataError, match="no common image"):
        paired_difference(pd.DataFrame(rows), "a", "c")


def test_property_measure__one_vector_for_all_masked_tokens_before_position() -> None:
    for model in (small_mae(), small_simmim(absolute_positions=True), small_simmim()):
        measure = PropertyMeasure(model)
        frame = probe(model, [batch_of(model, 40)], layer_measures=[measure]).to_frame()
        assert "heterogeneity" in frame
        values = measure.to_frame().set_index("property")["value"]
        assert values["spread_before_position"] < 1e-5
        positions = model.position_embedding(model.stacks[0]) is not None
        assert (values["spread"] > 0.05) == positions
        assert -1 <= values["cosine"] <= 1
        share = measure.share_of_positions(model.stacks[0])
        mask = masks_from_rule(model.info)(batch_of(model, 40).names, 0)
        assert share.tolist() == pytest.approx(mask.double().mean(dim=0).tolist())


def test_heterogeneity_command__compares_at_the_same_number_of_visible_patches(tmp_path: Path) -> None:
    arguments = ["heterogeneity", "--out", str(tmp_path), "-q", "--limit", "8", "--match-visible"]
    for name in ("MAE", "SimMIM"):
        arguments += ["--ckpt", str(DEMO_CHECKPOINTS[name]), "--label", name]
    result = CliRunner().invoke(app, [*arguments, "--properties"])
    assert result.exit_code == 0, result.output
    assert set(pd.read_csv(tmp_path / "heterogeneity.csv")["num_visible"]) == {16}
    assert set(pd.read_csv(tmp_path / "properties.csv")["model"]) == {"MAE", "SimMIM"}


def test_heterogeneity_command__a_difference_is_of_equal_stacks(tmp_path: Path) -> None:
    def run(names: tuple[str, str], out: str, *options: str) -> Any:
        ckpts = [word for name in names for word in ("--ckpt", str(DEMO_CHECKPOINTS[name]))]
        out = str(tmp_path / out)
        return CliRunner().invoke(
            app, ["heterogeneity", "-q", "--limit", "4", "--difference", *ckpts, *options, "--out", out]
        )

    same = run(("MAE", "MAE, early"), "same")
    assert (same.exit_code, "visible patches" in same.stderr) == (0, False), same.output
    difference = pd.read_csv(tmp_path / "same" / "difference.csv")
    assert difference["layer_depth"].tolist() == [0, 1, 2, 3, 4]
    assert (difference["difference"] > 0).all()
    other = run(("MAE", "SimMIM"), "other", "--match-visible")
    assert other.exit_code == 4
    assert "in decoder of mae_cifar10_final and in encoder of simmim_cifar10_final, whose layer depths" in other.stderr
    assert not (tmp_path / "other").exists()


def test_paired_difference__warns_of_other_visible_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of two models of one family whose own masks differ; here one table in which they do."""
    from mto_analysis.probe import pairing

    whole = pairing.paired_difference
    monkeypatch.setattr(pairing, "paired_difference", lambda *given: whole(*given).assign(num_visible_second=20.0))
    ckpts = [word for name in ("MAE", "MAE, early") for word in ("--ckpt", str(DEMO_CHECKPOINTS[name]))]
    options = ["--limit", "2", "--difference", "-q", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["heterogeneity", *ckpts, *options])
    assert result.exit_code == 0, result.output
    assert (
        "difference.csv compares 16 with 20 visible patches, on which H depends; add --match-visible" in result.stderr
    )


def test_heterogeneity_command__a_difference_needs_two_checkpoints(tmp_path: Path) -> None:
    arguments = ["heterogeneity", "--out", str(tmp_path), "--ckpt", str(DEMO_CHECKPOINTS["MAE"]), "--difference"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "two checkpoints, got 1" in result.stderr
