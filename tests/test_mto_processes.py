"""The callbacks in two processes: one step is that of both batches, and what is logged is of all images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from callback_worker import CONFIG
from test_launchers import free_port
from test_mto_attach import build
from test_mto_attach_libraries import LIBRARIES
from test_mto_lightning import Module, batches
from training_models import draw_mask, make_images

from mto_analysis import measure
from mto_analysis.mto import attach_mto

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parent


def logged_by_both(kind, folder):
    """What two processes have logged."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    worker = ["--master-port", str(free_port()), str(FOLDER / "callback_worker.py"), kind, str(folder)]
    path = os.pathsep.join([str(FOLDER.parent), str(FOLDER), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*launcher, *worker], capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def hugging_face():
    def data(seed):
        return make_images(seed), draw_mask(seed)

    return build(LIBRARIES["hf vit"]), data, lambda model, seed: model(*data(seed)).loss, "eval_"


def lightning():
    torch.manual_seed(0)
    return (
        Module().net,
        lambda seed: batches(seed)[0],
        lambda model, seed: model(*batches(seed)[0]).square().mean(),
        "val_",
    )


@pytest.mark.parametrize("kind", [hugging_face, lightning], ids=lambda kind: kind.__name__)
def test_processes__train_as_one_and_log_of_all_images(kind, tmp_path):
    model, data, own_loss, prefix = kind()
    mto, optimizer = attach_mto(model.train(), CONFIG), torch.optim.SGD(model.parameters(), lr=0.1)
    terms = []
    for seed in range(2):  # one of each process
        ((own_loss(model, seed) + mto.loss()) / 2).backward()
        terms.append(mto.terms)
    optimizer.step()
    images, masks = (torch.cat(each) for each in zip(*(data(seed) for seed in (2, 3)), strict=True))
    heterogeneity = measure(model, images, masks).summary()["heterogeneity"].tolist()
    for logged in logged_by_both(kind.__name__, tmp_path):
        for name in ("loss", "sparsity", "heterogeneity_0", "heterogeneity_3"):
            assert logged[f"mto/{name}"] == pytest.approx(sum(each[name] for each in terms) / 2, rel=1e-4)
        found = [logged[f"{prefix}heterogeneity_{depth}"] for depth in range(4)]
        assert found == pytest.approx(heterogeneity, rel=1e-3)
