"""One contract for every kind of store."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dldr_ext.collectives.partition import ColumnShard
from dldr_ext.collectives.process_group import Ranks
from dldr_ext.trajectory.stores import (
    DiskStore,
    HostStore,
    MemoryStore,
    ShardedStore,
    StoreSpec,
    new_store,
)

NUMEL, CAPACITY = 1000, 6
KINDS = ["memory", "host", "disk", "sharded"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8]
CPU = torch.device("cpu")


@pytest.fixture
def alone():
    """A group of this process alone, whose collectives run."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def weights(t, dtype=torch.float32):
    generator = torch.Generator().manual_seed(t)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    flat = torch.randn(NUMEL, generator=generator, dtype=wide)
    return [flat[:600].view(20, 30), flat[600:]]


def in_pieces(tensors, size=256):
    pieces = torch.cat([t.reshape(-1) for t in tensors]).split(size)
    return [(slice(i * size, i * size + len(p)), p) for i, p in enumerate(pieces)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestStore:
    @pytest.fixture
    def make(self, kind, dtype, tmp_path, alone):
        made = []

        def make(anchor=None):
            spec = StoreSpec(NUMEL, CAPACITY, dtype, CPU)
            if kind == "host":
                made.append(HostStore(spec, anchor))
            else:
                path = tmp_path / str(len(made)) if kind == "disk" else None
                ranks = shard = None
                if kind == "sharded":
                    ranks = Ranks("Trajectory", dist.group.WORLD, CPU)
                    shard = ColumnShard(weights(0, dtype), None, 0, 1)
                storage = "disk" if kind == "disk" else "device"
                made.append(new_store(storage, path, spec, {}, anchor, ranks, shard))
            return made[-1]

        yield make
        for store in made:
            store.close()

    @pytest.fixture
    def reference(self, dtype):
        """Rows in memory, each multiplied in the pass that stores it."""
        store = MemoryStore(StoreSpec(NUMEL, CAPACITY, dtype, CPU))
        for t in range(4):
            assert store.append(weights(t, dtype))
        return store

    def test_the_kind_is_what_is_tested(self, make, kind):
        kinds = {"memory": MemoryStore, "host": HostStore, "disk": DiskStore}
        assert type(make()) is kinds.get(kind, ShardedStore)

    def test_rows_anchor_and_gram_matrix(self, make, reference, dtype):
        store = make()
        for t in range(4):
            assert store.append(weights(t, dtype)) and store.length == t + 1
        assert torch.equal(store.anchor, torch.cat([w.reshape(-1) for w in weights(0, dtype)]))
        assert torch.equal(store.snapshots()[:], reference.snapshots()[:])
        assert torch.equal(store.gram(), reference.gram())
        assert torch.equal(store.exact_gram(), reference.exact_gram())

    def test_rows_that_come_in_pieces(self, make, reference, dtype):
        """Before and after whole ones, to the bit the same."""
        store = make()
        for t in range(4):
            row = weights(t, dtype)
            assert store.append(row) if t == 2 else store.append_pieces(in_pieces(row))
        assert torch.equal(store.anchor, reference.anchor)
        assert torch.equal(store.snapshots()[:], reference.snapshots()[:])
        assert torch.equal(store.gram(), reference.gram())

    def test_products_that_are_deferred(self, make, reference, dtype):
        store = make()
        store.defer_products()
        for t in range(4):
            assert store.append_pieces(in_pieces(weights(t, dtype)))
        assert torch.equal(store.gram(), reference.gram())

    def test_undo(self, make, reference, dtype):
        store = make()
        for t in (0, 1, 5):
            store.append(weights(t, dtype))
        store.gram()
        store.undo()
        assert store.length == 2 and store.cost.snapshots == 2
        for t in (2, 3):
            store.append(weights(t, dtype))
        assert torch.equal(store.snapshots()[:], reference.snapshots()[:])
        assert torch.equal(store.gram(), reference.gram())

    def test_the_first_row_undone_takes_its_anchor_along(self, make, dtype):
        store = make()
        store.append(weights(3, dtype))
        store.undo()
        assert store.length == 0 and store.anchor is None
        store.append(weights(0, dtype))
        assert not store.snapshots()[:].any()

    def test_a_given_anchor_stays(self, make, dtype):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        anchor = torch.full((NUMEL,), 0.5, dtype=wide)
        store = make(anchor)
        store.append(weights(1, dtype))
        store.undo()
        assert torch.equal(store.anchor, anchor)
        store.append([torch.full_like(w, 1.5) for w in weights(0, dtype)])
        assert torch.equal(store.snapshots()[:].to(wide), torch.ones(1, NUMEL, dtype=wide))

    @pytest.mark.parametrize("pieces", [False, True])
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_what_is_not_finite_is_not_stored(self, make, reference, dtype, bad, pieces):
        store = make()
        for t in range(3):
            store.append(weights(t, dtype))
        before = store.gram().clone()
        row = weights(3, dtype)
        row[1][7] = bad
        assert not (store.append_pieces(in_pieces(row)) if pieces else store.append(row))
        assert store.length == 3 and store.cost.snapshots == 3
        assert torch.equal(store.gram(), before)
        store.append(weights(3, dtype))
        assert torch.equal(store.gram(), reference.gram())

    @pytest.mark.parametrize("in_place", [True, False])
    @pytest.mark.parametrize("count", [5, 6])
    def test_thinned(self, make, dtype, count, in_place):
        """As if rows of odd index had never been stored; again and again."""
        store, expected = make(), MemoryStore(StoreSpec(NUMEL, CAPACITY, dtype, CPU))
        for t in range(count):
            store.append(weights(t, dtype))
        store.settle()
        store.thin(in_place)
        for t in (0, 2, 4, 7, 8):
            expected.append(weights(t, dtype))
        for t in (7, 8):
            store.append(weights(t, dtype))
        assert torch.equal(store.snapshots()[:], expected.snapshots()[:])
        assert torch.equal(store.gram(), expected.gram())
        assert torch.equal(store.anchor, expected.anchor)
        store.thin(in_place)
        store.thin(in_place)
        assert store.length == 2 and torch.equal(store.gram(), expected.gram()[::4, ::4])
        assert torch.equal(store.snapshots()[1], expected.snapshots()[4])

    def test_cost(self, make, dtype):
        store = make()
        for t in range(3):
            store.append(weights(t, dtype))
        store.gram()
        scale = 4 * 4 if dtype == torch.int8 else 0
        assert store.cost.snapshots == 3 and store.cost.seconds > 0
        assert store.cost.bytes_written == 3 * (NUMEL * dtype.itemsize + scale)
        assert store.cost.bytes_read > 0

    def test_a_transaction_keeps_what_was_stored(self, make, dtype):
        store = make()
        row = weights(0, dtype)
        with store.transaction("record", row):
            store.append(row)
        store.settle()
        assert store.length == 1
        with pytest.raises(ValueError, match="no more"), store.transaction("record", row):
            raise ValueError("no more")
        assert store.length == 1
