#include "capability.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace dldr {

namespace portable {
extern const CpuKernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}
#endif

const std::vector<const CpuKernels*>& available_kernels() {
  static const std::vector<const CpuKernels*> available = [] {
    std::vector<const CpuKernels*> kernels = {&portable::kernels};
#if defined(__x86_64__)
    // __builtin_cpu_supports also asks the operating system whether it keeps the registers.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (avx2) kernels.push_back(&avx2::kernels);
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      kernels.push_back(&avx512::kernels);
    }
#endif
    return kernels;
  }();
  return available;
}

const CpuKernels* find_kernels(const std::string& name) {
  for (const CpuKernels* kernels : available_kernels()) {
    if (name == kernels->name) return kernels;
  }
  return nullptr;
}

namespace {

const CpuKernels* kernels_by_name(const std::string& name, const char* source) {
  if (const CpuKernels* kernels = find_kernels(name)) return kernels;
  std::string names;
  for (const CpuKernels* kernels : available_kernels()) {
    names += names.empty() ? "" : ", ";
    names += kernels->name;
  }
  throw std::runtime_error(std::string("ValueError: ") + source + ": expected one of " + names +
                           " (what this processor can run), got '" + name + "'");
}

std::atomic<const CpuKernels*> active{nullptr};

}  // namespace

const CpuKernels& active_kernels() {
  const CpuKernels* kernels = active.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    const char* forced = std::getenv("DLDR_CPU_CAPABILITY");
    kernels = forced == nullptr || *forced == '\0' ? available_kernels().back()
                                                   : kernels_by_name(forced, "DLDR_CPU_CAPABILITY");
    active.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

void set_active_kernels(const std::string& name) {
  active.store(kernels_by_name(name, "cpu_capability"), std::memory_order_release);
}

void add_chunks(const double* partials, int64_t chunks, int64_t width, double* sums) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t k = 0; k < width; ++k) sums[k] += partials[chunk * width + k];
  }
}

void reduce_chunks(const double* partials, int64_t chunks, int64_t width, double* sums) {
  for (int64_t k = 0; k < width; ++k) sums[k] = 0;
  add_chunks(partials, chunks, width, sums);
}

}  // namespace dldr
