#include "list.cuh"

namespace dldr::cuda {
namespace {

// Items that travel in the arguments of one launch, beside two more.
constexpr int kUploadItems = (kParameters - 64) / sizeof(ListItem);
constexpr int kManyItems = (kManyParameters - 64) / sizeof(ListItem);

template <int N>
struct Upload {
  ListItem items[N];
};

template <int N>
__global__ void upload_items(const __grid_constant__ Upload<N> upload, ListItem* to,
                             int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) to[i] = upload.items[i];
}

ListItem make_item(const Entry& entry) {
  return {entry.data, static_cast<uint64_t>(entry.begin) |
                          static_cast<uint64_t>(entry.dtype) << 56 |
                          static_cast<uint64_t>(entry.constant) << 63};
}

template <int N>
void upload(const EntryList& list, ListItem* to, const Stream& stream) {
  Upload<N> upload;
  for (int64_t at = 0; at < list.size; at += N) {
    const int64_t count = min_of(N, list.size - at);
    for (int64_t i = 0; i < count; ++i) upload.items[i] = make_item(list.entries[at + i]);
    launch("list", upload_items<N>, dim3(1), 1024, 0, stream.handle, upload, to + at, count);
  }
}

// Drivers before 530 (CUDA 12.1) refuse more than 4 KiB.
bool takes_many_parameters() {
#if defined(DLDR_EMULATED_CUDA)
  return emulated::many_parameters;
#else
  static const bool many = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12010;
  }();
  return many;
#endif
}

}  // namespace

int64_t list_scratch(int64_t size) {
  return size <= kNearItems ? 0 : size * static_cast<int64_t>(sizeof(ListItem));
}

DeviceList make_device_list(const EntryList& list, int64_t numel, void* scratch,
                            const Stream& stream) {
  DeviceList device;
  device.size = list.size;
  device.numel = numel;
  if (list.size <= kNearItems) {
    for (int64_t i = 0; i < list.size; ++i) device.near[i] = make_item(list.entries[i]);
    return device;
  }
  ListItem* const far = static_cast<ListItem*>(scratch);
  if (takes_many_parameters()) {
    upload<kManyItems>(list, far, stream);
  } else {
    upload<kUploadItems>(list, far, stream);
  }
  device.far = far;
  return device;
}

}  // namespace dldr::cuda
