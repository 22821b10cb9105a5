"""Training of classifiers: rates by layer, LARS, what learns, and runs that do not depend on the machine."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_images import write_parquet
from PIL import Image
from pretraining_cases import Stopped, rows, same, stop_after
from test_parity import load
from tiny_models import make_mae, make_simmim, make_two_stacks, some_images
from torch import nn
from torch.nn import functional as F

from mto_analysis.errors import CheckpointError, DataError, NumericalError
from mto_analysis.training import RunSettings
from mto_analysis.training.evaluation.augmented import AugmentedData
from mto_analysis.training.evaluation.classifier import build_classifier, build_optimizer, layer_of
from mto_analysis.training.evaluation.classifier_settings import ClassifierSettings, finetune_settings, linear_settings
from mto_analysis.training.evaluation.classifier_training import (
    ClassifierObjective,
    TestAccuracy,
    classifier_score,
    train_classifier,
)
from mto_analysis.training.evaluation.features import LabelledImages, normalized
from mto_analysis.training.evaluation.protocols import feature_of
from mto_analysis.training.methods import METHODS, method_of


def settings(protocol: str = "finetune", **changes: Any) -> ClassifierSettings:
    chosen = {"pooling": "patches", "epochs": 3, "batch_size": 8, "base_lr": 0.05, "warmup_epochs": 1.0}
    if protocol == "finetune":
        chosen |= {"weight_decay": 0.05, "layer_decay": 0.5, "drop_path": 0.2, "mixup": 0.8, "cutmix": 1.0}
        chosen |= {"auto_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.25, "smoothing": 0.1}
    return ClassifierSettings(protocol=protocol, **(chosen | changes))


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[LabelledImages, LabelledImages]:
    train, test = write_parquet(tmp_path / "train.parquet"), write_parquet(tmp_path / "test.parquet", 12, seed=1)
    return LabelledImages(str(train)), LabelledImages(str(test))


def state_of(folder: Path, name: str = "classifier.pth") -> dict[str, Any]:
    return torch.load(folder / name, weights_only=True)


def run(device: str = "cpu", **changes: Any) -> RunSettings:
    return RunSettings(device=device, **changes)


def train(model: Any, labelled: Any, chosen: ClassifierSettings, folder: Path, **more: Any) -> Any:
    return train_classifier(model, *labelled, chosen, folder, more.pop("run", run()), **more)


def assert_same_runs(one: Path, two: Path) -> None:
    assert same(state_of(one), state_of(two))
    assert rows(one / "metrics.csv") == rows(two / "metrics.csv")


def test_layers__are_those_of_electra_by_hand() -> None:
    classifier = build_classifier(make_mae(), settings(layer_decay=0.5), 3)  # 2 blocks
    layers = {name: layer_of(classifier, name) for name, p in classifier.named_parameters() if p.requires_grad}
    assert layers["encoder.cls_token"] == layers["encoder.pos_embed"] == layers["encoder.patch_embed.proj.weight"] == 0
    assert layers["encoder.blocks.0.attn.qkv.weight"] == 1
    assert layers["encoder.blocks.1.mlp.fc2.bias"] == 2
    assert layers["head.0.weight"] == layers["head.1.weight"] == 3
    optimizer = build_optimizer(classifier, settings(layer_decay=0.5))
    scales = {id(p): (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(scales) == len(layers)
    for name, expected in {
        "encoder.cls_token": (0.125, 0.0),
        "encoder.pos_embed": (0.125, 0.0),
        "encoder.patch_embed.proj.weight": (0.125, 0.05),
        "encoder.blocks.0.attn.qkv.weight": (0.25, 0.05),
        "encoder.blocks.1.attn.qkv.weight": (0.5, 0.05),
        "encoder.blocks.1.attn.qkv.bias": (0.5, 0.0),
        "head.1.weight": (1.0, 0.05),
    }.items():
        assert scales[id(classifier.get_parameter(name))] == expected


def test_layers__of_a_position_bias_are_those_of_its_block() -> None:
    model = make_simmim()  # one bias for all three blocks
    classifier = build_classifier(model, settings(), 3)
    names = [name for name, _ in classifier.named_parameters() if "position_biases" in name]
    assert [layer_of(classifier, name) for name in names] == [1, 2, 3]
    frozen = build_classifier(model, settings("linear_mae"), 3)
    images = some_images(torch.Generator().manual_seed(0), 2)
    with torch.no_grad():
        torch.testing.assert_close(classifier.eval().encoder.encode(images), frozen.eval().encoder.encode(images))


GROUPS = {
    "mae": (
        {"encoder.patch_embed.proj.weight", "head.1.weight"},
        {"encoder.cls_token", "encoder.pos_embed"},
        set(),
    ),
    "simmim": (
        {"encoder.patch_embed.proj.weight", "encoder.position_biases.1.relative_position_bias_table", "head.1.weight"},
        {"encoder.cls_token"},
        set(),
    ),
    "bootmae": (
        {"encoder.patch_embed.proj.weight", "head.1.weight"},
        {"encoder.cls_token"},
        {"encoder.pos_embed"},
    ),
    "conmim": (
        {"encoder.patch_embed.proj.weight", "encoder.position_biases.1.relative_position_bias_table", "head.1.weight"},
        {"encoder.cls_token"},
        set(),
    ),
    "simmim_swin": (
        {"encoder.patch_embed.proj.weight", "encoder.merges.0.reduction.weight", "head.1.weight"},
        {"encoder.stages.0.1.position_bias.relative_position_bias_table"},
        set(),
    ),
}


@pytest.mark.parametrize("family", GROUPS)
def test_groups__are_those_of_each_original(family: str) -> None:
    """Matrices of blocks decay, what has one axis does not, in all of them; the rest is listed for each."""
    decayed, undecayed, frozen = GROUPS[family]
    model = {"mae": make_mae, "simmim": make_simmim}.get(family, lambda: load(family)[0])()
    chosen = finetune_settings(model)
    classifier = build_classifier(model, chosen, 3)
    groups = build_optimizer(classifier, chosen).param_groups
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    parameters = dict(classifier.named_parameters())
    assert {name for name in frozen if parameters[name].requires_grad} == set()
    assert {name: decays[id(parameters[name])] for name in decayed | undecayed} == {
        **dict.fromkeys(decayed, 0.05),
        **dict.fromkeys(undecayed, 0.0),
    }
    tables = {name for name in parameters if name.endswith("relative_position_bias_table")}
    for name, parameter in parameters.items():
        if id(parameter) in decays and name not in decayed | undecayed | tables:
            assert decays[id(parameter)] == (0.0 if parameter.ndim == 1 else 0.05), name
    assert len({decays[id(parameters[name])] for name in tables}) == bool(tables)


def test_undecayed__of_swin_v2_are_its_network_of_positions_and_its_scale() -> None:
    model, _, _ = load("simmim_swin")
    model = type(model)(replace(model.config, version=2), model.info)
    chosen = finetune_settings(model)
    classifier = build_classifier(model, chosen, 3)
    groups = build_optimizer(classifier, chosen).param_groups
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    found = {n: decays[id(p)] for n, p in classifier.named_parameters() if "position_bias" in n or "logit_scale" in n}
    assert set(found.values()) == {0.0}
    assert any("mlp" in name for name in found)


def test_layers__of_swin_put_merges_with_the_block_before() -> None:
    model, _, _ = load("simmim_swin")
    classifier = build_classifier(model, settings(), 3)
    depths = model.config.depths
    assert layer_of(classifier, "encoder.merges.0.reduction.weight") == depths[0]
    assert layer_of(classifier, "encoder.merges.1.reduction.weight") == depths[0] + depths[1]
    assert layer_of(classifier, "encoder.norm.weight") == sum(depths) + 1
    assert layer_of(classifier, "encoder.patch_embed.proj.weight") == 0


def test_classifier__learns_only_what_logits_depend_on(tiny_model) -> None:
    classifier = build_classifier(tiny_model, settings(), 3)
    learning = {name for name, p in classifier.named_parameters() if p.requires_grad}
    assert not any("mask_token" in name or "decoder" in name for name in learning)
    assert "encoder.norm.weight" not in learning  # the mean of patches has a norm of its own
    assert any("blocks.0" in name for name in learning)
    assert all(p.requires_grad for name, p in tiny_model.named_parameters() if "pos_embed" not in name)


def test_classifier__of_the_linear_probe_freezes_the_encoder(tiny_mae, generator) -> None:
    classifier = build_classifier(tiny_mae, settings("linear_mae", pooling="class"), 3).train()
    assert {name for name, p in classifier.named_parameters() if p.requires_grad} == {"head.1.weight", "head.1.bias"}
    assert not any(module.training for module in classifier.encoder.modules())
    images = some_images(generator, 6)
    with torch.no_grad():
        token = tiny_mae.encode(images)[:, 0]
    normed = (token - token.mean(dim=0)) / (token.var(dim=0, unbiased=False) + 1e-6).sqrt()
    linear = classifier.head[1]
    torch.testing.assert_close(classifier(images), normed @ linear.weight.T + linear.bias, atol=1e-5, rtol=1e-4)


def test_drop_path__grows_with_the_block() -> None:
    classifier = build_classifier(make_simmim(), settings(drop_path=0.2), 3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in classifier.encoder.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_lars__takes_the_step_of_mae(tiny_mae) -> None:
    chosen = settings("linear_mae", pooling="class", base_lr=3.0)
    classifier = build_classifier(tiny_mae, chosen, 3)
    optimizer = build_optimizer(classifier, chosen)
    weight, bias = classifier.head[1].weight, classifier.head[1].bias
    for group in optimizer.param_groups:
        group["lr"] = 0.7
    momentum = {id(weight): torch.zeros_like(weight), id(bias): torch.zeros_like(bias)}
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        expected = []
        for parameter in (weight, bias):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            step = parameter.grad.clone()
            if parameter.ndim > 1:
                step *= 0.001 * parameter.detach().norm() / step.norm()
            momentum[id(parameter)] = 0.9 * momentum[id(parameter)] + step
            expected.append(parameter.detach() - 0.7 * momentum[id(parameter)])
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected[0])
        torch.testing.assert_close(bias.detach(), expected[1])


def test_learning_rate__warms_up_and_falls_along_a_cosine() -> None:
    chosen = settings(epochs=11, warmup_epochs=1.0, base_lr=0.32, batch_size=512, min_lr=0.04)
    objective = ClassifierObjective(build_classifier(make_mae(), chosen, 3), chosen)

    def rate(epoch: float) -> float:
        return objective.rate(round(epoch * 8), steps_per_epoch=8)

    assert rate(0.5) == pytest.approx(0.32)
    assert rate(1.0) == pytest.approx(0.64)
    assert rate(6.0) == pytest.approx(0.34)
    assert rate(11.0) == pytest.approx(0.04)
    assert rate(3.5) == pytest.approx(0.04 + 0.6 * 0.5 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize("schedule", ["simmim", "bootmae", "conmim"])
def test_learning_rate__of_fine_tuning_is_that_of_the_method(schedule: str) -> None:
    """SimMIM's cosine counts from the start of the run and lags by a step; BEiT's warm-up ends at the peak."""
    chosen = settings(epochs=10, warmup_epochs=2.0, base_lr=1.0, batch_size=256, min_lr=0.1, warmup_lr=0.01)
    chosen = replace(chosen, schedule=schedule)
    objective = ClassifierObjective(build_classifier(make_mae(), chosen, 3), chosen)
    steps, warmup, total = 4, 8, 40
    for step in range(total):
        if schedule == "simmim":
            done = max(step - 1, 0)
            cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * done / total)) / 2
            expected = 0.01 + 0.99 * done / warmup if done < warmup else cosine
        else:
            cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
            expected = float(np.linspace(0.01, 1.0, warmup)[step]) if step < warmup else cosine
        assert objective.rate(step, steps) == pytest.approx(expected), step


def test_train_classifier__scores_the_moving_average(labelled, tmp_path) -> None:
    """Weights average as ema = 0.9 * ema + 0.1 * weights, begun at those after the second step."""
    chosen = settings(ema=0.9, drop_path=0.0, epochs=2, base_lr=0.5)
    averages: list[Any] = []

    class Recording(TestAccuracy):
        def score(self, trained: Any) -> Any:
            found = super().score(trained)
            averages.append((trained.ema.module, found["score"]))
            return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mto_analysis.training.evaluation.classifier_training.TestAccuracy", Recording)
        *_, last = train(make_mae(), labelled, chosen, tmp_path)
    average, score = averages[-1]
    assert last.score == score
    saved = state_of(tmp_path)
    assert saved["classifier_average"].keys() == saved["classifier"].keys()
    assert not same(saved["classifier_average"], saved["classifier"])
    images = torch.cat([batch for _, batch in labelled[1].batches(average.encoder.info)])
    with torch.no_grad():
        right = average(normalized(images, average.encoder.info)).argmax(dim=1) == labelled[1].labels
    assert last.score == pytest.approx(100 * right.double().mean().item())


def test_train_classifier__clips_each_micro_batch_as_simmim_does(labelled, tmp_path) -> None:
    """What was clipped and the next micro-batch's gradient are clipped together; gradients themselves are the same."""
    chosen = settings(mixup=0.0, cutmix=0.0, drop_path=0.0, erasing=0.0, warmup_epochs=0.0, epochs=1, batch_size=24)
    sums: list[tuple[torch.Tensor, torch.Tensor]] = []
    clip = nn.utils.clip_grad_norm_

    def recorded(parameters: Any, most: float) -> Any:
        before = torch.cat([parameter.grad.flatten() for parameter in parameters])
        norm = clip(parameters, most)
        sums.append((before, torch.cat([parameter.grad.flatten() for parameter in parameters])))
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.utils.clip_grad_norm_", recorded)
        for name, each in (("each", True), ("once", False)):
            again = replace(chosen, clip_grad=1e-3, clip_micro_batches=each)
            list(train(make_mae(), labelled, again, tmp_path / name, run=run(accumulation=3)))
    (first, one), (second, two), (third, _), (whole, _) = sums
    torch.testing.assert_close(first + (second - one) + (third - two), whole, rtol=1e-4, atol=1e-6)
    for before, after in sums:
        torch.testing.assert_close(after, before * (1e-3 / before.norm()), rtol=1e-3, atol=1e-8)
    assert not same(state_of(tmp_path / "each")["classifier"], state_of(tmp_path / "once")["classifier"])


