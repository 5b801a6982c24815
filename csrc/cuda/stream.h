// What every CUDA op needs of torch: its device and stream, and scratch memory.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <atomic>

#include "../inputs.h"
#include "cuda_kernels.h"

namespace dldr::cuda {

// Makes the tensor's device the current one, and finds the current stream on it. Memory that is
// freed when the op returns goes to later work on the same stream only: torch's allocator orders
// it.
class Call {
 public:
  explicit Call(const Tensor& tensor) : like_(tensor), guard_(device_of_cuda(tensor)) {
    const int device = device_of_cuda(tensor);
    if (aoti_torch_get_current_cuda_stream(device, &stream_.handle) != 0) {
      throw std::runtime_error("dldr_ext: torch has no current CUDA stream");
    }
    stream_.multiprocessors = multiprocessors(device);
  }

  const Stream& stream() const { return stream_; }

  // Memory for as long as this object lives.
  void* scratch(int64_t bytes) {
    if (bytes == 0) return nullptr;
    memory_ = torch::stable::new_empty(like_, {bytes}, ScalarType::Byte);
    return memory_->data_ptr();
  }

 private:
  // Asked once for each device.
  static int64_t multiprocessors(int32_t device) {
    static std::atomic<int> known[64];
    const bool kept = device < 64;
    int count = kept ? known[device].load() : 0;
    if (count > 0) return count;
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
      throw std::runtime_error("dldr_ext: CUDA does not say how many multiprocessors there are");
    }
    if (kept) known[device] = count;
    return count;
  }

  // A basis on the CPU with gradients on a GPU comes here, too. Asking CUDA about device -1 would
  // leave an error behind that the next kernel launch reports as its own.
  static int32_t device_of_cuda(const Tensor& tensor) {
    if (!tensor.is_cuda()) {
      std::ostringstream text;
      text << "ValueError: expected all tensors on one device, got one on " << device_of(tensor);
      throw std::runtime_error(text.str());
    }
    return static_cast<int32_t>(tensor.get_device_index());
  }

  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_;
  std::optional<Tensor> memory_;
};

}  // namespace dldr::cuda
