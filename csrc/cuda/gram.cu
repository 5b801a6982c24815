// The Gram matrix of all rows at once: on tensor cores (gram_mma.cuh), but for float64, and for
// float32 where sums are not finite there. There a warp owns the products of two groups of rows:
// its lanes take every 32nd element and keep all products of the pair in registers. Sums are
// float32 over kGramTile elements and float64 beyond.
#include "cuda_kernels.h"
#include "gram_mma.cuh"

namespace dldr::cuda {
namespace {

constexpr int kGramThreads = 512;
// Elements of each row that are staged at a time, twice: the next ones are on their way meanwhile,
// in at most two packs of each thread.
template <class T>
constexpr int kGramColumns = 64;
constexpr int64_t kGramTile = kMmaTile;
// Groups of a quarter of the matrix; two quarters are staged.
constexpr int kGramGroups = 4;
constexpr int kGramSlots = 2 * kGramGroups;
// So many groups fit with all their pairs into one block of threads (15 warps).
constexpr int kGramSingle = 5;

// Rows of a group.
template <class A>
constexpr int kGroup = sizeof(A) == 8 ? 4 : 8;

// Bytes of the sums of all chunks, which are as few as it takes, elements of a chunk that need not
// fit, and most chunks. Under emulation small cases have chunks of several tiles, and huge ones
// short chunks.
#if defined(DLDR_EMULATED_CUDA)
constexpr int64_t kGramScratch = 16 << 10, kGramChunk = 1 << 14, kGramChunks = 1 << 17;
#else
constexpr int64_t kGramScratch = 32 << 20, kGramChunk = int64_t{1} << 62, kGramChunks = 4096;
#endif
template <class T>
constexpr bool kGramOnTensorCores = !std::is_same_v<T, double>;

Plan gram_plan(const Rows& rows) {
  const int64_t most =
      max_of(kGramScratch / (8 * triangle_size(rows.rows)), rows.numel / kGramChunk);
  return make_plan(rows.numel, kGramTile, max_of(1, min_of(most, kGramChunks)));
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

// Sums of the chunk with number blockIdx.x / sets, a triangle of j <= i. Where tensor cores have
// made them, only a block with a sum that is not finite makes its own anew: there an infinity
// became NaN.
template <class T>
__global__ void __launch_bounds__(kGramThreads)
    gram_chunk(const Rows rows, int64_t groups, int64_t sets, int64_t tiles_per_chunk, bool aligned,
               const GramSums chunks) {
  using A = typename wide_of<T>::type;
  constexpr int M = kGroup<A>;
  constexpr int kColumns = kGramColumns<T>;
  constexpr int kRowPacks = kColumns / kPack<T>;
  constexpr int kMyPacks = kGramSlots * M * kRowPacks / kGramThreads;
  constexpr int kMySums = M * M >= kWarp ? M * M / kWarp : 1;
  static_assert(kGramSlots * M * kRowPacks % kGramThreads == 0, "whole packs for every thread");
  DLDR_DYNAMIC_SHARED(A, shared);  // [2][kGramSlots * M][kColumns]
  constexpr int kStage = kGramSlots * M * kColumns;
  const int64_t chunk = blockIdx.x / sets;
  const Pairing pairing(groups, blockIdx.x % sets);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t begin = chunk * tiles_per_chunk * kGramTile;
  const int64_t end = min_of(rows.numel, begin + tiles_per_chunk * kGramTile);
  // use(k, where it goes) for the sums that this thread has in the end.
  const auto each_mine = [&](auto&& use) {
    if (!pairing.active) return;
    if (M * M < kWarp && lane() % (kWarp / (M * M < kWarp ? M * M : 1)) != 0) return;
    DLDR_UNROLL
    for (int k = 0; k < kMySums; ++k) {
      const int p = first_sum<M * M>(lane()) + k;
      const int64_t i = pairing.group(pairing.a) * M + p / M,
                    j = pairing.group(pairing.b) * M + p % M;
      if (i < rows.rows && j <= i) use(k, chunks.at(chunk, i, j));
    }
  };
  if constexpr (kGramOnTensorCores<T>) {
    int lost = 0;
    each_mine([&](int, double sum) { lost |= sum - sum != 0; });
    if (__syncthreads_count(lost) == 0) return;
  }

  Pack packs[kMyPacks];
  // Pack u of this thread: its row among the staged ones, and its first element.
  const auto place = [&](int u, int& row, int& column) {
    const int p = u * kGramThreads + thread;
    row = p / kRowPacks;
    column = p % kRowPacks * kPack<T>;
  };
  const auto load = [&](int64_t at, auto whole) {
    DLDR_UNROLL
    for (int u = 0; u < kMyPacks; ++u) {
      int slot_row, column;
      place(u, slot_row, column);
      packs[u] = {};
      const int64_t i = at + column;
      if (slot_row < pairing.slots * M && i < end) {
        const int64_t row = min_of(pairing.group(slot_row / M) * M + slot_row % M, rows.rows - 1);
        const T* from = static_cast<const T*>(rows.data) + row * rows.stride + i;
        packs[u] = decltype(whole)::value
                       ? load_pack(from)
                       : load_pack_guarded(from, static_cast<int>(min_of(kPack<T>, end - i)));
      }
    }
  };
  const auto fill = [&](int64_t at) {
    if (aligned && at + kColumns <= end) {
      load(at, std::true_type());
    } else {
      load(at, std::false_type());
    }
  };
  const auto store = [&](A* stage) {
    DLDR_UNROLL
    for (int u = 0; u < kMyPacks; ++u) {
      int slot_row, column;
      place(u, slot_row, column);
      A values[kPack<T>];
      widen_part<T>(packs[u], 0, values);
      DLDR_UNROLL
      for (int e = 0; e < kPack<T>; ++e) stage[slot_row * kColumns + column + e] = values[e];
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

  fill(begin);
  store(shared);
  __syncthreads();
  unsigned turn = 0;
  for (int64_t at = begin; at < end; at += kColumns, ++turn) {
    const A* const now = shared + turn % 2 * kStage;
    const bool more = at + kColumns < end;
    if (more) fill(at + kColumns);
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

  each_mine([&](int k, double& sum) { sum = sums[k]; });
}

constexpr int kSumGramThreads = 256;

// Adds up the chunks in order; writes each sum on both sides of the diagonal.
__global__ void sum_gram(const GramSums chunks, int64_t count, double* out) {
  const int64_t p = static_cast<int64_t>(blockIdx.x) * kSumGramThreads + threadIdx.x;
  if (p >= triangle_size(chunks.rows)) return;
  int64_t i, j;
  triangle(p, i, j);
  double sum = 0;
  for (int64_t c = 0; c < count; ++c) sum += chunks.at(c, i, j);
  out[i * chunks.rows + j] = sum;
  out[j * chunks.rows + i] = sum;
}

template <class T>
void launch_chunks(const Rows& rows, const Plan& plan, const GramSums& chunks,
                   const Stream& stream) {
  const bool aligned = rows_aligned(rows);
  const auto queue = [&](auto* kernel, int64_t blocks, int threads, int64_t shared,
                         const auto&... arguments) {
    launch("gram", kernel, make_grid(blocks), threads, shared, stream.handle, rows, arguments...,
           plan.tiles_per_chunk, aligned, chunks);
  };
  if constexpr (kGramOnTensorCores<T>) {
    constexpr int64_t kBytes = kMmaWarps * static_cast<int64_t>(sizeof(double));
    const int64_t groups = ceil_div(rows.rows, kMmaGroup);
    if (groups <= 5) {
      queue(gram_few<T, 5>, plan.chunks, kMmaThreads, kBytes * MmaTiles<5, 5, true>::kSums);
    } else if (groups <= kMmaSide) {
      queue(gram_few<T, kMmaSide>, plan.chunks, kMmaThreads,
            kBytes * MmaTiles<kMmaSide, kMmaSide, true>::kSums);
    } else {
      const int64_t sides = ceil_div(groups, kMmaSide);
      queue(gram_many<T>, ceil_div(plan.chunks * sides * sides, kMmaWarps), kMmaThreads,
            kBytes * MmaTiles<kMmaSide, kMmaSide, true>::kSums, sides, plan.chunks);
    }
  }
  if constexpr (sizeof(T) >= 4) {
    using A = typename wide_of<T>::type;
    const int64_t groups = ceil_div(rows.rows, kGroup<A>);
    const int64_t quarters = ceil_div(groups, kGramGroups);
    const int64_t sets = groups <= kGramSingle ? 1 : quarters * (quarters + 1) / 2;
    queue(gram_chunk<T>, plan.chunks * sets, kGramThreads,
          static_cast<int64_t>(sizeof(A)) * 2 * kGramSlots * kGroup<A> * kGramColumns<T>, groups,
          sets);
  }
}

}  // namespace

int64_t gram_scratch(const Rows& snapshots) {
  const int64_t chunks = gram_plan(snapshots).chunks;
  return chunks <= 1 ? 0 : 8 * chunks * triangle_size(snapshots.rows);
}

void gram(const Rows& snapshots, double* out, void* scratch, const Stream& stream) {
  const Plan plan = gram_plan(snapshots);
  const bool square = plan.chunks <= 1;
  const GramSums chunks{square ? out : static_cast<double*>(scratch), snapshots.rows, square};
  dispatch(snapshots.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (plan.chunks > 0) launch_chunks<T>(snapshots, plan, chunks, stream);
  });
  launch("gram", sum_gram, make_grid(ceil_div(triangle_size(snapshots.rows), kSumGramThreads)),
         kSumGramThreads, 0, stream.handle, chunks, plan.chunks, out);
}

}  // namespace dldr::cuda
