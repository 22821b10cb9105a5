"""Pre-training of a masked image model by a recipe: its objective, images and scores, handed to the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from mto_analysis.images import BrokenImage, Images, TrainingData
from mto_analysis.models import MaskedImageModel
from mto_analysis.training.initial import InitialWeights
from mto_analysis.training.loop import open_processes, train
from mto_analysis.training.methods import Method, build_method
from mto_analysis.training.recipes import Recipe
from mto_analysis.training.scoring import EvaluationScorer
from mto_analysis.training.settings import EpochRecord, RunSettings, StepRecord
from mto_analysis.training.showing import Show
from mto_analysis.training.state import RunFolder, run_identity


def pretrain(
    recipe: Recipe,
    images: Images,
    folder: str | Path,
    settings: RunSettings | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    evaluate: Callable[[MaskedImageModel], float] | None = None,
    on_begin: Callable[[], None] | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    on_broken: Callable[[BrokenImage], None] | None = None,
    show: Show | None = None,
    strict: bool = False,
    source: str | None = None,
) -> Iterator[EpochRecord]:
    """Pre-train a model, and yield a record after each epoch, when all of that epoch is on disk.

    The run is a function of recipe, images, seed and settings: it does not depend on workers, nor on where it was
    stopped and resumed. With several processes (torchrun, accelerate launch) all call this, and the first one writes.

    Args:
        recipe: What is trained, and how.
        images: From :func:`mto_analysis.open_images`.
        folder: For ``run.json``, ``metrics.csv``, ``curves.csv``, ``measures.csv``, ``last.pth`` and kept checkpoints.
        settings: How it is run.
        resume: Go on from ``last.pth``, or begin where there is nothing yet.
        overwrite: Replace the run that the folder holds.
        evaluate: Gives the model's score; by default what ``settings.evaluation`` says.
        on_begin: Called before the first step, when all that can fail at once has not.
        on_step: Called after each step, for a progress bar.
        on_note: Called with what a user should know, one line at a time.
        on_broken: Called for each image that cannot be decoded; another takes its place.
        show: Draws and measures the model every ``settings.show_every`` epochs: its figures go to ``shown/`` in the
            folder, to TensorBoard and to W&B, its rows to ``measures.csv``.
        strict: Make a broken image an error.
        source: Where the images are, for ``run.json``.

    Raises:
        OutputExistsError: If the folder holds a run and neither ``resume`` nor ``overwrite`` is given.
        CheckpointError: If the run to resume is another one, its checkpoint is damaged, or weights to begin with do not
            fit the recipe.
        DataError: If images are too few, broken or gone.
        NumericalError: If a loss is not finite; ``last.pth`` is from before.
        ValueError: If the batch cannot be shared out, or a setting does not fit the machine.
    """
    settings = settings or RunSettings()
    processes = open_processes(settings)
    data = TrainingData(
        images,
        recipe.augmentation(),
        recipe.mask_rule,
        recipe.patch_size,
        seed=settings.seed,
        num_workers=settings.num_workers,
        device=processes.device,
        on_broken=on_broken,
        in_memory=settings.in_memory,
        strict=strict,
    )

    def build(begins: bool) -> Method:
        start = InitialWeights(settings.init) if begins and settings.init is not None else None
        method = build_method(recipe, seed=settings.seed, start=start)
        if start is not None and on_note is not None and processes.main:
            for line in start.notes:
                on_note(line)
        return method

    own = {"recipe": recipe.to_dict(), "evaluation": settings.evaluation.settings() if settings.evaluation else None}
    yield from train(
        build,
        recipe,
        data,
        lambda: EvaluationScorer(settings, processes, evaluate),
        RunFolder(folder),
        settings,
        processes,
        identity=run_identity(settings, images, **own),
        resume=resume,
        overwrite=overwrite,
        on_begin=on_begin,
        on_step=on_step,
        on_note=on_note,
        show=show,
        source=source,
    )
