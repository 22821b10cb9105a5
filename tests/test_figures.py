"""Figures and tables of the paper: what is committed, what each shows, and ``mto-analyze figures``."""

from __future__ import annotations

import io
import re
import runpy
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import PolyCollection
from PIL import Image
from servers import Page, serve
from typer.testing import CliRunner

from mto_analysis import DataError
from mto_analysis.checkpoints import registry
from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_IMAGES
from mto_analysis.errors import CheckpointError, DataNotFoundError, OutputExistsError
from mto_analysis.figures.files import CAPTIONS, merge_captions
from mto_analysis.figures.options import DrawingOptions, drawing
from mto_analysis.figures.paper import FIGURES, Drawn, Inputs, draw_paper, find_figures
from mto_analysis.figures.paper.public import PUBLIC, draw_public
from mto_analysis.figures.paper.tables import printed
from mto_analysis.figures.paper.workbench import Workbench
from mto_analysis.figures.plots.affinity import draw_affinity
from mto_analysis.figures.plots.means_over_seeds import plot_runs
from mto_analysis.figures.plots.schematic import TOKENS, draw_schematic, plot_losses_on_affinity, plot_style
from mto_analysis.figures.plots.style import PAPER_STYLE, TEXT_WIDTH, paper_style
from mto_analysis.probe.quadrants import AffinityMap
from mto_analysis.runtime.listener import Listener
from mto_analyze import app

COMMITTED = Path(__file__).parents[1] / "figures"
QUICK = [name for name, one in FIGURES.items() if not one.slow]
SLOW = [name for name, one in FIGURES.items() if one.slow]
runner = CliRunner()


def drawn(name: str, **inputs: object):
    bench = Workbench(Inputs(**inputs))
    bench.name = name
    return FIGURES[name].draw(bench)


def texts(figure: object) -> str:
    found = [text.get_text() for ax in figure.axes for text in ax.texts]
    return "\n".join([*found, figure.get_suptitle()])


def redrawn(names: Iterable[str]) -> dict[str, Drawn]:
    """Figures drawn from what they were committed from, but not written."""
    bench = Workbench(Inputs(), maps=True)
    found = {}
    for name in names:
        bench.name = name
        found[name] = FIGURES[name].draw(bench)
    return found


def _order_of(captions: str) -> list[str]:
    return re.findall(r"^## (.+)$", captions, flags=re.MULTILINE)


def assert_same_numbers(found: pd.DataFrame, committed: Path) -> None:
    one, two = pd.read_csv(io.StringIO(found.to_csv(index=False))), pd.read_csv(committed)
    pd.testing.assert_frame_equal(one, two, rtol=2e-4, atol=2e-6)


def assert_maps_are_in_the_table(fig2: Drawn) -> None:
    """To five digits."""
    table = fig2.tables["fig2-maps"]
    assert set(table["model"]) == {"SimMIM"}
    values = table[[str(column) for column in range(64)]].to_numpy()
    assert len(values) == 7 * 64
    np.testing.assert_allclose(values.sum(axis=1), 1, atol=1e-4)  # rows of a softmax
    drawn_now = fig2.figures["fig2"].axes[0].images[0].get_array()
    np.testing.assert_allclose(values[:64], drawn_now, rtol=6e-5)


def assert_final_models_look_the_same(fig1a: Drawn, fig1b: Drawn) -> None:
    looks = []
    for name, found in (("fig1a", fig1a), ("fig1b", fig1b)):
        axes = found.figures[name].axes
        assert [ax.get_title(loc="left").split(",")[0] for ax in axes] == ["MAE", "SimMIM"]
        lines = [line for ax in axes for line in ax.lines if not line.get_label().startswith("_")]
        looks.append({line.get_label(): line.get_color() for line in lines})
    assert list(looks[1]) == ["MAE", "MAE, early", "SimMIM", "SimMIM, early"]
    assert looks[0] == {name: looks[1][name] for name in ("MAE", "SimMIM")}


