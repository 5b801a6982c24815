// Every CPU kernel for one instruction set: the unit that includes this has set the compiler's
// target, and defines DLDR_ISA (a namespace and the path's name) and DLDR_VECTORS (a header). All
// that is compiled lives in the unit's own namespace.

namespace dldr {
namespace DLDR_ISA {
namespace {

#include "formats.h"
// formats first: the vectors load and store them
#include DLDR_VECTORS
#include "ahead.h"
#include "staging.h"
// these first: the kernels stage their tiles and fetch the next ones
#include "dot_kernel.h"
// the dot kernel serves project, gram_append and gram_block
#include "form_basis_kernel.h"
#include "gram_append_kernel.h"
#include "gram_kernel.h"
#include "project_kernel.h"
#include "reconstruct_kernel.h"
#include "trial_kernel.h"

}  // namespace

#define DLDR_NAME(x) DLDR_NAME_(x)
#define DLDR_NAME_(x) #x
extern const CpuKernels kernels;
const CpuKernels kernels = {
    DLDR_NAME(DLDR_ISA), project,    reconstruct, reconstruct_residual, trial, store_snapshot,
    gram_append,         gram_block, gram,        form_basis,
};

}  // namespace DLDR_ISA
}  // namespace dldr
