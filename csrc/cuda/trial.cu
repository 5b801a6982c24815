#include "list.cuh"

namespace dldr::cuda {
namespace {

constexpr int kTrialThreads = 256;
constexpr int64_t kTrialTile = 2048;

template <class A>
__global__ void __launch_bounds__(kTrialThreads)
    trial_tile(const __grid_constant__ DeviceList list, int64_t numel, const A* point,
               const A* direction, A alpha, bool aligned) {
  __shared__ A x[kTrialTile];
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kTrialTile;
  const int count = static_cast<int>(min_of(kTrialTile, numel - at));
  DLDR_UNROLL
  for (int u = 0; u < kTrialTile / (kTrialThreads * kPack<A>); ++u) {
    const int i = (u * kTrialThreads + static_cast<int>(threadIdx.x)) * kPack<A>;
    A w[kPack<A>], step[kPack<A>];
    load_numbers(point + at + i, count - i, aligned, w);
    load_numbers(direction + at + i, count - i, aligned, step);
    DLDR_UNROLL
    for (int e = 0; e < kPack<A>; ++e) x[i + e] = fma(step[e], alpha, w[e]);
  }
  __syncthreads();
  write_list(list, at, count, [&](int i) { return x[i]; });
}

template <class A>
void launch_trial(const EntryList& list, int64_t numel, const void* point, const void* direction,
                  double alpha, void* scratch, const Stream& stream) {
  const bool aligned = is_aligned(point) && is_aligned(direction);
  launch("trial_", trial_tile<A>, make_grid(ceil_div(numel, kTrialTile)), kTrialThreads, 0,
         stream.handle, make_device_list(list, numel, scratch, stream), numel,
         static_cast<const A*>(point), static_cast<const A*>(direction), static_cast<A>(alpha),
         aligned);
}

}  // namespace

int64_t trial_scratch(int64_t list_size) { return list_scratch(list_size); }

void trial(const EntryList& list, int64_t numel, const void* point, const void* direction,
           double alpha, bool wide, void* scratch, const Stream& stream) {
  if (numel == 0) return;
  if (wide) {
    launch_trial<double>(list, numel, point, direction, alpha, scratch, stream);
  } else {
    launch_trial<float>(list, numel, point, direction, alpha, scratch, stream);
  }
}

}  // namespace dldr::cuda
