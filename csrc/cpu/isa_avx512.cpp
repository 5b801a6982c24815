// The kernels for processors with AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own header; the other units compile the same kernels with these warnings on.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstring>
#include <new>
#include <type_traits>

#include "../kernels.h"

// Only what follows is compiled for the larger instruction set: no inline function of a header
// above can end up in the library in a form that an older processor cannot run.
#if defined(__clang__)
#pragma clang attribute push(                                                        \
    __attribute__((target("avx,avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx,avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif

#define DLDR_ISA avx512
#define DLDR_VECTORS "vec_avx512.h"
#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
