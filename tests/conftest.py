"""Shared fixtures: drawing without a screen, seeded random numbers, tiny models, golden files, small images.

Libraries are imported where they are used: the process that only hands tests to others imports none.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch
    from golden_files import Golden

    from mto_analysis.models import MaskedImageModel

os.environ["MPLBACKEND"] = "Agg"  # also for the processes that tests start
# Tests run side by side, one thread each; with more they would wait for each other. Before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
# Test files are compiled once, and the package once for all processes that tests start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_collection() -> None:
    """Libraries and tests are imported without garbage collection, which would go through them again and again."""
    import hypothesis

    # The same examples in every run, and no deadline: a busy machine is no failure.
    hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=20, database=None)
    hypothesis.settings.load_profile("suite")
    gc.disable()


def pytest_collection_finish() -> None:
    import typer.testing

    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000, 20, 100)  # tests keep little; looking for it took a tenth of their time
    # Typer builds all commands anew at every call; here they are called thousands of times.
    typer.testing._get_command = functools.cache(typer.testing._get_command)


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
    from rendering import only_name_the_format, render

    from mto_analysis.figures.plots import style

    style.figure_bytes = render if item.get_closest_marker("rendered") else only_name_the_format


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def generator() -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(0)


@pytest.fixture
def tiny_mae() -> MaskedImageModel:
    """Decoder-style: 16 px, patches of 4 px."""
    from tiny_models import make_mae

    return make_mae()


@pytest.fixture
def tiny_simmim() -> MaskedImageModel:
    """Inpainting-style: 16 px, patches of 4 px."""
    from tiny_models import make_simmim

    return make_simmim()


@pytest.fixture
def two_stacks() -> MaskedImageModel:
    """A model of two stacks, one of which changes its token grid with depth."""
    from tiny_models import make_two_stacks

    return make_two_stacks()


@pytest.fixture(params=["tiny_mae", "tiny_simmim"])
def tiny_model(request: pytest.FixtureRequest) -> MaskedImageModel:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["mae", "simmim_vit", "hf_vitmae"])
def golden(request: pytest.FixtureRequest) -> Golden:
    from golden_files import read_golden

    return read_golden(request.param)


@pytest.fixture
def golden_of() -> Callable[[str], Golden]:
    from golden_files import read_golden

    return read_golden


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints in our own layout, which say everything about themselves."""
    from tiny_models import make_mae, make_simmim

    from mto_analysis import save_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")
    models = {"mae": make_mae(), "simmim": make_simmim(), "simmim_early": make_simmim(seed=5)}
    paths = {name: folder / f"{name}.safetensors" for name in models}
    for name, model in models.items():
        save_checkpoint(model, paths[name])
    return paths


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Six small images in nested folders."""
    from image_files import write_images

    return write_images(tmp_path / "images")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the launched processes have it: the last digit depends on the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands compare as few head counts on as few images as still tell."""
    from mto_analysis.probe import head_counts, request

    monkeypatch.setattr(head_counts, "_HEAD_SIZES", (16, 64))
    monkeypatch.setattr(head_counts, "_CHOSEN", 8)
    monkeypatch.setattr(head_counts, "_GIVEN", 8)
    monkeypatch.setattr(request, "COMPARED_IMAGES", 32)
