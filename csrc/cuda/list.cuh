// A list of tensors as a kernel sees it. Short lists travel inside the kernel's arguments; longer
// ones are written to scratch memory by kernels whose arguments carry them, so that nothing is ever
// copied from the host: a captured graph can be replayed.
#pragma once

#include "cuda_kernels.h"
#include "formats.cuh"

namespace dldr::cuda {

struct ListItem {
  void* data;
  uint64_t meta;  // index of its first element; dtype and "constant" in the top byte
};

// Together with the other arguments below the 4 KiB that every device takes.
constexpr int kNearItems = 216;
// Fills the 32 KiB that CUDA 12.1 and later take.
constexpr int kUploadItems = 1984;

struct DeviceList {
  const ListItem* far = nullptr;  // null: the items are in `near`
  int64_t size = 0;
  int64_t numel = 0;
  ListItem near[kNearItems];
};

__device__ inline ListItem item_of(const DeviceList& list, int64_t i) {
  return list.far != nullptr ? list.far[i] : list.near[i];
}
__device__ inline int64_t begin_of(const DeviceList& list, int64_t i) {
  if (i >= list.size) return list.numel;
  const uint64_t meta = list.far != nullptr ? list.far[i].meta : list.near[i].meta;
  return static_cast<int64_t>(meta & ((uint64_t{1} << 56) - 1));
}
__device__ inline DType dtype_of(const ListItem& item) {
  return static_cast<DType>(item.meta >> 56 & 0x7f);
}
__device__ inline bool is_constant(const ListItem& item) { return item.meta >> 63 != 0; }

// The last item in [low, high) that begins at or before `index`.
__device__ inline int64_t find_item(const DeviceList& list, int64_t index, int64_t low,
                                    int64_t high) {
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (begin_of(list, middle) <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Tiles over fewer items are copied item by item, others element by element.
constexpr int64_t kFewItems = 4;

// Calls visit(pointer to the first element, its position in the tile, count, first, step) so that
// all threads of the block together see every element of [begin, begin + count) of the list once:
// elements first, first + step, ... below count. A pointer to a constant is not to be advanced.
template <class Visit>
__device__ void visit_list(const DeviceList& list, int64_t begin, int count, Visit&& visit) {
  const int64_t first = find_item(list, begin, 0, list.size);
  const int64_t last = find_item(list, begin + count - 1, first, list.size);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const auto at = [&](int64_t i, int64_t from, int number, int start, int step) {
    const ListItem item = item_of(list, i);
    const int64_t offset = is_constant(item) ? 0 : from - begin_of(list, i);
    dispatch_float(dtype_of(item), [&](auto* type) {
      visit(static_cast<decltype(type)>(item.data) + offset, static_cast<int>(from - begin), number,
            start, step, is_constant(item));
    });
  };
  if (last - first < kFewItems) {
    for (int64_t i = first; i <= last; ++i) {
      const int64_t from = max_of(begin, begin_of(list, i));
      const int64_t to = min_of(begin + count, begin_of(list, i + 1));
      at(i, from, static_cast<int>(to - from), thread, threads);
    }
  } else {
    for (int p = thread; p < count; p += threads) {
      at(find_item(list, begin + p, first, last + 1), begin + p, 1, 0, 1);
    }
  }
}

// put(position, value) for every element of [begin, begin + count), widened.
template <class A, class Put>
__device__ void read_list(const DeviceList& list, int64_t begin, int count, Put&& put) {
  visit_list(list, begin, count,
             [&](auto* data, int position, int number, int first, int step, bool constant) {
               constexpr int U = 8;
               for (int k = first; k < number; k += U * step) {
                 A value[U];
                 DLDR_UNROLL
                 for (int u = 0; u < U; ++u) {
                   const int p = k + u * step;
                   if (p < number) value[u] = static_cast<A>(widen(data[constant ? 0 : p]));
                 }
                 DLDR_UNROLL
                 for (int u = 0; u < U; ++u) {
                   const int p = k + u * step;
                   if (p < number) put(position + p, value[u]);
                 }
               }
             });
}

// Writes value(position) into every element of [begin, begin + count), rounded once.
template <class Value>
__device__ void write_list(const DeviceList& list, int64_t begin, int count, Value&& value) {
  visit_list(list, begin, count,
             [&](auto* data, int position, int number, int first, int step, bool) {
#if defined(__CUDACC__)
#pragma unroll 4
#endif
               for (int k = first; k < number; k += step) narrow(value(position + k), data[k]);
             });
}

// Scratch bytes of a list; 0 for one that fits into the arguments.
int64_t list_scratch(int64_t size);
// The list for a kernel on this stream; `scratch` has list_scratch(list.size) bytes.
DeviceList make_device_list(const EntryList& list, int64_t numel, void* scratch,
                            const Stream& stream);

}  // namespace dldr::cuda
