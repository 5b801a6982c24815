// Products of stored rows with a few right-hand sides in one read of the rows: the heart of project
// and gram_block. One block of threads takes one chunk of the elements, tile by tile, and a range
// of the rows. The sums of the chunks are added up in float64: where there are few, by the last
// block that is done with its rows, else by a second kernel (sum_chunks). Every order depends on n
// alone.
#pragma once

#include "lanes.cuh"
#include "list.cuh"

namespace dldr::cuda {

constexpr int kDotThreads = 128;
constexpr int kDotWarps = kDotThreads / kWarp;
// Rows that are read side by side: 8 loads of 16 bytes in flight for each thread.
constexpr int kDotRows = 8;
// Blocks that share a multiprocessor, so that the loads of some hide the staging of others; many
// right-hand sides need the registers.
template <int K>
constexpr int kDotBlocks = K == 1 ? 3 : 2;
// Rows times right-hand sides of one block: bounds the sums kept in shared memory. Whole groups of
// rows for any number of right-hand sides.
constexpr int kDotSums = 512;
// Most chunks. Bytes of their sums: more rows than fit are taken in several launches. Chunks, about
// a million elements, whose sums the same launch adds up. Under emulation small cases go every way.
constexpr int64_t kDotChunks = 8192;
#if defined(DLDR_EMULATED_CUDA)
constexpr int64_t kDotScratch = 4 << 10, kDotFewChunks = 4;
#else
constexpr int64_t kDotScratch = 32 << 20, kDotFewChunks = 512;
#endif
static_assert(kDotTile % (kDotThreads * kPack<int8_t>) == 0, "whole packs for every thread");
static_assert(kDotTile % kScaleBlock == 0, "whole blocks of scales");

// Where element i of a staged tile lies: the quarters of all packs apart, so that threads with
// neighbouring packs read from different banks.
template <int kPackOf, int kPartOf>
struct Slot {
  __device__ static int of(int i) {
    constexpr int kParts = kPackOf / kPartOf, kPacks = static_cast<int>(kDotTile) / kPackOf;
    const int pack = i / kPackOf, part = i % kPackOf / kPartOf;
    return kParts == 1 ? i : (part * kPacks + pack) * kPartOf + i % kPartOf;
  }
};
template <class T>
using SlotOf = Slot<kPack<T>, kPart<T>>;

// Sources of right-hand sides: elements [at, at + count) of vector k to their slots.
struct FromList {
  int64_t first = 0;
  template <class A, class T>
  __device__ static void stage(const FromList& from, const DeviceList& list, const Rows& rows,
                               int k, int64_t at, int count, A* to) {
    read_list<A>(list, (from.first + k) * rows.numel + at, count,
                 [&](int i, A value) { to[SlotOf<T>::of(i)] = value; });
  }
};
struct FromRows {
  int64_t first = 0;
  template <class A, class T>
  __device__ static void stage(const FromRows& from, const DeviceList&, const Rows& rows, int k,
                               int64_t at, int count, A* to) {
    const int64_t row = from.first + k;
    const T* data = static_cast<const T*>(rows.data) + row * rows.stride + at;
    const float* scale = nullptr;
    if constexpr (scaled_format<T>::value) {
      scale = rows.scale + row * ceil_div(rows.numel, kScaleBlock) + at / kScaleBlock;
    }
    read_run<A>(data, count, [&](int i, A value) {
      if constexpr (scaled_format<T>::value) value *= scale[i / kScaleBlock];
      to[SlotOf<T>::of(i)] = value;
    });
  }
};

// sums[(k * kDotWarps + warp) * rows_here + r] = this warp's part of the products of rows
// [first, first + rows_here) with the K staged vectors.
template <class T, int K, bool kWhole, class A>
__device__ inline void dot_rows(const Rows& rows, int64_t first, int rows_here, int64_t at,
                                int count, const A* x, A* sums) {
  constexpr int kPacks = static_cast<int>(kDotTile) / (kDotThreads * kPack<T>);  // of a thread
  constexpr int kParts = kPack<T> / kPart<T>;
  const T* data = static_cast<const T*>(rows.data) + at;
  for (int r = 0; r < rows_here; r += kDotRows) {
    A acc[K][kDotRows] = {};
    // 16 loads of a thread in flight, 8 where the sums take the registers.
#if defined(__CUDACC__)
#pragma unroll(K < 8 ? 2 : 1)
#endif
    for (int u = 0; u < kPacks; ++u) {
      const int i = (u * kDotThreads + static_cast<int>(threadIdx.x)) * kPack<T>;
      Pack packs[kDotRows];
      DLDR_UNROLL
      for (int j = 0; j < kDotRows; ++j) {
        // Behind the last row it is read again, and its sum dropped.
        const T* row = data + (first + (r + j < rows_here ? r + j : rows_here - 1)) * rows.stride;
        packs[j] = kWhole ? load_pack(row + i) : load_pack_guarded(row + i, count - i);
      }
      DLDR_UNROLL
      for (int part = 0; part < kParts; ++part) {
        A g[K][kPart<T>];
        DLDR_UNROLL
        for (int k = 0; k < K; ++k) {
          const A* from = x + k * kDotTile + SlotOf<T>::of(i + part * kPart<T>);
          DLDR_UNROLL
          for (int e = 0; e < kPart<T>; ++e) g[k][e] = from[e];
        }
        DLDR_UNROLL
        for (int j = 0; j < kDotRows; ++j) {
          A row[kPart<T>];
          widen_part<T>(packs[j], part, row);
          DLDR_UNROLL
          for (int k = 0; k < K; ++k) {
            DLDR_UNROLL
            for (int e = 0; e < kPart<T>; ++e) acc[k][j] = fma(row[e], g[k][e], acc[k][j]);
          }
        }
      }
      if constexpr (scaled_format<T>::value) {
        static_assert(kPacks == 1, "one block of scales for each sum");
        const int64_t blocks = ceil_div(rows.numel, kScaleBlock);
        const int64_t block = min_of((at + i) / kScaleBlock, blocks - 1);
        DLDR_UNROLL
        for (int j = 0; j < kDotRows; ++j) {
          const int64_t row = first + (r + j < rows_here ? r + j : rows_here - 1);
          const float scale = rows.scale[row * blocks + block];
          DLDR_UNROLL
          for (int k = 0; k < K; ++k) acc[k][j] *= i < count ? scale : 0.0f;
        }
      }
    }
    DLDR_UNROLL
    for (int k = 0; k < K; ++k) {
      sum_lanes(acc[k]);
      const int mine = r + first_sum<kDotRows>(lane());
      if (lane() % (kWarp / kDotRows) == 0 && mine < rows_here) {
        sums[(k * kDotWarps + warp()) * rows_here + mine] = acc[k][0];
      }
    }
  }
}

DLDR_HOST_DEVICE inline int64_t dot_tiles(const Rows& rows) {
  return ceil_div(rows.numel, kDotTile);
}

// Which part of the sums a launch makes: rows [first, first + rows) of the products.
struct DotPart {
  int64_t first, rows;
  int rows_per_block;
  int64_t tiles_per_chunk;
  double* partials;   // [K][rows][chunks]
  uint64_t* arrived;  // one for every range of rows; null: a second kernel adds the chunks up
  uint64_t mark;      // of this launch
};

// Counts the calling blocks; whether this is the last. The count of a launch carries its mark:
// whatever memory held before counts as none. The last one leaves zeros for the next replay of a
// captured graph.
__device__ inline bool is_last(uint64_t* arrived, uint64_t mark, unsigned blocks) {
  auto* const word = reinterpret_cast<unsigned long long*>(arrived);
  unsigned long long seen = atomicAdd(word, 0ull);
  for (;;) {
    const unsigned long long count = (seen ^ mark) < kDotFewChunks ? (seen ^ mark) + 1 : 1;
    const unsigned long long before = atomicCAS(word, seen, count == blocks ? 0 : mark ^ count);
    if (before == seen) return count == blocks;
    seen = before;
  }
}

// The sum of `count` numbers in the order of one warp, in lane 0.
__device__ inline double warp_sum(const double* from, int64_t count) {
  double sum[1] = {0};
  for (int64_t i = lane(); i < count; i += kWarp) sum[0] += from[i];
  sum_lanes(sum);
  return sum[0];
}

// put(k, row, sum) for K right-hand sides and the rows of this part, or their sums by chunk.
template <class T, int K, class Source, class Put>
__global__ void __launch_bounds__(kDotThreads, kDotBlocks<K>)
    dot_chunk(const __grid_constant__ DeviceList list, const Rows rows, const Source source,
              const DotPart part, bool aligned, const Put put) {
  using A = typename wide_of<T>::type;
  // [K][kDotTile] elements, [kDotWarps][K * rows] sums of the warps, [K * rows] totals in double.
  DLDR_DYNAMIC_SHARED(A, x);
  __shared__ bool last;
  const int64_t ahead = static_cast<int64_t>(blockIdx.y) * part.rows_per_block;
  const int rows_here = static_cast<int>(min_of(part.rows_per_block, part.rows - ahead));
  A* const sums = x + K * kDotTile;
  double* const totals = reinterpret_cast<double*>(sums + kDotWarps * K * part.rows_per_block);
  const int tiles = static_cast<int>(
      min_of(part.tiles_per_chunk, dot_tiles(rows) - blockIdx.x * part.tiles_per_chunk));
  // Little is kept from tile to tile: the registers are full of sums.
  DLDR_NO_UNROLL
  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t at = (blockIdx.x * part.tiles_per_chunk + tile) * kDotTile;
    const int count = static_cast<int>(min_of(kDotTile, rows.numel - at));
    DLDR_NO_UNROLL
    for (int k = 0; k < K; ++k) {
      A* const to = x + k * kDotTile;
      Source::template stage<A, T>(source, list, rows, k, at, count, to);
      for (int i = count + static_cast<int>(threadIdx.x); i < kDotTile; i += kDotThreads) {
        to[SlotOf<T>::of(i)] = 0;
      }
    }
    __syncthreads();
    if (aligned && count == kDotTile) {
      dot_rows<T, K, true>(rows, part.first + ahead, rows_here, at, count, x, sums);
    } else {
      dot_rows<T, K, false>(rows, part.first + ahead, rows_here, at, count, x, sums);
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < K * rows_here; i += kDotThreads) {
      const int k = i / rows_here, r = i % rows_here;
      double sum = tile == 0 ? 0 : totals[i];
      for (int w = 0; w < kDotWarps; ++w) sum += sums[(k * kDotWarps + w) * rows_here + r];
      totals[i] = sum;
      if (tile + 1 == tiles) {
        part.partials[(k * part.rows + ahead + r) * gridDim.x + blockIdx.x] = sum;
      }
    }
  }
  if (part.arrived == nullptr) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = is_last(part.arrived + blockIdx.y, part.mark, gridDim.x);
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int i = warp(); i < K * rows_here; i += kDotWarps) {
    const int64_t k = i / rows_here, r = ahead + i % rows_here;
    const double sum = warp_sum(part.partials + (k * part.rows + r) * gridDim.x, gridDim.x);
    if (lane() == 0) put(k, part.first + r, sum);
  }
}

