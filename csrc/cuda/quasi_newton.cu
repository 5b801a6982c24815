#include "../quasi_newton.h"

#include "lanes.cuh"
#include "list.cuh"

namespace dldr::cuda {
namespace {

constexpr int kTeamThreads = 512;
constexpr int kTeamWarps = kTeamThreads / kWarp;

// The threads of one block; sums in a fixed order, the same number for every thread.
template <class Self>
struct Threads : Division<Self> {
  double* warps;  // kTeamWarps numbers in shared memory

  __device__ explicit Threads(double* warps_) : warps(warps_) {}

  template <class F>
  __device__ void each(int count, F&& f) const {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kTeamThreads) f(i);
  }
  // A warp for each row.
  template <class F>
  __device__ void grid(int rows, int columns, F&& f) const {
    for (int i = warp(); i < rows; i += kTeamWarps) {
      for (int j = lane(); j < columns; j += kWarp) f(i, j);
    }
  }
  template <class F>
  __device__ double sum(int count, F&& f) const {
    double mine[1] = {0};
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kTeamThreads) mine[0] += f(i);
    sum_lanes(mine);
    __syncthreads();  // the sums before have been read
    if (lane() == 0) warps[warp()] = mine[0];
    __syncthreads();
    double total = 0;
    for (int w = 0; w < kTeamWarps; ++w) total += warps[w];
    return total;
  }
  __device__ void sync() const { __syncthreads(); }
};
struct Team : Threads<Team> {
  using Threads::Threads;
};

// The same where H is in global memory: what a thread loads does not wait for what it stores, and H
// is factorized P columns at a time, in shared memory, so that each of its numbers is read and
// written d / P times.
template <int P>
struct PanelTeam : Threads<PanelTeam<P>> {
  static constexpr int kStride = P + 1;  // of a row of the panel; the last number is free
  static constexpr int kLoads = 8;       // of a thread that are under way together
  static constexpr int kRows = 4;        // of the matrix that a warp takes at a time
  double* panel;                         // [d][kStride]

  __device__ PanelTeam(double* warps, double* panel_) : Threads<PanelTeam>(warps), panel(panel_) {}

  // numbers[u] = row[j + u kWarp], of `count`; zeros behind the last.
  __device__ static void load(const double* row, int j, int count, double (&numbers)[kLoads]) {
    DLDR_UNROLL
    for (int u = 0; u < kLoads; ++u) {
      const int at = j + u * kWarp;
      numbers[u] = at < count ? row[at] : 0;
    }
  }

  __device__ void multiply(const double* H, int d, const double* x, double* to) const {
    for (int i = warp(); i < d; i += kTeamWarps) {
      double sum[1] = {0};
      for (int j = lane(); j < d; j += kLoads * kWarp) {
        double row[kLoads], other[kLoads];
        load(H + i * d, j, d, row);
        load(x, j, d, other);
        DLDR_UNROLL
        for (int u = 0; u < kLoads; ++u) sum[0] += row[u] * other[u];
      }
      sum_lanes(sum);
      if (lane() == 0) to[i] = sum[0];
    }
    this->sync();
  }

  __device__ void add(double* H, int d, const double* s, const double* v) const {
    for (int i = warp(); i < d; i += kTeamWarps) {
      const double si = s[i], vi = v[i];
      for (int j = lane(); j < d; j += kLoads * kWarp) {
        double row[kLoads], sj[kLoads], vj[kLoads];
        load(H + i * d, j, d, row);
        load(s, j, d, sj);
        load(v, j, d, vj);
        DLDR_UNROLL
        for (int u = 0; u < kLoads; ++u) {
          if (j + u * kWarp < d) H[i * d + j + u * kWarp] = row[u] + (si * vj[u] + vi * sj[u]);
        }
      }
    }
    this->sync();
  }

