"""SubspaceTrainer and TrajectoryCallback, in transformers' own Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_problems import bits, one_thread  # noqa: F401  (a fixture)
from torch import Tensor, nn

from dldr_ext import PBFGS, PSGD, InSubspace, Subspace, Trajectory

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from dldr_ext.integrations.transformers import SubspaceTrainer, TrajectoryCallback  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
KINDS: list[tuple[Any, dict[str, Any]]] = [
    (PBFGS, {}),
    (PSGD, {"lr": 0.1}),
    (InSubspace, {"optimizer": torch.optim.Adam, "lr": 0.1}),
    (InSubspace, {"optimizer": torch.optim.LBFGS, "max_iter": 2}),
]
NAMES = ["pbfgs", "psgd", "adam", "lbfgs"]


def gpt2(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def sequences(count: int = 24) -> list[dict[str, Tensor]]:
    """Arithmetic sequences, of which a loss sees parts of different lengths."""
    found = []
    for i in range(count):
        tokens = (torch.arange(8) * (1 + i % 3) + i) % 16
        labels = tokens.clone()
        labels[: 1 + i % 4] = -100
        found.append({"input_ids": tokens, "labels": labels})
    return found


def arguments(folder: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "num_train_epochs": 2,
    }  # fmt: skip
    return transformers.TrainingArguments(**defaults | options)


def subspace_of(model: nn.Module, dim: int = 5) -> Subspace:
    generator = torch.Generator().manual_seed(2)
    return Subspace.random(list(model.named_parameters()), dim, generator=generator)


def trainer(folder: Path, kind: int = 0, dropout: float = 0.0, **options: Any) -> SubspaceTrainer:
    model, (optimizer, of_optimizer) = gpt2(dropout), KINDS[kind]
    return SubspaceTrainer(
        model,
        arguments(folder, **options),
        train_dataset=sequences(),
        eval_dataset=sequences(),
        subspace=subspace_of(model),
        subspace_optimizer=optimizer,
        subspace_options=of_optimizer,
    )


def logged(trained: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trained.state.log_history if name in entry]


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=NAMES)
def test_every_optimizer_trains_once_an_update(kind: int, tmp_path: Path) -> None:
    trained = trainer(tmp_path, kind, max_steps=6, per_device_train_batch_size=12)
    start = trained.evaluate()["eval_loss"]
    trained.train()
    assert trained.evaluate()["eval_loss"] < start
    optimizer = trained.subspace_optimizer
    assert len(optimizer.history) == trained.state.global_step == 6
    assert logged(trained, "learning_rate") == [optimizer.param_groups[0]["lr"]] * 6


def test_accumulation_is_one_virtual_batch(tmp_path: Path) -> None:
    """Normalised over all tokens of the update, as Trainer does, whatever the micro-batches."""
    data = sequences()
    whole = {name: torch.stack([entry[name] for entry in data]) for name in data[0]}
    model = gpt2()
    optimizer = PBFGS(model.parameters(), subspace_of(model))
    losses = [optimizer.step(lambda: model(**whole).loss).item() for _ in range(3)]
    for parts in (1, 3):
        trained = trainer(
            tmp_path, max_steps=3, per_device_train_batch_size=24 // parts,
            gradient_accumulation_steps=parts,
        )  # fmt: skip
        trained.train()
        assert logged(trained)[0] == pytest.approx(losses[0], rel=1e-6)
        assert logged(trained) == pytest.approx(losses, rel=1e-4)  # searches of float32 losses


def on_a_rank(folder: Path) -> tuple[list[float], list[float], list[bytes]]:
    rank = str(torch.distributed.get_rank())
    as_torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in as_torchrun.items():
            patch.setenv(name, value)
        patch.setenv("MASTER_ADDR", "localhost")  # there is a group already
        patch.setenv("MASTER_PORT", "1")
        trained = trainer(folder, max_steps=2, ddp_backend="gloo", per_device_train_batch_size=6)
        trained.train()
    assert isinstance(trained.model_wrapped, nn.parallel.DistributedDataParallel)
    theta = trained.subspace_optimizer.theta.tolist()
    return theta, logged(trained), bits(trained.model.parameters())


def test_two_ranks_step_as_one_process(rank_groups: Any, tmp_path: Path) -> None:
    (theta, losses, weights), other = rank_groups(2).all(on_a_rank, tmp_path)
    assert theta == other[0] and weights == other[2]
    alone = trainer(tmp_path, max_steps=2, per_device_train_batch_size=12)
    alone.train()
    assert losses == pytest.approx(logged(alone), rel=1e-4)
    assert theta == pytest.approx(alone.subspace_optimizer.theta.tolist(), abs=2e-3)


class Regression(nn.Module):
    """A model whose loss is the mean of a micro-batch, and knows of no others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layers(x) - labels).square().mean()}


