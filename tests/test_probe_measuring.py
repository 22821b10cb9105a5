"""Any live model is measured as the plain way does, or refused with what to pass; it is left as it was found."""

import copy

import pytest
import torch
from matplotlib.text import Text
from model_kinds import (
    DIM,
    NUM,
    Backbone,
    DecoderNames,
    FromPixels,
    Grid,
    Inpainting,
    VisibleArgument,
    features,
    random_mask,
)
from test_mto_attach import build, keep_tokens, traces
from torch import nn
from training_models import CASES, draw_mask, make_images
from watched_models import batch_of, small_mae, small_simmim

from mto_analysis import ImageBatch, MaskRule, heterogeneity, mask_keys, measure
from mto_analysis.affinity import TokenSplit
from mto_analysis.errors import StackError
from mto_analysis.figures.plots.affinity import draw_affinity
from mto_analysis.models.live import LiveModel
from mto_analysis.mto import StackSpec
from mto_analysis.probe import masks_from_rule, probe
from mto_analysis.probe.definitions import DefinitionMeasure
from mto_analysis.probe.quadrants import AffinityMaps

RAGGED = random_mask(3, (5, 9, 12))


def plain(model, blocks, run, prefix, mask):
    """H of each layer depth and image."""
    kept, handles = keep_tokens([list(blocks)])
    model.eval()
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    mask = mask() if callable(mask) else mask
    return torch.stack([heterogeneity(kept[0, depth][:, prefix:], mask) for depth in range(len(kept))])


def values_of(result, stack=None):
    frame = result.to_frame()
    frame = frame if stack is None else frame[frame["stack"] == stack]
    table = frame.pivot(index="layer_depth", columns="image", values="heterogeneity")
    return torch.tensor(table.to_numpy(), dtype=torch.float32)


@pytest.mark.parametrize("order", ["places", "visible first"])
def test_measure__equals_the_plain_way(order):
    for model, blocks, prefix in (
        (Inpainting(cls=1, registers=2), "blocks", 3),
        (Inpainting(position="none"), "blocks", 0),
        (DecoderNames(order), "decoder_blocks", 1),
        (Backbone(4), "vit.blocks", 5),
    ):
        model.train()(features(3), RAGGED)
        before = traces(model), {name: value.clone() for name, value in model.state_dict().items()}
        torch.manual_seed(7)  # its class token is random
        result = measure(model, features(3), RAGGED)
        assert traces(model) == before[0]
        assert all(module.training for module in model.modules())
        true = (lambda m=model: m.true_mask) if isinstance(model, DecoderNames) else RAGGED
        run = lambda m=model: m(features(3), RAGGED)  # noqa: E731
        torch.manual_seed(7)
        expected = plain(model, model.get_submodule(blocks), run, prefix, true)
        torch.testing.assert_close(values_of(result), expected, rtol=1e-5, atol=1e-6)
        assert result.to_frame()["image"].unique().tolist() == ["0", "1", "2"]
        note = "in token order" in " ".join(result.notes)
        assert note == (order == "visible first" and isinstance(model, DecoderNames))
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[1][name])


@pytest.mark.parametrize("name", ["simmim vit", "simmim swin", "conmim"])
def test_measure__infers_how_a_mask_is_passed(name):
    case = CASES[name]
    model = build(case)
    mask = draw_mask(0, masked=(2, 3, 2), grid=8, unit=4) if "swin" in name else draw_mask(0, masked=(12, 5, 9))
    if "swin" in name:
        mask = draw_mask(0, masked=(2, 2, 2), grid=8, unit=4)
    result = measure(model, make_images(), mask)
    kept, handles = keep_tokens(case.stacks(model))
    model.eval()
    with torch.no_grad():
        if name == "conmim":
            model(make_images(), bool_masked_pos=mask)
        else:
            side = int(mask.shape[1] ** 0.5)
            model(make_images(), mask.view(3, side, side).long())
    for handle in handles:
        handle.remove()
    first = heterogeneity(kept[0, 0][:, case.prefix :], mask)
    torch.testing.assert_close(values_of(result)[0], first, rtol=1e-5, atol=1e-6)


