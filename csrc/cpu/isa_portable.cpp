// The kernels for any processor.
#include <cstring>
#include <new>
#include <type_traits>

#include "../kernels.h"

#define DLDR_ISA portable
#define DLDR_VECTORS "vec_portable.h"
#include "kernels.inl"
