"""Processes that meet: parts put together are what one process measures, trains and scores; all fail together."""

from __future__ import annotations

import copy
import multiprocessing
import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from image_files import write_images
from labelled_images import write_parquet
from test_mto_attach import CONFIG, build
from tiny_models import make_mae
from torch.nn.parallel import DistributedDataParallel
from training_models import CASES
from typer.testing import CliRunner

from mto_analysis import load_checkpoint, open_images
from mto_analysis.errors import DataError
from mto_analysis.mto import attach_mto
from mto_analysis.probe.definition_study import Definitions
from mto_analysis.probe.properties import Properties
from mto_analysis.probe.quadrants import AffinityMaps
from mto_analysis.probe.request import Request, Settings
from mto_analysis.probe.sharing import Shared
from mto_analysis.probe.study import measure_checkpoints, together
from mto_analysis.runtime.processes import Processes, failing_together, this_process
from mto_analysis.training import RunSettings
from mto_analysis.training.evaluation import Evaluation, Evaluator
from mto_analysis.training.evaluation.classifier_settings import ClassifierSettings
from mto_analysis.training.evaluation.classifier_training import train_classifier
from mto_analysis.training.evaluation.features import LabelledImages
from mto_analyze import app

if not torch.distributed.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)

NAMES = tuple(f"{number:02d}.png" for number in range(11))
#: Warnings of torch's own, of a single process and of gloo.
NOISY = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Unheard(Exception):
    """Another process has not come to this point yet."""


class Recorded(Processes):
    """A process that hears, instead of the others, what they said when they ran before."""

    def __init__(self, rank: int, count: int, said: list[list[Any]]) -> None:
        super().__init__(rank, count)
        object.__setattr__(self, "said", said)
        object.__setattr__(self, "turn", iter(range(99)))

    def exchange(self, value):
        turn = next(self.turn)
        while len(self.said) <= turn:
            self.said.append([None] * self.count)
        self.said[turn][self.rank] = value
        if None in self.said[turn]:
            raise Unheard
        return list(self.said[turn])


def measured(sources, images, settings: Settings, processes: Processes | None = None):
    watched, seen, maps = Definitions(), Properties(), AffinityMaps()
    watch = together(watched.watch, seen.watch, lambda model, label: nullcontext((maps,)))
    study = measure_checkpoints(Request(sources, images, settings, processes=processes or Processes()), watch=watch)
    return study, watched.table(study), watched.attention_table(), seen.table(), maps.maps


def test_parts__put_together_are_what_one_process_measures(checkpoints, tmp_path: Path) -> None:
    images = open_images(write_images(tmp_path / "images", NAMES))
    settings = Settings(batch_size=2, masks_per_image=2, keep_masks=True)
    one = measured([checkpoints["mae"]], images, settings)
    said: list[list[Any]] = []
    for rank in range(3):  # the others have not said everything yet
        with suppress(Unheard):
            measured([checkpoints["mae"]], images, settings, Recorded(rank, 3, said))
    for rank in range(3):
        with suppress(Unheard):
            measured([checkpoints["mae"]], images, settings, Recorded(rank, 3, said))
    parts = [measured([checkpoints["mae"]], images, settings, Recorded(rank, 3, said)) for rank in range(3)]
    for study, definitions, attention, properties, maps in parts:
        pd.testing.assert_frame_equal(study.table, one[0].table, check_exact=True)
        pd.testing.assert_frame_equal(study.per_image, one[0].per_image, check_exact=True)
        pd.testing.assert_frame_equal(definitions, one[1], check_exact=True)
        pd.testing.assert_frame_equal(attention, one[2], rtol=1e-12, atol=1e-15)
        pd.testing.assert_frame_equal(properties, one[3], check_exact=True)
        assert study.mask_file("mae") == one[0].mask_file("mae")
        for mine, other in zip(maps, one[4], strict=True):
            assert mine[:6] == other[:6]
            torch.testing.assert_close(mine.values, other.values)


