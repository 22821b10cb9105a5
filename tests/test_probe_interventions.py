"""What masked tokens cause: cuts and replacements against slow loops, removal, effects, refusals and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from model_kinds import blocks
from scipy import stats
from test_cli import ok, run
from test_models_swin import make_swin
from test_probe_live_source import Tiny
from tiny_models import NUM_PATCHES, make_mae, make_simmim, some_images, some_masks
from torch import Tensor, nn
from watched_models import Shrinking

from mto_analysis import save_checkpoint
from mto_analysis.demo import DEMO_IMAGES
from mto_analysis.errors import DataError, StackError
from mto_analysis.figures.plots.interventions import draw_interventions, plot_effects
from mto_analysis.images import choose_images, open_images
from mto_analysis.models import MaskedImageModel
from mto_analysis.models.targets import reconstruction_loss
from mto_analysis.models.vit import unpatchify
from mto_analysis.probe.interventions import (
    INTERVENTIONS,
    Group,
    _Stack,
    cut_pairs,
    effects,
    intervene_on_checkpoints,
    intervention_sentences,
    token_groups,
)
from mto_analysis.probe.knn import knn_scores
from mto_analysis.probe.request import LoadedModel, Request, Settings
from mto_analysis.taps.interventions import intervene

NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture
def mask(generator: torch.Generator) -> Tensor:
    """Five images with 1 to 5 masked patches."""
    return some_masks(generator, len(NAMES), ragged=True)


def test_cut_pairs__are_the_quadrants_pair_by_pair(mask: Tensor) -> None:
    group = Group(mask, ~mask)
    kinds = {
        "cut_visible_to_masked": ("visible", "masked"),
        "cut_masked_to_visible": ("masked", "visible"),
        "cut_masked_to_masked": ("masked", "masked"),
    }
    for prefix in (0, 2):
        for intervention in INTERVENTIONS:
            if not intervention.startswith("cut_"):
                continue
            found = cut_pairs(intervention, group, prefix)
            for image, row in enumerate(mask.tolist()):
                kind = ["prefix"] * prefix + ["masked" if each else "visible" for each in row]
                for query, key in ((q, k) for q in range(len(kind)) for k in range(len(kind))):
                    pair = kind[query], kind[key]
                    expected = pair == kinds.get(intervention) or (
                        intervention == "cut_all_to_masked" and pair[1] == "masked" != pair[0]
                    )
                    assert bool(found[image, query, key]) is expected


def test_token_groups__have_equally_many_targets_and_depend_on_names_alone(mask: Tensor) -> None:
    groups = token_groups(mask, NAMES, seed=3)
    half = torch.minimum(mask.sum(dim=1), (~mask).sum(dim=1) // 2)
    for name in ("some_masked", "some_visible"):
        assert torch.equal(groups[name].target.sum(dim=1), half)
        assert torch.equal(groups[name].other, ~mask & ~groups["some_visible"].target)
    assert not (groups["some_masked"].target & ~mask).any()
    assert not (groups["some_visible"].target & mask).any()
    again = token_groups(mask[2:], NAMES[2:], seed=3)
    assert torch.equal(again["some_visible"].target, groups["some_visible"].target[2:])
    assert not torch.equal(token_groups(mask, NAMES)["some_visible"].target, groups["some_visible"].target)
    one = torch.tensor([[True, True, False]])
    with pytest.raises(DataError, match="image a has one visible token"):
        token_groups(one, ["a"])


# ---- the model's own forward, against blocks called by hand


def request_of(models: dict[str, MaskedImageModel], tmp_path: Path, **settings: Any) -> Request:
    paths = []
    for name, model in models.items():
        paths.append(tmp_path / f"{name}.safetensors")
        if not paths[-1].exists():
            save_checkpoint(model, paths[-1])
    images = open_images(DEMO_IMAGES)
    chosen = choose_images(images, images.names[:6])
    return Request(paths, chosen, Settings(**{"batch_size": 4, **settings}), tuple(models))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One study of two tiny models with all interventions from two depths."""
    folder = tmp_path_factory.mktemp("interventions")
    models = {"mae": make_mae(), "simmim": make_simmim()}
    request = request_of(models, folder)
    return {"models": models, "folder": folder, "study": intervene_on_checkpoints(request, from_depths=(0, 1))}


def by_hand(model: Any, images: Tensor, mask: Tensor, removed: Tensor) -> Tensor:
    """Tokens of the last depth, without some patches of the first image from the first block on."""
    stack = model.stacks[0]
    x = next(iter(model._hidden(images, mask, stack)))
    kept = torch.cat([torch.ones(1, dtype=torch.bool), ~removed])
    bias = model.position_biases[0]()[..., kept, :][..., kept] if stack == "encoder" else None
    x = x[:, kept]
    for block in model.stack_blocks(stack):
        x = block(x, attn_mask=bias)
    return x[:, 1:]


