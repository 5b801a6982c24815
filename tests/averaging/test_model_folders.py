"""Averages that transformers, PEFT and diffusers load, where they are installed."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

from dldr_ext.averaging.soup_files import write_mean
from dldr_ext.checkpoints import Series

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")


def model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=100, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def walk(parameters):
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn_like(p), alpha=0.1)


@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_transformers_loads_the_average(tmp_path, shard):
    net = model()  # the head is tied to the embedding
    for step in (5, 10):
        walk(net.parameters())
        net.save_pretrained(tmp_path / f"checkpoint-{step}", max_shard_size=shard)
    write_mean(Series(tmp_path, rows=False), f"{tmp_path}/mean/")
    mean, *others = (
        dict(transformers.AutoModelForCausalLM.from_pretrained(path).named_parameters())
        for path in (tmp_path / "mean", tmp_path / "checkpoint-5", tmp_path / "checkpoint-10")
    )
    for name, parameter in mean.items():
        expected = (others[0][name].double() + others[1][name].double()) / 2
        assert torch.equal(parameter, expected.float()), name
    assert os.path.exists(tmp_path / "mean" / "generation_config.json")
    assert os.path.exists(tmp_path / "mean" / "model.safetensors.index.json") == (shard == "50KB")


def test_peft_loads_the_average(tmp_path):
    peft = pytest.importorskip("peft")
    model().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, on a Conv1D
        net = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["c_attn"]))
        for step in (1, 2):
            walk(p for p in net.parameters() if p.requires_grad)
            net.save_pretrained(tmp_path / f"checkpoint-{step}")
        paths = [tmp_path / f"checkpoint-{step}" for step in (1, 2)]
        notes = write_mean(Series(paths, rows=False), f"{tmp_path}/mean/")
        assert any("lora_A and lora_B were averaged each" in note for note in notes)
        states = []
        for path in (tmp_path / "mean", *paths):
            fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
            loaded = peft.PeftModel.from_pretrained(fresh, path)
            states.append(peft.get_peft_model_state_dict(loaded))
    mean, *others = states
    assert len(mean) == 4
    for name, parameter in mean.items():
        expected = (others[0][name].double() + others[1][name].double()) / 2
        assert torch.equal(parameter, expected.float()), name


@pytest.mark.parametrize("shard", ["10GB", "5KB"])
def test_diffusers_loads_the_average(tmp_path, shard):
    """The layout of its training scripts: a folder for each model in that of a step."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    for step in (5, 10):
        walk(net.parameters())
        net.save_pretrained(tmp_path / f"checkpoint-{step}" / "vae", max_shard_size=shard)
    (tmp_path / "pipeline").mkdir()
    write_mean(Series(tmp_path, rows=False), tmp_path / "pipeline" / "vae")
    mean, *others = (
        dict(diffusers.AutoencoderTiny.from_pretrained(tmp_path / of, subfolder="vae").state_dict())
        for of in ("pipeline", "checkpoint-5", "checkpoint-10")
    )
    assert mean
    for name, value in mean.items():
        expected = (others[0][name].double() + others[1][name].double()) / 2
        assert torch.equal(value, expected.float()), name
    files = list((tmp_path / "pipeline" / "vae").glob("diffusion_pytorch_model*.safetensors"))
    assert (len(files) > 1) == (shard == "5KB")
