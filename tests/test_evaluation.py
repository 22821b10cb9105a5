"""Encoders of whole images, kNN, the linear classifier on cached features, and the evaluator that keeps images."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from labelled_images import write_parquet
from PIL import Image
from sklearn.linear_model import LogisticRegression as Reference
from test_parity import load
from tiny_models import make_mae, make_two_stacks, some_images
from torch.nn import functional as F

from mto_analysis import load_checkpoint
from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_IMAGES
from mto_analysis.errors import DataError, NumericalError
from mto_analysis.images import image_batches
from mto_analysis.models.initialization import random_weights
from mto_analysis.probe.knn import knn_scores
from mto_analysis.training.evaluation import Evaluation, Evaluator, score
from mto_analysis.training.evaluation.evaluator import accuracy
from mto_analysis.training.evaluation.features import (
    LabelledImages,
    check_classes,
    eight_bits,
    extract_features,
    feature_vectors,
    normalized,
    pooled,
)
from mto_analysis.training.evaluation.linear import LogisticRegression, linear_scores
from mto_analysis.training.evaluation.protocols import Feature, crop_pct_of, feature_of, weights_of


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    return write_parquet(tmp_path / "train.parquet"), write_parquet(tmp_path / "test.parquet", 12, seed=1)


def test_encode__sees_every_patch_of_mae(tiny_mae, generator) -> None:
    images = some_images(generator, 2)
    with torch.no_grad():
        tokens = tiny_mae.encode(images)
        assert tokens.shape == (2, 1 + tiny_mae.info.num_patches, tiny_mae.config.dim)
        # A mask that hides one patch gives the same as leaving its token out by hand.
        x = tiny_mae.patch_embed(images) + tiny_mae.pos_embed[:, 1:]
        x = torch.cat([(tiny_mae.cls_token + tiny_mae.pos_embed[:, :1]).expand(2, -1, -1), x], dim=1)
        for block in tiny_mae.blocks:
            x = block(x)
        torch.testing.assert_close(tokens, tiny_mae.norm(x))
        torch.testing.assert_close(tiny_mae.norm(tiny_mae.encode(images, norm=False)), tokens)


def test_encode__is_the_limit_of_no_masked_patch(tiny_simmim, generator) -> None:
    """With the mask token set to a patch's own embedding, masking that patch changes nothing."""
    images = some_images(generator, 1)
    mask = torch.zeros(1, tiny_simmim.info.num_patches, dtype=torch.bool)
    mask[0, 5] = True
    with torch.no_grad():
        tiny_simmim.mask_token.copy_(tiny_simmim.patch_embed(images)[:, 5:6])
        *_, last = tiny_simmim.layer_tokens(images, mask)
        torch.testing.assert_close(tiny_simmim.encode(images, norm=False)[:, 1:], last.tokens)


@pytest.mark.parametrize("name", ["bootmae", "conmim", "hf_beit", "hf_beit_ape", "simmim_swin"])
def test_encode__gives_tokens_of_every_published_family(name: str) -> None:
    model, inputs, _ = load(name)
    images = torch.from_numpy(inputs["images"])
    with torch.no_grad():
        tokens = model.encode(images)
    blocks = model.encoder_blocks()
    patches = tokens.shape[1] - model.encoder_prefix_tokens
    assert patches == (9 if name == "simmim_swin" else model.info.num_patches)
    assert len(blocks) == (sum(model.config.depths) if name == "simmim_swin" else model.config.depth)
    assert not torch.allclose(tokens[:, -1], tokens[:, -2])


def test_encode__refuses_a_family_without_encoder(two_stacks, generator) -> None:
    with pytest.raises(ValueError, match="two_stacks model has no encoder"):
        two_stacks.encode(some_images(generator, 1))


def test_encode__checks_the_size_of_images(tiny_mae, generator) -> None:
    with pytest.raises(ValueError, match="images must be"):
        tiny_mae.encode(some_images(generator, 1, side=20))


