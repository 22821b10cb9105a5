import copy
import gc
import io
import pickle
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import training_models as foreign
from torch import nn
from training_models import CASES, Case, draw_mask, make_images

from mto_analysis import MaskRule, ModelInfo, load_checkpoint
from mto_analysis.errors import StackError
from mto_analysis.models import MAE, MAEConfig, SimMIM, SimMIMConfig
from mto_analysis.mto import CollapseWarning, MTOConfig, StackSpec, attach_mto, mto_loss, ranking_loss

GOLDEN = Path(__file__).parent / "golden"

# Every term of weight 1, so that each one's gradient shows.
CONFIG = MTOConfig(sparsity_weight=1, embedding_weight=1, ranking_weight=1)


def ours_mae():
    encoder = {"dim": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16}
    decoder = {"decoder_dim": 12, "decoder_depth": 2, "decoder_num_heads": 2, "decoder_mlp_dim": 16}
    config = MAEConfig(16, 4, **encoder, **decoder)
    return MAE(config, ModelInfo("mae", "decoder", 16, 4, MaskRule("random", 0.75, 4)))


def ours_simmim():
    config = SimMIMConfig(16, 4, dim=16, depth=2, num_heads=2, mlp_dim=16, absolute_positions=True)
    return SimMIM(config, ModelInfo("simmim_vit", "inpainting", 16, 4, MaskRule("block", 0.6, 4)))


def run_ours(model, seed):
    mask = draw_mask(seed, masked=(10, 7, 12))
    images = make_images(seed)
    return (model(images, mask) - images).square().mean(), mask


CASES = CASES | {
    "ours mae": Case(ours_mae, run_ours, lambda m: [list(m.decoder_blocks)]),
    "ours simmim": Case(ours_simmim, run_ours, lambda m: [list(m.blocks)]),
}
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def build(case):
    torch.manual_seed(1)
    model = case.build()
    with torch.no_grad():  # nothing is zero, so that every mistake shows
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def keep_tokens(stacks):
    """Tokens of all layer depths of the next forward, by (stack, depth), untouched; and the hooks' handles."""
    kept, handles = {}, []

    def keep(at, value):
        kept.setdefault(at, value[0] if isinstance(value, tuple) else value)

    for stack, blocks in enumerate(stacks):
        handles.append(
            blocks[0].register_forward_pre_hook(
                lambda module, args, kwargs, at=(stack, 0): keep(at, (*args, *kwargs.values())), with_kwargs=True
            )
        )
        for depth, block in enumerate(blocks, start=1):
            handles.append(block.register_forward_hook(lambda m, args, out, at=(stack, depth): keep(at, out)))
    return kept, handles


