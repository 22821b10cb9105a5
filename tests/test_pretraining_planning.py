"""What a run would do: steps, memory and time, without a trace."""

from pathlib import Path

import pytest
import torch
from pretraining_cases import small_recipe, some_images

from mto_analysis.errors import DataError
from mto_analysis.mto import MTOConfig
from mto_analysis.runtime.processes import Processes
from mto_analysis.training import RunSettings, build_method, load_recipe, plan
from mto_analysis.training.planning import _activations
from mto_analysis.training.randomness import noise_batch
from mto_analysis.training.stepping import Stepper

CPU = RunSettings(device="cpu")


def value_of(planned, title):
    return next(value for name, value, _ in planned.rows if name.strip() == title)


def test_plan__counts_steps_and_parameters():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    planned = plan(small_recipe(), some_images(), CPU)
    assert torch.equal(torch.rand(2), expected)
    assert value_of(planned, "steps") == "8 = 2 x 4"
    assert value_of(planned, "effective batch") == "16 = 16 x 1 x 1"
    stepper = Stepper(build_method(small_recipe(), seed=0), CPU, Processes(), 4, 16)
    trained = sum(each.numel() for each in stepper.method.parameters() if each.requires_grad)
    groups = [value for name, value, _ in planned.rows if name.startswith("parameters")]
    assert sum(int(value.split(" in ")[0].replace(",", "")) for value in groups) == trained
    assert planned.bytes_needed > 4 * 4 * trained
    assert planned.seconds > 0


def test_plan__shares_the_batch_out_over_processes_to_come():
    planned = plan(small_recipe(), some_images(), RunSettings(device="cpu", accumulation=2), processes=4)
    assert value_of(planned, "effective batch") == "16 = 2 x 4 x 2"
    with pytest.raises(ValueError, match="effective batch of 16"):
        plan(small_recipe(), some_images(), CPU, processes=3)
    with pytest.raises(DataError, match="do not fill"):
        plan(small_recipe(), some_images(8), CPU)


def test_activations__grow_with_the_batch_and_less_with_checkpointing():
    recipe = small_recipe()

    def kept(count, **settings):
        stepper = Stepper(build_method(recipe, seed=0), RunSettings(device="cpu", **settings), Processes(), 4, 16)
        trained = [each for each in stepper.method.parameters() if each.requires_grad]
        return _activations(stepper, noise_batch(recipe, count, torch.device("cpu")), trained)

    one, two, three = kept(2), kept(4), kept(6)
    assert abs((three - two) - (two - one)) < 0.02 * one
    assert kept(4, gradient_checkpointing=True) < 0.7 * two
    assert kept(4, mto=MTOConfig()) > two


def test_activations__of_a_linear_layer_are_its_input():
    layer = torch.nn.Linear(8, 5, bias=False)

    class One:
        def losses(self, batch):
            return {"sum": layer(batch).sum()}

    assert _activations(One(), torch.randn(3, 8), [layer.weight]) == 3 * 8 * 4


@pytest.mark.slow
def test_memory__is_near_what_a_process_takes():
    """Peak memory of a fresh process, from before the model is made, against the estimate."""
    import subprocess
    import sys

    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")  # ru_maxrss of a child counts what its parent had
    code = (
        "import re, sys, torch\n"
        "from pathlib import Path\n"
        "from mto_analysis.training import RunSettings, load_recipe\n"
        "from mto_analysis.runtime.processes import Processes\n"
        "from mto_analysis.training import build_method\n"
        "from mto_analysis.training.randomness import noise_batch\n"
        "from mto_analysis.training.stepping import Stepper\n"
        "torch.set_num_threads(1)\n"
        "count = int(sys.argv[1])\n"
        "recipe = load_recipe('mae_vit_base').with_options({'model.depth': '3', 'model.decoder_depth': '2'})\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) * 1024\n"
        "before = peak()\n"
        "stepper = Stepper(build_method(recipe, seed=0), RunSettings(device='cpu'), Processes(), 4, count)\n"
        "for _ in range(2): stepper.step(iter([noise_batch(recipe, count, torch.device('cpu'))]), 0)\n"
        "print(peak() - before)\n"
    )

    def peak(count):
        done = subprocess.run([sys.executable, "-c", code, str(count)], capture_output=True, text=True, check=True)
        return int(done.stdout)

    recipe = load_recipe("mae_vit_base").with_options(
        {"model.depth": "3", "model.decoder_depth": "2", "batch_size": "20"}
    )
    planned = plan(recipe, some_images(), CPU)
    assert planned.bytes_needed == pytest.approx(peak(20), rel=0.3)