@pytest.mark.parametrize("make", [make_mae, make_simmim])
@pytest.mark.parametrize("fused", [True, False])
def test_cut_all_to_masked__is_to_remove_these_tokens(
    make: Callable[[], Any], fused: bool, generator: torch.Generator
) -> None:
    model = make()
    images, mask = some_images(generator, 1), some_masks(generator, 1)
    stack = model.stacks[0]
    blocks = model.stack_blocks(stack)
    for block in blocks:
        block.attn.fused_attn = fused
    pairs = cut_pairs("cut_all_to_masked", Group(mask, ~mask), 1)
    with torch.no_grad():
        with intervene(blocks, cut=lambda number, tokens: pairs) as seen:
            model.reconstruct(images, mask)
        assert seen.output is not None
        torch.testing.assert_close(
            seen.output[:, 1:][~mask], by_hand(model, images, mask, mask[0])[0], rtol=1e-4, atol=1e-5
        )


def slow_values(model: Any, images: Tensor, mask: Tensor, intervention: str, depth: int) -> tuple[Tensor, Tensor]:
    """Tokens of the last depth and losses, image by image, block by block, with masked tokens replaced in a loop."""
    stack, info = model.stacks[0], model.info
    bias = model.position_biases[0]() if stack == "encoder" else None

    def inputs(image: Tensor, row: Tensor) -> list[Tensor]:
        return [each.clone() for each in model._hidden(image[None], row[None], stack)]

    outputs = []
    for index, row in enumerate(mask):
        donor = inputs(images[index - 1], row)
        x = inputs(images[index], row)[0]
        first = x.clone()
        for number, block in enumerate(model.stack_blocks(stack)):
            if number >= depth:
                before = x.clone()
                masked = [place + 1 for place in range(len(row)) if row[place]]
                for place in masked:
                    x[0, place] = {
                        "zero": torch.zeros_like(x[0, place]),
                        "mean": torch.stack([before[0, each] for each in masked]).mean(dim=0),
                        "other_image": donor[number][0, place],
                        "freeze": first[0, place],
                    }[intervention]
            x = block(x, attn_mask=bias)
        outputs.append(x)
    x = torch.cat(outputs)
    if stack == "encoder":
        prediction = model.decoder(model.norm(x)[:, 1:].mT.reshape(len(x), -1, *info.grid))
        prediction = torch.nn.functional.pixel_shuffle(prediction, info.patch_size)
    else:
        prediction = unpatchify(model.decoder_pred(model.decoder_norm(x))[:, 1:], info.patch_size, info.grid)
    loss = reconstruction_loss(prediction, images, mask, info.patch_size, target="pixels", criterion=info.criterion)
    return x[:, 1:], loss


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_study__replacements_give_the_values_of_slow_loops(made: dict[str, Any], name: str) -> None:
    model = made["models"][name]
    request = request_of({name: model}, made["folder"], batch_size=6)
    (loaded,) = request.models()
    (batch,) = request.batches(model, range(6))
    mask = loaded.masks(batch.names, 0)
    per_image = made["study"].per_image
    mine = per_image[(per_image["model"] == name) & (per_image["condition"] == "masked")]
    with torch.no_grad():
        intact, losses = slow_values(model, batch.images, mask, "freeze", 99)
        for intervention in ("zero", "mean", "other_image", "freeze"):
            for depth in (0, 1):
                tokens, changed = slow_values(model, batch.images, mask, intervention, depth)
                rows = mine[(mine["intervention"] == intervention) & (mine["from_depth"] == depth)]
                found = {measure: each.set_index("image")["effect"] for measure, each in rows.groupby("measure")}
                for index, image in enumerate(batch.names):
                    assert found["loss"][image] == pytest.approx((changed - losses)[index].item(), rel=1e-3, abs=1e-5)
                    cosines = []
                    for place in range(NUM_PATCHES):
                        if not mask[index, place]:
                            one, other = tokens[index, place], intact[index, place]
                            cosines.append((one @ other / one.norm() / other.norm()).item())
                    assert found["cosine"][image] == pytest.approx(sum(cosines) / len(cosines) - 1, abs=1e-5)


def test_study__does_not_depend_on_batches(made: dict[str, Any]) -> None:
    request = request_of({"mae": made["models"]["mae"]}, made["folder"], batch_size=1)
    again = intervene_on_checkpoints(request, interventions=["other_image", "cut_visible_to_masked"])
    keys = ["from_depth", "intervention", "condition", "measure"]
    both = again.table.merge(made["study"].table.query("model == 'mae'"), on=keys)
    assert len(both) == len(again.table) == 2 * 4 * 3
    assert both["effect_x"].tolist() == pytest.approx(both["effect_y"].tolist(), abs=1e-5)