class TestWhatIsCommitted:
    def test_every_figure_has_its_script_its_files_and_its_caption(self) -> None:
        captions = (COMMITTED / CAPTIONS).read_text(encoding="utf-8")
        for name, figure in FIGURES.items():
            assert f'run_script("{name}", __file__)' in (COMMITTED / f"{name}.py").read_text(encoding="utf-8")
            for file in figure.files(Inputs()):
                assert file.endswith(".json") or (COMMITTED / file).is_file(), file
            assert f"\n## {name}\n" in captions

    def test_nothing_is_committed_that_no_figure_writes(self) -> None:
        known = {file for figure in FIGURES.values() for file in figure.files(Inputs())}
        known |= {CAPTIONS, *(f"{name}.py" for name in FIGURES), "supp-fig1.toml", "supp-fig2.toml", "table3.toml"}
        tracked = {path.name for path in COMMITTED.iterdir() if path.is_file()}
        assert tracked - known <= {
            f"{name}-measured{kind}" for name in FIGURES for kind in (".png", ".pdf", ".csv", ".md", ".tex")
        } | {"fig4-measured-rauc.csv"}

    def test_numbers_and_captions_agree_with_those_drawn_now(self) -> None:
        # One test, as tests run side by side would measure the models twice.
        found = redrawn(QUICK)
        committed = (COMMITTED / CAPTIONS).read_text(encoding="utf-8")
        for name, figure in found.items():
            assert list(figure.tables) == list(FIGURES[name].stems(FIGURES[name], Inputs())[1])
            for stem, table in figure.tables.items():
                assert_same_numbers(table, COMMITTED / f"{stem}.csv")
            for file, text in figure.texts.items():
                assert (COMMITTED / file).read_text(encoding="utf-8") == text, file
            caption = f"{FIGURES[name].title}. {figure.caption}"
            assert merge_captions(committed, {name: caption}, order=_order_of(committed)) == committed, name
        assert_maps_are_in_the_table(found["fig2"])
        assert_final_models_look_the_same(found["fig1a"], found["fig1b"])

    @pytest.mark.parametrize(
        ("name", "results"),
        [
            ("supp-fig1", "style_comparison"),
            ("fig4", "style_comparison"),
            ("supp-fig2", "decoder_depth"),
            ("table3", "ablation_table3"),
        ],
    )
    def test_what_was_measured_is_drawn_again_from_its_tables(self, name: str, results: str) -> None:
        folder = COMMITTED.parent / "docs/results" / results
        found = drawn(name, experiment=folder)
        for stem, table in found.tables.items():
            assert_same_numbers(table, COMMITTED / f"{stem}.csv")
        captions = " ".join((COMMITTED / CAPTIONS).read_text(encoding="utf-8").split())
        assert " ".join(found.caption.split()) in captions

    @pytest.mark.slow
    def test_numbers_of_the_slow_ones_agree(self) -> None:
        for figure in redrawn(SLOW).values():
            for stem, table in figure.tables.items():
                assert_same_numbers(table, COMMITTED / f"{stem}.csv")

    def test_images_have_the_width_of_the_page_and_fonts_are_embedded(self) -> None:
        for name in (name for name in FIGURES if "table" not in name):
            with Image.open(COMMITTED / f"{name}.png") as image:
                assert image.width == pytest.approx(TEXT_WIDTH * 300, abs=1), name
            pdf = (COMMITTED / f"{name}.pdf").read_bytes()
            assert b"/FontFile2" in pdf
            assert b"/Type3" not in pdf
            assert len(pdf) < 100_000

    def test_captions_of_measured_figures_say_n_and_interval(self) -> None:
        text = " ".join((COMMITTED / CAPTIONS).read_text(encoding="utf-8").split())
        for name in ("fig1a", "fig1b", "definitions"):
            section = text.split(f"## {name} ")[1].split("## ")[0]
            assert "n = 256 CIFAR-10 test images" in section
            assert "95 % interval" in section
        assert text.count("does not show that a model has converged") == 2


