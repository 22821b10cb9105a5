"""Every measure against a slow loop and closed forms; the pass with all of them against each alone."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from model_kinds import Behind, Inpainting, features
from torch import Tensor
from typer.testing import CliRunner
from watched_models import batch_of, small_mae, small_simmim

from mto_analysis import measure
from mto_analysis.affinity import TokenSplit
from mto_analysis.demo import DEMO_CHECKPOINTS
from mto_analysis.images import ImageBatch
from mto_analysis.masks import MaskRule
from mto_analysis.models import ModelInfo, SimMIMSwin, SwinConfig
from mto_analysis.mto import StackSpec
from mto_analysis.probe import masks_from_rule, probe
from mto_analysis.probe.accumulating import EmbeddingRows, Row, groups_of
from mto_analysis.probe.frequencies import frequency_amplitudes
from mto_analysis.probe.measures import MEASURES, names_of
from mto_analysis.probe.separability import explained_labels, label_moments
from mto_analysis.probe.similarity import linear_cka, unbiased_hsic
from mto_analysis.probe.spectra import effective_rank, lidar, mean_cosine, rankme
from mto_analysis.runtime import plugins
from mto_analysis.runtime.statistics import jackknife_interval, t_quantile
from mto_analyze import app

MASK = torch.rand(3, 16, generator=torch.Generator().manual_seed(5)).argsort(dim=1) < torch.tensor([[5], [9], [12]])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(dim: int, seed: int = 1) -> Tensor:
    return torch.linalg.qr(normal(dim, dim, seed=seed)).Q


def with_spectrum(values: Tensor, rows: int, dim: int) -> Tensor:
    return rotation(rows)[:, : len(values)] * values @ rotation(dim, seed=2)[: len(values)]


def slow_rank(values: Tensor, epsilon: float = 0.0) -> float:
    shares = [value / sum(values.tolist()) + epsilon for value in values.tolist()]
    return math.exp(-sum(share * math.log(share) for share in shares if share > 0))


# ---- ranks


def test_ranks__of_known_spectra() -> None:
    for values in (torch.ones(5).double(), torch.tensor([4.0, 2.0, 1.0, 1.0]).double()):
        for rows, dim in ((7, 20), (20, 7)):
            x = with_spectrum(values, rows, dim)
            assert effective_rank(x).item() == pytest.approx(slow_rank(values), rel=1e-6)
            assert rankme(x).item() == pytest.approx(slow_rank(torch.linalg.svdvals(x), 1e-7), rel=1e-6)
    assert effective_rank(torch.zeros(4, 3)).item() == effective_rank(torch.ones(4, 3)).round(decimals=5).item() == 1
    several = normal(2, 3, 6, 4)
    one = effective_rank(several[1, 2]).item()
    assert effective_rank(several)[1, 2].item() == pytest.approx(one)
    assert effective_rank(several[1, 2] @ rotation(4)).item() == pytest.approx(one)


def test_lidar__agrees_with_its_definition() -> None:
    views = normal(30, 4, 6) * 0.1 + normal(30, 1, 6, seed=3) * torch.tensor([3, 2, 1, 1, 0.5, 0.1])
    means = views.mean(dim=1)
    between, within = torch.zeros(6, 6).double(), 1e-4 * torch.eye(6).double()
    for image in range(30):
        apart = means[image] - means.mean(dim=0)
        between += torch.outer(apart, apart) / 30
        for view in views[image]:
            within += torch.outer(view - means[image], view - means[image]) / 120
    values, vectors = torch.linalg.eigh(within)
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    expected = slow_rank(torch.linalg.eigvalsh(root @ between @ root), 1e-7)
    deviations = (views - means[:, None]).flatten(0, 1)
    assert lidar(means, deviations).item() == pytest.approx(expected, rel=1e-6)
    assert math.isnan(lidar(torch.ones(5, 3), torch.zeros(5, 3)).item())


def test_mean_cosine__agrees_with_all_pairs() -> None:
    x = normal(2, 5, 3)
    for image in range(2):
        pairs = [torch.cosine_similarity(x[image, i], x[image, j], dim=0) for i in range(5) for j in range(5) if i != j]
        assert mean_cosine(x)[image].item() == pytest.approx(torch.stack(pairs).mean().item())
    assert mean_cosine(x[:, :1]).tolist() == [1, 1]
    assert mean_cosine(torch.eye(4)).item() == 0


def test_embedding_rows__keep_their_second_moments_in_bounded_memory() -> None:
    rows, everything, groups = EmbeddingRows(), [], []
    for seed in range(40):
        x = torch.cat([normal(8, 3, seed=seed).float(), torch.ones(8, 1)], dim=1)
        group = groups_of([f"{seed} {row}" for row in range(8)])
        rows.add(x, group)
        everything.append(x)
        groups.append(group)
    assert len(rows.all()[0]) <= 2 * 5 * 4 + 8
    x, group = torch.cat(everything).double(), torch.cat(groups)
    for out in (None, 3):
        kept = x if out is None else x[group != out]
        small = rows.without(out)
        torch.testing.assert_close(small.mT @ small, kept.mT @ kept, rtol=1e-5, atol=1e-4)


# ---- CKA


def slow_hsic(k: Tensor, m: Tensor) -> float:
    """The sum over quadruples of different images, of which the closed form is a rearrangement."""
    n, total = len(k), 0.0
    for i in range(n):
        for j in range(n):
            if i == j:
                continue
            total += (k[i, j] * m[i, j]).item() / (n * (n - 1))
            for q in range(n):
                if q in (i, j):
                    continue
                total -= 2 * (k[i, j] * m[i, q]).item() / (n * (n - 1) * (n - 2))
                for r in range(n):
                    if r not in (i, j, q):
                        total += (k[i, j] * m[q, r]).item() / (n * (n - 1) * (n - 2) * (n - 3))
    return total


def test_cka__closed_forms_and_slow_hsic() -> None:
    x, y = normal(7, 5), normal(7, 3, seed=4)
    kernels = [x @ x.mT, y @ y.mT]
    assert unbiased_hsic(kernels[0][None], kernels[1][None]).item() == pytest.approx(slow_hsic(*kernels), rel=1e-9)
    batches = [(normal(6, 5, seed=seed), normal(9, 5, seed=seed)) for seed in range(3)]
    same = [(first, first) for first, _ in batches]
    assert linear_cka(same).item() == pytest.approx(1, abs=1e-12)
    turned = [(first, 3 * first @ rotation(5) + 7) for first, _ in batches]  # a shift is centred away
    assert linear_cka(turned).item() == pytest.approx(1, abs=1e-9)
    unrelated = [(normal(8, 4, seed=seed), normal(8, 4, seed=1000 + seed)) for seed in range(300)]
    assert abs(linear_cka(unrelated).item()) < 0.1
    with pytest.raises(ValueError, match="needs 4 images at least, got 3"):
        unbiased_hsic(torch.eye(3), torch.eye(3))
    assert math.isnan(linear_cka([(torch.zeros(5, 2), x[:5])]).item())


# ---- frequencies and separability


def test_frequency_amplitudes__agree_with_the_sums() -> None:
    tokens, grid = normal(3, 16, 2).float(), (4, 4)
    found = frequency_amplitudes(tokens, MASK, grid)
    for image in range(3):
        low, high = [], []
        seen = tokens[image][~MASK[image]].double()
        places = [(at // 4, at % 4) for at in (~MASK[image]).nonzero().flatten().tolist()]
        for u in (0, 1, -2, -1):
            for v in (0, 1, -2, -1):
                waves = torch.tensor([2 * math.pi * (u * row + v * column) / 4 for row, column in places]).double()
                centred = seen - seen.mean(dim=0)
                sums = (centred * torch.exp(-1j * waves)[:, None]).sum(dim=0).abs().mean() / math.sqrt(len(places))
                if max(abs(u), abs(v)) == 2:
                    high.append(sums.item())
                elif (u, v) != (0, 0):
                    low.append(sums.item())
        expected = [np.mean(low), np.mean(high), math.log(np.mean(high) / np.mean(low))]
        assert found[image].tolist() == pytest.approx(expected, rel=1e-4)
    random = torch.rand(60, 196, generator=torch.Generator().manual_seed(2)) < 0.6
    noise = frequency_amplitudes(normal(60, 196, 32).float(), random, (14, 14))
    assert abs(noise[:, 2].mean().item()) < 0.02  # white under a mask


def test_separability__agrees_with_least_squares_and_the_mahalanobis_distance() -> None:
    mask, tokens = MASK.repeat(40, 1), normal(120, 16, 4)
    tokens[mask] += torch.tensor([1.5, 0, 0, 0.5]).double()
    fitted, tested = (label_moments(tokens[part], mask[part]) for part in (slice(100), slice(100, 120)))
    rows, labels, weights = [], [], []
    for image in range(120):
        for place in range(16):
            kind = mask[image] == mask[image, place]
            rows.append([*tokens[image, place].tolist(), 1.0])
            labels.append(1.0 if mask[image, place] else -1.0)
            weights.append(0.5 / kind.sum().item())
    x, y, w = (np.array(each) for each in (rows, labels, weights))
    train, root = slice(1600), np.sqrt(w[:1600])
    solution = np.linalg.lstsq(x[train] * root[:, None], y[train] * root, rcond=None)[0]
    error = (w[1600:] * (y[1600:] - x[1600:] @ solution) ** 2).sum() / w[1600:].sum()
    assert explained_labels(fitted, tested).item() == pytest.approx(1 - error, abs=1e-5)
    distance = 1.5**2 + 0.5**2
    assert explained_labels(fitted, tested).item() == pytest.approx(distance / (distance + 4), abs=0.1)
    large = torch.arange(196).expand(1, -1) % 5 < 3  # 118 masked, 78 visible: 32 of each, spread over all
    place = torch.arange(196.0)[None, :, None] / 195
    moments = label_moments(place, large)
    assert moments[1, 1].item() == pytest.approx(1)
    assert moments[0, 1].item() == pytest.approx(0.5, abs=0.02)
    assert moments[0, 0].item() == pytest.approx(1 / 3, abs=0.02)
    apart = torch.where(MASK[..., None], 1.0, -1.0)
    assert explained_labels(label_moments(apart, MASK), label_moments(apart, MASK)).item() == pytest.approx(1, abs=1e-4)


# ---- intervals


def test_jackknife_interval__of_a_mean_is_the_usual_one() -> None:
    x = np.array([1.0, 4.0, 2.0, 8.0])
    without = {place: float(np.delete(x, place).mean()) for place in range(4)}
    half = t_quantile(3) * x.std(ddof=1) / 2
    low, high = jackknife_interval(x.mean(), without, dict.fromkeys(range(4), 1))
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half))
    assert np.isnan(jackknife_interval(1.0, {0: 1.0}, {0: 3})).all()


# ---- the pass


def named(batch: ImageBatch, count: int) -> list[ImageBatch]:
    """A batch of all images and a small one."""
    images = batch.images.repeat(count // len(batch.images) + 1, 1, 1, 1)[:count]
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(3))
    names = [f"{row}.png" for row in range(count)]
    return [ImageBatch(tuple(names[:-4]), (images + noise)[:-4]), ImageBatch(tuple(names[-4:]), (images + noise)[-4:])]


@pytest.fixture(scope="module", params=[small_mae, small_simmim])
def measured(request):
    model = request.param().eval()
    batches = named(batch_of(model), 12)
    return model, batches, probe(model, batches, masks_per_image=2, measures="all")


def alone(table: pd.DataFrame, **chosen: object) -> pd.DataFrame:
    rows = table[table["head"].isna()] if "head" not in chosen else table
    for column, value in chosen.items():
        rows = rows[rows[column] == value]
    return rows


def test_pass__all_measures_equal_their_pure_functions(measured) -> None:
    model, batches, result = measured
    stack, table, masks = model.stacks[0], result.table(), masks_from_rule(model.info)
    assert not result.left_out()
    assert {name.split("_")[0] for name in table["measure"]} >= {"heterogeneity", "cka", "lidar", "attention"}
    depth = model.depth(stack)
    embeddings, cosines = [], []
    with torch.no_grad():
        for batch in batches:
            views = []
            for k in range(2):
                mask = masks(batch.names, k)
                tokens = list(model.layer_tokens(batch.images, mask, stack))[depth].tokens
                visible = [x[~m] for x, m in zip(tokens, mask, strict=True)]
                views.append(torch.stack([x.mean(dim=0) for x in visible]))
                cosines.append([mean_cosine(x).item() for x in visible])
            embeddings.append(torch.stack(views, dim=1))
    whole = torch.cat(embeddings).double()
    means = whole.mean(dim=1)
    expected = {
        "cosine_visible": (2 * np.mean(cosines[:2]) + np.mean(cosines[2:])) / 3,  # 8 images, then 4
        "rankme_visible": rankme(means).item(),
        "lidar_visible": lidar(means, (whole - means[:, None]).flatten(0, 1)).item(),
    }
    for name, value in expected.items():
        (row,) = alone(table, measure=name, layer_depth=depth).to_dict("records")
        assert row["value"] == pytest.approx(value, rel=1e-3)
        assert row["ci_low"] < row["value"] < row["ci_high"]
        assert row["num_images"] == 12
    h = alone(table, measure="heterogeneity")
    pd.testing.assert_series_equal(h["value"], result.summary()["heterogeneity"], check_names=False)
    assert alone(table, measure="separability")["value"].le(1).all()
    pairs = alone(table, measure="cka_visible")
    assert len(pairs) == depth * (depth + 1) // 2


def test_pass__values_do_not_depend_on_how_images_are_batched_or_measured_apart(measured) -> None:
    model, batches, result = measured
    parts = [probe(model, [batch], masks_per_image=2, measures="all") for batch in batches]
    merged, table = parts[0].merge(parts[1]).table(), result.table()
    numbers = ["value", "ci_low", "ci_high"]
    pd.testing.assert_frame_equal(merged.drop(columns=numbers), table.drop(columns=numbers))
    np.testing.assert_allclose(merged[numbers], table[numbers], rtol=1e-4, atol=1e-5)
    one = ImageBatch(batches[0].names + batches[1].names, torch.cat([batch.images for batch in batches]))
    whole = probe(model, [one], masks_per_image=2, measures="all").table()
    same = ~table["measure"].str.startswith("cka")  # whose estimate, not its expectation, is that of the batches
    np.testing.assert_allclose(whole.loc[same, "value"], table.loc[same, "value"], rtol=1e-3, atol=1e-4)


def test_pass__two_models_are_compared_on_the_same_images(measured) -> None:
    model, batches, result = measured
    again = probe(model, batches, masks_per_image=2, measures="cka")
    other = again.table({"other": result})
    across = other[other["other_model"] == "other"]
    diagonal = across[across["layer_depth"] == across["other_layer_depth"]]["value"].dropna()
    np.testing.assert_allclose(diagonal, 1, atol=1e-9)
    with pytest.raises(ValueError, match="same images in the same batches"):
        again.table({"other": probe(model, batches[:1], measures="cka")})


def test_measures__that_a_model_does_not_allow_say_why(measured) -> None:
    model, batches, _ = measured
    assert names_of("all") == tuple(MEASURES)
    with pytest.raises(ValueError, match="say all,-cka"):
        names_of("-cka")
    with pytest.raises(ValueError, match=r"measures are h, cka, .*or all; got 'kca'"):
        probe(model, batches, measures="h,kca")
    with pytest.raises(ValueError, match=r"lidar cannot be measured.*--masks-per-image 2"):
        probe(model, batches, measures="lidar")
    with pytest.raises(ValueError, match=r"cka cannot be measured: .*needs 4 images"):
        probe(model, [ImageBatch(("a",), batches[0].images[:1])], measures="cka")
    found = measure(Inpainting(), features(3), MASK, measures="all")
    assert {name.split(" of ")[0] for name in found.left_out()} >= {"lidar", "attention", "frequency", "cka"}
    config = SwinConfig(16, 2, 3, 8, (1, 1, 1), (2, 2, 2), 8, window=2)
    shrinking = SimMIMSwin(config, ModelInfo("simmim_swin", "inpainting", 16, 2, MaskRule("block", 0.5, 8))).eval()
    few = probe(shrinking, [ImageBatch(("a", "b"), torch.randn(2, 3, 16, 16))], measures="all,-lidar,-cka")
    assert "a grid of 2 x 2 has no low frequencies" in " ".join(few.left_out().values())
    assert "grid of patches is not known" in " ".join(found.left_out().values())
    seen = measure(Inpainting(), features(3), MASK, measures="frequency", grid=(4, 4)).table()
    assert set(seen["measure"]) >= {"frequency_low", "frequency_log_ratio"}
    assert not any(module._forward_hooks for module in model.modules())


def test_live_models__attention_is_of_the_masks_of_its_own_batch() -> None:
    model = small_simmim()
    batches = named(batch_of(model), 12)
    direct = probe(model, batches, measures="attention").table()
    live = measure(
        model, batches, model.info.mask_rule, call=lambda m, images, mask: m(images, mask), measures="attention"
    ).table()
    numbers = ["value", "ci_low", "ci_high"]
    np.testing.assert_allclose(live[numbers], direct[numbers], rtol=1e-4, atol=1e-5)


def test_live_models__attention_leaves_tokens_behind_the_patches_out() -> None:
    front, behind = Inpainting(cls=1, position="none"), Behind(cls=1, position="none")
    behind.load_state_dict(front.state_dict())
    mask = MASK.clone()
    mask[:, 0] = False  # or a masked token would be seen in the place of the class token
    mask[:, 1] = True
    spec = StackSpec("encoder", behind.blocks, behind.mask_token, suffix_tokens=1)
    one, other = (
        measure(model, features(3), mask, stacks=stacks, measures="attention").table()
        for model, stacks in ((front, None), (behind, [spec]))
    )
    assert one["measure"].str.contains("entropy_visible").any()
    np.testing.assert_allclose(other["value"], one["value"], rtol=1e-4, atol=1e-5)


class _Entry:
    dist = type("dist", (), {"name": "other-distribution"})

    def __init__(self, name: str, value: object) -> None:
        self.name, self.value = name, value

    def load(self) -> object:
        return self.value


def test_plugins__add_measures_and_broken_ones_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(tokens: Tensor, split: TokenSplit) -> Tensor:
        return tokens.norm(dim=-1).mean(dim=1)

    entries = [_Entry("norm", norm), _Entry("broken", lambda tokens, split: 1 / 0), _Entry("flat", lambda *_: 3.0)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries if group.endswith("measures") else [])
    plugins.plugins.cache_clear()
    try:
        model = small_mae()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            table = probe(model, [batch_of(model)], measures="norm,broken,flat").table()
    finally:
        plugins.plugins.cache_clear()
    assert set(table["measure"]) == {"heterogeneity", "normalized_heterogeneity", "norm"}
    messages = [str(each.message) for each in caught]
    assert len(messages) == 2
    assert all("of other-distribution is left out" in message for message in messages)


def test_commands__write_one_tidy_table_and_its_figure(tmp_path) -> None:
    out, model = tmp_path / "out", str(DEMO_CHECKPOINTS["SimMIM"])
    given = ["heterogeneity", "--ckpt", model, "--limit", "8", "--device", "cpu", "--out", str(out), "--quiet"]
    result = CliRunner().invoke(app, [*given, "--measures", "cosine,attention"])
    assert result.exit_code == 0, result.output
    table = pd.read_csv(out / "measures.csv")
    assert table.columns.tolist() == ["model", *Row._fields]
    assert {"heterogeneity", "cosine_visible", "attention_entropy_masked"} <= {*table["measure"]}
    assert {"measures.png", "measures.pdf"} <= {path.name for path in out.iterdir()}
    refused = CliRunner().invoke(app, [*given, "--overwrite", "--measures", "lidar"])
    assert (refused.exit_code, "--masks-per-image" in refused.output) == (2, True)
    report = [
        "report",
        "--ckpt",
        model,
        "--limit",
        "4",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "r.html"),
        "--quiet",
    ]
    result = CliRunner().invoke(app, [*report, "--show", "1", "--measures", "cosine"])
    assert result.exit_code == 0, result.output
    assert "Measures over layer depth" in (tmp_path / "r.html").read_text()
