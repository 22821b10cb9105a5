"""Quadrant statistics and maps against slow loops, and their streaming."""

from __future__ import annotations

import math

import pytest
import torch
from watched_models import Shrinking, batch_of, random_masks, small_simmim

from mto_analysis.affinity import TokenSplit, affinity_matrix, heterogeneity, quadrant_mass
from mto_analysis.models import LayerTokens
from mto_analysis.probe import probe
from mto_analysis.probe.quadrants import AffinityMaps, quadrant_statistics


def slow_statistics(tokens: list[list[float]], mask: list[bool]) -> dict[str, float]:
    """Every number again, entry by entry, for one image."""
    count = len(tokens)
    dot = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in tokens] for x in tokens]
    norms = [math.sqrt(dot[i][i]) for i in range(count)]
    kinds = {"masked": [i for i in range(count) if mask[i]], "visible": [i for i in range(count) if not mask[i]]}
    found: dict[str, float] = {}

    def softmax(values: list[float]) -> list[float]:
        top = max(values)
        weights = [math.exp(value - top) for value in values]
        return [weight / sum(weights) for weight in weights]

    def entropy(shares: list[float]) -> float:
        return -sum(share * math.log(share) for share in shares if share > 0)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def deviation(values: list[float]) -> float:
        return math.sqrt(mean([(value - mean(values)) ** 2 for value in values]))

    for number, (rows, columns) in enumerate(
        (("masked", "masked"), ("masked", "visible"), ("visible", "masked"), ("visible", "visible")), start=1
    ):
        pairs = [(i, j) for i in kinds[rows] for j in kinds[columns]]
        found[f"q{number}_mass"] = mean([sum(softmax(dot[i])[j] for j in kinds[columns]) for i in kinds[rows]])
        dots = [dot[i][j] for i, j in pairs]
        cosines = [dot[i][j] / norms[i] / norms[j] for i, j in pairs]
        found |= {f"q{number}_dot_mean": mean(dots), f"q{number}_dot_std": deviation(dots)}
        found |= {f"q{number}_cosine_mean": mean(cosines), f"q{number}_cosine_std": deviation(cosines)}
    for rows, indices in kinds.items():
        found[f"row_entropy_{rows}"] = mean([entropy(softmax(dot[i])) for i in indices])
    found["heterogeneity"] = mean([entropy(softmax([dot[i][j] for j in kinds["visible"]])) for i in kinds["masked"]])
    return found


@pytest.mark.parametrize("counts", [(3, 3, 3), (1, 4, 5)], ids=["equal", "ragged"])
def test_quadrant_statistics__agree_with_slow_loops(counts: tuple[int, ...]) -> None:
    tokens = torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    mask = torch.stack([random_masks(1, 6, count)[0] for count in counts])
    numbers = quadrant_statistics(tokens, mask)
    for image in range(3):
        slow = slow_statistics(tokens[image].tolist(), mask[image].tolist())
        assert set(slow) == set(numbers)
        for name, value in slow.items():
            assert numbers[name][image].item() == pytest.approx(value, rel=1e-9, abs=1e-7), name


def test_quadrant_statistics__masses_of_a_row_add_to_one_and_h_is_that_of_eq_2() -> None:
    tokens = torch.randn(9, 30, 8, generator=torch.Generator().manual_seed(0)) * 3
    split = TokenSplit(random_masks(9, 30, 20))
    numbers = quadrant_statistics(tokens, split)
    torch.testing.assert_close(numbers["q1_mass"] + numbers["q2_mass"], torch.ones(9))
    torch.testing.assert_close(numbers["q3_mass"] + numbers["q4_mass"], torch.ones(9))
    torch.testing.assert_close(numbers["heterogeneity"], heterogeneity(tokens, split), rtol=1e-5, atol=1e-6)
    masses = torch.stack([numbers[f"q{quadrant}_mass"] for quadrant in (1, 2, 3, 4)], dim=1)
    torch.testing.assert_close(masses, quadrant_mass(tokens, split))


