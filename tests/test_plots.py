"""Figures: lines, labels and limits are read back from the axes."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from PIL import Image
from rendering import render

from mto_analysis import DataError
from mto_analysis.figures.files import file_names, write_figure
from mto_analysis.figures.options import DrawingOptions, drawing, inches
from mto_analysis.figures.plots.heterogeneity import draw_heterogeneity, plot_share
from mto_analysis.figures.plots.style import COLORS, PAGE_WIDTH, looks_of, paper_style, shown_together
from mto_analysis.runtime.outputs import OutputFolder


def curve(
    model: str, values: list[float], num_visible: float = 49, stack: str = "decoder", **more: object
) -> pd.DataFrame:
    h = np.array(values)
    bound = np.log(num_visible)
    return pd.DataFrame(
        {
            "model": model,
            "stack": stack,
            "layer_depth": np.arange(len(h)),
            "heterogeneity": h,
            "ci_low": h - 0.1,
            "ci_high": h + 0.2,
            "normalized": h / bound,
            "normalized_ci_low": (h - 0.1) / bound,
            "normalized_ci_high": (h + 0.2) / bound,
            "num_visible": num_visible,
            "num_images": 8,
            **more,
        }
    )


@pytest.fixture
def frame() -> pd.DataFrame:
    return pd.concat([curve("MAE", [3.0, 2.0, 1.0]), curve("SimMIM", [4.3, 4.2], 76, "encoder")], ignore_index=True)


def solid_lines(ax: Axes) -> list:
    return [line for line in ax.lines if not line.get_label().startswith("_")]


def edges(band: PolyCollection, depth: float) -> tuple[float, float]:
    (path,) = band.get_paths()
    y = path.vertices[path.vertices[:, 0] == depth, 1]
    return float(y.min()), float(y.max())


def test_plot_share__sorts_rows_by_depth(frame: pd.DataFrame) -> None:
    shuffled = frame.sample(frac=1, random_state=3)
    lines = {line.get_label(): line.get_xydata().tolist() for line in solid_lines(plot_share(shuffled))}
    assert lines == {line.get_label(): line.get_xydata().tolist() for line in solid_lines(plot_share(frame))}


def test_plot_share__tells_stacks_of_one_model_apart() -> None:
    frame = pd.concat([curve("BootMAE", [1.0, 2.0], stack=stack) for stack in ("pixel_decoder", "feature_decoder")])
    labels = [line.get_label() for line in solid_lines(plot_share(frame))]
    assert labels == ["BootMAE, pixel decoder", "BootMAE, feature decoder"]


def test_curves__differ_without_colour() -> None:
    frame = pd.concat([curve(f"model {number}", [1.0, 2.0]) for number in range(7)])
    looks = [(line.get_marker(), str(line.get_linestyle())) for line in solid_lines(plot_share(frame))]
    assert len(set(looks)) == 7
    assert len({line.get_color() for line in solid_lines(plot_share(frame))}) == len(COLORS) == 7
    assert len(solid_lines(plot_share(pd.concat([curve(str(n), [1.0]) for n in range(15)])))) == 15


def test_looks_of__follow_from_the_label_alone() -> None:
    alone = {name: looks_of([name])[name] for name in ("MAE", "SimMIM", "my model", "a/b")}
    for names in (["SimMIM", "MAE"], ["a/b", "MAE"], ["my model", "SimMIM"]):
        assert looks_of(names) == {name: alone[name] for name in names}
    many = looks_of(f"model {number}" for number in range(60))
    assert len({(look["color"], look["marker"], str(look["linestyle"])) for look in many.values()}) == 60
    grey = {(look["marker"], str(look["linestyle"])) for look in looks_of(f"run {n}" for n in range(49)).values()}
    assert len(grey) == 49
    assert many == looks_of(reversed(many)), "their order is of no matter"
    some = [name for name in many if looks_of([name])[name] != many[name]]  # alone they need not give way
    with shown_together(many):
        assert looks_of(some) == {name: many[name] for name in some}
    assert looks_of(["baseline"])["baseline"]["color"] == "0.35"


def test_plot_share__shows_a_small_fall_on_its_own_range() -> None:
    values = [np.log(49) * share for share in (0.999, 0.998, 0.99)]
    frame = curve("SimMIM", values).drop(columns=["normalized_ci_low", "normalized_ci_high"])
    ax = plot_share(frame)
    (line,) = solid_lines(ax)
    np.testing.assert_allclose(line.get_ydata(), [0.999, 0.998, 0.99], rtol=1e-9)
    assert (ax.get_yscale(), ax.yaxis_inverted()) == ("linear", False)
    bottom, top = ax.get_ylim()
    assert 0.98 < bottom < 0.99 < 1 < top < 1.01
    assert [text.get_text() for text in ax.texts] == ["axis not from 0"]
    low = plot_share(curve("MAE", [0.9, 0.5, 0.2]))  # far below the bound the axis begins at 0
    assert low.get_ylim()[0] <= 0 < 1.1 / np.log(49) < low.get_ylim()[1] < 0.5
    assert not low.texts


def test_plot_share__draws_the_interval() -> None:
    frame = curve("MAE", [2.0, 1.0])
    low, high = edges(plot_share(frame).collections[0], 1)
    assert (low, high) == pytest.approx((0.9 / np.log(49), 1.2 / np.log(49)))


def test_draw_heterogeneity__has_a_panel_per_model_and_epochs_share_one(frame: pd.DataFrame) -> None:
    figure = draw_heterogeneity(pd.concat([frame, curve("MAE, early", [3.5, 3.4, 3.3])]), title="two models")
    left, right = figure.axes
    assert left.get_title(loc="left") == r"MAE, $H_{\mathrm{max}} = 3.89$ nats"
    assert [line.get_label() for line in solid_lines(left)] == ["MAE", "MAE, early"]
    assert solid_lines(left)[1].get_markerfacecolor() == "white"
    assert [line.get_label() for line in solid_lines(right)] == ["SimMIM"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["MAE", "MAE, early", "SimMIM"]
    heading = figure.get_suptitle()
    assert heading.startswith("two models\n")
    assert "mean over 8 images; bands: 95 % interval over images" in heading
    assert figure.get_size_inches()[0] == PAGE_WIDTH
    many = pd.concat([curve(f"m{number}", [1.0]) for number in range(7)])
    assert [ax.get_title(loc="left").split(",")[0] for ax in draw_heterogeneity(many).axes] == ["all models"]


def test_draw_heterogeneity__of_one_model_fills_one_panel_with_nats_beside() -> None:
    figure = draw_heterogeneity(curve("MAE", [2.0, 1.0]))
    (ax,) = figure.axes
    (nats,) = ax.child_axes
    with paper_style():
        figure.draw_without_rendering()
    np.testing.assert_allclose(nats.get_ylim(), np.log(49) * np.array(ax.get_ylim()))
    assert not figure.legends


@pytest.mark.rendered
@pytest.mark.parametrize("style", ["screen", "paper", "slides"])
def test_drawing__is_honoured_by_figures_and_their_files(style: str, frame: pd.DataFrame, tmp_path: Path) -> None:
    with drawing(DrawingOptions(style, ("svg", "png"), inches("86mm"))):
        names = file_names(["h", "h.csv"])
        figure = draw_heterogeneity(frame, title="T")
        write_figure(OutputFolder(tmp_path, names), "h", figure)
        assert names == ["h.svg", "h.png", "h.csv"]
        with paper_style():
            inside = figure.get_tightbbox()
    assert figure.get_size_inches()[0] == pytest.approx(86 / 25.4)
    assert inside.x0 > 0 < inside.y0  # nothing is cut off
    assert inside.x1 < 86 / 25.4
    with Image.open(tmp_path / "h.png") as image:
        assert image.width / image.info["dpi"][0] == pytest.approx(86 / 25.4, abs=0.01)
    assert b"<svg" in (tmp_path / "h.svg").read_bytes()
    captions = tmp_path / "captions.md"
    if style == "paper":
        assert "mean over 8 images" not in figure.get_suptitle()
        assert "mean over 8 images" in captions.read_text(encoding="utf-8")
        assert "STIXGeneral" in (tmp_path / "h.svg").read_text(encoding="utf-8")
    else:
        assert "mean over 8 images" in " ".join(figure.get_suptitle().split())
        assert not captions.exists()


def test_drawing__refuses_what_is_no_option() -> None:
    for given, words in (
        ({"style": "poster"}, "style must be one of screen, paper, slides"),
        ({"formats": ("gif",)}, "format must be some of png,pdf,svg"),
        ({"width": 0.2}, "from 1 to 40 inches"),
    ):
        with pytest.raises(ValueError, match=words):
            DrawingOptions(**given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be a length"):
        inches("wide")


def test_draw_heterogeneity__draws_one_image_without_a_band() -> None:
    frame = curve("MAE", [2.0, 1.0])
    columns = ["ci_low", "ci_high", "normalized_ci_low", "normalized_ci_high"]
    frame[columns] = float("nan")
    figure = draw_heterogeneity(frame)
    assert solid_lines(figure.axes[0])[0].get_ydata().tolist() == (np.array([2.0, 1.0]) / np.log(49)).tolist()
    assert render(figure, "png")


def test_draw_heterogeneity__names_differing_numbers_of_images() -> None:
    frame = pd.concat([curve("a", [1.0]), curve("b", [2.0], num_images=16)])
    assert "mean over 8 or 16 images" in draw_heterogeneity(frame).get_suptitle()


@pytest.mark.parametrize("plot", [plot_share, draw_heterogeneity])
def test_plots__name_missing_columns(plot, frame: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="the table lacks the columns heterogeneity, num_visible"):
        plot(frame.drop(columns=["heterogeneity", "num_visible"]))


def test_plot_share__draws_on_given_axes_and_leaves_the_frame_alone(frame: pd.DataFrame) -> None:
    from matplotlib.figure import Figure

    before = frame.copy()
    ax = Figure().subplots()
    assert plot_share(frame, ax=ax) is ax
    pd.testing.assert_frame_equal(frame, before)


def test_plots__leave_global_settings_alone(frame: pd.DataFrame) -> None:
    import matplotlib.pyplot as plt

    before = dict(mpl.rcParams)
    render(draw_heterogeneity(frame), "pdf")
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []
    with paper_style():
        assert mpl.rcParams["font.size"] == 8
    assert dict(mpl.rcParams) == before
    with pytest.raises(ZeroDivisionError), paper_style():
        _ = 1 / 0
    assert dict(mpl.rcParams) == before


@pytest.mark.rendered
def test_figure_bytes__are_the_same_for_the_same_table(frame: pd.DataFrame) -> None:
    for kind, start in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        first, second = (render(draw_heterogeneity(frame), kind) for _ in range(2))
        assert first == second
        assert first.startswith(start)


@pytest.mark.rendered
def test_figure_bytes__have_300_dots_per_inch_and_embedded_fonts(frame: pd.DataFrame) -> None:
    figure = draw_heterogeneity(frame)
    with Image.open(io.BytesIO(render(figure, "png"))) as image:
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert image.size[0] == 2100
    assert b"/FontFile2" in render(figure, "pdf")  # TrueType, not the Type 3 that publishers refuse
    assert b"/Type3" not in render(figure, "pdf")


def test_colours__are_those_of_seaborns_colour_blind_palette() -> None:
    seaborn = pytest.importorskip("seaborn")
    assert set(COLORS) <= set(seaborn.color_palette("colorblind").as_hex())
