// The Gram matrix on tensor cores, for all formats but float64. Rows go straight from memory into
// the registers that the instruction multiplies: 16 bytes of a row are one to four steps of it, for
// A and B alike (mma.cuh), so that nothing is staged. A warp owns the products of some groups of
// eight rows; the warps of a block whose rows are the same read them at about the same time, from
// L1. Sums are float32 (int32 for int8, hence exact) over kGramFlush elements and float64 beyond.
#pragma once

#include "mma.cuh"

namespace dldr::cuda {

constexpr int kMmaWarps = 4;
constexpr int kMmaThreads = kMmaWarps * kWarp;
// Groups of a side: more rows are cut into sides, whose pairs go to several warps.
constexpr int kMmaSide = 8;
constexpr int kMmaHalf = kMmaSide / 2;
// Elements of a chunk come in so many for each warp of a block.
constexpr int64_t kMmaUnit = 512;
constexpr int64_t kMmaTile = kMmaWarps * kMmaUnit;
// Elements before sums are promoted: a block of scales where there are any.
template <class T>
constexpr int64_t kGramFlush = scaled_format<T>::value ? kScaleBlock : kMmaUnit;
// Elements that the second level cache is asked for in advance, where the registers hold one step.
constexpr int64_t kMmaAhead = 1024;

// Where the sums of chunks go: a triangle each, or straight into the square result of a single one.
struct GramSums {
  double* data;
  int64_t rows;
  bool square;
  __device__ double& at(int64_t chunk, int64_t i, int64_t j) const {
    return data[square ? i * rows + j : chunk * triangle_size(rows) + triangle_size(i) + j];
  }
};

// The products of M groups of rows with N others, or with themselves (kDiagonal, N = M): 16 x 8
// numbers each, those above the diagonal left out.
template <int M, int N, bool kDiagonal>
struct MmaTiles {
  static constexpr int kRows = kDiagonal ? M : M + N;  // groups read
  static constexpr int kPairs = (M + 1) / 2;
  // Whether a pair of groups meets column n, and the number of that tile.
  DLDR_HOST_DEVICE static constexpr bool has(int pair, int n) {
    return !kDiagonal || n < 2 * pair + 2;
  }
  DLDR_HOST_DEVICE static constexpr int number(int pair, int n) {
    return (kDiagonal ? pair * (pair + 1) : pair * N) + n;
  }
  static constexpr int kCount = number(kPairs - 1, N - 1) + 1;
  static constexpr int kSums = 4 * kCount * kWarp;
};

inline __device__ void ask_ahead(const void* address) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
  (void)address;
#endif
}