  __device__ double pivots(const double* H, int d, double* factor, double*) const {
    const int thread = static_cast<int>(threadIdx.x);
    double smallest = INFINITY, largest = 0;
    // What is left of the matrix: its lower triangle, from (k, k) on.
    const double* matrix = H;
    for (int k = 0; k < d; k += P, matrix = factor) {
      const int left = d - k, width = left < P ? left : P;
      for (int e = thread; e < left * P; e += kTeamThreads) {
        const int i = e / P, p = e % P;
        panel[i * kStride + p] = p <= i ? matrix[(k + i) * d + k + p] : 0;
      }
      this->sync();
      for (int p = 0; p < width; ++p) {
        const double pivot = panel[p * kStride + p];
        if (!(pivot > 0)) return INFINITY;
        smallest = pivot < smallest ? pivot : smallest;
        largest = pivot > largest ? pivot : largest;
        // Column p stays as it is.
        for (int i = p + 1 + thread; i < left; i += kTeamThreads) {
          double* const row = panel + i * kStride;
          const double quotient = row[p] / pivot;
          for (int j = p + 1; j < width && j <= i; ++j) row[j] -= quotient * panel[j * kStride + p];
        }
        this->sync();
      }
      if (left <= P) break;
      if (thread < P) {
        panel[thread * kStride + P] = 1 / std::sqrt(panel[thread * kStride + thread]);
      }
      this->sync();
      for (int e = P * P + thread; e < left * P; e += kTeamThreads) {
        panel[e / P * kStride + e % P] *= panel[e % P * kStride + P];
      }
      this->sync();
      for (int i = P + kRows * warp(); i < left; i += kRows * kTeamWarps) {
        for (int j = P + lane(); j < left && j < i + kRows; j += kWarp) {
          double rest[kRows];
          DLDR_UNROLL
          for (int u = 0; u < kRows; ++u) {
            rest[u] = i + u < left && j <= i + u ? matrix[(k + i + u) * d + k + j] : 0;
          }
#if defined(__CUDACC__)
#pragma unroll 4
#endif
          for (int p = 0; p < P; ++p) {
            const double factor_j = panel[j * kStride + p];
            DLDR_UNROLL
            for (int u = 0; u < kRows; ++u) {
              const int row = i + u < left ? i + u : i;
              rest[u] -= panel[row * kStride + p] * factor_j;
            }
          }
          DLDR_UNROLL
          for (int u = 0; u < kRows; ++u) {
            if (i + u < left && j <= i + u) factor[(k + i + u) * d + k + j] = rest[u];
          }
        }
      }
      this->sync();
    }
    return largest / smallest;
  }
};

// The largest d whose H fits into the shared memory of every device, and whose H and factor do.
constexpr int64_t kSharedDim = 112;
constexpr int64_t kSharedBoth = 76;
// Columns of a panel, and up to which d.
constexpr int kPanel = 16, kNarrowPanel = 8;
constexpr int64_t kPanelDim = 512;

// H and the scratch memory are in shared memory where they fit: every step of a factorization waits
// for the one before. Else P columns of it are.
template <int P>
__global__ void __launch_bounds__(kTeamThreads, 1) quasi_newton_block(const QuasiNewtonArgs args) {
  __shared__ double warps[kTeamWarps];
  DLDR_DYNAMIC_SHARED(double, shared);
  if constexpr (P > 0) {
    const PanelTeam<P> team(warps, shared);
    QuasiNewton<PanelTeam<P>>(team, args).run();
  } else {
    const Team team(warps);
    const int size = static_cast<int>(args.dim * args.dim);
    QuasiNewtonArgs near = args;
    near.H = shared;
    if (args.dim <= kSharedBoth) near.scratch = shared + size;
    read_run<double>(args.H, size, [&](int i, double value) { shared[i] = value; });
    team.sync();
    QuasiNewton<Team>(team, near).run();
    team.sync();
    team.each(size, [&](int i) { args.H[i] = shared[i]; });
  }
}

}  // namespace

void quasi_newton(const QuasiNewtonArgs& args, const Stream& stream) {
  const auto queue = [&](auto* kernel, int64_t numbers) {
    launch("quasi_newton_", kernel, dim3(1), kTeamThreads, 8 * numbers, stream.handle, args);
  };
  if (args.dim <= kSharedDim) {
    constexpr int64_t kBoth = kSharedBoth * kSharedBoth + quasi_newton_scratch(kSharedBoth);
    queue(quasi_newton_block<0>, max_of(kSharedDim * kSharedDim, kBoth));
  } else if (args.dim <= kPanelDim) {
    queue(quasi_newton_block<kPanel>, kPanelDim * PanelTeam<kPanel>::kStride);
  } else {
    queue(quasi_newton_block<kNarrowPanel>, kMaxDim * PanelTeam<kNarrowPanel>::kStride);
  }
}

}  // namespace dldr::cuda