def slow_way(case, model, seed, config=CONFIG, autocast=nullcontext):
    """Loss and gradients with the tokens of all layers kept, and the true mask."""
    kept, handles = keep_tokens(case.stacks(model))
    with autocast():
        loss, mask = case.run(model, seed)
    for handle in handles:
        handle.remove()
    side = int(mask.shape[1] ** 0.5)
    extra = []
    for stack, blocks in enumerate(case.stacks(model)):
        layers = [kept[stack, depth][:, case.prefix :] for depth in range(len(blocks) + 1)]
        cells = [side // int(tokens.shape[1] ** 0.5) for tokens in layers]
        masks = [mask if c == 1 else mask.view(-1, side, side)[:, ::c, ::c].flatten(1) for c in cells]
        extra.append(mto_loss(layers, masks, config).loss)
    extra = torch.stack(extra).mean()
    model.zero_grad()
    (loss + extra).backward()
    return extra.detach(), gradients(model)


def attached_way(case, model, mto, seed, autocast=nullcontext):
    with autocast():
        loss, _ = case.run(model, seed)
    extra = mto.loss()
    model.zero_grad()
    (loss + extra).backward()
    return extra.detach(), gradients(model)


def assert_same(found, expected, **tolerance):
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def assert_near(found, expected):
    """The same within bfloat16: Swin's later stages add gradients up in it, in another order."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)
    pairs = [(found[1][name], gradient) for name, gradient in expected[1].items() if gradient is not None]
    ours, theirs = (torch.cat([pair[k].flatten() for pair in pairs]) for k in (0, 1))
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def traces(model):
    """All that hooks leave on modules, and the keys of the state."""
    hooks = [
        len(getattr(module, table))
        for module in model.modules()
        for table in vars(nn.Module())
        if table.endswith(("_hooks", "_with_kwargs", "_always_called"))
    ]
    return hooks, [sorted(vars(module)) for module in model.modules()], list(model.state_dict())


@EACH
def test_attach__loss_and_gradients_equal_the_slow_way(case):
    model = build(case)
    twin = copy.deepcopy(model)
    mto = attach_mto(model, CONFIG)
    for seed in range(2):
        found = attached_way(case, model, mto, seed)
        assert_same(found, slow_way(case, twin, seed), rtol=1e-4, atol=1e-6)


@EACH
def test_attach__trains_for_some_steps(case):
    model = build(case)
    mto = attach_mto(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(3):
        loss, _ = case.run(model, step)
        loss = loss + mto.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
        assert all(value == value for value in mto.terms.values())
    several = len(case.stacks(model)) > 1
    start = "pixel_decoder/" if several else ""
    depth = len(case.stacks(model)[0])
    assert {start + name for name in ("loss", "sparsity", "embedding", "ranking", f"heterogeneity_{depth}")} < set(
        mto.terms
    )
    assert mto.terms[f"{start}mask_token_grad_norm"] > 0


@EACH
def test_attach__detach_leaves_no_trace(case):
    model = build(case)
    before = traces(model)
    mto = attach_mto(model)
    assert traces(model)[0] != before[0]
    assert traces(model)[1:] == before[1:]  # no attribute, no key
    case.run(model, 0)
    mto.detach()
    assert traces(model) == before
    case.run(model, 0)
    with pytest.raises(RuntimeError, match="detach"):
        mto.loss()


@EACH
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of checkpoints without gradients
def test_attach__records_nothing_without_training(case):
    model = build(case)
    mto = attach_mto(model)
    with torch.no_grad():
        case.run(model, 0)
    with pytest.raises(RuntimeError, match="no forward with masked tokens"):
        mto.loss()
    model.eval()
    case.run(model, 0)
    with pytest.raises(RuntimeError, match="no forward with masked tokens"):
        mto.loss()


@EACH
def test_attach__bf16_autocast_equals_the_slow_way(case):
    model = build(case)
    twin = copy.deepcopy(model)
    mto = attach_mto(model, CONFIG)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    found = attached_way(case, model, mto, 0, autocast)
    assert found[0].dtype == torch.float32
    expected = slow_way(case, twin, 0, autocast=autocast)
    assert_near(found, expected)


MAE_CASE = CASES["mae"]


def test_attach__half_precision_model():
    case = CASES["simmim vit"]
    model = build(case).to(torch.bfloat16)
    mto = attach_mto(model)
    mask = draw_mask(0)
    loss = model(make_images().bfloat16(), mask.view(3, 4, 4).long())
    extra = mto.loss()
    assert extra.dtype == torch.float32
    (loss + extra).backward()
    assert model.encoder.mask_token.grad.isfinite().all()


def test_attach__loss_twice_raises():
    model = build(MAE_CASE)
    mto = attach_mto(model)
    MAE_CASE.run(model, 0)
    mto.loss()
    with pytest.raises(RuntimeError, match="since the last loss"):
        mto.loss()


def test_attach__loss_is_the_mean_over_images_of_all_forwards_since_the_last():
    case = CASES["conmim"]
    model, masks = build(case), [draw_mask(0, masked=(10, 7, 12)), draw_mask(1, masked=(0, 5, foreign.NUM))]
    twin = copy.deepcopy(model)
    mto = attach_mto(model, CONFIG)
    kept = []
    for mask in masks:
        tokens, handles = keep_tokens(case.stacks(twin))
        for each in (model, twin):
            each(make_images(), bool_masked_pos=mask)
        for handle in handles:
            handle.remove()
        some = mask.any(dim=1) & ~mask.all(dim=1)
        kept.append(mto_loss([tokens[0, depth][some, 1:] for depth in range(len(tokens))], mask[some], CONFIG).loss)
    expected = (3 * kept[0] + kept[1]) / 4  # of the second forward one image has masked and visible patches
    loss = mto.loss()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mae", "simmim vit", "simmim swin, non-reentrant"])
def test_attach__a_graph_that_was_freed_is_said(name):
    case = CASES[name]
    model = build(case)
    twin = copy.deepcopy(model)
    mto = attach_mto(model, CONFIG)
    case.run(model, 0)[0].backward()
    case.run(model, 1)
    with pytest.raises(StackError, match=r"freed the graph.*loss\(\) before backward\(\)"):
        mto.loss()
    assert_same(attached_way(case, model, mto, 2), slow_way(case, twin, 2), rtol=1e-4, atol=1e-6)
    case.run(model, 0)[0].backward()
    mto.forget()
    assert_same(attached_way(case, model, mto, 3), slow_way(case, twin, 3), rtol=1e-4, atol=1e-6)


def test_attach__a_graph_that_is_kept_can_be_used():
    model = build(MAE_CASE)
    mto = attach_mto(model, CONFIG)
    own, _ = MAE_CASE.run(model, 0)
    own.backward(retain_graph=True)
    mto.loss().backward()


def test_attach__gradients_accumulate():
    model = build(MAE_CASE)
    twin = copy.deepcopy(model)
    mto = attach_mto(model, CONFIG)
    for seed in range(3):
        loss, _ = MAE_CASE.run(model, seed)
        ((loss + mto.loss()) / 3).backward()
    expected = {name: 0 for name, _ in twin.named_parameters()}
    for seed in range(3):
        for name, gradient in slow_way(MAE_CASE, twin, seed)[1].items():
            expected[name] = expected[name] if gradient is None else expected[name] + gradient / 3
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_attach__warmup_counts_losses():
    model = build(MAE_CASE)
    mto = attach_mto(model, replace(CONFIG, warmup_steps=2))
    values = []
    for _ in range(2):
        MAE_CASE.run(model, 0)
        values.append(mto.loss().item())
    assert values[0] == pytest.approx(values[1] / 2)


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "ema"])
def test_attach__copies_of_the_model_have_nothing_attached(duplicate):
    model = build(MAE_CASE)
    mto = attach_mto(model)
    loss, _ = MAE_CASE.run(model, 0)  # a forward is pending: its tensors are not leaves
    if duplicate == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
        assert pickle.loads(pickle.dumps(model)) is not None
    elif duplicate == "ema":
        twin = torch.optim.swa_utils.AveragedModel(model).module
    else:
        twin = copy.deepcopy(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    pending = mto.loss()
    MAE_CASE.run(twin.train(), 1)
    with pytest.raises(RuntimeError, match="no forward"):
        mto.loss()  # the copy's forward is not the model's
    (loss + pending).backward()


def test_attach__hooks_do_nothing_once_the_handle_is_gone():
    model = build(MAE_CASE)
    attach_mto(model)
    gc.collect()
    loss, _ = MAE_CASE.run(model, 0)
    loss.backward()


def test_attach__does_not_keep_the_tokens_after_loss():
    case = CASES["simmim swin, reentrant"]
    model = build(case)
    mto = attach_mto(model)
    case.run(model, 0)
    assert any(forward.waiting for stack in mto._stacks for forward in stack.forwards)
    mto.loss()
    assert not any(stack.forwards or stack.running for stack in mto._stacks)


def test_conmim__the_teacher_in_train_mode_is_not_counted():
    case = CASES["conmim"]
    student, teacher = build(case), build(case).requires_grad_(False)
    twin = copy.deepcopy(student)
    mto = attach_mto(student, CONFIG)
    for seed in range(2):
        with torch.no_grad():
            teacher(make_images(seed), bool_masked_pos=torch.zeros(3, foreign.NUM, dtype=torch.bool))
        found = attached_way(case, student, mto, seed)
        assert_same(found, slow_way(case, twin, seed), rtol=1e-4, atol=1e-6)


def test_conmim__a_forward_without_any_mask_is_not_counted():
    model = build(CASES["conmim"])
    mto = attach_mto(model)
    model(make_images(), bool_masked_pos=torch.zeros(3, foreign.NUM, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="no patch was masked"):
        mto.loss()


def test_attach__images_without_masked_or_without_visible_patches_are_left_out():
    case = CASES["conmim"]
    model = build(case)
    mto = attach_mto(model, CONFIG)
    mask = draw_mask(0, masked=(0, 7, foreign.NUM))
    kept, _ = keep_tokens(case.stacks(model))
    model(make_images(), bool_masked_pos=mask)
    layers = [kept[0, depth][1:2, 1:] for depth in range(len(kept))]
    torch.testing.assert_close(mto.loss(), mto_loss(layers, mask[1:2], CONFIG).loss)


def test_bootmae__get_feature_of_an_ema_copy_is_not_counted():
    case = CASES["bootmae"]
    model = build(case)
    ema = copy.deepcopy(model).eval()
    mto = attach_mto(model, CONFIG)
    loss, _ = case.run(model, 0)
    with torch.no_grad():
        ema.get_feature(make_images(), 12, None)
    (loss + mto.loss()).backward()
    assert {name.split("/")[0] for name in mto.terms} == {"pixel_decoder", "feature_decoder"}


def test_swin__mask_units_smaller_than_a_cell_are_refused():
    model = build(CASES["simmim swin"])
    attached = attach_mto(model)
    mask = draw_mask(0, masked=(20, 20, 20), grid=8)
    model(make_images(), mask.view(3, 8, 8).long())  # nothing of ours stops it
    with pytest.raises(StackError, match="cuts through merged tokens"):
        attached.loss()


class WholeStackCheckpointed(foreign.VisionTransformerForSimMIM):
    """Checkpoints all blocks at once, as Hugging Face's Swin does with a stage."""

    use_reentrant = True

    def forward(self, images, mask):
        def run(x):
            for block in self.blocks:
                x = block(x, rel_pos_bias=self.rel_pos_bias)
            return x

        w = mask.flatten(1).unsqueeze(-1).float()
        x = self.patch_embed(images) * (1 - w) + self.mask_token * w
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=self.use_reentrant)
        return self.norm(x)[:, 1:].mT.unflatten(2, (4, 4))


