"""Two gloo processes: one backward pass on the sum gives both ranks the same gradients."""

import multiprocessing

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

if not torch.distributed.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)


def work(rank, address, answers):
    from test_mto_attach import CONFIG, build
    from training_models import CASES

    from mto_analysis.mto import attach_mto

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
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
def test_ddp__sum_then_backward_gives_equal_gradients(tmp_path):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    workers = [context.Process(target=work, args=(rank, tmp_path / "meet", answers)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = dict(answers.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert found[0] == found[1]
