#include "lanes.cuh"
#include "list.cuh"

namespace dldr::cuda {
namespace {

constexpr int kStoreThreads = 256;
constexpr int64_t kStoreTile = 2048;

// The scale of a block of numbers, and what they are multiplied with before rounding.
template <class T>
__device__ inline float2 block_scale(float largest) {
  const float step = largest / scaled_format<T>::largest;
  const float scale = step < 0x1p-126f ? 0.0f : step;  // a subnormal's inverse would overflow
  return make_float2(scale, scale > 0 ? scaled_format<T>::largest / largest : 0.0f);
}

// Each thread owns kStoreOwn elements that lie side by side; a warp has one block of scales.
constexpr int kStoreOwn = static_cast<int>(kStoreTile) / kStoreThreads;
static_assert(kStoreOwn * kWarp == kScaleBlock, "one block of scales for each warp");

template <class T>
__global__ void __launch_bounds__(kStoreThreads, 1)
    store_tile(const __grid_constant__ DeviceList list, int64_t numel,
               const typename wide_of<T>::type* anchor, T* row, float* row_scale, bool aligned) {
  using A = typename wide_of<T>::type;
  __shared__ A x[kStoreTile];
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kStoreTile;
  const int count = static_cast<int>(min_of(kStoreTile, numel - at));
  const int first = static_cast<int>(threadIdx.x) * kStoreOwn, left = count - first;
  A start[kStoreOwn], moved[kStoreOwn];
  // Under way beside the list.
  load_numbers(anchor + at + first, left, aligned, start);
  read_list<A>(list, at, count, [&](int i, A value) { x[i] = value; });
  __syncthreads();
  DLDR_UNROLL
  for (int e = 0; e < kStoreOwn; ++e) moved[e] = e < left ? x[first + e] - start[e] : A(0);
  if constexpr (scaled_format<T>::value) {
    float largest = 0;
    DLDR_UNROLL
    for (int e = 0; e < kStoreOwn; ++e) {
      const float magnitude = fabsf(moved[e]);
      if (largest == largest && !(magnitude <= largest)) largest = magnitude;  // a NaN stays
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, largest, mask);
      if (largest == largest && !(other <= largest)) largest = other;
    }
    const float2 scale = block_scale<T>(largest);
    if (lane() == 0 && left > 0) row_scale[at / kScaleBlock + warp()] = scale.x;
    DLDR_UNROLL
    for (int e = 0; e < kStoreOwn; ++e) moved[e] *= scale.y;
  }
  store_numbers(moved, row + at + first, left, aligned);
}

}  // namespace

int64_t store_snapshot_scratch(int64_t list_size) { return list_scratch(list_size); }

void store_snapshot(const Rows& snapshots, const EntryList& list, const void* anchor, void* row,
                    float* row_scale, void* scratch, const Stream& stream) {
  if (snapshots.numel == 0) return;
  const DeviceList device = make_device_list(list, snapshots.numel, scratch, stream);
  dispatch(snapshots.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch("store_snapshot_", store_tile<T>, make_grid(ceil_div(snapshots.numel, kStoreTile)),
           kStoreThreads, 0, stream.handle, device, snapshots.numel,
           static_cast<const typename wide_of<T>::type*>(anchor), static_cast<T*>(row), row_scale,
           is_aligned(anchor) && is_aligned(row));
  });
}

}  // namespace dldr::cuda
