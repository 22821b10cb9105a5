"""The formats of logs that are read: what each is told by, what is read of it, and a file that shows it.

The documentation's page *What is read from which log* is made from this table, and each example is read by a test.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A format of logs.

    Attributes:
        name: What output calls it.
        written_by: Programs that write it.
        told_by: What it is recognized by.
        read: What is read of it, if it is not a column chosen by its name.
        first_epoch: The number of the first epoch, if all its writers count alike.
        percent: Pattern of the columns that all its writers write from 0 to 100.
        unmarked: The split of a metric whose name has none, if the format decides.
        test_is_val: Whether ``test`` in a name stands for the validation set.
        ask: Whether a choice between several accuracies is left to the reader.
        example: A file of ``tests/logs``.
    """

    name: str
    written_by: str
    told_by: str
    read: str = ""
    first_epoch: int | None = None
    percent: str = ""
    unmarked: str | None = None
    test_is_val: bool = False
    ask: bool = False
    example: str = ""


#: In the order of the page.
FORMATS = (
    Format(
        "table", "by hand, pandas, any program with a CSV writer",
        "a header with an epoch or step column; commas, semicolons (with decimal commas) or tabs",
        "`method,epoch,score[,seed]`, or the accuracy that the names tell",
        example="rauc_table.csv",
    ),
    Format(
        "mto-analyze curves", "`mto-analyze pretrain`, `evaluate` and `experiment`",
        "columns `method epoch score seed protocol`", "`score`", first_epoch=1, percent="score",
        example="own_curves.csv",
    ),
    Format(
        "MAE JSON lines", "MAE, BEiT, BootMAE, ConMIM, DINO's linear evaluation and their relatives (`log.txt`)",
        "JSON objects in lines, with `test_acc1` and `train_loss`", "`test_acc1`, which is of the validation images",
        first_epoch=0, percent="(ema_)?test_acc[15]", test_is_val=True, example="mae_finetune_log.txt",
    ),
    Format(
        "JSON lines", "any program", "a JSON object in each line", test_is_val=True, example="plain_lines.jsonl",
    ),
    Format(
        "text", "SimMIM, Swin, PyTorch's ImageNet example and its relatives (`log_rank0.txt`, captured consoles)",
        "lines `* Acc@1 ...` or `Test: Acc@1 ...` after `EPOCH 3 training takes`, `Epoch: [3] Total time` or"
        " `Epoch: [3][10/5004]`",
        "the accuracy lines, each with the epoch that was trained last", first_epoch=0, percent=".*@1", unmarked="val",
        example="simmim_finetune.log",
    ),
    Format(
        "timm summary", "timm's `train.py` (`summary.csv`)", "columns `train_loss` and `eval_top1`", "`eval_top1`",
        first_epoch=0, percent="eval_top[15]", example="timm_summary.csv",
    ),
    Format(
        "transformers trainer state", "Hugging Face transformers (`trainer_state.json`)",
        "a JSON document with `log_history`", "entries with an accuracy, such as `eval_accuracy`", first_epoch=1,
        unmarked="train",
        example="hf_trainer_state.json",
    ),
    Format(
        "Lightning metrics", "Lightning's CSVLogger (`metrics.csv`)", "columns `epoch` and `step`, and no method",
        first_epoch=0, example="lightning_metrics.csv",
    ),
    Format(
        "TensorBoard events", "TensorBoard's writers (`events.out.tfevents...`, or their folder)",
        "the first record of the file; needs the package tensorboard",
        "the accuracy's tag; the step counts epochs for tags `perf/test_acc1` as of MAE, else steps",
        first_epoch=0, percent="perf/test_acc[15]", test_is_val=True, example="tensorboard_sample",
    ),
    Format(
        "TensorBoard CSV", "TensorBoard's page (*download CSV*)", "columns `Wall time,Step,Value`",
        "`Value`; which metric it is, is told by the file name `run-...-tag-TAG.csv`",
        example="run-mae-tag-val_acc1.csv",
    ),
    Format(
        "W&B chart", "Weights & Biases (*export CSV* of a chart)",
        "columns `RUN - METRIC` with `__MIN` and `__MAX`, or all but the first of that form",
        "every run; several accuracies are refused until one is named; runs of one name are its seeds",
        ask=True, example="wandb_export.csv",
    ),
    Format(
        "W&B history", "Weights & Biases (`run.history()`)", "columns `_step` and `_runtime` or `_timestamp`",
        example="wandb_history.csv",
    ),
    Format(
        "Keras CSV", "Keras' CSVLogger", "metrics that come twice, with and without `val_`", "the `val_` accuracy",
        first_epoch=0, example="keras_training.csv",
    ),
    Format(
        "Keras history", "Keras' `History.history` as JSON, and other JSON documents of lists",
        "a JSON document of lists of one length", "the `val_` accuracy over the place in the list, counted from 1",
        first_epoch=1, example="keras_history.json",
    ),
    Format(
        "JSON array", "pandas' `to_json`, by hand", "a JSON document that is, or contains, one list of objects",
        test_is_val=True, example="array.json",
    ),
    Format(
        "OpenMMLab JSON lines", "mmengine's `scalars.json`, mmcls 0.x' `.log.json`",
        "keys `accuracy/top1` with `step`, or `mode` with `accuracy_top-1`",
        "validation lines; `step` is epochs or iterations, as the training lines before them show", first_epoch=1,
        percent="accuracy[/_]top.*", unmarked="val", example="mmpretrain_scalars.json",
    ),
    Format(
        "OpenMMLab text", "mmengine's and mmcls 0.x' `.log`", "lines `Epoch(val) [3][...]` or `Iter(val) [...]`",
        "their accuracy", first_epoch=1, percent="accuracy[/_]top.*", unmarked="val",
        example="mmpretrain.log",
    ),
    Format(
        "wide table", "by hand, spreadsheets", "numbers (or `epoch 100`) as column names, or methods as column names",
        "every row, or every column named by `--baseline` and `--target` and its like", example="wide_epochs.csv",
    ),
    Format(
        "ultralytics results", "ultralytics (`results.csv`)", "padded names `metrics/accuracy_top1`",
        "`metrics/accuracy_top1`", unmarked="val", example="ultralytics_results.csv",
    ),
    Format(
        "fastai history", "fastai's CSVLogger (`history.csv`)", "columns `epoch,train_loss,valid_loss` and `time`",
        "`accuracy`, which fastai measures on the validation set", first_epoch=0, unmarked="val",
        example="fastai_history.csv",
    ),
    Format(
        "MLflow metric", "MLflow (`mlruns/*/*/metrics/NAME`)", "lines of time in ms, value, step",
        "the value over the step; the metric is the file's name", example="mlflow/val_acc1",
    ),
)  # fmt: skip

BY_NAME = {one.name: one for one in FORMATS}
