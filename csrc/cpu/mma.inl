// The kernels for processors with matrix instructions, above those of DLDR_BASE, a unit of
// AVX-512: the unit that includes this has set the compiler's target, and defines DLDR_ISA (a
// namespace and the path's name) and DLDR_MMA (a header).

namespace dldr {
namespace DLDR_BASE {
extern const CpuKernels kernels;
}
namespace DLDR_ISA {
namespace {

#include "formats.h"
// formats first: the vectors load and store them
#include "vec_avx512.h"
// the vectors move what is staged and packed
#include "ahead.h"
#include "mma_words.h"
#include "staging.h"
// these first: the kernels pack rows and fetch the next ones
#include DLDR_MMA
#include "form_basis_mma_kernel.h"
#include "gram_mma_kernel.h"

}  // namespace

#define DLDR_NAME(x) DLDR_NAME_(x)
#define DLDR_NAME_(x) #x
extern const MmaKernels kernels;
const MmaKernels kernels = {DLDR_NAME(DLDR_ISA), gram, form_basis};

}  // namespace DLDR_ISA
}  // namespace dldr