def test_study__accuracy_is_that_of_the_other_images() -> None:
    torch.manual_seed(0)
    vectors, labels = torch.randn(9, 4), torch.arange(9) % 3
    found = knn_scores(vectors, labels, vectors, 3, neighbours=4, leave_one_out=True)
    for row in range(9):
        others = [other for other in range(9) if other != row]
        alone = knn_scores(vectors[others], labels[others], vectors[row : row + 1], 3, neighbours=4)
        torch.testing.assert_close(found[row : row + 1], alone)


def test_effects__are_paired_and_have_students_interval() -> None:
    rows = [
        {
            **{"model": "m", "stack": "s", "from_depth": 0, "intervention": "zero", "condition": condition},
            **{"measure": "loss", "image": str(image), "num_target": 2, "num_visible": 3, "intact": 1.0 + image},
            "effect": value,
        }
        for condition, values in (("masked", (3, 4, 8)), ("some_visible", (1, 1, 2)), ("some_masked", (2, 3, 5)))
        for image, value in enumerate(values)
    ]
    table = effects(pd.DataFrame(rows)).set_index("condition")
    assert table.index.tolist() == ["masked", "some_masked", "some_visible", "difference"]
    for condition, values in (("masked", [3, 4, 8]), ("difference", [1, 2, 3])):
        low, high = stats.t.interval(0.95, 2, sum(values) / 3, stats.sem(values))
        row = table.loc[condition]
        assert [row["effect"], row["ci_low"], row["ci_high"]] == pytest.approx([sum(values) / 3, low, high])
        assert (row["intact"], row["num_images"]) == (2.0, 3)


def test_sentences__say_better_worse_or_nothing_shown() -> None:
    keys = {"model": "m", "stack": "encoder", "from_depth": 2, "intervention": "cut_visible_to_masked"}
    rows = [
        {**keys, "condition": "masked", "measure": "accuracy", "effect": 2.0, "ci_low": 1.0, "ci_high": 3.0},
        {**keys, "condition": "difference", "measure": "accuracy", "effect": 2.0, "ci_low": -1.0, "ci_high": 5.0},
        {**keys, "condition": "masked", "measure": "loss", "effect": 0.5, "ci_low": 0.4, "ci_high": 0.6},
        {**keys, "condition": "difference", "measure": "loss", "effect": 1.0, "ci_low": math.nan, "ci_high": math.nan},
    ]
    assert intervention_sentences(pd.DataFrame(rows)) == [
        "m, encoder: without attention from visible to masked tokens from layer depth 2 on: "
        "kNN accuracy from visible tokens (%) +2 (+1 to +3), better; against the control +2 (-1 to +5), no effect "
        "shown; reconstruction loss +0.5 (+0.4 to +0.6), worse; against the control +1 (+nan to +nan), no effect shown."
    ]


