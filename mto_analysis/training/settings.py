"""How a recipe is run: seed, precision, what is logged, kept and evaluated; what a step and an epoch gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mto_analysis.mto import MTOConfig
from mto_analysis.runtime.settings import field_types, parse_value

if TYPE_CHECKING:
    from mto_analysis.training.evaluation import Evaluation

__all__ = ["EpochRecord", "Precision", "RunSettings", "StepRecord", "mto_config"]

Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class RunSettings:
    """All that a run depends on beside its recipe and its images.

    Args:
        seed: Of weights, order, augmentation, masks and drop path.
        mto: Masked token optimisation, or none.
        precision: Of the forward: ``no`` (float32), ``bf16``, or ``fp16`` with loss scaling.
        accumulation: Micro-batches whose gradients are summed for one optimizer step.
        compile: Compile each transformer block.
        gradient_checkpointing: Compute each block again in the backward pass instead of keeping its activations.
        ema: Decay of a moving average of the model's weights, saved beside them; or none.
        fsdp: Shard weights, gradients and optimizer state over the processes.
        deterministic: Use deterministic kernels on a GPU, so that resume is exact there too; slower.
        num_workers: Processes that decode images.
        in_memory: Hold decoded images in memory; by default where they are small.
        save_every: Epochs between writes of ``last.pth``.
        save_steps: Optimizer steps between further writes of ``last.pth``, for long epochs.
        keep_every: Epochs between kept checkpoints; the last one is always kept.
        log_every: Optimizer steps between rows of ``metrics.csv``; an epoch's last step always has one.
        device: ``auto`` (CUDA, else CPU), ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        evaluation: Protocol, images and epochs between evaluations along the run, or none.
        evaluate_start: Evaluate the random weights too, as epoch 0.
        tensorboard: Also write TensorBoard events to ``tensorboard/``.
        wandb: Project of Weights & Biases to log to as well, or none.
    """

    seed: int = 0
    mto: MTOConfig | None = None
    precision: Precision = "no"
    accumulation: int = 1
    compile: bool = False
    gradient_checkpointing: bool = False
    ema: float | None = None
    fsdp: bool = False
    deterministic: bool = False
    num_workers: int = 0
    in_memory: bool | None = None
    save_every: int = 1
    save_steps: int | None = None
    keep_every: int | None = None
    log_every: int = 20
    device: str = "auto"
    evaluation: Evaluation | None = None
    evaluate_start: bool = False
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision must be no, bf16 or fp16, got {self.precision!r}")
        for name in ("accumulation", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("save_steps", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {self.num_workers}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must lie between 0 and 1, got {self.ema}")
        if self.ema is not None and self.fsdp:
            raise ValueError("ema needs whole weights in every process: leave ema or fsdp out")

    def facts(self) -> dict[str, Any]:
        """The settings as plain values, for ``run.json``."""
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> RunSettings:
        """The settings that a ``run.json`` holds; what it does not name is at its default."""
        from mto_analysis.training.evaluation import Evaluation

        values = {each.name: facts[each.name] for each in fields(cls) if each.name in facts}
        if values.get("mto") is not None:
            stored = dict(values["mto"])
            if stored.get("layers") is not None:
                stored["layers"] = tuple(stored["layers"])
            values["mto"] = MTOConfig(**stored)
        if values.get("evaluation") is not None:
            values["evaluation"] = Evaluation(**values["evaluation"])
        return cls(**values)


def mto_config(options: Mapping[str, str], base: MTOConfig | None = None) -> MTOConfig:
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
    options = dict(options)
    preset = options.pop("preset", None)
    if preset not in (None, "default", "paper"):
        raise ValueError(f"mto.preset must be default or paper, got {preset!r}")
    start = MTOConfig.paper() if preset == "paper" else MTOConfig() if preset or base is None else base
    declared = field_types(MTOConfig)
    for key in options:
        if key not in declared:
            known = ", ".join(f"mto.{name}" for name in ("preset", *declared))
            raise ValueError(f"no setting is called mto.{key}; known are {known}")
    return replace(start, **{key: parse_value(f"mto.{key}", declared[key], text) for key, text in options.items()})


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
