"""Runs that begin with the weights of a checkpoint: strictly, with a list of what is new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pretraining_cases import contents, run, small_recipe, some_images

from mto_analysis import save_checkpoint
from mto_analysis.checkpoints.publishing import published_state
from mto_analysis.errors import CheckpointError
from mto_analysis.training import RunSettings, build_method, plan
from mto_analysis.training.initial import InitialWeights


def settings(init: Path, **more: Any) -> RunSettings:
    return RunSettings(device="cpu", init=str(init), **more)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run with another seed."""
    folder = tmp_path_factory.mktemp("earlier")
    run(folder, small_recipe(epochs="1", warmup_epochs="0"), RunSettings(device="cpu", seed=5))
    return folder / "checkpoint-0001.pth"


@pytest.mark.parametrize("method", ["mae", "simmim", "bootmae", "conmim"])
def test_initial_weights__are_those_of_the_checkpoint_teachers_too(method, tmp_path) -> None:
    recipe = small_recipe(method)
    source = build_method(recipe, seed=5)
    path = tmp_path / "start.pth"
    torch.save({**source.published()}, path)
    start = InitialWeights(path)
    method_now = build_method(recipe, seed=0, start=start)
    for name, tensor in source.state_dict().items():
        if isinstance(tensor, torch.Tensor) and not name.endswith("relative_position_index"):
            torch.testing.assert_close(method_now.state_dict()[name], tensor, msg=name)
    assert "new: none" in start.notes[0]


def test_pretrain__begins_with_a_checkpoint_and_resumes_without_it(earlier, tmp_path) -> None:
    copy = tmp_path / "start.pth"
    copy.write_bytes(earlier.read_bytes())
    lines: list[str] = []
    recipe = small_recipe(base_lr="1e-20", warmup_epochs="0", weight_decay="0")  # no step moves a weight
    run(tmp_path / "run", recipe, settings(copy, save_steps=1), on_note=lines.append)
    assert lines[0].startswith(f"weights from {copy}: ")
    assert lines[0].endswith("new: none")
    before, after = contents(earlier)["model"], contents(tmp_path / "run" / "last.pth")["model"]
    assert all(torch.allclose(before[name], after[name], atol=1e-12) for name in before)
    copy.unlink()
    run(tmp_path / "run", recipe, settings(copy, save_steps=1), resume=True)
    with pytest.raises(CheckpointError, match="init was"):
        run(tmp_path / "run", recipe, RunSettings(device="cpu"), resume=True)


def test_initial_weights__of_an_encoder_leave_the_decoder_new(tmp_path) -> None:
    recipe = small_recipe()
    state = published_state(build_method(recipe, seed=5).student)
    encoder = {name: each for name, each in state.items() if not name.startswith(("decoder", "mask_token"))}
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    start = InitialWeights(tmp_path / "encoder.pth")
    student, fresh = build_method(recipe, seed=0, start=start).student, build_method(recipe, seed=0).student
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, encoder[name] if name in encoder else fresh.state_dict()[name])
    new = len(student.state_dict()) - len(encoder)
    assert f"{len(encoder)} of {len(encoder) + new} tensors; new: mask_token, decoder_pos_embed" in start.notes[0]
    assert "attention heads are those of the recipe" in start.notes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.depth": "1"}, "depth is 2 and not 1"),
        ({"model.num_heads": "4"}, "num_heads is 2 and not 4"),
        ({"model.dim": "64"}, "dim is 32 and not 64"),
        ({"patch_size": "16", "mask_unit": "16"}, "patch_size is 8 and not 16"),
    ],
)
def test_initial_weights__of_another_architecture_are_refused(earlier, options, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        build_method(small_recipe(**options), seed=0, start=InitialWeights(earlier))


def test_initial_weights__of_another_family_are_refused(earlier, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="holds a mae, and the recipe trains a simmim_vit"):
        build_method(small_recipe("simmim"), seed=0, start=InitialWeights(earlier))
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="odd"):
        build_method(small_recipe(), seed=0, start=InitialWeights(tmp_path / "odd.pth"))


@pytest.mark.parametrize("name", ["blocks.1.mlp.fc1.weight", "decoder_pred.bias"])
def test_initial_weights__that_are_not_finite_are_refused(earlier, name, tmp_path) -> None:
    stored = contents(earlier)
    stored["model"][name].view(-1)[3] = torch.nan
    torch.save(stored, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=rf"odd.pth.*: {name} holds values that are not finite; the file is"):
        build_method(small_recipe(), seed=0, start=InitialWeights(tmp_path / "odd.pth"))


def test_initial_weights__normalized_otherwise_are_noted(tmp_path) -> None:
    recipe = small_recipe()
    save_checkpoint(build_method(recipe, seed=5).student, tmp_path / "start.safetensors")
    start = InitialWeights(tmp_path / "start.safetensors")
    build_method(small_recipe(mean="0.5,0.5,0.5"), seed=0, start=start)
    assert "trained with mean 0.485, 0.456, 0.406, the recipe has 0.5, 0.5, 0.5" in start.notes[1]


def test_initial_weights__of_other_heads_are_refused_also_where_more_is_not_told(tmp_path) -> None:
    state = published_state(build_method(small_recipe(), seed=5).student)
    arguments = {"num_heads": 1, "decoder_num_heads": 2, "mask_ratio": [0.6, 0.9]}
    torch.save({"model": state, "args": arguments}, tmp_path / "mae.pth")
    with pytest.raises(CheckpointError, match="num_heads is 1 and not 2"):
        build_method(small_recipe(), seed=0, start=InitialWeights(tmp_path / "mae.pth"))


def test_plan__lists_what_is_new(earlier) -> None:
    assert "new: none" in plan(small_recipe(), some_images(), settings(earlier)).as_text()
