// The kernel bench: the pybind11 module `dldr_kernels` drives every kernel on every
// instruction-set path from NumPy arrays, without torch.
#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "bench/arrays.h"
#include "cpu/capability.h"
#include "kernels.h"

namespace dldr {

void bind_cuda(py::module_& parent);  // bench/cuda_bindings.cpp

#if defined(DLDR_EMULATED_AVX512)
namespace avx512_emulated {
extern const CpuKernels kernels;
}
namespace avx512_bf16_emulated {
extern const MmaKernels kernels;
}
namespace amx_emulated {
extern const MmaKernels kernels;
}
#endif

namespace {

// ---- paths and threads ----

std::vector<const CpuKernels*> all_paths() {
  std::vector<const CpuKernels*> paths = available_kernels();
#if defined(DLDR_EMULATED_AVX512)
  if (find_kernels("avx2") != nullptr) {
    paths.push_back(&avx512_emulated::kernels);
    static const CpuKernels bf16 = avx512_bf16_emulated::kernels.over(avx512_emulated::kernels);
    paths.push_back(&bf16);
    static const CpuKernels amx = amx_emulated::kernels.over(avx512_emulated::kernels);
    paths.push_back(&amx);
  }
#endif
  return paths;
}

const CpuKernels& path_by_name(const std::string& name) {
  std::string names;
  for (const CpuKernels* kernels : all_paths()) {
    if (name == kernels->name) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw py::value_error("path: expected one of " + names + " (what this processor can run), got '" +
                        name + "'");
}

// f(begin, end) over all tasks, in as many runs of them as there are threads.
template <class F>
void run_tasks(int64_t tasks, int64_t threads, const F& f) {
  check_value(threads >= 1, "threads: expected at least 1, got ", threads);
  const py::gil_scoped_release release;
  std::vector<std::thread> workers;
  const int64_t parts = min_of(threads, tasks);
  for (int64_t k = 0; k < parts; ++k) {
    const int64_t begin = tasks * k / parts, end = tasks * (k + 1) / parts;
    if (k + 1 < parts) {
      workers.emplace_back([&f, begin, end] { f(begin, end); });
    } else {
      f(begin, end);
    }
  }
  for (std::thread& worker : workers) worker.join();
}

template <class F>
void run_chunks(const Plan& plan, int64_t threads, const F& f) {
  run_tasks(plan.chunks, threads, f);
}

// Memory for the sums of the chunks, full of NaN: kernels must not count on zeros.
std::vector<double> make_partials(const Plan& plan, int64_t width) {
  return std::vector<double>(static_cast<size_t>(plan.chunks * width), NAN);
}

py::array_t<double> reduced(const std::vector<double>& partials, const Plan& plan,
                            std::vector<py::ssize_t> shape) {
  py::array_t<double> sums(std::move(shape));
  reduce_chunks(partials.data(), plan.chunks, sums.size(), sums.mutable_data());
  return sums;
}

// ---- kernels ----

using Scale = std::optional<py::array>;

py::array project(const py::array& basis, const py::sequence& tensors, const Scale& scale,
                  const std::string& path, int64_t threads) {
  const CpuKernels& kernels = path_by_name(path);
  ProjectArgs args;
  args.basis = make_rows("basis", basis, scale);
  const auto entries = make_list("tensors", tensors, args.basis.numel, false);
  const EntryList list = view(entries);
  args.lists = &list;
  args.plan = make_plan(args.basis.numel);
  auto partials = make_partials(args.plan, args.basis.rows);
  args.partials = partials.data();
  run_chunks(args.plan, threads, [&](int64_t b, int64_t e) { kernels.project(args, b, e); });
  return reduced(partials, args.plan, {args.basis.rows});
}

py::array project_many(const py::array& basis, const py::sequence& lists, const Scale& scale,
                       const std::string& path, int64_t threads) {
  const CpuKernels& kernels = path_by_name(path);
  ProjectArgs args;
  args.basis = make_rows("basis", basis, scale);
  args.count = static_cast<int64_t>(py::len(lists));
  check_value(args.count >= 1, "lists: expected at least one list");
  std::vector<std::vector<Entry>> entries;
  std::vector<EntryList> views;
  for (const py::handle list : lists) {
    const auto tensors = py::reinterpret_borrow<py::sequence>(list);
    const std::string name = "lists[" + std::to_string(entries.size()) + "]";
    entries.push_back(make_list(name, tensors, args.basis.numel, false));
    views.push_back(view(entries.back()));
  }
  args.lists = views.data();
  args.plan = make_plan(args.basis.numel);
  auto partials = make_partials(args.plan, args.count * args.basis.rows);
  args.partials = partials.data();
  run_chunks(args.plan, threads, [&](int64_t b, int64_t e) { kernels.project(args, b, e); });
  return reduced(partials, args.plan, {args.count, args.basis.rows});
}

void reconstruct_(const py::sequence& params, const std::optional<py::array>& origin,
                  const py::array& basis, const py::array& theta, const Scale& scale,
                  const std::string& path, int64_t threads) {
  const CpuKernels& kernels = path_by_name(path);
  ReconstructArgs args;
  args.basis = make_rows("basis", basis, scale);
  const auto entries = make_list("params", params, args.basis.numel, true);
  args.list = view(entries);
  if (origin) {
    check_array("origin", *origin, wide_of_rows(args.basis), {args.basis.numel});
    args.origin = origin->data();
  }
  check_array("theta", theta, wide_of_rows(args.basis), {args.basis.rows});
  args.theta = theta.data();
  args.plan = make_plan(args.basis.numel);
  run_chunks(args.plan, threads, [&](int64_t b, int64_t e) { kernels.reconstruct(args, b, e); });
}

void reconstruct_residual_(py::array& direction, py::array& residual, const py::array& basis,
                           const py::array& theta, const py::array& coordinates,
                           const py::sequence& tensors, const Scale& scale, const std::string& path,
                           int64_t threads) {
  const CpuKernels& kernels = path_by_name(path);
  ResidualArgs args;
  args.basis = make_rows("basis", basis, scale);
  const DType wide = wide_of_rows(args.basis);
  const auto entries = make_list("tensors", tensors, args.basis.numel, false);
  args.list = view(entries);
  check_array("theta", theta, wide, {args.basis.rows});
  check_array("coordinates", coordinates, wide, {args.basis.rows});
  check_array("direction", direction, wide, {args.basis.numel});
  check_array("residual", residual, wide, {args.basis.numel});
  check_writeable("direction", direction);
  check_writeable("residual", residual);
  args.theta = theta.data();
  args.coordinates = coordinates.data();
  args.direction = direction.mutable_data();
  args.residual = residual.mutable_data();
  args.plan = make_plan(args.basis.numel);
  run_chunks(args.plan, threads,
             [&](int64_t b, int64_t e) { kernels.reconstruct_residual(args, b, e); });
}

void trial_(const py::sequence& params, const py::array& point, const py::array& direction,
            double alpha, const std::string& path, int64_t threads) {
  const CpuKernels& kernels = path_by_name(path);
  TrialArgs args;
  const DType dtype = dtype_of("point", point);
  check_type(dtype == DType::f32 || dtype == DType::f64, "point: expected float32 or float64");
  check_array("point", point, dtype, {point.size()});
  check_array("direction", direction, dtype, {point.size()});
  const auto entries = make_list("params", params, point.size(), true);
  args.list = view(entries);
  args.point = point.data();
  args.direction = direction.data();
  args.alpha = alpha;
  args.wide = dtype == DType::f64;
  args.plan = make_plan(point.size());
  run_chunks(args.plan, threads, [&](int64_t b, int64_t e) { kernels.trial(args, b, e); });
}

// The arguments of what stores a snapshot; the entries of its list live in `entries`.
GramAppendArgs store_args(py::array& snapshots, int64_t index, const py::sequence& params,
                          const py::array& anchor, Scale& scale, std::vector<Entry>& entries) {
  GramAppendArgs args;
  args.snapshots = make_rows("snapshots", snapshots, scale);
  const Rows& rows = args.snapshots;
  check_value(index >= 0 && index < rows.rows, "index: expected 0 <= index < ", rows.rows, ", got ",
              index);
  check_writeable("snapshots", snapshots);
  entries = make_list("params", params, rows.numel, false);
  args.list = view(entries);
  check_array("anchor", anchor, wide_of_rows(rows), {rows.numel});
  args.anchor = anchor.data();
  args.index = index;
  args.row =
      static_cast<char*>(snapshots.mutable_data()) + index * rows.stride * dtype_size(rows.dtype);
  if (scale) {
    check_writeable("scale", *scale);
    args.row_scale =
        static_cast<float*>(scale->mutable_data()) + index * ceil_div(rows.numel, kScaleBlock);
  }
  args.plan = make_plan(rows.numel);
  return args;
}

void store_snapshot_(py::array& snapshots, int64_t index, const py::sequence& params,
                     const py::array& anchor, Scale& scale, const std::string& path,
                     int64_t threads) {
  const CpuKernels& kernels = path_by_name(path);
  std::vector<Entry> entries;
  const GramAppendArgs args = store_args(snapshots, index, params, anchor, scale, entries);
  run_chunks(args.plan, threads, [&](int64_t b, int64_t e) { kernels.store_snapshot(args, b, e); });
}

py::array gram_append_(py::array& snapshots, int64_t index, const py::sequence& params,
                       const py::array& anchor, Scale& scale, const std::string& path,
                       int64_t threads) {
  const CpuKernels& kernels = path_by_name(path);
  std::vector<Entry> entries;
  GramAppendArgs args = store_args(snapshots, index, params, anchor, scale, entries);
  auto partials = make_partials(args.plan, index + 1);
  args.partials = partials.data();
  run_chunks(args.plan, threads, [&](int64_t b, int64_t e) { kernels.gram_append(args, b, e); });
  return reduced(partials, args.plan, {index + 1});
}

py::array gram_block(const py::array& snapshots, int64_t index, int64_t count, const Scale& scale,
                     const std::string& path, int64_t threads) {
  const CpuKernels& kernels = path_by_name(path);
  GramBlockArgs args;
  args.snapshots = make_rows("snapshots", snapshots, scale);
  const int64_t rows = args.snapshots.rows;
  check_value(index >= 0 && count >= 1 && index + count <= rows,
              "index and count: expected rows of ", rows, ", got ", index, " and ", count);
  args.index = index;
  args.count = count;
  args.plan = make_plan(args.snapshots.numel);
  auto partials = make_partials(args.plan, count * (index + count));
  args.partials = partials.data();
  run_chunks(args.plan, threads, [&](int64_t b, int64_t e) { kernels.gram_block(args, b, e); });
  return reduced(partials, args.plan, {count, index + count});
}

py::array gram(const py::array& snapshots, const Scale& scale, const std::string& path,
               int64_t threads) {
  const CpuKernels& kernels = path_by_name(path);
  GramArgs args;
  args.snapshots = make_rows("snapshots", snapshots, scale);
  const int64_t rows = args.snapshots.rows;
  args.plan = make_gram_plan(rows, args.snapshots.numel);
  auto partials = make_partials(args.plan, rows * rows);
  args.partials = partials.data();
  run_tasks(args.plan.chunks * gram_strips(rows), threads,
            [&](int64_t b, int64_t e) { kernels.gram(args, b, e); });
  py::array_t<double> sums = reduced(partials, args.plan, {rows, rows});
  auto at = sums.mutable_unchecked<2>();
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < i; ++j) at(j, i) = at(i, j);
  }
  return sums;
}

void form_basis_(py::array& out, const py::array& snapshots, const py::array& coefficients,
                 const Scale& scale, const std::string& path, int64_t threads) {
  const CpuKernels& kernels = path_by_name(path);
  FormBasisArgs args;
  args.snapshots = make_rows("snapshots", snapshots, scale);
  check_value(coefficients.ndim() == 2 && coefficients.shape(0) >= 1,
              "coefficients: expected shape (d, T), got ", shape_of(coefficients));
  args.dim = coefficients.shape(0);
  check_array("coefficients", coefficients, DType::f64, {args.dim, args.snapshots.rows});
  args.coefficients = static_cast<const double*>(coefficients.data());
  args.out_dtype = dtype_of("out", out);
  check_type(!is_quantized(args.out_dtype), "out: expected a floating-point array");
  check_array("out", out, args.out_dtype, {args.dim, args.snapshots.numel});
  check_writeable("out", out);
  args.out = out.mutable_data();
  args.plan = make_plan(args.snapshots.numel);
  run_chunks(args.plan, threads, [&](int64_t b, int64_t e) { kernels.form_basis(args, b, e); });
}

#if defined(DLDR_SANITIZE)
// What a sanitizer must catch: a list that claims one element more than it has.
void read_past_the_end() {
  const std::vector<float> data(17), basis(18);
  std::vector<double> partials(1);
  const Entry entry{const_cast<float*>(data.data()), 0, 18, DType::f32, false};
  const Rows rows{basis.data(), DType::f32, 1, 18, 18, nullptr};
  const EntryList list = {&entry, 1};
  available_kernels().back()->project({make_plan(18), rows, &list, 1, partials.data()}, 0, 1);
}
// And: a sum of sizes past the largest integer.
int64_t overflow() { return Plan{INT64_MAX, kTile, 2, INT64_MAX, 2}.chunk_begin(1); }
#endif

}  // namespace