def test_a_plain_module_and_an_update_of_fewer_parts(tmp_path: Path) -> None:
    """Five micro-batches in updates of two; buffers change once an update."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    data = [{"x": row, "labels": row.sum(0, keepdim=True)} for row in x]
    model = Regression().double()
    subspace = subspace_of(model)
    by_hand = copy.deepcopy(model)
    args = arguments(tmp_path, num_train_epochs=1)
    trained = SubspaceTrainer(model, args, train_dataset=data, subspace=subspace)
    trained._get_train_sampler = lambda *_: None  # in order
    trained.train()
    optimizer = PBFGS(by_hand.parameters(), subspace, buffers=by_hand)
    losses = []
    for update in (data[:8], data[8:16], data[16:]):
        parts = [update[i : i + 4] for i in range(0, len(update), 4)]
        batches = [{k: torch.stack([e[k] for e in part]) for k in data[0]} for part in parts]
        losses.append(
            optimizer.step(lambda: sum(by_hand(**b)["loss"] for b in batches) / len(batches))  # noqa: B023
        )
    assert logged(trained) == pytest.approx([loss.item() for loss in losses], rel=1e-6)
    torch.testing.assert_close(trained.subspace_optimizer.theta, optimizer.theta)
    assert int(model.layers[1].num_batches_tracked) == 5
    torch.testing.assert_close(model.layers[1].running_mean, by_hand.layers[1].running_mean)


def test_batch_norm_is_evaluated_where_the_weights_are(tmp_path: Path) -> None:
    """As in training mode on the batch of the last update; the statistics stay what they were."""
    x = 3 + torch.randn(16, 3)
    data = [{"x": row, "labels": row.sum(0, keepdim=True)} for row in x]
    model = Regression()
    args = arguments(tmp_path, per_device_train_batch_size=16, max_steps=3)
    trained = SubspaceTrainer(
        model, args, train_dataset=data, eval_dataset=data, subspace=subspace_of(model),
    )  # fmt: skip
    trained.train()
    before = bits(model.buffers())
    found = trained.evaluate()["eval_loss"]
    assert bits(model.buffers()) == before
    true = model.train()(x, x.sum(1, keepdim=True))["loss"].item()
    assert found == pytest.approx(true, rel=0.2)
    stale = Regression()
    stale.load_state_dict(model.state_dict())
    assert stale.eval()(x, x.sum(1, keepdim=True))["loss"].item() > 1.5 * true


@pytest.mark.parametrize("kind", range(3), ids=NAMES[:3])
def test_a_resumed_run_goes_on_bit_for_bit(kind: int, tmp_path: Path) -> None:
    """In the middle of an epoch and with dropout."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "dropout": 0.2}
    through = trainer(tmp_path, kind, **options)
    through.train()
    resumed = trainer(tmp_path, kind, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert bits(resumed.model.parameters()) == bits(through.model.parameters())
    assert torch.equal(resumed.subspace_optimizer.theta, through.subspace_optimizer.theta)
    assert logged(resumed) == logged(through)


def test_a_checkpoint_of_weights_alone_is_refused(tmp_path: Path) -> None:
    trainer(
        tmp_path, max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True
    ).train()
    with pytest.raises(
        ValueError, match=r"resume_from_checkpoint: expected optimizer.pt in .*theta0"
    ):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_the_best_checkpoint_is_loaded(tmp_path: Path) -> None:
    trained = trainer(
        tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    trained.train()
    assert trained.evaluate()["eval_loss"] == pytest.approx(min(logged(trained, "eval_loss")))


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"warmup_steps": 2}, [0.0, 0.05, 0.1, 0.1]),
        ({"lr_scheduler_type": "cosine"}, [0.1, 0.0854, 0.05, 0.0146]),
    ],
    ids=["warm-up alone", "asked for"],
)
def test_a_schedule_only_where_asked_for(
    options: dict[str, Any], rates: list[float], tmp_path: Path
) -> None:
    trained = trainer(tmp_path, 1, max_steps=4, **options)
    trained.train()
    assert logged(trained, "learning_rate") == pytest.approx(rates, abs=1e-3)


def test_bf16(tmp_path: Path) -> None:
    trained = trainer(tmp_path, bf16=True, max_steps=4, per_device_train_batch_size=12)
    start = trained.evaluate()["eval_loss"]
    trained.train()
    assert trained.evaluate()["eval_loss"] < start


