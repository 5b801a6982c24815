// Which instruction-set path runs.
#pragma once

#include <string>
#include <vector>

#include "../kernels.h"

namespace dldr {

// The paths that this processor can run, from "portable" to the fastest.
const std::vector<const CpuKernels*>& available_kernels();

// The path by name; null if there is none or this processor cannot run it.
const CpuKernels* find_kernels(const std::string& name);

// The path in use: the fastest available, or the one that the environment variable
// DLDR_CPU_CAPABILITY named when first asked. Throws std::runtime_error for a name that is unknown
// or cannot run here.
const CpuKernels& active_kernels();

// Chooses the path by name from now on; throws as above.
void set_active_kernels(const std::string& name);

}  // namespace dldr
