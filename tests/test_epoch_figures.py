"""What a run shows of itself along its way: figures, boards and rows, without a trace in its training."""

import importlib.util

import pandas as pd
import pytest
from PIL import Image
from pretraining_cases import Stopped, contents, run, same, small_recipe, some_images

from mto_analysis.figures.epoch_figures import EpochFigures
from mto_analysis.figures.plots.measures import draw_measures
from mto_analysis.rauc.relations import read_measures, read_scores, relate
from mto_analysis.training import RunSettings


@pytest.mark.rendered
def test_run__shows_itself_at_chosen_epochs_and_trains_as_without(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    wandb = importlib.util.find_spec("wandb") is not None
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = small_recipe(epochs="3")
    given = {
        "device": "cpu",
        "log_every": 2,
        "show_every": 2,
        "tensorboard": True,
        "wandb": "masked-tokens" if wandb else None,
    }
    show = EpochFigures(some_images(), count=12, drawn=2, measures="h,cosine,attention,cka")
    calls = []

    def stopping(model, epoch):
        calls.append(epoch)
        if calls.count(2) == 1 and epoch == 2:
            raise Stopped
        return show(model, epoch)

    def score(model):
        return 10.0

    with pytest.raises(Stopped):
        run(tmp_path / "shown", recipe, RunSettings(**given), show=stopping, evaluate=score)
    run(tmp_path / "shown", recipe, RunSettings(**given), show=stopping, evaluate=score, resume=True)
    assert calls == [0, 2, 2, 3]
    files = sorted(path.name for path in (tmp_path / "shown" / "shown").iterdir())
    assert files == [f"{name}-000{epoch}.png" for name in ("measures", "reconstructions") for epoch in (0, 2, 3)]
    with Image.open(tmp_path / "shown" / "shown" / files[0]) as image:
        assert min(image.size) > 100
    table = pd.read_csv(tmp_path / "shown" / "measures.csv")
    assert table["epoch"].drop_duplicates().tolist() == [0, 2, 3]
    assert {"heterogeneity", "cosine_masked", "attention_distance_visible", "cka_visible"} <= {*table["measure"]}
    assert not table.duplicated(["epoch", *table.columns[3:7], "head", "other_layer_depth"]).any()
    found = relate(
        read_measures([str(tmp_path / "shown" / "measures.csv")]), read_scores([str(tmp_path / "shown" / "curves.csv")])
    )
    assert "nothing can be concluded" in found.sentence

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "shown" / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["shown/measures", "shown/reconstructions"]
    assert [each.step for each in events.Images("shown/measures")] == [0, 8, 12]
    kept = list((tmp_path / "shown" / "wandb").rglob("media/images/shown/*.png"))
    assert len(kept) == 6 * wandb

    run(tmp_path / "plain", recipe, RunSettings(device="cpu", log_every=2))
    one, two = (contents(tmp_path / name / "last.pth")["resume"] for name in ("shown", "plain"))
    assert one.pop("rows")["measures.csv"] == len(table)
    assert two.pop("rows")["measures.csv"] == 0
    assert same(one, two)
    run(tmp_path / "shown", recipe, RunSettings(device="cpu", log_every=2), overwrite=True)
    assert not (tmp_path / "shown" / "shown").exists()
    assert not (tmp_path / "shown" / "measures.csv").exists()


def test_draw_measures__has_a_panel_per_measure():
    rows = [
        {"model": "MAE", "stack": "decoder", "layer_depth": depth, "measure": name, "value": depth + 1.0,
         "ci_low": depth, "ci_high": depth + 2, "num_images": 4, "head": head, "other_layer_depth": None}
        for depth in range(3)
        for name in ("heterogeneity", "cosine_masked", "cosine_visible", "attention_distance_masked")
        for head in ((None, 1) if name.startswith("att") else (None,))
    ]  # fmt: skip
    figure = draw_measures(pd.DataFrame(rows))
    assert [ax.get_title() for ax in figure.axes] == ["H (nats)", "mean cosine", "attention distance"]
    styles = [line.get_linestyle() for line in figure.axes[1].lines]
    assert styles == ["-", "--"]
