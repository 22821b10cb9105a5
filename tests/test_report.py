"""The report as a file: structure, size, nothing from outside, escaping, determinism, numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from report_cases import explorer_data, read_mask, read_products, save_twelve_layers
from typer.testing import CliRunner

from mto_analysis import affinity_matrix, heterogeneity, load_checkpoint
from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_IMAGES
from mto_analysis.errors import DataError, NumericalError, OutputExistsError
from mto_analysis.figures.plots.heterogeneity import draw_heterogeneity
from mto_analysis.figures.report import ReportContents, render_report
from mto_analysis.figures.report_contents import collect_report
from mto_analysis.figures.saved import read_effects
from mto_analysis.images import choose_images, open_images
from mto_analysis.probe import explore
from mto_analysis.probe.explore import PackedProducts, explore_shown
from mto_analysis.probe.request import Request, Settings
from mto_analysis.probe.shown import shown_models
from mto_analyze import app

LABELS = ("MAE", "SimMIM")
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028'\"&"


@pytest.fixture(scope="module")
def contents() -> ReportContents:
    sources = [DEMO_CHECKPOINTS[label] for label in LABELS]
    return collect_report(Request(sources, open_images(DEMO_IMAGES), Settings(limit=8), LABELS), shown=2)


@pytest.fixture(scope="module")
def html(contents: ReportContents) -> str:
    return render_report(contents)


class Page(HTMLParser):
    """Elements, ids and the text outside scripts and styles."""

    void = frozenset(("meta", "input", "link", "img", "br"))

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def test_render_report__is_well_formed_with_unique_ids_and_labels(html: str) -> None:
    page = Page(html)
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for tag, attributes in page.tags:
        for reference in ("aria-labelledby", "for"):
            if reference in attributes and attributes[reference] != "depths-title":  # made by the script
                assert attributes[reference] in ids, (tag, attributes)
    headings = re.findall(r"<h2[^>]*>([^<]*)", html)
    first = ["Explorer", "Heterogeneity over layer depth", "Figures"]
    assert headings == [*first, "Numbers per layer", "Reconstructions", "The run"]
    assert 'aria-live="polite"' in html


def test_render_report__loads_nothing_from_outside(html: str) -> None:
    bare = re.sub(r'data:image/png;base64,[\w+/=\s]*| xmlns(:\w+)?="[^"]*"', "", html)
    bare = re.sub(r'"levels":"[^"]*"', "", bare)
    assert re.findall(r"https?:|[\"'(]//|@import|url\((?!#)", bare) == []
    for tag, attributes in Page(html).tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,")), (tag, attributes[name])
    assert "default-src 'none'" in html


def test_render_report__lets_its_own_script_run_and_no_other(html: str) -> None:
    import base64
    import hashlib

    script = html[html.index("<script>") + len("<script>") : html.rindex("</script>")]
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in html


def test_render_report__escapes_what_users_named(contents: ReportContents) -> None:
    first = contents.explored[0]
    evil = ReportContents(
        contents.table.assign(model=contents.table["model"].replace("MAE", EVIL)),
        [{**contents.models[0], "model": EVIL, "source": EVIL, "masks": EVIL}],
        [replace(first, model=EVIL, images=tuple(replace(each, image=EVIL) for each in first.images))],
        [replace(row, model=EVIL.replace("\u2028", ""), image="<b>") for row in contents.reconstructions],
        {EVIL: EVIL},
    )
    html = render_report(evil, title=EVIL)
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert [name for _, attributes in page.tags for name in attributes if name.startswith("on")] == []
    assert EVIL in page.text
    assert explorer_data(html)["models"][0]["label"] == EVIL
    assert explorer_data(html)["models"][0]["images"][0]["name"] == EVIL


def test_render_report__is_the_same_each_time(contents: ReportContents, html: str) -> None:
    assert render_report(contents) == html


def test_explorer_data__gives_back_the_products_and_h_of_the_library(contents: ReportContents, html: str) -> None:
    data = explorer_data(html)
    images = choose_images(open_images(DEMO_IMAGES), [p["name"] for p in data["models"][0]["images"]])
    for stored, label in zip(data["models"], LABELS, strict=True):
        shown = next(shown_models(Request([DEMO_CHECKPOINTS[label]], images)))
        error = next(each.product_error for each in contents.explored if each.model == label)
        for layer in load_checkpoint(DEMO_CHECKPOINTS[label]).layer_tokens(shown.images, shown.mask):
            with torch.no_grad():
                exact = affinity_matrix(layer.tokens.detach(), kind="dot").numpy()
                measured = heterogeneity(layer.tokens.detach(), layer.mask).numpy()
            for row, image in enumerate(stored["images"]):
                depth = image["depths"][layer.depth]
                mask = read_mask(depth)
                assert np.array_equal(mask, layer.mask[row].numpy())
                products = read_products(depth)
                assert np.abs(products - exact[row]).max() <= error + 1e-6 * np.abs(exact[row]).max()
                logits = products[mask][:, ~mask]
                weight = np.exp(logits - logits.max(axis=1, keepdims=True))
                weight /= weight.sum(axis=1, keepdims=True)
                h = -(weight * np.log(np.maximum(weight, 1e-300))).sum(axis=1).mean()
                assert h == pytest.approx(measured[row], abs=1e-5)


def test_render_report__states_the_error_it_makes(contents: ReportContents, html: str) -> None:
    product = max(each.product_error for each in contents.explored)
    entropy = max(each.heterogeneity_error for each in contents.explored)
    assert entropy < 1e-5
    assert f"off by at most {product:.2g}" in html
    assert f"at most {entropy:.1g} nats" in html


def test_render_report__tables_hold_the_measured_numbers(contents: ReportContents, html: str) -> None:
    for _, row in contents.table.iterrows():
        assert f"<td>{row['heterogeneity']:.4f}</td><td>{row['ci_low']:.4f} to {row['ci_high']:.4f}</td>" in html
    for each in contents.explored:
        for depth in range(each.num_depths + 1):
            masses = np.mean([image.depths[depth].quadrant_mass for image in each.images], axis=0)
            assert masses[:2].sum() == pytest.approx(1, abs=1e-5)
            assert masses[2:].sum() == pytest.approx(1, abs=1e-5)
            assert "".join(f"<td>{mass:.3f}</td>" for mass in masses) in html
    for row in contents.reconstructions:
        assert f"<td>{row.loss:.4g}</td><td>{row.predict_the_mean:.4g}</td>" in html
    for model in contents.models:
        assert model["sha256"] in html


def test_packed_products__are_off_by_at_most_half_a_step() -> None:
    tokens = 40 * np.random.default_rng(0).standard_normal((50, 16))
    products = tokens @ tokens.T
    packed = PackedProducts.pack(products)
    assert len(packed.levels) == 3 * 50 * 51 // 2
    assert packed.step == pytest.approx((products.max() - products.min()) / (2**24 - 1))
    assert np.abs(packed.unpack() - products).max() <= packed.step / 2 * (1 + 1e-6)
    same = PackedProducts.pack(np.full((3, 3), 7.0))
    assert (same.unpack() == 7).all()


def test_explore_shown__leaves_out_large_grids_and_refuses_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    images = choose_images(open_images(DEMO_IMAGES), ["3"])
    shown = next(shown_models(Request([DEMO_CHECKPOINTS["MAE"]], images)))
    monkeypatch.setattr(explore, "MAX_PATCHES", 63)
    explored = explore_shown(shown)
    assert explored[0].left_out == (0, 1, 2, 3, 4)
    assert explored[0].images[0].depths == ()
    monkeypatch.undo()
    with torch.no_grad():
        shown.model.decoder_pos_embed.mul_(float("inf"))
    with pytest.raises(NumericalError, match="decoder at layer depth 0"):
        explore_shown(shown)


def test_render_report__does_without_explorer_and_pixels(contents: ReportContents) -> None:
    bare = [replace(each, images=tuple(replace(p, depths=()) for p in each.images)) for each in contents.explored]
    html = render_report(replace(contents, explored=bare, reconstructions=[]))
    assert Page(html).open == []
    assert explorer_data(html)["models"] == []
    assert "too many to explore" in html
    assert "None of these models predicts pixels" in html


def test_render_report__takes_more_figures_with_their_captions(contents: ReportContents) -> None:
    more = {f"Again, {number} < 2": draw_heterogeneity(contents.table) for number in range(2)}
    page = Page(render_report(replace(contents, figures=more)))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert all(caption in page.text for caption in more)
    assert [tag for tag, _ in page.tags].count("svg") == 7


def test_report_command__keeps_notes_beside_a_report_of_any_name(tmp_path: Path) -> None:
    (tmp_path / "paper-methods.md").write_text("mine")
    command = ["report", "--ckpt", str(DEMO_CHECKPOINTS["MAE"]), "--limit", "1", "--show", "1", "--out"]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "paper")])
    assert result.exit_code == OutputExistsError.exit_code
    assert "paper-methods.md is not from an earlier run" in result.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["paper-methods.md"]


def test_report_command__shows_interventions_and_models_of_the_users_code(tmp_path: Path) -> None:
    effects = pd.DataFrame(
        [
            {"model": "mine", "stack": "decoder", "from_depth": 0, "intervention": "zero", "condition": condition}
            | {"measure": "cosine", "effect": -0.25, "ci_low": -0.375, "ci_high": -0.125, "num_images": 2}
            for condition in ("masked", "some_masked", "some_visible", "difference")
        ]
    )
    effects.to_csv(tmp_path / "interventions.csv", index=False)
    out = tmp_path / "report.html"
    model = f"{mae_of_the_demo.__module__}:{mae_of_the_demo.__name__}"
    command = ["report", "-q", "--model", model, "--limit", "2", "--show", "1", "--out", str(out), "--overwrite"]
    command += ["--interventions", str(tmp_path / "interventions.csv")]
    result = CliRunner().invoke(app, [*command, "--label", "mine"])
    assert result.exit_code == 0, result.output
    page = Page(out.read_text(encoding="utf-8"))
    assert page.open == []
    assert "replace by zero" in page.text
    assert "-0.25" in page.text
    assert "Losses per image" in page.text  # a model of this package predicts pixels, whoever made it
    other = CliRunner().invoke(app, [*command, "--label", "other"])
    assert other.exit_code == 4
    assert "is about mine, not about other; name the models as there, with --label" in other.stderr
    with pytest.warns(UserWarning, match="has no interventions of other$"):
        assert len(read_effects(tmp_path / "interventions.csv", ["other", "mine"])) == len(effects)


def mae_of_the_demo() -> torch.nn.Module:
    return load_checkpoint(DEMO_CHECKPOINTS["MAE"])


def test_collect_report__says_at_once_that_a_image_is_not_there() -> None:
    with pytest.raises(DataError, match="no image cat"):
        collect_report(Request([DEMO_CHECKPOINTS["MAE"]], open_images(DEMO_IMAGES)), shown=["cat"])


def test_report_command__stays_under_ten_megabytes_for_four_images_and_twelve_layers(tmp_path: Path) -> None:
    checkpoint = save_twelve_layers(tmp_path / "twelve.safetensors")
    out = tmp_path / "new" / "report.html"
    arguments = ["report", "-q", "--ckpt", str(checkpoint), "--limit", "4", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    stored = explorer_data(out.read_text(encoding="utf-8"))["models"][0]["images"]
    assert [len(image["depths"]) for image in stored] == [13] * 4
    assert all(len(depth["mask"]) == 196 for image in stored for depth in image["depths"])
    assert out.stat().st_size < 10e6
    assert CliRunner().invoke(app, arguments).exit_code == 2
