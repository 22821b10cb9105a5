"""What the name of a column says: which metric, of which split, of which weights; or which axis."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

from mto_analysis.rauc.logs.provenance import AxisKind, ScoreKind

_SPLITS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "eval", "evaluation", "dev", "heldout", "holdout"),
    "test": ("test", "testing", "tst"),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
_UNKNOWN_RANK = -1
_AVERAGED = {"ema", "swa", "averaged"}
_BEST = {"best", "max", "maximum", "min", "minimum", "peak", "highest", "lowest"}
_BATCH = {"step", "batch", "running", "iter"}
_ACCURACY = {"acc", "accuracy", "accuracies"}
_RANKED = {"top", "prec"}  # an accuracy only with a rank: top1, prec@1
_ERROR = {"err", "error", "errors"}
_LOSS = {"loss", "losses", "nll", "ce", "xent", "crossentropy", "perplexity", "ppl", "mse", "rmse", "entropy"}
_SCORES = {"miou", "iou", "map", "ap", "f1", "auc", "auroc", "recall", "precision", "kappa", "mcc", "score", "dice"}
#: Words of columns beside a metric: how widely it is spread, how it changed, how long it took.
BESIDE_METRIC = {
    *("std", "stdev", "sd", "sem", "stderr", "var", "variance", "ci", "lower", "upper"),
    *("delta", "diff", "difference", "time", "seconds", "runtime", "duration"),
}
#: Words that do not tell two metrics apart.
_NEUTRAL = {
    "epoch",
    "metric",
    "metrics",
    "perf",
    "avg",
    "rate",
    "percent",
    "pct",
    "multiclass",
    "categorical",
    "sparse",
}

#: Columns whose values say of which split (or weights) a row is.
MODE_COLUMNS = {"mode", "split", "phase", "stage", "subset", "partition", "set", "weights", "ema", "is_ema", "use_ema"}

_AXES: dict[AxisKind, re.Pattern[str]] = {
    "epochs": re.compile("(current_|cur_|trainer_|train_|num_|n_)?epochs?(_num|_number|_id|_idx|_index)?|ep"),
    "steps": re.compile(
        "(global_|trainer_global_|train_global_|train_|num_)?(steps?|iters?|iterations?|updates?)|it|itr"
    ),
    "images": re.compile("(num_|n_|seen_)?(images|samples|examples)(_seen)?"),
    "hours": re.compile("hours?"),
}
_JOINED = re.compile(rf"({'|'.join(_SPLIT_OF)})(acc|accuracy|loss|err|error|top|prec)")


@dataclass(frozen=True)
class Metric:
    """What a name says about a metric.

    Attributes:
        kind: ``accuracy``, ``error``, ``loss``, ``score`` or ``other``.
        rank: k of a top-k accuracy or error, ``None`` where the name has none (then it is top-1), -1 where it is called
            top-k without telling k.
        split: ``train``, ``val``, ``test`` or ``None``.
        weights: ``model`` or ``EMA``.
        best: Whether it is the best value so far, which is no curve of the epochs.
        batch: Whether it is of one batch.
        percent: Whether the name says that it is in percent.
        rest: Further words: two metrics that differ in them are two metrics.
    """

    kind: ScoreKind
    rank: int | None = None
    split: str | None = None
    weights: str = "model"
    best: bool = False
    batch: bool = False
    percent: bool = False
    rest: tuple[str, ...] = ()

    @property
    def is_top1(self) -> bool:
        """Whether it is a top-1 accuracy."""
        return self.kind == "accuracy" and self.rank in (None, 1)

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller value is the better one."""
        return self.kind in ("error", "loss")

    def of(self, split: str | None, weights: str | None = None) -> Metric:
        """The same metric of another split, and other weights."""
        return replace(self, split=split or self.split, weights=weights or self.weights)

    def words(self, column: str) -> str:
        """The metric for an axis label; where the name is no known one, the name itself."""
        if self.kind not in ("accuracy", "error") or self.rest:
            return "score" if self.kind == "score" else column
        return ("" if self.rank is None else f"top-{self.rank if self.rank > 0 else 'k'} ") + self.kind


