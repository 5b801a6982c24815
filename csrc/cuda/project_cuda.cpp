// dldr_ext::project and dldr_ext::project_many on CUDA.
#include "stream.h"

namespace dldr {
namespace {

Tensor project(const Tensor& basis, const std::vector<Tensor>& tensors,
               const std::optional<Tensor>& scale) {
  constexpr const char* op = "project";
  const Rows rows = check_basis(op, basis, scale);
  cuda::Call call(basis);
  const TensorList list(op, "tensors", tensors, rows.numel, "columns of basis", basis,
                        TensorList::Access::read);
  const EntryList view = list.view();
  const Tensor result = torch::stable::new_empty(basis, {rows.rows}, wide_of(rows.dtype));
  cuda::project(rows, view, 1, result.data_ptr(),
                call.scratch(cuda::project_scratch(rows, view.size, 1)), call.stream());
  return result;
}

Tensor project_many(const Tensor& basis, const std::vector<Tensor>& tensors, int64_t lists,
                    const std::optional<Tensor>& scale) {
  constexpr const char* op = "project_many";
  const Rows rows = check_basis(op, basis, scale);
  check_value(lists >= 1, op, "lists: expected at least one list, got ", lists);
  cuda::Call call(basis);
  const std::vector<TensorList> split =
      TensorList::split(op, "tensors", tensors, lists, rows.numel, "columns of basis", basis);
  // The lists one behind the other, as one.
  std::vector<Entry> entries;
  for (int64_t k = 0; k < lists; ++k) {
    const EntryList view = split[static_cast<size_t>(k)].view();
    for (int64_t i = 0; i < view.size; ++i) {
      entries.push_back(view.entries[i]);
      entries.back().begin += k * rows.numel;
    }
  }
  const EntryList all{entries.data(), static_cast<int64_t>(entries.size())};
  const Tensor result = torch::stable::new_empty(basis, {lists, rows.rows}, wide_of(rows.dtype));
  cuda::project(rows, all, lists, result.data_ptr(),
                call.scratch(cuda::project_scratch(rows, all.size, lists)), call.stream());
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dldr_ext, CUDA, m) {
  m.impl("project", TORCH_BOX(&project));
  m.impl("project_many", TORCH_BOX(&project_many));
}

}  // namespace dldr
