#include "dot.cuh"

namespace dldr::cuda {
namespace {

template <class A>
struct PutNumber {
  A* out;
  __device__ void operator()(int64_t v, double sum) const { out[v] = static_cast<A>(sum); }
};

}  // namespace

int64_t project_scratch(const Rows& basis, int64_t list_size, int64_t lists) {
  return list_scratch(list_size) + 8 * dot_partials(basis, basis.rows, min_of(lists, kMaxLists));
}

void project(const Rows& basis, const EntryList& list, int64_t lists, void* out, void* scratch,
             const Stream& stream) {
  double* const partials =
      reinterpret_cast<double*>(static_cast<char*>(scratch) + list_scratch(list.size));
  const DeviceList device = make_device_list(list, lists * basis.numel, scratch, stream);
  const int64_t tiles = dot_tiles(basis);
  dispatch(basis.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename wide_of<T>::type;
    for (int64_t done = 0; done < lists;) {
      dispatch_lists<A>(lists - done, [&](auto number) {
        constexpr int K = decltype(number)::value;
        if (tiles > 0) {
          launch_dot<T, K>("project", device, basis, FromList{done}, basis.rows, partials, stream);
        }
        launch("project", sum_tiles<PutNumber<A>>, make_grid(K * basis.rows), kSumThreads, 0,
               stream.handle, partials, tiles,
               PutNumber<A>{static_cast<A*>(out) + done * basis.rows});
        done += K;
      });
    }
  });
}

}  // namespace dldr::cuda
