// The kernels with AMX (csrc/cpu/mma_amx.h) over emulated intrinsics.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <new>
#include <type_traits>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx,avx2,fma,f16c")
#endif

// Macros: the tiles are immediate operands.
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd

namespace dldr {
namespace amx_emulated {
namespace {

#include "emulated_avx512.h"

// Eight tiles of 16 rows of 64 bytes, in each thread; one that is not configured must not be used.
struct Tile {
  unsigned char bytes[16][64];
};
struct Tiles {
  Tile tile[8];
  bool ready = false;

  Tile& at(int index) {
    if (!ready) __builtin_trap();
    return tile[index];
  }
};
inline Tiles& tiles() {
  thread_local Tiles all;
  return all;
}
template <class T>
inline T* row(int index, int r) {
  return reinterpret_cast<T*>(tiles().at(index).bytes[r]);
}
inline void _tile_loadconfig(const void* config) {
  const auto* bytes = static_cast<const unsigned char*>(config);
  for (int k = 0; k < 8; ++k) {
    if (bytes[0] != 1 || bytes[16 + 2 * k] != 64 || bytes[48 + k] != 16) __builtin_trap();
  }
  tiles().ready = true;
}
inline void _tile_release() { tiles().ready = false; }
inline void _tile_zero(int index) { tiles().at(index) = {}; }
inline void _tile_loadd(int index, const void* from, int64_t stride) {
  for (int r = 0; r < 16; ++r) {
    std::memcpy(row<char>(index, r), static_cast<const char*>(from) + r * stride, 64);
  }
}
inline void _tile_stored(int index, void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, row<char>(index, r), 64);
  }
}
inline void _tile_dpbf16ps(int sums, int left, int right) {
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 16; ++c) {
      float even = 0, odd = 0;
      for (int k = 0; k < 16; ++k) {
        const uint16_t* a = row<uint16_t>(left, r) + 2 * k;
        const uint16_t* b = row<uint16_t>(right, k) + 2 * c;
        even = add_product(even, a, b);
        odd = add_product(odd, a + 1, b + 1);
      }
      float& sum = row<float>(sums, r)[c];
      sum = flush(flush(sum) + flush(even + odd));
    }
  }
}
inline void _tile_dpbssd(int sums, int left, int right) {
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 16; ++c) {
      for (int k = 0; k < 64; ++k) {
        row<int32_t>(sums, r)[c] +=
            row<int8_t>(left, r)[k] * row<int8_t>(right, k / 4)[4 * c + k % 4];
      }
    }
  }
}

}  // namespace
}  // namespace amx_emulated
}  // namespace dldr

#define DLDR_ISA amx_emulated
#define DLDR_BASE avx512_emulated
#define DLDR_MMA "mma_amx.h"
#include "mma.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
