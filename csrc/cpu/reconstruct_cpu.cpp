// dldr_ext::reconstruct, dldr_ext::reconstruct_ and dldr_ext::reconstruct_residual on CPU.
#include "../stable_utils.h"
#include "capability.h"
#include "parallel.h"

namespace dldr {
namespace {

// Checks the inputs; keeps alive what the arguments point to.
struct Inputs {
  Inputs(const char* op, const std::optional<Tensor>& origin, const Tensor& basis,
         const Tensor& theta, const std::optional<Tensor>& scale) {
    args.basis = check_basis(op, basis, scale);
    theta_ = check_theta(op, "theta", theta, args.basis, basis);
    args.theta = theta_->data_ptr();
    if (origin) {
      origin_ =
          check_vector(op, "origin", *origin, args.basis.numel, wide_of(args.basis.dtype), basis);
      args.origin = origin_->data_ptr();
    }
    args.plan = make_plan(args.basis.numel);
  }

  void run() const {
    const CpuKernels& kernels = active_kernels();
    parallel_chunks(args.plan, args.basis.rows,
                    [&](int64_t begin, int64_t end) { kernels.reconstruct(args, begin, end); });
  }

  ReconstructArgs args;

 private:
  std::optional<Tensor> theta_, origin_;
};

Tensor reconstruct(const std::optional<Tensor>& origin, const Tensor& basis, const Tensor& theta,
                   const std::optional<Tensor>& scale) {
  Inputs inputs("reconstruct", origin, basis, theta, scale);
  const Rows& rows = inputs.args.basis;
  const Tensor result = torch::stable::new_empty(basis, {rows.numel}, wide_of(rows.dtype));
  const Entry entry = flat_entry(result);
  inputs.args.list = {&entry, 1};
  inputs.run();
  return result;
}

void reconstruct_(const std::vector<Tensor>& params, const std::optional<Tensor>& origin,
                  const Tensor& basis, const Tensor& theta, const std::optional<Tensor>& scale) {
  constexpr const char* op = "reconstruct_";
  Inputs inputs(op, origin, basis, theta, scale);
  TensorList list(op, "params", params, inputs.args.basis.numel, "columns of basis", basis,
                  TensorList::Access::write);
  inputs.args.list = list.view();
  inputs.run();
  list.write_back();
}

std::tuple<Tensor, Tensor> reconstruct_residual(const Tensor& basis, const Tensor& theta,
                                                const Tensor& coordinates,
                                                const std::vector<Tensor>& tensors,
                                                const std::optional<Tensor>& scale) {
  constexpr const char* op = "reconstruct_residual";
  ResidualArgs args;
  args.basis = check_basis(op, basis, scale);
  const Rows& rows = args.basis;
  const Tensor p = check_theta(op, "theta", theta, rows, basis);
  const Tensor c = check_theta(op, "coordinates", coordinates, rows, basis);
  const TensorList list(op, "tensors", tensors, rows.numel, "columns of basis", basis,
                        TensorList::Access::read);
  const Tensor direction = torch::stable::new_empty(basis, {rows.numel}, wide_of(rows.dtype));
  const Tensor residual = torch::stable::new_empty(basis, {rows.numel}, wide_of(rows.dtype));
  args.list = list.view();
  args.theta = p.data_ptr();
  args.coordinates = c.data_ptr();
  args.direction = direction.data_ptr();
  args.residual = residual.data_ptr();
  args.plan = make_plan(rows.numel);
  const CpuKernels& kernels = active_kernels();
  parallel_chunks(args.plan, rows.rows, [&](int64_t begin, int64_t end) {
    kernels.reconstruct_residual(args, begin, end);
  });
  return {direction, residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CPU, m) {
  m.impl("reconstruct", TORCH_BOX(&reconstruct));
  m.impl("reconstruct_", TORCH_BOX(&reconstruct_));
  m.impl("reconstruct_residual", TORCH_BOX(&reconstruct_residual));
}

}  // namespace dldr
