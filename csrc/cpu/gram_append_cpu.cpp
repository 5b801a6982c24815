// dldr_ext::store_snapshot_, dldr_ext::gram_append_ and dldr_ext::gram_block_ on CPU.
#include "../inputs.h"
#include "capability.h"
#include "parallel.h"

namespace dldr {
namespace {

// Bounds the memory for sums of the chunks.
constexpr int64_t kPartialBytes = 16 << 20;

// gram[index, :index + 1] = sums, and its mirror.
void write_gram(const Tensor& gram, int64_t index, const double* sums) {
  double* to = static_cast<double*>(gram.data_ptr());
  for (int64_t t = 0; t <= index; ++t) {
    to[index * gram.stride(0) + t * gram.stride(1)] = sums[t];
    to[t * gram.stride(0) + index * gram.stride(1)] = sums[t];
  }
}

void store_snapshot_(const Tensor& snapshots, int64_t index, const std::vector<Tensor>& params,
                     const Tensor& anchor, const std::optional<Tensor>& scale) {
  StoreInputs inputs("store_snapshot_", snapshots, index, params, anchor, scale);
  inputs.args.plan = make_plan(inputs.args.snapshots.numel);
  const CpuKernels& kernels = active_kernels();
  parallel_chunks(inputs.args.plan, 1, [&](int64_t begin, int64_t end) {
    kernels.store_snapshot(inputs.args, begin, end);
  });
}

void gram_append_(const Tensor& snapshots, const Tensor& gram, int64_t index,
                  const std::vector<Tensor>& params, const Tensor& anchor,
                  const std::optional<Tensor>& scale) {
  StoreInputs inputs("gram_append_", snapshots, index, params, anchor, scale);
  const int64_t width = index + 1;
  check_gram("gram_append_", gram, width, snapshots);
  GramAppendArgs& args = inputs.args;
  args.plan = make_plan(args.snapshots.numel);
  const Partials partials(args.plan.chunks, width);
  args.partials = partials.data.get();
  const CpuKernels& kernels = active_kernels();
  parallel_chunks(args.plan, width,
                  [&](int64_t begin, int64_t end) { kernels.gram_append(args, begin, end); });

  std::vector<double> sums(static_cast<size_t>(width));
  reduce_chunks(args.partials, args.plan.chunks, width, sums.data());
  write_gram(gram, index, sums.data());
}

void gram_block_(const Tensor& snapshots, const Tensor& gram, int64_t index, int64_t count,
                 const std::optional<Tensor>& scale) {
  GramBlockArgs args = check_gram_block("gram_block_", snapshots, gram, index, count, scale);
  const int64_t width = index + count;
  args.plan = make_plan(args.snapshots.numel);
  std::vector<double> sums(static_cast<size_t>(count * width));
  const CpuKernels& kernels = active_kernels();
  // In waves of chunks, which bound the memory of their sums and change no bit of the total.
  const int64_t size = 8 * count * width;
  const int64_t wave = max_of(torch::stable::get_num_threads(), kPartialBytes / size);
  const Partials partials(min_of(wave, args.plan.chunks), count * width);
  args.partials = partials.data.get();
  for (; args.first < args.plan.chunks; args.first += wave) {
    const int64_t last = min_of(args.first + wave, args.plan.chunks);
    parallel_chunks(args.plan, args.first, last, count * width,
                    [&](int64_t begin, int64_t end) { kernels.gram_block(args, begin, end); });
    add_chunks(args.partials, last - args.first, count * width, sums.data());
  }
  for (int64_t k = 0; k < count; ++k) write_gram(gram, index + k, sums.data() + k * width);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CPU, m) {
  m.impl("store_snapshot_", TORCH_BOX(&store_snapshot_));
  m.impl("gram_append_", TORCH_BOX(&gram_append_));
  m.impl("gram_block_", TORCH_BOX(&gram_block_));
}

}  // namespace dldr
