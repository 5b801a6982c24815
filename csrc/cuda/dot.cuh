// Products of stored rows with a few right-hand sides in one read of the rows: the heart of project
// and gram_block. One block of threads takes one tile of the elements and a range of the rows; the
// sums of the tiles are added up in float64 by a second kernel (sum_tiles), in an order that
// depends on n alone.
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
constexpr int kDotBlocks = K == 1   ? 4
                           : K == 2 ? 3
                                    : 2;
// Rows times right-hand sides of one block: bounds the sums kept in shared memory.
constexpr int kDotSums = 512;
static_assert(kDotTile % (kDotThreads * kPack<int8_t>) == 0, "whole packs for every thread");
static_assert(kDotTile % kScaleBlock == 0, "whole blocks of scales");

// Where element i of a staged tile lies: the quarters of all packs apart, so that threads with
// neighbouring packs read from different banks.
template <class T>
__device__ inline int slot(int i) {
  constexpr int kParts = kPack<T> / kPart<T>, kPacks = static_cast<int>(kDotTile) / kPack<T>;
  const int pack = i / kPack<T>, part = i % kPack<T> / kPart<T>;
  return kParts == 1 ? i : (part * kPacks + pack) * kPart<T> + i % kPart<T>;
}

// Sources of right-hand sides: put(position, value) for elements [at, at + count) of vector k.
struct FromList {
  int64_t first = 0;
  template <class A, class T, class Put>
  __device__ static void stage(const FromList& from, const DeviceList& list, const Rows& rows,
                               int k, int64_t at, int count, Put&& put) {
    read_list<A>(list, (from.first + k) * rows.numel + at, count, put);
  }
};
struct FromRows {
  int64_t first = 0;
  template <class A, class T, class Put>
  __device__ static void stage(const FromRows& from, const DeviceList&, const Rows& rows, int k,
                               int64_t at, int count, Put&& put) {
    const int64_t row = from.first + k;
    const T* data = static_cast<const T*>(rows.data) + row * rows.stride + at;
    const float* scale = nullptr;
    if constexpr (scaled_format<T>::value) {
      scale = rows.scale + row * ceil_div(rows.numel, kScaleBlock) + at / kScaleBlock;
    }
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kDotThreads) {
      A value = widen(data[i]);
      if constexpr (scaled_format<T>::value) value *= scale[i / kScaleBlock];
      put(i, value);
    }
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
    DLDR_UNROLL_TWICE  // 16 loads of a thread in flight
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
          const A* from = x + k * kDotTile + slot<T>(i + part * kPart<T>);
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

// partials[(k * total + r) * tiles + tile] for K right-hand sides and the rows of this block.
template <class T, int K, class Source>
__global__ void __launch_bounds__(kDotThreads, kDotBlocks<K>)
    dot_tile(const __grid_constant__ DeviceList list, const Rows rows, const Source source,
             int64_t total, int rows_per_block, bool aligned, double* partials) {
  using A = typename wide_of<T>::type;
  DLDR_DYNAMIC_SHARED(A, x);
  A* const sums = x + K * kDotTile;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kDotTile;
  const int count = static_cast<int>(min_of(kDotTile, rows.numel - at));
  for (int k = 0; k < K; ++k) {
    A* const to = x + k * kDotTile;
    Source::template stage<A, T>(source, list, rows, k, at, count,
                                 [&](int i, A value) { to[slot<T>(i)] = value; });
    for (int i = count + static_cast<int>(threadIdx.x); i < kDotTile; i += kDotThreads) {
      to[slot<T>(i)] = 0;
    }
  }
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.y) * rows_per_block;
  const int rows_here = static_cast<int>(min_of(rows_per_block, total - first));
  if (aligned && count == kDotTile) {
    dot_rows<T, K, true>(rows, first, rows_here, at, count, x, sums);
  } else {
    dot_rows<T, K, false>(rows, first, rows_here, at, count, x, sums);
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < K * rows_here; i += kDotThreads) {
    const int k = i / rows_here, r = i % rows_here;
    double sum = 0;
    for (int w = 0; w < kDotWarps; ++w) sum += sums[(k * kDotWarps + w) * rows_here + r];
    partials[(k * total + first + r) * gridDim.x + blockIdx.x] = sum;
  }
}

inline int64_t dot_tiles(const Rows& rows) { return ceil_div(rows.numel, kDotTile); }

// Doubles that dot_tile writes for `lists` right-hand sides and `total` rows.
inline int64_t dot_partials(const Rows& rows, int64_t total, int64_t lists) {
  return dot_tiles(rows) * total * lists;
}

// Queues dot_tile for K right-hand sides and the first `total` rows.
template <class T, int K, class Source>
void launch_dot(const char* what, const DeviceList& list, const Rows& rows, const Source& source,
                int64_t total, double* partials, const Stream& stream) {
  using A = typename wide_of<T>::type;
  // Few tiles: more blocks for each, so that the device is full; every one takes whole groups of
  // rows.
  const int64_t wanted = 4 * stream.multiprocessors;
  const int64_t groups = ceil_div(total, kDotRows);
  const int64_t splits =
      min_of(groups, max_of(ceil_div(total * K, kDotSums), ceil_div(wanted, dot_tiles(rows))));
  const int64_t per_block = ceil_div(groups, splits) * kDotRows;
  const int64_t shared =
      static_cast<int64_t>(sizeof(A)) * (K * kDotTile + kDotWarps * K * per_block);
  launch(what, dot_tile<T, K, Source>, make_grid(dot_tiles(rows), ceil_div(total, per_block)),
         kDotThreads, shared, stream.handle, list, rows, source, total, static_cast<int>(per_block),
         rows_aligned(rows), partials);
}

// Threads of sum_tiles.
constexpr int kSumThreads = 256;

// put(v, sum over the tiles of partials[v * tiles + tile]) for v = 0 ... grid - 1.
template <class Put>
__global__ void __launch_bounds__(kSumThreads)
    sum_tiles(const double* partials, int64_t tiles, const Put put) {
  __shared__ double warps[kSumThreads / kWarp];
  const int64_t v = blockIdx.x;
  double sum[1] = {0};
  for (int64_t i = threadIdx.x; i < tiles; i += kSumThreads) sum[0] += partials[v * tiles + i];
  sum_lanes(sum);
  if (lane() == 0) warps[warp()] = sum[0];
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kSumThreads / kWarp; ++w) sum[0] += warps[w];
    put(v, sum[0]);
  }
}

// Calls f with the number of right-hand sides to take next as a compile-time constant; four at most
// in float64, whose registers would not hold eight.
template <class A, class F>
void dispatch_lists(int64_t left, F&& f) {
  if constexpr (sizeof(A) == 4) {
    if (left >= 8) return f(std::integral_constant<int, 8>());
  }
  if (left >= 4) return f(std::integral_constant<int, 4>());
  if (left >= 2) return f(std::integral_constant<int, 2>());
  return f(std::integral_constant<int, 1>());
}

}  // namespace dldr::cuda
