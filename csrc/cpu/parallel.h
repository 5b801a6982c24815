// Threads for the CPU ops.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <memory>

#include "../kernels.h"

namespace dldr {

// Numbers below which a second thread costs more than it saves.
constexpr int64_t kNumbersPerThread = 1 << 16;

// Pieces that the work is cut into for each thread: one that starts late or is interrupted leaves
// more of them to the others.
constexpr int64_t kPiecesPerThread = 8;

// Which end of the chunks the threads begin at.
enum class From { front, back };

// Calls f(begin, end) over the chunks [first, last) of a plan on torch's threads; `rows` numbers
// are touched for each element.
template <class F>
void parallel_chunks(const Plan& plan, int64_t first, int64_t last, int64_t rows, const F& f,
                     From from = From::front) {
  if (first >= last) return;
  const int64_t numbers = plan.tile * plan.tiles_per_chunk * max_of(rows, 1);
  const int64_t most = ceil_div((last - first) * numbers, kNumbersPerThread);
  const int64_t threads = min_of(torch::stable::get_num_threads(), min_of(most, last - first));
  const int64_t piece = ceil_div(last - first, threads * kPiecesPerThread);
  std::atomic<int64_t> next{first};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = next.fetch_add(piece); at < last; at = next.fetch_add(piece)) {
      const int64_t end = min_of(at + piece, last);
      from == From::front ? f(at, end) : f(first + last - end, first + last - at);
    }
  });
}
template <class F>
void parallel_chunks(const Plan& plan, int64_t rows, const F& f, From from = From::front) {
  parallel_chunks(plan, 0, plan.chunks, rows, f, from);
}

// Sums of the chunks: chunks * width numbers, not initialised.
struct Partials {
  Partials(int64_t chunks, int64_t width)
      : data(new double[static_cast<size_t>(max_of(chunks * width, 1))]) {}
  std::unique_ptr<double[]> data;
};

}  // namespace dldr
