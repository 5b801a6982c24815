#include "cuda_kernels.h"
#include "formats.cuh"
#include "lanes.cuh"

namespace dldr::cuda {
namespace {

constexpr int kFormThreads = 256;
constexpr int kFormWarps = kFormThreads / kWarp;
// A block takes kFormColumns elements of kFormRows rows of the result; a warp its share of the
// rows, a lane every 32nd element.
constexpr int kFormColumns = 128;
constexpr int kFormLaneColumns = kFormColumns / kWarp;
constexpr int kFormLaneRows = 4;
constexpr int kFormRows = kFormWarps * kFormLaneRows;
// Snapshots that are staged at a time.
constexpr int kFormSnapshots = 32;

// Sums are float64: with small singular values the coefficients are large and cancel. The snapshots
// are widened once, on their way into shared memory.
template <class T>
__global__ void __launch_bounds__(kFormThreads)
    form_tile(const Rows rows, const double* coefficients, int64_t dim, void* out, DType out_dtype,
              int64_t out_stride, bool aligned) {
  __shared__ double x[kFormSnapshots][kFormColumns];
  constexpr int kRowPacks = kFormColumns / kPack<T>;
  constexpr int kMyPacks = ceil_div(kFormSnapshots * kRowPacks, kFormThreads);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kFormColumns;
  const int count = static_cast<int>(min_of(kFormColumns, rows.numel - at));
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kFormRows + warp() * kFormLaneRows;
  const int64_t blocks = ceil_div(rows.numel, kScaleBlock);
  double sums[kFormLaneRows][kFormLaneColumns] = {};
  for (int64_t t = 0; t < rows.rows; t += kFormSnapshots) {
    const int here = static_cast<int>(min_of(kFormSnapshots, rows.rows - t));
    // All of a thread's packs are under way together.
    Pack packs[kMyPacks];
    float scales[kMyPacks];
    const auto load = [&](auto whole) {
      DLDR_UNROLL
      for (int u = 0; u < kMyPacks; ++u) {
        const int p = u * kFormThreads + static_cast<int>(threadIdx.x);
        const int s = p / kRowPacks, column = p % kRowPacks * kPack<T>;
        packs[u] = {};
        scales[u] = 0;
        if (s < here && column < count) {
          const T* from = static_cast<const T*>(rows.data) + (t + s) * rows.stride + at + column;
          packs[u] =
              decltype(whole)::value ? load_pack(from) : load_pack_guarded(from, count - column);
          if constexpr (scaled_format<T>::value) {
            scales[u] = rows.scale[(t + s) * blocks + (at + column) / kScaleBlock];
          }
        }
      }
    };
    if (aligned && count == kFormColumns) {
      load(std::true_type());
    } else {
      load(std::false_type());
    }
    DLDR_UNROLL
    for (int u = 0; u < kMyPacks; ++u) {
      const int p = u * kFormThreads + static_cast<int>(threadIdx.x);
      const int s = p / kRowPacks, column = p % kRowPacks * kPack<T>;
      if (s >= here) continue;
      DLDR_UNROLL
      for (int part = 0; part < kPack<T> / kPart<T>; ++part) {
        typename wide_of<T>::type values[kPart<T>];
        widen_part<T>(packs[u], part, values);
        DLDR_UNROLL
        for (int e = 0; e < kPart<T>; ++e) {
          if constexpr (scaled_format<T>::value) values[e] *= scales[u];
          x[s][column + part * kPart<T> + e] = static_cast<double>(values[e]);
        }
      }
    }
    __syncthreads();
    for (int s = 0; s < here; ++s) {
      double column[kFormLaneColumns];
      DLDR_UNROLL
      for (int c = 0; c < kFormLaneColumns; ++c) column[c] = x[s][lane() + c * kWarp];
      DLDR_UNROLL
      for (int r = 0; r < kFormLaneRows; ++r) {
        const int64_t row = min_of(first + r, dim - 1);
        const double factor = coefficients[row * rows.rows + t + s];
        DLDR_UNROLL
        for (int c = 0; c < kFormLaneColumns; ++c) sums[r][c] = fma(factor, column[c], sums[r][c]);
      }
    }
    __syncthreads();
  }
  dispatch_float(out_dtype, [&](auto* type) {
    auto* const to = static_cast<decltype(type)>(out);
    DLDR_UNROLL
    for (int r = 0; r < kFormLaneRows; ++r) {
      DLDR_UNROLL
      for (int c = 0; c < kFormLaneColumns; ++c) {
        const int i = lane() + c * kWarp;
        if (first + r < dim && i < count) {
          narrow(sums[r][c], to[(first + r) * out_stride + at + i]);
        }
      }
    }
  });
}

}  // namespace

void form_basis(const Rows& snapshots, const double* coefficients, int64_t dim, void* out,
                DType out_dtype, int64_t out_stride, const Stream& stream) {
  if (snapshots.numel == 0) return;
  dispatch(snapshots.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch("form_basis", form_tile<T>,
           make_grid(ceil_div(snapshots.numel, kFormColumns), ceil_div(dim, kFormRows)),
           kFormThreads, 0, stream.handle, snapshots, coefficients, dim, out, out_dtype, out_stride,
           rows_aligned(snapshots));
  });
}

}  // namespace dldr::cuda