def test_train_classifier__clips_scaled_gradients_to_the_same_norm(labelled, tmp_path) -> None:
    chosen = settings(mixup=0.0, cutmix=0.0, drop_path=0.0, erasing=0.0, warmup_epochs=0.0, epochs=1, batch_size=24)
    norms: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.utils.clip_grad_norm_", lambda each, most: norms.append(most) or torch.zeros(()))
        again = replace(chosen, clip_grad=1e-3, clip_micro_batches=True)
        list(train(make_mae(), labelled, again, tmp_path / "half", run=run(accumulation=2, precision="fp16")))
    assert norms == [1e-3 * 65536, 1e-3]


@pytest.mark.parametrize("protocol", ["linear_mae", "finetune"])
def test_train_classifier__goes_on_exactly_after_a_stop(labelled, tmp_path, protocol) -> None:
    chosen, model = settings(protocol), make_mae()
    whole = list(train(model, labelled, chosen, tmp_path / "whole"))
    stopped = train(model, labelled, chosen, tmp_path / "stopped")
    next(stopped)
    stopped.close()  # as a kill after the first epoch
    assert (tmp_path / "stopped" / "last.pth").exists()
    torch.manual_seed(99)  # nothing hangs on global state
    again = list(train(model, labelled, chosen, tmp_path / "stopped"))
    assert [record.epoch for record in again] == [2, 3]
    assert_same_runs(tmp_path / "whole", tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "last.pth").exists()
    assert [record.score for record in whole[1:]] == [record.score for record in again]
    assert [row["epoch"] for row in rows(tmp_path / "stopped" / "metrics.csv") if row["kind"] == "epoch"] == list("123")
    assert list(train(model, labelled, chosen, tmp_path / "stopped")) == []  # complete
    assert classifier_score(tmp_path / "stopped")[0] == whole[-1].score


