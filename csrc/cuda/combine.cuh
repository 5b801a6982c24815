// Combinations of stored rows for one tile: the heart of reconstruct. Every thread owns one pack of
// the elements and goes down the rows.
#pragma once

#include "list.cuh"

namespace dldr::cuda {

constexpr int kCombineThreads = 128;
// Blocks that share a multiprocessor: 3 x 128 threads x 8 loads of 16 bytes are 48 KiB in flight.
constexpr int kCombineBlocks = 3;
// Fewer threads, hence smaller tiles, where the elements would not fill the device otherwise.
constexpr int kCombineThreadsSmall = 64;
// Rows whose loads are in flight together.
constexpr int kCombineRows = 8;

template <class T>
DLDR_HOST_DEVICE constexpr int64_t combine_tile(int64_t threads) {
  return threads * kPack<T>;
}

inline int combine_threads(int64_t numel, int pack, const Stream& stream) {
  return numel >= 2 * stream.multiprocessors * kCombineThreads * pack ? kCombineThreads
                                                                      : kCombineThreadsSmall;
}

// sums[k][e] = sum over r of theta[k * rows + r] * rows[r][i + e] for the pack at element i.
template <class T, int K, bool kWhole, class A>
__device__ inline void combine_rows(const Rows& rows, int64_t i, const A* theta,
                                    A (&sums)[K][kPack<T>]) {
  constexpr int kParts = kPack<T> / kPart<T>;
  const T* data = static_cast<const T*>(rows.data) + i;
  const int left = static_cast<int>(min_of(kPack<T>, rows.numel - i));
  const int64_t blocks = ceil_div(rows.numel, kScaleBlock);
  const float* scale = scaled_format<T>::value ? rows.scale + i / kScaleBlock : nullptr;
  for (int64_t r = 0; r < rows.rows; r += kCombineRows) {
    // All loads first: whatever waits for one of them comes after the last. Rows that are not there
    // are zero times zero.
    Pack packs[kCombineRows];
    A scaled[kCombineRows];
    DLDR_UNROLL
    for (int j = 0; j < kCombineRows; ++j) {
      const bool there = r + j < rows.rows;
      const int64_t row = there ? r + j : rows.rows - 1;
      packs[j] = {};
      if (there) {
        packs[j] = kWhole ? load_pack(data + row * rows.stride)
                          : load_pack_guarded(data + row * rows.stride, left);
      }
      scaled[j] = 1;
      if constexpr (scaled_format<T>::value) scaled[j] = scale[row * blocks];
    }
    A factor[K][kCombineRows];
    DLDR_UNROLL
    for (int j = 0; j < kCombineRows; ++j) {
      const bool there = r + j < rows.rows;
      const int64_t row = there ? r + j : rows.rows - 1;
      DLDR_UNROLL
      for (int k = 0; k < K; ++k) {
        factor[k][j] = there ? theta[k * rows.rows + row] * scaled[j] : A(0);
      }
    }
    DLDR_UNROLL
    for (int j = 0; j < kCombineRows; ++j) {
      DLDR_UNROLL
      for (int part = 0; part < kParts; ++part) {
        A row[kPart<T>];
        widen_part<T>(packs[j], part, row);
        DLDR_UNROLL
        for (int k = 0; k < K; ++k) {
          DLDR_UNROLL
          for (int e = 0; e < kPart<T>; ++e) {
            A& sum = sums[k][part * kPart<T> + e];
            sum = fma(factor[k][j], row[e], sum);
          }
        }
      }
    }
  }
}

// out[k * tile + ...] = the sums of this thread's pack, for all threads of the block: K tiles of
// P theta in shared memory, the first with the origin (which may be null) added last: the small sum
// keeps its own precision. `theta` (K * rows numbers) is copied to shared memory first.
template <class T, int K, class A>
__device__ inline void combine_tile_into(const Rows& rows, int64_t at, bool aligned,
                                         const A* origin, const A* const (&theta)[K],
                                         A* shared_theta, A* out) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int tile = threads * kPack<T>;
  const int64_t i = at + thread * kPack<T>;
  A start[kPack<T>] = {};
  // Under way beside the thetas.
  if (origin != nullptr) load_numbers(origin + i, rows.numel - i, aligned, start);
  for (int k = 0; k < K; ++k) {
    read_run<A>(theta[k], static_cast<int>(rows.rows),
                [&](int r, A value) { shared_theta[k * rows.rows + r] = value; });
  }
  __syncthreads();
  A sums[K][kPack<T>] = {};
  if (aligned && i + kPack<T> <= rows.numel) {
    combine_rows<T, K, true>(rows, i, shared_theta, sums);
  } else if (i < rows.numel) {
    combine_rows<T, K, false>(rows, i, shared_theta, sums);
  }
  DLDR_UNROLL
  for (int k = 0; k < K; ++k) {
    DLDR_UNROLL
    for (int e = 0; e < kPack<T>; ++e) {
      out[k * tile + thread * kPack<T> + e] =
          k == 0 && origin != nullptr ? start[e] + sums[k][e] : sums[k][e];
    }
  }
  __syncthreads();
}

// Bytes of shared memory that combine_tile_into works in.
template <class T>
int64_t combine_shared(const Rows& rows, int64_t threads, int64_t thetas) {
  return static_cast<int64_t>(sizeof(typename wide_of<T>::type)) * thetas *
         (combine_tile<T>(threads) + rows.rows);
}

}  // namespace dldr::cuda
