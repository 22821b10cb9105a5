"""Other definitions of heterogeneity: slow loops, the bundled models' known numbers, the table, figure and command."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from typer.testing import CliRunner
from watched_models import Shrinking, batch_of, small_mae, small_simmim

from mto_analysis.affinity import TokenSplit
from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_IMAGES, DEMO_MASKS
from mto_analysis.figures.plots.definitions import draw_definitions, plot_definition
from mto_analysis.images import open_images
from mto_analysis.masks import load_masks
from mto_analysis.probe import probe
from mto_analysis.probe.definition_study import measure_definitions
from mto_analysis.probe.definitions import DEFINITIONS, DefinitionMeasure
from mto_analysis.probe.request import Request, Settings
from mto_analyze import app


def slow_h(tokens: torch.Tensor, mask: torch.Tensor, norms: tuple[float, float], name: str) -> float:
    """One image, one definition, token by token."""
    x = tokens.clone()
    if "layer_norm" in name:
        x = torch.stack([(t - t.mean()) / (t.var(unbiased=False) + 1e-5).sqrt() for t in x])
    for kind, target in ((mask, norms[0]), (~mask, norms[1])):
        if "matched_each" in name:
            x[kind] = torch.stack([t / t.norm() * target for t in x[kind]])
        if "matched_kind" in name:
            x[kind] = x[kind] * (target / torch.stack([t.norm() for t in x[kind]]).mean())
    if "centred" in name:
        x = x - x.mean(dim=0)
    entropies = []
    for query in x[mask]:
        if "cosine" in name:
            logits = [(query @ key / query.norm() / key.norm()).item() / 0.1 for key in x[~mask]]
        else:
            logits = [(query @ key).item() / (math.sqrt(len(query)) if "scaled" in name else 1) for key in x[~mask]]
        shares = [math.exp(z - max(logits)) for z in logits]
        shares = [share / sum(shares) for share in shares]
        entropies.append(-sum(share * math.log(share) for share in shares if share > 0))
    return sum(entropies) / len(entropies)


def test_definition_measure__agrees_with_slow_loops_at_every_depth() -> None:
    model = small_mae().double()
    batch = batch_of(model, 3)
    measure = DefinitionMeasure(model)
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[0, :12] = mask[1, 3:15] = mask[2, 4:] = True
    norms: list[tuple[float, float]] = []
    with torch.no_grad():
        for layer in model.layer_tokens(batch.images.double(), mask):
            found = measure("decoder", layer, TokenSplit(mask), batch.names)
            for image in range(3):
                x = layer.tokens[image]
                if layer.depth == 0:
                    norms.append((x[mask[image]].norm(dim=1).mean().item(), x[~mask[image]].norm(dim=1).mean().item()))
                for each in DEFINITIONS:
                    slow = slow_h(x, mask[image], norms[image], each.name)
                    assert found[each.name][image].item() == pytest.approx(slow, rel=1e-4, abs=1e-9), each.name
                if layer.depth == 0:
                    bare = x - model.decoder_pos_embed[0, 1:]
                    slow = slow_h(bare, mask[image], (0, 0), "cosine")
                    assert found["cosine_without_position"][image].item() == pytest.approx(slow, rel=1e-4)


def test_definitions__bundled_mae_has_the_known_curves() -> None:
    settings = Settings(masks=load_masks(DEMO_MASKS["MAE"]), batch_size=64)
    request = Request([DEMO_CHECKPOINTS["MAE"]], open_images(DEMO_IMAGES), settings, labels=["MAE"])
    study, table, attention = measure_definitions(request)
    curves = {
        name: rows["heterogeneity"].tolist()
        for name, rows in table[table["position"] == "with"].groupby("definition", sort=False)
    }
    assert curves["dot"] == pytest.approx(study.table["heterogeneity"].tolist(), rel=1e-5)
    assert curves["dot_matched_each"] == pytest.approx([0.57, 0.45, 0.50, 0.68, 0.97], abs=0.006)
    assert curves["dot_matched_kind"] == pytest.approx([0.55, 0.41, 0.38, 0.40, 0.40], abs=0.01)
    # Layer depth 0 depends mostly on the position embedding.
    bare = table[(table["position"] == "without") & (table["definition"] == "dot")]
    assert bare["layer_depth"].tolist() == [0]
    assert bare["normalized"].item() > 0.95
    assert not {each.name for each in DEFINITIONS} & set(study.per_image)
    assert attention.groupby("block").size().tolist() == [4] * 4


def test_definition_measure__position_is_taken_off_only_where_it_is_added() -> None:
    for model, additive in (
        (small_simmim(), False),
        (small_simmim(absolute_positions=True), True),
        (Shrinking(), False),
    ):
        frame = probe(model, [batch_of(model)], layer_measures=[DefinitionMeasure(model)]).to_frame()
        assert ("dot_without_position" in frame) == additive
        assert frame.isna().sum().sum() == 0


def test_definition_measure__batches_do_not_mix() -> None:
    """Norms of layer depth 0 are those of the same batch."""
    model = small_simmim()
    batch = batch_of(model, 6)
    halves = [type(batch)(batch.names[rows], batch.images[rows]) for rows in (slice(0, 2), slice(2, 6))]
    whole = probe(model, [batch], layer_measures=[DefinitionMeasure(model)]).to_frame()
    parts = probe(model, halves, layer_measures=[DefinitionMeasure(model)]).to_frame()
    keys = ["layer_depth", "image"]
    pd.testing.assert_frame_equal(
        whole.sort_values(keys, ignore_index=True), parts.sort_values(keys, ignore_index=True), rtol=1e-4, atol=1e-6
    )


def test_definitions__every_one_says_temperature_and_centring() -> None:
    assert len({each.name for each in DEFINITIONS}) == len(DEFINITIONS) == 12
    assert DEFINITIONS[0].name == "dot"
    assert {each.temperature for each in DEFINITIONS} == {"1", "sqrt(dim)", "0.1"}
    assert "mean token of the image" in {each.centring for each in DEFINITIONS}


def made_up_tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = [
        {
            "model": "m", "stack": "decoder", "layer_depth": depth, "definition": each.name, "position": position,
            "normalized": 0.9 - depth / 10, "normalized_ci_low": 0.85 - depth / 10,
            "normalized_ci_high": 0.95 - depth / 10,
        }
        for each in DEFINITIONS
        for position in ("with", "without")
        for depth in range(3 if position == "with" else 1)
    ]  # fmt: skip
    names = (
        "mass_masked_to_visible",
        "mass_visible_to_masked",
        "entropy_masked_to_visible",
        "entropy_visible_to_masked",
    )
    attention = [
        {"model": "m", "stack": "decoder", "block": block, "head": head, **dict.fromkeys(names, 0.1 * block)}
        for block in (1, 2)
        for head in (1, 2)
    ]
    return pd.DataFrame(rows), pd.DataFrame(attention)


def test_draw_definitions__a_panel_per_definition_and_four_of_attention() -> None:
    table, attention = made_up_tables()
    figure = draw_definitions(table, attention)
    assert isinstance(figure, Figure)
    assert sum(ax.axison for ax in figure.axes) == 16
    ax = plot_definition(table, "cosine")
    curve, bare = ax.lines
    assert curve.get_ydata().tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert (bare.get_xdata().tolist(), bare.get_markerfacecolor()) == ([0], "white")
    panel = next(ax for ax in figure.axes if ax.get_title() == "masked\nto visible")
    assert panel.get_ylabel() == "share of attention"
    assert panel.lines[0].get_ydata().tolist() == pytest.approx([0.1, 0.2])


def test_heterogeneity_command__definitions_all_writes_its_files(tmp_path: Path) -> None:
    arguments = ["heterogeneity", "--ckpt", str(DEMO_CHECKPOINTS["MAE"]), "--limit", "4", "--out", str(tmp_path), "-q"]
    result = CliRunner().invoke(app, [*arguments, "--definitions", "all"])
    assert result.exit_code == 0, result.output
    for name in ("definitions.csv", "attention.csv", "definitions.png", "definitions.pdf", "heterogeneity.csv"):
        assert (tmp_path / name).stat().st_size > 0
    table = pd.read_csv(tmp_path / "definitions.csv")
    assert set(table["definition"]) == {each.name for each in DEFINITIONS}
