"""The probe: the right values for every batch size, mergeable, and no trace in the model or the process."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_mae, make_simmim, some_images, some_masks

from mto_analysis import DataError, ImageBatch, MaskRule, NumericalError, ProbeResult, heterogeneity, mask_keys
from mto_analysis.probe import masks_from_file, masks_from_rule, probe, undisturbed
from mto_analysis.probe.engine import interval_ends

NAMES = tuple(f"{number}.png" for number in range(11))


def batches(images: torch.Tensor, size: int, names: tuple[str, ...] = NAMES) -> list[ImageBatch]:
    names = names[: len(images)]
    return [ImageBatch(names[at : at + size], images[at : at + size]) for at in range(0, len(images), size)]


def ragged_masks(generator: torch.Generator, count: int = 11, per_image: int = 2) -> dict[str, torch.Tensor]:
    masks = some_masks(generator, count * per_image, ragged=True).reshape(count, per_image, 16)
    return dict(zip(NAMES, masks, strict=True))


# Values.


@pytest.mark.parametrize("size", [1, 2, 5, 11])
def test_probe__equals_direct_computation(tiny_model, size: int, generator: torch.Generator) -> None:
    images, masks = some_images(generator, 11), ragged_masks(generator)
    frame = probe(
        tiny_model, batches(images, size), masks_from_file(tiny_model.info, masks), masks_per_image=2
    ).to_frame()
    stack = tiny_model.stacks[0]
    columns = ["stack", "layer_depth", "image", "mask", "num_masked", "num_visible", "heterogeneity"]
    assert list(frame.columns) == columns
    assert len(frame) == 11 * 2 * (tiny_model.depth(stack) + 1)
    assert not frame.duplicated(["stack", "layer_depth", "image", "mask"]).any()
    assert set(frame["stack"]) == {stack}
    found = frame.set_index(["layer_depth", "image", "mask"])
    for row, name in enumerate(NAMES):
        for k in range(2):
            mask = masks[name][k : k + 1]
            with torch.no_grad():
                for layer in tiny_model.layer_tokens(images[row : row + 1], mask):
                    value = found.loc[(layer.depth, name, k)]
                    expected = reference.heterogeneity(layer.tokens[0].double().tolist(), mask[0].tolist())
                    assert value["heterogeneity"] == pytest.approx(expected, abs=2e-5)
                    assert value["num_masked"] == mask.sum()
                    assert value["num_visible"] == 16 - mask.sum()


@pytest.mark.parametrize("size", [1, 2])
def test_probe__equals_the_original_code(golden, size: int) -> None:
    masks = dict(zip(NAMES, golden.mask[:, None], strict=False))
    model = golden.load()
    frame = probe(model, batches(golden.images, size), masks_from_file(model.info, masks)).to_frame()
    values = frame.pivot(index="layer_depth", columns="image", values="heterogeneity").to_numpy()
    np.testing.assert_allclose(values, golden.expected["heterogeneity"], atol=5e-5)


def test_probe__measures_every_stack_on_its_own_grid(two_stacks, generator: torch.Generator) -> None:
    images = some_images(generator, 3)
    rule = two_stacks.info.mask_rule
    frame = probe(two_stacks, batches(images, 2)).to_frame()
    counts = frame.groupby(["stack", "layer_depth"])["num_masked"].unique().map(list)
    assert counts.to_dict() == {
        ("pixel_decoder", 0): [8],
        ("pixel_decoder", 1): [8],
        ("feature_decoder", 0): [8],
        ("feature_decoder", 1): [2],
    }
    mask = rule.sample(mask_keys(NAMES[:3]), (4, 4), 4)
    for stack in two_stacks.stacks:
        for layer in two_stacks.layer_tokens(images, mask, stack):
            rows = frame[(frame["stack"] == stack) & (frame["layer_depth"] == layer.depth)]
            assert rows["image"].tolist() == list(NAMES[:3])
            expected = heterogeneity(layer.tokens, layer.mask).tolist()
            assert rows["heterogeneity"].tolist() == pytest.approx(expected, abs=1e-6)


def test_probe__measures_the_stacks_asked_for(two_stacks, generator: torch.Generator) -> None:
    frame = probe(two_stacks, batches(some_images(generator, 2), 2), stacks=["feature_decoder"]).to_frame()
    assert set(frame["stack"]) == {"feature_decoder"}
    with pytest.raises(ValueError, match="stack must be one of pixel_decoder, feature_decoder, got 'encoder'"):
        probe(two_stacks, batches(some_images(generator, 2), 2), stacks=["encoder"])


def test_probe__takes_other_measures(tiny_model, generator: torch.Generator) -> None:
    def norm(tokens: torch.Tensor, split: Any) -> torch.Tensor:
        return split.map(tokens, lambda x, num_masked: x[:, :num_masked].norm(dim=2).mean(dim=1))

    images = some_images(generator, 3)
    measures = {"heterogeneity": heterogeneity, "norm": norm}
    frame = probe(tiny_model, batches(images, 2), measures=measures).to_frame()
    mask = masks_from_rule(tiny_model.info)(NAMES[:3], 0)
    with torch.no_grad():
        last = list(tiny_model.layer_tokens(images, mask))[-1]
    rows = frame[frame["layer_depth"] == last.depth]
    expected = [tokens[row].norm(dim=1).mean().item() for tokens, row in zip(last.tokens, mask, strict=True)]
    assert rows["norm"].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_probe__keeps_the_models_precision(dtype: torch.dtype, generator: torch.Generator) -> None:
    images = some_images(generator, 4)
    single = probe(make_simmim(), batches(images, 4)).to_frame()
    other = probe(make_simmim().to(dtype), batches(images, 4)).to_frame()
    tolerance = {torch.float64: 1e-4, torch.bfloat16: 0.3}[dtype]
    difference = (single["heterogeneity"] - other["heterogeneity"]).abs()
    assert 0 < difference.max() < tolerance


# Masks.


@pytest.mark.parametrize("size", [1, 3, 11])
def test_probe__draws_a_images_mask_from_its_name_not_its_place(tiny_model, size: int, generator) -> None:
    images = some_images(generator, 11)
    seen: dict[tuple[str, int], list[bool]] = {}
    source = masks_from_rule(tiny_model.info, seed=3)

    def watched(names: Any, k: int) -> torch.Tensor:
        drawn = source(names, k)
        seen.update({(name, k): mask.tolist() for name, mask in zip(names, drawn, strict=True)})
        return drawn

    order = torch.randperm(11, generator=generator).tolist()
    shuffled = tuple(NAMES[row] for row in order)
    values = probe(tiny_model, batches(images[order], size, shuffled), watched, masks_per_image=2).to_frame()
    rule = tiny_model.info.mask_rule
    for (name, k), mask in seen.items():
        assert mask == rule.sample(mask_keys([name], k=k, seed=3), (4, 4), 4)[0].tolist()
    assert len({tuple(mask) for mask in seen.values()}) > 5  # SimMIM has 6 of 2 of 4 units
    straight = probe(tiny_model, batches(images, 11), masks_from_rule(tiny_model.info, seed=3), masks_per_image=2)
    key = ["layer_depth", "image", "mask"]
    expected = straight.to_frame().set_index(key)["heterogeneity"].sort_index()
    found = values.set_index(key)["heterogeneity"].sort_index()
    np.testing.assert_allclose(found.to_numpy(), expected.to_numpy(), atol=2e-5)


def test_masks_from_rule__depends_on_seed_epoch_and_k(tiny_model) -> None:
    info = tiny_model.info
    drawn = [
        masks_from_rule(info)(NAMES, 0),
        masks_from_rule(info, seed=1)(NAMES, 0),
        masks_from_rule(info, epoch=1)(NAMES, 0),
        masks_from_rule(info)(NAMES, 1),
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert torch.equal(masks_from_rule(info)(NAMES, 0), drawn[0])
    other = masks_from_rule(info, MaskRule("random", 0.5, 4))(NAMES, 0)
    assert other.sum(dim=1).tolist() == [8] * 11


def test_masks_from_file__says_what_is_missing(tiny_mae, generator: torch.Generator) -> None:
    masks = ragged_masks(generator)
    source = masks_from_file(tiny_mae.info, masks)
    assert torch.equal(source(NAMES[2:4], 1), torch.stack([masks["2.png"][1], masks["3.png"][1]]))
    with pytest.raises(DataError, match=r"no mask for image other\.png; it names 0\.png, 1\.png, 2\.png"):
        source(["0.png", "other.png"], 0)
    with pytest.raises(DataError, match=r"has 2 masks for image 0\.png, not 3"):
        source(["0.png"], 2)
    with pytest.raises(DataError, match="mask file is for 4 patches, the model has 16"):
        masks_from_file(tiny_mae.info, {"a": torch.tensor([[True, False, True, True]])})


# Merging and summing up.


@given(cuts=st.lists(st.integers(1, 10), max_size=3, unique=True))
def test_merge__of_parts_equals_one_run(cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    model, images = make_simmim(), some_images(generator, 11)
    edges = [0, *sorted(cuts), 11]
    parts = [
        probe(model, batches(images[start:stop], 3, NAMES[start:stop])) for start, stop in itertools.pairwise(edges)
    ]
    merged = parts[0].merge(*parts[1:])
    whole = probe(model, batches(images, 4))
    key = ["stack", "layer_depth", "image", "mask"]
    a, b = (result.to_frame().sort_values(key, ignore_index=True) for result in (merged, whole))
    assert a[key].equals(b[key])
    np.testing.assert_allclose(a["heterogeneity"], b["heterogeneity"], atol=1e-5)
    np.testing.assert_allclose(merged.summary().drop(columns="stack"), whole.summary().drop(columns="stack"), atol=1e-4)


def test_probe__refuses_two_images_of_one_name(tiny_model, generator: torch.Generator) -> None:
    images = some_images(generator, 4)
    with pytest.raises(DataError, match="two images are called a"):
        probe(tiny_model, batches(images, 2, ("a", "b", "c", "a")), masks_from_rule(tiny_model.info))


def test_merge__refuses_the_same_image_twice(tiny_model, generator: torch.Generator) -> None:
    images = some_images(generator, 4)
    first, second = probe(tiny_model, batches(images[:3], 2)), probe(tiny_model, batches(images[2:], 2, NAMES[2:4]))
    with pytest.raises(ValueError, match=r"parts overlap: stack \w+, mask 0, image 2\.png was measured twice"):
        first.merge(second)
    assert first.merge() == ProbeResult(first.chunks)


def test_interval_ends__stay_where_a_mean_can_be() -> None:
    table = pd.DataFrame({"mean": [0.1, 0.69, 0.4, math.log(2) + 1e-9, 0.3]})
    half = pd.Series([0.3, 0.1, 0.1, 0.2, math.nan])
    low, high = interval_ends("heterogeneity", table["mean"], half, pd.Series([2.0] * 5))
    assert low[:4].tolist() == pytest.approx([0, 0.59, 0.3, math.log(2) - 0.2])
    assert high[:4].tolist() == pytest.approx([0.4, math.log(2), 0.5, math.log(2)])
    assert high[3] >= table["mean"][3]  # rounding takes H over its bound, and the interval with it
    assert math.isnan(low[4])
    assert math.isnan(high[4])
    low, high = interval_ends("difference", table["mean"], half, pd.Series([2.0] * 5))
    assert low[0] == pytest.approx(-0.2)  # a difference may be negative


def test_summary__on_paper(tiny_simmim, generator: torch.Generator) -> None:
    # Two masks per image, averaged first; then mean, deviation and Student's interval over three images.
    images, masks = some_images(generator, 3), ragged_masks(generator)
    result = probe(tiny_simmim, batches(images, 2), masks_from_file(tiny_simmim.info, masks), masks_per_image=2)
    frame, table = result.to_frame(), result.summary()
    assert table["layer_depth"].tolist() == [0, 1, 2, 3]
    expected_columns = (
        "stack layer_depth heterogeneity heterogeneity_std ci_low ci_high normalized normalized_ci_low "
        "normalized_ci_high num_visible num_visible_min num_visible_max num_images num_masks"
    )
    assert list(table.columns) == expected_columns.split()
    for depth, row in table.set_index("layer_depth").iterrows():
        here = frame[frame["layer_depth"] == depth]
        values = {}
        for kind in ("heterogeneity", "normalized"):
            one = here["heterogeneity"].to_numpy()
            if kind == "normalized":
                one = np.array([h / math.log(max(v, 2)) for h, v in zip(one, here["num_visible"], strict=True)])
            per_image = [one[(here["image"] == name).to_numpy()].mean() for name in NAMES[:3]]
            mean = sum(per_image) / 3
            deviation = math.sqrt(sum((value - mean) ** 2 for value in per_image) / 2)
            values[kind] = mean, deviation, 4.302652729911275 * deviation / math.sqrt(3)  # t, 2 degrees, 97.5 %
        mean, deviation, half = values["heterogeneity"]
        assert row["heterogeneity"] == pytest.approx(mean)
        assert row["heterogeneity_std"] == pytest.approx(deviation)
        # Cut at the range of H, from 0 to the log of the number of visible patches.
        bound = math.log(here["num_visible"].mean())
        assert (row["ci_low"], row["ci_high"]) == pytest.approx((max(mean - half, 0), min(mean + half, bound)))
        mean, _, half = values["normalized"]
        assert row["normalized"] == pytest.approx(mean)
        ends = max(mean - half, 0), min(mean + half, 1)
        assert (row["normalized_ci_low"], row["normalized_ci_high"]) == pytest.approx(ends)
        assert row["num_visible"] == pytest.approx(here["num_visible"].mean())
        assert (row["num_visible_min"], row["num_visible_max"]) == (
            here["num_visible"].min(),
            here["num_visible"].max(),
        )
        assert row["num_visible_min"] < row["num_visible_max"]
        assert (row["num_images"], row["num_masks"]) == (3, 2)


def test_summary__of_one_image_has_no_interval(tiny_model, generator: torch.Generator) -> None:
    table = probe(tiny_model, batches(some_images(generator, 1), 1)).summary()
    assert table["heterogeneity"].notna().all()
    assert table[["heterogeneity_std", "ci_low", "ci_high", "normalized_ci_low"]].isna().all(axis=None)
    assert (table["num_images"] == 1).all()


def test_summary__of_one_visible_patch_is_zero_not_a_division_by_zero(tiny_mae, generator: torch.Generator) -> None:
    masks = {name: (torch.arange(16) != row)[None] for row, name in enumerate(NAMES)}
    table = probe(tiny_mae, batches(some_images(generator, 2), 2), masks_from_file(tiny_mae.info, masks)).summary()
    assert table["heterogeneity"].tolist() == [0.0] * 4
    assert table["normalized"].tolist() == [0.0] * 4


# No trace.


class State:
    """Everything of a model and the process that a measurement could disturb."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.training = {name: module.training for name, module in model.named_modules()}
        self.requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.hooks = {
            (name, kind): list(value)
            for name, module in model.named_modules()
            for kind, value in vars(module).items()
            if "hooks" in kind
        }
        self.attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
        self.random = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
        self.torch = (
            torch.is_grad_enabled(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.get_default_dtype(),
            torch.get_num_threads(),
        )


def assert_no_trace(model: torch.nn.Module, action: Callable[[], object]) -> None:
    before = State(model)
    action()
    after = State(model)
    for fact in ("training", "requires_grad", "hooks", "attributes", "random", "torch"):
        assert getattr(after, fact) == getattr(before, fact), fact
    for fact in ("weights", "grads"):
        for name, tensor in getattr(before, fact).items():
            found = getattr(after, fact)[name]
            assert (tensor is None and found is None) or torch.equal(tensor, found), (fact, name)


def disturbed(model: torch.nn.Module, generator: torch.Generator) -> torch.nn.Module:
    """In the middle of somebody's training: modes, gradients, frozen parts and a hook of their own."""
    model.train()
    next(iter(model.children())).eval()
    list(model.modules())[5].eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
        if parameter.requires_grad and number % 2:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    list(model.modules())[4].register_forward_hook(lambda *arguments: None)
    return model


@pytest.fixture
def _tf32_as_before() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("_tf32_as_before")
@pytest.mark.parametrize("make", [make_mae, make_simmim])
@pytest.mark.parametrize("tf32", [True, False])
def test_probe__leaves_no_trace(make, tf32: bool, generator: torch.Generator) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    model = disturbed(make(), generator)
    images = some_images(generator, 4)
    values = []
    assert_no_trace(model, lambda: values.append(probe(model, batches(images, 3)).to_frame()["heterogeneity"]))
    assert_no_trace(model, lambda: values.append(probe(model, batches(images, 3)).to_frame()["heterogeneity"]))
    assert values[0].equals(values[1])


def test_probe__measures_in_eval_mode(two_stacks, generator: torch.Generator) -> None:
    images = some_images(generator, 2)
    expected = probe(two_stacks.eval(), batches(images, 2)).to_frame()
    found = probe(two_stacks.train(), batches(images, 2)).to_frame()  # its dropout would show
    assert found["heterogeneity"].equals(expected["heterogeneity"])
    assert two_stacks.training
    assert two_stacks.dropout.training


@pytest.mark.parametrize("failure", ["batches", "masks", "model", "measure", "numbers", "interrupt"])
def test_probe__leaves_no_trace_when_it_raises(failure: str, generator: torch.Generator) -> None:
    model = disturbed(make_simmim(), generator)
    images = some_images(generator, 4)
    error: type[BaseException] = KeyboardInterrupt if failure == "interrupt" else RuntimeError

    def broken(*arguments: Any) -> Any:
        raise error("on purpose")

    def some_batches():
        yield from batches(images, 2)
        if failure in ("batches", "interrupt"):
            broken()

    options: dict[str, Any] = {"masks": masks_from_rule(model.info)}
    if failure == "masks":
        options["masks"] = broken
    elif failure == "measure":
        options["measures"] = {"broken": broken}
    elif failure == "model":
        model.blocks[2].mlp.register_forward_hook(broken)
    elif failure == "numbers":
        images = images / 0
        error = NumericalError

    def act() -> None:
        with pytest.raises(error):
            probe(model, some_batches(), **options)

    assert_no_trace(model, act)


def test_undisturbed__restores_after_an_error(tiny_model) -> None:
    tiny_model.train()

    inside: list[bool] = []

    def act() -> None:
        with contextlib.suppress(ZeroDivisionError), undisturbed(tiny_model):
            inside.extend([tiny_model.training, torch.is_grad_enabled(), torch.backends.cuda.matmul.allow_tf32])
            _ = 1 / 0

    assert_no_trace(tiny_model, act)
    assert inside == [False, False, False]


def test_probe__keeps_no_graph_and_no_tokens(tiny_model, generator: torch.Generator) -> None:
    result = probe(tiny_model, batches(some_images(generator, 4), 2))
    for chunk in result.chunks:
        assert all(isinstance(value, np.ndarray) and value.dtype == np.float64 for value in chunk.values.values())
        assert sum(value.size for value in chunk.values.values()) == 2 * (tiny_model.depth(chunk.stack) + 1)


def test_probe__holds_one_depth_of_one_batch_at_a_time(generator: torch.Generator) -> None:
    import weakref

    model, images = make_simmim(depth=6), some_images(generator, 6)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watch(tokens: torch.Tensor, split: Any) -> torch.Tensor:
        nonlocal most
        alive.append(weakref.ref(tokens))
        most = max(most, sum(reference() is not None for reference in alive))
        return heterogeneity(tokens, split)

    probe(model, batches(images, 2), measures={"heterogeneity": watch})
    assert len(alive) == 21
    assert most <= 2  # this depth, and the one before while its name is not yet taken over


# Errors.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_probe__names_layer_and_image_of_a_value_that_is_not_finite(value: float, generator) -> None:
    model, images = make_mae(), some_images(generator, 5)
    images[3] = value  # 3.png, in the second batch
    with pytest.raises(NumericalError, match=r"in stack decoder at layer depth 0 for image 3\.png") as error:
        probe(model, batches(images, 2))
    assert "\n" not in str(error.value)
    model.decoder_blocks[1].mlp.fc2.bias.data[0] = value
    with pytest.raises(NumericalError, match=r"in stack decoder at layer depth 2 for image 0\.png"):
        probe(model, batches(some_images(generator, 5), 2))


def test_probe__refuses_to_measure_nothing(tiny_model) -> None:
    with pytest.raises(DataError, match="there is no image to measure"):
        probe(tiny_model, [])
    with pytest.raises(ValueError, match="masks_per_image must be at least 1, got 0"):
        probe(tiny_model, [], masks_per_image=0)


def test_probe__refuses_masks_that_break_the_convention(tiny_model, generator: torch.Generator) -> None:
    images = some_images(generator, 2)
    with pytest.raises(ValueError, match="mask must leave a patch visible in every row, row 0 does not"):
        probe(tiny_model, batches(images, 2), lambda names, k: torch.ones(len(names), 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must have 16 patches, got 4"):
        probe(tiny_model, batches(images, 2), lambda names, k: torch.eye(2, 4, dtype=torch.bool))
