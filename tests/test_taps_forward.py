"""Kinds of other people's models: measured as the plain way does, or refused by a call of ours."""

import copy
import pickle
import warnings

import pytest
import torch
from model_kinds import (
    DIM,
    NUM,
    AddsBetween,
    Backbone,
    Behind,
    Chunks,
    DecoderNames,
    FromPixels,
    Gives,
    Grid,
    Inpainting,
    InTurn,
    Joins,
    LeavesOut,
    Predictor,
    Residual,
    Rounds,
    SelfDistillation,
    Shared,
    TwoLists,
    TwoTokens,
    VisibleArgument,
    block,
    features,
    random_mask,
)
from test_mto_attach import CONFIG
from torch import nn

from mto_analysis import heterogeneity, measure
from mto_analysis.errors import StackError
from mto_analysis.mto import MTOConfig, StackSpec, attach_mto, mto_loss, watch_mto

RAGGED = random_mask(3, (5, 9, 12))


def plain_way(blocks, run, prefix, mask):
    """The loss of the next forward with tokens that are kept, and the true mask."""
    kept, handles = {}, []

    def keep(depth, *values):
        kept.setdefault(depth, next(value for value in values if value is not None))

    handles.append(
        blocks[0].register_forward_pre_hook(lambda m, args, kwargs: keep(0, *args, *kwargs.values()), with_kwargs=True)
    )
    for depth, each in enumerate(blocks, start=1):
        handles.append(each.register_forward_hook(lambda m, args, out, depth=depth: keep(depth, out)))
    run()
    for handle in handles:
        handle.remove()
    layers = [tokens[0] if isinstance(tokens, tuple) else tokens for tokens in kept.values()]
    patches = prefix if isinstance(prefix, slice) else slice(prefix, None)
    layers = [(each if each.ndim == 3 else each.flatten(1, 2))[:, patches] for each in layers]
    return mto_loss(layers, mask() if callable(mask) else mask, CONFIG).loss


