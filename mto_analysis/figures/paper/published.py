"""Figs. 3 and 4, supplementary Figs. 1 and 2: a schematic, and what is stated where no curve is published.

With an experiment's folder the last three are drawn from what was measured instead.
"""

from __future__ import annotations

import pandas as pd

from mto_analysis.errors import DataError
from mto_analysis.figures.paper.inputs import Drawn
from mto_analysis.figures.paper.tables import printed
from mto_analysis.figures.paper.workbench import Workbench
from mto_analysis.figures.plots.claims import draw_accuracy_claims, draw_depth_claims
from mto_analysis.figures.plots.schematic import draw_schematic

#: Supplementary Fig. 1 compares these two.
STYLES = {"SimMIM": "inpainting", "MAE": "decoder"}

_LOSSES = (
    ("L_spa", "(3)", "0", "3rd and 4th", "rows of visible tokens", "their entropy falls"),
    ("L_e", "(4)", "0", "2nd", "heterogeneity at layer depth 0", "it rises"),
    ("L_r", "(5)", "0 to L", "2nd", "heterogeneity of neighbouring layer depths", "it falls with depth"),
)
_DEPTH_KINDS = (
    ("one of the two best", "best"),
    ("or more is consistently better", "good_from"),
    ("below the best", "below_best"),
    ("lowest value", "lowest"),
)
_MEASURES = {"finetune": "fine-tuning", "linear": "linear probing"}


def fig3(bench: Workbench) -> Drawn:
    """Masked token optimization as a schematic."""
    table = pd.DataFrame(_LOSSES, columns=["loss", "equation", "layer_depth", "quadrant", "acts_on", "when_minimised"])
    caption = (
        "A schematic in our own form. (a), (b) Where masked tokens live: in inpainting style they pass through the"
        " encoder, in decoder style only through the decoder; the framed stack is the one that is measured and that MTO"
        " acts on. (c) The affinity matrix at layer depth 0, masked tokens first: L_spa (Eq. 3) is the entropy of the"
        " rows of visible tokens over all columns; H (Eq. 2) is that of the rows of masked tokens over visible columns"
        " alone (a softmax of its own), which L_e (Eq. 4) raises. (d) What is asked of H over layer depth: high at 0,"
        " then lower step by step. L_r is drawn in the direction that the text asks for; Eq. 5 as printed has the"
        " opposite sign. No measurement is shown."
    )
    return Drawn({bench.name: draw_schematic()}, {bench.name: table}, caption)


def fig4(bench: Workbench) -> Drawn:
    """Accuracy over epochs: what is stated of the curves, or curves that were measured here."""
    if bench.inputs.experiment is not None:
        from mto_analysis.figures.paper.experiments import accuracy_curves

        return accuracy_curves(bench.name, bench.inputs.experiment)
    return _accuracy_claims(
        bench, None, "drawn from the numbers in Sect. 5.3 and Table 1: the curves are not published"
    )


def supp_fig1(bench: Workbench) -> Drawn:
    """The two styles: what is stated of the curves, or curves that were measured here."""
    if bench.inputs.experiment is not None:
        from mto_analysis.figures.paper.experiments import style_curves

        return style_curves(bench.name, bench.inputs.experiment)
    says = "drawn from the numbers in Sect. 5.3 and Table 1: the curves of supplementary Fig. 1 are not published"
    return _accuracy_claims(bench, STYLES, says)


def _accuracy_claims(bench: Workbench, styles: dict[str, str] | None, says: str) -> Drawn:
    claims = printed("epoch_reduction_claims")
    rauc = printed("table1_rauc").drop(columns=["method", "backbone"])
    for frame, columns in (
        (claims, ["baseline_epochs", "reduction_percent"]),
        (rauc, ["start_epoch", "end_epoch", "rauc"]),
    ):
        frame[columns] = frame[columns].astype(float)
    claims["epochs_with_mto"] = (claims["baseline_epochs"] * (1 - claims["reduction_percent"] / 100)).round(3)
    claims = claims[["baseline", "backbone", "baseline_epochs", "reduction_percent", "epochs_with_mto"]]
    closing = (
        "The accuracies of supplementary Fig. 1 are not published; its text says that MTO speeds up both styles"
        " up to 400 epochs, and that at 800 epochs SimMIM with it is far ahead of MAE."
    )
    if styles is None:
        closing = (
            "The accuracies themselves and their spread over seeds are not published; the text gives a range of 300"
            " to 500 epochs for all baselines."
        )
    else:
        claims, rauc = (frame[frame["baseline"].isin(list(styles))].copy() for frame in (claims, rauc))
        claims = claims[claims["backbone"] == "ViT-B"].reset_index(drop=True)
        claims["backbone"] = [f"{styles[name]} style" for name in claims["baseline"]]
    figure = draw_accuracy_claims(claims, rauc, says=says)
    caption = (
        "Published statements, not measurements. Left: pre-training epochs until the baseline's accuracy at 800 epochs"
        " is reached, with the share of epochs that the text says MTO saves. Right: RAUC (Eq. 6) with MTO against the"
        f" baseline as Table 1 prints it, in two windows. Each is a single number: no n and no interval is published."
        f" {closing}"
    )
    numbers = pd.concat([claims.assign(statement="epochs"), rauc.assign(statement="rauc")], ignore_index=True)
    order = ["statement", *(column for column in numbers if column != "statement")]
    return Drawn({bench.name: figure}, {bench.name: numbers[order]}, caption)


def supp_fig2(bench: Workbench) -> Drawn:
    """Decoder depth: what is stated, or what was measured here."""
    if bench.inputs.experiment is not None:
        from mto_analysis.figures.paper.experiments import depth_curves

        return depth_curves(bench.name, bench.inputs.experiment)
    rows = printed("supp_fig2_claims")
    table = rows.assign(
        measure=rows["measure"].map(_MEASURES),
        decoder_depth=pd.to_numeric(rows["decoder_depth"].where(rows["decoder_depth"] != ""), errors="coerce"),
        kind=[_kind_of(claim) for claim in rows["claim"]],
    )
    table["words"] = [
        f"lowest: {top1} %\n(depth not said)" if kind == "lowest" else claim
        for top1, kind, claim in zip(table["top1"], table["kind"], rows["claim"], strict=True)
    ]
    says = "drawn from statements in the supplement: the accuracies of supplementary Fig. 2 are not published"
    caption = (
        "Published statements about MAE ViT-B with MTO after 400 epochs, not measurements: which decoder depths the"
        " text calls best in fine-tuning, from which on linear probing is consistently better, and where it is slightly"
        " below its best. At the right the lowest accuracy of the study, for too few layers; at which depth is not"
        " said. Positions along the axis are all that is drawn: no other accuracy is published, no run without MTO is"
        " shown, and no number of runs is given."
    )
    figure = draw_depth_claims(table, says=says)
    return Drawn({bench.name: figure}, {bench.name: table.drop(columns="words")}, caption)


def _kind_of(claim: str) -> str:
    for words, kind in _DEPTH_KINDS:
        if words in claim:
            return kind
    raise DataError(f"supp_fig2_claims.csv: {claim!r} is a claim of a form that the figure cannot draw")
