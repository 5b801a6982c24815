// dldr_ext::quasi_newton_ on CPU.
#include "../inputs.h"
#include "../quasi_newton.h"

namespace dldr {
namespace {

std::tuple<Tensor, Tensor> quasi_newton_(const Tensor& b, const Tensor& guess, const Tensor& c,
                                         const std::optional<Tensor>& s,
                                         const std::optional<Tensor>& y,
                                         const std::optional<Tensor>& hs, bool fresh, bool damped,
                                         bool published) {
  QuasiNewtonInputs inputs("quasi_newton_", b, guess, c, s, y, hs, fresh, damped, published);
  std::vector<double> scratch(static_cast<size_t>(quasi_newton_scratch(b.size(0))));
  inputs.args.scratch = scratch.data();
  QuasiNewton<Alone>(Alone(), inputs.args).run();
  return {*inputs.p, *inputs.info};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CPU, m) { m.impl("quasi_newton_", TORCH_BOX(&quasi_newton_)); }

}  // namespace dldr
