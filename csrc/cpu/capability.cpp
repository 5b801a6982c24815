#include "capability.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#if DLDR_X86_MMA
namespace avx512_bf16 {
extern const MmaKernels kernels;
}
namespace amx {
extern const MmaKernels kernels;
}

namespace {

// Whether this processor has AMX with bfloat16 and int8, and the system lets this process use it.
bool may_use_amx() {
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & kNeeded) != kNeeded) {
    return false;
  }
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of <asm/prctl.h>
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace
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
#if DLDR_X86_MMA
      if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
        static const CpuKernels bf16 = avx512_bf16::kernels.over(avx512::kernels);
        // Intel's vdpbf16ps takes twice as long as the two multiply-adds that it replaces.
        kernels.insert(kernels.end() - (__builtin_cpu_is("intel") ? 1 : 0), &bf16);
        static const CpuKernels tiles = amx::kernels.over(avx512::kernels);
        if (may_use_amx()) kernels.push_back(&tiles);
      }
#endif
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
