// dldr_ext::gram_append_ on CPU.
#include "../stable_utils.h"
#include "capability.h"
#include "parallel.h"

namespace dldr {
namespace {

void gram_append_(const Tensor& snapshots, const Tensor& gram, int64_t index,
                  const std::vector<Tensor>& params, const Tensor& anchor,
                  const std::optional<Tensor>& scale) {
  constexpr const char* op = "gram_append_";
  GramAppendArgs args;
  args.snapshots = check_rows(op, "snapshots", snapshots, scale);
  const Rows& rows = args.snapshots;
  check_value(index >= 0 && index < rows.rows, op, "index: expected 0 <= index < ", rows.rows,
              " (rows of snapshots), got ", index);
  check_device(op, "gram", gram, snapshots);
  check_type(gram.scalar_type() == ScalarType::Double, op, "gram: expected torch.float64, got ",
             name_of(gram.scalar_type()));
  check_value(gram.dim() == 2 && gram.size(0) == gram.size(1) && gram.size(0) > index, op,
              "gram: expected a square matrix of more than ", index, " rows, got shape ",
              shape_of(gram));
  const Tensor origin =
      check_vector(op, "anchor", anchor, rows.numel, wide_of(rows.dtype), snapshots);
  const TensorList list(op, "params", params, rows.numel, "columns of snapshots", snapshots,
                        TensorList::Access::read);
  args.list = list.view();
  args.anchor = origin.data_ptr();
  args.index = index;
  args.row =
      static_cast<char*>(snapshots.data_ptr()) + index * rows.stride * dtype_size(rows.dtype);
  if (rows.scale != nullptr) {
    args.row_scale =
        static_cast<float*>(scale->data_ptr()) + index * ceil_div(rows.numel, kScaleBlock);
  }
  args.plan = make_plan(rows.numel);
  const int64_t width = index + 1;
  const Partials partials(args.plan, width);
  args.partials = partials.data.get();
  const CpuKernels& kernels = active_kernels();
  parallel_chunks(args.plan, width,
                  [&](int64_t begin, int64_t end) { kernels.gram_append(args, begin, end); });

  std::vector<double> sums(static_cast<size_t>(width));
  reduce_chunks(args.partials, args.plan.chunks, width, sums.data());
  double* to = static_cast<double*>(gram.data_ptr());
  for (int64_t t = 0; t < width; ++t) {
    to[index * gram.stride(0) + t * gram.stride(1)] = sums[t];
    to[t * gram.stride(0) + index * gram.stride(1)] = sums[t];
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CPU, m) { m.impl("gram_append_", TORCH_BOX(&gram_append_)); }

}  // namespace dldr
