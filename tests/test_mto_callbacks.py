"""The losses in Hugging Face's Trainer by a callback, where it is installed."""

import copy

import pytest
import torch
from test_mto_attach import CONFIG, build
from test_mto_attach_libraries import LIBRARIES, installed
from training_models import BATCH, draw_mask, make_images

from mto_analysis import measure
from mto_analysis.errors import StackError
from mto_analysis.mto import MTOConfig, attach_mto

hf = installed("transformers")
pytest.importorskip("accelerate", reason="the Trainer needs it")
from mto_analysis.mto.callbacks import MTOTrainerCallback  # noqa: E402 - it needs transformers


def rows_of(*seeds):
    return [
        {"pixel_values": image, "bool_masked_pos": mask}
        for seed in seeds
        for image, mask in zip(make_images(seed), draw_mask(seed), strict=True)
    ]


def arguments(folder, **more):
    settings = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "use_cpu": True}
    batches = {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH, "logging_steps": 1}
    plain = {"learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0}
    return hf.TrainingArguments(folder, **settings, **batches, **plain, **more)


class InOrder(hf.Trainer):
    def _get_train_sampler(self, *_):
        return None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer__steps_equal_a_loop_with_the_losses(accumulate, tmp_path):
    model = build(LIBRARIES["hf vit"])
    twin = copy.deepcopy(model)
    callback = MTOTrainerCallback(MTOConfig(1, 1, 1, warmup_steps=4))
    settings = arguments(tmp_path, max_steps=2, gradient_accumulation_steps=accumulate)
    trainer = InOrder(model, settings, train_dataset=rows_of(*range(2 * accumulate)), callbacks=[callback])
    trainer.train()

    mto, optimizer = attach_mto(twin, callback.config), torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        for micro in range(accumulate):
            mto.step = step
            seed = step * accumulate + micro
            own = twin(make_images(seed), bool_masked_pos=draw_mask(seed)).loss
            ((own + mto.loss()) / accumulate).backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert {"mto/loss", "mto/sparsity", "mto/heterogeneity_0", "mto/heterogeneity_3"} < set(logged[-1])
    assert not any(module._forward_hooks for module in model.modules())  # left as it was


def test_trainer__losses_of_an_interrupted_run_are_not_added_again(tmp_path):
    class Interrupts(hf.TrainerCallback):
        def on_step_end(self, *_, **more):
            raise KeyboardInterrupt

    model = build(LIBRARIES["hf vit"])
    run = lambda *callbacks: InOrder(  # noqa: E731
        model, arguments(tmp_path, max_steps=1), train_dataset=rows_of(0), callbacks=[*callbacks]
    ).train()
    with pytest.raises(KeyboardInterrupt):
        run(first := MTOTrainerCallback(MTOConfig()), Interrupts())
    assert first.mto.terms
    with pytest.warns(UserWarning, match="an earlier run that was interrupted"):
        run(MTOTrainerCallback(MTOConfig()))
    assert not any(module._forward_hooks for module in model.modules())


def test_trainer__logs_h_of_evaluation(tmp_path):
    model = build(LIBRARIES["hf vit"])
    settings = arguments(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1)
    trainer = InOrder(
        model, settings, train_dataset=rows_of(0), eval_dataset=rows_of(1, 2), callbacks=[MTOTrainerCallback()]
    )
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
    masks = torch.cat([draw_mask(1), draw_mask(2)])
    expected = measure(model, torch.cat([make_images(1), make_images(2)]), masks).summary()["heterogeneity"]
    found = [entry[f"eval_heterogeneity_{depth}"] for depth in range(4)]
    assert found == pytest.approx(expected.tolist(), rel=1e-4)


def test_trainer__a_loss_that_is_not_used_is_said(tmp_path):
    def other_loss(outputs, labels, num_items_in_batch=None):
        return outputs["reconstruction"].square().mean()

    trainer = InOrder(
        build(LIBRARIES["hf vit"]),
        arguments(tmp_path, max_steps=1),
        train_dataset=rows_of(0),
        callbacks=[MTOTrainerCallback(CONFIG)],
        compute_loss_func=other_loss,
    )
    with pytest.raises(StackError, match="does not use the loss of the model's output"):
        trainer.train()


def test_trainer__a_failed_check_ends_the_run_after_its_step(tmp_path):
    model = build(LIBRARIES["hf vit"])
    model.vit.layers[0].register_forward_pre_hook(lambda m, args: (args[0] + 0.1, *args[1:]))
    trainer = InOrder(
        model, arguments(tmp_path, max_steps=1), train_dataset=rows_of(0), callbacks=[MTOTrainerCallback(CONFIG)]
    )
    with pytest.raises(StackError, match="none of its tokens"):
        trainer.train()


def test_trainer__that_never_sees_masked_tokens_is_refused(tmp_path):
    rows = [{**row, "bool_masked_pos": torch.zeros_like(row["bool_masked_pos"])} for row in rows_of(0)]
    trainer = InOrder(
        build(LIBRARIES["hf vit"]),
        arguments(tmp_path, max_steps=1),
        train_dataset=rows,
        callbacks=[MTOTrainerCallback(CONFIG)],
    )
    with pytest.raises(StackError, match=r"no forward with masked tokens .*nn.DataParallel runs copies"):
        trainer.train()
