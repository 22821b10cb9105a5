from __future__ import annotations

import pytest
import torch
from golden_files import read_golden
from test_pretraining_methods import TERMS, a_batch, step, tiny_recipe
from tiny_models import make_two_stacks

from mto_analysis import load_checkpoint
from mto_analysis.checkpoints import inspect_checkpoint
from mto_analysis.checkpoints.publishing import published_metadata, published_state
from mto_analysis.errors import CheckpointError
from mto_analysis.training import build_method, parameter_groups

LAYOUTS = {
    "mae": ("facebookresearch/mae", "mae"),
    "simmim": ("microsoft/SimMIM ViT", "simmim_vit"),
    "bootmae": ("BootMAE", "bootmae"),
    "conmim": ("ConMIM", "conmim"),
}


def trained(name, **options):
    method = build_method(tiny_recipe(name, **options), seed=0)
    groups = parameter_groups(method, method.recipe)
    for number in range(2):
        step(method, groups, a_batch(number))
    return method


@pytest.mark.parametrize("name", TERMS)
def test_published_state__reads_back_bit_for_bit(name, tmp_path):
    student = trained(name).student.eval()
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": published_state(student), "epoch": 3, **published_metadata(student)}, path)
    loaded = load_checkpoint(path)
    assert loaded.info.layout == LAYOUTS[name][0]
    assert loaded.info.mask_rule == student.info.mask_rule
    assert (loaded.info.target, loaded.info.criterion) == (student.info.target, student.info.criterion)
    weights = student.state_dict()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[key]), key
    images, mask, _ = a_batch()
    for stack in student.stacks:
        with torch.no_grad():
            tokens = zip(
                student.layer_tokens(images, mask, stack), loaded.layer_tokens(images, mask, stack), strict=True
            )
            assert all(torch.equal(ours.tokens, theirs.tokens) for ours, theirs in tokens)
    assert inspect_checkpoint(path).epoch == 3


@pytest.mark.parametrize("name", TERMS)
def test_published_state__has_the_original_names(name):
    """Names, shapes up to widths, and types, against a file that the original code wrote."""
    from mto_analysis.checkpoints.reading import read_checkpoint

    golden = read_golden(LAYOUTS[name][1])
    theirs = read_checkpoint(golden.source).tensors
    depths = {"mae": {"model.depth": "3", "model.decoder_depth": "4"}, "simmim": {"model.depth": "4"}}
    depths |= {"bootmae": {"model.depth": "3"}, "conmim": {"model.depth": "4"}}
    ours = published_state(trained(name, **depths[name]).student)
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        assert (tensor.ndim, tensor.dtype) == (theirs[key].ndim, theirs[key].dtype), key


def test_published_state__refuses_other_families():
    with pytest.raises(ValueError, match="family must be one of mae, simmim_vit, bootmae, conmim"):
        published_state(make_two_stacks())


def test_load_checkpoint__published_head_counts_cannot_be_contradicted(tmp_path):
    student = trained("mae").student
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": published_state(student), **published_metadata(student)}, path)
    assert load_checkpoint(path, num_heads=3).config.num_heads == 3
    with pytest.raises(CheckpointError, match="contradicts"):
        load_checkpoint(path, num_heads=2)


def test_save_checkpoint__a_conmim_as_it_is_trained_reads_back(tmp_path):
    from mto_analysis import save_checkpoint

    student = trained("conmim").student.eval()
    save_checkpoint(student, tmp_path / "student.safetensors")
    loaded = load_checkpoint(tmp_path / "student.safetensors")
    images, mask, _ = a_batch()
    with torch.no_grad():
        assert torch.equal(loaded.project(images, mask), student.project(images, mask))


def test_published_state__refuses_what_the_layout_cannot_hold(tmp_path):
    method = trained("conmim")
    torch.save({"model": published_state(method.student), **published_metadata(method.student)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="needs projectors"):
        published_state(load_checkpoint(tmp_path / "a.pth"))
    student = trained("simmim").student
    with torch.no_grad():
        student.blocks[1].attn.qkv.bias[30] = 1.0  # of the 24 keys after the 24 queries
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.bias has a bias of keys"):
        published_state(student)


def test_published_state__renamed_weights_share_their_storage():
    student = trained("simmim").student
    state = published_state(student)
    assert state["encoder.blocks.0.mlp.fc1.weight"].data_ptr() == student.blocks[0].mlp.fc1.weight.data_ptr()
    assert state["encoder.blocks.0.attn.q_bias"].data_ptr() == student.blocks[0].attn.qkv.bias.data_ptr()


@pytest.mark.parametrize("name", ["bootmae", "conmim"])
def test_teacher_state__is_another_model_in_the_same_layout(name):
    method = trained(name)
    ours, theirs = published_state(method.student), method.teacher_state()
    assert set(ours) == set(theirs)
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)