// Threads of sum_chunks.
constexpr int kSumThreads = 256;

// put(k, first + r, sum over the chunks of partials[(k * rows + r) * chunks + chunk]).
template <class Put>
__global__ void __launch_bounds__(kSumThreads)
    sum_chunks(const double* partials, int64_t chunks, int64_t first, int64_t rows, const Put put) {
  __shared__ double warps[kSumThreads / kWarp];
  const int64_t v = blockIdx.x;
  double sum[1] = {0};
  for (int64_t i = threadIdx.x; i < chunks; i += kSumThreads) sum[0] += partials[v * chunks + i];
  sum_lanes(sum);
  if (lane() == 0) warps[warp()] = sum[0];
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kSumThreads / kWarp; ++w) sum[0] += warps[w];
    put(v / rows, first + v % rows, sum[0]);
  }
}

inline Plan dot_plan(int64_t numel) { return make_plan(numel, kDotTile, kDotChunks); }

// Rows that one launch takes for so many right-hand sides.
inline int64_t dot_rows_at_once(const Plan& plan, int64_t lists) {
  return max_of(1, kDotScratch / (8 * lists * max_of(plan.chunks, 1)));
}

// Bytes of scratch memory for `total` rows and at most `lists` right-hand sides at a time.
inline int64_t dot_scratch(const Rows& rows, int64_t total, int64_t lists) {
  const Plan plan = dot_plan(rows.numel);
  const int64_t sums = lists * min_of(total, dot_rows_at_once(plan, lists)) * plan.chunks;
  return 8 * (sums + ceil_div(total, kDotRows));
}

