import copy

import pytest
import torch
from test_mto_attach import build, keep_tokens, scaled, traces
from training_models import CASES, NUM, make_images

from mto_analysis import heterogeneity
from mto_analysis.affinity import quadrant_mass
from mto_analysis.mto import CollapseWarning, attach_mto, watch_mto

EACH = pytest.mark.parametrize(
    "name", ["mae", "simmim vit", "simmim swin", "simmim swin, reentrant", "bootmae", "conmim"]
)


@EACH
def test_watch__numbers_equal_direct_computation(name):
    case = CASES[name]
    model = build(case)
    twin = copy.deepcopy(model)
    watch = watch_mto(model, every=1)
    kept, _ = keep_tokens(case.stacks(twin))
    case.run(model, 0)
    _, mask = case.run(twin, 0)
    (record,) = watch.records
    side = int(mask.shape[1] ** 0.5)
    names = ["pixel_decoder/", "feature_decoder/"] if name == "bootmae" else [""]
    expected = {"step": 0}
    for (stack, depth), tokens in kept.items():
        patches = tokens[:, case.prefix :].detach()
        cell = side // int(patches.shape[1] ** 0.5)
        on_grid = mask.view(-1, side, side)[:, ::cell, ::cell].flatten(1)
        h, bound = heterogeneity(patches, on_grid), (~on_grid).sum(dim=1).log()
        expected[f"{names[stack]}heterogeneity_{depth}"] = h.mean().item()
        expected[f"{names[stack]}bound_{depth}"] = bound.mean().item()
        expected[f"{names[stack]}ratio_{depth}"] = (h / bound).mean().item()
        for quadrant, mass in enumerate(quadrant_mass(patches, on_grid).mean(dim=0).tolist(), start=1):
            expected[f"{names[stack]}quadrant_{quadrant}_mass_{depth}"] = mass
    assert record == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_watch__every_k_steps_and_on_record():
    case, told = CASES["simmim vit"], []
    model = build(case)
    watch = watch_mto(model, every=3, on_record=told.append)
    for step in range(7):
        loss, _ = case.run(model, step)
        loss.backward()
    assert [record["step"] for record in watch.records] == [0, 3, 6]
    assert told == watch.records
    assert watch.step == 7


def test_watch__costs_nothing_between(monkeypatch):
    case, looked = CASES["simmim vit"], []
    model = build(case)
    watch = watch_mto(model, every=2)
    monkeypatch.setattr(watch._stacks[0], "start", lambda *seen: looked.append(watch.step))
    for step in range(4):
        case.run(model, step)
    assert looked == [0, 2]


@EACH
def test_watch__changes_no_gradient_and_detaches(name):
    case = CASES[name]
    model = build(case)
    plain, before = copy.deepcopy(model), traces(model)
    watch = watch_mto(model, every=1)
    for each in (model, plain):
        case.run(each, 0)[0].backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)
    watch.detach()
    assert traces(model) == before
    case.run(model, 1)
    assert len(watch.records) == 1


def test_watch__not_in_evaluation():
    case = CASES["mae"]
    model = build(case)
    watch = watch_mto(model, every=1)
    with torch.no_grad():
        case.run(model, 0)
    case.run(model.eval(), 0)
    assert watch.records == []
    assert watch.step == 0


def test_watch__beside_the_losses():
    case = CASES["mae"]
    model = build(case)
    mto, watch = attach_mto(model), watch_mto(model, every=1)
    loss, _ = case.run(model, 0)
    (loss + mto.loss()).backward()
    assert watch.records[0]["heterogeneity_0"] == pytest.approx(mto.terms["heterogeneity_0"], rel=1e-5)


def test_watch__warns_of_collapse_and_of_what_is_not_finite():
    case = CASES["simmim vit"]
    model = scaled(build(case), 100)
    watch = watch_mto(model, every=1)
    with pytest.warns(CollapseWarning, match="encoder, step 0: heterogeneity of all layers has collapsed to 0"):
        case.run(model, 0)
    with torch.no_grad():
        model.encoder.blocks[1].mlp[0].weight[0, 0] = float("nan")
    with pytest.warns(CollapseWarning, match="encoder, step 1: heterogeneity is not finite"):
        case.run(model, 0)
    assert len(watch.records) == 2


@pytest.mark.parametrize("name", ["every", "keep", "warn_after"])
def test_watch__numbers_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        watch_mto(build(CASES["mae"]), **{name: 0})


def test_watch__keeps_the_last_records_only():
    case = CASES["simmim vit"]
    model = build(case)
    watch = watch_mto(model, every=1, keep=2)
    for step in range(5):
        case.run(model, step)
    assert [record["step"] for record in watch.records] == [3, 4]


def test_watch__warns_that_nothing_was_recorded():
    case = CASES["conmim"]
    model = build(case)
    watch = watch_mto(model, every=1, warn_after=3)
    nothing = torch.zeros(3, NUM, dtype=torch.bool)
    model(make_images(), bool_masked_pos=nothing)
    model(make_images(), bool_masked_pos=nothing)
    with pytest.warns(UserWarning, match="nothing was recorded in 3 training forwards.*encoder.*stacks="):
        model(make_images(), bool_masked_pos=nothing)
    model(make_images(), bool_masked_pos=nothing)  # once
    case.run(model, 0)
    assert len(watch.records) == 1
