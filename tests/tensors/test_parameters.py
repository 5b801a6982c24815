"""Which tensors of a list count, in which order, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dldr_ext.tensors import parameters


def test_tied_parameters_count_once_in_the_order_given():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    listed = parameters.named_parameters(iter([b, a, b]))[0]
    assert [id(p) for p in listed] == [id(b), id(a)]
    assert parameters.numel(listed) == 5


def test_groups_pairs_and_plain_tensors():
    a, b, c = (nn.Parameter(torch.ones(i + 1)) for i in range(3))
    groups = [{"params": [a, b], "lr": 1}, {"params": c}]
    assert [id(p) for p in parameters.named_parameters(groups)[0]] == [id(a), id(b), id(c)]
    listed, names = parameters.named_parameters([("x", a), ("y", b)])
    assert names == ["x", "y"] and listed[1] is b
    assert parameters.named_parameters([("x", a), b])[1] is None


def test_frozen_parameters_are_left_out_unless_all_are():
    frozen, free = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(3))
    plain = torch.ones(4)
    assert [id(p) for p in parameters.named_parameters([frozen, free, plain])[0]] == [
        id(free),
        id(plain),
    ]
    listed, names = parameters.named_parameters([("f", frozen), ("g", free)])
    assert len(listed) == 1 and names == ["g"]
    assert parameters.named_parameters([frozen])[0][0] is frozen


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "expected at least one tensor, got an empty list"),
        (torch.ones(3), TypeError, "expected an iterable of tensors or of dicts, got a single"),
        (3, TypeError, "expected an iterable of tensors or of dicts, got int"),
        ([torch.ones(1), 2.0], TypeError, r"params\[1\]: expected a tensor, got float"),
        ([None], TypeError, r"params\[0\]: expected a tensor, got None"),
        ([torch.ones(2).to_sparse()], TypeError, "expected a dense tensor, got torch.sparse_coo"),
        ([torch.ones(2, dtype=torch.complex64)], TypeError, "expected a dtype of .* got complex64"),
        ([torch.ones(2, dtype=torch.int64)], TypeError, "float16, float64, got int64"),
        ([torch.ones(2), torch.ones(2, device="meta")], ValueError, r"params\[1\] on meta"),
        ([{"lr": 1}], ValueError, r"expected a parameter group with the key 'params'.*\['lr'\]"),
        ([("w", 1)], TypeError, r"params\[0\] \(w\): expected a tensor, got int"),
    ],
)
def test_refused(params, error, message):
    with pytest.raises(error, match=message):
        parameters.named_parameters(params)


def test_gradients():
    a, b = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4, dtype=torch.float64))
    a.grad = torch.full((2, 3), 2.0)
    first, second = parameters.gradients([a, b])
    assert first is a.grad
    assert second.shape == (4,) and second.dtype == torch.float64 and second.stride() == (0,)
    assert not second.any()


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"params\[0\]: expected a dense gradient, got .*sparse"):
        parameters.gradients([embedding.weight])


def test_check_matches():
    params = [torch.ones(2, 3), torch.ones(4)]
    parameters.check_matches(params, [(2, 3), [4]])
    with pytest.raises(
        ValueError,
        match=r"params\[1\] \(b\): expected shape \(5,\), as in the subspace, got \(4,\)",
    ):
        parameters.check_matches(params, [(2, 3), (5,)], ["a", "b"], "subspace")
    with pytest.raises(ValueError, match=r"expected 3 .* got 2: params\[2\] \(c\) of shape \(1,\)"):
        parameters.check_matches(params, [(2, 3), (4,), (1,)], ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"expected 1 .* got 2: params\[1\] of shape \(4,\)"):
        parameters.check_matches(params, [(2, 3)])


def test_flatten_is_logical_order_whatever_the_memory_format():
    image = torch.randn(2, 3, 4, 5)
    matrix = torch.randn(4, 6, dtype=torch.float64)
    half = torch.randn(7).bfloat16()
    expected = torch.cat([t.reshape(-1).float() for t in (image, matrix, half, matrix.T)])
    listed = [image.to(memory_format=torch.channels_last), matrix, half, matrix.T]
    assert torch.equal(parameters.flatten(listed, torch.float32), expected)
    with pytest.raises(ValueError, match="meta device"):
        parameters.flatten([torch.ones(2, device="meta")], torch.float32)