def assert_exact(model, blocks, run, prefix, mask, **options):
    """Loss and gradients equal the plain way's."""
    mto = attach_mto(model.train(), CONFIG, **options)
    torch.manual_seed(7)
    expected = plain_way(blocks, run, prefix, mask)
    loss = mto.loss()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    parameters = [each for each in model.parameters() if each.requires_grad]
    wanted = torch.autograd.grad(expected, parameters, retain_graph=True, allow_unused=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert mto.step == 1
    return mto


def refused(model, run, match, **options):
    mto = attach_mto(model.train(), CONFIG, **options)
    run()
    with pytest.raises(StackError, match=match):
        mto.loss()


# ---- the order of masked tokens


@pytest.mark.parametrize("order", ["places", "visible first", "shuffled"])
@pytest.mark.parametrize("cls", [0, 1])
@pytest.mark.parametrize("masked", [(12,), (5, 9, 12)])
def test_order__masked_tokens_are_found_wherever_they_are(order, cls, masked):
    model, mask = DecoderNames(order, cls), random_mask(3, masked)
    mto = assert_exact(model, model.decoder_blocks, lambda: model(features(3), mask), cls, lambda: model.true_mask)
    assert torch.equal(mto.last_masks["decoder"], mask)
    assert f"{cls} prefix tokens, 16 patches; mask known by tokens and argument 'mask'" in mto.describe()


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("ordered", [False, True])
def test_order__a_predictor_sees_a_subset(num_tokens, ordered):
    model = Predictor(num_tokens, ordered=ordered)
    some = torch.stack([torch.randperm(NUM, generator=torch.Generator().manual_seed(row))[:13] for row in range(2)])
    spec = StackSpec("predictor", model.blocks, list(model.mask_tokens), position=model.pos_embed, present="subset")
    run = lambda: model(features(), some[:, :9], some[:, 9:])  # noqa: E731
    mto = assert_exact(model, model.blocks, run, 0, lambda: model.true_mask, stacks=[spec])
    assert torch.equal(mto.last_masks["predictor"].nonzero()[:, 1].view(2, 4), some[:, 9:].sort(dim=1).values)
    refused(model, run, "present='subset'")


def test_tokens__of_two_kinds_among_the_same_are_one_stack():
    model = TwoTokens()
    run = lambda: model.run(model.tokens(features(3), RAGGED))  # noqa: E731 - nothing but tokens tells the mask
    refused(model, run, "are masked there too; give both as one stack")
    spec = StackSpec("encoder", model.blocks, [model.mask_token, model.other_mask_token], position=model.pos_embed)
    assert_exact(model, model.blocks, run, 0, RAGGED, stacks=[spec])
    refused(model, lambda: model(features(3), RAGGED), "masks 5 to 12 of 16 patches, but")


# ---- prefix tokens


@pytest.mark.parametrize("registers", [0, 1, 4])
@pytest.mark.parametrize("says", [True, False])
def test_prefix__registers_are_no_patches(registers, says):
    model = Backbone(registers, says=says)
    mto = assert_exact(model, model.vit.blocks, lambda: model(features(3), RAGGED), 1 + registers, RAGGED)
    assert mto.last_masks["encoder"].shape[1] == NUM
    run = lambda: model.vit.blocks(model.preprocess(features(3), RAGGED))  # noqa: E731 - as a training step does
    if says:
        assert_exact(model, model.vit.blocks, run, 1 + registers, RAGGED)
    else:
        refused(model, run, r"nothing tells how many of its \d+ tokens are class or register tokens.*prefix_tokens=")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cls": 1},
        {"cls": 1, "registers": 4},
        {"position": "none"},
        {"position": "none", "cls": 1, "registers": 2},
        {"position": "zero"},
        {"position": "grid", "cls": 1},
        {"position": "embedding"},
        {"name": "masked_embed"},
        {"name": "mask_vector", "cls": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("called", [True, False], ids=["called", "by its methods"])
def test_prefix__and_position_are_found(options, called):
    model = Inpainting(**options)
    prefix = options.get("cls", 0) + options.get("registers", 0)

    def run():
        return model(features(3), RAGGED) if called else model.run(model.tokens(features(3), RAGGED))

    assert_exact(model, model.blocks, run, prefix, RAGGED)


@pytest.mark.parametrize(
    ("given", "options", "match"),
    [
        (0, {}, "leave 17 patches, which are no square.*pass prefix_tokens=1"),
        (8, {}, r"tokens \[3, 17, 12\] with 8 prefix tokens are 9 patches.*16 positions; pass prefix_tokens="),
        (2, {}, "leave 15 patches, which are no square.*pass prefix_tokens=1"),
        (0, {"position": "none"}, "leave 17 patches, which are no square.*pass prefix_tokens=1"),
    ],
)
def test_prefix__a_wrong_one_is_refused(given, options, match):
    model = Inpainting(cls=1, **options)
    position = None if options else model.pos_embed
    spec = StackSpec("encoder", model.blocks, model.mask_token, position=position, prefix_tokens=given)
    refused(model, lambda: model.run(model.tokens(features(3), RAGGED)), match, stacks=[spec])
    if options:
        refused(model, lambda: model(features(3), RAGGED), "'mask' has 16; pass prefix_tokens=1", stacks=[spec])


class Rectangular(Inpainting):
    """A grid of 2 x 6 patches."""

    def __init__(self, *, cls, says):
        super().__init__(cls=cls)
        self.pos_embed = nn.Parameter(torch.randn(1, 12 + cls, DIM))
        self.said = nn.Identity()
        if says:
            self.said.num_patches = 12

    def tokens(self, x, mask):
        x = torch.where(mask[..., None], self.mask_token, self.embed(x))
        if hasattr(self, "cls_token"):
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return x + self.pos_embed


@pytest.mark.parametrize("cls", [0, 1])
@pytest.mark.parametrize("says", [True, False])
def test_prefix__of_a_grid_that_is_no_square(cls, says):
    model, mask = Rectangular(cls=cls, says=says), random_mask(3, (5, 9), num=12)
    called = lambda: model(features(3, num=12), mask)  # noqa: E731
    assert_exact(model, model.blocks, called, cls, mask)
    by_methods = lambda: model.run(model.tokens(features(3, num=12), mask))  # noqa: E731
    if says:
        assert_exact(model, model.blocks, by_methods, cls, mask)
    else:
        refused(model, by_methods, "nothing tells how many of its 1[23] tokens are class or register tokens")


@pytest.mark.parametrize("position", ["learned", "none"])
def test_prefix__class_tokens_behind_the_patches_are_given_or_refused(position):
    model, mask = Behind(cls=1, position=position), RAGGED.clone()
    mask[:, 0] = False  # or a masked token would be seen in the place of the class token
    match = "are not in front of the patches|masks 5 to 12 of 16 patches"
    refused(model, lambda: model(features(3), mask), match)
    refused(model, lambda: model.run(model.tokens(features(3), mask)), "pass suffix_tokens=")
    found = {"position": model.pos_embed} if position == "learned" else {}
    spec = StackSpec("encoder", model.blocks, model.mask_token, **found, suffix_tokens=1)
    mto = attach_mto(model, CONFIG, stacks=[spec])
    expected = plain_way(model.blocks, lambda: model(features(3), mask), slice(0, -1), mask)
    torch.testing.assert_close(mto.loss(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "position", "match"),
    [
        (lambda x: x.reshape(1, -1, DIM), "none", r"tokens \[1, 64, 12\] are of 4 images"),  # packed: 64 is a square
        (lambda x: x.reshape(16, 4, DIM), "none", r"tokens \[16, 4, 12\] are of 4 images"),  # windows
        (
            lambda x: torch.cat([torch.randn(4, 9, DIM), x], 1),
            "none",
            "nothing tells how many of its 25 tokens",
        ),  # text
        (lambda x: torch.cat([x[:, :8], x[:1, :1].expand(4, -1, -1), x[:, 8:]], 1), "none", r"tokens \[8\] are equal"),
        (lambda x: torch.cat([x[:, :8], 0 * x[:, :1], x[:, 8:]], 1), "learned", r"\[0, 1\] behind their positions"),
    ],
    ids=["packed", "windows", "text", "among", "among positions"],
)
def test_prefix__rows_and_tokens_that_nothing_tells_apart_are_refused(change, position, match):
    mask = random_mask(4, (5, 9))
    mask[:, 0], mask[0, 1:3], mask[0, 9:11] = False, True, True
    model = FromPixels(change, mask, position=position)
    if "equal" in match or "behind" in match:
        model.num_prefix_tokens = 1
    refused(model, lambda: model(torch.randn(4, 3, 32, 32)), match)


def test_prefix__a_mask_of_all_tokens_may_hold_class_tokens():
    class OfAll(Inpainting):
        def forward(self, x, mask):
            return super().forward(x, mask[:, 2:])

    model, mask = OfAll(cls=2), nn.functional.pad(RAGGED, (2, 0))
    run = lambda: model(features(3), mask)  # noqa: E731
    refused(model, run, "is of all 18 tokens, and masks none of the first 2.*pass prefix_tokens=2")
    spec = StackSpec("encoder", model.blocks, model.mask_token, position=model.pos_embed, prefix_tokens=2)
    assert_exact(model, model.blocks, run, 2, RAGGED, stacks=[spec])


# ---- how the mask is known


def test_mask__an_argument_that_is_something_else():
    class Other(Inpainting):
        def forward(self, x, mask):
            return super().forward(x, RAGGED)

    model, other = Other(), RAGGED.roll(1, dims=1)
    run = lambda: model(features(3), other)  # noqa: E731
    refused(model, run, "mask='tokens' where 'mask' is something else")
    spec = StackSpec("encoder", model.blocks, model.mask_token, position=model.pos_embed, mask="tokens")
    assert_exact(model, model.blocks, run, 0, RAGGED, stacks=[spec])


@pytest.mark.parametrize("arguments", [{"key_padding_mask": RAGGED & False}, {"loss_mask": RAGGED.roll(2, dims=1)}])
def test_mask__arguments_of_other_names_do_not_matter(arguments):
    class More(Inpainting):
        def forward(self, x, mask, key_padding_mask=None, loss_mask=None):
            return super().forward(x, mask)

    model = More()
    assert_exact(model, model.blocks, lambda: model(features(3), RAGGED, **arguments), 0, RAGGED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_mask__of_numbers_is_compared_too(dtype):
    class Numbers(Inpainting):
        def forward(self, x, mask):
            return super().forward(x, mask.bool())

    model = Numbers()
    mto = assert_exact(model, model.blocks, lambda: model(features(3), RAGGED.to(dtype)), 0, RAGGED)
    assert "argument 'mask'" in mto.describe()


def test_mask__one_that_cannot_be_verified_is_warned_about():
    class Drops(Inpainting):
        def forward(self, x, mask):
            return self.run(nn.functional.dropout(self.tokens(x, mask), 0.3))

    model = Drops().train()
    refused(model, lambda: model(features(3), RAGGED), "dropout changed the mask token")
    mto = attach_mto(model, CONFIG, stacks=[StackSpec("encoder", model.blocks, mask="argument:mask")])
    expected = plain_way(model.blocks, lambda: model(features(3), RAGGED), 0, RAGGED)
    with pytest.warns(UserWarning, match="the mask could not be verified"):
        torch.testing.assert_close(mto.loss(), expected, rtol=1e-5, atol=1e-6)
    model(features(3), RAGGED)
    assert mto.loss().isfinite()  # said once


def test_mask__one_that_cannot_be_verified_needs_prefix_tokens_that_are_given():
    class Drops(Inpainting):
        def forward(self, x, mask):
            x = nn.functional.dropout(self.tokens(x, mask), 0.3)
            return self.run(torch.cat([torch.randn(len(x), 2, DIM), x], 1))

    model, run = Drops().train(), lambda: model(features(3), RAGGED)
    spec = StackSpec("encoder", model.blocks, mask="argument:mask")
    refused(model, run, "2 of its tokens .* are beside the 16 patches of the mask.*prefix_tokens=", stacks=[spec])
    spec = StackSpec("encoder", model.blocks, mask="argument:mask", prefix_tokens=2)
    mto = attach_mto(model, CONFIG, stacks=[spec])
    expected = plain_way(model.blocks, run, 2, RAGGED)
    with pytest.warns(UserWarning, match="the mask could not be verified"):
        torch.testing.assert_close(mto.loss(), expected, rtol=1e-5, atol=1e-6)


def test_mask__an_inverted_argument_is_found_or_refused():
    model = VisibleArgument()
    run = lambda: model(features(3), ~RAGGED)  # noqa: E731
    assert "'visible' (True means visible)" in assert_exact(model, model.blocks, run, 0, RAGGED).describe()
    for source, known in (("argument:~visible", True), ("argument:visible", False)):
        for token in (model.mask_token, None):
            position = model.pos_embed if token is not None else None
            spec = StackSpec("encoder", model.blocks, token, position=position, mask=source)
            if known:
                assert_exact(model, model.blocks, run, 0, RAGGED, stacks=[spec])
            else:
                refused(model, run, "it is inverted: pass.*argument:~", stacks=[spec])


def test_mask__an_argument_that_is_not_there_is_refused_with_those_that_are():
    model = Inpainting()
    spec = StackSpec("encoder", model.blocks, model.mask_token, position=model.pos_embed, mask="argument:visible")
    refused(
        model,
        lambda: model(features(3), RAGGED),
        r"no call has an argument 'visible'.*seen: .*mask \[3, 16\]",
        stacks=[spec],
    )


def test_mask__one_of_the_users_that_disagrees_is_refused():
    model = Inpainting(cls=1)
    for mask, match in ((RAGGED.roll(1, dims=1), "masks 5 to 12 of 16 patches"), (RAGGED[:, :-1], "of 15 patches")):
        spec = StackSpec("encoder", model.blocks, model.mask_token, position=model.pos_embed, mask=lambda m=mask: m)
        refused(model, lambda: model(features(3), RAGGED), match, stacks=[spec])


@pytest.mark.parametrize("position", ["learned", "none"])
def test_mask__blank_patches_that_equal_a_mask_token_of_zeros(position):
    model = Inpainting(position=position, token=torch.zeros(DIM))
    model.embed.bias.data.zero_()
    blank = features(3)
    blank[:, :3] = 0
    mto = assert_exact(model, model.blocks, lambda: model(blank, RAGGED), 0, RAGGED)
    model(blank, RAGGED.roll(1, dims=1))
    mto.loss()
    assert torch.equal(mto.last_masks["encoder"], RAGGED.roll(1, dims=1))
    refused(model, lambda: model.run(model.tokens(blank, RAGGED)), r"mask token is all zeros.*mask='argument:NAME'")


def test_mask__tokens_changed_on_their_way_are_refused():
    model = Inpainting()
    model.blocks[0].register_forward_pre_hook(lambda m, args: (args[0] + 0.1,))
    refused(model, lambda: model(features(3), RAGGED), "'mask' masks 5 to 12 patches, but none of its tokens")
    refused(model, lambda: model.run(model.tokens(features(3), RAGGED)), "no forward with masked tokens")


# ---- views, teachers, several forwards


@pytest.mark.parametrize("crop_first", [True, False])
def test_views__of_another_size_change_nothing(crop_first):
    model = Backbone().train()
    mto = attach_mto(model, CONFIG)
    views = [lambda: model(features(3), RAGGED), lambda: model(features(3, num=4))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor does a warning stop the user's forward
        expected = plain_way(model.vit.blocks, views[0], 1, RAGGED)
        mto.forget()
        for view in reversed(views) if crop_first else views:
            view()
    with pytest.warns(UserWarning, match="1 forwards have a number of tokens that does not fit"):
        torch.testing.assert_close(mto.loss(), expected, rtol=1e-5, atol=1e-6)
    assert mto.skipped == 1
    views[1]()
    views[0]()
    torch.testing.assert_close(mto.loss(), expected, rtol=1e-5, atol=1e-6)  # no second warning


@pytest.mark.parametrize("order", [("teacher", "student"), ("student", "teacher")])
def test_teacher__frozen_is_skipped_and_unfrozen_refused(order):
    model = SelfDistillation(order).train()
    model.teacher.eval()
    mask = random_mask()
    assert_exact(model, model.student.vit.blocks, lambda: model(features(), mask), 1, mask)
    watch = watch_mto(model, every=1)
    for _ in range(5):
        model(features(), mask)
    assert len(watch.records) == 5
    with pytest.raises(ValueError, match=r"student.mask_token.*requires_grad_\(False\).*stacks="):
        attach_mto(SelfDistillation(order, frozen=False))


def test_forwards__all_since_the_last_loss_count_by_their_images():
    model = Inpainting(cls=1).train()
    mto = attach_mto(model, CONFIG)
    masks = [random_mask(2, (5, 9)), random_mask(4, (12, 3), seed=1)]
    each = [plain_way(model.blocks, lambda mask=mask: model(features(len(mask)), mask), 1, mask) for mask in masks]
    torch.testing.assert_close(mto.loss(), (2 * each[0] + 4 * each[1]) / 6, rtol=1e-5, atol=1e-6)
    assert mto.terms["heterogeneity_0"] > 0


def test_forwards__of_views_in_turn_have_the_masks_of_their_own_calls():
    model, masks = InTurn().train(), [RAGGED, RAGGED.flip(1)]
    views, mto = [features(3), features(3, 1)], attach_mto(model, CONFIG)
    model(views, masks)
    student = model.student
    each = [plain_way(student.blocks, lambda i=i: student(views[i], masks[i]), 0, masks[i]) for i in range(2)]
    torch.testing.assert_close(mto.loss(), torch.stack(each).mean(), rtol=1e-5, atol=1e-6)


def test_watch__a_step_whose_second_forward_fails_has_no_record():
    model = InTurn().train()
    watch = watch_mto(model, every=1)
    model.student.register_forward_pre_hook(lambda m, args: (args[0], RAGGED))  # another mask than in the call
    with pytest.warns(UserWarning, match="step 0 was not recorded.*'mask' masks 5 to 12 of 16 patches"):
        model([features(3), features(3, 1)], [RAGGED, RAGGED.roll(1, dims=1)])
    assert watch.records == []


def test_watch__takes_the_mean_over_the_forwards_of_a_step():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inpainting()

        def forward(self, x, first, second):
            return self.inner(x, first), self.inner(x, second)

    model = Two().train()
    masks = random_mask(3, (5, 9)), random_mask(3, (12, 3), seed=1)
    watch, single = watch_mto(model, every=1), watch_mto(model.inner, every=1)
    model(features(3), *masks)
    (record,) = watch.records
    both = single.records
    assert len(both) == 2
    assert record["heterogeneity_3"] == pytest.approx(sum(each["heterogeneity_3"] for each in both) / 2, rel=1e-5)


# ---- autocast


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("found", ["by structure", "masked_row", "position"])
def test_autocast__rows_are_rounded_as_the_model_rounds(everything, found):
    model = Rounds(everything=everything).train()
    row = {"masked_row": lambda: model.mask_token + model.vit.pos_embed[:, 1:]}
    if found == "position":
        row = {"position": lambda: model.vit.pos_embed[:, 1:]}
    spec = StackSpec("encoder", list(model.vit.blocks), model.mask_token, **row)
    mto = attach_mto(model, CONFIG, stacks=None if found == "by structure" else [spec])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        mask = random_mask(2, (5, 9), seed=step)
        with torch.autocast("cpu", torch.bfloat16):
            expected = plain_way(model.vit.blocks, lambda mask=mask: model(features(), mask), 1, mask)
        loss = mto.loss()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# ---- points


@pytest.mark.parametrize("stack", ["first branches", "all branches", "last branch"])
def test_points__branches_are_never_taken_for_tokens(stack):
    model = Residual()
    branches = {
        "first branches": [first for first, _ in model.layers],
        "all branches": [branch for pair in model.layers for branch in pair],
        "last branch": [model.layers[1][1]],
    }[stack]
    if stack == "last branch":
        with pytest.raises(ValueError, match="taps="):
            StackSpec("encoder", branches, model.hole)
        return
    spec = StackSpec("encoder", branches, model.hole, prefix_tokens=0)
    refused(model, lambda: model(features(3), RAGGED), r"added outside of the blocks; pass taps=", stacks=[spec])


def test_points__taps_measure_residuals_added_outside():
    model = Residual().train()
    taps = [*((first, "input") for first, _ in model.layers), (model.norm, "input")]
    mto = attach_mto(model, CONFIG, stacks=[StackSpec("encoder", taps=taps, mask_token=model.hole)])
    model(features(3), RAGGED)
    torch.testing.assert_close(mto.loss(), mto_loss(model.whole, RAGGED, CONFIG).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["before", "in place", "zero"])
def test_points__what_is_added_between_blocks_is_refused(way):
    model = AddsBetween(way).train()
    rows = {"masked_row": lambda: model.mask_token + model.pos_embed + (model.pos_embed if way == "before" else 0)}
    spec = StackSpec("encoder", model.blocks, model.mask_token, **rows)
    if way == "zero":  # nothing is added in the first forward, but later
        mto = attach_mto(model, CONFIG, stacks=[spec])
        model(features(3), RAGGED)
        assert mto.loss().isfinite()
        model.scale.data.fill_(0.1)
        model(features(3), RAGGED)
        with pytest.raises(StackError, match=r"the input of block 1.*taps="):
            mto.loss()
    else:
        refused(model, lambda: model(features(3), RAGGED), "the input of block 1.*taps=", stacks=[spec])


@pytest.mark.parametrize(
    "way", ["in place", "changes its input", "attention first", "branch too", "carries positions", "residual apart"]
)
def test_points__blocks_that_give_more_than_tokens_or_change_them(way):
    model = Gives(way).train()
    run = lambda: model(features(3), RAGGED)  # noqa: E731
    mto = attach_mto(model, CONFIG)
    run()
    if way == "residual apart":  # tokens are the sum of two tensors
        with pytest.raises(StackError, match="block 1 takes tokens in several tensors; pass taps="):
            mto.loss()
        model = Gives(way, 1)
        refused(model, run, "its block gives several tensors of tokens; pass taps=")
        return
    torch.testing.assert_close(mto.loss(), mto_loss(model.whole, RAGGED, CONFIG).loss, rtol=1e-5, atol=1e-6)
    mto.detach()
    for _ in range(2):  # a forward shows whether tokens must be copied
        found = measure(model, features(3), RAGGED).summary()["heterogeneity"].tolist()
        assert found == pytest.approx([heterogeneity(x, RAGGED).mean().item() for x in model.whole], rel=1e-5)


def test_points__blocks_may_run_without_masked_tokens_before():
    model = Shared().train()
    calls = []
    handle = model.blocks[0].register_forward_pre_hook(lambda m, args: calls.append(args[0]))
    mto = attach_mto(model, CONFIG)
    outputs = [each.register_forward_hook(lambda m, args, out: calls.append(out)) for each in model.blocks]
    model(features(3), RAGGED)
    for each in (handle, *outputs):
        each.remove()
    torch.testing.assert_close(mto.loss(), mto_loss(calls[4:], RAGGED, CONFIG).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("token", [None, torch.zeros(DIM)], ids=["random", "zero"])
def test_points__chunks_of_blocks_and_lists_of_views(token):
    model = Chunks(token=token).train()
    run = lambda: model([features(3), features(4)], [RAGGED, torch.zeros(4, NUM, dtype=torch.bool)])  # noqa: E731
    mto, kept = attach_mto(model, CONFIG), []
    hooks = [each.register_forward_hook(lambda m, args, out: kept.append((args[0][0], out[0]))) for each in model.parts]
    run()
    for each in hooks:
        each.remove()
    layers = [tokens[:, 5:] for tokens in (kept[0][0], *(out for _, out in kept))]
    torch.testing.assert_close(mto.loss(), mto_loss(layers, RAGGED, CONFIG).loss, rtol=1e-5, atol=1e-6)
    assert "argument 'masks'" in mto.describe()
    two_masked = lambda: model([features(3), features(3, 1)], [RAGGED, RAGGED])  # noqa: E731
    refused(model, two_masked, "takes tokens in several tensors")  # only one of which would be measured


def test_points__lists_that_run_one_after_the_other_are_one_stack():
    model = TwoLists()
    run = lambda: model(features(3), RAGGED)  # noqa: E731
    refused(model, run, r"go on from blocks.2 into more.0; give both lists as one stack.*\[\*blocks, \*more\]")
    spec = StackSpec("encoder", [*model.blocks, *model.more], model.mask_token, position=model.pos_embed)
    assert_exact(model, [*model.blocks, *model.more], run, 0, RAGGED, stacks=[spec])


def test_points__blocks_that_do_not_run_are_named():
    model = Inpainting()
    spec = StackSpec("encoder", [*model.blocks, block()], model.mask_token, position=model.pos_embed)
    refused(model, lambda: model(features(3), RAGGED), r"blocks \[4\] of encoder did not run", stacks=[spec])


def test_points__merging_needs_tokens_in_the_order_of_patches():
    windows = torch.arange(NUM).view(2, 2, 2, 2).transpose(1, 2).flatten()  # 2 x 2 patches one after the other
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[:, :2, :2] = True
    model = FromPixels(lambda x: x[:, windows], mask.flatten(1))
    model.blocks = nn.ModuleList([block(), Joins()])
    spec = StackSpec("encoder", model.blocks, model.mask_token, position=model.pos_embed)
    refused(model, lambda: model(torch.randn(3, 3, 32, 32)), "its 16 tokens are not in the order", stacks=[spec])


def test_points__maps_with_channels_first_are_named():
    model = Inpainting()
    model.mask_token = nn.Parameter(torch.randn(1, DIM, 1, 1))
    with pytest.raises(ValueError, match=r"mask_token \[1, 12, 1, 1\], which is no vector with its width last"):
        attach_mto(model)
    with pytest.raises(ValueError, match="mask_token of stack encoder has channels first"):
        StackSpec("encoder", model.blocks, model.mask_token)


def test_points__tokens_left_out_are_not_taken_for_merged_ones():
    model, mask = Inpainting(position="none"), torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, :2, :2] = True  # whole cells, so that merging would be possible
    model.blocks = nn.ModuleList([LeavesOut(), LeavesOut()])
    run = lambda: model(features(2), mask.flatten(1))  # noqa: E731
    refused(model, run, "of 16 tokens there are 4 at layer depth 1, and nothing tells whether they were merged")


def test_points__one_block_may_run_several_times():
    model = Inpainting().train()
    shared = model.blocks[0]
    model.blocks = nn.ModuleList([shared] * 3)
    mto, kept = attach_mto(model, CONFIG), []
    handle = shared.register_forward_hook(lambda m, args, out: kept.append((args[0], out)))
    model(features(3), RAGGED)
    handle.remove()
    layers = [kept[0][0], *(out for _, out in kept)]
    torch.testing.assert_close(mto.loss(), mto_loss(layers, RAGGED, CONFIG).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("merges", [False, True])
def test_points__grids_keywords_and_tuples(merges):
    model = Grid(merges=merges)
    coarse = random_mask(3, (3, 5), num=8).view(3, 2, 4)
    mask = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)  # 4 x 8
    last = coarse if merges else mask
    images = torch.randn(3, 4, 8, DIM)
    mto = attach_mto(model.train(), CONFIG)
    plain_way(model.layers, lambda: model(images, mask), 0, [mask.flatten(1)] * 2 + [last.flatten(1)])
    loss = mto.loss()
    expected = plain_way(model.layers, lambda: model(images, mask), 0, [mask.flatten(1)] * 2 + [last.flatten(1)])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("position", ["learned", "none"])
def test_points__sequence_first_tokens_are_turned_or_refused(position):
    model, twin = Inpainting(position=position, batch_first=False).train(), Inpainting(position=position).train()
    twin.load_state_dict(model.state_dict())
    mto = attach_mto(model, CONFIG)
    expected = plain_way(twin.blocks, lambda: twin(features(3), RAGGED), 0, RAGGED)
    model(features(3), RAGGED)
    torch.testing.assert_close(mto.loss(), expected, rtol=1e-5, atol=1e-6)
    as_many = random_mask(NUM, (5, 9))  # as many images as tokens: nothing tells them apart
    refused(model, lambda: model(features(NUM), as_many), "batch_first=False")
    refused(model, lambda: model.run(model.tokens(features(3), RAGGED)), "batch_first=False")


def test_points__other_widths_are_refused():
    model = Inpainting()
    refused(
        model,
        lambda: model(features(3), RAGGED),
        r"have a width of \[7\].*one of 12",
        stacks=[StackSpec("encoder", model.blocks, nn.Parameter(torch.randn(7)))],
    )


# ---- the user's forward goes on


def test_hooks__an_error_of_ours_stops_nothing():
    model = Inpainting()

    def broken():
        raise ZeroDivisionError("broken")

    for source in ({"masked_row": broken}, {"mask": broken}, {"mask_token": model.mask_token, "position": broken}):
        spec = StackSpec("encoder", model.blocks, **source)
        refused(model, lambda: model(features(3), RAGGED).sum().backward(), "ZeroDivisionError: broken", stacks=[spec])
    watch = watch_mto(model.train(), every=1, stacks=[spec])
    with pytest.warns(UserWarning, match="step 0 was not recorded.*ZeroDivisionError"):
        model(features(3), RAGGED)
    model(features(3), RAGGED)  # once
    assert watch.records == []
    assert watch.step == 2


def test_handle__pickles_without_the_model_and_goes_on_from_its_state():
    model = Inpainting().train()
    mto = attach_mto(model, MTOConfig(warmup_steps=4))
    for _ in range(2):
        model(features(3), RAGGED)
        mto.loss()
    state = mto.state_dict()
    assert state.keys() == {"step", "config"}
    copied = pickle.loads(pickle.dumps(mto))
    assert (copied.step, copied.config) == (2, mto.config)
    with pytest.raises(StackError, match="no forward"):
        copied.loss()
    other = attach_mto(copy.deepcopy(model), MTOConfig(warmup_steps=4))
    other.load_state_dict(state)
    assert other.step == 2
    with pytest.raises(ValueError, match="this handle has"):
        attach_mto(model).load_state_dict(state)
