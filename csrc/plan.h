// Host planning shared by the CPU and the CUDA kernels: how n elements are cut into tiles and
// chunks, and where a tile lies in a list of tensors. Plain C++, no torch, no allocation, so that
// it can be tested at any pretended size.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define DLDR_HOST_DEVICE __host__ __device__
#else
#define DLDR_HOST_DEVICE
#endif

namespace dldr {

// Elements whose products are accumulated in the working precision before they are added to
// float64 sums, and the unit that is staged from a tensor list. 16 KiB of float32: half of a small
// L1. A multiple of kScaleBlock and of every vector width.
constexpr int64_t kTile = 4096;
// Elements that share one scale in the int8 and float8 formats.
constexpr int64_t kScaleBlock = 256;
// Bounds the partial results and leaves every thread of a large machine several chunks.
constexpr int64_t kMaxChunks = 1024;
// Most basis rows.
constexpr int64_t kMaxDim = 1024;

DLDR_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DLDR_HOST_DEVICE constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
DLDR_HOST_DEVICE constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// The cut of n elements. It depends on n alone (never on threads, or on how the flat vector is cut
// into tensors): that is what makes every reduction reproducible bit for bit.
struct Plan {
  int64_t numel = 0;
  int64_t tile = kTile;
  int64_t tiles = 0;
  int64_t tiles_per_chunk = 1;
  int64_t chunks = 0;

  int64_t chunk_begin(int64_t chunk) const { return chunk * tiles_per_chunk * tile; }
  int64_t chunk_end(int64_t chunk) const { return min_of(chunk_begin(chunk + 1), numel); }
};

inline Plan make_plan(int64_t numel, int64_t tile = kTile, int64_t max_chunks = kMaxChunks) {
  Plan plan;
  plan.numel = numel;
  plan.tile = tile;
  plan.tiles = ceil_div(numel, tile);
  plan.tiles_per_chunk = max_of(1, ceil_div(plan.tiles, max_chunks));
  plan.chunks = ceil_div(plan.tiles, plan.tiles_per_chunk);
  return plan;
}

enum class DType : int32_t { f32, f64, bf16, f16, i8, f8e4m3 };

DLDR_HOST_DEVICE constexpr int64_t dtype_size(DType dtype) {
  return dtype == DType::f64                            ? 8
         : dtype == DType::f32                          ? 4
         : dtype == DType::i8 || dtype == DType::f8e4m3 ? 1
                                                        : 2;
}

constexpr bool is_quantized(DType dtype) { return dtype == DType::i8 || dtype == DType::f8e4m3; }

// One tensor of a list, contiguous in logical order, or one value that stands for all elements.
struct Entry {
  void* data = nullptr;
  int64_t begin = 0;  // index of its first element in the flat vector
  int64_t numel = 0;
  DType dtype = DType::f32;
  bool constant = false;  // a stride-0 tensor (a gradient that is None): data holds one element
};

// A list of tensors without empty entries, in flat order.
struct EntryList {
  const Entry* entries = nullptr;
  int64_t size = 0;
};

// The last entry that begins at or before `index`; `index` must lie in the list.
inline int64_t find_entry(const EntryList& list, int64_t index) {
  int64_t low = 0, high = list.size;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (list.entries[middle].begin <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Calls visit(entry, offset in entry, position in [begin, end), count) for the pieces of
// [begin, end) in order.
template <class Visit>
inline void for_each_piece(const EntryList& list, int64_t begin, int64_t end, Visit&& visit) {
  if (begin >= end) return;
  int64_t at = begin;
  for (int64_t i = find_entry(list, begin); at < end; ++i) {
    const Entry& entry = list.entries[i];
    const int64_t offset = at - entry.begin;
    const int64_t count = min_of(entry.numel - offset, end - at);
    visit(entry, offset, at - begin, count);
    at += count;
  }
}

// Rows of a Gram matrix that one task makes: many rows are parallel in strips of them, where the
// memory for the sums of many chunks would be too much.
constexpr int64_t kGramStrip = 128;

constexpr int64_t gram_strips(int64_t rows) { return ceil_div(rows, kGramStrip); }

// The Gram matrix of T rows keeps T * T float64 sums a chunk: fewer chunks for large T, so that
// they stay small beside the rows; tiles of which a strip of rows stays in a private L2.
inline Plan make_gram_plan(int64_t rows, int64_t numel) {
  constexpr int64_t kTileBytes = 256 << 10;
  constexpr int64_t kPartialBytes = 64 << 20;
  const int64_t strip = max_of(1, min_of(rows, kGramStrip));
  const int64_t tile = min_of(1024, kTileBytes / (4 * strip * kScaleBlock) * kScaleBlock);
  const int64_t chunks = max_of(1, kPartialBytes / (8 * max_of(rows * rows, 1)));
  return make_plan(numel, tile, min_of(chunks, 256));
}

}  // namespace dldr
