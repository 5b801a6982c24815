"""What DLDR and P-BFGS take on a model of any size: memory, bytes, time, communication.

Formulas alone: nothing is allocated or run. For each rank, with n_r parameters on each of R ranks
(n_r = n, or n / R where basis and snapshots are sharded), d directions, T snapshots, b bytes an
element of both (8-bit formats: 1 + 4/256, their scales included):

===================  ===============================  ====================================
step                 bytes that must move             operations
===================  ===============================  ====================================
record, mean of T    n_r (b (T + 1) / 2 + 8)          --
gram                 n_r T b                          n_r T (T + 1), in float64
form_basis           n_r (T + d) b                    2 n_r T d, in float64
project              n_r (d b + 4)                    --
reconstruct_         n_r (d b + 8)                    --
line-search trial    12 n_r                           --
P-BFGS step          n_r (2 d b + 40 + 12 trials)     --
===================  ===============================  ====================================

A floor is the bytes over the bandwidth, or the operations over their rate if that takes longer.
``benchmarks.scaling.plan_check`` compares these formulas with measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..tensors.constants import MAX_DIM, SCALE_BLOCK
from .devices import Device

#: Bytes an element, with the scale of one float32 to a block of 256.
ITEMSIZE = {
    "float64": 8.0,
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "int8": 1 + 4 / SCALE_BLOCK,
    "float8_e4m3fn": 1 + 4 / SCALE_BLOCK,
}
SHORT = {
    "fp64": "float64", "f64": "float64", "double": "float64",
    "fp32": "float32", "f32": "float32", "float": "float32",
    "bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16",
    "fp8": "float8_e4m3fn", "float8": "float8_e4m3fn", "e4m3": "float8_e4m3fn",
}  # fmt: skip
STORAGES = ("device", "host", "disk")
SHARDS = ("none", "basis", "all")
# Bytes of the float64 columns that a basis is made from at a time, on the CPU and on CUDA: see
# `pca.gram.column_step`.
_CHUNK = {True: 1 << 25, False: 1 << 29}
# Accepted steps after which the point is made from theta again.
_ANCHOR_EVERY = 32
# Bytes of a coordinate on its way to other ranks: float64.
_COORDINATE = 8
# Columns of a basis are partitioned at multiples of this.
_BLOCK = 256


@dataclass(frozen=True)
class Job:
    """A run to plan: the size of the model, of the subspace, and how both are stored.

    Parameters
    ----------
    numel : int
        Trainable parameters, n.
    dim : int
        Directions, d: less than ``snapshots`` and at most 1024.
    snapshots : int
        Snapshots that the directions come from, T.
    dtype : str
        Of snapshots and basis: "float64", "float32", "bfloat16", "float16", "int8" or
        "float8_e4m3fn".
    param_dtype : str
        Of weights and gradients: one of the first four.
    storage : str
        Where the snapshots are: "device", "host" or "disk".
    ranks : int
        Devices, R.
    shard : str
        What is partitioned over the ranks: "none", "basis" (with snapshots and flat vectors) or
        "all" (weights and gradients too, as FSDP does).
    block : int
        Snapshots whose Gram rows are made in one pass over earlier ones, off the device.
    steps : int
        Steps of P-BFGS in a run.
    trials : float
        Trials of a line search, on average.
    closure_seconds : float
        Seconds of one forward and backward pass of the model, for the wall-clock of a run.

    Raises
    ------
    ValueError
        Naming the argument, what was expected and what came.

    See Also
    --------
    plan : works out what it takes.

    Examples
    --------
    >>> Job(numel=1_000_000, ranks=4, shard="basis").columns
    250000
    """

    numel: int
    dim: int = 40
    snapshots: int = 81
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    storage: str = "device"
    ranks: int = 1
    shard: str = "none"
    block: int = 8
    steps: int = 100
    trials: float = 1.0
    closure_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("numel", "dim", "snapshots", "ranks", "block", "trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("steps", "closure_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.dim > min(MAX_DIM, self.snapshots - 1):
            raise ValueError(
                f"dim: expected at most {min(MAX_DIM, self.snapshots - 1)} ({self.snapshots} "
                f"snapshots, centred; never more than {MAX_DIM}), got {self.dim}"
            )
        for name, choices in (
            ("dtype", tuple(ITEMSIZE)),
            ("param_dtype", tuple(ITEMSIZE)[:4]),
            ("storage", STORAGES),
            ("shard", SHARDS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )

    @property
    def columns(self) -> int:
        """Columns of basis and snapshots on a rank, n_r."""
        return self.numel if self.shard == "none" else -(-self.numel // self.ranks)

    @property
    def weights(self) -> int:
        """Parameters whose weights and gradients a rank holds."""
        return -(-self.numel // self.ranks) if self.shard == "all" else self.numel

    @property
    def wide(self) -> float:
        """Bytes of a number of the anchor, the origin and other flat vectors."""
        return 8.0 if self.dtype == "float64" else 4.0


@dataclass(frozen=True)
class Memory:
    """Peak memory of a rank in one phase of a run.

    The model's activations, and its optimizer while recording, come on top.

    Attributes
    ----------
    phase : str
        "recording", "forming the basis" or "P-BFGS".
    device : float
        Bytes of the device's memory.
    host : float
        Bytes of the host's memory.
    disk : float
        Bytes on disk.
    """

    phase: str
    device: float
    host: float
    disk: float


@dataclass(frozen=True)
class Step:
    """The work of one rank in one step of a run.

    Attributes
    ----------
    name : str
        As in the table at the head of this module.
    bytes : float
        Bytes that must move in the device's memory, in one call.
    flops : float
        Operations that must be done.
    floor : float
        The least seconds.
    expected : float or None
        Seconds at the share of the floor that was measured (``Device.shares``), if it was.
    calls : float
        Calls in a whole run.
    """

    name: str
    bytes: float
    flops: float
    floor: float
    expected: float | None
    calls: float

    @property
    def seconds(self) -> float:
        """The best known seconds of one call: expected ones where there are, else the floor."""
        return self.floor if self.expected is None else self.expected


@dataclass(frozen=True)
class Message:
    """What a rank sends, by ring algorithms.

    Attributes
    ----------
    name : str
    on_top_of : str
        What the model sends anyway, as "DDP".
    numbers : float
        Numbers that are summed or gathered.
    bytes : float
        Bytes that a rank sends.
    seconds : float or None
        The least seconds, where the interconnect is known.
    """

    name: str
    on_top_of: str
    numbers: float
    bytes: float
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """What a run takes on a device.

    Attributes
    ----------
    job : Job
    device : Device
        The device of each rank.
    memory : list of Memory
        For each phase, in order.
    steps : list of Step
        Bytes, operations and seconds of each step.
    messages : list of Message
        Communication; empty on one rank.
    run : dict of str to float
        Seconds of "recording", "forming the basis", "P-BFGS steps", "closures" and "all".

    See Also
    --------
    plan : makes one.
    """

    job: Job
    device: Device
    memory: list[Memory]
    steps: list[Step]
    messages: list[Message]
    run: dict[str, float]

    @property
    def peak(self) -> float:
        """Most bytes of the device's memory on a rank."""
        return max(memory.device for memory in self.memory)


