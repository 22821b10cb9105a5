"""Tasks on a Ray cluster, each with its CPUs and its part of a GPU."""

from __future__ import annotations

import os
from concurrent.futures import Future
from typing import Any

from mto_analysis.experiments.running import Engine, threads_for
from mto_analysis.experiments.worker import Outcome, Resources, Task, perform

# Seconds until another node's process on the same task is gone, when the node itself was lost.
_PATIENCE = 120.0


class RayEngine(Engine):
    """A Ray cluster whose nodes see the same folders.

    A task whose node dies is done again on another one, where it goes on from its last checkpoint.

    Args:
        address: Of the cluster, as ``ray.init`` takes it; by default ``RAY_ADDRESS``, or one is started here.
        jobs: Tasks at once on a node, which share its cores and GPUs.
        threads: CPUs of each task; by default the cores of the smallest node are shared out.
        gpus: GPUs of each task, also fractions; by default those of the smallest node with any are shared out.
        retries: How often a task is done again whose node or process dies.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        jobs: int = 1,
        threads: int | None = None,
        gpus: float | None = None,
        retries: int = 2,
    ) -> None:
        try:
            import ray
        except ImportError:
            raise ValueError("the engine ray needs the package ray: pip install 'mto-analysis[cluster]'") from None
        self._ray: Any = ray
        self._began = not self._ray.is_initialized()
        if self._began:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
            try:
                self._ray.init(address=address, **options)
            except ConnectionError as error:
                raise ValueError(f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}") from error
        nodes = [each["Resources"] for each in self._ray.nodes() if each["Alive"]]
        cpus, cards = ([each[kind] for each in nodes if each.get(kind)] or [0.0] for kind in ("CPU", "GPU"))
        threads = threads or threads_for(jobs, int(min(cpus)))
        gpus = min(1.0, min(cards) / jobs) if gpus is None else gpus
        for what, wanted, most in (("CPUs", threads, max(cpus)), ("GPUs", gpus, max(cards))):
            if wanted > most:  # Ray would wait for such a node for ever
                raise ValueError(f"a run needs {wanted:g} {what}, and no node of the cluster has more than {most:g}")
        self._resources = Resources(threads, retries=retries, patience=_PATIENCE)
        options = {"num_cpus": threads, "num_gpus": gpus}
        self._task = self._ray.remote(max_retries=retries, **options)(perform)
        self._cpu_task = self._ray.remote(max_retries=retries, num_cpus=threads)(perform)
        self._references: list[Any] = []

    def submit(self, task: Task) -> Future[Outcome]:
        """Do a task as soon as a node has room for it."""
        remote = self._cpu_task if task.on_cpu else self._task
        reference = remote.remote(task, self._resources)
        self._references.append(reference)
        ended: Future[Outcome] = Future()
        reference.future().add_done_callback(lambda told: ended.set_result(self._outcome(told)))
        return ended

    def _outcome(self, told: Future[Outcome]) -> Outcome:
        try:
            return told.result()
        except self._ray.exceptions.RayError as error:
            words = str(error).strip().splitlines()[0]
            return Outcome(failure=f"its node or process died again and again ({words})", exit_code=1)

    def __exit__(self, *_: object) -> None:
        """End what goes on: up to its last checkpoint it is on disk."""
        for reference in self._references:  # of no effect on those that have ended
            self._ray.cancel(reference, force=True)
        if self._began:
            self._ray.shutdown()
