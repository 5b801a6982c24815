// dldr_ext::gram on CPU.
#include "../stable_utils.h"
#include "capability.h"
#include "parallel.h"

namespace dldr {
namespace {

Tensor gram(const Tensor& snapshots, const std::optional<Tensor>& scale) {
  GramArgs args;
  args.snapshots = check_rows("gram", "snapshots", snapshots, scale);
  const int64_t rows = args.snapshots.rows;
  args.plan = make_gram_plan(rows, args.snapshots.numel);
  const Partials partials(args.plan.chunks, rows * rows);
  args.partials = partials.data.get();
  const CpuKernels& kernels = active_kernels();
  parallel_chunks(args.plan, 0, args.plan.chunks * gram_strips(rows), rows,
                  [&](int64_t begin, int64_t end) { kernels.gram(args, begin, end); });

  const Tensor result = torch::stable::new_empty(snapshots, {rows, rows}, ScalarType::Double);
  double* sums = static_cast<double*>(result.data_ptr());
  reduce_chunks(args.partials, args.plan.chunks, rows * rows, sums);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < i; ++j) sums[j * rows + i] = sums[i * rows + j];
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CPU, m) { m.impl("gram", TORCH_BOX(&gram)); }

}  // namespace dldr
