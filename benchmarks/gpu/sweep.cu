// Bytes a second of a plain read of 16 bytes at a time, of a copy, and of `project`, as JSON:
// `sweep [bytes]`. Without torch, so that tools/gpu.py can build it beforehand, and several times
// over with other constants of the kernel (DLDR_DOT_TILE, DLDR_DOT_BLOCKS, DLDR_DOT_PACKS).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/cuda_kernels.h"
#include "cuda/launch.cuh"

namespace {

using namespace dldr;
using cuda::check;

constexpr int kThreads = 512, kRounds = 9, kLoads = 8;

__global__ void read_all(const uint4* from, int64_t count, uint32_t* never) {
  uint32_t seen = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += kLoads * step) {
    uint4 words[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      words[u] = i + u * step < count ? __ldg(from + i + u * step) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) seen |= words[u].x | words[u].y | words[u].z | words[u].w;
  }
  if (seen != 0) *never = seen;  // memory is zeros
}

// Median seconds of what `work` queues.
template <class Work>
double seconds(Work&& work) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<float> times;
  work();
  for (int round = 0; round < kRounds; ++round) {
    check(cudaEventRecord(begin), "event");
    work();
    check(cudaEventRecord(end), "event");
    check(cudaEventSynchronize(end), "work");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
    times.push_back(milliseconds);
  }
  std::sort(times.begin(), times.end());
  return times[kRounds / 2] / 1e3;
}

}  // namespace

int main(int count, char** arguments) {
  const int64_t bytes = count > 1 ? std::atoll(arguments[1]) : int64_t{8} << 30;
  constexpr int64_t kDim = 40;
  char *data = nullptr, *other = nullptr;
  check(cudaMalloc(&data, static_cast<size_t>(bytes)), "memory");
  check(cudaMalloc(&other, static_cast<size_t>(bytes)), "memory");
  check(cudaMemset(data, 0, static_cast<size_t>(bytes)), "memory");
  check(cudaMemset(other, 0, static_cast<size_t>(bytes)), "memory");
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "device");
  const double read = seconds([&] {
    read_all<<<8 * multiprocessors, kThreads>>>(reinterpret_cast<uint4*>(data), bytes / 16,
                                                reinterpret_cast<uint32_t*>(other));
  });
  const double copy = seconds([&] {
    check(cudaMemcpyAsync(other, data, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice),
          "copy");
  });
  std::printf("{\"read\": %.6g, \"copy\": %.6g", static_cast<double>(bytes) / read,
              2 * static_cast<double>(bytes) / copy);
  constexpr struct {
    const char* name;
    DType dtype;
  } kFormats[] = {{"float32", DType::f32}, {"bfloat16", DType::bf16}, {"int8", DType::i8}};
  for (const auto& format : kFormats) {
    const int64_t size = dtype_size(format.dtype);
    const int64_t numel = bytes / (kDim * size) / 4096 * 4096;
    // Gradients, scales and sums lie in the other buffer, one behind the other.
    const int64_t scales = 4 * kDim * (numel / kScaleBlock);
    Rows rows{data, format.dtype, kDim, numel, numel, nullptr};
    if (is_quantized(format.dtype)) rows.scale = reinterpret_cast<float*>(other + 4 * numel);
    const Entry entry{other, 0, numel, DType::f32, false};
    float* const out = reinterpret_cast<float*>(other + 4 * numel + scales);
    const double time = seconds(
        [&] { cuda::project(rows, {&entry, 1}, 1, out, out + 256, {nullptr, multiprocessors}); });
    const int64_t moved = numel * (kDim * size + 4) + (rows.scale != nullptr ? scales : 0);
    std::printf(", \"project %s\": %.6g", format.name, static_cast<double>(moved) / time);
  }
  std::printf("}\n");
}
