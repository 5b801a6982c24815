// dldr_ext::project and dldr_ext::project_many on CPU.
#include <algorithm>

#include "../stable_utils.h"
#include "capability.h"
#include "parallel.h"

namespace dldr {
namespace {

// The coordinates of `count` lists, in the wide dtype and this shape.
Tensor project_lists(const Rows& rows, const Tensor& basis, const EntryList* lists, int64_t count,
                     std::initializer_list<int64_t> shape) {
  ProjectArgs args;
  args.basis = rows;
  args.lists = lists;
  args.count = count;
  args.plan = make_plan(rows.numel);
  const int64_t width = count * rows.rows;
  const Partials partials(args.plan.chunks, width);
  args.partials = partials.data.get();
  const CpuKernels& kernels = active_kernels();
  parallel_chunks(args.plan, rows.rows,
                  [&](int64_t begin, int64_t end) { kernels.project(args, begin, end); });

  const Tensor result = torch::stable::new_empty(basis, shape, wide_of(rows.dtype));
  std::vector<double> sums(static_cast<size_t>(width));
  reduce_chunks(args.partials, args.plan.chunks, width, sums.data());
  if (rows.dtype == DType::f64) {
    std::copy(sums.begin(), sums.end(), static_cast<double*>(result.data_ptr()));
  } else {
    float* to = static_cast<float*>(result.data_ptr());
    for (int64_t k = 0; k < width; ++k) to[k] = static_cast<float>(sums[k]);
  }
  return result;
}

Tensor project(const Tensor& basis, const std::vector<Tensor>& tensors,
               const std::optional<Tensor>& scale) {
  constexpr const char* op = "project";
  const Rows rows = check_basis(op, basis, scale);
  const TensorList list(op, "tensors", tensors, rows.numel, "columns of basis", basis,
                        TensorList::Access::read);
  const EntryList view = list.view();
  return project_lists(rows, basis, &view, 1, {rows.rows});
}

Tensor project_many(const Tensor& basis, const std::vector<Tensor>& tensors, int64_t lists,
                    const std::optional<Tensor>& scale) {
  constexpr const char* op = "project_many";
  const Rows rows = check_basis(op, basis, scale);
  check_value(lists >= 1, op, "lists: expected at least one list, got ", lists);
  const std::vector<TensorList> split =
      TensorList::split(op, "tensors", tensors, lists, rows.numel, "columns of basis", basis);
  std::vector<EntryList> views;
  for (const TensorList& list : split) views.push_back(list.view());
  return project_lists(rows, basis, views.data(), lists, {lists, rows.rows});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CPU, m) {
  m.impl("project", TORCH_BOX(&project));
  m.impl("project_many", TORCH_BOX(&project_many));
}

}  // namespace dldr
