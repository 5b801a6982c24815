// dldr_ext::gram on CUDA.
#include "stream.h"

namespace dldr {
namespace {

Tensor gram(const Tensor& snapshots, const std::optional<Tensor>& scale) {
  const Rows rows = check_rows("gram", "snapshots", snapshots, scale);
  cuda::Call call(snapshots);
  const Tensor result =
      torch::stable::new_empty(snapshots, {rows.rows, rows.rows}, ScalarType::Double);
  cuda::gram(rows, static_cast<double*>(result.data_ptr()), call.scratch(cuda::gram_scratch(rows)),
             call.stream());
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CUDA, m) { m.impl("gram", TORCH_BOX(&gram)); }

}  // namespace dldr
