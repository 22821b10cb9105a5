"""Shared fixtures: drawing without a screen, seeded random numbers, tiny models, golden files, small images."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # also for the processes that tests start
# Tests run side by side, one thread each; with more they would wait for each other. Before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import matplotlib as mpl
import numpy as np
import pytest
import torch
from golden_files import Golden, read_golden
from PIL import Image
from rendering import only_name_the_format, render
from tiny_models import make_mae, make_simmim, make_two_stacks

from mto_analysis import save_checkpoint
from mto_analysis.figures.plots import style
from mto_analysis.models import MaskedImageModel

mpl.use("Agg")
# The same examples in every run, and no deadline: a busy machine is no failure.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=30, database=None)
hypothesis.settings.load_profile("suite")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A test file that cannot be imported fails: the option for docstrings of missing extras would only skip it."""
    report = yield
    is_test = isinstance(collector, pytest.File) and collector.path.name.startswith("test_")
    if is_test and report.skipped and "unable to import module" in str(report.longrepr):
        report.outcome = "failed"
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Figures are only drawn, except in tests marked ``rendered``."""
    style.figure_bytes = render if item.get_closest_marker("rendered") else only_name_the_format


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def tiny_mae() -> MaskedImageModel:
    """Decoder-style: 16 px, patches of 4 px."""
    return make_mae()


@pytest.fixture
def tiny_simmim() -> MaskedImageModel:
    """Inpainting-style: 16 px, patches of 4 px."""
    return make_simmim()


@pytest.fixture
def two_stacks() -> MaskedImageModel:
    """A model of two stacks, one of which changes its token grid with depth."""
    return make_two_stacks()


@pytest.fixture(params=["tiny_mae", "tiny_simmim"])
def tiny_model(request: pytest.FixtureRequest) -> MaskedImageModel:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["mae", "simmim_vit", "hf_vitmae"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return read_golden(request.param)


@pytest.fixture
def golden_of() -> Callable[[str], Golden]:
    return read_golden


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints in our own layout, which say everything about themselves."""
    folder = tmp_path_factory.mktemp("checkpoints")
    models = {"mae": make_mae(), "simmim": make_simmim(), "simmim_early": make_simmim(seed=5)}
    paths = {name: folder / f"{name}.safetensors" for name in models}
    for name, model in models.items():
        save_checkpoint(model, paths[name])
    return paths


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Six small images in nested folders."""
    return write_images(tmp_path / "images")


def write_images(folder: Path, names: tuple[str, ...] | None = None) -> Path:
    random = np.random.default_rng(0)
    for name in names or ("b/x.png", "b/y.png", "a/z.jpg", "a/deep/w.png", "c.png", "A.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((30, 24), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the launched processes have it: the last digit depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
