"""A paragraph for a paper's methods section, from what ``run.json`` of a run records, and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

_PAPER = '"Emerging Property of Masked Token for Effective Pre-training" (ECCV 2024)'
_PROTOCOLS = {
    "knn": "weighted k-nearest-neighbour classification on features of the frozen encoder",
    "linear_cached": "logistic regression on cached features of the frozen encoder",
    "linear_mae": "MAE's linear probe, trained on the frozen encoder",
    "finetune": "fine-tuning of the whole encoder",
}


def methods_paragraph(command: str, metadata: Mapping[str, Any]) -> str:
    """What a command did, with versions, data, masks, seeds, layers and intervals.

    Args:
        command: Words of the command, as ``evaluate knn``.
        metadata: What its ``run.json`` holds; of ``rauc`` also ``comparisons``, the content of ``rauc.json``.

    Returns:
        One paragraph of plain text; empty for commands that measure, train and compare nothing.

    Example:
        >>> methods_paragraph("tables", {})
        ''
    """
    write = _WRITERS.get(command.partition(" ")[0])
    return "" if write is None else " ".join(each for each in (*write(metadata), _software(metadata)) if each)


def _heterogeneity(metadata: Mapping[str, Any]) -> Iterable[str]:
    given = metadata["arguments"]
    yield (
        "The heterogeneity H of masked tokens was measured at every layer depth, from the input of the first block "
        f"with masked tokens (depth 0) to the output of the last one, by Eq. 2 of {_PAPER}: the entropy (natural "
        "logarithm) of the softmax over dot products of a masked token with all visible tokens, averaged over masked "
        "tokens."
    )
    yield from _measured(metadata)
    if others := _others(given.get("measures", "h")):
        yield f"In the same pass these were measured: {_listed(others)}."
    masks = given.get("masks_per_image", 1)
    yield (f"Means and 95 % intervals (Student's t) are over images{f', of {masks} masks each' if masks > 1 else ''}.")
    if given.get("controls"):
        yield f"Controls were repeated with {given['control_seeds']} seeds."
    if given.get("difference"):
        yield "Differences between the two models are paired by image."


def _others(measures: str | Sequence[str]) -> Sequence[str]:
    """Names of the measures besides H."""
    from mto_analysis.probe.measures import names_of  # imports torch, which redrawing and rauc do without

    return names_of(measures)[1:]


def _atlas(metadata: Mapping[str, Any]) -> Iterable[str]:
    given, image_set = metadata["arguments"], metadata["image_set"]
    masks = given["masks_per_image"]
    others = [name for name in _others(given["measures"]) if name != "lidar" or masks > 1]
    measures = _listed([f"heterogeneity (Eq. 2 of {_PAPER})", *others])
    yield (
        f"At every layer depth of {_listed(metadata['checkpoints'])} these were measured: {measures}. Images: "
        f"{image_set['count']} of the set {image_set['name']} (SHA-256 {image_set['sha256'][:12]}), with {masks} "
        f"mask{'s' * (masks > 1)} each by the rule of each model's pre-training, seed {given['seed']}. The forward "
        f"pass was computed in {given['precision']} on {_device(metadata)}."
    )


def _affinity(metadata: Mapping[str, Any]) -> Iterable[str]:
    kinds = {"softmax": "the softmax over each row of dot products", "dot": "dot products", "cosine": "cosines"}
    yield f"Affinity maps of all pairs of tokens ({kinds[metadata['arguments']['kind']]}) were computed at every layer."
    yield from _measured(metadata)
    yield "Maps are means over images, with masked tokens sorted first." if not metadata["arguments"]["chosen"] else ""


def _intervene(metadata: Mapping[str, Any]) -> Iterable[str]:
    given = metadata["arguments"]
    names = given["chosen"] or ["all interventions"]
    yield (
        f"Interventions on masked tokens ({', '.join(map(str, names))}) acted from layer depth "
        f"{_listed(given['from_depth'] or [0])} on in each model's own forward pass: attention is cut by logits of "
        "minus infinity, tokens are replaced where they enter a block. Effects are mean differences within images, "
        "with 95 % intervals (Student's t)."
    )
    if given["controls"]:
        yield "As a control, the same was done to equally many masked and visible tokens, sampled at random."
    yield (
        f"Accuracy, where images have labels, is leave-one-out kNN with k = {given['neighbours']} on the mean of "
        "visible tokens."
    )
    yield from _measured(metadata)


def _reconstruct(metadata: Mapping[str, Any]) -> Iterable[str]:
    yield "Masked patches were reconstructed by each model, and its own training loss was computed for each image."
    yield from _measured(metadata)


def _relate(metadata: Mapping[str, Any]) -> Iterable[str]:
    given = metadata["arguments"]
    yield (
        "Spearman's rank correlations of measures with accuracy were computed across methods and within runs, with "
        f"{100 * given['confidence']:g} % intervals and Holm's correction for their number."
    )
    tables = [*given["measures"], *given["scores"]]
    yield f"Tables: {', '.join(map(str, tables))}."


def _measured(metadata: Mapping[str, Any]) -> Iterable[str]:
    """Models, images, masks and precision of a pass over images."""
    given, models = metadata["arguments"], metadata["models"]
    source = _place(given["images"]) if given.get("images") else "the bundled CIFAR-10 test images"
    counts = sorted({each["num_images"] for each in models if "num_images" in each})
    note = "; files that were skipped are listed in run.json" if metadata.get("skipped") else ""
    yield f"Images: {' or '.join(map(str, counts)) or 'those'} of {source}{note}."
    for each in models:
        yield _model(each)
    precision = given.get("precision", "fp32")
    yield f"The forward pass was computed in {precision} on {_device(metadata)}."


def _place(source: object) -> str:
    """An address or id as it is, of a path the last two parts: where it lies on this machine is in run.json."""
    return str(source) if "://" in str(source) else str(PurePath(*PurePath(str(source)).parts[-2:]))


def _model(each: Mapping[str, Any]) -> str:
    info, loss = each["info"], each.get("own_loss")
    size = info["image_size"]
    pixels = f"{size[0]} x {size[1]}" if isinstance(size, (list, tuple)) else f"{size} x {size}"
    digest = f", SHA-256 {each['sha256'][:12]}" if each["sha256"] else ""
    file = f"{_place(each['source'])}{digest}"
    words = [f"{each['model']}: {info['family']} ({file}), {pixels} pixels, masks: {each['masks']}"]
    if info["assumptions"]:
        words.append(f"; assumed that {' and that '.join(info['assumptions'])}")
    if loss:
        words.append(
            f"; reconstruction loss {loss['loss']:.4g}, against {loss['predict_the_mean']:.4g} for predicting the mean"
        )
    return "".join(words) + "."


def _pretrain(metadata: Mapping[str, Any]) -> Iterable[str]:
    identity, layout = metadata["identity"], metadata["layout"]
    recipe, mto = identity["recipe"], identity["mto"]
    yield (
        f"A {recipe['method']} model ({_pairs(recipe['model'])}) was pre-trained for {recipe['epochs']} epochs on "
        f"{identity['images']['count']} images ({metadata['images']}) of {recipe['image_size']} pixels with patches of "
        f"{recipe['patch_size']}, masking {recipe['mask_ratio']:g} of them ({recipe['mask_kind']}, units of "
        f"{recipe['mask_unit']} pixels), from the recipe {recipe['name']}."
    )
    yield (
        f"The effective batch was {recipe['batch_size']} images, the base learning rate {recipe['base_lr']:g} per "
        f"{recipe['lr_batch']} images with {recipe['warmup_epochs']:g} epochs of warm-up and a {recipe['schedule']} "
        f"schedule, weight decay {recipe['weight_decay']:g}, betas {_listed(recipe['betas'])}."
    )
    if mto:
        layers = mto["layers"]
        yield (
            f"Masked token optimization ({_PAPER}) was added with weights {mto['sparsity_weight']:g} (sparsity), "
            f"{mto['embedding_weight']:g} (embedding) and {mto['ranking_weight']:g} (ranking), at "
            f"{'all layers' if layers is None else f'layer depths {_listed(layers)}'}."
        )
    if identity["init"]:
        yield f"It began with the weights of {identity['init']}."
    processes = layout["processes"]
    yield (
        f"The seed was {identity['seed']}; training ran in {identity['precision']} on {processes} "
        f"process{'es' if processes > 1 else ''} ({layout['device']})."
    )


def _evaluate(metadata: Mapping[str, Any]) -> Iterable[str]:
    given, settings, protocol = metadata["arguments"], metadata["settings"], metadata["protocol"]
    train, test = (
        f"{settings[name]}{f' ({given[limit]} of them)' if given[limit] else ''}"
        for name, limit in (("train", "train_limit"), ("test", "test_limit"))
    )
    yield (
        f"Encoders were scored by {_PROTOCOLS[protocol]}, with training images {train} and test images {test}; scores "
        "are top-1 accuracies in percent."
    )
    if protocol == "knn":
        yield f"k was {settings['neighbours']} and the temperature of the weights {settings['temperature']:g}."
    if settings.get("set"):
        yield f"Settings changed: {_pairs(settings['set'])}."
    if given.get("layers"):
        yield (
            "Every layer depth was scored; one half of the test images, by a hash of their names, chose the best, and "
            "the other half gave its score, with Wilson's 95 % interval."
        )
    yield f"Checkpoints: {', '.join(map(str, given['ckpt']))}."
    if metadata["random"]:
        yield "The same architectures with random weights were scored for comparison."
    yield f"Encoders ran in {given['precision']} on {_device(metadata)}."


def _rauc(metadata: Mapping[str, Any]) -> Iterable[str]:
    yield (
        f"Relative areas under the curve (RAUC) were computed by Eq. 6 of {_PAPER} as the area of the target's mean "
        "curve over that of the baseline's, by the trapezoidal rule, after subtracting the reference score."
    )
    for one in metadata["comparisons"]:
        if one.get("kind") != "comparison":
            continue
        interval = one["interval"]
        level = f"{100 * interval['confidence']:g} % interval"
        none = interval["kind"] == "none"
        spread = f"no {level}: {interval['reason']}" if none else f"the {level} is by {interval['method']}"
        origin = "given" if one["reference_given"] else "the baseline at the start"
        yield (
            f"{one['target']} ({_runs(one['seeds_target'])}) was compared with {one['baseline']} "
            f"({_runs(one['seeds_baseline'])}) from {one['axis']} {one['start']:g} to {one['end']:g}, with "
            f"reference {one['reference']:.4g} ({origin}); {spread}."
        )
    yield f"Curves were read from {', '.join(dict.fromkeys(one['file'] for one in metadata['logs']))}."


def _runs(seeds: Sequence[Any]) -> str:
    return f"{len(seeds)} run{'' if len(seeds) == 1 else 's'}"


def _experiment(metadata: Mapping[str, Any]) -> Iterable[str]:
    told = metadata["experiment"]
    arms = _listed(each["name"] for each in told["arms"])
    yield f"Arms {arms} were each run with the seeds {_listed(told['seeds'])}, in {told['precision']}."
    for variant in told["variants"]:
        recipe = variant["recipe"]
        yield (
            f"{variant['label']}: {recipe['method']}, recipe {recipe['name']}, {recipe['epochs']} epochs, batch "
            f"{recipe['batch_size']}, base learning rate {recipe['base_lr']:g}; scored every "
            f"{max(1, recipe['epochs'] // told['points'])} epochs."
        )
    pairs = ", and were compared in pairs" if len(told["arms"]) > 1 else ""
    yield f"Runs of one seed share initial weights, image order, augmentation and masks{pairs}."
    evaluation = told["evaluation"]
    limit = f" with {evaluation['limit']} training images" if evaluation["limit"] else ""
    yield (
        f"Encoders were scored by {_PROTOCOLS[evaluation['protocol']]}{limit}; RAUC (Eq. 6 of {_PAPER}) was computed "
        f"from these curves{', with 95 % intervals over seeds' if len(told['seeds']) > 1 else ''}."
    )
    if metadata.get("chosen"):
        yield f"Settings were chosen on separate runs: {_pairs(metadata['chosen'])}."


def _device(metadata: Mapping[str, Any]) -> str:
    processes = metadata.get("processes", 1)
    return f"{metadata['device']}{f' ({processes} processes)' if processes > 1 else ''}"


def _software(metadata: Mapping[str, Any]) -> str:
    versions = {"PyTorch": "torch", "timm": "timm"}
    used = [f"{name} {metadata['versions'][key]}" for name, key in versions.items() if key in metadata["versions"]]
    own = f"mto-analysis {metadata['versions'].get('mto-analysis', '')}".strip()
    return f"Software: {', '.join([own, *used])}, Python {metadata['python']}."


def _listed(values: Iterable[Any]) -> str:
    *first, last = (f"{each:g}" if isinstance(each, float) else str(each) for each in values)
    return f"{', '.join(first)} and {last}" if first else last


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


_WRITERS: dict[str, Callable[[Mapping[str, Any]], Iterable[str]]] = {
    "demo": _heterogeneity,
    "heterogeneity": _heterogeneity,
    "atlas": _atlas,
    "affinity": _affinity,
    "intervene": _intervene,
    "reconstruct": _reconstruct,
    "report": _heterogeneity,
    "relate": _relate,
    "pretrain": _pretrain,
    "evaluate": _evaluate,
    "rauc": _rauc,
    "experiment": _experiment,
}