def test_measure__the_models_own_masks_are_seeded_and_said():
    model = build(CASES["mae"])
    state = torch.get_rng_state()
    first, again, other = (measure(model, make_images(), seed=seed, masks_per_image=2) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.to_frame().equals(again.to_frame())
    assert not first.to_frame().equals(other.to_frame())
    assert first.notes[0] == "masks: the model's own, seed 0"
    assert first.summary()["num_masks"].eq(2).all()
    with pytest.raises(ValueError, match=r"no argument bool_masked_pos, mask or noise.*call=lambda"):
        measure(model, make_images(), draw_mask())
    with pytest.raises(ValueError, match=r"cannot be called with images alone.*pass mask="):
        measure(Inpainting(), features(3))


def test_measure__masks_by_rule_file_and_function():
    model, rule = Inpainting(), MaskRule("random", 0.5, 1)
    with pytest.raises(ValueError, match=r"does not tell its grid.*grid=\(rows, columns\)"):
        measure(model, features(3), rule)
    result = measure(model, features(3), rule, grid=(2, 8), seed=3)
    assert result.to_frame()["num_masked"].eq(8).all()
    for kind, unit in (("random", 1), ("block", 2)):  # of video, all frames have the same mask
        sampled = MaskRule(kind, 0.5, unit).sample(mask_keys("abc"), (2, 2, 4), 1)
        assert torch.equal(*sampled.chunk(2, dim=1))
        result = measure(model, features(3), MaskRule(kind, 0.5, unit), grid=(2, 2, 4), patch_size=1)
        assert result.to_frame()["num_masked"].eq(8).all()
    same = measure(model, features(3), lambda names, k: RAGGED)
    assert same.to_frame().equals(measure(model, features(3), RAGGED).to_frame())
    with pytest.raises(ValueError, match="mask is a tensor, which is for a single batch"):
        measure(model, [features(3), features(3)], RAGGED)


def test_measure__batches_of_many_kinds():
    model, images = Inpainting(), features(3)
    expected = values_of(measure(model, images, RAGGED))
    named = ImageBatch(("a", "b", "c"), images)
    for batch in (images, (images, torch.zeros(3)), [images], {"pixel_values": images}, named):
        result = measure(model, [batch], RAGGED)
        torch.testing.assert_close(values_of(result), expected, rtol=0, atol=0)
        assert result.to_frame()["image"].unique().tolist() == (["a", "b", "c"] if batch is named else ["0", "1", "2"])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(features(5)), batch_size=2)
    frame = measure(model, loader, MaskRule("random", 0.5, 1), grid=(4, 4)).to_frame()
    assert frame["image"].unique().tolist() == ["0", "1", "2", "3", "4"]
    with pytest.raises(ValueError, match="a batch must be images"):
        measure(model, [{"label": images}], RAGGED)


@pytest.mark.parametrize("build_ours", [small_mae, small_simmim])
def test_measure__ours_equal_probe_and_their_own_forward(build_ours):
    model = build_ours()
    batch = batch_of(model)
    expected = probe(model, [batch], masks_from_rule(model.info, seed=2)).to_frame()
    assert measure(model, [batch], seed=2).to_frame().equals(expected)
    mask = model.info.mask_rule
    live = measure(model, [batch], mask, seed=2, call=lambda m, images, mask: m(images, mask)).to_frame()
    torch.testing.assert_close(
        torch.tensor(live["heterogeneity"].to_numpy()), torch.tensor(expected["heterogeneity"].to_numpy())
    )


def test_measure__a_call_that_masks_others_is_refused():
    model = VisibleArgument()
    right = measure(model, features(3), RAGGED, call=lambda m, images, mask: m(images, ~mask))
    expected = plain(model, model.blocks, lambda: model(features(3), ~RAGGED), 0, RAGGED)
    torch.testing.assert_close(values_of(right), expected, rtol=1e-5, atol=1e-6)
    for wrong in (lambda m, images, mask: m(images, mask), lambda m, images, mask: m(images, mask.roll(1, dims=1))):
        with pytest.raises(StackError, match="requested mask"):
            measure(model, features(3), RAGGED, call=wrong)
    twice = lambda m, images, mask: (m(images, ~mask), m(images, ~mask))  # noqa: E731
    with pytest.raises(StackError, match="ran 2 times in one call"):
        measure(model, features(3), RAGGED, call=twice)