class TestCatalogue:
    def test_names_are_checked_and_choices_listed(self) -> None:
        with pytest.raises(ValueError, match=r"figure must be one of fig1a, fig1b.*got 'fig9'"):
            find_figures(["fig9"])

    def test_published_figures_refuse_checkpoints_and_others_refuse_experiments(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="fig4 takes no checkpoints or images"):
            find_figures(inputs=Inputs(checkpoints=["a.pth"], experiment=tmp_path))
        with pytest.raises(ValueError, match="table1 takes no checkpoints or images"):
            find_figures(["table1"], inputs=Inputs(checkpoints=("a.pth",)))
        with pytest.raises(ValueError, match="fig1a cannot be drawn from an experiment; those that can are fig4"):
            find_figures(["fig1a"], inputs=Inputs(experiment=tmp_path))

    def test_without_names_all_that_fit_the_inputs_are_taken(self, tmp_path: Path) -> None:
        assert [each.name for each in find_figures()] == list(FIGURES)
        measured = find_figures(inputs=Inputs(checkpoints=("a.pth",)))
        assert [each.name for each in measured] == ["fig1a", "fig1b", "fig2", "definitions", "controls"]
        experiment = find_figures(inputs=Inputs(experiment=tmp_path))
        assert [each.name for each in experiment] == ["fig4", "table3", "supp-fig1", "supp-fig2"]

    def test_inputs_are_checked_on_creation(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="one different label per checkpoint"):
            Inputs(checkpoints=("a", "b"), labels=("x", "x"))
        with pytest.raises(DataNotFoundError, match="no experiment at"):
            Inputs(experiment=tmp_path / "nowhere")

    def test_nothing_is_measured_when_a_file_is_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "fig2.csv").write_text("mine")
        with pytest.raises(OutputExistsError, match=r"fig2\.csv"):
            draw_paper(["fig1a", "fig2"], tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["fig2.csv"]


def test_merge_captions__replaces_its_own_and_keeps_the_others_in_order() -> None:
    new = {"fig4": "new", "fig1a": "first"}
    text = merge_captions("# Mine\n\n## fig4\n\nold\n\n## zz\n\nkept\n", new, order=list(FIGURES))
    assert text == "# Mine\n\n## fig1a\n\nfirst\n\n## fig4\n\nnew\n\n## zz\n\nkept\n"
    own = "# Mine\n\n## Notes\n\none\n\n## Notes\n\ntwo\n"
    assert merge_captions(own, {"a": "Maps."}) == own + "\n## a\n\nMaps.\n"


class TestMeasured:
    def test_other_checkpoints_and_images_are_drawn_with_their_names(
        self, checkpoints: dict[str, Path], image_folder: Path, tmp_path: Path
    ) -> None:
        inputs = Inputs(
            checkpoints=(str(checkpoints["mae"]), str(checkpoints["simmim"])),
            labels=("A model", "B"),
            images=image_folder,
            batch_size=4,
        )
        files = dict(draw_paper(["fig1a", "fig1b", "fig2"], tmp_path, inputs))
        assert {path.name for paths in files.values() for path in paths} >= {
            "fig1a.csv",
            "fig2-b.png",
            "fig2-b-maps.csv",
        }
        table = pd.read_csv(tmp_path / "fig1a.csv")
        assert dict.fromkeys(table["model"]) == {"A model": None, "B": None}
        assert set(table["num_images"]) == {6}
        caption = (tmp_path / CAPTIONS).read_text()
        assert "n = 6 images of images" in " ".join(caption.split())
        assert "bundled" not in caption

    def test_models_are_measured_once_for_figures_1_and_2(
        self, checkpoints: dict[str, Path], image_folder: Path, tmp_path: Path
    ) -> None:
        said: list[str] = []
        inputs = Inputs(checkpoints=(str(checkpoints["mae"]),), images=image_folder)
        list(draw_paper(["fig1a", "fig1b", "fig2"], tmp_path, inputs, listener=Listener(said.append)))
        assert sum("masks:" in line for line in said) == 1

    def test_definitions_and_controls_share_one_pass(
        self, checkpoints: dict[str, Path], image_folder: Path, tmp_path: Path
    ) -> None:
        said: list[str] = []
        inputs = Inputs(checkpoints=(str(checkpoints["mae"]),), images=image_folder, limit=3, device="auto")
        list(draw_paper(["definitions", "controls"], tmp_path, inputs, listener=Listener(said.append)))
        assert sum("masks:" in line for line in said) == 1
        controls = pd.read_csv(tmp_path / "controls.csv")
        assert set(controls["control"]) >= {"random_weights", "zero_token", "visible_null"}
        assert set(pd.read_csv(tmp_path / "definitions.csv")["num_images"]) == {3}


def test_draw_affinity__names_and_ranges_of_thirteen_maps_do_not_touch_on_a_page() -> None:
    values = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) * 1e-3
    maps = [AffinityMap("encoder", depth, None, 4, 5, "softmax", values) for depth in range(13)]
    with drawing(DrawingOptions("paper")), paper_style():
        figure = draw_affinity(maps)
        figure.draw_without_rendering()
    panels = [ax for ax in figure.axes if ax.images]
    assert len(panels) == 13
    for ax in panels:
        found = [text for text in (ax.title, ax._left_title, ax._right_title, *ax.texts) if text.get_text()]
        boxes = [text.get_window_extent() for text in found]
        assert any(" to " in text.get_text() for text in found)
        for index, one in enumerate(boxes):
            assert not any(one.overlaps(two) for two in boxes[index + 1 :])