def test_train_classifier__goes_on_within_an_epoch(labelled, tmp_path) -> None:
    chosen, steps = settings(), run(save_steps=1)
    list(train(make_mae(), labelled, chosen, tmp_path / "whole", run=steps))
    stopped = train_classifier(make_mae(), *labelled, chosen, tmp_path / "cut", steps, on_step=stop_after(2))
    with pytest.raises(Stopped):
        list(stopped)
    list(train(make_mae(), labelled, chosen, tmp_path / "cut", run=steps))
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_train_classifier__does_not_depend_on_workers(labelled, tmp_path) -> None:
    for workers in (0, 2):
        chosen, own = settings(epochs=1), run(num_workers=workers)
        list(train(make_mae(), labelled, chosen, tmp_path / str(workers), run=own))
    assert_same_runs(tmp_path / "0", tmp_path / "2")


def test_train_classifier__accumulates_to_the_same_step(labelled, tmp_path) -> None:
    """Without mixup, whose pairs lie in a micro-batch, halves of a batch make the same step to rounding."""
    chosen = settings(mixup=0.0, cutmix=0.0, drop_path=0.0, epochs=2)
    losses = [
        [
            record.loss
            for record in train(make_mae(), labelled, chosen, tmp_path / str(parts), run=run(accumulation=parts))
        ]
        for parts in (1, 4)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_train_classifier__leaves_model_and_random_state_alone(labelled, tmp_path) -> None:
    model = make_simmim().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(train(model, labelled, settings(epochs=1), tmp_path))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_train_classifier__learns_colours(labelled, tmp_path) -> None:
    chosen = settings("linear_mae", epochs=30, base_lr=900.0, warmup_epochs=2.0)
    *_, last = train(make_mae(), labelled, chosen, tmp_path, test_every=30)
    assert last.score == 100
    assert last.top5 is None


def test_train_classifier__refuses_another_setting_or_model(labelled, tmp_path) -> None:
    chosen = settings("linear_mae")
    next(train(make_mae(), labelled, chosen, tmp_path))
    changed = r"another run: classifier\.base_lr was 0\.05 and is now 0\.2;.*--overwrite"
    with pytest.raises(CheckpointError, match=changed):
        next(train(make_mae(), labelled, replace(chosen, base_lr=0.2), tmp_path))
    with pytest.raises(CheckpointError, match="another run: weights was"):
        next(train(make_mae(seed=5), labelled, chosen, tmp_path))
    with pytest.raises(CheckpointError, match="another run: seed was 0 and is now 1"):
        next(train(make_mae(), labelled, chosen, tmp_path, run=run(seed=1)))
    next(train(make_mae(seed=5), labelled, chosen, tmp_path, overwrite=True))


def test_train_classifier__refuses_a_damaged_file_and_one_of_an_older_version(labelled, tmp_path) -> None:
    chosen, last, metadata = settings("linear_mae"), tmp_path / "last.pth", tmp_path / "run.json"
    next(train(make_mae(), labelled, chosen, tmp_path))
    stored = json.loads(metadata.read_text())
    older = {name: value for name, value in stored["identity"].items() if name != "randomness"}
    metadata.write_text(json.dumps({**stored, "identity": older, "versions": {"mto-analysis": "0.0.7"}}))
    with pytest.raises(CheckpointError, match=r"written by mto-analysis 0\.0\.7, which samples other random numbers"):
        next(train(make_mae(), labelled, chosen, tmp_path))
    metadata.write_text(json.dumps(stored))
    torch.save({"rows": []}, last)
    with pytest.raises(CheckpointError, match="no state to resume from"):
        next(train(make_mae(), labelled, chosen, tmp_path))
    last.write_bytes(last.read_bytes()[:300])
    with pytest.raises(CheckpointError, match="is damaged"):
        next(train(make_mae(), labelled, chosen, tmp_path))


def test_train_classifier__names_the_step_of_a_loss_that_is_not_finite(labelled, tmp_path) -> None:
    model = make_mae()
    with torch.no_grad():
        model.norm.bias[0] = torch.inf
    with pytest.raises(NumericalError, match=r"cross_entropy is nan at step 1 \(epoch 0\)"):
        list(train(model, labelled, settings("linear_mae"), tmp_path))


def test_train_classifier__refuses_what_does_not_fit(labelled, tmp_path) -> None:
    with pytest.raises(DataError, match="24 images do not fill one batch of 64"):
        next(train(make_mae(), labelled, settings(batch_size=64), tmp_path))
    with pytest.raises(ValueError, match="cannot be shared"):
        next(train(make_mae(), labelled, settings(), tmp_path, run=run(accumulation=3)))
    with pytest.raises(ValueError, match="must be even"):
        next(train(make_mae(), labelled, settings(batch_size=9), tmp_path))
    with pytest.raises(DataError, match="no encoder"):
        next(train(make_two_stacks(), labelled, settings(), tmp_path))
    assert list(tmp_path.glob("*.pth")) == []


def test_augmented_data__holds_the_same_images_however_shared_out(labelled) -> None:
    data = AugmentedData(labelled[0], make_mae().info, settings(mixup=0.0, cutmix=0.0), 3, seed=3)
    whole = list(data.micro_batches(2, micro_batch=8))
    halves = [list(data.micro_batches(2, micro_batch=4, process=process, processes=2)) for process in (0, 1)]
    parts = list(data.micro_batches(2, micro_batch=4, accumulation=2, skip_steps=1))
    assert len(whole) == 3
    for number, (images, labels) in enumerate(whole):
        assert torch.equal(images, torch.cat([half[number].images for half in halves]))
        assert torch.equal(labels, torch.cat([half[number].targets for half in halves]))
    assert torch.equal(whole[1].images, torch.cat([part.images for part in parts[:2]]))


def test_augmented_data__mixes_by_seed_and_step_alone(labelled) -> None:
    data = AugmentedData(labelled[0], make_mae().info, settings(), 3, seed=3)
    first, again = (list(data.micro_batches(2, micro_batch=8)) for _ in range(2))
    (later,) = data.micro_batches(2, micro_batch=8, skip_steps=2)
    assert all(torch.equal(one.images, two.images) for one, two in zip(first, again, strict=True))
    assert torch.equal(first[2].images, later.images)
    assert torch.equal(first[2].targets, later.targets)
    assert first[0].targets.shape == (8, 3)
    torch.testing.assert_close(first[0].targets.sum(dim=1), torch.ones(8))


def test_augmentation__bears_every_strength_of_posterize(labelled) -> None:
    chosen = settings(auto_augment="rand-m10-n6-mstd0.0-inc1", mixup=0.0, cutmix=0.0)
    data = AugmentedData(labelled[0], make_mae().info, chosen, 3)
    for epoch in range(4):
        for batch in data.micro_batches(epoch, micro_batch=24):
            assert batch.images.isfinite().all()


@pytest.mark.parametrize(("clamped", "area", "full"), [(True, 0.5186, 0.2628), (False, 0.4301, 0.005)])
def test_crops__of_the_linear_probe_are_maes(labelled, clamped: bool, area: float, full: float) -> None:
    """Areas of crops of 500 x 375 px, and the share that is as high as the image, by their distributions."""
    rng = np.random.default_rng(0)
    wanted = rng.uniform(0.08, 1, 200_000) * 500 * 375
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 200_000))
    height, width = np.rint(np.sqrt(wanted / ratio)), np.rint(np.sqrt(wanted * ratio))
    fits = (height <= 375) & (width <= 500)
    height, width = (np.minimum(height, 375), np.minimum(width, 500)) if clamped else (height[fits], width[fits])
    assert (height * width).mean() / (500 * 375) == pytest.approx(area, abs=0.004)
    assert (height == 375).mean() == pytest.approx(full, abs=0.004)
    chosen = settings("linear_mae", clamp_crop=clamped)
    first = AugmentedData(labelled[0], make_mae().info, chosen, 3)._transform.transforms[0]
    image = Image.new("RGB", (500, 375))
    torch.manual_seed(0)
    random.seed(0)
    crops = np.array([first.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(6000)])
    top, left, height, width = crops.T
    assert ((top + height <= 375) & (left + width <= 500) & (top >= 0) & (left >= 0)).all()
    assert (height * width).mean() / (500 * 375) == pytest.approx(area, abs=0.015)
    assert (height == 375).mean() == pytest.approx(full, abs=0.02)


