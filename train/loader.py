"""Batches from other processes: workers that decode, what they heed, and what is said when one of them is lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process, resource_tracker
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

STOPS = (signal.SIGINT, signal.SIGTERM)
MOST = 8  # one decodes some 350 clips a second; eight keep up with any GPU, and hold two batches each


def make_loader(data: Dataset[Any], workers: int | None, device: torch.device, **batches: Any) -> DataLoader[Any]:
    """Batches of `data`, decoded by so many processes (0: this one; None: `usual_workers()`), for a device; `batches`
    says what a batch is."""
    return Loader(
        data,
        num_workers=usual_workers() if workers is None else workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=heed_only_parent,
        **batches,
    )


class Loader(DataLoader[Any]):
    """Its workers begin with the signals blocked that `heed_only_parent` deals with: one that came to a worker before
    that would end it, and with it the training that was about to save."""

    def __iter__(self) -> Any:
        context = self.multiprocessing_context or multiprocessing
        if self.num_workers and context.get_start_method() != "fork":
            resource_tracker.ensure_running()  # as it starts, it unblocks them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def usual_workers() -> int:
    """This process's share of the cores at hand, among those that torchrun started on the machine, less the one that
    trains; 1 to `MOST`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(share - 1, 1), MOST)


def heed_only_parent(_: int) -> None:
    """For a loader's worker: Ctrl-C, and schedulers that stop a job, signal every process of it. The training process
    alone decides when to end; its own SIGTERM ends its workers, anybody else's does not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    starter = parent_process()
    assert starter is not None

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != starter.pid:
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=wait, daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])

    def leave_quietly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # The training process may end while it fetches a batch's memory from this one: that is no fault.
        if not issubclass(kind, EOFError | ConnectionError):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = leave_quietly


@contextmanager
def explaining_workers() -> Iterator[None]:
    """What went wrong in a loader's worker in one line, where torch gives the traceback; a worker that died, as
    ChildProcessError."""
    try:
        yield
    except (ValueError, OSError) as error:
        if "in DataLoader worker process" not in str(error):
            raise
        raise ValueError(str(error).rstrip().splitlines()[-1].partition(": ")[2]) from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ChildProcessError(
            f"{str(error).strip()} It is a process that decodes samples; probably memory ran out, or shared memory "
            "(/dev/shm): use fewer of them (train: --loader-workers, eval: --workers), or a smaller batch"
        ) from error