def whole_stack(use_reentrant):
    encoder = WholeStackCheckpointed()
    encoder.use_reentrant = use_reentrant
    return foreign.SimMIM(encoder, foreign.PATCH, foreign.DIM)


def test_checkpointing__a_whole_stack_without_reentry_equals_the_plain_model():
    case = replace(CASES["simmim vit"], build=lambda: whole_stack(use_reentrant=False))
    model, plain = build(case), build(CASES["simmim vit"])
    plain.load_state_dict(model.state_dict())
    found = attached_way(case, model, attach_mto(model, CONFIG), 0)
    assert_same(found, slow_way(CASES["simmim vit"], plain, 0), rtol=1e-4, atol=1e-6)


def test_checkpointing__a_whole_stack_with_reentry_is_refused():
    case = replace(CASES["simmim vit"], build=lambda: whole_stack(use_reentrant=True))
    model = build(case)
    mto = attach_mto(model)
    case.run(model, 0)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        mto.loss()


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    with warnings.catch_warnings():  # torch's own, when it goes on after a hook
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["mae", "simmim vit"])
def test_compile__attached_before_the_first_call(name, backend):
    case = CASES[name]
    model = build(case)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    mto = attach_mto(compiled, CONFIG)
    for seed in range(2):
        found = attached_way(case, compiled, mto, seed)
        found = found[0], {name.removeprefix("_orig_mod."): value for name, value in found[1].items()}
        assert_same(found, slow_way(case, twin, seed), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("compiler")
def test_compile__attached_too_late_is_said():
    model = build(MAE_CASE)
    compiled = torch.compile(model, backend="eager")
    MAE_CASE.run(compiled, 0)
    mto = attach_mto(compiled)
    MAE_CASE.run(compiled, 0)
    with pytest.raises(RuntimeError, match=r"torch\.compile had run before attach_mto"):
        mto.loss()


def test_attach__data_parallel_is_refused():
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        attach_mto(nn.DataParallel(build(MAE_CASE)))


def test_attach__unknown_structure_says_how_to_go_on():
    with pytest.raises(ValueError, match=r"Sequential has no known structure.*StackSpec"):
        attach_mto(nn.Sequential(nn.Linear(2, 2)))


def test_attach__layers_beyond_the_stack_are_refused():
    with pytest.raises(ValueError, match="layers must be 0 to 3 for decoder"):
        attach_mto(build(MAE_CASE), MTOConfig(layers=(0, 4)))


class Unheard(nn.Module):
    """A model of no known structure, without prefix tokens."""

    def __init__(self):
        super().__init__()
        self.stem, self.hole = foreign.PatchEmbed(16), nn.Parameter(torch.randn(16))
        self.trunk, self.last_mask = foreign.blocks(16, 2), None

    def forward(self, images, mask):
        self.last_mask = mask
        x = torch.where(mask.unsqueeze(-1), self.hole, self.stem(images))
        for block in self.trunk:
            x = block(x)
        return x.square().mean()


@pytest.mark.parametrize("way", ["masked_row", "mask"])
def test_stack_spec__explicit(way):
    case = Case(
        Unheard, lambda m, s: (m(make_images(s), draw_mask(s)), draw_mask(s)), lambda m: [list(m.trunk)], prefix=0
    )
    model = build(case)
    twin = copy.deepcopy(model)
    source = {"masked_row": lambda: model.hole} if way == "masked_row" else {"mask": lambda: model.last_mask}
    spec = StackSpec("trunk", model.trunk, mask_token=model.hole, prefix_tokens=0, **source)
    mto = attach_mto(model, CONFIG, stacks=[spec])
    assert_same(attached_way(case, model, mto, 0), slow_way(case, twin, 0), rtol=1e-4, atol=1e-6)
    assert mto.terms["mask_token_grad_norm"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": []}, "needs blocks or taps"),
        ({"taps": [(nn.Identity(), "input"), (nn.Identity(), "output")]}, "needs blocks or taps, one of them"),
        ({"blocks": [], "taps": [(nn.Identity(), "input")]}, "needs two taps or more"),
        ({"blocks": [], "taps": [(nn.Identity(), "input"), (nn.Identity(), "middle")]}, "'input'.*or.*'output'"),
        ({"blocks": nn.ModuleList([nn.ModuleList()])}, r"ModuleList among its blocks.*taps="),
        ({"blocks": [nn.Linear(2, 2)]}, r"Linear among its blocks.*taps="),
        ({"prefix_tokens": -1}, "prefix_tokens of at least 0, or 'auto', got -1"),
        ({"prefix_tokens": "some"}, "or 'auto', got some"),
        ({}, "needs mask_token, masked_row or mask"),
        ({"mask": "bool_masked_pos"}, "'argument:NAME', 'argument:~NAME' or 'tokens'"),
        ({"mask": torch.ones, "present": "none"}, "'all' or 'subset'"),
    ],
)
def test_stack_spec__names_the_rule(settings, message):
    with pytest.raises(ValueError, match=message):
        StackSpec(**{"name": "trunk", "blocks": [nn.Identity()]} | settings)


