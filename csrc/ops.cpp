// Every schema of the library. CPU kernels register beside themselves in cpu/, CUDA kernels in
// cuda/ (another library); fake kernels and autograd formulas in dldr_ext/ops/registrations.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(dldr_ext, m) {
  // scale is not keyword-only: torch.library.register_autograd does not take such tensors.
  m.def("project(Tensor basis, Tensor[] tensors, Tensor? scale=None) -> Tensor");
  m.def("project_many(Tensor basis, Tensor[] tensors, int lists, Tensor? scale=None) -> Tensor");
  m.def("reconstruct(Tensor? origin, Tensor basis, Tensor theta, Tensor? scale=None) -> Tensor");
  m.def(
      "reconstruct_(Tensor(a!)[] params, Tensor? origin, Tensor basis, Tensor theta, "
      "Tensor? scale=None) -> ()");
  m.def(
      "reconstruct_residual(Tensor basis, Tensor theta, Tensor coordinates, Tensor[] tensors, "
      "Tensor? scale=None) -> (Tensor, Tensor)");
  m.def("trial_(Tensor(a!)[] params, Tensor point, Tensor direction, float alpha) -> ()");
  m.def("gram(Tensor snapshots, Tensor? scale=None) -> Tensor");
  m.def(
      "gram_append_(Tensor(a!) snapshots, Tensor(b!) gram, int index, Tensor[] params, "
      "Tensor anchor, Tensor(c!)? scale=None) -> ()");
  m.def(
      "store_snapshot_(Tensor(a!) snapshots, int index, Tensor[] params, Tensor anchor, "
      "Tensor(b!)? scale=None) -> ()");
  m.def(
      "gram_block_(Tensor snapshots, Tensor(a!) gram, int index, int count, Tensor? scale=None) "
      "-> ()");
  m.def(
      "form_basis(Tensor snapshots, Tensor coefficients, Tensor? scale=None, "
      "*, ScalarType? dtype=None) -> Tensor");
  m.def(
      "quasi_newton_(Tensor(a!) b, Tensor guess, Tensor c, Tensor? s, Tensor? y, Tensor? hs, *, "
      "bool fresh, bool damped, bool published) -> (Tensor, Tensor)");
  m.def("_cpu_capability() -> str");
  m.def("_cpu_capabilities() -> str");
  m.def("_set_cpu_capability(str name) -> ()");
  m.def("_constants() -> int[]");
}
