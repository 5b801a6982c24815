#include "combine.cuh"

namespace dldr::cuda {
namespace {

// Two where a pack has 16 elements: beside 32 sums a thread a third has no registers for its loads.
template <class T>
constexpr int kResidualBlocks = kPack<T> == 16 ? 2 : kCombineBlocks;

template <class T>
__global__ void __launch_bounds__(kCombineThreads, kResidualBlocks<T>)
    residual_tile(const __grid_constant__ DeviceList list, const Rows rows,
                  const typename wide_of<T>::type* theta,
                  const typename wide_of<T>::type* coordinates, bool aligned,
                  typename wide_of<T>::type* direction, typename wide_of<T>::type* residual) {
  using A = typename wide_of<T>::type;
  DLDR_DYNAMIC_SHARED(A, sums);
  const int64_t tile = combine_tile<T>(blockDim.x);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * tile;
  const int count = static_cast<int>(min_of(tile, rows.numel - at));
  const A* const thetas[2] = {theta, coordinates};
  combine_tile_into<T, 2>(rows, at, aligned, static_cast<const A*>(nullptr), thetas,
                          sums + 2 * tile, sums);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    direction[at + i] = sums[i];
  }
  read_list<A>(list, at, count, [&](int i, A value) { residual[at + i] = value - sums[tile + i]; });
}

}  // namespace

int64_t reconstruct_residual_scratch(int64_t list_size) { return list_scratch(list_size); }

void reconstruct_residual(const Rows& basis, const void* theta, const void* coordinates,
                          const EntryList& list, void* direction, void* residual, void* scratch,
                          const Stream& stream) {
  if (basis.numel == 0) return;
  const DeviceList device = make_device_list(list, basis.numel, scratch, stream);
  dispatch(basis.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename wide_of<T>::type;
    const int threads = combine_threads(basis.numel, kPack<T>, stream);
    launch("reconstruct_residual", residual_tile<T>,
           make_grid(ceil_div(basis.numel, combine_tile<T>(threads))), threads,
           combine_shared<T>(basis, threads, 2), stream.handle, device, basis,
           static_cast<const A*>(theta), static_cast<const A*>(coordinates), rows_aligned(basis),
           static_cast<A*>(direction), static_cast<A*>(residual));
  });
}

}  // namespace dldr::cuda
