// dldr_ext::reconstruct, dldr_ext::reconstruct_ and dldr_ext::reconstruct_residual on CPU.
#include "../inputs.h"
#include "capability.h"
#include "parallel.h"

namespace dldr {
namespace {

// From the back: a projection, which comes before it in a step, leaves the end of a basis in the
// last cache, and this leaves the front to the next projection.
constexpr From kFrom = From::back;

void run(ReconstructArgs& args) {
  args.plan = make_plan(args.basis.numel);
  const CpuKernels& kernels = active_kernels();
  parallel_chunks(
      args.plan, args.basis.rows,
      [&](int64_t begin, int64_t end) { kernels.reconstruct(args, begin, end); }, kFrom);
}

Tensor reconstruct(const std::optional<Tensor>& origin, const Tensor& basis, const Tensor& theta,
                   const std::optional<Tensor>& scale) {
  ReconstructInputs inputs("reconstruct", origin, basis, theta, scale);
  const Rows& rows = inputs.args.basis;
  const Tensor result = torch::stable::new_empty(basis, {rows.numel}, wide_of(rows.dtype));
  const Entry entry = flat_entry(result);
  inputs.args.list = {&entry, 1};
  run(inputs.args);
  return result;
}

void reconstruct_(const std::vector<Tensor>& params, const std::optional<Tensor>& origin,
                  const Tensor& basis, const Tensor& theta, const std::optional<Tensor>& scale) {
  constexpr const char* op = "reconstruct_";
  ReconstructInputs inputs(op, origin, basis, theta, scale);
  TensorList list(op, "params", params, inputs.args.basis.numel, "columns of basis", basis,
                  TensorList::Access::write);
  inputs.args.list = list.view();
  run(inputs.args);
  list.write_back();
}

std::tuple<Tensor, Tensor> reconstruct_residual(const Tensor& basis, const Tensor& theta,
                                                const Tensor& coordinates,
                                                const std::vector<Tensor>& tensors,
                                                const std::optional<Tensor>& scale) {
  ResidualInputs inputs("reconstruct_residual", basis, theta, coordinates, tensors, scale);
  ResidualArgs& args = inputs.args;
  args.plan = make_plan(args.basis.numel);
  const CpuKernels& kernels = active_kernels();
  parallel_chunks(
      args.plan, args.basis.rows,
      [&](int64_t begin, int64_t end) { kernels.reconstruct_residual(args, begin, end); }, kFrom);
  return {*inputs.direction, *inputs.residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CPU, m) {
  m.impl("reconstruct", TORCH_BOX(&reconstruct));
  m.impl("reconstruct_", TORCH_BOX(&reconstruct_));
  m.impl("reconstruct_residual", TORCH_BOX(&reconstruct_residual));
}

}  // namespace dldr
