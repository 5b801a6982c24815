// The Gram matrix of all rows at once. A warp owns the products of two groups of rows: its lanes
// take every 32nd element and keep all products of the pair in registers. Sums are float32 over
// kGramTile elements and float64 beyond.
#include "cuda_kernels.h"
#include "formats.cuh"
#include "lanes.cuh"

namespace dldr::cuda {
namespace {

constexpr int kGramThreads = 512;
// Elements of each row that are staged at a time, twice: the next ones are on their way meanwhile,
// in at most two packs of each thread.
template <class T>
constexpr int kGramColumns = sizeof(T) >= 4 ? 64 : 128;
constexpr int64_t kGramTile = 4096;
// Groups of a quarter of the matrix; two quarters are staged.
constexpr int kGramGroups = 4;
constexpr int kGramSlots = 2 * kGramGroups;
// So many groups fit with all their pairs into one block of threads (15 warps).
constexpr int kGramSingle = 5;

// Rows of a group.
template <class A>
constexpr int kGroup = sizeof(A) == 8 ? 4 : 8;

struct GramShape {
  int64_t groups;
  int64_t sets;    // blocks of threads for each chunk
  int64_t chunks;  // of the elements
  int64_t tiles_per_chunk;
};

GramShape gram_shape(const Rows& rows) {
  const int64_t group = rows.dtype == DType::f64 ? kGroup<double> : kGroup<float>;
  GramShape shape;
  shape.groups = ceil_div(rows.rows, group);
  const int64_t quarters = ceil_div(shape.groups, kGramGroups);
  shape.sets = shape.groups <= kGramSingle ? 1 : quarters * (quarters + 1) / 2;
  // Enough blocks for any device; their sums stay small beside the rows.
  const int64_t tiles = ceil_div(rows.numel, kGramTile);
  shape.tiles_per_chunk = max_of(1, ceil_div(tiles * shape.sets, 1024));
  shape.chunks = ceil_div(tiles, shape.tiles_per_chunk);
  return shape;
}

// The numbers (i, j), j <= i, of pair number p of a lower triangle.
__device__ inline void triangle(int64_t p, int64_t& i, int64_t& j) {
  i = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(p) + 1.0) - 1.0) / 2.0);
  while (i * (i + 1) / 2 > p) --i;
  while ((i + 1) * (i + 2) / 2 <= p) ++i;
  j = p - i * (i + 1) / 2;
}

// Which groups a block stages, and which two of them a warp multiplies.
struct Pairing {
  int64_t low, high;  // the first groups of the lower and of the upper slots
  int slots;          // groups staged
  int a, b;           // slots of this warp
  bool active;

  __device__ Pairing(int64_t groups, int64_t set) {
    int64_t i, j, x, y;
    triangle(warp(), x, y);
    a = static_cast<int>(x);
    b = static_cast<int>(y);
    if (groups <= kGramSingle) {
      low = 0;
      high = kGramGroups;
      slots = static_cast<int>(groups);
    } else {
      triangle(set, i, j);
      low = j * kGramGroups;
      high = i * kGramGroups;
      slots = i == j ? kGramGroups : kGramSlots;
      if (i != j) {
        a = kGramGroups + warp() / kGramGroups;
        b = warp() % kGramGroups;
      }
    }
    active = a < slots && group(a) < groups;
    if (!active) a = b = 0;
  }
  __device__ int64_t group(int slot) const {
    return slot < kGramGroups ? low + slot : high + slot - kGramGroups;
  }
};