def test_attach__dropout_on_the_mask_token_is_said():
    model = build(CASES["simmim vit"])
    model.encoder.blocks[0].register_forward_pre_hook(lambda m, args: (args[0] + 0.1,))
    mto = attach_mto(model)
    CASES["simmim vit"].run(model, 0)
    with pytest.raises(RuntimeError, match="dropout changed the mask token"):
        mto.loss()


def scaled(model, factor):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "patch_embed" in name or "token" in name:
                parameter.mul_(factor)
    return model


def test_warning__dead_sparsity_and_collapse_name_stack_and_step():
    case = CASES["simmim vit"]
    model = scaled(build(case), 100)
    mto = attach_mto(model, MTOConfig.paper())
    case.run(model, 0)
    with pytest.warns(CollapseWarning) as caught:
        mto.loss()
    said = [str(each.message) for each in caught]
    assert any(message.startswith("encoder, step 0: L_spa is dead") for message in said)
    assert any("heterogeneity of all layers has collapsed to 0" in message for message in said)
    assert caught[0].filename == __file__


def test_warning__not_finite():
    case = CASES["simmim vit"]
    model = build(case)
    mto = attach_mto(model, check_every=1)
    case.run(model, 0)
    mto.loss()
    with torch.no_grad():
        model.encoder.blocks[1].mlp[0].weight[0, 0] = float("nan")
    case.run(model, 0)
    with pytest.warns(CollapseWarning) as caught:
        assert mto.loss().isnan()
    assert [str(each.message) for each in caught] == [
        "encoder, step 1: ranking is not finite",
        "encoder, step 1: heterogeneity is not finite",
    ]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_attach__a_mask_token_that_is_not_finite_is_said(value):
    case = CASES["simmim vit"]
    model = build(case)
    mto = attach_mto(model)
    with torch.no_grad():
        model.encoder.mask_token[0, 0, 1] = float(value)
    case.run(model, 0)
    with pytest.raises(RuntimeError, match="encoder, step 0: the mask token is not finite"):
        mto.loss()