// sums[(4 tile + c) * kWarp + lane] of the elements [begin, end); `upper` and `left` are the first
// rows of the two sides, which other warps read too (kShared) or not.
template <class T, int M, int N, bool kDiagonal, int kPacks, bool kShared>
__device__ inline void gram_tiles(const Rows& rows, int64_t upper, int64_t left, int64_t begin,
                                  int64_t end, bool aligned, double* sums) {
  using Tiles = MmaTiles<M, N, kDiagonal>;
  using Sum = typename mma_format<T>::sum;
  constexpr int kStep = 4 * kPacks * kPack<T>;  // elements
  static_assert(kGramFlush<T> % kStep == 0, "whole steps between promotions");
  const int quad = lane() % 4, mine = lane() / 4;
  const T* const data = static_cast<const T*>(rows.data) + quad * kPack<T>;
  // Rows from this lane's in the first group on.
  const int rows_here =
      static_cast<int>(min_of(rows.rows - upper - mine, static_cast<int64_t>(M) * kMmaGroup));
  const auto load = [&](int64_t at, Pack(&packs)[Tiles::kRows][kPacks], auto whole) {
    const T* from = data + (upper + mine) * rows.stride + at;
    DLDR_UNROLL
    for (int g = 0; g < Tiles::kRows; ++g, from += kMmaGroup * rows.stride) {
      if (!kDiagonal && g == M) from = data + (left + mine) * rows.stride + at;
      // The lower side of a pair is whole.
      const bool there = (!kDiagonal && g >= M) || g * kMmaGroup < rows_here;
      DLDR_UNROLL
      for (int p = 0; p < kPacks; ++p) {
        packs[g][p] = {};
        constexpr int kApart = 4 * kPack<T>;
        if constexpr (decltype(whole)::value) {
          if (there) packs[g][p] = load_pack(from + p * kApart);
        } else {
          const int64_t room = end - at - p * kApart - quad * kPack<T>;
          if (there && room > 0) {
            packs[g][p] =
                load_pack_guarded(from + p * kApart, static_cast<int>(min_of(room, kPack<T>)));
          }
        }
      }
    }
  };
  Sum acc[Tiles::kCount][4] = {};
  const auto multiply = [&](int64_t at, const Pack(&packs)[Tiles::kRows][kPacks]) {
    DLDR_UNROLL
    for (int p = 0; p < kPacks; ++p) {
      // Nothing is behind the end. The branch keeps the compiler from cutting all packs into terms
      // at once, for which the registers do not suffice.
      if (kMmaTerms<T> > 1 && at + p * 4 * kPack<T> >= end) break;
      DLDR_UNROLL
      for (int step = 0; step < mma_format<T>::kSteps; ++step) {
        uint32_t words[Tiles::kRows][kMmaTerms<T>][2];
        DLDR_UNROLL
        for (int g = 0; g < Tiles::kRows; ++g) mma_words<T>(packs[g][p], step, words[g]);
        DLDR_UNROLL
        for (int pair = 0; pair < Tiles::kPairs; ++pair) {
          const bool both = 2 * pair + 1 < M;
          const int second = both ? 2 * pair + 1 : 0;
          uint32_t a[kMmaTerms<T>][4];
          DLDR_UNROLL
          for (int term = 0; term < kMmaTerms<T>; ++term) {
            DLDR_UNROLL
            for (int e = 0; e < 2; ++e) {
              a[term][2 * e] = mma_apart<T>(words[2 * pair][term][e]);
              a[term][2 * e + 1] = mma_apart<T>(both ? words[second][term][e] : 0);
            }
          }
          DLDR_UNROLL
          for (int n = 0; n < N; ++n) {
            if (Tiles::has(pair, n)) {
              mma_terms<T>(acc[Tiles::number(pair, n)], a, words[kDiagonal ? n : M + n]);
            }
          }
        }
      }
    }
  };
  const int64_t blocks = ceil_div(rows.numel, kScaleBlock);
  const auto flush = [&](int64_t at) {
    const float* const scale = rows.scale + at / kScaleBlock;
    (void)scale;
    DLDR_UNROLL
    for (int pair = 0; pair < Tiles::kPairs; ++pair) {
      DLDR_UNROLL
      for (int n = 0; n < N; ++n) {
        if (!Tiles::has(pair, n)) continue;
        DLDR_UNROLL
        for (int c = 0; c < 4; ++c) {
          Sum& sum = acc[Tiles::number(pair, n)][c];
          // Any sum of 256 products of int8 fits into a float32.
          double value = static_cast<float>(sum);
          if constexpr (scaled_format<T>::value) {
            // Behind the last row the sums are dropped.
            const int64_t i = upper + 2 * pair * kMmaGroup + mine + c / 2 * kMmaGroup;
            const int64_t j = (kDiagonal ? upper : left) + n * kMmaGroup + 2 * quad + c % 2;
            value *= static_cast<double>(scale[min_of(i, rows.rows - 1) * blocks]) *
                     scale[min_of(j, rows.rows - 1) * blocks];
          }
          sums[(4 * Tiles::number(pair, n) + c) * kWarp + lane()] += value;
          sum = 0;
        }
      }
    }
  };
  DLDR_UNROLL
  for (int k = 0; k < 4 * Tiles::kCount; ++k) sums[k * kWarp + lane()] = 0;
  if (begin >= end) return;

  const auto fill = [&](int64_t at, Pack(&packs)[Tiles::kRows][kPacks]) {
    if (aligned && at + kStep <= end) {
      load(at, packs, std::true_type());
    } else {
      load(at, packs, std::false_type());
    }
  };
  // Beside the sums of a whole side and scales or terms there are no registers for a second step.
  constexpr bool kTwice = (!scaled_format<T>::value && kMmaTerms<T> == 1) || M <= 5;
  Pack now[Tiles::kRows][kPacks], next[Tiles::kRows][kPacks];
  if constexpr (kTwice) fill(begin, now);
  for (int64_t at = begin; at < end; at += kStep) {
    if constexpr (kTwice) {
      // The next step is on its way while this one is multiplied.
      fill(at + kStep, next);
    } else {
      fill(at, now);
    }
    if constexpr (kDiagonal && (kShared || !kTwice) && !scaled_format<T>::value) {
      // One lane for each row: the warps that share them, or this one without a second step, find
      // them in the second level cache. Beside scales there are no registers for it.
      DLDR_NO_UNROLL
      for (int g = lane(); g < M * kMmaGroup && at + kMmaAhead < end; g += kWarp) {
        const int64_t row = min_of(upper + g, rows.rows - 1);
        ask_ahead(static_cast<const T*>(rows.data) + row * rows.stride + at + kMmaAhead);
      }
    }
    multiply(at, now);
    // Chunks begin at multiples of what is promoted together.
    if ((at + kStep) % kGramFlush<T> == 0 || at + kStep >= end) flush(at);
    if constexpr (kTwice) {
      DLDR_UNROLL
      for (int g = 0; g < Tiles::kRows; ++g) {
        DLDR_UNROLL
        for (int p = 0; p < kPacks; ++p) now[g][p] = next[g][p];
      }
    }
  }
}

