"""Head counts that a file does not state: wrong ones are named with those that beat them, auto finds the right ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mto_analysis import load_checkpoint, mask_keys, save_checkpoint
from mto_analysis.demo import DEMO_CHECKPOINTS, demo_batches
from mto_analysis.errors import HeadCountError
from mto_analysis.models.adapting import with_config
from mto_analysis.probe.head_counts import compare_heads, head_candidates
from mto_analyze import app


@pytest.fixture(scope="module")
def unstated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled MAE as its authors' code would have saved it: without its head counts, 4 and 4."""
    path = tmp_path_factory.mktemp("unstated") / "mae.pth"
    torch.save({"model": load_checkpoint(DEMO_CHECKPOINTS["MAE"]).state_dict()}, path)
    return path


def compared(path: Path, encoder: object, decoder: object, limit: int = 64):
    counts = {"num_heads": encoder, "decoder_num_heads": decoder}
    model = load_checkpoint(path, **{name: 1 if count == "auto" else count for name, count in counts.items()})
    assert model.info.unsettled_heads == ("num_heads", "decoder_num_heads")
    (batch,) = demo_batches(model.info, limit=limit)
    mask = model.info.mask_rule.sample(mask_keys(batch.names), model.info.grid, 4)
    return compare_heads(model, (batch.images, mask), counts)


def test_head_candidates__divide_the_width_into_heads_of_8_to_128_channels(unstated: Path) -> None:
    model = load_checkpoint(unstated, num_heads=4, decoder_num_heads=4)
    assert head_candidates(model, "num_heads") == [4, 1, 2, 8, 16]
    assert head_candidates(model, "decoder_num_heads") == [4, 1, 2, 3, 6, 8, 12]
    assert head_candidates(load_checkpoint(DEMO_CHECKPOINTS["SimMIM"]), "decoder_num_heads") == []


def test_compare_heads__says_nothing_of_the_right_counts(unstated: Path) -> None:
    found = compared(unstated, 4, 4)
    assert (found.taken, found.note, found.warning) == ({}, "", "")


@pytest.mark.usefixtures("few_compared")
@pytest.mark.parametrize(
    "counts",
    [
        (8, 4),
        (8, 8),
        *(pytest.param(pair, marks=pytest.mark.slow) for pair in ((2, 4), (1, 4), (16, 4), (4, 8), (4, 1))),
    ],
)
def test_compare_heads__names_the_counts_that_beat_wrong_ones(counts: tuple[int, int], unstated: Path) -> None:
    warning = compared(unstated, *counts).warning
    better = [
        f"--{name} 4" for name, count in zip(("num-heads", "decoder-num-heads"), counts, strict=True) if count != 4
    ]
    assert warning.startswith("own loss is lower with ")
    assert warning.endswith(f"(64 images); give {' '.join(better)}")


@pytest.mark.usefixtures("few_compared")
@pytest.mark.parametrize(
    ("counts", "taken"),
    [
        pytest.param(("auto", "auto"), {"num_heads": 4, "decoder_num_heads": 4}, marks=pytest.mark.slow),
        ((4, "auto"), {"decoder_num_heads": 4}),
    ],
)
def test_compare_heads__auto_takes_a_clear_winner(counts: tuple[object, object], taken: object, unstated: Path) -> None:
    found = compared(unstated, *counts)
    assert found.taken == taken
    assert found.note.startswith("compared head counts: ")
    assert not found.warning


@pytest.mark.usefixtures("few_compared")
def test_compare_heads__auto_refuses_where_the_loss_does_not_tell(unstated: Path, tmp_path: Path) -> None:
    with pytest.raises(HeadCountError, match=r"no head count is clearly best: .* \(1 images\); give --num-heads"):
        compared(unstated, "auto", 4, limit=1)
    early = tmp_path / "early.pth"
    torch.save({"model": load_checkpoint(DEMO_CHECKPOINTS["MAE, early"]).state_dict()}, early)
    with pytest.raises(HeadCountError, match="no head count is clearly best"):
        compared(early, 4, "auto", limit=16)
    assert not compared(early, 8, 4, limit=16).warning
    model = load_checkpoint(unstated, num_heads=4, decoder_num_heads=4)
    with pytest.raises(HeadCountError, match="no image can be read; give --num-heads"):
        compare_heads(model, None, {"num_heads": "auto"})


def test_with_config__shares_weights_and_refuses_other_shapes() -> None:
    from dataclasses import replace

    model = load_checkpoint(DEMO_CHECKPOINTS["SimMIM"])  # whose table of position biases has a column for each head
    with pytest.raises(RuntimeError, match="size mismatch"):
        with_config(model, replace(model.config, num_heads=2 * model.config.num_heads))
    mae = load_checkpoint(DEMO_CHECKPOINTS["MAE"])
    changed = with_config(mae, replace(mae.config, num_heads=8))
    assert changed.blocks[0].attn.num_heads == 8
    assert changed.blocks[0].attn.qkv.weight.data_ptr() == mae.blocks[0].attn.qkv.weight.data_ptr()


@pytest.mark.parametrize(
    "command", [["heterogeneity", "--limit", "32"], pytest.param(["reconstruct"], marks=pytest.mark.slow)], ids=" ".join
)
@pytest.mark.usefixtures("few_compared")
def test_commands__choose_and_doubt_head_counts(command: list[str], unstated: Path, tmp_path: Path) -> None:
    arguments = [*command, "--ckpt", str(unstated), "--decoder-num-heads"]
    chosen = CliRunner().invoke(app, [*arguments, "auto", "--num-heads", "auto", "--out", str(tmp_path / "a")])
    assert chosen.exit_code == 0, chosen.output
    assert "mae: compared head counts: num_heads 4 and decoder_num_heads 4, own loss" in chosen.stderr
    (metadata,) = json.loads((tmp_path / "a/run.json").read_text())["models"]
    assert (metadata["config"]["num_heads"], metadata["config"]["decoder_num_heads"]) == (4, 4)
    wrong = CliRunner().invoke(app, [*arguments, "8", "--num-heads", "4", "-q", "--out", str(tmp_path / "b")])
    assert wrong.exit_code == 0, wrong.output
    assert "mae: own loss is lower with decoder_num_heads 4" in wrong.stderr


@pytest.mark.usefixtures("few_compared")
def test_figures__choose_head_counts_and_take_the_options_of_measuring_commands(unstated: Path, tmp_path: Path) -> None:
    out, heads = tmp_path / "out", ["--num-heads", "auto", "--decoder-num-heads", "4"]
    arguments = ["figures", "fig1a", "--ckpt", str(unstated), "--limit", "32", "--std", "0.3,0.3,0.3", *heads]
    result = CliRunner().invoke(app, [*arguments, "--value-range", "0", "255", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "mae: compared head counts: num_heads 4, own loss" in result.stderr
    assert "(mean published, std given)" in result.stderr


def test_unsettled_heads__stay_so_in_our_own_layout(unstated: Path, tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(unstated, num_heads=8, decoder_num_heads=4), tmp_path / "own.safetensors")
    assert load_checkpoint(tmp_path / "own.safetensors").info.unsettled_heads == ("num_heads", "decoder_num_heads")
    assert load_checkpoint(DEMO_CHECKPOINTS["MAE"]).info.unsettled_heads == ()