def test_crops__follow_the_method_and_the_size() -> None:
    large = {"image_size": 128, "patch_size": 16}
    assert linear_settings(make_mae(**large)).clamp_crop
    assert linear_settings(make_mae()).clamp_crop
    assert not finetune_settings(make_mae(**large)).clamp_crop
    assert linear_settings(make_mae(**large)).crop_pct == finetune_settings(make_simmim(**large)).crop_pct == 0.875
    assert linear_settings(make_mae()).crop_pct == 1


def test_settings__of_wide_encoders_are_published_too() -> None:
    wide = {"image_size": 128, "patch_size": 16, "dim": 1024, "num_heads": 16, "depth": 1}
    model = make_mae(**wide)
    assert linear_settings(model).epochs == finetune_settings(model).epochs == 50
    model.info = replace(model.info, family="bootmae")
    probe = linear_settings(model)
    assert (probe.epochs, probe.base_lr, probe.norm) == (50, 0.07, "fresh")
    assert (finetune_settings(model).ema, finetune_settings(model).freeze_positions) == (0.9998, True)


def test_settings__are_those_of_the_paper() -> None:
    large = {"image_size": 128, "patch_size": 16}
    mae, simmim = finetune_settings(make_mae(**large)), finetune_settings(make_simmim(**large))
    assert (mae.base_lr, mae.lr_batch, mae.layer_decay, mae.batch_size, mae.epochs) == (1e-3, 256, 0.75, 1024, 100)
    assert (simmim.learning_rate, simmim.layer_decay, simmim.batch_size) == (5e-3, 0.9, 2048)
    probe = linear_settings(make_mae(**large))
    assert (probe.learning_rate, probe.epochs, probe.warmup_epochs, probe.weight_decay) == (6.4, 90, 10, 0)
    assert finetune_settings(make_mae()).batch_size == 256  # 16 px: for small images
    assert (simmim.schedule, simmim.warmup_lr, simmim.clip_micro_batches) == ("simmim", 1e-6, True)
    assert (mae.schedule, mae.clip_micro_batches, mae.ema, mae.freeze_positions) == ("mae", False, None, False)