@pytest.mark.parametrize(
    ("family", "style", "depth", "feature", "weights"),
    [
        ("mae", "decoder", 12, ("class", 12, "encoder"), "model"),
        ("mff", "decoder", 12, ("class", 12, "encoder"), "model"),
        ("simmim_vit", "inpainting", 12, ("patches", 12, "encoder"), "model"),
        ("bootmae", "decoder", 12, ("patches", 10, "fresh"), "model"),
        ("bootmae", "decoder", 24, ("patches", 18, "fresh"), "model"),
        ("bootmae", "decoder", 6, ("patches", 5, "fresh"), "model"),
        ("conmim", "inpainting", 12, ("concat", 12, "off"), "model_ema"),
        ("beit", "inpainting", 12, ("concat", 12, "off"), "model"),
    ],
)
def test_feature__is_what_the_authors_probe(family, style, depth, feature, weights) -> None:
    model = make_mae(depth=depth)
    model.info = replace(model.info, family=family, style=style)
    assert feature_of(model) == feature
    assert weights_of(model) == weights
    assert feature_of(model, "class", 1, "off") == ("class", 1, "off")


def test_feature__of_swin_is_the_mean_of_patches() -> None:
    model, _, _ = load("simmim_swin")
    assert feature_of(model) == ("patches", sum(model.config.depths), "encoder")
    with pytest.raises(ValueError, match="no class token"):
        feature_of(model, "concat")
    with pytest.raises(ValueError, match="layer must lie between 1 and"):
        feature_of(model, layer=99)


