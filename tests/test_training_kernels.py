"""The kernels of a CUDA device, in Triton's interpreter beside the plain path; and what happens where they fail."""

import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mto_analysis.training import MTOConfig, fused, mto_loss

CASES = Path(__file__).with_name("kernel_cases.py")


@pytest.fixture(scope="module")
def found():
    """Differences that a process of its own measured: the interpreter must be chosen before Triton is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    done = subprocess.run([sys.executable, CASES], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "do not run here" not in done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mask", ["equal", "ragged", "many", "extreme"])
def test_kernels__entropies_of_float32_equal_those_of_float64(found, mask):
    cases = {name: case for name, case in found.items() if name.startswith(f"{mask} float32")}
    assert cases
    for name, case in cases.items():
        assert case["values"] < 1e-6, name
        assert case["gradient"] < 2e-6, name
        assert case["prefix"] == 0, name


@pytest.mark.parametrize("mask", ["equal", "ragged", "many", "extreme"])
def test_kernels__entropies_of_float16_are_rounded_once(found, mask):
    cases = {name: case for name, case in found.items() if name.startswith(f"{mask} float16")}
    assert cases
    for name, case in cases.items():
        assert case["values"] < 1e-6, name  # products are exact
        assert case["gradient"] < 2**-11, name  # half a unit of the last place
        assert case["prefix"] == 0, name


def test_kernels__sort_masks_as_the_plain_path(found):
    assert found["sorted"] == dict.fromkeys(("equal", "ragged", "many", "extreme"), 1.0)


def test_kernels__terms_and_gradients_of_all_losses_equal_those_of_float64(found):
    cases = {name: case for name, case in found.items() if name.startswith("losses")}
    assert {name for name, case in cases.items() if not case["used"]} == {"losses no ranking", "losses some layers"}
    for name, case in cases.items():
        assert case["values"] < 1e-6, name
        assert case["gradient"] < 2e-6, name


def test_kernels__find_masks_as_the_plain_path(found):
    cases = {name: case for name, case in found.items() if name.startswith("masks")}
    assert len(cases) == 6
    for name, case in cases.items():
        assert case["same"], name
        assert case["masked"] > 100, name


@pytest.mark.parametrize("name", ["mae", "simmim swin", "conmim", "bootmae"])
def test_kernels__attached_loss_and_gradients_equal_the_plain_path(found, name):
    assert found[f"attached {name}"]["values"] < 1e-5
    assert found[f"attached {name}"]["gradient"] < 1e-5


LAYERS, MASK = torch.randn(3, 2, 6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) < 3


def losses():
    layers = [layer.clone().requires_grad_() for layer in LAYERS]
    terms = mto_loss(layers, MASK.expand(2, 6), MTOConfig.paper())
    terms.loss.backward()
    return [terms.loss.detach(), *(layer.grad for layer in layers)]


def failing(*names):
    """Kernels of which some do not compile, and the others do what the plain path does."""

    def fail(*_):
        raise RuntimeError("no such instruction\nand more")

    def entropies(tokens, split, include_self):
        with fused.plain_path():
            from mto_analysis.training.entropies import masked_visible_entropy, visible_rows_entropy

            if include_self is None:
                return masked_visible_entropy(tokens, split), None, []
            return *visible_rows_entropy(tokens, split, include_self=include_self), []

    def sort(mask):
        return (~mask).to(torch.uint8).argsort(dim=1, stable=True), mask.sum(dim=1)

    def terms(h, spread, num_masked, num_patches, config, factor):
        ranking = torch.nn.functional.softplus(h[1:] - h[:-1]).sum(dim=0).mean()
        embedding = (1 / (h[0] + config.eps)).mean()
        return spread.mean() + embedding + ranking, spread.mean(), embedding, ranking

    kernels = {"sort_masks": sort, "forward_entropies": entropies, "forward_terms": terms}
    kernels |= dict.fromkeys(("backward_entropies", "backward_terms"), fail)
    return SimpleNamespace(**(kernels | dict.fromkeys(names, fail)))


@pytest.mark.parametrize("names", [("sort_masks",), ("forward_entropies",), ("forward_terms",), ()])
def test_kernels__that_fail_are_replaced_by_the_plain_path_with_one_warning(monkeypatch, names):
    expected = losses()
    kernels = failing(*names)
    monkeypatch.setattr(fused, "_INTERPRETED", True)
    monkeypatch.setattr(fused, "_load", lambda device, name: kernels)
    monkeypatch.setitem(fused._switch, "on", True)
    monkeypatch.setitem(fused._switch, "failed", False)
    with pytest.warns(RuntimeWarning, match=r"do not run here.*RuntimeError: no such instruction\)") as caught:
        found = losses()
    assert len(caught) == 1
    torch.testing.assert_close(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(losses(), expected)  # and are not tried again


def test_kernels__memory_that_ran_out_is_no_failure_of_theirs():
    def work():
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        fused.attempt(work)
    assert not fused._switch["failed"]


class Compiling:
    """In place of a kernel: notes launches, and whether they went by Triton's own way."""

    packed_metadata = None

    def __init__(self, refuses=False):
        self.launches, self.direct, self.refuses = [], False, refuses

    def __getitem__(self, grid):
        def start(*arguments, **options):
            if self.direct and self.refuses:
                raise TypeError("function takes exactly 9 arguments")
            self.launches.append(("direct" if self.direct else "compiling", grid, len(arguments), options))
            if not self.direct:
                compiled = Compiling(self.refuses)
                compiled.launches, compiled.direct = self.launches, True
                return compiled

        return start


@pytest.mark.parametrize("refuses", [False, True])
def test_launch__looks_at_arguments_once_for_each_kind(refuses):
    kernels = pytest.importorskip("mto_analysis.training.kernels")
    kernel, x = Compiling(refuses), torch.zeros(64)
    for tensor, number in ((x, 3), (torch.ones(64), 3), (x[1:], 3), (x, 4), (x.half(), 3)):
        kernels._launch(kernel, (2, 1, 1), (tensor, number), (True,), num_warps=4)
    ways = [way for way, *_ in kernel.launches]
    # The same kind in other memory; then another alignment, number and dtype.
    assert ways == ["compiling", "compiling" if refuses else "direct", *["compiling"] * 3]
    assert {grid for _, grid, *_ in kernel.launches} == {(2, 1, 1)}
    assert {count for *_, count, _ in kernel.launches} == {3}
    kernels._compiled.clear()
