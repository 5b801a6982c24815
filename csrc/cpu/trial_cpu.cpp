// dldr_ext::trial_ on CPU.
#include "../inputs.h"
#include "capability.h"
#include "parallel.h"

namespace dldr {
namespace {

void trial_(const std::vector<Tensor>& params, const Tensor& point, const Tensor& direction,
            double alpha) {
  TrialInputs inputs("trial_", params, point, direction, alpha);
  TrialArgs& args = inputs.args;
  args.plan = make_plan(point.numel());
  const CpuKernels& kernels = active_kernels();
  parallel_chunks(args.plan, 1,
                  [&](int64_t begin, int64_t end) { kernels.trial(args, begin, end); });
  inputs.list.write_back();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CPU, m) { m.impl("trial_", TORCH_BOX(&trial_)); }

}  // namespace dldr
