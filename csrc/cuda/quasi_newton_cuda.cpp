// dldr_ext::quasi_newton_ on CUDA.
#include "stream.h"

namespace dldr {
namespace {

std::tuple<Tensor, Tensor> quasi_newton_(const Tensor& b, const Tensor& guess, const Tensor& c,
                                         const std::optional<Tensor>& s,
                                         const std::optional<Tensor>& y,
                                         const std::optional<Tensor>& hs, bool fresh, bool damped,
                                         bool published) {
  cuda::Call call(b);
  QuasiNewtonInputs inputs("quasi_newton_", b, guess, c, s, y, hs, fresh, damped, published);
  inputs.args.scratch = static_cast<double*>(call.scratch(8 * quasi_newton_scratch(b.size(0))));
  cuda::quasi_newton(inputs.args, call.stream());
  return {*inputs.p, *inputs.info};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CUDA, m) { m.impl("quasi_newton_", TORCH_BOX(&quasi_newton_)); }

}  // namespace dldr
