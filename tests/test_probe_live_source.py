"""Models of the user's own code on the command line: a function that makes one, and the file of its weights."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from model_kinds import blocks
from test_cli import ok, run
from torch import nn

from mto_analysis import MaskRule, ModelInfo, image_batches, measure, open_images
from mto_analysis.checkpoints import LoadOptions
from mto_analysis.demo import DEMO_IMAGES
from mto_analysis.errors import CheckpointError
from mto_analysis.images import choose_images
from mto_analysis.models.live import inferred_info
from mto_analysis.probe.live_source import LiveSource
from mto_analysis.probe.request import Request, Settings

MAKE = "test_probe_live_source:make"


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(image_size=32, patch_size=8, num_channels=3)
        self.patch, self.mask_token = nn.Conv2d(3, 12, 8, 8), nn.Parameter(torch.randn(12))
        self.pos_embed, self.blocks = nn.Parameter(torch.randn(1, 16, 12)), blocks()

    def forward(self, images, mask):
        x = torch.where(mask[..., None], self.mask_token, self.patch(images).flatten(2).mT) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x


def make():
    return Tiny()


def make_two():
    both = nn.ModuleList([Tiny(), Tiny()])
    both.config = Tiny().config
    return both


def make_bare():
    bare = nn.Sequential(nn.Linear(2, 2))
    bare.config = Tiny().config
    return bare


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(5)
    model = make().eval()
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "weights.pth")
    return model, tmp_path / "weights.pth"


def test_command__measures_the_model_with_its_weights(weights, tmp_path):
    model, path = weights
    options = ("--model", MAKE, "--weights", path, "--limit", 4, "--seed", 1, "--definitions", "all", "--controls")
    result = ok("heterogeneity", *options, "--control-seeds", 1, "--out", tmp_path / "out")
    assert f"{MAKE}: its module is imported, so its code runs" in result.stderr
    images = open_images(DEMO_IMAGES)
    names = [images.names[row] for row in (0, 64, 128, 192)]
    batches = image_batches(choose_images(images, names), inferred_info(model))
    expected = measure(model, batches, MaskRule("random", 0.6, 8), seed=1).summary()
    table = pd.read_csv(tmp_path / "out" / "heterogeneity.csv")
    assert table["heterogeneity"].tolist() == pytest.approx(expected["heterogeneity"].tolist(), rel=1e-4)
    controls = pd.read_csv(tmp_path / "out" / "controls.csv")
    assert {"random_weights", "random_token", "zero_token"} < set(controls["control"])
    fresh = controls[controls["control"] == "random_weights"]["normalized"].tolist()
    assert fresh != pytest.approx(table["normalized"].tolist())  # its factory has other weights
    (metadata,) = json.loads((tmp_path / "out" / "run.json").read_text())["models"]
    assert (metadata["source"], metadata["config"]["model"]) == (MAKE, "Tiny")
    assert len(metadata["sha256"]) == 64


def test_commands__map_and_report_it(tmp_path):
    ok("affinity", "--model", MAKE, "--limit", 2, "--out", tmp_path / "maps")
    assert set(pd.read_csv(tmp_path / "maps" / "quadrants.csv")["layer_depth"]) == {0, 1, 2}
    ok("report", "--model", MAKE, "--limit", 2, "--show", 1, "--out", tmp_path / "report.html")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "give a checkpoint with --ckpt CKPT, or a model of your own with --model MODULE:FACTORY"),
        (("--model", "nowhere.make"), 2, "a live model is given as package.module:factory, got 'nowhere.make'"),
        (("--model", "nowhere_at_all:make"), 3, "builds no model (ModuleNotFoundError"),
        (("--model", "test_probe_live_source:MAKE"), 3, "builds no model (TypeError"),
        (("--model", "builtins:dict"), 3, "gives a dict, which is no torch.nn.Module"),
        (("--model", "test_probe_live_source:make_bare"), 2, "no known structure with masked tokens"),
        (("--model", "test_probe_live_source:make_two"), 2, "several modules with masked tokens"),
        (("--model", MAKE, "--weights", "model_other"), 3, "model_other"),
        (("--model", MAKE, "--model", MAKE, "--weights", "file.pth"), 2, "with one --model its file"),
        (("--ckpt", "a.pth", "--weights", "file.pth"), 2, "model or model_ema, or with one --model its file"),
    ],
)
def test_command__refuses_in_one_line(options, code, message, tmp_path):
    result = run("heterogeneity", *options, "--limit", 2, "--out", tmp_path / "out")
    assert result.exit_code == code, result.stderr
    assert message in result.stderr.splitlines()[-1]


def test_request__options_of_files_are_refused_and_statistics_are_taken():
    def model_of(**loading):
        return next(
            iter(
                Request(
                    [LiveSource(MAKE)], open_images(DEMO_IMAGES), Settings(), loading=LoadOptions(**loading)
                ).models()
            )
        ).model

    assert model_of(mean=(0.1,) * 3, std=(1.0,) * 3).info.mean == (0.1,) * 3
    with pytest.raises(ValueError, match="is a live model, which has image size of its own; leave image_size out"):
        model_of(image_size=64)
    with pytest.raises(ValueError, match="leave num_heads out"):
        model_of(num_heads=2)


def test_source__weights_of_another_model_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    source = LiveSource(MAKE, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not hold the weights of"):
        source.load(source.open())


def test_info__of_the_model_itself_comes_first():
    model = make()
    assert inferred_info(model).grid == (4, 4)
    model.info = ModelInfo("tiny", "inpainting", (32, 64), 8, MaskRule("block", 0.5, 16))
    assert inferred_info(model).grid == (4, 8)
    with pytest.raises(ValueError, match="says neither the size of its images"):
        inferred_info(nn.Sequential())


class Wrapped(Tiny):
    """All of it in one part, whose name is that of a wrapper."""

    def __init__(self):
        nn.Module.__init__(self)
        self.model, self.config = Tiny(), Tiny().config

    def forward(self, images, mask):
        return self.model(images, mask)


def make_wrapped():
    return Wrapped()


def make_trained():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Tiny()


def test_source__reads_the_file_of_a_model_in_one_part(tmp_path):
    torch.save(Wrapped().state_dict(), tmp_path / "own.pth")
    source = LiveSource("test_probe_live_source:make_wrapped", tmp_path / "own.pth")
    loaded = source.load(source.open()).model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in torch.load(tmp_path / "own.pth").items())


def test_controls__of_a_factory_that_gives_the_same_weights_each_time_are_refused(tmp_path):
    options = ("--model", "test_probe_live_source:make_trained", "--limit", 2, "--controls", "--control-seeds", 1)
    result = run("heterogeneity", *options, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "gives the same weights for every seed, so they are not random" in result.stderr.splitlines()[-1]