def test_quadrant_statistics__finite_where_a_quadrant_underflows() -> None:
    """Masked tokens a thousand times as long: in masked rows the visible columns hold no float32 share at all."""
    tokens = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
    mask = random_masks(2, 12, 6)
    tokens[mask] *= 1000
    numbers = quadrant_statistics(tokens, mask)
    exact = quadrant_statistics(tokens.double(), mask)
    for name, value in numbers.items():
        assert value.isfinite().all(), name
        torch.testing.assert_close(value.double(), exact[name], rtol=2e-3, atol=2e-5, msg=lambda text, n=name: n + text)


def test_quadrant_statistics__first_quadrant_of_simmim_is_constant_at_layer_0() -> None:
    model = small_simmim()
    batch = batch_of(model)
    maps = AffinityMaps("dot")
    frame = probe(model, [batch], layer_measures=[maps]).to_frame()
    at_0 = frame[frame["layer_depth"] == 0]
    assert (at_0["q1_dot_std"] < 1e-5 * at_0["q1_dot_mean"]).all()
    assert at_0["q1_cosine_mean"].to_numpy() == pytest.approx(1, abs=1e-6)
    first = maps.maps[0]
    quadrant = first.values[: first.num_masked, : first.num_masked]
    torch.testing.assert_close(quadrant, quadrant[:1, :1].expand_as(quadrant))
    assert (frame[frame["layer_depth"] == 1]["q1_dot_std"] > 1e-3).all()


@pytest.mark.parametrize("kind", ["softmax", "dot", "cosine"])
@pytest.mark.parametrize("num_patches", [12, 700])  # 700: fewer than one image of products at a time
def test_affinity_maps__mean_over_batches_is_that_of_affinity_matrix(kind: str, num_patches: int) -> None:
    tokens = torch.randn(11, num_patches, 6, generator=torch.Generator().manual_seed(0))
    mask = random_masks(11, num_patches, 9)
    maps = AffinityMaps(kind)  # type: ignore[arg-type]
    for rows in (slice(0, 7), slice(7, 11)):
        maps("encoder", LayerTokens(0, tokens[rows], mask[rows]), TokenSplit(mask[rows]), ())
    (found,) = maps.maps
    assert (found.num_images, found.num_masked, found.image) == (11, 9, None)
    expected = affinity_matrix(tokens, mask, kind=kind).mean(dim=0)  # type: ignore[arg-type]
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-6)


def test_affinity_maps__h_is_reproduced_from_the_map_of_a_image() -> None:
    model = small_simmim()
    maps = AffinityMaps("dot", each_image=True)
    frame = probe(model, [batch_of(model)], layer_measures=[maps]).to_frame().set_index(["image", "layer_depth"])
    for each in maps.maps:
        quadrant = each.values[: each.num_masked, each.num_masked :].double()
        shares = quadrant.softmax(dim=1)
        value = -(shares * shares.log()).sum(dim=1).mean()
        assert frame.loc[(each.image, each.layer_depth), "heterogeneity"] == pytest.approx(value.item(), abs=1e-5)


def test_affinity_maps__follow_a_grid_that_shrinks() -> None:
    model = Shrinking()
    maps = AffinityMaps()
    probe(model, [batch_of(model)], layer_measures=[maps])
    assert [tuple(each.values.shape) for each in maps.maps] == [(64, 64), (64, 64), (16, 16)]
    assert [each.num_masked for each in maps.maps] == [32, 32, 8]
    for each in maps.maps:
        torch.testing.assert_close(each.values.sum(dim=1), torch.ones(len(each.values)))


def test_affinity_maps__ragged_masks_refuse_a_mean_but_allow_images() -> None:
    model = small_simmim()
    batch = batch_of(model, 12)
    ragged = torch.cat([random_masks(1, 16, 4 + row % 3) for row in range(12)])
    with pytest.raises(ValueError, match="same number of masked patches in every image, got 4 to 6; choose single"):
        probe(model, [batch], lambda names, k: ragged, layer_measures=[AffinityMaps()])
    maps = AffinityMaps(each_image=True)
    probe(model, [batch], lambda names, k: ragged, layer_measures=[maps])
    assert len(maps.maps) == 12 * 3
    assert len({each.num_masked for each in maps.maps}) > 1


def test_affinity_maps__unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be softmax, dot, cosine"):
        AffinityMaps("euclidean")  # type: ignore[arg-type]