// partials[chunk * rows * rows + i * rows + j], j <= i, and some above the diagonal.
template <class T>
__global__ void __launch_bounds__(kGramThreads)
    gram_chunk(const Rows rows, int64_t groups, int64_t tiles_per_chunk, bool aligned,
               double* partials) {
  using A = typename wide_of<T>::type;
  constexpr int M = kGroup<A>;
  constexpr int kColumns = kGramColumns<T>;
  constexpr int kRowPacks = kColumns / kPack<T>;
  constexpr int kMyPacks = kGramSlots * M * kRowPacks / kGramThreads;
  constexpr int kMySums = M * M >= kWarp ? M * M / kWarp : 1;
  static_assert(kGramSlots * M * kRowPacks % kGramThreads == 0, "whole packs for every thread");
  DLDR_DYNAMIC_SHARED(A, shared);  // [2][kGramSlots * M][kColumns]
  constexpr int kStage = kGramSlots * M * kColumns;
  const Pairing pairing(groups, blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t blocks = ceil_div(rows.numel, kScaleBlock);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tiles_per_chunk * kGramTile;
  const int64_t end = min_of(rows.numel, begin + tiles_per_chunk * kGramTile);

  Pack packs[kMyPacks];
  float scales[kMyPacks];
  // Pack u of this thread: its row among the staged ones, and its first element.
  const auto place = [&](int u, int& row, int& column) {
    const int p = u * kGramThreads + thread;
    row = p / kRowPacks;
    column = p % kRowPacks * kPack<T>;
  };
  const auto load = [&](int64_t at) {
    DLDR_UNROLL
    for (int u = 0; u < kMyPacks; ++u) {
      int slot_row, column;
      place(u, slot_row, column);
      packs[u] = {};
      scales[u] = 0;
      if (slot_row >= pairing.slots * M || at + column >= end) continue;
      const int64_t row = min_of(pairing.group(slot_row / M) * M + slot_row % M, rows.rows - 1);
      const int64_t i = at + column;
      const T* from = static_cast<const T*>(rows.data) + row * rows.stride + i;
      const int left = static_cast<int>(min_of(kPack<T>, end - i));
      packs[u] = aligned && left == kPack<T> ? load_pack(from) : load_pack_guarded(from, left);
      if constexpr (scaled_format<T>::value) scales[u] = rows.scale[row * blocks + i / kScaleBlock];
    }
  };
  const auto store = [&](A* stage) {
    DLDR_UNROLL
    for (int u = 0; u < kMyPacks; ++u) {
      int slot_row, column;
      place(u, slot_row, column);
      DLDR_UNROLL
      for (int part = 0; part < kPack<T> / kPart<T>; ++part) {
        A values[kPart<T>];
        widen_part<T>(packs[u], part, values);
        DLDR_UNROLL
        for (int e = 0; e < kPart<T>; ++e) {
          if constexpr (scaled_format<T>::value) values[e] *= scales[u];
          stage[slot_row * kColumns + column + part * kPart<T> + e] = values[e];
        }
      }
    }
  };

  double sums[kMySums] = {};
  A acc[M * M] = {};
  const auto flush = [&] {
    sum_lanes(acc);
    DLDR_UNROLL
    for (int k = 0; k < kMySums; ++k) sums[k] += acc[k];
    DLDR_UNROLL
    for (int k = 0; k < M * M; ++k) acc[k] = 0;
  };

  load(begin);
  store(shared);
  __syncthreads();
  unsigned turn = 0;
  for (int64_t at = begin; at < end; at += kColumns, ++turn) {
    const A* const now = shared + turn % 2 * kStage;
    const bool more = at + kColumns < end;
    if (more) load(at + kColumns);
    if (pairing.active) {
      const A* const left = now + pairing.a * M * kColumns + lane();
      const A* const right = now + pairing.b * M * kColumns + lane();
      DLDR_NO_UNROLL  // the registers are full
          for (int c = 0; c < kColumns; c += kWarp) {
        A x[M], y[M];
        DLDR_UNROLL
        for (int k = 0; k < M; ++k) {
          x[k] = left[k * kColumns + c];
          y[k] = right[k * kColumns + c];
        }
        DLDR_UNROLL
        for (int i = 0; i < M; ++i) {
          DLDR_UNROLL
          for (int j = 0; j < M; ++j) acc[i * M + j] = fma(x[i], y[j], acc[i * M + j]);
        }
      }
    }
    if ((at + kColumns - begin) % kGramTile == 0 || !more) flush();
    if (more) store(shared + (turn + 1) % 2 * kStage);
    __syncthreads();
  }

  if (!pairing.active) return;
  double* const out = partials + static_cast<int64_t>(blockIdx.x) * rows.rows * rows.rows;
  if (M * M < kWarp && lane() % (kWarp / (M * M < kWarp ? M * M : 1)) != 0) return;
  DLDR_UNROLL
  for (int k = 0; k < kMySums; ++k) {
    const int p = first_sum<M * M>(lane()) + k;
    const int64_t i = pairing.group(pairing.a) * M + p / M,
                  j = pairing.group(pairing.b) * M + p % M;
    if (i < rows.rows && j < rows.rows) out[i * rows.rows + j] = sums[k];
  }
}

constexpr int kSumGramThreads = 256;

// Adds up the chunks in order; writes each sum on both sides of the diagonal.
__global__ void sum_gram(const double* partials, int64_t chunks, int64_t rows, double* out) {
  const int64_t p = static_cast<int64_t>(blockIdx.x) * kSumGramThreads + threadIdx.x;
  const int64_t i = p / rows, j = p % rows;
  if (i >= rows || j > i) return;
  double sum = 0;
  for (int64_t c = 0; c < chunks; ++c) sum += partials[c * rows * rows + p];
  out[i * rows + j] = sum;
  out[j * rows + i] = sum;
}

}  // namespace

int64_t gram_scratch(const Rows& snapshots) {
  return 8 * gram_shape(snapshots).chunks * snapshots.rows * snapshots.rows;
}

void gram(const Rows& snapshots, double* out, void* scratch, const Stream& stream) {
  const GramShape shape = gram_shape(snapshots);
  double* const partials = static_cast<double*>(scratch);
  if (shape.chunks > 0) {
    dispatch(snapshots.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      using A = typename wide_of<T>::type;
      const int64_t shared =
          static_cast<int64_t>(sizeof(A)) * 2 * kGramSlots * kGroup<A> * kGramColumns<T>;
      launch("gram", gram_chunk<T>, make_grid(shape.chunks, shape.sets), kGramThreads, shared,
             stream.handle, snapshots, shape.groups, shape.tiles_per_chunk, rows_aligned(snapshots),
             partials);
    });
  }
  launch("gram", sum_gram, make_grid(ceil_div(snapshots.rows * snapshots.rows, kSumGramThreads)),
         kSumGramThreads, 0, stream.handle, partials, shape.chunks, snapshots.rows, out);
}

}  // namespace dldr::cuda
