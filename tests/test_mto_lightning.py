"""The losses in Lightning's Trainer by a callback, where it is installed."""

import copy

import pytest
import torch
from model_kinds import Inpainting, features, random_mask
from test_mto_attach_libraries import installed

from mto_analysis import measure
from mto_analysis.errors import StackError
from mto_analysis.mto import MTOConfig, attach_mto

pl = installed("pytorch_lightning")
from mto_analysis.mto.lightning import Callback, MTOLightningCallback  # noqa: E402 - it needs Lightning

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, of few workers and of its dependencies


class Module(pl.LightningModule):
    def __init__(self, result="loss"):
        super().__init__()
        self.net, self.result = Inpainting(cls=1), result

    def training_step(self, batch, index):
        loss = self.net(*batch).square().mean()
        return {"loss": {"loss": loss}, "tensor": loss, "nothing": None}[self.result]

    def validation_step(self, batch, index):
        self.net(*batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Seen(Callback):
    def __init__(self):
        self.metrics = {}

    def on_train_batch_end(self, trainer, *_):
        self.metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}


def batches(*seeds):
    return [(features(3, seed), random_mask(3, (5, 9), seed=seed)) for seed in seeds]


def loader(*seeds):
    return torch.utils.data.DataLoader(batches(*seeds), batch_size=None)


def trainer_of(*callbacks, **more):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    settings = {"accelerator": "cpu", "log_every_n_steps": 1, "max_epochs": 1, "num_sanity_val_steps": 0}
    return pl.Trainer(callbacks=list(callbacks), **quiet, **settings | more)


@pytest.mark.parametrize("result", ["loss", "tensor"])
def test_lightning__steps_equal_a_loop_with_the_losses(result):
    if not issubclass(MTOLightningCallback, pl.Callback):
        pytest.skip("two Lightnings are installed")
    torch.manual_seed(0)
    module, seen = Module(result), Seen()
    twin, config = copy.deepcopy(module.net), MTOConfig(1, 1, 1, warmup_steps=4)
    trainer_of(MTOLightningCallback(config), seen).fit(module, loader(0, 1), loader(2, 3))
    mto, optimizer = attach_mto(twin.train(), config), torch.optim.SGD(twin.parameters(), lr=0.1)
    for batch in batches(0, 1):
        optimizer.zero_grad()
        (twin(*batch).square().mean() + mto.loss()).backward()
        optimizer.step()
    for ours, theirs in zip(module.net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert seen.metrics["mto/loss"] == pytest.approx(mto.terms["loss"], rel=1e-4)
    assert "training_step" not in vars(module)
    assert not any(part._forward_hooks for part in module.modules())


def test_lightning__logs_h_of_validation():
    module, callback = Module(), MTOLightningCallback()
    trainer = trainer_of(callback)
    trainer.fit(module, loader(0), loader(2, 3))
    images, masks = (torch.cat(each) for each in zip(*batches(2, 3), strict=True))
    expected = measure(module.net, images, masks).summary()["heterogeneity"].tolist()
    found = [float(trainer.callback_metrics[f"val_heterogeneity_{depth}"]) for depth in range(4)]
    assert found == pytest.approx(expected, rel=1e-4)


def test_lightning__a_step_without_a_loss_is_refused():
    module = Module("nothing")
    with pytest.raises(StackError, match="has no loss to add to"):
        trainer_of(MTOLightningCallback(MTOConfig())).fit(module, loader(0))
    assert "training_step" not in vars(module)  # left as it was, so that another run adds the losses once
    assert not any(part._forward_hooks for part in module.modules())


def test_lightning__that_never_sees_masked_tokens_is_refused():
    unmasked = [(images, torch.zeros_like(mask)) for images, mask in batches(0, 1)]
    trainer = trainer_of(MTOLightningCallback(MTOConfig()))
    with pytest.raises(StackError, match="no forward with masked tokens"):
        trainer.fit(Module(), torch.utils.data.DataLoader(unmasked, batch_size=None))
