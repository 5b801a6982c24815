"""CUDA ops and the host: streams, graphs, no waiting, several devices."""

from __future__ import annotations

import warnings

import pytest
import torch
from all_ops import AllOps, assert_same
from published import PUBLISHED
from samples import STORAGE, make_list, make_rows, wide

from dldr_ext import PBFGS, Subspace, ops

pytestmark = [pytest.mark.cuda, pytest.mark.needs_gpu, pytest.mark.usefixtures("gpu")]
dtypes = pytest.mark.parametrize("dtype", STORAGE, ids=str)
SHORT = [torch.bfloat16, torch.int8]
# Clock cycles, a second or more: work that the stream is busy with meanwhile.
LONG, SECONDS = 10**8, 3 * 10**9


def values(case: AllOps) -> list[torch.Tensor]:
    inputs = [case.basis, *case.tensors, *case.other, case.theta, case.coordinates, case.c]
    return [*inputs, case.origin, case.direction]


def spoil(tensors):
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(0x7E) if tensor.itemsize == 1 else tensor.fill_(torch.nan)


@pytest.mark.parametrize("kind", ["cut", "strided", "many"])
@dtypes
def test_work_is_queued_on_the_current_stream(dtype, kind):
    """Inputs arrive late on a side stream and are spoiled behind the calls."""
    case = AllOps(dtype, 20_011, 6, kind)
    expected = case.now()
    real = [tensor.clone() for tensor in values(case)]
    spoil(values(case))
    case.fresh_outputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        for tensor, value in zip(values(case), real, strict=True):
            tensor.copy_(value)
        found = case.results(case.run())
        spoil(values(case))
    side.synchronize()
    assert_same(found, expected)


@pytest.mark.parametrize("kind", ["cut", "mixed", "strided", "many"])
@dtypes
def test_captured_graphs_replay_with_other_inputs(dtype, kind):
    """Lists inside the kernels' arguments, and longer ones (many: 5,000 tensors)."""
    case = AllOps(dtype, 20_011, 6, kind)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        case.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.run()
    for _ in range(3):
        case.fresh_inputs()
        case.fresh_outputs()
        spoil(found.values())
        graph.replay()
        replayed = case.results(found)
        assert_same(replayed, case.now())


@dtypes
def test_a_whole_step_in_one_graph(dtype):
    """Gradients to parameters without the host, H learning on the way."""
    n, d = 20_011, 6
    basis, scale = make_rows(d, n, dtype)
    origin, gradients = torch.randn(n, dtype=wide(dtype)), make_list("mixed", n)
    params = [torch.empty_like(t) for t in make_list("cut", n)]
    initial, c = torch.full((d,), 0.5, dtype=torch.float64), torch.randn(2, d).double()
    theta, s = torch.zeros(2, d, dtype=torch.float64)
    H = initial.diag()

    def step():
        c[0] = c[1]
        c[1] = ops.project(basis, gradients, scale=scale)
        p, _ = torch.ops.dldr_ext.quasi_newton_(
            H, initial, c[1], s, c[1] - c[0], c[0], fresh=False, damped=True, published=False
        )
        s.copy_(p)
        theta.add_(p)
        ops.reconstruct_(params, origin, basis, theta, scale=scale)

    state = [c, theta, s, H]
    step()
    before = [tensor.clone() for tensor in state]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    runs = []
    for run in (step, graph.replay):
        torch.manual_seed(0)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        for _ in range(3):
            for gradient in gradients:
                gradient.normal_()
            spoil(params)
            run()
        runs.append([tensor.clone() for tensor in [*state, *params]])
    for eager, replayed in zip(*runs, strict=True):
        assert eager.isfinite().all() and torch.equal(eager, replayed)


