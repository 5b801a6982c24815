#include "../quasi_newton.h"

#include "cuda_kernels.h"
#include "lanes.cuh"

namespace dldr::cuda {
namespace {

constexpr int kTeamThreads = 512;

// The threads of one block; sums in a fixed order, the same number for every thread.
struct Team {
  double* warps;  // kTeamThreads / kWarp numbers in shared memory

  template <class F>
  __device__ void each(int64_t count, F&& f) const {
    for (int64_t i = threadIdx.x; i < count; i += kTeamThreads) f(i);
  }
  template <class F>
  __device__ double sum(int64_t count, F&& f) const {
    double mine[1] = {0};
    for (int64_t i = threadIdx.x; i < count; i += kTeamThreads) mine[0] += f(i);
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

__global__ void __launch_bounds__(kTeamThreads, 1) quasi_newton_block(const QuasiNewtonArgs args) {
  __shared__ double warps[kTeamThreads / kWarp];
  const Team team{warps};
  QuasiNewton<Team>(team, args).run();
}

}  // namespace

void quasi_newton(const QuasiNewtonArgs& args, const Stream& stream) {
  launch("quasi_newton_", quasi_newton_block, dim3(1), kTeamThreads, 0, stream.handle, args);
}

}  // namespace dldr::cuda