class TestSchematic:
    def test_masked_tokens_enter_the_encoder_in_one_style_and_only_the_decoder_in_the_other(self) -> None:
        with drawing(DrawingOptions("paper")):
            figure = draw_schematic()
        hatched = {}
        for ax, style in zip(figure.axes[:2], ("inpainting", "decoder"), strict=True):
            squares = [patch for patch in ax.patches if hasattr(patch, "get_xy") and patch.get_hatch()]
            words = [text.get_text() for text in ax.texts]
            hatched[style] = (len(squares), words)
        masked = sum(TOKENS)
        assert hatched["inpainting"][0] == masked
        assert "Encoder\nall tokens" in hatched["inpainting"][1]
        assert hatched["decoder"][0] == 2 * masked + 1  # faint before the encoder, whole where they join, and the key
        assert "Encoder: visible tokens only" in hatched["decoder"][1]
        assert figure.get_size_inches()[0] == TEXT_WIDTH

    def test_losses_lie_on_their_quadrants(self) -> None:
        from matplotlib.figure import Figure

        with paper_style():
            ax = plot_losses_on_affinity(Figure().subplots(), num_masked=5, num_visible=3)
        frames = [p for p in ax.patches if not p.get_fill() and p.get_linewidth() == 1.5]
        entropy, sparsity = sorted(frames, key=lambda patch: patch.get_y())
        assert entropy.get_x() > 5  # masked row, visible columns: the second quadrant
        assert entropy.get_y() + entropy.get_height() < 5
        assert sparsity.get_y() > 5  # a visible row over all columns: third and fourth
        assert sparsity.get_x() < 1
        assert sparsity.get_width() > 7
        names = {text.get_text(): text.get_position() for text in ax.texts}
        assert names["2nd"][0] > names["1st"][0]
        assert names["2nd"][1] == names["1st"][1]
        assert names["3rd"][1] > names["1st"][1]

    def test_an_unknown_style_is_refused(self) -> None:
        from matplotlib.figure import Figure

        with pytest.raises(ValueError, match="style must be inpainting or decoder"):
            plot_style(Figure().subplots(), "both")


