// Sums over the lanes of a warp of several numbers at once.
#pragma once

#include "launch.cuh"

namespace dldr::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

// Sums values[i] over the lanes, for N (a power of two) numbers: instead of N trees, each step
// halves what a lane keeps. Afterwards lane l holds the sums of numbers first_sum<N>(l) + [0,
// max(N / 32, 1)) at the front of its values. The order is fixed.
template <int N, class A>
__device__ inline void sum_lanes(A (&values)[N]) {
  int width = N / 2;
  DLDR_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2, width /= 2) {
    if (width > 0) {
      const bool upper = (lane() & mask) != 0;
      DLDR_UNROLL
      for (int i = 0; i < N / 2; ++i) {
        if (i < width) {
          const A give = upper ? values[i] : values[i + width];
          const A keep = upper ? values[i + width] : values[i];
          values[i] = keep + __shfl_xor_sync(kAllLanes, give, mask);
        }
      }
    } else {
      values[0] += __shfl_xor_sync(kAllLanes, values[0], mask);
    }
  }
}

template <int N>
__device__ inline int first_sum(int lane) {
  return N >= kWarp ? lane * (N / kWarp) : lane / (kWarp / N);
}

// Numbers in a triangle of so many rows, and of row i those before it.
DLDR_HOST_DEVICE constexpr int64_t triangle_size(int64_t rows) { return rows * (rows + 1) / 2; }

// The numbers (i, j), j <= i, of pair number p of a lower triangle.
__device__ inline void triangle(int64_t p, int64_t& i, int64_t& j) {
  i = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(p) + 1.0) - 1.0) / 2.0);
  while (i * (i + 1) / 2 > p) --i;
  while ((i + 1) * (i + 2) / 2 <= p) ++i;
  j = p - i * (i + 1) / 2;
}

}  // namespace dldr::cuda
