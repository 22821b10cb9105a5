"""Eq. (1) as each method has it, and the self-check that makes a wrong load visible."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_files import read_golden
from tiny_models import make_mae, make_simmim, some_images, some_masks

from mto_analysis import load_checkpoint, own_loss, reconstruction_loss
from mto_analysis.models.targets import (
    mean_prediction,
    normalize_channels,
    normalize_patches,
    restore_patches,
    target_patches,
)
from mto_analysis.models.vit import patchify
from mto_analysis.probe.own_loss import OwnLoss


@pytest.mark.parametrize("criterion", ["l1", "l2"])
@pytest.mark.parametrize("target", ["pixels", "normalized_pixels"])
def test_reconstruction_loss__agrees_with_slow_loops(criterion, target, generator: torch.Generator) -> None:
    guess, images = (torch.randn(2, 3, 8, 8, generator=generator).double() for _ in range(2))
    mask = torch.tensor([[True, False, False, True], [False, True, True, True]])
    expected = []
    for row in range(2):
        errors = []
        for patch in mask[row].nonzero().flatten().tolist():
            part = (slice(None), slice(patch // 2 * 4, patch // 2 * 4 + 4), slice(patch % 2 * 4, patch % 2 * 4 + 4))
            goal = images[row][part].numpy()
            if target == "normalized_pixels":
                goal = (goal - goal.mean()) / np.sqrt(goal.var(ddof=1) + 1e-6)  # MAE: torch's var, unbiased
            error = guess[row][part].numpy() - goal
            errors.append(np.abs(error).mean() if criterion == "l1" else (error**2).mean())
        expected.append(np.mean(errors))
    values = reconstruction_loss(guess, images, mask, 4, target=target, criterion=criterion)
    assert values.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["mae", "simmim_vit"])
def test_own_loss__equals_the_original_code(name: str, golden_of) -> None:
    golden = golden_of(name)
    model = golden.load()
    model.info = replace(model.info, target="pixels")
    for row, expected in enumerate(golden.expected["loss"]):
        loss = own_loss(model, golden.images[row : row + 1], golden.mask[row : row + 1])
        assert loss.loss == pytest.approx(expected, rel=1e-5)
        assert (loss.target, loss.judged) == ("pixels", False)


def test_reconstruction_loss__looks_at_masked_patches_only() -> None:
    images, guess = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    guess[:, :, :2, :2] = 3.0  # patch 0 is wrong by 3
    masked, visible = torch.tensor([[True, True, False, False]]), torch.tensor([[False, True, True, True]])
    assert reconstruction_loss(guess, images, masked, 2, criterion="l1").item() == 1.5
    assert reconstruction_loss(guess, images, masked, 2).item() == 4.5
    assert reconstruction_loss(guess, images, visible, 2).item() == 0.0


def test_normalize_patches__gives_mean_0_and_variance_1(generator: torch.Generator) -> None:
    patches = normalize_patches(torch.randn(2, 5, 48, generator=generator) * 7 + 3)
    assert torch.allclose(patches.mean(dim=-1), torch.zeros(2, 5), atol=1e-6)
    assert torch.allclose(patches.var(dim=-1), torch.ones(2, 5), atol=1e-5)
    assert torch.isfinite(normalize_patches(torch.ones(1, 1, 48))).all()  # a patch of one colour


def test_mean_prediction__is_the_mean_visible_colour() -> None:
    images = torch.zeros(1, 3, 4, 4)
    images[0, 0, :2, :2], images[0, 1, :2, 2:], images[0, :, 2:] = 4.0, 8.0, 100.0
    mask = torch.tensor([[False, False, True, True]])
    colour = mean_prediction(images, mask, 2)[0]
    assert colour[:, 0, 0].tolist() == [2.0, 4.0, 0.0]
    assert torch.equal(colour, colour[:, :1, :1].expand(3, 4, 4))
    assert not mean_prediction(images, mask, 2, target="normalized_pixels").any()


def test_own_loss__judges_an_unknown_target_by_the_better_fit(generator: torch.Generator) -> None:
    model, images, mask = make_mae(), some_images(generator, 3) * 0.1 + 2, some_masks(generator, 3)
    for target in ("pixels", "normalized_pixels"):
        known = []
        for each in ("pixels", "normalized_pixels"):
            model.info = replace(model.info, target=each)
            known.append(own_loss(model, images, mask))
        goal = images if target == "pixels" else _normalized(images)
        model._reconstruct = lambda images, mask, goal=goal: goal  # a perfect model of that target
        model.info = replace(model.info, target=None)
        judged = own_loss(model, images, mask)
        assert judged.target == target
        assert judged.judged
        assert judged.loss == pytest.approx(0, abs=1e-6)
        assert judged.predict_the_mean == pytest.approx(known[target == "normalized_pixels"].predict_the_mean)


def _normalized(images: torch.Tensor) -> torch.Tensor:
    cells = images.unfold(2, 4, 4).unfold(3, 4, 4)  # batch, colour, row, column, y, x
    mean = cells.mean(dim=(1, 4, 5), keepdim=True)
    std = (((cells - mean) ** 2).sum(dim=(1, 4, 5), keepdim=True) / 47 + 1e-6).sqrt()
    return ((cells - mean) / std).permute(0, 1, 2, 4, 3, 5).reshape(images.shape)


def test_own_loss__is_none_where_no_pixels_are_predicted(two_stacks, generator: torch.Generator) -> None:
    images, mask = some_images(generator, 1), some_masks(generator, 1)
    assert own_loss(two_stacks, images, mask) is None
    model = make_simmim()
    model.info = replace(model.info, criterion=None)
    assert own_loss(model, images, mask) is None


def test_suspicious__means_no_better_than_the_mean_or_not_a_number() -> None:
    assert not OwnLoss(0.5, 1.0, "pixels", False, 1).suspicious
    assert OwnLoss(1.0, 1.0, "pixels", False, 1).suspicious
    assert OwnLoss(2.0, 1.0, "pixels", False, 1).suspicious
    assert OwnLoss(float("nan"), 1.0, "pixels", False, 1).suspicious


def test_own_loss__shows_a_wrong_head_count() -> None:
    # The bundled MAE, saved as if it had other heads: nothing else tells.
    from mto_analysis.demo import DEMO_CHECKPOINTS, demo_batches
    from mto_analysis.models import MAE
    from mto_analysis.probe import masks_from_rule

    right = load_checkpoint(DEMO_CHECKPOINTS["MAE"])
    wrong = MAE(replace(right.config, num_heads=2, decoder_num_heads=8), right.info)
    wrong.load_state_dict(right.state_dict())
    batch = next(demo_batches(right.info, limit=16))
    mask = masks_from_rule(right.info)(batch.names, 0)
    good, bad = (own_loss(model.eval(), batch.images, mask) for model in (right, wrong))
    assert good.loss < 0.5 * good.predict_the_mean
    assert not good.suspicious
    assert bad.loss > 1.5 * good.loss


def test_normalize_channels__each_channel_of_a_patch_by_itself_and_back(generator: torch.Generator) -> None:
    patches = torch.randn(2, 3, 12, generator=generator, dtype=torch.float64)
    normal = normalize_channels(patches, 3)
    for channel in range(3):
        values = patches[1, 2, channel::3]
        deviation = ((values - values.mean()).square().mean() + 1e-5).sqrt()
        torch.testing.assert_close(normal[1, 2, channel::3], (values - values.mean()) / deviation)
    torch.testing.assert_close(restore_patches(normal, like=patches, channels=3), patches)


def test_own_loss__of_bootmae_is_the_error_of_normalized_channels() -> None:
    golden = read_golden("bootmae")
    model = load_checkpoint(golden.source, num_heads=3)
    shown = own_loss(model, golden.images, golden.mask)
    goal = target_patches(golden.images, model.info.patch_size, "normalized_channels")
    error = (patchify(torch.from_numpy(golden.expected["out_pixel"]), model.info.patch_size) - goal).square().mean(-1)
    assert shown is not None
    assert shown.target == "normalized_channels"
    assert shown.loss == pytest.approx(error[golden.mask].mean().item(), rel=1e-4)
