"""How a recipe is run: seed, precision, what is logged, kept and evaluated; what a step and an epoch gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from mto_analysis.mto import MTOConfig
from mto_analysis.runtime.settings import Count, Natural, Options, Reader, Rising, Settings, Within
from mto_analysis.training.evaluation.protocols import Evaluation

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class RunSettings(Settings):
    """All that a run depends on beside its recipe and its images.

    Args:
        seed: Of weights, order, augmentation, masks and drop path.
        init: A checkpoint of the recipe's architecture whose weights the run begins with, or none.
        mto: Masked token optimization, or none.
        precision: Autocast precision of the forward pass: ``fp32`` (none), ``bf16``, or ``fp16`` with loss scaling.
        accumulation: Micro-batches whose gradients are summed for one optimizer step.
        compile: Compile each transformer block.
        gradient_checkpointing: Compute each block again in the backward pass instead of keeping its activations.
        ema: Decay of a moving average of the model's weights, saved beside them; or none.
        fsdp: Shard weights, gradients and optimizer state over the processes.
        deterministic: Use deterministic kernels on a GPU, so that resume is exact there too; slower.
        num_workers: Processes that decode images.
        value_range: Values of black and white, of images that are not in eight bits and do not state them.
        verify_data: Hash all training images, not only a sample, so that a resumed run notices any that was replaced.
        in_memory: Hold decoded images in memory; by default where they are small.
        save_every: Epochs between writes of ``last.pth``.
        save_steps: Optimizer steps between further writes of ``last.pth``, for long epochs.
        keep_every: Epochs between kept checkpoints; the last one is always kept.
        log_every: Optimizer steps between rows of ``metrics.csv``; an epoch's last step always has one.
        device: ``auto`` (CUDA, else CPU), ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        evaluation: Protocol, images and epochs between evaluations along the run, or none.
        show_every: Epochs between figures and measures that the caller draws of the model, from epoch 0 on; or none.
        show_measures: Names of these measures with commas between, or ``all``.
        evaluate_start: Evaluate the random weights too, as epoch 0.
        tensorboard: Also write TensorBoard events to ``tensorboard/``.
        wandb: Project of Weights & Biases to log to as well, or none.
    """

    seed: int = 0
    init: str | None = None
    mto: MTOConfig | None = None
    precision: Precision = "fp32"
    accumulation: Count = 1
    compile: bool = False
    gradient_checkpointing: bool = False
    ema: Annotated[float, Within("(0, 1)")] | None = None
    fsdp: bool = False
    deterministic: bool = False
    num_workers: Natural = 0
    verify_data: bool = False
    value_range: Annotated[tuple[float, float], Rising()] | None = None
    in_memory: bool | None = None
    save_every: Count = 1
    save_steps: Count | None = None
    keep_every: Count | None = None
    log_every: Count = 20
    device: str = "auto"
    evaluation: Evaluation | None = None
    show_every: Count | None = None
    show_measures: str = "all"
    evaluate_start: bool = False
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        """Check what belongs together, too."""
        super().__post_init__()
        self._refuse(("ema needs whole weights in every process: leave ema or fsdp out", bool(self.ema and self.fsdp)))

    def metadata(self) -> dict[str, Any]:
        """The settings as plain values, for ``run.json``."""
        return asdict(self)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> RunSettings:
        """The settings that a ``run.json`` holds; what it does not name is at its default."""
        return Reader("run.json", metadata).read(cls)


def mto_config(options: Mapping[str, Any], base: MTOConfig | None = None) -> MTOConfig:
    """Settings of MTO with some changed, as ``--set mto.KEY=value`` gives them.

    Args:
        options: Text by the name of a field; ``preset`` (``default`` or ``paper``) says where to begin.
        base: Where to begin without a preset.

    Raises:
        ValueError: If there is no such setting, or the text is not of its type.

    Example:
        >>> mto_config({"preset": "paper", "ranking_weight": "0"}).eps
        1e-06
    """
    given = Options({f"mto.{name}": value for name, value in options.items()})
    return read_mto(Reader("--set", {}, given, path="mto"), base)


def read_mto(reader: Reader, base: MTOConfig | None = None) -> MTOConfig:
    """Settings of MTO from a table: a preset, and what is changed in it."""
    preset = reader.take("preset", Literal["default", "paper"], None)
    start = MTOConfig.paper() if preset == "paper" else MTOConfig() if preset or base is None else base
    return reader.read(MTOConfig, start)


class StepRecord(NamedTuple):
    """Where a run is; ``loss`` is the last one that was looked at."""

    epoch: int
    step: int
    total_steps: int
    loss: float


@dataclass(frozen=True)
class EpochRecord:
    """What an epoch gave; losses are means over its steps.

    Attributes:
        epoch: Epochs completed.
        step: Optimizer steps completed.
        loss: All terms together.
        terms: Each weighted term by name; ``mto`` where it is on.
        heterogeneity: Mean H over the epoch's logged steps by name: ``heterogeneity_0`` ...
        learning_rate: Of the last step.
        score: Top-1 percent, where the epoch was evaluated.
        top5: Top-5 percent, of classifiers with more than five classes.
        images_per_second: Images that all processes together went through.
        data_wait: Fraction of the time spent waiting for images.
        seconds: Of training so far, evaluations not counted.
    """

    epoch: int
    step: int
    loss: float
    terms: Mapping[str, float] = field(default_factory=dict)
    heterogeneity: Mapping[str, float] = field(default_factory=dict)
    learning_rate: float = 0.0
    score: float | None = None
    top5: float | None = None
    images_per_second: float = 0.0
    data_wait: float = 0.0
    seconds: float = 0.0