def test_share__is_whole_units_in_a_row() -> None:
    for total in (0, 1, 7, 64):
        for count in (1, 2, 3, 5):
            parts = [list(Processes(rank, count).share(range(total), unit=4)) for rank in range(count)]
            assert [item for part in parts for item in part] == list(range(total))
            assert all(not part or part[0] % 4 == 0 for part in parts)


def test_layer_measures__that_keep_something_can_be_put_together(checkpoints) -> None:
    model = load_checkpoint(checkpoints["mae"])
    with together(Definitions().watch, Properties().watch)(model, "mae") as measures:
        found = [type(each).__name__ for each in measures if isinstance(each, Shared)]
    assert found == ["Attention", "PropertyMeasure"]
    assert isinstance(AffinityMaps(), Shared)


def test_this_process__reads_what_launchers_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert this_process() == Processes()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    assert this_process() == Processes(3, 4, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert this_process() == Processes(1, 2, 0)
    with pytest.raises(ValueError, match="rank must be from 0 to 1"):
        Processes(2, 2)


def test_launcher__is_refused_by_commands_that_share_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, whose in (("0", ""), ("1", "process 1 of 2: ")):  # without a store each speaks for itself
        monkeypatch.setenv("RANK", rank)
        result = CliRunner().invoke(app, ["tables", "--out", str(tmp_path / "out")], catch_exceptions=False)
        assert result.stderr.startswith(f"mto-analyze: error: {whose}tables cannot share its work between 2 processes")
        assert len(result.stderr.splitlines()) == 1


def be_one_of_two(rank: int, port: int) -> None:
    """As a launcher says it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}


def on_two(work: Callable[..., None], *arguments: Any) -> list[Any]:
    """What two processes answer, one thing each."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun hosts it
    workers = [context.Process(target=work, args=(rank, store.port, *arguments, answers)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=1800) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    return found


def fail(rank: int, port: int, who: int, call: str, answers: Any) -> None:
    be_one_of_two(rank, port)
    told: list[str] = []
    try:
        with failing_together(lambda error: (str(error), 4) if isinstance(error, DataError) else None, told.append):
            here = this_process()
            assert here.exchange(rank) == [0, 1]
            if rank == who:
                raise DataError("no such image")
            if call == "exchange":
                here.exchange(rank)
            else:
                here.sum(torch.ones(2))
    except Exception as error:
        answers.put((rank, (type(error).__name__, str(error), getattr(error, "exit_code", None), told)))
    answers.close()
    answers.join_thread()
    os._exit(0)  # as the command does: connections close, nothing is torn down


@pytest.mark.slow
@pytest.mark.parametrize("call", ["exchange", "sum"])
@pytest.mark.parametrize("who", [0, 1])
def test_failing_together__all_end_with_the_reason_of_the_first(who: int, call: str) -> None:
    found = dict(on_two(fail, who, call))
    reason = f"process {who} of 2: no such image"
    assert found[who] == ("DataError", "no such image", 4, ["no such image" if who == 0 else reason])
    assert found[1 - who] == ("OtherProcessError", reason, 4, [])


CLASSIFIER = ClassifierSettings(
    protocol="finetune", pooling="patches", epochs=2, batch_size=8, base_lr=0.05, layer_decay=0.7, erasing=0.5
)


def measure(folder: Path, name: str) -> tuple[list[float], list[float]]:
    sources = [str(folder / f"{part}.parquet") for part in ("train", "test")]
    processes = this_process()
    scores = [
        Evaluator(Evaluation(protocol, *sources, neighbours=3, batch_size=5)).score(make_mae(), processes=processes)
        for protocol in ("knn", "linear")
    ]
    images = [LabelledImages(source) for source in sources]
    run = RunSettings(device="cpu", accumulation=2 // processes.count)
    epochs = train_classifier(make_mae(), images[0], images[1], CLASSIFIER, folder / name, run)
    return scores, [record.loss for record in epochs]


def evaluate(rank: int, port: int, folder: Path, answers: Any) -> None:
    torch.set_num_threads(1)
    be_one_of_two(rank, port)
    with failing_together():
        answers.put((rank, measure(folder, "two")))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_evaluation__is_the_same_on_two_processes(tmp_path: Path) -> None:
    for part, seed in (("train", 0), ("test", 1)):
        write_parquet(tmp_path / f"{part}.parquet", 26, seed=seed, shuffled=True)
    found = dict(on_two(evaluate, tmp_path))
    scores, losses = measure(tmp_path, "one")
    assert found[0][0] == found[1][0] == scores
    assert found[0][1] == found[1][1] == pytest.approx(losses, rel=1e-4)


def gradients(rank, port, answers):
    from test_mto_attach import CONFIG, build
    from training_models import CASES

    from mto_analysis.mto import attach_mto

    torch.set_num_threads(1)
    be_one_of_two(rank, port)
    this_process().connect()
    case = CASES["mae"]
    model = build(case)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    mto = attach_mto(wrapped, CONFIG)
    found = []
    for step in range(2):
        loss, _ = case.run(wrapped, 10 * step + rank)  # each rank has its own images
        wrapped.zero_grad()
        (loss + mto.loss()).backward()
        found.append([None if p.grad is None else p.grad.tolist() for p in model.parameters()])
    # The mean over ranks of what each would have had alone.
    alone = []
    for other in range(2):
        loss, _ = case.run(model, 10 + other)
        model.zero_grad()
        (loss + mto.loss()).backward()
        alone.append(model.mask_token.grad.clone())
    torch.testing.assert_close(torch.tensor(found[1][find(model)]), (alone[0] + alone[1]) / 2, rtol=1e-4, atol=1e-6)
    answers.put((rank, found))
    torch.distributed.destroy_process_group()


def find(model):
    return next(k for k, (name, _) in enumerate(model.named_parameters()) if name == "mask_token")


@pytest.mark.slow
def test_ddp__sum_then_backward_gives_equal_gradients():
    found = dict(on_two(gradients))
    assert found[0] == found[1]


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded(model, case):
    from torch.distributed.fsdp import fully_shard

    for blocks in case.stacks(model):
        for block in blocks:
            fully_shard(block)
    return fully_shard(model)


def flat(model, *, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


@NOISY
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", ["mae", "simmim vit"])
@pytest.mark.parametrize("way", ["fully_shard", "FullyShardedDataParallel"])
def test_fsdp__losses_and_gradients_equal_the_plain_model(name, way):
    case = CASES[name]
    model = build(case)
    plain = copy.deepcopy(model)
    wrapped = sharded(model, case) if way == "fully_shard" else flat(model, use_orig_params=True)
    mto, expected = attach_mto(wrapped, CONFIG), attach_mto(plain, CONFIG)
    for step in range(2):
        wrapped.zero_grad()  # before the forward: after it fully_shard shows other parameters
        plain.zero_grad()
        loss, _ = case.run(wrapped, step)
        extra = mto.loss()
        (loss + extra).backward()
        loss, _ = case.run(plain, step)
        plain_extra = expected.loss()
        (loss + plain_extra).backward()
        torch.testing.assert_close(extra, plain_extra)
    found = dict(model.named_parameters())
    for parameter_name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            gradient = found[parameter_name].grad
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            torch.testing.assert_close(gradient.view_as(parameter), parameter.grad, rtol=1e-4, atol=1e-6)


@NOISY
@pytest.mark.usefixtures("group")
def test_fsdp__joined_parameters_are_refused():
    with pytest.raises(ValueError, match="use_orig_params=True"):
        attach_mto(flat(build(CASES["simmim vit"]), use_orig_params=False))
