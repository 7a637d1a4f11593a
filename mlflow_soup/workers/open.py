"""The engine that a request asks for."""

import os
from collections.abc import Callable
from functools import partial

import torch

from mlflow_soup.errors import SpecError
from mlflow_soup.request.names import Workers
from mlflow_soup.workers.cluster import Actor, check_installed, join
from mlflow_soup.workers.engine import Engine, Inline
from mlflow_soup.workers.pool import Pool
from mlflow_soup.workers.processes import Process
from mlflow_soup.workers.worker import Mixture, Start, admission_of


def check_workers(workers: Workers | None, device: torch.device) -> None:
    """Refuse workers that this machine cannot have. The room of a cluster shows when it is joined.

    Args:
        workers: what the request says; None for this process.
        device: of the model.

    Raises:
        SpecError: there are fewer processors or GPUs than workers, or Ray is not installed.
    """
    if workers is None:
        return
    on_gpus = device.type == "cuda"
    if on_gpus and device.index:
        raise SpecError(
            f"--device {device} names one GPU, but workers take one each",
            where="--device and --workers",
            fix="leave out --device; CUDA_VISIBLE_DEVICES says which GPUs there are",
        )
    if workers.ray:
        check_installed()
        return
    most = torch.cuda.device_count() if on_gpus else _processors()
    if workers.count > most:
        what = "GPUs" if on_gpus else "processors"
        raise SpecError(
            f"{workers.count} workers are more than the {most} {what} of this machine",
            where="--workers",
            fix=f"ask for at most {most}: workers that share one are no faster",
        )


def open_engine(
    inline: Inline, donor: Mixture, workers: Workers | None, *, patience: float
) -> Engine:
    """Where the evaluations of a request run. Workers start when the first is needed.

    On a CPU, the number of threads decides the last digits of a score. So this process takes as
    many as each worker, until the engine is closed.

    Args:
        inline: the engine of this process.
        donor: the checkpoint that gave its model the architecture, with weight 1.
        workers: what the request says, and `check_workers` has allowed; None for this process.
        patience: seconds to wait for the answer of a worker.

    Raises:
        SpecError: the Ray cluster has less room than asked for.
        StoreError: the Ray cluster cannot be reached.
    """
    if workers is None:
        return inline
    live = inline.mixer.live
    device, (source,) = live.model.device, donor.sources()
    own = partial(admission_of, inline.mixer, donor)
    on_gpus = device.type == "cuda"
    if workers.ray:
        rooms, leave = join(workers.count, on_gpus=on_gpus)
        leave, threads = _share_threads(rooms[0].threads, leave, on_gpus=on_gpus)
        start = Start(source, device.type, threads)
        actors = [partial(Actor, i, start, room.options) for i, room in enumerate(rooms, 1)]
        return Pool(actors, own, patience, leave)
    count = workers.count
    leave, threads = _share_threads(max(1, _processors() // count), on_gpus=on_gpus)
    devices = [f"cuda:{i}" for i in range(count)] if on_gpus else [device.type] * count
    starts = [Start(source, each, threads) for each in devices]
    processes = [partial(_begin, number, start) for number, start in enumerate(starts, 1)]
    return Pool(processes, own, patience, leave)


def _processors() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0))


def _share_threads(
    most: int, leave: Callable[[], None] = lambda: None, *, on_gpus: bool
) -> tuple[Callable[[], None], int]:
    """The threads of each worker; and what gives this process its own back, then leaves."""
    if on_gpus:  # where threads only merge, which gives the same digits with any number of them
        return leave, most
    before = torch.get_num_threads()
    threads = min(before, most)
    torch.set_num_threads(threads)

    def restore() -> None:
        torch.set_num_threads(before)
        leave()

    return restore, threads


def _begin(number: int, start: Start) -> Process:
    if start.device != "cpu":
        torch.cuda.empty_cache()  # the first GPU has the model of this process, too
    return Process(number, start)
