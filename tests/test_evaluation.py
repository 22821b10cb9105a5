"""Encoders of whole images, kNN, the linear classifier on cached features, and the evaluator that keeps images."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_images import write_parquet
from test_parity import load
from tiny_models import make_mae, make_simmim, make_two_stacks, some_images
from torch.nn import functional as F

from mto_analysis.errors import DataError, NumericalError
from mto_analysis.images import image_batches
from mto_analysis.training.evaluation import Evaluation, Evaluator, score
from mto_analysis.training.evaluation.evaluator import accuracy
from mto_analysis.training.evaluation.features import LabelledImages, extract_features, normalized, pooled
from mto_analysis.training.evaluation.knn import knn_scores
from mto_analysis.training.evaluation.linear import fit_linear, linear_scores
from mto_analysis.training.evaluation.protocols import pooling_of


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


def test_pooling__is_what_the_authors_probe() -> None:
    assert pooling_of(make_mae()) == "class"
    assert pooling_of(make_simmim()) == "patches"
    assert pooling_of(load("bootmae")[0]) == "patches"
    assert pooling_of(load("simmim_swin")[0]) == "patches"


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
    monkeypatch.setattr("mto_analysis.training.evaluation.knn._MOST_VALUES", 61)
    torch.testing.assert_close(knn_scores(train, labels, test, 3), whole)


def test_linear_scores__tell_separable_classes_apart(generator) -> None:
    labels = torch.arange(60) % 3
    features = F.one_hot(labels, 5) * 100.0 + torch.randn(60, 5, generator=generator)
    assert accuracy(linear_scores(features, labels, features, 3), labels) == 100


def test_linear_scores__are_at_chance_for_shuffled_labels(generator) -> None:
    train, test = torch.randn(2000, 8, generator=generator), torch.randn(2000, 8, generator=generator)
    labels, answers = (torch.randint(4, (2000,), generator=generator) for _ in range(2))
    assert 20 < accuracy(linear_scores(train, labels, test, 4), answers) < 30
    assert 20 < accuracy(knn_scores(train, labels, test, 4), answers) < 30


def test_linear_scores__do_not_depend_on_the_scale_of_a_feature(generator) -> None:
    train = torch.randn(50, 3, generator=generator)
    labels = (train.sum(dim=1) > 0).long()
    scale, shift = torch.tensor([1e3, 1.0, 1e-1]), torch.tensor([5.0, -3.0, 0.0])
    one = linear_scores(train, labels, train, 2, penalty=0.01)
    two = linear_scores(train * scale + shift, labels, train * scale + shift, 2, penalty=0.01)
    torch.testing.assert_close(one, two, atol=2e-3, rtol=1e-3)


def test_fit_linear__ends_where_the_gradient_vanishes(generator, monkeypatch) -> None:
    features = torch.randn(80, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (80,), generator=generator)
    monkeypatch.setattr("mto_analysis.training.evaluation.linear._MOST_VALUES", 50)  # several chunks
    weight, bias = (x.requires_grad_() for x in fit_linear(features, labels, 3, penalty=0.1, iterations=200))
    loss = F.cross_entropy(features @ weight.T + bias, labels) + 0.05 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 1e-5


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
        extract_features(tiny_mae, LabelledImages(str(sources[0]), batch_size=7, num_workers=workers), "class")
        for workers in (0, 2)
    ]
    assert torch.equal(features[0].vectors, features[1].vectors)


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
    ],
)
def test_evaluation__checks_its_values(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluation(**{"protocol": "knn", "train": "a", "test": "b", **changes})
