// dldr_ext::form_basis on CPU.
#include "../inputs.h"
#include "capability.h"
#include "parallel.h"

namespace dldr {
namespace {

Tensor form_basis(const Tensor& snapshots, const Tensor& coefficients,
                  const std::optional<Tensor>& scale, const std::optional<ScalarType>& dtype) {
  FormBasisInputs inputs("form_basis", snapshots, coefficients, scale, dtype);
  FormBasisArgs& args = inputs.args;
  const Rows& rows = args.snapshots;
  const Tensor result = torch::stable::new_empty(snapshots, {args.dim, rows.numel}, inputs.type);
  args.out = result.data_ptr();
  args.plan = make_plan(rows.numel);
  const CpuKernels& kernels = active_kernels();
  parallel_chunks(args.plan, rows.rows * args.dim,
                  [&](int64_t begin, int64_t end) { kernels.form_basis(args, begin, end); });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CPU, m) { m.impl("form_basis", TORCH_BOX(&form_basis)); }

}  // namespace dldr