def test_feature_vectors__are_pooled_after_a_block_by_hand(generator) -> None:
    model, images = make_mae(depth=3), some_images(generator, 2)
    with torch.no_grad():
        x = model.patch_embed(images) + model.pos_embed[:, 1:]
        x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(2, -1, -1), x], dim=1)
        x = model.blocks[1](model.blocks[0](x))
        mean = x[:, 1:].mean(dim=1)
        fresh = (mean - mean.mean(dim=1, keepdim=True)) / (mean.var(dim=1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        for feature, expected in {
            Feature("patches", 2, "fresh"): fresh,
            Feature("concat", 2, "off"): torch.cat([x[:, 0], mean], dim=1),
            Feature("class", 2, "encoder"): model.norm(x)[:, 0],
        }.items():
            torch.testing.assert_close(feature_vectors(model, images, feature)[0], expected)
        with pytest.raises(ValueError, match="layer must lie between 1 and 3"):
            model.encode(images, layer=4)


@pytest.mark.parametrize(
    ("family", "size", "expected"),
    [
        ("mae", 224, 0.875),
        ("mae", 448, 1.0),
        ("simmim_vit", 448, 0.875),
        ("bootmae", 224, 0.875),
        ("conmim", 384, 1.0),
        ("conmim", 256, 0.875),
        ("mae", 64, 1.0),
        ("simmim_vit", 32, 1.0),
    ],
)
def test_crop_pct__is_that_of_the_original(family: str, size: int, expected: float) -> None:
    model = make_mae()
    model.info = replace(model.info, family=family, image_size=size)
    assert crop_pct_of(model) == expected


@pytest.mark.parametrize(("size", "crop_pct", "border"), [(224, 0.875, False), (192, 0.875, False), (224, 1.0, True)])
def test_eight_bits__crops_what_the_original_crops(size: int, crop_pct: float, border: bool) -> None:
    """A white image of 256 px with a red border of 12 px, of which a crop of 7/8 leaves nothing."""
    pixels = np.full((256, 256, 3), 255, dtype=np.uint8)
    pixels[:12, :, 1:] = pixels[-12:, :, 1:] = pixels[:, :12, 1:] = pixels[:, -12:, 1:] = 0
    cropped = eight_bits(replace(make_mae().info, image_size=size), crop_pct)(Image.fromarray(pixels))
    assert cropped.shape == (3, size, size)
    assert bool((cropped[1] < 128).any()) == border
    # The originals resize the shorter side to int(size * 256 / 224) and cut out the centre.
    side = int(size / crop_pct)
    gradient = Image.fromarray(np.arange(256, dtype=np.uint8)[None, :, None].repeat(256, 0).repeat(3, 2))
    resized = np.asarray(gradient.resize((side, side), Image.Resampling.BICUBIC))
    start = round((side - size) / 2)
    expected = resized[start : start + size, start : start + size]
    found = eight_bits(replace(make_mae().info, image_size=size), crop_pct)(gradient)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


def test_pooled__refuses_a_class_token_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no class token"):
        pooled(torch.zeros(1, 4, 2), 0, "class")


def test_knn_scores__equal_a_slow_loop(generator) -> None:
    train, test = torch.randn(40, 5, generator=generator), torch.randn(7, 5, generator=generator)
    labels = torch.randint(4, (40,), generator=generator)
    votes = knn_scores(train, labels, test, 4, neighbours=6, temperature=0.2)
    for row, one in zip(test, votes, strict=True):
        cosines = [float(F.cosine_similarity(row, other, dim=0)) for other in train]
        slow = np.zeros(4)
        for index in sorted(range(40), key=lambda i: -cosines[i])[:6]:
            slow[labels[index]] += np.exp(cosines[index] / 0.2)
        np.testing.assert_allclose(one / one.sum(), slow / slow.sum(), rtol=1e-5)


def test_knn_scores__do_not_depend_on_the_chunk(generator, monkeypatch) -> None:
    train, test = torch.randn(30, 4, generator=generator), torch.randn(9, 4, generator=generator)
    labels = torch.randint(3, (30,), generator=generator)
    whole = knn_scores(train, labels, test, 3)
    monkeypatch.setattr("mto_analysis.probe.knn._MOST_VALUES", 61)
    torch.testing.assert_close(knn_scores(train, labels, test, 3), whole)


def test_linear_scores__tell_separable_classes_apart(generator) -> None:
    labels = torch.arange(60) % 3
    features = F.one_hot(labels, 5) * 100.0 + torch.randn(60, 5, generator=generator)
    assert accuracy(linear_scores(features, labels, features, 3).scores, labels) == 100


def test_linear_scores__are_at_chance_for_shuffled_labels(generator) -> None:
    train, test = torch.randn(2000, 8, generator=generator), torch.randn(2000, 8, generator=generator)
    labels, answers = (torch.randint(4, (2000,), generator=generator) for _ in range(2))
    assert 20 < accuracy(linear_scores(train, labels, test, 4).scores, answers) < 30
    assert 20 < accuracy(knn_scores(train, labels, test, 4), answers) < 30


def test_linear_scores__do_not_depend_on_the_scale_of_a_feature(generator) -> None:
    train = torch.randn(50, 3, generator=generator)
    labels = (train.sum(dim=1) > 0).long()
    scale, shift = torch.tensor([1e3, 1.0, 1e-1]), torch.tensor([5.0, -3.0, 0.0])
    one = linear_scores(train, labels, train, 2, penalty=0.01).scores
    two = linear_scores(train * scale + shift, labels, train * scale + shift, 2, penalty=0.01).scores
    torch.testing.assert_close(one, two, atol=2e-3, rtol=1e-3)


def test_logistic_regression__ends_where_the_gradient_vanishes(generator, monkeypatch) -> None:
    features = torch.randn(80, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (80,), generator=generator)
    monkeypatch.setattr("mto_analysis.training.evaluation.linear._MOST_VALUES", 50)  # several chunks
    problem = LogisticRegression(features, labels, 3, 0.1)
    found, steps, gap = problem.solve(1e-12, 50)
    found.requires_grad_()
    loss = F.cross_entropy(features @ found[:, :-1].T + found[:, -1], labels) + 0.05 * found[:, :-1].square().sum()
    torch.testing.assert_close(problem.value(found), loss)
    (gradient,) = torch.autograd.grad(loss, found)
    torch.testing.assert_close(problem.gradient(found.detach())[0], gradient)
    assert gradient.abs().max() < 1e-6
    assert steps < 10
    assert gap <= 1e-12


def test_logistic_regression__has_the_curvature_of_its_gradient(generator) -> None:
    features = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    problem = LogisticRegression(features, torch.arange(30) % 4, 4, 0.2)
    weight, direction = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    step = 1e-6
    ahead, behind = (problem.gradient(weight + sign * step * direction)[0] for sign in (1, -1))
    torch.testing.assert_close(
        problem.curvature(weight, direction), (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8
    )


def nearly_singular(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features whose variances span eight decades, as those of a random SimMIM encoder; classes hang on all of them."""
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(48, 48, generator=generator, dtype=torch.float64))
    scale = torch.logspace(0, -4, 48, dtype=torch.float64)
    latent = torch.randn(rows, 48, generator=generator, dtype=torch.float64)
    chances = (latent @ torch.randn(48, 5, generator=generator, dtype=torch.float64)).softmax(dim=1)
    return ((latent * scale) @ axes).float(), torch.multinomial(chances, 1, generator=generator)[:, 0]


def reference_scores(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, penalty: float) -> torch.Tensor:
    """scikit-learn's, converged: its objective is the sum of losses plus half the squared norm over C."""
    mean, variance = train.double().mean(dim=0), train.double().var(dim=0, unbiased=False)
    train, test = ((each.double() - mean) / (variance + 1e-6).sqrt() for each in (train, test))
    fit = Reference(C=1 / (penalty * len(train)), solver="newton-cholesky", tol=1e-10).fit(
        train.numpy(), labels.numpy()
    )
    return torch.from_numpy(fit.decision_function(test.numpy()))


def test_linear_scores__of_nearly_singular_features_agree_with_scikit_learn() -> None:
    features, labels = nearly_singular(3000)
    train, test = features[:2000], features[2000:]
    expected = reference_scores(train, labels[:2000], test, 1e-5)
    found = linear_scores(train, labels[:2000], test, 5)
    assert found.iterations < 20
    assert abs(accuracy(found.scores, labels[2000:]) - accuracy(expected, labels[2000:])) < 0.1
    chances, goal = found.scores.softmax(dim=1), expected.softmax(dim=1)
    assert (chances - goal).abs().max() < 5e-3
    again = linear_scores(train, labels[:2000], test, 5, iterations=1000)
    assert torch.equal(again.scores, found.scores)  # the cap says nothing above the tolerance


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("MAE", True),
        ("SimMIM", False),
        pytest.param("MAE", False, marks=pytest.mark.slow),
        pytest.param("SimMIM", True, marks=pytest.mark.slow),
    ],
)
def test_linear_scores__of_the_bundled_models_agree_with_scikit_learn(name: str, trained: bool) -> None:
    model = load_checkpoint(DEMO_CHECKPOINTS[name])
    model = model if trained else random_weights(model, 0)
    images = LabelledImages(str(DEMO_IMAGES))
    ((vectors, labels),) = extract_features(model, images, feature_of(model))
    train, test = vectors[::2], vectors[1::2]
    expected = reference_scores(train, labels[::2], test, 1e-3)
    found = linear_scores(train, labels[::2], test, 10, penalty=1e-3)
    assert accuracy(found.scores, labels[1::2]) == accuracy(expected, labels[1::2])
    assert (found.scores.softmax(dim=1) - expected.softmax(dim=1)).abs().max() < 5e-3


def test_linear_scores__warn_at_the_cap() -> None:
    features, labels = nearly_singular(200)
    with pytest.warns(UserWarning, match="not converged after 2 iterations"):
        found = linear_scores(features, labels, features, 5, iterations=2)
    assert found.iterations == 2
    assert found.gap > 1e-8


def test_normalized__equals_the_preprocessing_of_the_probe(sources, tiny_mae) -> None:
    pixels = LabelledImages(str(sources[0]), batch_size=5)
    images = torch.cat([batch for _, batch in pixels.batches(tiny_mae.info)])
    goal = torch.cat([batch.images for batch in image_batches(pixels.images, tiny_mae.info)])
    torch.testing.assert_close(normalized(images, tiny_mae.info), goal)


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_evaluator__finds_colours_and_leaves_no_trace(sources, protocol: str) -> None:
    model = make_mae().train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002 - the global state must not be touched
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    evaluator = Evaluator(Evaluation(protocol, *map(str, sources), pooling="patches", neighbours=3))
    assert evaluator.score(model) == 100
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])  # noqa: NPY002
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_evaluator__reads_images_once(sources, tiny_mae, tiny_simmim, monkeypatch) -> None:
    evaluator = Evaluator(Evaluation("knn", *map(str, sources)))
    first = evaluator.evaluate(tiny_mae)
    monkeypatch.setattr(type(evaluator.train.images), "open", lambda *_: pytest.fail("read again"))
    assert evaluator.evaluate(tiny_mae).top1 == first.top1
    evaluator.evaluate(tiny_simmim)


