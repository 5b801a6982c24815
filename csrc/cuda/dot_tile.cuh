// What the two ways to multiply rows with right-hand sides share (dot.cuh): the cut of the work,
// and how a tile of a right-hand side comes into shared memory.
#pragma once

#include "list.cuh"
#include "mma.cuh"

namespace dldr::cuda {

constexpr int kDotThreads = 128;
constexpr int kDotWarps = kDotThreads / kWarp;
// Rows that are read side by side: 8 loads of 16 bytes in flight for each thread.
constexpr int kDotRows = 8;
// Blocks that share a multiprocessor, so that the loads of some hide the staging of others; many
// right-hand sides need the registers, or the shared memory, and tensor cores take more registers
// where the compiler schedules for newer architectures.
#if defined(DLDR_DOT_BLOCKS)
constexpr int kDotBlocksOfMma = DLDR_DOT_BLOCKS;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kDotBlocksOfMma = 2;
#else
constexpr int kDotBlocksOfMma = 3;
#endif
template <class T, int K>
constexpr int kDotBlocks = kOnTensorCores<T> ? (K <= 2 ? kDotBlocksOfMma : 2) : (K == 1 ? 3 : 2);
// Rows times right-hand sides of one block: bounds the sums kept in shared memory. Whole groups of
// rows for any number of right-hand sides.
constexpr int kDotSums = 512;
// Most chunks, and elements of one that need not be more. Bytes of their sums: more rows than fit
// are taken in several launches. Chunks, about a million elements, whose sums the same launch adds
// up. Under emulation small cases go every way, and huge ones have short chunks.
#if defined(DLDR_EMULATED_CUDA)
constexpr int64_t kDotChunks = 6, kDotChunk = 1 << 15;
constexpr int64_t kDotScratch = 4 << 10, kDotFewChunks = 4;
#else
constexpr int64_t kDotChunks = 8192, kDotChunk = int64_t{1} << 62;
constexpr int64_t kDotScratch = 32 << 20, kDotFewChunks = 512;
#endif
static_assert(kDotTile % (kDotThreads * kPack<int8_t>) == 0, "whole packs for every thread");
static_assert(kDotTile % kScaleBlock == 0, "whole blocks of scales");
// From one staged vector to the next: their equal elements lie in different banks.
constexpr int64_t kDotStride = kDotTile + 16;

// Where element i of a staged tile lies: the quarters of all packs apart, so that threads with
// neighbouring packs read from different banks.
template <int kPackOf, int kPartOf>
struct Slot {
  __device__ static int of(int i) {
    constexpr int kParts = kPackOf / kPartOf, kPacks = static_cast<int>(kDotTile) / kPackOf;
    const int pack = i / kPackOf, part = i % kPackOf / kPartOf;
    return kParts == 1 ? i : (part * kPacks + pack) * kPartOf + i % kPartOf;
  }
};
template <class T>
using SlotOf = Slot<kPack<T>, kPart<T>>;

// Sources of right-hand sides: elements [at, at + count) of vector k to their slots.
struct FromList {
  int64_t first = 0;
  template <class A, class T>
  __device__ static void stage(const FromList& from, const DeviceList& list, const Rows& rows,
                               int k, int64_t at, int count, A* to) {
    read_list<A>(list, (from.first + k) * rows.numel + at, count,
                 [&](int i, A value) { to[SlotOf<T>::of(i)] = value; });
  }
};
struct FromRows {
  int64_t first = 0;
  template <class A, class T>
  __device__ static void stage(const FromRows& from, const DeviceList&, const Rows& rows, int k,
                               int64_t at, int count, A* to) {
    const int64_t row = from.first + k;
    const T* data = static_cast<const T*>(rows.data) + row * rows.stride + at;
    const float* scale = nullptr;
    if constexpr (scaled_format<T>::value) {
      scale = rows.scale + row * ceil_div(rows.numel, kScaleBlock) + at / kScaleBlock;
    }
    read_run<A>(data, count, [&](int i, A value) {
      if constexpr (scaled_format<T>::value) value *= scale[i / kScaleBlock];
      to[SlotOf<T>::of(i)] = value;
    });
  }
};

DLDR_HOST_DEVICE inline int64_t dot_tiles(const Rows& rows) {
  return ceil_div(rows.numel, kDotTile);
}

// Which part of the sums a launch makes: rows [first, first + rows) of the products.
struct DotPart {
  int64_t first, rows;
  int lists, rows_per_block;
  int64_t tiles_per_chunk;
  double* partials;   // [lists][rows][chunks]
  uint64_t* arrived;  // one for every range of rows; null: a second kernel adds the chunks up
  uint64_t mark;      // of this launch
};

}  // namespace dldr::cuda