def plan(job: Job, device: Device) -> Plan:
    """Work out what a run takes.

    Parameters
    ----------
    job : Job
    device : Device
        The device of each rank: one of `TABLE`, or a measured one.

    Returns
    -------
    Plan
        Memory, bytes, seconds and communication of a rank.

    See Also
    --------
    measure : the device of this machine.

    Examples
    --------
    >>> from dldr_ext.plan import TABLE, Job, plan
    >>> job = Job(7_000_000_000, dim=40, snapshots=80, ranks=32, shard="all")
    >>> planned = plan(job, TABLE["h200"])
    >>> [(memory.phase, round(memory.device / 1e9, 1)) for memory in planned.memory]
    [('recording', 37.6), ('forming the basis', 56.5), ('P-BFGS', 23.3)]
    >>> next(step.bytes for step in planned.steps if step.name == "project") / 1e9
    18.375
    """
    steps = _steps(job, device)
    return Plan(job, device, _memory(job, device), steps, _messages(job, device), _run(job, steps))


def _memory(job: Job, device: Device) -> list[Memory]:
    n, t, wide = job.columns, job.snapshots, job.wide
    row = n * ITEMSIZE[job.dtype]
    model = 2 * job.weights * ITEMSIZE[job.param_dtype]  # weights and gradients
    kept = {storage: t * row if job.storage == storage else 0.0 for storage in STORAGES}
    away = job.storage != "device"
    # Of snapshots off the device: the rows of a block and one earlier row at a time.
    in_transit = min(job.block + 1, t) * row if away else 0.0
    chunk = min(_CHUNK[device.link is None], 8.0 * n * t)
    basis = job.dim * row
    record = model + wide * n + kept["device"] + in_transit
    form = model + 2 * wide * n + kept["device"] + chunk + basis
    # origin, point, direction, and the gradient at the accepted point
    train = model + basis + 4 * wide * n + chunk  # which allocators keep
    return [
        Memory("recording", record, kept["host"], kept["disk"]),
        Memory("forming the basis", form, kept["host"], kept["disk"]),
        Memory("P-BFGS", train, 0.0, kept["disk"]),
    ]