def test_evaluator__gives_the_same_for_any_number_of_workers(sources, tiny_mae) -> None:
    features = [
        extract_features(
            tiny_mae, LabelledImages(str(sources[0]), batch_size=7, num_workers=workers), feature_of(tiny_mae)
        )[0]
        for workers in (0, 2)
    ]
    assert torch.equal(features[0].vectors, features[1].vectors)


def test_evaluator__reads_the_chosen_feature_and_says_so(sources, tiny_simmim) -> None:
    chosen = {"pooling": "concat", "layer": 2, "norm": "off"}
    evaluator = Evaluator(Evaluation("linear", *map(str, sources), **chosen, penalty=1e-2))
    result = evaluator.evaluate(tiny_simmim)
    assert result.feature == Feature(**chosen)
    assert result.iterations is not None
    assert 0 < result.iterations < 20
    with pytest.raises(ValueError, match="layer must lie between 1 and 3"):
        score(tiny_simmim, Evaluation("knn", *map(str, sources), layer=4))


def test_batches__are_shared_out_whole(sources, tiny_mae) -> None:
    pixels = LabelledImages(str(sources[0]), batch_size=7)
    whole = dict(pixels.batches(tiny_mae.info))
    shares = [dict(pixels.batches(tiny_mae.info, process, 3)) for process in range(3)]
    assert sorted(number for share in shares for number in share) == sorted(whole)
    for share in shares:
        for number, images in share.items():
            assert torch.equal(images, whole[number])


