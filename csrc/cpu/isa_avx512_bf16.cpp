// The kernels for processors with AVX-512 BF16 and VNNI: dot products of two or four numbers.
#include "../kernels.h"

#if DLDR_X86_MMA

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own header; the other units compile the same kernels with these warnings on.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstring>
#include <new>
#include <type_traits>

// Only what follows is compiled for the larger instruction set: no inline function of a header
// above can end up in the library in a form that an older processor cannot run.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx,avx2,fma,f16c,avx512f,avx512bw,"         \
                                                   "avx512vl,avx512dq,avx512bf16,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx,avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni")
#endif

#define DLDR_ISA avx512_bf16
#define DLDR_BASE avx512
#define DLDR_MMA "mma_avx512_bf16.h"
#include "mma.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // DLDR_X86_MMA