def test_an_interrupted_update_is_forgotten(tmp_path: Path) -> None:
    class Fails(transformers.TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                raise KeyboardInterrupt

    trained = trainer(tmp_path, max_steps=3)
    trained.add_callback(Fails())
    with pytest.raises(KeyboardInterrupt):
        trained.train()
    trained.remove_callback(Fails)
    trained.train()
    assert trained.state.global_step == 3
    assert len(trained.subspace_optimizer.history) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.1}, r"args.learning_rate: expected its default, 5e-05, got 0.1: opt"),
        ({"weight_decay": 0.1}, r"args.weight_decay: expected its default, 0.0, got 0.1"),
        ({"optim": "sgd"}, r"args.optim: expected its default, adamw_torch\w*, got .*(?i:sgd)"),
        ({"adam_beta1": 0.5}, r"args.adam_beta1: expected its default, 0.9, got 0.5"),
        ({"max_grad_norm": 0.5}, r"args.max_grad_norm: expected 0, or its default, got 0.5"),
        ({"auto_find_batch_size": True}, r"args.auto_find_batch_size: expected False, got True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def test_what_needs_other_machines_is_refused_too(tmp_path: Path) -> None:
    """Arguments that Trainer itself does not take here."""
    made = trainer(tmp_path)
    for name, value in (("fsdp", "full_shard"), ("deepspeed", "zero.json"), ("fp16", True)):
        kept = getattr(made.args, name)
        setattr(made.args, name, value)
        with pytest.raises(ValueError, match=rf"args.{name}: expected \w+, got {value}: "):
            made._check_arguments()
        setattr(made.args, name, kept)


def test_an_optimizer_that_does_not_search_is_clipped(tmp_path: Path) -> None:
    trained = trainer(tmp_path, 1, max_grad_norm=1e-9, max_steps=2)
    trained.train()
    assert 0.0 < trained.subspace_optimizer.theta.abs().max() < 1e-6
    assert trainer(tmp_path, 0, max_grad_norm=0.0).args.max_grad_norm == 0.0


def test_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    """Whose groups are those that Trainer would make."""
    model = gpt2()
    plain = transformers.Trainer(model, arguments(tmp_path, weight_decay=0.1))
    groups = [
        {name: group[name] for name in ("params", "weight_decay")}
        for group in plain.create_optimizer().param_groups
    ]
    optimizer = PBFGS(groups, subspace_of(model), lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    trained = SubspaceTrainer(
        model, arguments(tmp_path, max_steps=3), train_dataset=sequences(),
        optimizers=(optimizer, schedule),
    )  # fmt: skip
    trained.train()
    assert len(optimizer.history) == 3 and optimizer.param_groups[0]["lr"] == 0.0625


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (lambda model: {}, TypeError, "subspace: expected a dldr_ext.Subspace or .*, got NoneType"),
        (
            lambda model: {"subspace_optimizer": torch.optim.Adam},
            TypeError,
            "subspace_optimizer: expected PBFGS, PSGD or InSubspace, got .*Adam",
        ),
        (
            lambda model: {"optimizers": (torch.optim.SGD(model.parameters(), lr=1.0), None)},
            TypeError,
            r"optimizers\[0\]: expected None, or PBFGS, PSGD or InSubspace, got SGD",
        ),
        (
            lambda model: {
                "optimizers": (PSGD(model.parameters(), subspace_of(model)), None),
                "subspace": subspace_of(model),
            },
            ValueError,
            r"expected none beside optimizers\[0\]",
        ),
        (
            lambda model: {
                "optimizers": (PSGD((other := gpt2()).parameters(), subspace_of(other)), None)
            },
            ValueError,
            r"optimizers\[0\]: expected one over the parameters of the model, got one over others",
        ),
        (
            lambda model: {"subspace": subspace_of(nn.Linear(2, 2))},
            ValueError,
            "subspace",
        ),
        (
            lambda model: {"subspace": subspace_of(model), "subspace_options": {"max_lss": 3}},
            TypeError,
            "max_lss: expected one of the options .*did you mean 'max_ls'",
        ),
    ],
    ids=["none", "torch's", "torch's instance", "two", "other parameters", "other shape", "option"],
)
def test_other_optimizers_are_refused_at_once(
    options: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    model = gpt2()
    before = bits(model.parameters())
    with pytest.raises(error, match=message):
        SubspaceTrainer(model, arguments(tmp_path), train_dataset=sequences(), **options(model))
    assert bits(model.parameters()) == before


def test_trainer_itself_says_what_to_use(tmp_path: Path) -> None:
    model = gpt2()
    optimizers = (PBFGS(model.parameters(), subspace_of(model)), None)
    plain = transformers.Trainer(
        model, arguments(tmp_path), train_dataset=sequences(), optimizers=optimizers
    )
    with pytest.raises(TypeError, match=r"closure: expected .* got None; .*SubspaceTrainer"):
        plain.train()


def test_lora_adapters_as_the_part_that_trains(tmp_path: Path) -> None:
    """Recorded, reduced, trained, saved and resumed; the base stays as it is."""
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
        return peft.get_peft_model(gpt2(), config)

    model = adapted()
    trajectory = Trajectory(model.named_parameters(), dtype=torch.float32)
    assert trajectory.numel == sum(p.numel() for p in model.parameters() if p.requires_grad)
    transformers.Trainer(
        model, arguments(tmp_path, max_steps=8, learning_rate=1e-2), train_dataset=sequences(),
        callbacks=[TrajectoryCallback(trajectory)],
    ).train()  # fmt: skip
    subspace = trajectory.subspace(dim=4)

    def train(**resume: Any) -> Any:
        trained = SubspaceTrainer(
            adapted(),
            arguments(
                tmp_path,
                save_strategy="steps",
                save_steps=2,
                max_steps=4,
                per_device_train_batch_size=12,
            ),
            train_dataset=sequences(),
            subspace=subspace,
        )
        trained.train(**resume)
        return trained

    through = train()
    assert logged(through)[-1] < logged(through)[0]
    assert bits(
        train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).model.parameters()
    ) == bits(through.model.parameters())
    base = dict(gpt2().named_parameters())
    for name, p in through.model.get_base_model().named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, base[name.replace("base_layer.", "")]), name
    read = Trajectory.from_checkpoints(tmp_path, adapted())
    assert len(read) == 2


