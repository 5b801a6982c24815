#include "combine.cuh"

namespace dldr::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kCombineThreads, kCombineBlocks)
    reconstruct_tile(const __grid_constant__ DeviceList list, const Rows rows,
                     const typename wide_of<T>::type* origin,
                     const typename wide_of<T>::type* theta, bool aligned) {
  using A = typename wide_of<T>::type;
  DLDR_DYNAMIC_SHARED(A, sums);
  const int64_t tile = combine_tile<T>(blockDim.x);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * tile;
  const A* const thetas[1] = {theta};
  combine_tile_into<T, 1>(rows, at, aligned, origin, thetas, sums + tile, sums);
  write_list(list, at, static_cast<int>(min_of(tile, rows.numel - at)),
             [&](int i) { return sums[i]; });
}

}  // namespace

int64_t reconstruct_scratch(int64_t list_size) { return list_scratch(list_size); }

void reconstruct(const Rows& basis, const void* origin, const void* theta, const EntryList& list,
                 void* scratch, const Stream& stream) {
  if (basis.numel == 0) return;
  const DeviceList device = make_device_list(list, basis.numel, scratch, stream);
  dispatch(basis.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename wide_of<T>::type;
    const int threads = combine_threads(basis.numel, kPack<T>, stream);
    launch("reconstruct", reconstruct_tile<T>,
           make_grid(ceil_div(basis.numel, combine_tile<T>(threads))), threads,
           combine_shared<T>(basis, threads, 1), stream.handle, device, basis,
           static_cast<const A*>(origin), static_cast<const A*>(theta),
           rows_aligned(basis) && is_aligned(origin));
  });
}

}  // namespace dldr::cuda
