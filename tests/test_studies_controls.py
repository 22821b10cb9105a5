"""Controls: initialization, changed mask tokens, shuffled masks, the null, bands and sentences, the command."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner
from watched_models import Shrinking, batch_of, small_mae, small_simmim

from mto_analysis import load_checkpoint
from mto_analysis.affinity import TokenSplit
from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_MASKS, demo_batches
from mto_analysis.figures.plots.controls import draw_controls
from mto_analysis.masks import load_masks
from mto_analysis.models import LayerTokens
from mto_analysis.models.initialization import random_weights, with_mask_token
from mto_analysis.probe import masks_from_file, probe
from mto_analysis.probe.controls import CONTROLS, ControlMeasure, control_bands, control_sentences
from mto_analyze import app


def test_random_weights__mae_falls_with_depth_before_training() -> None:
    """The known curve of untrained weights, within what seeds differ by at 128 channels."""
    model = load_checkpoint(DEMO_CHECKPOINTS["MAE"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = masks_from_file(model.info, load_masks(DEMO_MASKS["MAE"]))
    curve = probe(random_weights(model, 0), demo_batches(model.info, limit=64), masks).summary()["heterogeneity"]
    # Seeds differ by a quarter at this width, so the known curve of another seed is met within a factor.
    ratios = curve.to_numpy() / [1.042, 0.605, 0.358, 0.291, 0.283]
    assert ((ratios > 0.5) & (ratios < 2)).all()
    assert curve[4] < curve[0] / 2
    assert (curve.diff().dropna() < 0).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("make", [small_mae, small_simmim])
def test_random_weights__scales_are_the_familys_and_the_seed_decides(make: object) -> None:
    model = make()  # type: ignore[operator]
    state = torch.random.get_rng_state()
    first, again, other = (random_weights(model, seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    weights = [each.stack_blocks(each.stacks[0])[1].mlp.fc1.weight for each in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    if make is small_mae:
        bound = math.sqrt(6 / sum(weights[0].shape))
        assert bound * 0.9 < weights[0].abs().max() <= bound
        assert torch.equal(first.decoder_pos_embed, model.decoder_pos_embed)
    else:
        assert 0.018 < weights[0].abs().max() <= 0.02
        scaled = first.blocks[1].mlp.fc2.weight
        assert 0.018 / 2 < scaled.abs().max() <= 0.02 / 2  # sqrt(2 x 2)
    assert torch.equal(first.norm.weight, torch.ones_like(first.norm.weight))


def test_with_mask_token__keeps_the_norm_or_is_zero_and_all_else() -> None:
    model = small_mae()
    changed, zero = with_mask_token(model, 3), with_mask_token(model, None)
    torch.testing.assert_close(changed.mask_token.norm(), model.mask_token.norm())
    assert not torch.equal(changed.mask_token, model.mask_token)
    assert not zero.mask_token.any()
    assert all(
        torch.equal(value, model.get_parameter(name))
        for name, value in changed.named_parameters()
        if name != "mask_token"
    )


def test_control_measure__null_of_visible_tokens_against_slow_loops() -> None:
    tokens = torch.randn(1, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False, False, True, False, False]])
    found = ControlMeasure()("encoder", LayerTokens(0, tokens, mask), TokenSplit(mask), ("p",))
    visible = tokens[0][~mask[0]]
    entropies = []
    for i in range(4):
        shares = torch.stack([visible[i] @ visible[j] for j in range(4) if j != i]).softmax(dim=0)
        entropies.append(-(shares * shares.log()).sum().item())
    assert found["visible_null"].item() == pytest.approx(sum(entropies) / 4 / math.log(3))


def test_control_measure__shuffled_masks_hang_on_names_and_follow_a_shrinking_grid() -> None:
    for model in (Shrinking(), small_simmim()):
        batch = batch_of(model, 4)
        whole = probe(model, [batch], layer_measures=[ControlMeasure()]).to_frame()
        halves = [type(batch)(batch.names[rows], batch.images[rows]) for rows in (slice(0, 1), slice(1, 4))]
        parts = probe(model, halves, layer_measures=[ControlMeasure()]).to_frame()
        keys = ["layer_depth", "image"]
        for name in ("shuffled_positions", "visible_null"):
            left, right = (frame.sort_values(keys)[name].to_numpy() for frame in (whole, parts))
            assert left == pytest.approx(right, rel=1e-5)
            assert ((left >= 0) & (left <= 1 + 1e-6)).all()


def made_up() -> tuple[pd.DataFrame, pd.DataFrame]:
    keys = {"model": "m", "stack": "decoder"}
    curve = [
        {**keys, "layer_depth": depth, "normalized": value, "normalized_ci_low": value - 0.01}
        | {"normalized_ci_high": value + 0.01}
        for depth, value in enumerate((0.9, 0.5))
    ]
    controls = [
        {**keys, "layer_depth": depth, "control": control, "seed": seed, "normalized": value}
        | {"normalized_ci_low": value - 0.02, "normalized_ci_high": value + 0.02}
        for control, values in (("random_weights", ((0.9, 0.8), (0.92, 0.7))), ("zero_token", ((0.3, 0.3),)))
        for seed, curve_of_seed in enumerate(values)
        for depth, value in enumerate(curve_of_seed)
    ]
    return pd.DataFrame(curve), pd.DataFrame(controls)


def test_control_sentences__say_where_the_curve_leaves_the_bands() -> None:
    curve, controls = made_up()
    bands = control_bands(controls).set_index(["control", "layer_depth"])
    assert bands.loc[("random_weights", 0), ["low", "high"]].tolist() == pytest.approx([0.88, 0.94])
    (sentence,) = control_sentences(curve, controls)
    assert sentence == "m: layer depths where H differs from its controls: random weights 1; zero mask token 0-1."


def test_draw_controls__has_a_panel_per_control_on_one_range() -> None:
    curve, controls = made_up()
    words = {name: CONTROLS[name] for name in ("random_weights", "zero_token")}
    first, second = draw_controls(curve, control_bands(controls), words).subfigs[0].axes
    assert [ax.get_title() for ax in (first, second)] == ["random\nweights", "zero\nmask token"]
    assert first.get_ylim() == second.get_ylim()
    assert first.get_ylabel().startswith("m\n")
    for ax in (first, second):
        assert [line.get_label() for line in ax.lines] == ["control", "model"]
        assert ax.lines[-1].get_ydata().tolist() == [0.9, 0.5]
        assert len(ax.collections) == 2  # the band of the control, and of the curve


def test_heterogeneity_command__controls_say_how_long_and_what_they_show(tmp_path: Path) -> None:
    arguments = ["heterogeneity", "--ckpt", str(DEMO_CHECKPOINTS["MAE"]), "--limit", "4", "--out", str(tmp_path)]
    arguments += ["--controls", "--control-seeds", "1", "--definitions", "all"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "mae_cifar10_final: 3 more passes for its controls, about" in result.stderr
    assert "layer depths where H differs from its controls: " in result.stdout
    assert set(pd.read_csv(tmp_path / "controls.csv")["control"]) == set(CONTROLS)
    assert "shuffled_positions" not in pd.read_csv(tmp_path / "heterogeneity_per_image.csv")
    assert (tmp_path / "definitions.csv").exists()
