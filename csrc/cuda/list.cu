#include "list.cuh"

namespace dldr::cuda {
namespace {

struct Upload {
  ListItem items[kUploadItems];
};

__global__ void upload_items(const __grid_constant__ Upload upload, ListItem* to, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) to[i] = upload.items[i];
}

ListItem make_item(const Entry& entry) {
  return {entry.data, static_cast<uint64_t>(entry.begin) |
                          static_cast<uint64_t>(entry.dtype) << 56 |
                          static_cast<uint64_t>(entry.constant) << 63};
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
  Upload upload;
  for (int64_t at = 0; at < list.size; at += kUploadItems) {
    const int64_t count = min_of(kUploadItems, list.size - at);
    for (int64_t i = 0; i < count; ++i) upload.items[i] = make_item(list.entries[at + i]);
    launch("list", upload_items, dim3(1), 1024, 0, stream.handle, upload, far + at, count);
  }
  device.far = far;
  return device;
}

}  // namespace dldr::cuda
