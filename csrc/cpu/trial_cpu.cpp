// dldr_ext::trial_ on CPU.
#include <cmath>

#include "../stable_utils.h"
#include "capability.h"
#include "parallel.h"

namespace dldr {
namespace {

void trial_(const std::vector<Tensor>& params, const Tensor& point, const Tensor& direction,
            double alpha) {
  constexpr const char* op = "trial_";
  const ScalarType type = point.scalar_type();
  check_type(type == ScalarType::Float || type == ScalarType::Double, op,
             "point: expected float32 or float64, got ", name_of(type));
  check_value(point.dim() == 1, op, "point: expected 1 dimension, got shape ", shape_of(point));
  check_value(std::isfinite(alpha), op, "alpha: expected a finite number, got ", alpha);
  const Tensor w = check_vector(op, "point", point, point.numel(), type, point);
  const Tensor u = check_vector(op, "direction", direction, point.numel(), type, point);
  TensorList list(op, "params", params, point.numel(), "size of point", point,
                  TensorList::Access::write);
  TrialArgs args;
  args.plan = make_plan(point.numel());
  args.list = list.view();
  args.point = w.data_ptr();
  args.direction = u.data_ptr();
  args.alpha = alpha;
  args.wide = type == ScalarType::Double;
  const CpuKernels& kernels = active_kernels();
  parallel_chunks(args.plan, 1,
                  [&](int64_t begin, int64_t end) { kernels.trial(args, begin, end); });
  list.write_back();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CPU, m) { m.impl("trial_", TORCH_BOX(&trial_)); }

}  // namespace dldr
