// dldr_ext::reconstruct, dldr_ext::reconstruct_ and dldr_ext::reconstruct_residual on CUDA.
#include "stream.h"

namespace dldr {
namespace {

void run(cuda::Call& call, const ReconstructArgs& args) {
  cuda::reconstruct(args.basis, args.origin, args.theta, args.list,
                    call.scratch(cuda::reconstruct_scratch(args.list.size)), call.stream());
}

Tensor reconstruct(const std::optional<Tensor>& origin, const Tensor& basis, const Tensor& theta,
                   const std::optional<Tensor>& scale) {
  cuda::Call call(basis);
  ReconstructInputs inputs("reconstruct", origin, basis, theta, scale);
  const Rows& rows = inputs.args.basis;
  const Tensor result = torch::stable::new_empty(basis, {rows.numel}, wide_of(rows.dtype));
  const Entry entry = flat_entry(result);
  inputs.args.list = {&entry, 1};
  run(call, inputs.args);
  return result;
}

void reconstruct_(const std::vector<Tensor>& params, const std::optional<Tensor>& origin,
                  const Tensor& basis, const Tensor& theta, const std::optional<Tensor>& scale) {
  constexpr const char* op = "reconstruct_";
  cuda::Call call(basis);
  ReconstructInputs inputs(op, origin, basis, theta, scale);
  TensorList list(op, "params", params, inputs.args.basis.numel, "columns of basis", basis,
                  TensorList::Access::write);
  inputs.args.list = list.view();
  run(call, inputs.args);
  list.write_back();
}

std::tuple<Tensor, Tensor> reconstruct_residual(const Tensor& basis, const Tensor& theta,
                                                const Tensor& coordinates,
                                                const std::vector<Tensor>& tensors,
                                                const std::optional<Tensor>& scale) {
  cuda::Call call(basis);
  ResidualInputs inputs("reconstruct_residual", basis, theta, coordinates, tensors, scale);
  const ResidualArgs& args = inputs.args;
  cuda::reconstruct_residual(
      args.basis, args.theta, args.coordinates, args.list, args.direction, args.residual,
      call.scratch(cuda::reconstruct_residual_scratch(args.list.size)), call.stream());
  return {*inputs.direction, *inputs.residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CUDA, m) {
  m.impl("reconstruct", TORCH_BOX(&reconstruct));
  m.impl("reconstruct_", TORCH_BOX(&reconstruct_));
  m.impl("reconstruct_residual", TORCH_BOX(&reconstruct_residual));
}

}  // namespace dldr
