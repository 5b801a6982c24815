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

// Together with the other arguments below what every driver takes.
constexpr int kNearItems = 216;

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

// The items that hold [begin, begin + count). In a long list all threads of the block look at once:
// each look is as long as one load.
struct Items {
  int64_t first, last;
};
__device__ inline Items find_items(const DeviceList& list, int64_t begin, int count) {
  const int64_t end = begin + count;
  if (list.far == nullptr) {
    const int64_t first = find_item(list, begin, 0, list.size);
    return {first, find_item(list, end - 1, first, list.size)};
  }
  const int64_t thread = threadIdx.x, threads = blockDim.x;
  int64_t low = 0, high = list.size;
  while (high - low > 1) {
    const int64_t step = ceil_div(high - low, threads), mine = low + thread * step;
    const int before = __syncthreads_count(mine < high && begin_of(list, mine) <= begin);
    low += (before - 1) * step;
    high = min_of(high, low + step);
  }
  Items items{low, low};
  for (int64_t more = threads; more == threads; items.last += more) {
    const int64_t mine = items.last + 1 + thread;
    more = __syncthreads_count(mine < list.size && begin_of(list, mine) < end);
  }
  return items;
}

// Tiles over fewer items are copied item by item, others element by element.
constexpr int64_t kFewItems = 4;
// Loads of a thread that are under way together: whole packs of a tensor, or single elements of
// many. The kernels' own streams have the registers.
constexpr int kListPacks = 3, kListLoads = 4;

// put(k, value) for every element of a run, widened, by all threads of the block: 16 bytes at a
// time where the address allows it.
template <class A, class T, class Put>
__device__ inline void read_run(const T* data, int count, Put&& put) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(data) % sizeof(Pack));
  const int odd =
      past == 0 ? 0 : (static_cast<int>(sizeof(Pack)) - past) / static_cast<int>(sizeof(T));
  const int head = odd < count ? odd : count;
  const int packs = (count - head) / kPack<T>;
  const int tail = head + packs * kPack<T>;
  DLDR_NO_UNROLL
  for (int k = thread; k < packs; k += kListPacks * threads) {
    Pack pack[kListPacks];
    DLDR_UNROLL
    for (int u = 0; u < kListPacks; ++u) {
      const int p = k + u * threads;
      if (p < packs) pack[u] = load_pack(data + head + p * kPack<T>);
    }
    DLDR_UNROLL
    for (int u = 0; u < kListPacks; ++u) {
      const int p = k + u * threads;
      if (p < packs) {
        DLDR_UNROLL
        for (int part = 0; part < kPack<T> / kPart<T>; ++part) {
          typename wide_of<T>::type values[kPart<T>];
          widen_part<T>(pack[u], part, values);
          DLDR_UNROLL
          for (int e = 0; e < kPart<T>; ++e) {
            put(head + p * kPack<T> + part * kPart<T> + e, static_cast<A>(values[e]));
          }
        }
      }
    }
  }
  // Before the first whole pack and behind the last one: fewer than a block has threads.
  if (thread < head + count - tail) {
    const int p = thread < head ? thread : tail + thread - head;
    put(p, static_cast<A>(widen(data[p])));
  }
}

// One element of any format that parameters have: its bits are loaded first, by size and without a
// branch, so that the loads of several can be under way.
struct Element {
  const char* at;
  DType dtype;
};
__device__ inline Element element_of(const DeviceList& list, int64_t i, int64_t index) {
  const ListItem item = item_of(list, i);
  const DType dtype = dtype_of(item);
  const int64_t offset = is_constant(item) ? 0 : index - begin_of(list, i);
  return {static_cast<const char*>(item.data) + offset * dtype_size(dtype), dtype};
}
struct Bits {
  uint16_t two = 0;
  uint32_t four = 0;
  uint64_t eight = 0;
};
__device__ inline Bits load_bits(const Element& element) {
  Bits bits;
  const int64_t size = dtype_size(element.dtype);
  if (size == 2) __builtin_memcpy(&bits.two, __builtin_assume_aligned(element.at, 2), 2);
  if (size == 4) __builtin_memcpy(&bits.four, __builtin_assume_aligned(element.at, 4), 4);
  if (size == 8) __builtin_memcpy(&bits.eight, __builtin_assume_aligned(element.at, 8), 8);
  return bits;
}
template <class A>
__device__ inline A widen_bits(const Bits& bits, DType dtype) {
  const auto as = [](auto from, auto* type) {
    std::remove_pointer_t<decltype(type)> value;
    __builtin_memcpy(&value, &from, sizeof(value));
    return static_cast<A>(widen(value));
  };
  switch (dtype) {
    case DType::f32:
      return as(bits.four, static_cast<float*>(nullptr));
    case DType::f64:
      return as(bits.eight, static_cast<double*>(nullptr));
    case DType::bf16:
      return as(bits.two, static_cast<bf16*>(nullptr));
    default:
      return as(bits.two, static_cast<f16*>(nullptr));
  }
}

