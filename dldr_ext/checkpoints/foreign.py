"""Files of other libraries, which are not read: what they are, and the way out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_FORMATS = [
    (
        r".*\.index|.*\.data-\d+-of-\d+|.*\.pb",
        "TensorFlow",
        "write its variables with safetensors.numpy.save_file",
    ),
    (
        r".*\.(h5|hdf5|keras)",
        "Keras (HDF5)",
        "write its weights with safetensors.numpy.save_file, or save them from PyTorch",
    ),
    (
        r".*\.msgpack|_CHECKPOINT_METADATA|_METADATA|manifest\.ocdbt|checkpoint_\d+",
        "Flax or Orbax",
        "write its parameters, flattened, with safetensors.flax.save_file",
    ),
    (r".*\.(gguf|ggml)", "GGUF", "it is rounded for inference; take what it was made from"),
    (
        r".*\.(onnx|tflite|mlmodel|mlpackage|engine|plan|trt|pte)",
        "an exported program",
        "take the checkpoint that it was exported from",
    ),
    (r".*\.(npz|npy)", "NumPy", "write its arrays with safetensors.numpy.save_file"),
    (r".*\.nemo", "a NeMo archive", "unpack it with tar, and name the .ckpt file in it"),
    (
        r".*\.distcp",
        "torch.distributed.checkpoint without its file .metadata",
        "the save was not finished; take an earlier one",
    ),
]


def of_path(path: Path) -> str | None:
    """Say by its name what a file is and what to do; None if it may be a checkpoint."""
    if path.is_dir():
        return None
    for names, what, way_out in _FORMATS:
        if re.fullmatch(names, path.name):
            return f"expected a file of torch.save or safetensors, found {what}: {way_out}"
    return None


def in_folder(inside: Iterable[Path]) -> str | None:
    """Say what files in a folder are that no checkpoint is among; None if nothing is known."""
    return next(filter(None, map(of_path, sorted(inside))), None)