def test_a_graph_keeps_no_pointer_into_host_memory():
    """The list that was captured is gone, and its memory written over, before the replay."""
    n, d = 20_011, 6
    basis, _ = make_rows(d, n, torch.bfloat16)
    tensors = [torch.randn(1) for _ in range(2_000)] + [torch.randn(n - 2_000)]
    expected = ops.project(basis, tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        c = ops.project(basis, list(tensors))
    for _ in range(20):  # other lists pass through the same host memory
        ops.project(basis, [torch.zeros(1) for _ in range(2_000)] + [torch.zeros(n - 2_000)])
    c.fill_(torch.nan)
    graph.replay()
    assert torch.equal(c, expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("kind", ["cut", "strided", "many"])
@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_no_call_waits_for_the_device(dtype, kind):
    case = AllOps(dtype, 20_011, 6, kind)
    expected = case.now()  # memory that it needs is cached now
    case.fresh_outputs()
    torch.cuda.synchronize()
    torch.cuda._sleep(SECONDS)
    slept = torch.cuda.Event()
    slept.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = case.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not slept.query(), "a call came back only when earlier work was done"
    assert_same(case.results(found), expected)


@pytest.mark.parametrize("options", [{}, PUBLISHED], ids=str)
def test_a_step_of_pbfgs_waits_once_a_trial(options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
    inputs, labels = torch.randn(256, 20), torch.randint(3, (256,))
    subspace = Subspace.random(model.parameters(), 8)
    optimizer = PBFGS(model.parameters(), subspace, **options)

    def closure():
        return torch.nn.functional.cross_entropy(model(inputs), labels)

    for _ in range(3):
        optimizer.step(closure)
    for _ in range(5):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                optimizer.step(closure)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [str(w.message) for w in found if "synchronizing" in str(w.message)]
        assert optimizer.status.moved
        assert 1 <= len(waits) <= optimizer.history[-1].trials, waits


def test_memory_of_a_call_is_given_back():
    case = AllOps(torch.bfloat16, 300_007, 9, "many")
    case.run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        case.run()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_inductor():
    """As people compile on a GPU (aot_eager: test_ops_torch.py)."""
    basis, _ = make_rows(4, 700, torch.bfloat16)
    theta, origin = torch.randn(4), torch.randn(700)
    params = [torch.empty(300), torch.empty(20, 20)]

    def step(origin, basis, theta, tensors, params):
        c = ops.project(basis, [t * 2 for t in tensors])
        ops.reconstruct_(params, origin, basis, theta)
        return c * 3, ops.reconstruct(origin, basis, theta - 0.1 * c)

    tensors = [torch.randn(300), torch.randn(20, 20)]
    expected = step(origin, basis, theta, tensors, params)
    written = [p.clone() for p in params]
    for p in params:
        p.fill_(torch.nan)
    found = torch.compile(step, fullgraph=True)(origin, basis, theta, tensors, params)
    for a, b in zip([*expected, *written], [*found, *params], strict=True):
        torch.testing.assert_close(a, b)


def test_mixed_devices_are_refused():
    basis, tensors = torch.randn(4, 600), [torch.randn(600)]
    theta = torch.randn(4)
    before = tensors[0].clone()
    with pytest.raises(ValueError, match=r"project: .*basis on cpu.*tensors\[0\] on cuda:0"):
        ops.project(basis.cpu(), tensors)
    with pytest.raises(ValueError, match=r"project: .*basis on cuda:0.*tensors\[0\] on cpu"):
        ops.project(basis, [tensors[0].cpu()])
    with pytest.raises(ValueError, match=r"reconstruct_: .*params\[0\] on cuda:0.*theta on cpu"):
        ops.reconstruct_(tensors, None, basis, theta.cpu())
    with pytest.raises(ValueError, match=r"trial_: .*params\[0\] on cuda:0.*point on cpu"):
        ops.trial_(tensors, before.cpu(), before, 0.5)
    quantized = torch.ones(4, 600, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"project: .*basis on cuda:0.*scale on cpu"):
        ops.project(quantized, tensors, scale=torch.ones(4, 3, device="cpu"))
    rows, gram = torch.ones(2, 600), torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"gram_append_: .*snapshots on cuda:0.*gram on cpu"):
        ops.gram_append_(rows, gram.cpu(), 1, tensors, before)
    assert torch.equal(tensors[0], before) and bool((rows == 1).all())
    assert ops.project(basis, tensors).isfinite().all()  # no error is left for the next launch


two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")


@two_devices
def test_two_gpus_are_not_mixed():
    basis, tensors = torch.randn(4, 600), [torch.randn(600, device="cuda:1")]
    with pytest.raises(ValueError, match=r"basis on cuda:0.*tensors\[0\] on cuda:1"):
        ops.project(basis, tensors)


@two_devices
@dtypes
def test_the_tensors_device_is_used(dtype):
    with torch.device("cuda:1"):
        case = AllOps(dtype, 20_011, 6, "many")
        with torch.cuda.device(1):
            expected = case.now()
        with torch.cuda.device(0):
            found = case.now()
            assert torch.cuda.current_device() == 0
    assert_same(found, expected)
