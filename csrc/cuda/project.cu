#include "dot.cuh"

namespace dldr::cuda {
namespace {

template <class A>
struct PutNumber {
  A* out;
  int64_t dim;
  __device__ void operator()(int64_t k, int64_t row, double sum) const {
    out[k * dim + row] = static_cast<A>(sum);
  }
};

}  // namespace

int64_t project_scratch(const Rows& basis, int64_t list_size, int64_t lists) {
  return list_scratch(list_size) + dot_scratch(basis, basis.rows, min_of(lists, kMaxLists));
}

void project(const Rows& basis, const EntryList& list, int64_t lists, void* out, void* scratch,
             const Stream& stream) {
  void* const sums = static_cast<char*>(scratch) + list_scratch(list.size);
  const DeviceList device = make_device_list(list, lists * basis.numel, scratch, stream);
  dispatch(basis.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename wide_of<T>::type;
    for (int64_t done = 0; done < lists;) {
      dispatch_lists<T>(lists - done, [&](auto most, int number) {
        launch_dot<T, decltype(most)::value>(
            "project", device, basis, FromList{done}, number, basis.rows, sums, stream,
            PutNumber<A>{static_cast<A*>(out) + done * basis.rows, basis.rows});
        done += number;
      });
    }
  });
}

}  // namespace dldr::cuda