def test_recording(tmp_path: Path) -> None:
    """After every second update, in Trainer and while the coordinates train."""
    model = gpt2()
    trajectory = Trajectory(model.named_parameters(), dtype=torch.float32)
    callback = TrajectoryCallback(trajectory, every=2)
    plain = transformers.Trainer(
        model, arguments(tmp_path, max_steps=5), train_dataset=sequences(), callbacks=[callback]
    )
    plain.train()
    assert len(trajectory) == 2
    plain.train()  # attached anew
    assert len(trajectory) == 4

    within = Trajectory(model.named_parameters(), dtype=torch.float64)
    trained = SubspaceTrainer(
        model, arguments(tmp_path, max_steps=3), train_dataset=sequences(),
        callbacks=[TrajectoryCallback(within)], subspace=trajectory.subspace(dim=2),
    )  # fmt: skip
    trained.train()
    assert len(within) == 3
    last = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(within.anchor + within.snapshots[2], last.double())


def test_recording_goes_on_after_a_run_that_has_failed(tmp_path: Path) -> None:
    class Fails(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            raise KeyboardInterrupt

    model = gpt2()
    trajectory = Trajectory(model.named_parameters(), dtype=torch.float32)
    plain = transformers.Trainer(
        model, arguments(tmp_path, max_steps=2), train_dataset=sequences(),
        callbacks=[TrajectoryCallback(trajectory), Fails()],
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        plain.train()
    plain.remove_callback(Fails)
    plain.train()
    assert len(trajectory) == 3


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (
            lambda model: [TrajectoryCallback(Trajectory(model.parameters()))] * 2,
            "callbacks: expected it once among those of the Trainer, got it twice",
        ),
        (
            lambda model: [
                TrajectoryCallback(one)
                for one in [Trajectory(model.parameters())]
                for _ in range(2)
            ],
            "this trajectory is not attached to, got .* twice",
        ),
        (
            lambda model: [TrajectoryCallback(Trajectory(gpt2().named_parameters()))],
            "expected one that trains parameters of the trajectory",
        ),
    ],
    ids=["twice", "trajectory twice", "other model"],
)
def test_callbacks_that_make_no_sense_are_refused_before_a_step(
    callbacks: Any, message: str, tmp_path: Path
) -> None:
    model = gpt2()
    plain = transformers.Trainer(
        model, arguments(tmp_path), train_dataset=sequences(), callbacks=callbacks(model)
    )
    with pytest.raises(ValueError, match=message):
        plain.train()
    assert plain.state.global_step == 0


def test_arguments_of_the_callback() -> None:
    model = gpt2()
    with pytest.raises(TypeError, match=r"trajectory: expected a dldr_ext.Trajectory, got GPT2"):
        TrajectoryCallback(model)
    with pytest.raises(ValueError, match="TrajectoryCallback: every: expected at least 1, got 0"):
        TrajectoryCallback(Trajectory(model.parameters()), every=0)
