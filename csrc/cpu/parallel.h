// Threads for the CPU ops.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <memory>

#include "../kernels.h"

namespace dldr {

// Numbers below which a second thread costs more than it saves.
constexpr int64_t kNumbersPerThread = 1 << 16;

// Calls f(begin, end) over the chunks [first, last) of a plan on torch's threads; `rows` numbers
// are touched for each element.
template <class F>
void parallel_chunks(const Plan& plan, int64_t first, int64_t last, int64_t rows, const F& f) {
  if (first >= last) return;
  const int64_t numbers = plan.tile * plan.tiles_per_chunk * max_of(rows, 1);
  torch::stable::parallel_for(first, last, max_of(1, kNumbersPerThread / numbers), f);
}
template <class F>
void parallel_chunks(const Plan& plan, int64_t rows, const F& f) {
  parallel_chunks(plan, 0, plan.chunks, rows, f);
}

// Sums of the chunks: chunks * width numbers, not initialised.
struct Partials {
  Partials(int64_t chunks, int64_t width)
      : data(new double[static_cast<size_t>(max_of(chunks * width, 1))]) {}
  std::unique_ptr<double[]> data;
};

}  // namespace dldr
