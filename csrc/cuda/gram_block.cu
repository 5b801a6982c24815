#include "dot.cuh"

namespace dldr::cuda {
namespace {

// Writes the product of rows index + k and `row`, and its mirror.
struct PutGram {
  double* gram;
  int64_t row_stride, column_stride, index;
  __device__ void operator()(int64_t k, int64_t row, double sum) const {
    const int64_t i = index + k;
    if (row > i) return;
    gram[i * row_stride + row * column_stride] = sum;
    gram[row * row_stride + i * column_stride] = sum;
  }
};

}  // namespace

int64_t gram_block_scratch(const Rows& snapshots, int64_t index, int64_t count) {
  return dot_scratch(snapshots, index + count, min_of(count, kMaxLists));
}

void gram_block(const Rows& snapshots, int64_t index, int64_t count, double* gram,
                int64_t row_stride, int64_t column_stride, void* scratch, const Stream& stream) {
  dispatch(snapshots.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t done = 0; done < count;) {
      dispatch_lists<T>(count - done, [&](auto most, int number) {
        launch_dot<T, decltype(most)::value>(
            "gram_block_", DeviceList{}, snapshots, FromRows{index + done}, number,
            index + done + number, scratch, stream,
            PutGram{gram, row_stride, column_stride, index + done});
        done += number;
      });
    }
  });
}

}  // namespace dldr::cuda
