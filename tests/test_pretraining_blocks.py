"""Blocks that are compiled or recomputed see the same hooks and give the same numbers."""

import copy

import pytest
import torch
from pretraining_cases import Stopped, contents, rows, run, same, small_recipe, stop_after
from tiny_models import make_mae, make_simmim, some_images, some_masks

from mto_analysis.mto import MTOConfig, attach_mto
from mto_analysis.training import RunSettings
from mto_analysis.training.blocks import choose_attention, prepare_blocks, transformer_blocks_of


def gradients(model, generator, **options):
    model = copy.deepcopy(model).train()
    mto = attach_mto(model, MTOConfig(), check_every=0)
    prepare_blocks(model, **options)
    images, mask = some_images(generator, 3), some_masks(generator, 3)
    loss = model(images, mask).square().mean() + mto.loss()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, loss.detach()


@pytest.mark.parametrize("make", [make_mae, make_simmim])
def test_checkpointing__gives_the_same_gradients_with_mto(make):
    model = make()
    plain, loss = gradients(model, torch.Generator().manual_seed(0), compiled=False, checkpointing=False)
    again, other = gradients(model, torch.Generator().manual_seed(0), compiled=False, checkpointing=True)
    assert torch.equal(loss, other)
    assert plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], again[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile looks at it
def test_compiling__gives_the_same_gradients_with_mto():
    model = make_mae()
    plain, loss = gradients(model, torch.Generator().manual_seed(0), compiled=False, checkpointing=False)
    again, other = gradients(model, torch.Generator().manual_seed(0), compiled=True, checkpointing=True)
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
    for name in plain:
        torch.testing.assert_close(plain[name], again[name], rtol=1e-3, atol=1e-5)


def test_blocks__of_a_copy_run_the_copy(tiny_mae, generator):
    prepare_blocks(tiny_mae, compiled=False, checkpointing=True)
    other = copy.deepcopy(tiny_mae)
    with torch.no_grad():
        for parameter in tiny_mae.parameters():
            parameter.zero_()
    images, mask = some_images(generator, 2), some_masks(generator, 2)
    assert other(images, mask).abs().sum() > 0
    assert other(images, mask).grad_fn is not None
    assert list(other.state_dict()) == list(make_mae().state_dict())


def test_blocks__are_all_found(tiny_mae, tiny_simmim):
    assert len(list(transformer_blocks_of(tiny_mae))) == 2 + 3
    assert len(list(transformer_blocks_of(tiny_simmim))) == 3


def test_attention__is_explicit_on_the_cpu_in_half_precision_only(tiny_mae):
    fused = tiny_mae.blocks[0].attn.fused_attn
    choose_attention(tiny_mae, torch.device("cpu"), "fp32")
    assert tiny_mae.blocks[0].attn.fused_attn == fused
    choose_attention(tiny_mae, torch.device("cuda"), "bf16")
    assert tiny_mae.blocks[0].attn.fused_attn == fused
    choose_attention(tiny_mae, torch.device("cpu"), "bf16")
    assert not tiny_mae.blocks[0].attn.fused_attn


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision__resumes_exactly_and_stays_near_float32(tmp_path, precision):
    settings = RunSettings(device="cpu", log_every=1, save_steps=3, precision=precision, mto=MTOConfig())
    run(tmp_path / "whole", settings=settings)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", settings=settings, on_step=stop_after(3))
    run(tmp_path / "cut", settings=settings, resume=True)
    assert same(contents(tmp_path / "whole" / "last.pth"), contents(tmp_path / "cut" / "last.pth"))
    run(tmp_path / "full", settings=RunSettings(device="cpu", log_every=1, mto=MTOConfig()))
    half, full = (rows(tmp_path / name / "metrics.csv") for name in ("whole", "full"))
    for one, other in zip(half, full, strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=0.05)
    assert half[0]["loss"] != full[0]["loss"]


@pytest.mark.parametrize("method", ["bootmae", "conmim"])
def test_slow_branch__resumes_exactly(tmp_path, method):
    recipe = small_recipe(method, warmup_epochs="1")
    settings = RunSettings(device="cpu", save_steps=3, mto=MTOConfig())
    run(tmp_path / "whole", recipe, settings)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", recipe, settings, on_step=stop_after(3))
    run(tmp_path / "cut", recipe, settings, resume=True)
    assert same(contents(tmp_path / "whole" / "last.pth"), contents(tmp_path / "cut" / "last.pth"))