// Queues what calls put(k, row, sum) for K right-hand sides and the first `total` rows.
template <class T, int K, class Source, class Put>
void launch_dot(const char* what, const DeviceList& list, const Rows& rows, const Source& source,
                int64_t total, void* scratch, const Stream& stream, const Put& put) {
  using A = typename wide_of<T>::type;
  const Plan plan = dot_plan(rows.numel);
  const bool one_launch = plan.chunks > 0 && plan.chunks <= kDotFewChunks;
  const int64_t at_once = dot_rows_at_once(plan, K);
  DotPart part;
  part.tiles_per_chunk = plan.tiles_per_chunk;
  part.partials = static_cast<double*>(scratch);
  for (part.first = 0; part.first < total; part.first += part.rows) {
    part.rows = min_of(at_once, total - part.first);
    // Few chunks: more blocks for each, so that the device is full; every one takes whole groups of
    // rows.
    const int64_t groups = ceil_div(part.rows, kDotRows);
    const int64_t wanted = ceil_div(4 * stream.multiprocessors, max_of(plan.chunks, 1));
    const int64_t splits = max_of(ceil_div(groups * kDotRows * K, kDotSums), wanted);
    const int64_t per_block = ceil_div(groups, splits) * kDotRows;
    part.rows_per_block = static_cast<int>(per_block);
    part.arrived = nullptr;
    if (one_launch) {
      part.arrived = reinterpret_cast<uint64_t*>(part.partials + K * part.rows * plan.chunks);
      part.mark = launch_mark();
    }
    if (plan.chunks > 0) {
      // Always the most that any number of rows needs: two threads of the host may be here at once,
      // and what one asks for is also the other's.
      constexpr int64_t kShared =
          static_cast<int64_t>(sizeof(A)) * (K * kDotTile + kDotWarps * kDotSums) +
          static_cast<int64_t>(sizeof(double)) * kDotSums;
      launch(what, dot_chunk<T, K, Source, Put>,
             make_grid(plan.chunks, ceil_div(part.rows, per_block)), kDotThreads, kShared,
             stream.handle, list, rows, source, part, rows_aligned(rows), put);
    }
    if (!one_launch) {
      launch(what, sum_chunks<Put>, make_grid(K * part.rows), kSumThreads, 0, stream.handle,
             part.partials, plan.chunks, part.first, part.rows, put);
    }
  }
}

// Calls f with the number of right-hand sides to take next as a compile-time constant; four at most
// in float64 and beside the widening of one-byte formats, whose registers would not hold eight.
template <class T, class F>
void dispatch_lists(int64_t left, F&& f) {
  if constexpr (sizeof(T) == 2 || sizeof(T) == 4) {
    if (left >= 8) return f(std::integral_constant<int, 8>());
  }
  if (left >= 4) return f(std::integral_constant<int, 4>());
  if (left >= 2) return f(std::integral_constant<int, 2>());
  return f(std::integral_constant<int, 1>());
}

}  // namespace dldr::cuda
