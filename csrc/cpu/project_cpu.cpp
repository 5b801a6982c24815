// dldr_ext::project on CPU.
#include "../stable_utils.h"
#include "capability.h"
#include "parallel.h"

namespace dldr {
namespace {

Tensor project(const Tensor& basis, const std::vector<Tensor>& tensors,
               const std::optional<Tensor>& scale) {
  constexpr const char* op = "project";
  ProjectArgs args;
  args.basis = check_basis(op, basis, scale);
  const TensorList list(op, "tensors", tensors, args.basis.numel, "columns of basis", basis,
                        TensorList::Access::read);
  args.list = list.view();
  args.plan = make_plan(args.basis.numel);
  const int64_t dim = args.basis.rows;
  const Partials partials(args.plan, dim);
  args.partials = partials.data.get();
  const CpuKernels& kernels = active_kernels();
  parallel_chunks(args.plan, dim,
                  [&](int64_t begin, int64_t end) { kernels.project(args, begin, end); });

  const Tensor result = torch::stable::new_empty(basis, {dim}, wide_of(args.basis.dtype));
  std::vector<double> sums(static_cast<size_t>(dim));
  reduce_chunks(args.partials, args.plan.chunks, dim, sums.data());
  for (int64_t r = 0; r < dim; ++r) {
    if (args.basis.dtype == DType::f64) {
      static_cast<double*>(result.data_ptr())[r] = sums[r];
    } else {
      static_cast<float*>(result.data_ptr())[r] = static_cast<float>(sums[r]);
    }
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CPU, m) { m.impl("project", TORCH_BOX(&project)); }

}  // namespace dldr