// put(i, j, position among the sums of a warp), j <= i, for all numbers of the calling lane.
template <int M, int N, bool kDiagonal, class Put>
__device__ inline void each_sum(const Rows& rows, int64_t upper, int64_t left, Put&& put) {
  using Tiles = MmaTiles<M, N, kDiagonal>;
  for (int pair = 0; pair < Tiles::kPairs; ++pair) {
    for (int n = 0; n < N; ++n) {
      if (!Tiles::has(pair, n)) continue;
      for (int c = 0; c < 4; ++c) {
        const int64_t i = upper + 2 * pair * kMmaGroup + lane() / 4 + c / 2 * kMmaGroup;
        const int64_t j = (kDiagonal ? upper : left) + n * kMmaGroup + 2 * (lane() % 4) + c % 2;
        const bool inside = (c / 2 == 0 || 2 * pair + 1 < M) && i < rows.rows && j <= i;
        if (inside) put(i, j, (4 * Tiles::number(pair, n) + c) * kWarp + lane());
      }
    }
  }
}

// At most 8 G rows: the warps of a block share its chunk, a part each, and their sums are added up
// in order.
template <class T, int G>
__global__ void __launch_bounds__(kMmaThreads,
                                  G <= 5 && !scaled_format<T>::value && kMmaTerms<T> == 1 ? 3 : 2)
    gram_few(const Rows rows, int64_t tiles_per_chunk, bool aligned, const GramSums chunks) {
  constexpr int kSums = MmaTiles<G, G, true>::kSums;
  DLDR_DYNAMIC_SHARED(double, sums);  // [kMmaWarps][kSums]
  const int64_t part = tiles_per_chunk * kMmaUnit;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kMmaWarps + warp()) * part;
  gram_tiles<T, G, G, true, G <= 5 ? 2 : 1, false>(
      rows, 0, 0, begin, min_of(rows.numel, begin + part), aligned, sums + warp() * kSums);
  __syncthreads();
  if (warp() > 0) return;
  each_sum<G, G, true>(rows, 0, 0, [&](int64_t i, int64_t j, int at) {
    double sum = 0;
    for (int w = 0; w < kMmaWarps; ++w) sum += sums[w * kSums + at];
    chunks.at(blockIdx.x, i, j) = sum;
  });
}

// How many warps share a chunk of so many groups of rows: one for each side with itself, and two
// for each pair of sides.
inline int64_t mma_sets(int64_t sides) { return sides * sides; }

// Any number of rows: every warp has a chunk and a pair of sides. Those of one chunk are
// neighbours.
template <class T>
__global__ void __launch_bounds__(kMmaThreads, 2)
    gram_many(const Rows rows, int64_t sides, int64_t count, int64_t tiles_per_chunk, bool aligned,
              const GramSums chunks) {
  constexpr int kSums = MmaTiles<kMmaSide, kMmaSide, true>::kSums;
  static_assert(kSums >= MmaTiles<kMmaSide, kMmaHalf, false>::kSums, "room for either");
  DLDR_DYNAMIC_SHARED(double, all);  // [kMmaWarps][kSums]
  double* const sums = all + warp() * kSums;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kMmaWarps + warp();
  const int64_t chunk = number / (sides * sides), set = number % (sides * sides);
  if (chunk >= count) return;
  const int64_t begin = chunk * tiles_per_chunk * kMmaTile;
  const int64_t end = min_of(rows.numel, begin + tiles_per_chunk * kMmaTile);
  const auto put = [&](int64_t i, int64_t j, int at) { chunks.at(chunk, i, j) = sums[at]; };
  constexpr int64_t kSideRows = kMmaSide * kMmaGroup;
  if (set < sides) {
    const int64_t upper = set * kSideRows;
    gram_tiles<T, kMmaSide, kMmaSide, true, 1, true>(rows, upper, upper, begin, end, aligned, sums);
    each_sum<kMmaSide, kMmaSide, true>(rows, upper, upper, put);
  } else {
    int64_t i, j;
    triangle((set - sides) / 2, i, j);
    const int64_t upper = (i + 1) * kSideRows;
    const int64_t left = j * kSideRows + (set - sides) % 2 * kMmaHalf * kMmaGroup;
    gram_tiles<T, kMmaSide, kMmaHalf, false, 1, true>(rows, upper, left, begin, end, aligned, sums);
    each_sum<kMmaSide, kMmaHalf, false>(rows, upper, left, put);
  }
}

}  // namespace dldr::cuda
