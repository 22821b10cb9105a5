"""``mto-analyze affinity``: affinity maps of every layer depth and the numbers of their quadrants (Fig. 2)."""

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mto_analysis.runtime.processes import Processes
from mto_analyze.console import launched, note, progress
from mto_analyze.options import Checkpoints, DecoderHeads, Heads, Offline, Overwrite, Quiet


class Kind(StrEnum):
    """What a map shows."""

    softmax = "softmax"
    dot = "dot"
    cosine = "cosine"


class Scale(StrEnum):
    """How values become colours."""

    per_map = "per-map"
    shared = "shared"


@launched
def affinity(
    context: typer.Context,
    ckpt: Checkpoints,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder, list (.txt) or Parquet file; by default 256 bundled CIFAR-10 images."),
    ] = None,
    kind: Annotated[Kind, typer.Option(help="softmax (the paper's psi), dot or cosine.")] = Kind.softmax,
    chosen: Annotated[
        list[str] | None,
        typer.Option("--image", help="Map this image by itself (repeatable); by default the mean over all."),
    ] = None,
    scale: Annotated[
        Scale, typer.Option(help="per-map: each from its own least to greatest value, as in the paper; or shared.")
    ] = Scale.per_map,
    label: Annotated[list[str] | None, typer.Option(help="Name of each checkpoint, in order.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use so many images, spread evenly.")] = None,
    mask_ratio: Annotated[float | None, typer.Option(help="Fraction masked; by default the model's own.")] = None,
    mask_unit: Annotated[
        int | None, typer.Option(min=1, help="Pixels masked at once; by default the model's own.")
    ] = None,
    masks: Annotated[Path | None, typer.Option(help="Mask file (.npz with `mask` and `names`).")] = None,
    seed: Annotated[int, typer.Option(help="Of the masks.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 32,
    device: Annotated[str, typer.Option(help="auto (CUDA, else CPU), cpu, cuda, cuda:N, or mps.")] = "auto",
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 0,
    num_heads: Heads = None,
    decoder_num_heads: DecoderHeads = None,
    offline: Offline = False,
    strict: Annotated[bool, typer.Option("--strict", help="A broken image is an error.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("affinity"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    *,
    processes: Processes,
) -> None:
    """Map the affinity of all pairs of tokens at every layer depth (Fig. 2), masked tokens first.

    Writes affinity.png and .pdf (one pair per model and image), affinity.npz, quadrants.csv and run.json to --out.
    """
    from mto_analysis.runtime.outputs import OutputFolder, file_word, labels_of, run_facts

    if chosen and limit:
        raise ValueError("--image names the images, so leave --limit out")
    labels = label or labels_of(ckpt)
    stems = {
        (model, image): "-".join(
            ["affinity", *([file_word(model)] if len(labels) > 1 else []), *([file_word(image)] if image else [])]
        )
        for model in labels
        for image in chosen or [""]
    }
    figures = [f"{stem}.{suffix}" for stem in stems.values() for suffix in ("png", "pdf")]
    names = ["affinity.npz", "quadrants.csv", *figures, "run.json"]
    processes.on_main(partial(OutputFolder, out, names, overwrite=overwrite))

    from mto_analysis.demo import DEMO_IMAGES
    from mto_analysis.figures.plots.affinity import draw_affinity
    from mto_analysis.figures.plots.style import write_figure
    from mto_analysis.images import open_images
    from mto_analysis.masks import load_masks
    from mto_analysis.probe.maps import map_checkpoints
    from mto_analysis.probe.study import Settings
    from mto_analysis.runtime.devices import pick_device

    settings = Settings(
        limit=limit,
        mask_ratio=mask_ratio,
        mask_unit=mask_unit,
        masks=load_masks(masks) if masks else None,
        seed=seed,
        batch_size=batch_size,
        device=pick_device(device),
        num_workers=num_workers,
        strict=strict,
    )
    study = map_checkpoints(
        ckpt,
        open_images(images or DEMO_IMAGES),
        settings,
        kind=kind.value,
        chosen=chosen or (),
        labels=labels,
        num_heads=num_heads,
        decoder_num_heads=decoder_num_heads,
        offline=offline,
        say=partial(note, quiet=quiet),
        warn=note,
        progress=partial(progress, quiet=quiet),
        processes=processes,
    )
    if not processes.main:
        return
    folder = OutputFolder(out, names, overwrite=overwrite)
    folder.write_table("quadrants.csv", study.quadrants)
    folder.write_bytes("affinity.npz", study.maps_file())
    for (model, image), stem in stems.items():
        maps = [each for each in study.maps[model] if (each.image or "") == image]
        if maps:  # none where the image was broken and skipped
            write_figure(folder, stem, draw_affinity(maps, scale=scale.value, title=model))
    measured = study.heterogeneity
    facts = run_facts(context.params, models=measured.models, skipped=measured.broken, processes=processes.count)
    folder.write_json("run.json", facts)
    columns = ["model", "stack", "layer_depth", "quadrant", "mass", "dot_mean", "cosine_mean", "row_entropy"]
    typer.echo(study.quadrants[columns].to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    note(f"wrote {', '.join(folder.names)} to {folder.path}", quiet=quiet)
