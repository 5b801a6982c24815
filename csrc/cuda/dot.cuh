// Products of stored rows with a few right-hand sides in one read of the rows: the heart of project
// and gram_block. One block of threads takes one chunk of the elements, tile by tile, and a range
// of the rows. The sums of the chunks are added up in float64: where there are few, by the last
// block that is done with its rows, else by a second kernel (sum_chunks). Every order depends on n
// alone.
#pragma once

#include "dot_mma.cuh"

namespace dldr::cuda {

// sums[(k * rows_here + r) * kDotWarps + warp] += this warp's part of the products of row first + r
// with staged vector k over the tile at `at`.
template <class T, int K, bool kWhole, class A>
__device__ inline void dot_rows(const Rows& rows, int64_t first, int rows_here, int64_t at,
                                int count, const A* x, double* sums) {
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
          const A* from = x + k * kDotStride + SlotOf<T>::of(i + part * kPart<T>);
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
    }
    DLDR_UNROLL
    for (int k = 0; k < K; ++k) {
      sum_lanes(acc[k]);
      const int mine = r + first_sum<kDotRows>(lane());
      if (lane() % (kWarp / kDotRows) == 0 && mine < rows_here) {
        sums[(k * rows_here + mine) * kDotWarps + warp()] += acc[k][0];
      }
    }
  }
}

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