class TestPublished:
    def test_figure_4_draws_the_stated_epochs_and_areas_and_says_so(self) -> None:
        found = drawn("fig4")
        figure = found.figures["fig4"]
        left, right = figure.axes
        before, after = left.lines
        assert before.get_xdata().tolist() == [800] * 5
        assert after.get_xdata().tolist() == pytest.approx([368, 336, 400, 400, 456])
        assert left.get_yticklabels()[0].get_text() == "SimMIM, ViT-B"
        marks = [line for line in right.lines if str(line.get_label()).startswith("RAUC")]
        assert [line.get_xdata().tolist() for line in marks] == [[1.47, 1.19, 1.32, 1.21], [1.44, 1.22, 1.29, 1.17]]
        assert "the curves are not published" in figure.get_suptitle()
        assert "not measurements" in found.caption

    def test_supplementary_figure_1_compares_one_model_of_each_style(self) -> None:
        figure = drawn("supp-fig1").figures["supp-fig1"]
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert labels == ["SimMIM, inpainting style", "MAE, decoder style"]
        assert "not published" in figure.get_suptitle()

    def test_supplementary_figure_2_marks_the_stated_depths_only(self) -> None:
        found = drawn("supp-fig2")
        (ax,) = found.figures["supp-fig2"].axes
        points = {
            (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
            for line in ax.lines
            if line.get_marker() == "o" and len(line.get_xdata())
        }
        assert points == {(2.0, 0.0), (8.0, 0.0)}
        (below,) = [line for line in ax.lines if line.get_marker() == "v" and len(line.get_xdata())]
        assert (below.get_xdata()[0], below.get_ydata()[0]) == (12, 1)
        assert "82.9 %" in texts(found.figures["supp-fig2"])
        assert "60.5 %" in texts(found.figures["supp-fig2"])
        assert printed("supp_fig2_claims")["top1"].tolist().count("") == 4

    def test_a_claim_of_a_new_form_is_not_drawn_as_another(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from mto_analysis.figures.paper import published

        other = printed("supp_fig2_claims").assign(claim="something else")
        monkeypatch.setattr(published, "printed", lambda name: other)
        with pytest.raises(DataError, match="something else"):
            drawn("supp-fig2")

    def test_tables_are_text_with_printed_and_computed_cells(self) -> None:
        found = drawn("table2")
        assert not found.figures
        assert list(found.texts) == ["table2.md", "table2.tex"]
        for text in found.texts.values():
            for cell in ("2.36", "2.09", "56.35", "1.20"):
                assert cell in text
        assert "Recomputed: Eq. (6) with the reference S1(400)" in found.caption

    @pytest.mark.parametrize("name", [name for name in FIGURES if "table" in name])
    def test_every_cell_of_a_table_is_in_its_markdown(self, name: str) -> None:
        found = drawn(name)
        lines = [line for line in found.texts[f"{name}.md"].splitlines() if line.startswith("| ")]
        cells = [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines]
        frame = found.tables[name]
        assert cells == [list(frame.columns), *frame.astype(str).to_numpy().tolist()]


def curves_of(folder: Path, methods: dict[str, float], seeds: int = 3, **columns: object) -> Path:
    """An experiment's folder, in which each method is ahead by a number of points, and each seed by its own."""
    folder.mkdir(exist_ok=True)
    rows = [
        {
            "method": method,
            "epoch": epoch,
            "score": 10 + epoch + ahead + seed * (0.5 + 0.1 * ahead),
            "seed": seed,
            **columns,
        }
        for method, ahead in methods.items()
        for seed in range(seeds)
        for epoch in (2, 4, 6)
    ]
    pd.DataFrame(rows).to_csv(folder / "curves.csv", index=False)
    return folder


class TestExperiments:
    def test_figure_4_draws_means_over_seeds_with_their_interval_and_rauc(self, tmp_path: Path) -> None:
        folder = curves_of(tmp_path / "run", {"MAE": 0.0, "MAE + MTO": 1.0}, protocol="linear")
        found = drawn("fig4", experiment=folder)
        (ax,) = found.figures["fig4-measured"].axes
        baseline, target = ax.lines
        assert baseline.get_label() == "baseline"
        assert baseline.get_ydata().tolist() == pytest.approx([12.5, 14.5, 16.5])
        assert target.get_ydata().tolist() == pytest.approx([13.6, 15.6, 17.6])
        band = ax.collections[0]
        assert isinstance(band, PolyCollection)
        half = 4.302652729749464 * 0.5 / np.sqrt(3)  # Student's with two degrees of freedom
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.min() == pytest.approx(12.5 - half)
        rauc = found.tables["fig4-measured-rauc"]["rauc"].iloc[0]
        assert f"RAUC {rauc:.2f}" in texts(found.figures["fig4-measured"])
        assert rauc == pytest.approx((8 + 1.1 * 4) / 8)
        assert "n = 3 seeds" in found.caption
        assert "not the paper's curves" in found.caption

    def test_the_window_is_the_experiments_own(self, tmp_path: Path) -> None:
        folder = curves_of(tmp_path / "run", {"MAE": 0.0, "MAE + MTO": 1.0})
        rows = [{"axis": "hours", "start": 0, "end": 9}, {"axis": "epoch", "start": 4, "end": 6}]
        pd.DataFrame(rows).assign(baseline="MAE", target="MAE + MTO").to_csv(folder / "rauc.csv", index=False)
        table = drawn("fig4", experiment=folder).tables["fig4-measured-rauc"]
        assert table[["start", "end"]].to_numpy().tolist() == [[4, 6]]

    def test_supplementary_figure_1_pairs_gains_by_seed(self, tmp_path: Path) -> None:
        methods = {"SimMIM": 0.0, "SimMIM + MTO": 2.0, "MAE": 5.0, "MAE + MTO": 5.5}
        found = drawn("supp-fig1", experiment=curves_of(tmp_path / "run", methods))
        table = found.tables["supp-fig1-measured"]
        gain = table[(table["panel"] == "gain by MTO") & (table["method"] == "SimMIM + MTO")]
        assert gain["score"].tolist() == pytest.approx([2.2] * 3)  # ahead by 2, 2.2 and 2.4
        spread = 4.302652729749464 * 0.2 / np.sqrt(3)
        assert gain["low"].tolist() == pytest.approx([2.2 - spread] * 3)
        accuracy, right = found.figures["supp-fig1-measured"].axes
        assert len(accuracy.lines) == 4
        assert len([line for line in right.lines if not line.get_label().startswith("_")]) == 2

    def test_supplementary_figure_2_reads_depths_from_names_or_a_column(self, tmp_path: Path) -> None:
        named = {f"MAE, depth {depth}{more}": float(depth) for depth in (1, 4) for more in ("", " + MTO")}
        found = drawn("supp-fig2", experiment=curves_of(tmp_path / "one", named))
        table = found.tables["supp-fig2-measured"]
        assert table[table["method"] == "baseline"]["place"].tolist() == [1, 4]
        assert table["score"].tolist() == pytest.approx([17.6, 20.9, 17.6, 20.9])  # after the last epoch
        column = curves_of(tmp_path / "two", {"MAE": 0.0, "MAE + MTO": 1.0}, decoder_depth=2)
        several = curves_of(tmp_path / "arms", {"MAE": 0.0, "MAE + MTO": 1.0, "MAE + L_e": 2.0}, decoder_depth=2)
        with pytest.raises(DataError, match="has several arms with MTO"):
            drawn("supp-fig2", experiment=several)
        assert set(drawn("supp-fig2", experiment=column).tables["supp-fig2-measured"]["place"]) == {2}
        with pytest.raises(DataError, match="does not say its decoder depth"):
            drawn("supp-fig2", experiment=curves_of(tmp_path / "three", {"MAE": 0.0}))

    def test_depths_are_read_from_the_labels_of_the_shipped_experiment(self, tmp_path: Path) -> None:
        file = Path(registry.__file__).parents[1] / "assets/experiments/decoder_depth.toml"
        labels = [recipe["label"] for recipe in tomllib.loads(file.read_text())["recipes"]]
        methods = {label + more: 1.0 for label in labels for more in ("", " + MTO")}
        table = drawn("supp-fig2", experiment=curves_of(tmp_path / "run", methods)).tables["supp-fig2-measured"]
        assert table[table["method"] == "with MTO"]["place"].tolist() == [1, 2, 4, 8, 12]

    def test_table_3_sets_the_measured_beside_the_printed(self, tmp_path: Path) -> None:
        file = Path(registry.__file__).parents[1] / "assets/experiments/ablation_table3.toml"
        arms = [arm["name"] for arm in tomllib.loads(file.read_text())["arms"]]
        ahead = {arm: float(index) for index, arm in enumerate(arms)}
        methods = {"SimMIM" if arm == "no loss" else f"SimMIM + {arm}": value for arm, value in ahead.items()}
        found = drawn("table3", experiment=curves_of(tmp_path / "run", methods))
        frame = found.tables["table3-measured"]
        assert frame["printed"].tolist() == ["", *printed("table3_loss_ablation")["top1"]]
        assert "weights" not in frame
        assert frame["difference"].iloc[1:].tolist() == pytest.approx([1.1 * value for value in range(1, 8)])
        for kind in ("md", "tex"):
            text = found.texts[f"table3-measured.{kind}"]
            assert "16.50" in text  # the mean over seeds of the last epoch, without any loss
            assert "+1.10 [" in text
        weighted = {"SimMIM": 0.0, "SimMIM + L_e": 1.0, "SimMIM + L_e at 0.001": 2.0}
        frame = drawn("table3", experiment=curves_of(tmp_path / "weighted", weighted)).tables["table3-measured"]
        assert frame["weights"].tolist() == ["", "", "0.001"]
        assert frame["L_e"].tolist() == ["", "x", "x"]
        assert (frame["printed"] != "").tolist() == [False, True, False]
        with pytest.raises(DataError, match="arm 'MTO' must be named after its losses"):
            drawn("table3", experiment=curves_of(tmp_path / "other", {"SimMIM": 0.0, "SimMIM + MTO": 1.0}))

    def test_one_seed_has_no_band(self, tmp_path: Path) -> None:
        folder = curves_of(tmp_path / "run", {"MAE": 0.0, "MAE + MTO": 1.0}, seeds=1)
        found = drawn("fig4", experiment=folder)
        (ax,) = found.figures["fig4-measured"].axes
        assert not ax.collections
        assert "n = 1 seed;" in found.caption

    def test_the_experiment_tells_which_method_is_a_baseline(self, tmp_path: Path) -> None:
        folder = curves_of(tmp_path / "out", {"MAE": 0, "MAE + MTO": 1, "MAE + aug": 2, "MAE + aug + MTO": 4})
        pairs = {"baseline": ["MAE", "MAE + aug"], "target": ["MAE + MTO", "MAE + aug + MTO"]}
        pd.DataFrame({**pairs, "axis": "epoch", "start": 2, "end": 6}).to_csv(folder / "rauc.csv", index=False)
        rauc = drawn("fig4", experiment=folder).tables["fig4-measured-rauc"]
        assert rauc[["baseline", "target"]].to_dict("list") == pairs

    def test_folders_without_curves_or_pairs_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataNotFoundError, match=r"holds no curves\.csv"):
            drawn("fig4", experiment=tmp_path)
        with pytest.raises(DataError, match=r"no method is another's name and more after ' [+] '; there are A, B"):
            drawn("fig4", experiment=curves_of(tmp_path / "run", {"A": 0.0, "B": 1.0}))

    def test_plot_runs__names_missing_columns(self) -> None:
        from matplotlib.figure import Figure

        with pytest.raises(DataError, match=r"no columns .*low"):
            plot_runs(pd.DataFrame({"method": ["a"], "place": [1], "score": [2]}), ax=Figure().subplots())


@pytest.fixture
def public_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A server with a small trained MAE in place of the public one, and a cache for SimMIM's file."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("MTO_ANALYSIS_CACHE", str(cache))
    with serve({"/mae.safetensors": Page(DEMO_CHECKPOINTS["MAE"].read_bytes())}) as server:
        entries = tuple(
            type(row)(**{**vars(row), "source": f"{server.url}/mae.safetensors"}) if row.id == PUBLIC["MAE"] else row
            for row in registry._rows()
        )
        monkeypatch.setattr(registry, "_rows", lambda: entries)
        yield server, cache / PUBLIC["SimMIM"]


class TestPublicFiles:
    def test_figures_1_and_2_are_drawn_of_the_fetched_files(self, public_files, tmp_path: Path) -> None:
        server, place = public_files
        place.mkdir(parents=True)
        (place / "any-name.safetensors").write_bytes(DEMO_CHECKPOINTS["SimMIM"].read_bytes())
        said: list[str] = []
        out = tmp_path / "out"
        inputs = Inputs(limit=4)
        figures = [figure.name for figure, _ in draw_public((), out, inputs, listener=Listener(said.append))]
        assert sorted(figures) == ["fig1a", "fig1b", "fig2"]
        assert any(path == "/mae.safetensors" for _, path, _ in server.requests)
        assert [line for line in said if "reconstruction loss" in line and "sha256" in line]
        assert set(pd.read_csv(out / "fig1a.csv")["model"]) == {"SimMIM", "MAE"}
        epochs = pd.read_csv(out / "fig1b.csv")
        assert set(epochs["model"]) == {"SimMIM", "SimMIM, random weights"}
        untrained = epochs[epochs["model"] == "SimMIM, random weights"]
        assert not np.allclose(
            untrained["heterogeneity"], epochs[epochs["model"] == "SimMIM"]["heterogeneity"], atol=1e-4
        )
        assert "bundled" not in (out / CAPTIONS).read_text()

    def test_it_says_where_to_put_the_file_that_wants_a_browser_and_fetches_the_other(
        self, public_files, tmp_path: Path
    ) -> None:
        _, place = public_files
        with pytest.raises(
            CheckpointError, match=f"files on Google Drive must be downloaded by hand.*put the file into {place}"
        ):
            list(draw_public((), tmp_path / "out", Inputs(limit=2)))
        assert (place.parent / PUBLIC["MAE"] / "mae.safetensors").is_file()
        assert not (tmp_path / "out").exists()

    def test_a_file_no_better_than_the_mean_is_refused(self, public_files, tmp_path: Path) -> None:
        _, place = public_files
        place.mkdir(parents=True)
        (place / "early.safetensors").write_bytes(DEMO_CHECKPOINTS["SimMIM, early"].read_bytes())
        with pytest.raises(CheckpointError, match="should be simmim_vit_base_800e, but: reconstruction loss"):
            list(draw_public((), tmp_path / "out", Inputs(limit=4)))

    def test_an_early_checkpoint_takes_the_place_of_random_weights(self, public_files, tmp_path: Path) -> None:
        _, place = public_files
        place.mkdir(parents=True)
        (place / "final.safetensors").write_bytes(DEMO_CHECKPOINTS["SimMIM"].read_bytes())
        early = ["--ckpt", str(DEMO_CHECKPOINTS["SimMIM, early"]), "--label", "SimMIM, early"]
        result = runner.invoke(
            app, ["figures", "--public", "fig1b", *early, "--limit", "3", "--out", str(tmp_path / "out")]
        )
        assert result.exit_code == 0, result.output
        assert "SimMIM: sha256" in result.stderr
        assert set(pd.read_csv(tmp_path / "out/fig1b.csv")["model"]) == {"SimMIM", "SimMIM, early"}

    def test_an_unknown_device_is_a_usage_error(self, public_files, tmp_path: Path) -> None:
        result = runner.invoke(app, ["figures", "fig1a", "--device", "abacus", "--out", str(tmp_path / "out")])
        assert result.exit_code == 2
        assert "device abacus cannot be used" in result.stderr

    def test_figures_without_models_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="table1 shows no model"):
            list(draw_public(["table1"], tmp_path))


