"""Processes that run the same function together: over gloo, or each with a GPU of its own."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
# Once for all ranks, what takes each of them long: `fully_shard` imports torch._dynamo.
_CONTEXT.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch._dynamo", "dldr_ext.distributed.checkpoint"]
)


def _serve(pipe: Any, rank: int, size: int, file: str, seconds: float, backend: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{file}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=seconds),
    )
    while (work := pipe.recv()) is not None:
        function, args = work
        try:
            torch.manual_seed(1234)
            pipe.send(function(*args))
        except Exception as error:
            pipe.send(error)
    dist.destroy_process_group()


class RankGroup:
    """Ranks 0 .. size - 1; `run` gives what a function returns, or raised, on each of them."""

    def __init__(self, size: int, seconds: float = 30.0, backend: str = "gloo") -> None:
        self._folder = tempfile.TemporaryDirectory()
        file = str(Path(self._folder.name, "store"))
        self.processes, self._pipes = [], []
        for rank in range(size):
            here, there = _CONTEXT.Pipe()
            known = (there, rank, size, file, seconds, backend)
            process = _CONTEXT.Process(target=_serve, args=known)
            process.start()
            there.close()
            self.processes.append(process)
            self._pipes.append(here)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args))
        found = []
        for pipe in self._pipes:
            try:
                found.append(pipe.recv())
            except EOFError:  # it died
                found.append(None)
        return found

    def all(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The same, with the first error raised."""
        found = self.run(function, *args)
        for result in found:
            if isinstance(result, Exception):
                raise result
        return found

    def close(self) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()
