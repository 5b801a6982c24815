// The facts that Python asks of the library: the CPU paths that dldr_ext.build_info() shows, the
// switch that tests use, and the constants of plan.h.
#include "../stable_utils.h"
#include "capability.h"

namespace dldr {
namespace {

std::string cpu_capability() { return active_kernels().name; }

void set_cpu_capability(const std::string& name) { set_active_kernels(name); }

std::string cpu_capabilities() {
  std::string names;
  for (const CpuKernels* kernels : available_kernels()) {
    names += names.empty() ? "" : ",";
    names += kernels->name;
  }
  return names;
}

// In the order of dldr_ext/tensors/constants.py.
std::vector<int64_t> constants() { return {kTile, kScaleBlock, kMaxChunks, kMaxDim}; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CompositeExplicitAutograd, m) {
  m.impl("_cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("_set_cpu_capability", TORCH_BOX(&set_cpu_capability));
  m.impl("_cpu_capabilities", TORCH_BOX(&cpu_capabilities));
  m.impl("_constants", TORCH_BOX(&constants));
}

}  // namespace dldr