def test_settings__are_read_from_text() -> None:
    changed = settings().with_options({"epochs": "7", "betas": "0.9,0.95", "auto_augment": "none"})
    assert (changed.epochs, changed.betas, changed.auto_augment) == (7, (0.9, 0.95), None)
    with pytest.raises(ValueError, match="no setting is called 'epoch'"):
        settings().with_options({"epoch": "7"})
    with pytest.raises(ValueError, match="epochs must be a whole number"):
        settings().with_options({"epochs": "many"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "mean"}, "pooling must be"),
        ({"epochs": 0}, "at least 1"),
        ({"warmup_epochs": 4.0}, "warmup_epochs must lie"),
        ({"layer_decay": 0.0}, "layer_decay must lie"),
        ({"drop_path": 1.0}, "drop_path must lie"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale must not fall"),
        ({"base_lr": 0.0}, "base_lr must be above 0"),
    ],
)
def test_settings__check_their_values(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_finetuning__starts_from_a_fresh_norm_of_the_mean(tiny_mae, generator) -> None:
    classifier = build_classifier(tiny_mae, settings(), 3).eval()
    images = some_images(generator, 2)
    with torch.no_grad():
        mean = tiny_mae.encode(images, norm=False)[:, 1:].mean(dim=1)
        expected = F.linear(F.layer_norm(mean, mean.shape[1:], eps=1e-6), classifier.head[1].weight)
        torch.testing.assert_close(classifier(images), expected, atol=1e-7, rtol=1e-3)
    assert isinstance(classifier.head[0], nn.LayerNorm)
    assert float(classifier.head[1].weight.detach().std()) < 1e-4


@pytest.mark.parametrize(
    ("family", "style", "method"),
    [
        ("mae", "decoder", "mae"),
        ("simmim_swin", "inpainting", "simmim"),
        ("bootmae", "decoder", "bootmae"),
        ("conmim", "inpainting", "conmim"),
        ("beit", "inpainting", "conmim"),
        ("mff", "decoder", "mae"),
    ],
)
def test_settings__are_on_the_class_of_the_method(family, style, method) -> None:
    model = make_mae()
    model.info = replace(model.info, family=family, style=style)
    assert method_of(model) is METHODS[method]
    assert feature_of(model).pooling == {"mae": "class", "conmim": "concat"}.get(method, "patches")
    assert finetune_settings(model).clip_grad == (5.0 if method == "simmim" else None)
