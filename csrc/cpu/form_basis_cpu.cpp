// dldr_ext::form_basis on CPU.
#include "../stable_utils.h"
#include "capability.h"
#include "parallel.h"

namespace dldr {
namespace {

Tensor form_basis(const Tensor& snapshots, const Tensor& coefficients,
                  const std::optional<Tensor>& scale, const std::optional<ScalarType>& dtype) {
  constexpr const char* op = "form_basis";
  FormBasisArgs args;
  args.snapshots = check_rows(op, "snapshots", snapshots, scale);
  const Rows& rows = args.snapshots;
  check_value(
      coefficients.dim() == 2 && coefficients.size(1) == rows.rows && coefficients.size(0) >= 1, op,
      "coefficients: expected shape (d, ", rows.rows, "), one column per snapshot, got ",
      shape_of(coefficients));
  const Tensor wide = check_small(op, "coefficients", coefficients, ScalarType::Double, snapshots);
  args.coefficients = static_cast<const double*>(wide.data_ptr());
  args.dim = coefficients.size(0);
  check_value(args.dim <= kMaxDim, op, "coefficients: expected at most ", kMaxDim, " rows, got ",
              args.dim);
  const ScalarType type = dtype                      ? *dtype
                          : is_quantized(rows.dtype) ? ScalarType::Float
                                                     : snapshots.scalar_type();
  const auto out = dtype_of(type);
  check_type(out && !is_quantized(*out), op,
             "dtype: expected float32, bfloat16, float16 or float64, got ", name_of(type));
  args.out_dtype = *out;
  const Tensor result = torch::stable::new_empty(snapshots, {args.dim, rows.numel}, type);
  args.out = result.data_ptr();
  args.plan = make_plan(rows.numel);
  const CpuKernels& kernels = active_kernels();
  parallel_chunks(args.plan, rows.rows * args.dim,
                  [&](int64_t begin, int64_t end) { kernels.form_basis(args, begin, end); });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CPU, m) { m.impl("form_basis", TORCH_BOX(&form_basis)); }

}  // namespace dldr
