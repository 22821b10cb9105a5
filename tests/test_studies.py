"""The measurement behind Fig. 1 for several checkpoints, and saved tables read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from golden_files import GOLDEN
from image_files import write_images

from mto_analysis import DataError, MaskRule, image_batches, load_checkpoint, mask_keys, open_images
from mto_analysis.checkpoints import LoadOptions, checkpoint_sha256
from mto_analysis.figures.saved import read_tables
from mto_analysis.probe import masks_from_rule, probe
from mto_analysis.probe.definition_study import Definitions
from mto_analysis.probe.request import Request, Settings
from mto_analysis.probe.study import measure_checkpoints
from mto_analysis.runtime.listener import Listener
from mto_analysis.runtime.outputs import labels_of
from mto_analysis.runtime.processes import pick_device


@pytest.fixture
def images(image_folder: Path):
    return open_images(image_folder)


# Measuring.


def test_measure_checkpoints__equals_the_probe(checkpoints, images) -> None:
    settings = Settings(seed=4, masks_per_image=2, batch_size=4)
    study = measure_checkpoints(Request([checkpoints["mae"], checkpoints["simmim"]], images, settings))
    assert study.table["model"].unique().tolist() == ["mae", "simmim"]
    assert study.table.columns[0] == study.per_image.columns[0] == "model"
    assert len(study.per_image) == 6 * 2 * (4 + 4)
    for name in ("mae", "simmim"):
        model = load_checkpoint(checkpoints[name])
        batches = image_batches(images, model.info, batch_size=6)
        expected = probe(model, batches, masks_from_rule(model.info, seed=4), masks_per_image=2).summary()
        found = study.table[study.table["model"] == name].reset_index(drop=True)
        pd.testing.assert_frame_equal(
            found[expected.columns], expected, check_exact=False, atol=1e-4, rtol=1e-3, check_dtype=False
        )
    assert (study.table["num_skipped"] == 0).all()


def test_measure_checkpoints__writes_down_what_was_measured(checkpoints, images) -> None:
    study = measure_checkpoints(Request([checkpoints["simmim"]], images, Settings(mask_ratio=0.25), ["my model"]))
    (metadata,) = study.models
    assert metadata["model"] == "my model"
    assert metadata["sha256"] == checkpoint_sha256(checkpoints["simmim"])
    assert metadata["info"]["family"] == "simmim_vit"
    assert metadata["config"]["depth"] == 3
    assert metadata["mask_rule"] == {"kind": "block", "ratio": 0.25, "unit": 8, "min_block": 16}
    assert "as asked for" in metadata["masks"]
    assert metadata["own_loss"]["loss"] > 0
    assert study.table["num_visible"].unique().tolist() == [12]


@pytest.mark.parametrize(
    ("options", "num_visible"),
    [({"mask_ratio": 0.5}, 8), ({"mask_unit": 8}, 4), ({"mask_unit": 8, "mask_ratio": 0.5}, 8), ({}, 4)],
)
def test_settings__change_the_masks(checkpoints, images, options: dict[str, Any], num_visible: int) -> None:
    table = measure_checkpoints(Request([checkpoints["mae"]], images, Settings(limit=2, **options))).table
    assert table["num_visible"].unique().tolist() == [num_visible]
    assert table["num_images"].unique().tolist() == [2]


def test_settings__masks_from_a_file_exclude_ratio_and_unit(checkpoints, images) -> None:
    rule = MaskRule("random", 0.5, 4)
    masks = {name: rule.sample(mask_keys([name]), (4, 4), 4) for name in images.names}
    table = measure_checkpoints(Request([checkpoints["mae"]], images, Settings(masks=masks))).table
    assert table["num_visible"].unique().tolist() == [8]
    for options in ({"mask_ratio": 0.5}, {"mask_unit": 8}):
        with pytest.raises(ValueError, match="masks from a file have their own ratio and unit"):
            Settings(masks=masks, **options)


def test_measure_checkpoints__says_masks_losses_and_doubts(checkpoints, images) -> None:
    notes: list[str] = []
    warnings: list[str] = []
    measure_checkpoints(Request([checkpoints["mae"]], images, listener=Listener(notes.append, warnings.append)))
    assert notes == ["mae: mae (mto_analysis), 16 px; masks: 0.75 of random patches of 4 px (given), seed 0"]
    (warning,) = warnings  # random weights are worse than the mean
    assert warning.startswith("mae: reconstruction loss ")
    assert "predicting the mean" in warning
    assert "no better than the mean, so it is untrained or loaded wrongly (head counts?)" in warning


def test_measure_checkpoints__prints_the_own_loss_of_a_good_model() -> None:
    from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_IMAGES

    notes: list[str] = []
    warnings: list[str] = []
    listener = Listener(notes.append, warnings.append)
    measure_checkpoints(
        Request([DEMO_CHECKPOINTS["MAE"]], open_images(DEMO_IMAGES), Settings(limit=16), listener=listener)
    )
    assert warnings == []
    assert "reconstruction loss 0." in notes[1]
    assert "predicting the mean" in notes[1]


def test_measure_checkpoints__skips_broken_images_once_for_all_models(checkpoints, image_folder: Path) -> None:
    (image_folder / "broken.png").write_bytes(b"junk")
    warnings: list[str] = []
    sources, listener = [checkpoints["mae"], checkpoints["simmim"]], Listener(warn=warnings.append)
    study = measure_checkpoints(Request(sources, open_images(image_folder), listener=listener))
    assert list(study.broken) == ["broken.png"]
    assert (study.table["num_skipped"] == 1).all()
    assert (study.table["num_images"] == 6).all()
    assert len([warning for warning in warnings if "skipped broken.png" in warning]) == 1
    with pytest.raises(DataError, match=r"image broken\.png cannot be read"):
        measure_checkpoints(Request([checkpoints["mae"]], open_images(image_folder), Settings(strict=True)))


def test_measure_checkpoints__says_when_no_image_can_be_read(checkpoints, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"junk")
    with pytest.raises(DataError, match="none of the 2 images can be read; the first: UnidentifiedImageError"):
        measure_checkpoints(Request([checkpoints["mae"]], open_images(tmp_path)))


def test_measure_checkpoints__gives_head_counts_to_those_that_need_them(tmp_path: Path, checkpoints) -> None:
    write_images(tmp_path, ("a.png",))
    sources = [GOLDEN / "mae" / "checkpoint.pth", checkpoints["simmim"]]
    study = measure_checkpoints(Request(sources, open_images(tmp_path), loading=LoadOptions(4, 2)))
    heads = [
        (metadata["config"]["num_heads"], metadata["config"].get("decoder_num_heads")) for metadata in study.models
    ]
    assert heads == [(4, 2), (3, None)]
    with pytest.raises(ValueError, match="contradicts the file, which has 3 heads"):
        measure_checkpoints(Request([checkpoints["simmim"]], open_images(tmp_path), loading=LoadOptions(4)))


def test_measure_checkpoints__wraps_batches_for_progress(checkpoints, images) -> None:
    seen = []

    def progress(batches, total, label):
        items = list(batches)
        seen.append((len(items), total, label))
        return iter(items)

    measure_checkpoints(
        Request([checkpoints["mae"]], images, Settings(batch_size=4), listener=Listener(progress=progress))
    )
    assert seen == [(2, 2, "mae")]


def test_measure_checkpoints__does_not_depend_on_batch_size_or_workers(checkpoints, images) -> None:
    one, other = (
        measure_checkpoints(
            Request([checkpoints["simmim"]], images, Settings(batch_size=size, num_workers=workers))
        ).per_image
        for size, workers in ((6, 0), (1, 2))
    )
    key = ["layer_depth", "image"]
    one, other = (table.sort_values(key, ignore_index=True) for table in (one, other))
    assert (one["image"] == other["image"]).all()
    assert (one["heterogeneity"] - other["heterogeneity"]).abs().max() < 2e-5


def test_labels_of__takes_as_many_folders_as_needed() -> None:
    assert labels_of(["a.pth"]) == ["a"]
    assert labels_of([Path("x/a.pth"), "x/b.pth"]) == ["a", "b"]
    assert labels_of(["r/1/x/a.pth", "r/2/x/a.pth"]) == ["1/x/a", "2/x/a"]
    with pytest.raises(ValueError, match="a checkpoint is given twice; name them apart with --label"):
        labels_of(["a.pth", "a.pth"])


def test_read_tables__a_model_may_be_called_none(tmp_path) -> None:
    table = pd.DataFrame({"model": ["None", "NA"], "stack": "encoder", "layer_depth": 0, "heterogeneity": 1.0,
                          "normalized": 0.5, "num_visible": 9, "ci_low": 0.9, "ci_high": 1.1})  # fmt: skip
    table.to_csv(tmp_path / "table.csv", index=False)
    assert read_tables([tmp_path / "table.csv"])["model"].tolist() == ["None", "NA"]


def test_measure_checkpoints__refuses_labels_that_do_not_fit(checkpoints, images) -> None:
    sources = [checkpoints["mae"], checkpoints["simmim"]]
    for labels in (["one"], ["same", "same"]):
        with pytest.raises(ValueError, match="give one different label per checkpoint: 2 checkpoints"):
            Request(sources, images, labels=labels)


def test_pick_device__takes_cuda_or_the_cpu_but_never_mps_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == "cuda"
    assert pick_device("cpu") == "cpu"
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(ValueError, match=f"device {name} cannot be used: ") as error:
            pick_device(name)
        assert "\n" not in str(error.value)


# Saved tables.


@pytest.fixture
def table(checkpoints, images) -> pd.DataFrame:
    return measure_checkpoints(Request([checkpoints["mae"]], images, Settings(limit=2))).table


def test_read_tables__gives_back_what_was_written(table: pd.DataFrame, tmp_path: Path) -> None:
    table.to_csv(tmp_path / "h.csv", index=False)
    pd.testing.assert_frame_equal(read_tables([tmp_path / "h.csv"]), table, check_dtype=False, check_exact=True)


def test_read_tables__puts_several_together(table: pd.DataFrame, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        table.to_csv(tmp_path / folder / "heterogeneity.csv", index=False)
    other = table.assign(model="12")  # a name that looks like a number stays a name
    other.to_csv(tmp_path / "other.csv", index=False)
    whole = read_tables(
        [tmp_path / "one/heterogeneity.csv", tmp_path / "two/heterogeneity.csv", tmp_path / "other.csv"]
    )
    assert whole["model"].unique().tolist() == ["mae (one)", "mae (two)", "12"]
    assert len(whole) == 3 * len(table)
    with pytest.raises(DataError, match=r"model mae .* is in the tables twice; leave one out"):
        read_tables([tmp_path / "one/heterogeneity.csv"] * 2)


def test_read_tables__says_what_is_wrong(table: pd.DataFrame, tmp_path: Path) -> None:
    table.drop(columns=["normalized", "stack"]).to_csv(tmp_path / "columns.csv", index=False)
    broken = table.astype({"heterogeneity": object})
    broken.loc[1, "heterogeneity"] = "much"
    broken.to_csv(tmp_path / "number.csv", index=False)
    table.iloc[:0].to_csv(tmp_path / "rows.csv", index=False)
    pd.concat([table, table]).to_csv(tmp_path / "twice.csv", index=False)
    table.assign(model="_x").to_csv(tmp_path / "label.csv", index=False)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "binary.csv").write_bytes(b"\xff\x00\x80")
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n1,2,3,4\n")
    for name, message in {
        "columns": "is not a heterogeneity table: it lacks stack, normalized",
        "number": r"line 3: heterogeneity must be a number, got 'much'",
        "rows": "holds no rows",
        "twice": "is in the tables twice",
        "label": "the model '_x' begins with _ or contains",
        "empty": "is not a CSV table",
        "binary": "is not a CSV table",
        "ragged": "is not a CSV table",
    }.items():
        with pytest.raises(DataError, match=message) as error:
            read_tables([tmp_path / f"{name}.csv"])
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"no table at .*none\.csv"):
        read_tables([tmp_path / "none.csv"])


def test_definitions__leave_the_study_as_it_was(checkpoints, images) -> None:
    definitions = Definitions()
    request = Request([checkpoints["mae"]], images, Settings(limit=2, measures="attention"))
    study = measure_checkpoints(request, watch=definitions.watch)
    # Attention is watched for both, once.
    assert "attention_distance_masked" in set(study.measures["measure"])
    assert not study.measures.duplicated(["stack", "layer_depth", "measure", "head"]).any()
    unasked = measure_checkpoints(Request([checkpoints["mae"]], images, Settings(limit=1)), watch=Definitions().watch)
    assert set(unasked.measures["measure"]) == {"heterogeneity", "normalized_heterogeneity"}
    before = study.measured.copy()
    first, again = definitions.table(study), definitions.table(study)
    pd.testing.assert_frame_equal(first, again)
    pd.testing.assert_frame_equal(study.measured, before)
    assert list(study.per_image)[-1] == "heterogeneity"
