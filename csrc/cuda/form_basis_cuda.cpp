// dldr_ext::form_basis on CUDA.
#include "stream.h"

namespace dldr {
namespace {

// The rows of the result start at multiples of kRowAlign bytes, whatever n is, so that they can be
// read in 16-byte packs: a view of a slightly wider matrix.
Tensor form_basis(const Tensor& snapshots, const Tensor& coefficients,
                  const std::optional<Tensor>& scale, const std::optional<ScalarType>& dtype) {
  cuda::Call call(snapshots);
  const FormBasisInputs inputs("form_basis", snapshots, coefficients, scale, dtype);
  const FormBasisArgs& args = inputs.args;
  const int64_t numel = args.snapshots.numel;
  const int64_t unit = cuda::kRowAlign / dtype_size(args.out_dtype);
  const int64_t stride = ceil_div(numel, unit) * unit;
  Tensor wide = torch::stable::new_empty(snapshots, {args.dim, stride}, inputs.type);
  cuda::form_basis(args.snapshots, args.coefficients, args.dim, wide.data_ptr(), args.out_dtype,
                   stride, call.stream());
  return stride == numel ? wide : torch::stable::narrow(wide, 1, 0, numel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CUDA, m) { m.impl("form_basis", TORCH_BOX(&form_basis)); }

}  // namespace dldr
