// What dldr_ext.build_info() shows of the CPU paths, and the switch that tests use.
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CompositeExplicitAutograd, m) {
  m.impl("_cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("_set_cpu_capability", TORCH_BOX(&set_cpu_capability));
  m.impl("_cpu_capabilities", TORCH_BOX(&cpu_capabilities));
}

}  // namespace dldr
