"""Kills a process that records to a folder, again and again, and checks what it leaves.

python crash_writer.py FOLDER KILLS SEED: prints how many kills came while a snapshot was on its way
to the disk, while a file was half-written, and how many snapshots were recorded in all.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from dldr_ext import Trajectory

N, CAPACITY = 3000, 40


def set_to(params, value):
    for p in params:
        p.fill_(value)


def parameters():
    return [torch.zeros(N - 7), torch.zeros(7)]


def opened(folder, params):
    if (folder / "anchor.safetensors").exists():
        return Trajectory.load(folder, params)
    return Trajectory(params, CAPACITY, storage="disk", path=folder, anchor=torch.zeros(N))


def record_forever(folder, pipe):
    """Snapshot t has weights t + 1; each is reported when record() has returned."""
    params = parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trajectory = opened(folder, params)
    for t in range(len(trajectory), CAPACITY):
        os.write(pipe, b"b")
        set_to(params, t + 1)
        trajectory.record()
        os.write(pipe, b"r")
        if t % 7 == 0:
            trajectory.gram  # noqa: B018  (completes it)
    os.write(pipe, b"f")
    time.sleep(60)


def check(folder, reported):
    """Everything that was reported is there, and at most the one that was on its way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trajectory = opened(folder, parameters())
    messages = [str(warning.message) for warning in caught]
    assert all("a half-written file was dropped" in message for message in messages), messages
    count = len(trajectory)
    assert reported <= count <= reported + 1, (reported, count)
    values = torch.arange(1, count + 1)
    if count:
        assert torch.equal(trajectory.snapshots[:], values[:, None].expand(-1, N).bfloat16())
        assert torch.equal(trajectory.gram, N * (values[:, None] * values).double())
    trajectory.close()
    assert not list(folder.glob(".*")), "temporary files are cleared away"
    return count, len(messages)


def main(folder, kills, seed):
    torch.set_num_threads(1)  # threads do not survive a fork
    chance = random.Random(seed)
    known = on_its_way = half_written = total = 0
    for _ in range(kills):
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            record_forever(folder, writable)
            os._exit(0)
        os.close(writable)
        # Mostly after some reports, however busy the machine; else perhaps as it opens the folder.
        wanted, reports = chance.randint(1, 8) if chance.random() < 0.75 else 0, b""
        while len(reports) < wanted and (report := os.read(readable, 1)) not in (b"f", b""):
            reports += report
        time.sleep(chance.uniform(0, 0.005))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(readable, 1000):
            reports += more
        os.close(readable)
        on_its_way += reports.count(b"b") > reports.count(b"r")
        count, dropped = check(folder, known + reports.count(b"r"))
        half_written += dropped
        total += count - known
        known = count
        if known == CAPACITY:
            shutil.rmtree(folder)
            known = 0
    print(on_its_way, half_written, total)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