// put(k, row, sum) for at most K right-hand sides and the rows of this part, or their sums by
// chunk; on tensor cores with G groups of rows at a time.
template <class T, int K, int G, class Source, class Put>
__global__ void __launch_bounds__(kDotThreads, kDotBlocks<T, K>)
    dot_chunk(const __grid_constant__ DeviceList list, const Rows rows, const Source source,
              const DotPart part, bool aligned, const Put put) {
  using A = typename wide_of<T>::type;
  DLDR_DYNAMIC_SHARED(A, x);                                           // [K][kDotStride]
  double* const sums = reinterpret_cast<double*>(x + K * kDotStride);  // [numbers][kDotWarps]
  __shared__ bool last;
  const int64_t ahead = static_cast<int64_t>(blockIdx.y) * part.rows_per_block;
  const int rows_here = static_cast<int>(min_of(part.rows_per_block, part.rows - ahead));
  const int tiles = static_cast<int>(
      min_of(part.tiles_per_chunk, dot_tiles(rows) - blockIdx.x * part.tiles_per_chunk));
  const int numbers = part.lists * rows_here;
  for (int i = static_cast<int>(threadIdx.x); i < kDotWarps * numbers; i += kDotThreads) {
    sums[i] = 0;
  }
  // Little is kept from tile to tile: the registers are full of sums.
  DLDR_NO_UNROLL
  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t at = (blockIdx.x * part.tiles_per_chunk + tile) * kDotTile;
    const int count = static_cast<int>(min_of(kDotTile, rows.numel - at));
    DLDR_NO_UNROLL
    for (int k = 0; k < part.lists; ++k) {
      A* const to = x + k * kDotStride;
      Source::template stage<A, T>(source, list, rows, k, at, count, to);
      for (int i = count + static_cast<int>(threadIdx.x); i < kDotTile; i += kDotThreads) {
        to[SlotOf<T>::of(i)] = 0;
      }
    }
    __syncthreads();
    const auto multiply = [&](auto whole) {
      if constexpr (kOnTensorCores<T>) {
        dot_groups<T, G, decltype(whole)::value>(rows, part.first + ahead, rows_here, part.lists,
                                                 at, count, x, sums);
      } else {
        dot_rows<T, K, decltype(whole)::value>(rows, part.first + ahead, rows_here, at, count, x,
                                               sums);
      }
    };
    if (aligned && count == kDotTile) {
      multiply(std::true_type());
    } else {
      multiply(std::false_type());
    }
    __syncthreads();
  }
  for (int i = static_cast<int>(threadIdx.x); i < numbers; i += kDotThreads) {
    const int64_t k = i / rows_here, r = ahead + i % rows_here;
    double sum = 0;
    for (int w = 0; w < kDotWarps; ++w) sum += sums[i * kDotWarps + w];
    part.partials[(k * part.rows + r) * gridDim.x + blockIdx.x] = sum;
  }
  if (part.arrived == nullptr) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = is_last(part.arrived + blockIdx.y, part.mark, gridDim.x);
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int i = warp(); i < numbers; i += kDotWarps) {
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

inline Plan dot_plan(int64_t numel) {
  return make_plan(numel, kDotTile, max_of(kDotChunks, numel / kDotChunk));
}

// Rows that one launch takes for so many right-hand sides.
inline int64_t dot_rows_at_once(const Plan& plan, int64_t lists) {
  return max_of(1, kDotScratch / (8 * lists * max_of(plan.chunks, 1)));
}

// Bytes of scratch memory for `total` rows and at most `lists` right-hand sides at a time.
inline int64_t dot_scratch(const Rows& rows, int64_t total, int64_t lists) {
  const int64_t each = lists * dot_plan(rows.numel).chunks;  // sums of a row
  return 8 * (min_of(total * each, max_of(kDotScratch / 8, each)) + ceil_div(total, kDotRows));
}

// Queues what calls put(k, row, sum) for at most K right-hand sides and the first `total` rows.
template <class T, int K, class Source, class Put>
void launch_dot(const char* what, const DeviceList& list, const Rows& rows, const Source& source,
                int lists, int64_t total, void* scratch, const Stream& stream, const Put& put) {
  using A = typename wide_of<T>::type;
  const Plan plan = dot_plan(rows.numel);
  const bool one_launch = plan.chunks > 0 && plan.chunks <= kDotFewChunks;
  const int64_t at_once = dot_rows_at_once(plan, lists);
  DotPart part;
  part.lists = lists;
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
      part.arrived = reinterpret_cast<uint64_t*>(part.partials + lists * part.rows * plan.chunks);
      part.mark = launch_mark();
    }
    if (plan.chunks > 0) {
      // Always the most that any number of rows needs: two threads of the host may be here at once,
      // and what one asks for is also the other's.
      constexpr int64_t kShared = static_cast<int64_t>(sizeof(A)) * K * kDotStride +
                                  static_cast<int64_t>(sizeof(double)) * kDotWarps * kDotSums;
      const auto queue = [&](auto* kernel) {
        launch(what, kernel, make_grid(plan.chunks, ceil_div(part.rows, per_block)), kDotThreads,
               kShared, stream.handle, list, rows, source, part, rows_aligned(rows), put);
      };
      if (!kOnTensorCores<T> || per_block <= kDotFewGroups * kMmaGroup) {
        queue(dot_chunk<T, K, kDotFewGroups, Source, Put>);
      } else {
        queue(dot_chunk < T, K, kOnTensorCores<T> ? kDotGroups : kDotFewGroups, Source, Put >);
      }
    }
    if (!one_launch) {
      launch(what, sum_chunks<Put>, make_grid(lists * part.rows), kSumThreads, 0, stream.handle,
             part.partials, plan.chunks, part.first, part.rows, put);
    }
  }
}

// Calls f(K, number) with how many right-hand sides to take next, and a compile-time constant that
// is at least as much; off the tensor cores the same, and four at most in float64, whose registers
// would not hold eight.
template <class T, class F>
void dispatch_lists(int64_t left, F&& f) {
  const auto take = [&](auto most) { f(most, static_cast<int>(min_of(most(), left))); };
  if constexpr (kOnTensorCores<T>) {
    if (left > 2) return take(std::integral_constant<int, 8>());
  } else {
    if constexpr (sizeof(T) == 4) {
      if (left >= 8) return take(std::integral_constant<int, 8>());
    }
    if (left >= 4) return take(std::integral_constant<int, 4>());
  }
  if (left >= 2) return take(std::integral_constant<int, 2>());
  return take(std::integral_constant<int, 1>());
}

}  // namespace dldr::cuda
