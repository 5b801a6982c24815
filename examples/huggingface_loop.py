"""A plain training loop over a Hugging Face model: AdamW first, then P-BFGS in ten directions.

The model is a small BERT with random weights, made from a configuration: nothing is downloaded. It
learns to tell whether the number 7 occurs in a sequence. Dropout stays on: within a step P-BFGS
replays the random numbers, so that all its trials see the same masks. Needs transformers.
"""

import torch
from transformers import BertConfig, BertForSequenceClassification

from dldr_ext import PBFGS, Trajectory


def batches(count, size):
    for _ in range(count):
        tokens = torch.randint(1, 20, (size, 12))
        yield {"input_ids": tokens, "labels": (tokens == 7).any(1).long()}


def main(recorded=200, steps=25):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=12,
        num_labels=2,
    )
    model = BertForSequenceClassification(config).train()
    (held_out,) = batches(1, 1000)

    def loss():
        model.eval()
        with torch.no_grad():
            result = model(**held_out).loss.item()
        model.train()
        return result

    found = {"start": loss()}
    trajectory = Trajectory(model.named_parameters(), capacity=recorded)
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for batch in batches(recorded, 64):
        trajectory.record()
        adam.zero_grad()
        model(**batch).loss.backward()
        adam.step()
    found["adamw"] = loss()

    optimizer = PBFGS(model.parameters(), trajectory.subspace(dim=10))
    for batch in batches(steps, 512):
        optimizer.step(lambda: model(**batch).loss)  # noqa: B023  (called within the step)
    return found | {"pbfgs": loss()}


if __name__ == "__main__":
    print("held-out loss:", main())
