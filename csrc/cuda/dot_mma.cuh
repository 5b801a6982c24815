// Rows in formats of one and two bytes times float32 vectors, on tensor cores: a row's numbers are
// tf32 as they are, and a vector is the sum of two tf32 vectors, its high and its low part. All
// products are exact. Rows go straight from memory into the registers that are multiplied, the
// vectors through shared memory. Each warp has its own elements of a tile and goes down the rows;
// sums are float32 over kDotFlush elements and float64 beyond.
#pragma once

#include "dot_tile.cuh"

namespace dldr::cuda {

// Elements of a tile for each warp, and those whose sums are promoted together.
constexpr int kDotUnit = static_cast<int>(kDotTile) / kDotWarps;
template <class T>
constexpr int kDotFlush = scaled_format<T>::value ? static_cast<int>(kScaleBlock) : kDotUnit;
// Groups of rows that a warp multiplies at a time, and where there are few rows; packs of each that
// are under way together.
#if !defined(DLDR_DOT_PACKS)
#define DLDR_DOT_PACKS 2
#endif
constexpr int kDotGroups = 5, kDotFewGroups = 2;
template <int G>
constexpr int kDotPacks = G <= kDotFewGroups ? 4 : DLDR_DOT_PACKS;

// x = high + low, but for at most 2^-22 |x|. The low part of an infinity is no number, or zero:
// sums of low parts count where they are finite.
__device__ inline void split_tf32(float x, uint32_t& high, uint32_t& low) {
  constexpr uint32_t kKept = 0xffffe000u;
  high = bits_of(x) & kKept;
  low = (bits_of(x - float_of(high)) + 0x1000u) & kKept;
}

// sums[(k * rows_here + r) * kDotWarps + warp] += this warp's part of the products of row first + r
// with staged vector k over the tile at `at`; G groups of rows at a time.
template <class T, int G, bool kWhole>
__device__ inline void dot_groups(const Rows& rows, int64_t first, int rows_here, int lists,
                                  int64_t at, int count, const float* x, double* sums) {
  constexpr int kPacks = kDotPacks<G>;
  constexpr int kStep = 4 * kPacks * kPack<T>;  // elements
  constexpr int kPairs = (G + 1) / 2;
  static_assert(kDotFlush<T> % kStep == 0 && kDotUnit % kDotFlush<T> == 0, "whole steps");
  const int quad = lane() % 4, mine = lane() / 4;
  const int begin = warp() * kDotUnit;  // of this warp's elements
  const int end = kWhole ? begin + kDotUnit : static_cast<int>(min_of(count, begin + kDotUnit));
  const int64_t blocks = ceil_div(rows.numel, kScaleBlock);
  const T* const data = static_cast<const T*>(rows.data) + at + quad * kPack<T>;
  // The columns behind the last vector repeat it, and their sums are dropped.
  const float* const vector = x + (mine < lists ? mine : lists - 1) * kDotStride + quad * 4;
  for (int r = 0; r < rows_here; r += G * kMmaGroup) {
    // This lane's part of its rows. Behind the last row it is read again, and its sums are dropped.
    const T* from[G];
    DLDR_UNROLL
    for (int g = 0; g < G; ++g) {
      const int row = r + g * kMmaGroup + mine;
      from[g] = data + (first + (row < rows_here ? row : rows_here - 1)) * rows.stride;
    }
    Pack packs[G][kPacks];
    const auto load = [&](int i) {
      DLDR_UNROLL
      for (int g = 0; g < G; ++g) {
        DLDR_UNROLL
        for (int p = 0; p < kPacks; ++p) {
          const int j = i + p * 4 * kPack<T>;
          packs[g][p] = kWhole ? load_pack(from[g] + j)
                               : load_pack_guarded(from[g] + j, end - j - quad * kPack<T>);
        }
      }
    };
    float high_sums[kPairs][4] = {}, low_sums[kPairs][4] = {};
    if (kWhole) load(begin);
    for (int i = begin; i < end; i += kStep) {
      if (!kWhole) load(i);
      DLDR_UNROLL
      for (int p = 0; p < kPacks; ++p) {
        DLDR_UNROLL
        for (int part = 0; part < kPack<T> / 4; ++part) {
          constexpr int kTilePacks = static_cast<int>(kDotTile) / kPack<T>;
          const Pack numbers =
              load_wide(vector + i / kPack<T> * 4 + (part * kTilePacks + p * 4) * 4);
          uint32_t high[4], low[4];
          DLDR_UNROLL
          for (int e = 0; e < 4; ++e) split_tf32(float_of(numbers.words[e]), high[e], low[e]);
          DLDR_UNROLL
          for (int pair = 0; pair < kPairs; ++pair) {
            const bool both = 2 * pair + 1 < G;
            float upper[4], lower[4] = {};
            widen_part<T>(packs[2 * pair][p], part, upper);
            if (both) widen_part<T>(packs[both ? 2 * pair + 1 : 0][p], part, lower);
            DLDR_UNROLL
            for (int e = 0; e < 4; e += 2) {
              const uint32_t a[4] = {bits_of(upper[e]), bits_of(lower[e]), bits_of(upper[e + 1]),
                                     bits_of(lower[e + 1])};
              mma<tf32>(high_sums[pair], a, {high[e], high[e + 1]});
              mma<tf32>(low_sums[pair], a, {low[e], low[e + 1]});
            }
          }
        }
      }
      // Behind what is multiplied: else the compiler puts some of the loads off.
      if (kWhole && i + kStep < end) load(i + kStep);
      if ((i + kStep) % kDotFlush<T> != 0 && i + kStep < end) continue;
      const float* const scale = rows.scale + first * blocks + (at + i) / kScaleBlock;
      DLDR_UNROLL
      for (int pair = 0; pair < kPairs; ++pair) {
        DLDR_UNROLL
        for (int c = 0; c < 4; ++c) {
          const int k = 2 * quad + c % 2, row = r + (2 * pair + c / 2) * kMmaGroup + mine;
          if (k < lists && row < rows_here && (c < 2 || 2 * pair + 1 < G)) {
            const float low = low_sums[pair][c];
            float value = high_sums[pair][c] + (low - low == 0.0f ? low : 0.0f);
            if constexpr (scaled_format<T>::value) value *= scale[row * blocks];
            sums[(k * rows_here + row) * kDotWarps + warp()] += value;
          }
          high_sums[pair][c] = low_sums[pair][c] = 0;
        }
      }
    }
  }
}

}  // namespace dldr::cuda
