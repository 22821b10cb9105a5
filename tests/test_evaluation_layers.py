"""Accuracy at every layer depth against single evaluations, the choice of a layer, attentive pooling, the command."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from labelled_images import write_parquet
from test_cli import ok, run
from test_models_swin import make_swin
from tiny_models import make_mae, make_simmim, some_images

from mto_analysis import save_checkpoint
from mto_analysis.errors import DataError
from mto_analysis.probe import probe
from mto_analysis.training.evaluation import Evaluation, Evaluator
from mto_analysis.training.evaluation.features import attentive_mean, feature_vectors
from mto_analysis.training.evaluation.layers import (
    _batches,
    _selection,
    evaluate_layers,
    heterogeneity_by_depth,
    layer_sentences,
)
from mto_analysis.training.evaluation.protocols import Feature


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("layers")
    return write_parquet(folder / "train.parquet", 24, 3), write_parquet(folder / "test.parquet", 20, 3, seed=1)


@pytest.mark.parametrize("protocol", ["knn", "linear_cached"])
def test_evaluate_layers__agrees_with_single_evaluations(sources: tuple[Path, Path], protocol: str) -> None:
    model = make_simmim()
    more = {"neighbours": 3, "penalty": 1e-2, "batch_size": 8}
    table = evaluate_layers(Evaluator(Evaluation(protocol, *sources, **more)), model)
    assert table.groupby("pooling", sort=False)["layer"].apply(list).to_dict() == {
        "patches": [0, 1, 2, 3], "class": [1, 2, 3], "attentive": [0, 1, 2, 3],
    }  # fmt: skip
    for row in table[table["layer"].isin([1, 3])].to_dict("records"):
        alone = Evaluator(Evaluation(protocol, *sources, pooling=row["pooling"], layer=row["layer"], **more))
        both = (row["selection"] * row["num_selection"] + row["score"] * row["num_images"]) / 20
        assert both == pytest.approx(alone.evaluate(model).top1)
    (chosen,) = table[table["chosen"]].to_dict("records")
    assert chosen["selection"] == table["selection"].max()
    assert not table[table["layer"] == 3]["difference"].any()
    for row in table.to_dict("records"):  # Wilson's interval solves (p - q)^2 = z^2 q (1 - q) / n
        for bound in (row["ci_low"] / 100, row["ci_high"] / 100):
            squared = (row["score"] / 100 - bound) ** 2
            assert squared == pytest.approx(1.959964**2 * bound * (1 - bound) / row["num_images"], abs=1e-6)
    (sentence,) = layer_sentences(table.assign(model="m"))
    assert (
        f"at layer depth {chosen['layer']} is best on 10 images; on 10 others it has {chosen['score']:.2f} %"
        in sentence
    )


def test_selection__is_one_half_and_depends_on_names_alone() -> None:
    names = [f"{number}.png" for number in range(50)]
    chosen = _selection(names)
    assert chosen.sum() == 25
    assert _selection(names[::-1]).tolist() == chosen[::-1].tolist()
    with pytest.raises(DataError, match="3 test images are too few"):
        _selection(names[:3])


def test_attentive_mean__against_slow_loops() -> None:
    patches = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def normed(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean()) / (x.var(correction=0) + 1e-6).sqrt()

    for image, found in zip(patches, attentive_mean(patches), strict=True):
        logits = [(normed(image.mean(dim=0)) @ normed(each)).item() / 2 for each in image]
        shares = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
        assert sum(shares) == pytest.approx(1)
        expected = sum(share * each for share, each in zip(shares, image, strict=True))
        torch.testing.assert_close(found, expected)


def test_feature_vectors__of_stages_need_a_norm_of_their_width(generator: torch.Generator) -> None:
    model = make_swin()
    images = some_images(generator, 2, side=model.info.image_size)
    first, last = (Feature("patches", layer, "fresh") for layer in (0, len(model.encoder_blocks())))
    with torch.no_grad():
        narrow, wide = feature_vectors(model, images, first, last)
        assert narrow.shape[1] < wide.shape[1]
        feature_vectors(model, images, last._replace(norm="encoder"))
        with pytest.raises(ValueError, match=r"tokens of layer depth 0 have .* give another norm"):
            feature_vectors(model, images, first._replace(norm="encoder"), last)


def test_heterogeneity_by_depth__is_that_of_the_probe(sources: tuple[Path, Path]) -> None:
    model, evaluator = make_mae(), Evaluator(Evaluation("knn", *sources, batch_size=8))
    table = heterogeneity_by_depth(evaluator, model)
    assert table["num_images"].tolist() == [20] * 4
    again = probe(model, [*_batches(evaluator, model)][::-1]).summary()
    assert table["heterogeneity"].tolist() == pytest.approx(again["heterogeneity"].tolist())


def test_command__scores_every_layer_of_every_model(sources: tuple[Path, Path], tmp_path: Path) -> None:
    for name, model in (("mae", make_mae()), ("simmim", make_simmim())):
        save_checkpoint(model, tmp_path / f"{name}.safetensors")
    state = {name: value for name, value in make_mae(dim=24).state_dict().items() if "position" not in name}
    torch.save({"model": state}, tmp_path / "plain.pth")  # says nothing of its decoder's heads
    images = ("--train", sources[0], "--test", sources[1], "--layers", "all", "--out", tmp_path / "out")
    both = ("--ckpt", tmp_path / "mae.safetensors", "--ckpt", tmp_path / "simmim.safetensors")
    result = ok("evaluate", "knn", *both, *images, "-k", 3)
    table = pd.read_csv(tmp_path / "out" / "layers.csv")
    assert table.groupby("model")["chosen"].sum().tolist() == [1, 1]
    heterogeneity = pd.read_csv(tmp_path / "out" / "heterogeneity.csv")
    assert heterogeneity.groupby("model")["stack"].first().to_dict() == {"mae": "decoder", "simmim": "encoder"}
    assert "is best on 10 images" in result.stdout
    assert {"layers.png", "layers.pdf", "run.json"} < {each.name for each in (tmp_path / "out").iterdir()}
    assert "one half of the test images" in (tmp_path / "out" / "methods.md").read_text()
    assert run("evaluate", "knn", *both, *images).exit_code == 2  # results are there
    plain = ("--ckpt", tmp_path / "plain.pth", "--num-heads", 3)
    more = ("--set", "penalty=0.01", "--random-baseline", "--overwrite", "--figure-format", "png")
    again = ok("evaluate", "linear", *plain, *images, *more)
    assert "no H, as the file does not say decoder_num_heads; give --decoder-num-heads" in again.stderr
    assert re.search(r"plain: .* random weights \(.* by chance on 10 images", again.stdout)
    assert "No verdict: add --random-baseline" in result.stdout
    assert set(pd.read_csv(tmp_path / "out" / "layers.csv")["model"]) == {"plain", "plain, random weights"}
    assert not len(pd.read_csv(tmp_path / "out" / "heterogeneity.csv"))
    settled = (*plain, "--decoder-num-heads", 2, *images, "--overwrite", "--figure-format", "png", "-k", 3)
    assert "no H" not in ok("evaluate", "knn", *settled).stderr
    assert pd.read_csv(tmp_path / "out" / "heterogeneity.csv")["stack"].unique().tolist() == ["decoder"]
    seeds = [word for at, path in enumerate(both[1::2]) for word in ("--ckpt", path, "--label", "m", "--seed", at)]
    ok("evaluate", "knn", *seeds, *images, "--overwrite", "--figure-format", "png", "-k", 3)
    assert set(pd.read_csv(tmp_path / "out" / "layers.csv")["model"]) == {"m, seed 0", "m, seed 1"}
    refused = run("evaluate", "knn", *both, *images, "--layer", 2, "--overwrite")
    assert refused.exit_code == 2
    assert "leave --layer and --pooling out" in refused.stderr
