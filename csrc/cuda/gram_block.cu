#include "dot.cuh"

namespace dldr::cuda {
namespace {

// Writes the product of rows index + v / total and v % total, and its mirror.
struct PutGram {
  double* gram;
  int64_t row_stride, column_stride, index, total;
  __device__ void operator()(int64_t v, double sum) const {
    const int64_t i = index + v / total, j = v % total;
    if (j > i) return;
    gram[i * row_stride + j * column_stride] = sum;
    gram[j * row_stride + i * column_stride] = sum;
  }
};

}  // namespace

int64_t gram_block_scratch(const Rows& snapshots, int64_t index, int64_t count) {
  return 8 * dot_partials(snapshots, index + count, min_of(count, kMaxLists));
}

void gram_block(const Rows& snapshots, int64_t index, int64_t count, double* gram,
                int64_t row_stride, int64_t column_stride, void* scratch, const Stream& stream) {
  double* const partials = static_cast<double*>(scratch);
  const int64_t tiles = dot_tiles(snapshots);
  dispatch(snapshots.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t done = 0; done < count;) {
      dispatch_lists<typename wide_of<T>::type>(count - done, [&](auto number) {
        constexpr int K = decltype(number)::value;
        const int64_t total = index + done + K;
        if (tiles > 0) {
          launch_dot<T, K>("gram_block_", DeviceList{}, snapshots, FromRows{index + done}, total,
                           partials, stream);
        }
        launch("gram_block_", sum_tiles<PutGram>, make_grid(K * total), kSumThreads, 0,
               stream.handle, partials, tiles,
               PutGram{gram, row_stride, column_stride, index + done, total});
        done += K;
      });
    }
  });
}

}  // namespace dldr::cuda