@pytest.mark.parametrize(
    ("make", "given", "error", "message"),
    [
        (
            make_mae,
            {"interventions": ["nothing"]},
            ValueError,
            "interventions are cut_visible.* got nothing",
        ),
        (make_mae, {"from_depths": (3,)}, ValueError, "has 3 blocks, .* cannot begin at 3"),
        (make_mae, {"limit": 1}, DataError, "other_image takes tokens of another image"),
    ],
)
def test_study__refuses_in_one_line(
    make: Any, given: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    limit = given.pop("limit", None)
    with pytest.raises(error, match=message):
        intervene_on_checkpoints(request_of({"model": make()}, tmp_path, limit=limit), **given)


def test_study__names_the_block_whose_windows_it_cannot_cut(tmp_path: Path) -> None:
    model = make_swin(depths=(2,), num_heads=(2,))
    request = request_of({"swin": model}, tmp_path)
    with pytest.raises(StackError, match=r"block 1 of encoder of swin: .* windowed"):
        intervene_on_checkpoints(request, interventions=["cut_visible_to_masked"])
    study = intervene_on_checkpoints(request, interventions=["mean"], controls=False)  # needs no attention
    assert set(study.table["measure"]) == {"loss", "cosine", "accuracy"}
    merging = request_of({"merging": make_swin()}, tmp_path)
    with pytest.raises(StackError, match="encoder of merging: its token grid changes with layer depth"):
        intervene_on_checkpoints(merging, interventions=["mean"])


def test_study__refuses_a_stack_whose_blocks_are_not_known(generator: torch.Generator) -> None:
    model = Shrinking()
    loaded = LoadedModel("own", model, lambda names, k: some_masks(generator, 1, 64), None, {})
    with pytest.raises(StackError, match="encoder of own: its blocks are not known"):
        _Stack(loaded, "encoder", some_images(generator, 1), some_masks(generator, 1, 64))


# ---- figure and command


def test_draw_interventions__shows_every_model_and_measure(made: dict[str, Any]) -> None:
    table = made["study"].table
    figure = draw_interventions(table)
    assert len(figure.axes) == 4 * 3
    assert [ax.get_xlabel() for ax in figure.axes[-3:]] == [
        "change of\nloss", "change of\ncosine", "change of\nkNN accuracy\n(points)",
    ]  # fmt: skip
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(INTERVENTIONS.values())
    with pytest.raises(DataError, match="no effect to draw"):
        plot_effects(table.iloc[:0])


def test_command__writes_table_figure_and_json(made: dict[str, Any], tmp_path: Path) -> None:
    options = ("--ckpt", made["folder"] / "simmim.safetensors", "--limit", 5, "--batch-size", 3, "--out", tmp_path)
    chosen = ("--intervention", "cut-visible-to-masked", "--intervention", "zero", "--from-depth", 1)
    result = ok("intervene", *options, *chosen, "--json")
    table = pd.read_csv(tmp_path / "interventions.csv")
    assert len(table) == 2 * 4 * 3
    assert set(table["from_depth"]) == {1}
    assert [row["effect"] for row in json.loads(result.stdout)] == pytest.approx(table["effect"].tolist())
    assert {each.name for each in tmp_path.iterdir()} == {
        "interventions.csv", "interventions.png", "interventions.pdf", "run.json", "run.toml", "methods.md",
    }  # fmt: skip
    assert "(cut-visible-to-masked, zero) acted from layer depth 1 on" in (tmp_path / "methods.md").read_text()
    again = ok("intervene", *options, *chosen, "--overwrite", "--no-controls", "--figure-format", "png")
    assert "without attention from visible to masked tokens from layer depth 1 on" in again.stdout
    assert run("intervene", *options).exit_code == 2  # results are there


class Hidden(nn.TransformerEncoderLayer):
    """A block whose attention calls no softmax."""

    def _sa_block(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weights = (x @ x.mT).exp()
        return weights / weights.sum(dim=-1, keepdim=True) @ x


def make_hidden() -> nn.Module:
    model = Tiny()
    model.blocks = nn.ModuleList(Hidden(12, 2, 24, 0.0, batch_first=True) for _ in range(2))
    return model


def test_command__names_the_block_of_a_live_model_that_it_cannot_cut(tmp_path: Path) -> None:
    model = "test_probe_interventions:make_hidden"
    options = ("--model", model, "--limit", 3, "--out", tmp_path / "out", "--no-controls")
    refused = run("intervene", *options, "--intervention", "cut-visible-to-masked")
    assert refused.exit_code == 3
    assert f"error: block 1 of encoder of {model}: attention over the 16 tokens" in refused.stderr
    ok("intervene", *options, "--intervention", "zero")  # needs no attention


class Transposed(Tiny):
    """The same model with tokens ``num_tokens batch dim`` in its blocks."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        first, self.blocks = self.blocks, blocks(batch_first=False)
        self.blocks.load_state_dict(first.state_dict())

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        x = torch.where(mask[..., None], self.mask_token, self.patch(images).flatten(2).mT) + self.pos_embed
        x = x.transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return x


def make_seeded() -> nn.Module:
    torch.manual_seed(0)
    return Tiny()


def test_command__takes_blocks_whose_batch_is_second(tmp_path: Path) -> None:
    options = (
        "--limit",
        3,
        "--figure-format",
        "png",
        "--intervention",
        "cut-visible-to-masked",
        "--intervention",
        "mean",
    )
    tables = []
    for made in ("make_seeded", "Transposed"):
        ok("intervene", "--model", f"test_probe_interventions:{made}", *options, "--out", tmp_path / made)
        tables.append(pd.read_csv(tmp_path / made / "interventions.csv"))
    assert tables[0]["effect"].abs().max() > 1e-3
    assert tables[1]["effect"].tolist() == pytest.approx(tables[0]["effect"].tolist(), abs=1e-5)


def test_command__takes_models_of_the_users_code_without_labels(tmp_path: Path, image_folder: Path) -> None:
    options = ("--model", "test_probe_live_source:make", "--images", image_folder, "--out", tmp_path / "out")
    result = ok("intervene", *options, "--intervention", "cut-all-to-masked", "--intervention", "freeze")
    table = pd.read_csv(tmp_path / "out" / "interventions.csv")
    assert set(table["measure"]) == {"cosine"}  # how its output becomes pixels is not known
    assert "images have no labels, so there is no accuracy" in result.stderr
    assert (table.query("condition == 'masked'")["effect"] < 0).all()