class MasksInTraining(Inpainting):
    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(NUM), nn.Dropout(0.5)

    def forward(self, x, mask=None):
        if not self.training:
            mask = torch.zeros_like(RAGGED)
        return self.drop(self.norm(super().forward(x, mask)))


def test_measure__training_mode_only_if_asked_for():
    model = MasksInTraining().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StackError, match="train_mode=True"):
        measure(model, features(3), RAGGED)
    state = torch.get_rng_state()
    first = measure(model, features(3), RAGGED, train_mode=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.to_frame().equals(measure(model, features(3), RAGGED, train_mode=True).to_frame())
    assert not any(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("way", ["compiled", "in place", "block by block"])
def test_measure__compiled_models_through_what_is_inside(way):
    torch._dynamo.reset()
    plain_model = Inpainting()
    model = copy.deepcopy(plain_model).eval()
    if way == "block by block":
        for block in model.blocks:
            block.compile(backend="eager")
    compiled = torch.compile(model, backend="eager") if way == "compiled" else model
    if way == "in place":
        model.compile(backend="eager")
    with torch.no_grad():
        compiled(features(3), RAGGED)  # compiled before it is measured
    expected = values_of(measure(plain_model, features(3), RAGGED))
    torch.testing.assert_close(values_of(measure(compiled, features(3), RAGGED)), expected, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_measure__grids_that_are_no_square():
    model = Grid(merges=True)
    mask = random_mask(3, (3, 5), num=8).view(3, 2, 4).repeat_interleave(2, 1).repeat_interleave(2, 2)
    images = torch.randn(3, 4, 8, DIM)
    frame = measure(model, images, mask, call=lambda m, images, mask: m(images, mask.view(3, 4, 8))).to_frame()
    assert frame.groupby("layer_depth")["num_masked"].sum().tolist() == [44, 44, 11]
    scattered = random_mask(3, (12,), num=32)
    with pytest.raises(StackError, match="cuts through merged tokens"):
        measure(model, images, scattered, call=lambda m, images, mask: m(images, mask.view(3, 4, 8)))


def test_measure__images_with_one_kind_of_patches_are_refused():
    mask = RAGGED.clone()
    mask[1] = False
    with pytest.raises(StackError, match="of 3 images, 2 have masked and visible patches"):
        measure(Inpainting(), features(3), call=lambda m, images, _: m(images, mask))


def test_measure__stacks_and_measures_of_the_caller():
    model = Inpainting(name="hole")
    with pytest.raises(ValueError, match=r"no mask token; block lists: blocks \(3\)"):
        measure(model, features(3), RAGGED)
    spec = StackSpec("trunk", model.blocks, model.hole, position=model.pos_embed)
    norm = {"norm": lambda tokens, split: tokens.norm(dim=-1).mean(dim=1)}
    frame = measure(model, features(3), RAGGED, stacks=[spec], measures=norm).to_frame()
    assert frame["stack"].unique().tolist() == ["trunk"]
    assert frame.columns[-1] == "norm"


def test_live_model__is_one_of_ours_and_can_be_copied():
    live = LiveModel(Inpainting(cls=1).eval())
    twin = copy.deepcopy(live)
    for each in (live, twin):
        with torch.no_grad():
            layers = list(each.layer_tokens(features(3), RAGGED))
        assert [layer.depth for layer in layers] == [0, 1, 2, 3]
        assert all(torch.equal(layer.mask, RAGGED) and layer.tokens.shape == (3, NUM, DIM) for layer in layers)
        assert each.stacks == ("encoder",)
        assert len(each.stack_blocks("encoder")) == each.depth("encoder") == 3
    with pytest.raises(ValueError, match="nothing is predicted"):
        live.reconstruct(features(3), RAGGED)


@pytest.mark.parametrize("order", ["places", "visible first"])
def test_live_model__says_whether_tokens_are_in_the_order_of_patches(order):
    live, mask = LiveModel(DecoderNames(order, cls=0)), random_mask(3, (5,))
    maps = AffinityMaps()
    with torch.no_grad():
        for layer in live.layer_tokens(features(3), mask):
            maps("decoder", layer, TokenSplit(layer.mask), ("a", "b", "c"))
    known = order == "places"
    assert layer.in_order == live.order_is_known("decoder") == known
    assert torch.equal(layer.mask, mask if known else mask.sort(dim=1).values)
    merged = AffinityMaps()
    merged.put_together([AffinityMaps().kept(), maps.kept()])  # of another process, that saw no image
    assert [each.in_order for each in merged.maps] == [known] * 3
    texts = [text.get_text() for text in draw_affinity(merged.maps).findobj(Text)]
    assert any("decoder: token order" in text for text in texts) == ("token order" in texts) == (not known)


def test_measure__says_token_order_also_of_masks_of_the_models_own():
    masks = random_mask(3, (5, 9))
    shuffled = FromPixels(lambda x: x.flip(1), masks)
    assert any("in token order" in note for note in measure(shuffled, torch.randn(3, 3, 32, 32)).notes)
    in_order = FromPixels(lambda x: x, masks)
    assert not any("in token order" in note for note in measure(in_order, torch.randn(3, 3, 32, 32)).notes)


@pytest.mark.parametrize(
    ("model", "table"),
    [
        (Inpainting(cls=1), lambda model: model.pos_embed),
        (Inpainting(position="grid"), lambda model: model.pos_embed.flatten(2).mT),
        (Inpainting(position="none"), None),
        (DecoderNames("places", cls=1), lambda model: model.decoder_pos_embed[:, 1:]),
        (DecoderNames("visible first", cls=1), None),  # visible tokens are in unknown places
        (Backbone(registers=4), lambda model: model.vit.pos_embed[:, 5:]),
    ],
    ids=["table", "grid", "none", "decoder", "visible first", "registers"],
)
def test_live_model__positions_are_taken_off(model, table):
    live, mask = LiveModel(model), random_mask(3, (5, 9, 12))
    with torch.no_grad():
        first = next(live.layer_tokens(features(3), mask))
        (stack,) = live.stacks
        measure = DefinitionMeasure(live)
        split = TokenSplit(first.mask)
        found = measure(stack, first, split, "abc")
        if table is None:
            assert live.position_embedding(stack) is None
            assert not any(name.endswith(measure.SUFFIX) for name in found)
            return
        assert torch.equal(live.position_embedding(stack), table(model))
        plain = heterogeneity(first.tokens - table(model), split)
    assert torch.allclose(found["dot" + measure.SUFFIX], plain)
    assert not torch.allclose(found["dot"], plain)


class ChannelGroups(nn.Module):
    """The decoder of SatMAE: a token for each group of channels at each place, whose positions are put together."""

    def __init__(self, groups: int = 3, places: int = 16, dim: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, 1 + places, dim - 8))
        self.decoder_channel_embed = nn.Parameter(torch.randn(1, groups + 1, 8))
        self.decoder_blocks = nn.ModuleList(nn.TransformerEncoderLayer(dim, 2, 32, batch_first=True) for _ in range(2))

    def positions(self) -> torch.Tensor:
        places, groups = self.decoder_pos_embed[:, 1:, None], self.decoder_channel_embed[:, :-1]
        whole = [places.expand(-1, -1, groups.shape[1], -1), groups[:, None].expand(-1, places.shape[1], -1, -1)]
        return torch.cat(whole, dim=-1).transpose(1, 2).flatten(1, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.mask = torch.rand(tokens.shape[:2]).argsort(dim=1) < 36
        tokens = torch.where(self.mask[..., None], self.mask_token, tokens) + self.positions()
        first = torch.cat([self.decoder_pos_embed[:, :1], self.decoder_channel_embed[:, -1:]], dim=-1)
        tokens = torch.cat([first.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return tokens


def test_measure__tokens_of_channel_groups_with_their_positions():
    model, inputs = ChannelGroups().eval(), torch.randn(3, 48, 24)
    blocks, positions = model.decoder_blocks, lambda: model.positions()[0]
    spec = StackSpec("decoder", blocks, model.mask_token, prefix_tokens=1, position=positions)
    seen, handles = keep_tokens([list(blocks)])
    result = measure(model, inputs, stacks=[spec])
    for handle in handles:
        handle.remove()
    assert result.summary()["num_visible"].tolist() == [12.0] * 3
    expected = torch.stack([heterogeneity(seen[0, depth][:, 1:], model.mask) for depth in range(3)])
    torch.testing.assert_close(values_of(result), expected.float())
