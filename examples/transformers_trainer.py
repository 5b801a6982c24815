"""transformers' Trainer: two epochs of AdamW are recorded, then 20 coordinates are trained.

The model is a small GPT-2 with random weights, the text this project's pages, byte by byte: nothing
is downloaded. An update of P-BFGS is 8 micro-batches, which it sees as one batch. Needs
transformers and accelerate.
"""

import logging
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from dldr_ext import PBFGS, Trajectory
from dldr_ext.integrations.transformers import SubspaceTrainer, TrajectoryCallback

PAGES = sorted((Path(__file__).resolve().parents[1] / "docs").glob("*.md"))


def sequences(length=64):
    """The pages in pieces, and every eighth of these held out."""
    text = b"".join(page.read_bytes() for page in PAGES)
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    pieces = [{"input_ids": p, "labels": p} for p in tokens.split(length) if len(p) == length]
    held_out = pieces[::8]
    del pieces[::8]
    return pieces, held_out


def main(epochs=(2, 2), pieces=None):
    torch.manual_seed(0)
    train, held_out = sequences()
    train = train[:pieces]
    config = GPT2Config(
        vocab_size=256,
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    data = {"train_dataset": train, "eval_dataset": held_out}
    shared = {"per_device_eval_batch_size": 128, "save_strategy": "no", "report_to": []}
    shared |= {"disable_tqdm": True, "use_cpu": True, "output_dir": tempfile.mkdtemp()}

    args = TrainingArguments(
        num_train_epochs=epochs[0], per_device_train_batch_size=32, learning_rate=2e-3, **shared
    )
    trainer = Trainer(model, args, **data)
    trajectory = Trajectory(model.named_parameters())
    trajectory.record()  # the weights that training starts from; the coordinates start there too
    trainer.add_callback(TrajectoryCallback(trajectory))
    trainer.train()
    found = {"adamw": trainer.evaluate()["eval_loss"]}

    args = TrainingArguments(
        num_train_epochs=epochs[1],
        per_device_train_batch_size=64,
        gradient_accumulation_steps=8,
        **shared,
    )
    subspace = trajectory.subspace(dim=20)
    trainer = SubspaceTrainer(model, args, subspace=subspace, subspace_optimizer=PBFGS, **data)
    trainer.train()
    return found | {"pbfgs": trainer.evaluate()["eval_loss"]}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print("held-out loss:", main())