def words_of(name: str) -> list[str]:
    """Lower-case words and numbers of a name in any spelling.

    Example:
        >>> words_of("perf/testAcc@1"), words_of("val_prec1"), words_of("F1")
        (['perf', 'test', 'acc', '1'], ['val', 'prec', '1'], ['f1'])
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    found: list[str] = []
    for word in re.findall(r"[a-z]+\d*|\d+", spaced.lower()):
        if word in _SCORES:
            found.append(word)
            continue
        letters = word.rstrip("0123456789")
        joined = _JOINED.fullmatch(letters)
        found += [*(joined.groups() if joined else (letters,)), *([word[len(letters) :]] if word != letters else [])]
    return [word for word in found if word]


@cache
def metric_of(name: str) -> Metric:
    """What a column's name says about its metric.

    Example:
        >>> metric_of("ema_test_acc1")
        Metric(kind='accuracy', rank=1, split='test', weights='EMA', best=False, batch=False, percent=False, rest=())
        >>> metric_of("validation/loss").kind, metric_of("metrics/accuracy_top5").rank
        ('loss', 5)
    """
    words = words_of(name)
    kinds: set[str] = set()
    rank: int | None = None
    split, weights, best, batch = None, "model", False, False
    rest: list[str] = []
    after_rank = False
    for at, word in enumerate(words):
        if after_rank and word.isdigit() and rank is None:
            rank = int(word)
            continue
        after_rank = word in _ACCURACY | _RANKED | _ERROR
        following = words[at + 1] if at + 1 < len(words) else ""
        if word == "topk" or (word == "k" and at and words[at - 1] == "top"):
            rank = _UNKNOWN_RANK
            kinds.add("accuracy")
            continue
        if word in _SPLIT_OF and split is None:
            split = _SPLIT_OF[word]
        elif word in _AVERAGED:
            weights = "EMA"
        elif word in _BEST:
            best = True
        elif word in _BATCH:
            batch = True
        elif word in _ACCURACY or (word in _RANKED and (following.isdigit() or set(words) & (_ACCURACY | _ERROR))):
            kinds.add("accuracy")
        elif word in _ERROR:
            kinds.add("error")
        elif word in _LOSS:
            kinds.add("loss")
        elif word in _SCORES and not set(words) & _ACCURACY:
            kinds.add("score" if words == ["score"] else "other")
            rest.append(word)
        elif (word, following) not in (("cross", "entropy"), ("top", "k")) and word not in _NEUTRAL:
            rest.append(word)
    if {"squared", "absolute", "reconstruction"} & set(rest) and "error" in kinds:
        kinds = {"loss"}
    known: tuple[ScoreKind, ...] = ("loss", "error", "accuracy", "score")
    kind: ScoreKind = next((one for one in known if one in kinds), "other")
    if kind in ("accuracy", "error", "loss") and BESIDE_METRIC & set(rest):
        kind = "other"
    percent = "%" in name or bool({"percent", "pct"} & set(words))
    return Metric(kind, rank, split, weights, best, batch, percent, () if kind == "score" else tuple(rest))


def axis_of(name: str) -> AxisKind | None:
    """Which axis a column's name is the name of.

    Example:
        >>> axis_of("Epoch"), axis_of("trainer/global_step"), axis_of("accuracy")
        ('epochs', 'steps', None)
    """
    plain = "_".join(re.findall(r"[a-z]+|\d+", name.strip().lower()))
    return next((kind for kind, names in _AXES.items() if names.fullmatch(plain)), None)


def split_of_run(name: str) -> str | None:
    """The split that the name of a TensorBoard run ends with: Keras and ``add_scalars`` write one run per split.

    Example:
        >>> split_of_run("logs/fit/validation"), split_of_run("accuracy_train"), split_of_run("retrain")
        ('val', 'train', None)
    """
    return _SPLIT_OF.get(re.split(r"[^a-z0-9]", name.lower().rstrip("/"))[-1])


def mode_of(column: str, value: str) -> tuple[str | None, str | None]:
    """Split and weights that a value of a mode column stands for.

    Example:
        >>> mode_of("mode", "val"), mode_of("ema", "True"), mode_of("weights", "model")
        (('val', None), (None, 'EMA'), (None, 'model'))
    """
    words = words_of(value)
    split = next((_SPLIT_OF[word] for word in words if word in _SPLIT_OF), None)
    if set(words) & _AVERAGED or ("ema" in column and value.strip().lower() in ("true", "1", "yes")):
        return split, "EMA"
    if "model" in words or "ema" in column:
        return split, "model"
    return split, None