def _steps(job: Job, device: Device) -> list[Step]:
    n, d, t, b, wide = job.columns, job.dim, job.snapshots, ITEMSIZE[job.dtype], job.wide
    reconstruct = n * (d * b + 2 * wide)  # weights and gradients count as wide as flat vectors
    trial = 3 * wide * n
    # project two gradients; make u; keep the gradient (read and write), its slope (two reads),
    # carry the point along (three); now and then make the point anew
    step = (
        n * (d * b + 2 * wide) + n * (d * b + wide) + 7 * wide * n + job.trials * trial
        + (reconstruct + trial) / _ANCHOR_EVERY
    )  # fmt: skip
    steps = [
        _step(job, device, "record", n * (b * (t + 1) / 2 + 2 * wide), 0, t),
        _step(job, device, "gram", n * t * b, n * t * (t + 1), 1),
        _step(job, device, "form_basis", n * (t + d) * b, 2 * n * t * d, 1),
        _step(job, device, "project", n * (d * b + wide), 0, 0),
        _step(job, device, "reconstruct_", reconstruct, 0, 0),
        _step(job, device, "line-search trial", trial, 0, 0),
        _step(job, device, "P-BFGS step", step, 0, job.steps),
    ]
    return steps if job.storage == "device" else _from_storage(job, device, steps)


def _step(job: Job, device: Device, name: str, size: float, flops: float, calls: float) -> Step:
    speed = device.copy if name == "line-search trial" else device.read
    floor = max(size / speed, flops / device.float64)
    share = device.shares.get(name)
    return Step(name, size, flops, floor, None if share is None else floor / share, calls)


def _from_storage(job: Job, device: Device, steps: list[Step]) -> list[Step]:
    """Return the steps with snapshots that come from the host's memory or a disk."""
    row = job.columns * ITEMSIZE[job.dtype]
    speed = device.disk if job.storage == "disk" else device.link or device.read
    # One pass over the earlier rows for each block, and each row written once.
    rows = {"record": (job.snapshots + 1) / 2 / job.block + 1}
    rows |= dict.fromkeys(("gram", "form_basis"), float(job.snapshots))
    bounded = []
    for step in steps:
        transfer = rows.get(step.name, 0.0) * row / speed
        expected = None if step.expected is None else max(step.expected, transfer)
        bounded.append(replace(step, floor=max(step.floor, transfer), expected=expected))
    return bounded


def _messages(job: Job, device: Device) -> list[Message]:
    ranks, wide, n = job.ranks, ITEMSIZE[job.param_dtype], job.numel
    if ranks == 1:
        return []
    share = (ranks - 1) / ranks

    padded = -(-n // (ranks * _BLOCK)) * ranks * _BLOCK  # so that all shards are equal

    def message(name: str, on_top_of: str, numbers: float, size: float, passes: int) -> Message:
        sent = passes * share * numbers * size
        seconds = None if device.interconnect is None else sent / device.interconnect
        return Message(name, on_top_of, numbers, sent, seconds)

    c = job.dim + 1
    return [
        message("DDP: the gradient", "nothing", n, wide, 2),
        message("a gradient's coordinates and loss", "no DDP", c, _COORDINATE, 2),
        message("a trial's loss", "no DDP", 1, _COORDINATE, 2),
        # Coordinates of the gradients before and after the last step, with default options.
        message("a P-BFGS step", "no DDP, FSDP", c + job.dim + job.trials, _COORDINATE, 2),
        message("basis sharded: a gradient scattered", "no DDP", padded, wide, 1),
        message("basis sharded: u gathered", "no DDP", padded, job.wide, 1),
        message("all sharded: coordinates and loss", "FSDP", c, _COORDINATE, 2),
    ]


def _run(job: Job, steps: list[Step]) -> dict[str, float]:
    once = {step.name: step.seconds for step in steps}
    seconds = {
        "recording": job.snapshots * once["record"],
        "forming the basis": once["gram"] + once["form_basis"],
        "P-BFGS steps": job.steps * once["P-BFGS step"],
        # One forward and backward pass for the gradient; a trial that is accepted goes backward
        # too, one that is not is a forward pass, about a third.
        "closures": job.steps * job.closure_seconds * (2 + (job.trials - 1) / 3),
    }
    return seconds | {"all": sum(seconds.values())}