class TestCommand:
    def test_it_draws_and_names_the_files(self, tmp_path: Path) -> None:
        result = runner.invoke(app, ["figures", "table1", "fig3", "--out", str(tmp_path)])
        assert result.exit_code == 0, result.output
        assert "table1: table1.md, table1.tex, table1.csv" in result.stdout
        assert {path.name for path in tmp_path.iterdir()} >= {"fig3.pdf", "table1.csv", CAPTIONS}
        again = runner.invoke(app, ["figures", "table1", "--out", str(tmp_path)])
        assert again.exit_code == 2
        assert "pass --overwrite" in again.stderr

    def test_it_lists_what_there_is_without_drawing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        result = runner.invoke(app, ["figures", "--list"])
        assert result.exit_code == 0
        assert [line.split()[0] for line in result.stdout.splitlines()] == list(FIGURES)
        assert not list(tmp_path.iterdir())

    def test_a_wrong_name_is_a_usage_error(self) -> None:
        result = runner.invoke(app, ["figures", "fig7"])
        assert result.exit_code == 2
        assert "figure must be one of" in result.stderr

    def test_it_takes_checkpoints_and_images(self, checkpoints: dict[str, Path], tmp_path: Path) -> None:
        models = ["--ckpt", str(checkpoints["simmim"]), "--ckpt", str(checkpoints["simmim_early"])]
        names = ["--label", "late", "--label", "early"]
        images = ["--images", str(DEMO_IMAGES), "--limit", "3"]
        result = runner.invoke(app, ["figures", "fig1b", *models, *names, *images, "--out", str(tmp_path)])
        assert result.exit_code == 0, result.output
        assert list(dict.fromkeys(pd.read_csv(tmp_path / "fig1b.csv")["model"])) == ["late", "early"]

    def test_a_script_writes_beside_itself_unless_told_otherwise(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script = tmp_path / "table3.py"
        script.write_text((COMMITTED / "table3.py").read_text())
        monkeypatch.chdir(tmp_path.parent)
        monkeypatch.setattr(sys, "argv", [str(script)])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(script), run_name="__main__")
        assert (tmp_path / "table3.tex").is_file()
        assert not list(tmp_path.parent.glob("table3.*"))


def test_paper_style__is_a_style_sheet_that_anybody_can_use() -> None:
    import matplotlib as mpl
    from matplotlib import style

    with style.context(PAPER_STYLE):
        assert mpl.rcParams["pdf.fonttype"] == 42
        outside = dict(mpl.rcParams)
    with paper_style():
        assert dict(mpl.rcParams) == outside
