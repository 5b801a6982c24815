// dldr_ext::trial_ on CUDA.
#include "stream.h"

namespace dldr {
namespace {

void trial_(const std::vector<Tensor>& params, const Tensor& point, const Tensor& direction,
            double alpha) {
  cuda::Call call(point);
  TrialInputs inputs("trial_", params, point, direction, alpha);
  const TrialArgs& args = inputs.args;
  cuda::trial(args.list, point.numel(), args.point, args.direction, args.alpha, args.wide,
              call.scratch(cuda::trial_scratch(args.list.size)), call.stream());
  inputs.list.write_back();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CUDA, m) { m.impl("trial_", TORCH_BOX(&trial_)); }

}  // namespace dldr
