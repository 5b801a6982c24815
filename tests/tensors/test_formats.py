"""Scale blocks, dtypes and the constants that come from the compiled library."""

from __future__ import annotations

import torch

from dldr_ext.tensors import constants, formats, parameters


def test_constants_of_the_library():
    assert constants.SCALE_BLOCK == 256  # a part of the format of saved files
    assert constants.MAX_DIM == 1024  # promised
    assert constants.TILE % constants.SCALE_BLOCK == 0 and constants.MAX_CHUNKS >= 1


def test_blocks():
    assert [formats.blocks(n) for n in (0, 1, 256, 257)] == [0, 1, 1, 2]
    assert formats.block_range(512, 700) == (2, 3) and formats.block_range(0, 256) == (0, 1)
    assert formats.row_bytes(300, torch.int8) == 300 + 2 * 4
    assert formats.row_bytes(300, torch.bfloat16) == 600


def test_the_scale_of_some_columns():
    scale = torch.arange(8.0).view(2, 4)
    assert torch.equal(formats.scale_of(scale, 256, 600), scale[:, 1:3])
    row = formats.scale_of(scale, 256, 600, row=1)
    row.zero_()  # a view
    assert torch.equal(scale[1], torch.tensor([4.0, 0.0, 0.0, 7.0]))
    assert formats.scale_of(None, 0, 256) is None


def test_dtypes():
    assert formats.wide_dtype(torch.float64) == torch.float64
    assert {formats.wide_dtype(dtype) for dtype in (torch.int8, torch.float16)} == {torch.float32}
    assert parameters.dtype_names(parameters.DTYPES) == "float32, bfloat16, float16, float64"
    assert not parameters.is_dtensor(torch.ones(1))