def test_evaluator__reports_top5_for_more_than_five_classes(tmp_path, tiny_mae) -> None:
    train, test = (str(write_parquet(tmp_path / f"{n}.parquet", 24, 6, seed=n)) for n in (1, 2))
    result = Evaluator(Evaluation("knn", train, test, neighbours=24)).evaluate(tiny_mae)
    assert result.top5 is not None
    assert result.top5 >= result.top1
    assert Evaluator(Evaluation("knn", train, test, limit=23)).train.labels.shape == (23,)


def test_evaluator__refuses_other_classes(tmp_path) -> None:
    train, test = write_parquet(tmp_path / "a.parquet"), write_parquet(tmp_path / "b.parquet", 12, 4)
    with pytest.raises(DataError, match=r"b\.parquet"):
        Evaluator(Evaluation("knn", str(train), str(test)))


def test_check_classes__numbers_beside_names_are_reported_or_refused() -> None:
    def images(labels: list[int], *names: str) -> Any:
        return SimpleNamespace(labels=torch.tensor(labels), class_names=names, source="ab"[bool(names)])

    with pytest.warns(UserWarning, match="a has numbers of classes and no names: 0 is taken for 'cat' of b"):
        assert check_classes(images([0, 1], "cat", "dog"), images([1])) == 2
    with pytest.warns(UserWarning, match="0 is taken for '0'"):
        assert check_classes(images([0, 1]), images([1, 1], "0", "1")) == 2
    with pytest.raises(DataError, match=r"b has folders or names 0, 1, 10 \.\.\., sorted as text, and a has numbers"):
        check_classes(images([0, 1, 2], "0", "1", "10"), images([1]))


def test_evaluator__refuses_images_without_labels(image_folder) -> None:
    listed = image_folder / "list.txt"
    listed.write_text("c.png\nA.png\n")
    with pytest.raises(DataError, match="has no labels"):
        Evaluator(Evaluation("knn", str(listed), str(listed)))


def test_evaluator__refuses_a_family_without_encoder(sources) -> None:
    with pytest.raises(DataError, match="no encoder"):
        score(make_two_stacks(), Evaluation("knn", *map(str, sources)))


def test_evaluator__names_the_image_of_a_feature_that_is_not_finite(sources, tiny_mae) -> None:
    with torch.no_grad():
        tiny_mae.norm.weight[0] = torch.nan
    with pytest.raises(NumericalError, match="image 0"):
        score(tiny_mae, Evaluation("knn", *map(str, sources)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "finetune"}, "protocol must be"),
        ({"pooling": "mean"}, "pooling must be"),
        ({"precision": "float16"}, "precision must be"),
        ({"neighbours": 0}, "at least 1"),
        ({"limit": 0}, "at least 1"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"penalty": 0.0}, "penalty must be"),
        ({"tolerance": 0.0}, "tolerance must be"),
        ({"norm": "batch"}, "norm must be"),
        ({"layer": 0}, "at least 1"),
        ({"crop_pct": 1.5}, "crop_pct must lie"),
    ],
)
def test_evaluation__checks_its_values(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluation(**{"protocol": "knn", "train": "a", "test": "b", **changes})
