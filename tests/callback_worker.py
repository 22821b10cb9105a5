"""One of two processes that train with a callback: ``callback_worker.py hugging_face|lightning FOLDER``."""

import json
import sys
import warnings
from pathlib import Path

import torch
from test_mto_attach import build
from test_mto_attach_libraries import LIBRARIES
from test_mto_callbacks import InOrder, arguments, rows_of
from test_mto_lightning import Module, batches, trainer_of

from mto_analysis.mto import MTOConfig

CONFIG = MTOConfig(1, 1, 1)


def hugging_face(folder: Path) -> dict[str, float]:
    """Three images of each process in training, four and two in evaluation."""
    from mto_analysis.mto.callbacks import MTOTrainerCallback

    settings = arguments(folder, max_steps=1, eval_strategy="steps", eval_steps=1, ddp_backend="gloo")
    data = {"train_dataset": rows_of(0, 1), "eval_dataset": rows_of(2, 3)}
    trainer = InOrder(build(LIBRARIES["hf vit"]), settings, **data, callbacks=[MTOTrainerCallback(CONFIG)])
    trainer.train()
    return {name: value for entry in trainer.state.log_history for name, value in entry.items()}


def lightning(folder: Path) -> dict[str, float]:
    """A batch of each process in training, and one in validation."""
    from mto_analysis.mto.lightning import MTOLightningCallback

    torch.manual_seed(0)
    rank = int(sys.argv[3])
    loaders = [torch.utils.data.DataLoader(batches(2 * of + rank), batch_size=None) for of in range(2)]
    trainer = trainer_of(
        MTOLightningCallback(CONFIG), devices=2, strategy="ddp", use_distributed_sampler=False, max_steps=1
    )
    trainer.fit(Module(), *loaders)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    import os

    warnings.simplefilter("ignore")
    sys.argv.append(os.environ["RANK"])
    found = {"hugging_face": hugging_face, "lightning": lightning}[sys.argv[1]](Path(sys.argv[2]))
    (Path(sys.argv[2]) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