PYBIND11_MODULE(dldr_kernels, m) {
  using py::kw_only, py::arg;
  m.doc() = "The torch-free kernels of dldr_ext over NumPy arrays.";

  m.def("paths", [] {
    std::vector<std::string> names;
    for (const CpuKernels* kernels : all_paths()) names.emplace_back(kernels->name);
    return names;
  });
  m.def("active_path", [] { return std::string(active_kernels().name); });

  m.def("project", &project, arg("basis"), arg("tensors"), kw_only(), arg("scale") = py::none(),
        arg("path") = "portable", arg("threads") = 1,
        "The float64 sums that the op rounds to its result, shape (d,).");
  m.def("project_many", &project_many, arg("basis"), arg("lists"), kw_only(),
        arg("scale") = py::none(), arg("path") = "portable", arg("threads") = 1,
        "Such sums for several lists, shape (lists, d).");
  m.def("reconstruct_", &reconstruct_, arg("params"), arg("origin").none(true), arg("basis"),
        arg("theta"), kw_only(), arg("scale") = py::none(), arg("path") = "portable",
        arg("threads") = 1);
  m.def("reconstruct_residual_", &reconstruct_residual_, arg("direction"), arg("residual"),
        arg("basis"), arg("theta"), arg("coordinates"), arg("tensors"), kw_only(),
        arg("scale") = py::none(), arg("path") = "portable", arg("threads") = 1);
  m.def("trial_", &trial_, arg("params"), arg("point"), arg("direction"), arg("alpha"), kw_only(),
        arg("path") = "portable", arg("threads") = 1);
  m.def("store_snapshot_", &store_snapshot_, arg("snapshots"), arg("index"), arg("params"),
        arg("anchor"), kw_only(), arg("scale") = py::none(), arg("path") = "portable",
        arg("threads") = 1);
  m.def("gram_append_", &gram_append_, arg("snapshots"), arg("index"), arg("params"), arg("anchor"),
        kw_only(), arg("scale") = py::none(), arg("path") = "portable", arg("threads") = 1,
        "Writes the row and returns its products, shape (index + 1,).");
  m.def("gram_block", &gram_block, arg("snapshots"), arg("index"), arg("count"), kw_only(),
        arg("scale") = py::none(), arg("path") = "portable", arg("threads") = 1,
        "Products of rows index, ..., index + count - 1 with those up to themselves, shape "
        "(count, index + count).");
  m.def("gram", &gram, arg("snapshots"), kw_only(), arg("scale") = py::none(),
        arg("path") = "portable", arg("threads") = 1);
  m.def("form_basis_", &form_basis_, arg("out"), arg("snapshots"), arg("coefficients"), kw_only(),
        arg("scale") = py::none(), arg("path") = "portable", arg("threads") = 1);

  bind_planner(m);

  bind_cuda(m);

#if defined(DLDR_SANITIZE)
  m.attr("SANITIZERS") = DLDR_SANITIZE;
  m.def("read_past_the_end", &read_past_the_end);
  m.def("overflow", &overflow);
#else
  m.attr("SANITIZERS") = "";
#endif
}

}  // namespace dldr
