"""Which software wrote a file, from its tensor names alone: ordered rules, and a clear refusal where nothing fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from mto_analysis.checkpoints.beit import convert_beit, convert_beit_v2, convert_conmim, convert_eva02, convert_hf_beit
from mto_analysis.checkpoints.bootmae import convert_bootmae
from mto_analysis.checkpoints.cae import convert_cae, convert_mm_cae
from mto_analysis.checkpoints.conversion import Conversion, Given, some_names
from mto_analysis.checkpoints.hiera import convert_hf_hiera, convert_hiera
from mto_analysis.checkpoints.hierarchical import convert_greenmim, convert_hivit, convert_ijepa, convert_mcmae
from mto_analysis.checkpoints.huggingface import architecture, convert_library
from mto_analysis.checkpoints.ibot import convert_ibot, convert_ibot_swin
from mto_analysis.checkpoints.mae import convert_hf_vitmae, convert_mae, convert_mae_lite, convert_split_mae
from mto_analysis.checkpoints.milan import convert_milan, convert_mm_milan
from mto_analysis.checkpoints.native import convert_native
from mto_analysis.checkpoints.openmmlab import (
    convert_mm_beit,
    convert_mm_beit_v2,
    convert_mm_mae,
    convert_mm_maskfeat,
    convert_mm_mff,
    convert_mm_swin,
    convert_openmixup_simmim,
    convert_slowfast_maskfeat,
)
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.checkpoints.simmim import convert_hf_swin, convert_simmim, convert_simmim_swin
from mto_analysis.errors import CheckpointError
from mto_analysis.runtime.plugins import plugins


class Names(frozenset[str]):
    """Tensor names of a file, with the questions that rules ask."""

    beside: frozenset[str] = frozenset()

    def starts(self, *prefixes: str) -> bool:
        """Whether some name starts with each of the prefixes."""
        return all(any(name.startswith(prefix) for name in self) for prefix in prefixes)

    @classmethod
    def of(cls, raw: RawCheckpoint) -> Names:
        """The names in a checkpoint, and those of the entries beside the weights."""
        names = cls(raw.tensors)
        names.beside = frozenset(raw.extras)
        return names

    def has(self, *names: str) -> bool:
        """Whether all these names are there."""
        return self.issuperset(names)


_LISTED = 4
_MASK_TOKEN = re.compile(r"mask(ed)?_?(tok|emb)", re.IGNORECASE)
_MIXES = "its encoder mixes two images, so no token is masked or visible"

Converter = Callable[[RawCheckpoint, Given], Conversion]


@dataclass(frozen=True)
class Layout:
    """One way of naming tensors in a file.

    Args:
        name: Whose layout it is.
        matches: Whether tensor names are of this layout.
        convert: Reads it, or ``None`` where it is known but not supported.
        reason: Why it is not supported, where that is more than its converter missing.
    """

    name: str
    matches: Callable[[Names], bool]
    convert: Converter | None = None
    reason: str = ""


def _masked(names: Names, mask_token: str) -> bool:
    """Whether it is a pre-training file: one that lost its mask token still has the head, and is refused by name."""
    return names.has(mask_token) or names.has("decoder.0.weight") or names.has("lm_head.weight")


def _masked_embed(names: Names) -> bool:
    return names.has("masked_embed") or names.has("backbone.masked_embed")


def _is_swin(names: Names) -> bool:
    return names.starts("backbone.layers.0.blocks.") or names.starts("layers.0.blocks.")


#: First match wins: later rules rely on earlier ones having taken their files.
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "Hugging Face ViTMAE",
        lambda n: n.starts("vit.embeddings.", "decoder.decoder_"),
        convert_hf_vitmae,
    ),
    Layout(
        "Hugging Face Swin for masked image modelling",
        lambda n: n.starts("swin.embeddings.") and _masked(n, "swin.embeddings.mask_token"),
        convert_hf_swin,
    ),
    Layout(
        "Hugging Face SwinV2 for masked image modelling",
        lambda n: n.starts("swinv2.embeddings.") and _masked(n, "swinv2.embeddings.mask_token"),
        convert_hf_swin,
    ),
    Layout(
        "Hugging Face BEiT",
        lambda n: n.starts("beit.embeddings.") and _masked(n, "beit.embeddings.mask_token"),
        convert_hf_beit,
    ),
    Layout("Hugging Face Hiera MAE", lambda n: n.starts("hiera.", "decoder.decoder_"), convert_hf_hiera),
    Layout("mmpretrain MILAN", lambda n: n.has("neck.decoder_blocks.0.attn.q.weight"), convert_mm_milan),
    Layout("mmpretrain CAE", lambda n: n.starts("neck.regressors.0."), convert_mm_cae),
    Layout(
        "mmpretrain MFF",
        lambda n: n.has("backbone.proj_weights") and n.starts("neck.decoder_blocks.0."),
        convert_mm_mff,
    ),
    Layout(
        "mmpretrain MixMIM",
        lambda n: n.has("backbone.absolute_pos_embed") and n.starts("neck.decoder_blocks.0."),
        reason=_MIXES,
    ),
    Layout("mmpretrain MAE", lambda n: n.has("neck.decoder_blocks.0.attn.qkv.weight"), convert_mm_mae),
    Layout(
        "mmpretrain SimMIM Swin",
        lambda n: n.starts("backbone.stages.0.") and (n.has("backbone.mask_token") or n.has("neck.decoder.0.weight")),
        convert_mm_swin,
    ),
    Layout("mmpretrain BEiT v2", lambda n: n.starts("neck.patch_aggregation.0."), convert_mm_beit_v2),
    Layout(
        "mmpretrain BEiT",
        lambda n: n.starts("backbone.rel_pos_bias.") and (n.has("backbone.mask_token") or n.starts("head.cls_head.")),
        convert_mm_beit,
    ),
    Layout(
        "OpenMixup A2MIM",
        lambda n: n.starts("backbone.layers.0.", "neck.decoder_pred.0."),
    ),
    Layout(
        "OpenMixup SimMIM ViT", lambda n: n.starts("backbone.layers.0.", "neck.decoder.0."), convert_openmixup_simmim
    ),
    Layout(
        "mmpretrain MaskFeat",
        lambda n: n.starts("backbone.layers.0.") and (n.has("backbone.mask_token") or n.has("neck.fc.weight")),
        convert_mm_maskfeat,
    ),
    Layout(
        "microsoft/SimMIM ViT", lambda n: n.starts("encoder.blocks.0.") and n.has("decoder.0.weight"), convert_simmim
    ),
    Layout(
        "SimMIM SwinV2",
        lambda n: n.has("encoder.layers.0.blocks.0.attn.logit_scale") and _masked(n, "encoder.mask_token"),
        convert_simmim_swin,
    ),
    Layout(
        "SimMIM Swin",
        lambda n: n.starts("encoder.layers.0.blocks.0.") and _masked(n, "encoder.mask_token"),
        convert_simmim_swin,
    ),
    Layout("BootMAE", lambda n: n.starts("decode_blocks.0.", "decode_blocks_1.0."), convert_bootmae),
    Layout(
        "CAE",
        lambda n: n.starts("regresser.regressor_blocks.") or n.starts("pretext_neck.regressor_blocks."),
        convert_cae,
    ),
    Layout(
        "CrossMAE",
        lambda n: n.has("decoder_blocks.0.cross_attn.q.weight", "wfm.linear.weight"),
        reason="its masked and visible tokens have different widths, so Eq. 2 is not defined",
    ),
    Layout("Hiera MAE", lambda n: n.has("multi_scale_fusion_heads.0.weight"), convert_hiera),
    Layout(
        "MCMAE / ConvMAE",
        lambda n: n.starts("blocks3.0.") and (n.has("mask_token") or n.starts("decoder_blocks.0.")),
        convert_mcmae,
    ),
    Layout("MILAN", lambda n: n.has("decoder_blocks.0.attn.kv.weight"), convert_milan),
    Layout(
        "UM-MAE",
        lambda n: n.has("vis_mask_token"),
    ),
    Layout(
        "MAE-pytorch",
        lambda n: n.has("encoder_to_decoder.weight", "mask_token"),
    ),
    Layout(
        "HiViT MAE",
        lambda n: n.has("absolute_pos_embed") and n.starts("decoder_blocks.0.", "blocks.0."),
        convert_hivit,
    ),
    Layout("GreenMIM", lambda n: n.starts("encoder.layers.0.") and n.has("decoder_embed.weight"), convert_greenmim),
    Layout("MixMIM", lambda n: n.starts("layers.0.blocks.0.", "decoder_blocks.0."), reason=_MIXES),
    # Its names are MAE's; a distilled model lies beside its teacher. Only its trainer writes start_epoch.
    Layout(
        "MAE-Lite",
        lambda n: (
            (n.has("decoder_blocks.0.attn.qkv.weight") and "start_epoch" in n.beside)
            or (n.starts("model.decoder_blocks.0.") and (n.starts("tch_model.") or "start_epoch" in n.beside))
        ),
        convert_mae_lite,
    ),
    Layout(
        "SatMAE of channel groups",
        lambda n: n.has("channel_embed", "decoder_channel_embed"),
        reason="a place has a token for each group of channels, masked by itself, and a mask here is one of places; "
        "its own code can be measured with StackSpec(position=...), see own-model.md",
    ),
    Layout(
        "MAE of two modules",
        lambda n: (
            n.has("decoder.decoder_blocks.0.attn.qkv.weight", "decoder.mask_token")
            or n.starts("backbone.vit.blocks.0.", "decoder.decoder_blocks.0.")
        ),
        convert_split_mae,
    ),
    Layout(
        "facebookresearch/mae",
        lambda n: n.has("decoder_blocks.0.attn.qkv.weight", "decoder_pos_embed", "pos_embed"),
        convert_mae,
    ),
    Layout("iBOT", lambda n: _masked_embed(n) and not _is_swin(n), convert_ibot),
    Layout("iBOT Swin", lambda n: _masked_embed(n) and _is_swin(n), convert_ibot_swin),
    Layout(
        "I-JEPA",
        lambda n: n.has("predictor.predictor_pos_embed", "predictor.mask_token", "encoder.pos_embed"),
        convert_ijepa,
    ),
    Layout("PySlowFast MaskFeat", lambda n: n.has("mask_token") and n.starts("pred_head."), convert_slowfast_maskfeat),
    Layout("ConMIM", lambda n: n.has("projectors.0.weight", "blocks.0.attn.q_bias"), convert_conmim),
    Layout("BEiT v2", lambda n: n.starts("cls_pt_layers.0.", "blocks.0."), convert_beit_v2),
    Layout(
        "EVA-02",
        lambda n: n.has("blocks.0.mlp.w3.weight", "blocks.0.attn.q_bias") and _masked(n, "mask_token"),
        convert_eva02,
    ),
    Layout(
        "BEiT / data2vec vision / EVA",
        lambda n: n.has("blocks.0.attn.q_bias") and _masked(n, "mask_token"),
        convert_beit,
    ),
    Layout(
        "DINOv2",
        lambda n: n.has("mask_token", "blocks.0.ls1.gamma"),
    ),
)


def _is_known(names: Names) -> bool:
    return any(layout.matches(names) for layout in LAYOUTS)


def without_holder(raw: RawCheckpoint) -> RawCheckpoint:
    """A checkpoint without the attributes that held the model, where only then its layout is known.

    What stands in front of all names, such as ``network.``, says nothing about the model; some layouts have such parts
    themselves.
    """
    bare = raw
    while not _is_known(Names.of(bare)):
        holders = {name.partition(".")[0] for name in bare.tensors if "." in name[:-1]}
        if len(holders) != 1 or not all(name.startswith(f"{next(iter(holders))}.") for name in bare.tensors):
            return raw
        bare = replace(bare, tensors={name.partition(".")[2]: tensor for name, tensor in bare.tensors.items()})
    return bare


def recognize(raw: RawCheckpoint) -> tuple[str, Converter]:
    """The name of a file's layout, and what reads it."""
    if "mto_analysis" in raw.metadata:
        return "mto_analysis", convert_native
    names = Names.of(raw)
    by_library = architecture(raw) is not None and bool(_mask_tokens(raw))
    for layout in LAYOUTS:
        if layout.matches(names) and not (by_library and layout.convert is None):
            if layout.convert is None:
                reason = f" ({layout.reason})" if layout.reason else ""
                raise CheckpointError(
                    f"{raw.path} has tensor names of {layout.name}, which is not read{reason}; {_found(raw)}"
                )
            return layout.name, layout.convert
    for plugin in plugins("layouts"):  # ours come first, so that no plugin changes what a known file is
        if plugin.call(lambda: plugin.value.matches(names)):  # noqa: B023 - called at once
            return plugin.value.name, plugin.value.convert
    if by_library:
        return "Hugging Face transformers", convert_library
    raise CheckpointError(f"{raw.path} has a layout that is unknown; {_found(raw)}")


def _mask_tokens(raw: RawCheckpoint) -> list[str]:
    return [name for name in raw.tensors if _MASK_TOKEN.search(name)]


def _found(raw: RawCheckpoint) -> str:
    """What a file that is not read holds, as far as its tensor names tell."""
    if tokens := _mask_tokens(raw):
        return f"it holds {', '.join(tokens[:2])}: measure the model live with mto_analysis.training.watch_mto"
    listed = some_names(sorted(raw.tensors), _LISTED)
    return f"none of its tensors is named mask_token or masked_embed; it holds {listed}"
