#include "../quasi_newton.h"

#include "lanes.cuh"
#include "list.cuh"

namespace dldr::cuda {
namespace {

constexpr int kTeamThreads = 512;

// The threads of one block; sums in a fixed order, the same number for every thread.
struct Team {
  double* warps;  // kTeamThreads / kWarp numbers in shared memory

  template <class F>
  __device__ void each(int count, F&& f) const {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kTeamThreads) f(i);
  }
  // A warp for each row.
  template <class F>
  __device__ void grid(int rows, int columns, F&& f) const {
    for (int i = warp(); i < rows; i += kTeamThreads / kWarp) {
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
    for (int w = 0; w < kTeamThreads / kWarp; ++w) total += warps[w];
    return total;
  }
  __device__ void sync() const { __syncthreads(); }
};

// The largest d whose H fits into the shared memory of every device, and whose H and factor do.
constexpr int64_t kSharedDim = 112;
constexpr int64_t kSharedBoth = 76;

// H and the scratch memory are in shared memory where they fit: every step of a factorization waits
// for the one before.
template <bool kShared>
__global__ void __launch_bounds__(kTeamThreads, 1) quasi_newton_block(const QuasiNewtonArgs args) {
  __shared__ double warps[kTeamThreads / kWarp];
  const Team team{warps};
  if constexpr (!kShared) {
    QuasiNewton<Team>(team, args).run();
  } else {
    DLDR_DYNAMIC_SHARED(double, H);
    const int size = static_cast<int>(args.dim * args.dim);
    QuasiNewtonArgs near = args;
    near.H = H;
    if (args.dim <= kSharedBoth) near.scratch = H + size;
    read_run<double>(args.H, size, [&](int i, double value) { H[i] = value; });
    team.sync();
    QuasiNewton<Team>(team, near).run();
    team.sync();
    team.each(size, [&](int i) { args.H[i] = H[i]; });
  }
}

}  // namespace

void quasi_newton(const QuasiNewtonArgs& args, const Stream& stream) {
  if (args.dim <= kSharedDim) {
    constexpr int64_t kOne = kSharedDim * kSharedDim;
    constexpr int64_t kBoth = kSharedBoth * kSharedBoth + quasi_newton_scratch(kSharedBoth);
    launch("quasi_newton_", quasi_newton_block<true>, dim3(1), kTeamThreads,
           8 * max_of(kOne, kBoth), stream.handle, args);
  } else {
    launch("quasi_newton_", quasi_newton_block<false>, dim3(1), kTeamThreads, 0, stream.handle,
           args);
  }
}

}  // namespace dldr::cuda