// put(position, value) for every element of [begin, begin + count), widened.
template <class A, class Put>
__device__ void read_list(const DeviceList& list, int64_t begin, int count, Put&& put) {
  const Items items = find_items(list, begin, count);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (items.last - items.first < kFewItems) {
    for (int64_t i = items.first; i <= items.last; ++i) {
      const ListItem item = item_of(list, i);
      const int64_t from = max_of(begin, begin_of(list, i));
      const int position = static_cast<int>(from - begin);
      const int number = static_cast<int>(min_of(begin + count, begin_of(list, i + 1)) - from);
      dispatch_float(dtype_of(item), [&](auto* type) {
        const auto* const data = static_cast<decltype(type)>(item.data);
        if (is_constant(item)) {
          const A value = static_cast<A>(widen(*data));
          for (int k = thread; k < number; k += threads) put(position + k, value);
        } else {
          read_run<A>(data + (from - begin_of(list, i)), number,
                      [&](int k, A value) { put(position + k, value); });
        }
      });
    }
    return;
  }
  for (int k = thread; k < count; k += kListLoads * threads) {
    // Looked for side by side, then loaded side by side.
    int64_t at[kListLoads], item[kListLoads];
    DLDR_UNROLL
    for (int u = 0; u < kListLoads; ++u) {
      at[u] = begin + min_of(k + u * threads, count - 1);
      item[u] = items.first;
    }
    for (int64_t left = items.last + 1 - items.first; left > 1; left -= left / 2) {
      DLDR_UNROLL
      for (int u = 0; u < kListLoads; ++u) {
        if (begin_of(list, item[u] + left / 2) <= at[u]) item[u] += left / 2;
      }
    }
    Element elements[kListLoads];
    DLDR_UNROLL
    for (int u = 0; u < kListLoads; ++u) elements[u] = element_of(list, item[u], at[u]);
    Bits bits[kListLoads];
    DLDR_UNROLL
    for (int u = 0; u < kListLoads; ++u) bits[u] = load_bits(elements[u]);
    DLDR_UNROLL
    for (int u = 0; u < kListLoads; ++u) {
      if (k + u * threads < count) {
        put(k + u * threads, widen_bits<A>(bits[u], elements[u].dtype));
      }
    }
  }
}

// Writes value(position), from registers or shared memory, into every element of
// [begin, begin + count), rounded once.
template <class Value>
__device__ void write_list(const DeviceList& list, int64_t begin, int count, Value&& value) {
  const Items items = find_items(list, begin, count);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const auto write = [&](int64_t i, int64_t from, int number, int first, int step) {
    const ListItem item = item_of(list, i);
    const int position = static_cast<int>(from - begin);
    dispatch_float(dtype_of(item), [&](auto* type) {
      auto* const data = static_cast<decltype(type)>(item.data) + (from - begin_of(list, i));
#if defined(__CUDACC__)
#pragma unroll 4
#endif
      for (int k = first; k < number; k += step) narrow(value(position + k), data[k]);
    });
  };
  if (items.last - items.first < kFewItems) {
    for (int64_t i = items.first; i <= items.last; ++i) {
      const int64_t from = max_of(begin, begin_of(list, i));
      const int64_t to = min_of(begin + count, begin_of(list, i + 1));
      write(i, from, static_cast<int>(to - from), thread, threads);
    }
  } else {
    for (int p = thread; p < count; p += threads) {
      write(find_item(list, begin + p, items.first, items.last + 1), begin + p, 1, 0, 1);
    }
  }
}

// Scratch bytes of a list; 0 for one that fits into the arguments.
int64_t list_scratch(int64_t size);
// The list for a kernel on this stream; `scratch` has list_scratch(list.size) bytes.
DeviceList make_device_list(const EntryList& list, int64_t numel, void* scratch,
                            const Stream& stream);

}  // namespace dldr::cuda