def test_warning__only_every_so_many_steps():
    case = CASES["simmim vit"]
    model = scaled(build(case), 100)
    mto = attach_mto(model, check_every=0)
    case.run(model, 0)
    mto.loss()  # warnings are errors here


@pytest.mark.parametrize(("folder", "heads"), [("simmim_swin", {}), ("bootmae", {"num_heads": 3})])
def test_attach__to_our_swin_and_bootmae_gives_the_original_codes_terms(folder, heads):
    path = GOLDEN / folder
    model = load_checkpoint(path / "checkpoint.pth", **heads).train()
    inputs, expected = np.load(path / "inputs.npz"), np.load(path / "expected.npz")
    images, mask = torch.from_numpy(inputs["images"]), torch.from_numpy(inputs["mask"])
    mto = attach_mto(model, MTOConfig.paper(), check_every=0)
    for stack in model.stacks:
        for _ in model.layer_tokens(images, mask, stack):
            pass
        of = "" if len(model.stacks) == 1 else f"_{stack.partition('_')[0]}"
        h = torch.from_numpy(expected[f"heterogeneity{of}"])
        wanted = expected[f"l_spa{of}"].mean() + expected[f"l_e{of}"].mean() + float(ranking_loss(h))
        assert mto.loss().item() == pytest.approx(wanted, rel=1e-4)
