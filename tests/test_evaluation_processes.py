"""Two gloo processes score as one does, and train the classifier that one would with the same batch."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from labelled_images import write_parquet
from tiny_models import make_mae

from mto_analysis.training import RunSettings
from mto_analysis.training.evaluation import Evaluation, Evaluator
from mto_analysis.training.evaluation.classifier_settings import ClassifierSettings
from mto_analysis.training.evaluation.classifier_training import train_classifier
from mto_analysis.training.evaluation.features import LabelledImages

if not torch.distributed.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)

SETTINGS = ClassifierSettings(
    "finetune", pooling="patches", epochs=2, batch_size=8, base_lr=0.05, layer_decay=0.7, erasing=0.5
)


def measure(folder: Path, name: str) -> tuple[list[float], list[float]]:
    sources = [str(folder / f"{part}.parquet") for part in ("train", "test")]
    shared = torch.distributed.is_initialized()
    scores = [
        Evaluator(Evaluation(protocol, *sources, neighbours=3, batch_size=5)).score(make_mae(), shared=shared)  # type: ignore[arg-type]
        for protocol in ("knn", "linear")
    ]
    images = [LabelledImages(source) for source in sources]
    run = RunSettings(device="cpu")
    epochs = train_classifier(make_mae(), images[0], images[1], SETTINGS, folder / name, run, micro_batch=4)
    return scores, [record.loss for record in epochs]


def work(rank: int, folder: Path, answers: Any) -> None:
    torch.set_num_threads(1)
    # As a launcher does; the address is not used, as the processes have met already.
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    answers.put((rank, measure(folder, "two")))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_evaluation__is_the_same_on_two_processes(tmp_path: Path) -> None:
    for part, seed in (("train", 0), ("test", 1)):
        write_parquet(tmp_path / f"{part}.parquet", 26, seed=seed, shuffled=True)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    workers = [context.Process(target=work, args=(rank, tmp_path, answers)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = dict(answers.get(timeout=180) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    scores, losses = measure(tmp_path, "one")
    assert found[0][0] == found[1][0] == scores
    assert found[0][1] == found[1][1] == pytest.approx(losses, rel=1e-4)
