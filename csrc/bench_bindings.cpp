// The kernel bench: the pybind11 module `dldr_kernels` drives every kernel on every
// instruction-set path from NumPy arrays, without torch.
#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "bench_arrays.h"
#include "cpu/capability.h"
#include "kernels.h"

namespace dldr {

#if defined(DLDR_EMULATED_AVX512)
namespace avx512_emulated {
extern const CpuKernels kernels;
}
#endif

namespace {

#include "cpu/formats.h"

// ---- paths and threads ----

std::vector<const CpuKernels*> all_paths() {
  std::vector<const CpuKernels*> paths = available_kernels();
#if defined(DLDR_EMULATED_AVX512)
  if (find_kernels("avx2") != nullptr) paths.push_back(&avx512_emulated::kernels);
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

// f(begin, end) over all chunks of the plan, in as many runs of chunks as there are threads.
template <class F>
void run_chunks(const Plan& plan, int64_t threads, const F& f) {
  check_value(threads >= 1, "threads: expected at least 1, got ", threads);
  const py::gil_scoped_release release;
  std::vector<std::thread> workers;
  const int64_t parts = min_of(threads, plan.chunks);
  for (int64_t k = 0; k < parts; ++k) {
    const int64_t begin = plan.chunks * k / parts, end = plan.chunks * (k + 1) / parts;
    if (k + 1 < parts) {
      workers.emplace_back([&f, begin, end] { f(begin, end); });
    } else {
      f(begin, end);
    }
  }
  for (std::thread& worker : workers) worker.join();
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
  args.list = view(entries);
  args.plan = make_plan(args.basis.numel);
  auto partials = make_partials(args.plan, args.basis.rows);
  args.partials = partials.data();
  run_chunks(args.plan, threads, [&](int64_t b, int64_t e) { kernels.project(args, b, e); });
  return reduced(partials, args.plan, {args.basis.rows});
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

py::array gram_append_(py::array& snapshots, int64_t index, const py::sequence& params,
                       const py::array& anchor, Scale& scale, const std::string& path,
                       int64_t threads) {
  const CpuKernels& kernels = path_by_name(path);
  GramAppendArgs args;
  args.snapshots = make_rows("snapshots", snapshots, scale);
  const Rows& rows = args.snapshots;
  check_value(index >= 0 && index < rows.rows, "index: expected 0 <= index < ", rows.rows, ", got ",
              index);
  check_writeable("snapshots", snapshots);
  const auto entries = make_list("params", params, rows.numel, false);
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
  auto partials = make_partials(args.plan, index + 1);
  args.partials = partials.data();
  run_chunks(args.plan, threads, [&](int64_t b, int64_t e) { kernels.gram_append(args, b, e); });
  return reduced(partials, args.plan, {index + 1});
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
  run_chunks(args.plan, threads, [&](int64_t b, int64_t e) { kernels.gram(args, b, e); });
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

// ---- planner ----

// Entries of these sizes that point nowhere; the planner never looks at the data.
std::vector<Entry> pretended_entries(const std::vector<int64_t>& sizes) {
  std::vector<Entry> entries;
  int64_t at = 0;
  for (const int64_t size : sizes) {
    check_value(size >= 0, "sizes: expected sizes of at least 0, got ", size);
    if (size == 0) continue;
    Entry entry;
    entry.begin = at;
    entry.numel = size;
    entries.push_back(entry);
    at += size;
  }
  return entries;
}

int64_t find_pretended(const std::vector<int64_t>& sizes, int64_t index) {
  const auto entries = pretended_entries(sizes);
  const int64_t total = entries.empty() ? 0 : entries.back().begin + entries.back().numel;
  check_value(index >= 0 && index < total, "index: expected 0 <= index < ", total, ", got ", index);
  return find_entry(view(entries), index);
}

using Piece = std::tuple<int64_t, int64_t, int64_t, int64_t>;

std::vector<Piece> pieces(const std::vector<int64_t>& sizes, int64_t begin, int64_t end) {
  const auto entries = pretended_entries(sizes);
  const int64_t total = entries.empty() ? 0 : entries.back().begin + entries.back().numel;
  check_value(begin >= 0 && end <= total, "expected 0 <= begin and end <= ", total, ", got ", begin,
              " and ", end);
  std::vector<Piece> found;
  for_each_piece(view(entries), begin, end,
                 [&](const Entry& entry, int64_t offset, int64_t position, int64_t count) {
                   found.emplace_back(&entry - entries.data(), offset, position, count);
                 });
  return found;
}

// ---- scalar conversions ----

py::array widen_codes(const py::array& codes) {
  check_array("codes", codes, dtype_of("codes", codes), {codes.size()});
  py::array_t<double> values(codes.size());
  double* to = values.mutable_data();
  dispatch(dtype_of("codes", codes), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = static_cast<const T*>(codes.data());
    for (int64_t i = 0; i < codes.size(); ++i) {
      if constexpr (std::is_same_v<T, double>) {
        to[i] = from[i];
      } else {
        to[i] = widen(from[i]);
      }
    }
  });
  return values;
}

// The codes as unsigned integers.
py::array narrow_values(const py::array& values, const std::string& dtype) {
  check_array("values", values, DType::f32, {values.size()});
  py::array_t<uint32_t> codes(values.size());
  const float* from = static_cast<const float*>(values.data());
  uint32_t* to = codes.mutable_data();
  dispatch(dtype_by_name(dtype), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<T, double>) {
      for (int64_t i = 0; i < values.size(); ++i) {
        T code;
        narrow(from[i], code);
        to[i] = 0;
        __builtin_memcpy(&to[i], &code, sizeof(T));
      }
    }
  });
  return codes;
}

#if defined(DLDR_SANITIZE)
// What a sanitizer must catch: a list that claims one element more than it has.
void read_past_the_end() {
  const std::vector<float> data(17), basis(18);
  std::vector<double> partials(1);
  const Entry entry{const_cast<float*>(data.data()), 0, 18, DType::f32, false};
  const Rows rows{basis.data(), DType::f32, 1, 18, 18, nullptr};
  available_kernels().back()->project({make_plan(18), rows, {&entry, 1}, partials.data()}, 0, 1);
}
// And: a sum of sizes past the largest integer.
int64_t overflow() { return Plan{INT64_MAX, kTile, 2, INT64_MAX, 2}.chunk_begin(1); }
#endif

}  // namespace

PYBIND11_MODULE(dldr_kernels, m) {
  using py::kw_only, py::arg;
  m.doc() = "The torch-free kernels of dldr_ext over NumPy arrays.";
  m.attr("TILE") = kTile;
  m.attr("SCALE_BLOCK") = kScaleBlock;
  m.attr("MAX_CHUNKS") = kMaxChunks;
  m.attr("MAX_DIM") = kMaxDim;

  m.def("paths", [] {
    std::vector<std::string> names;
    for (const CpuKernels* kernels : all_paths()) names.emplace_back(kernels->name);
    return names;
  });
  m.def("active_path", [] { return std::string(active_kernels().name); });

  m.def("project", &project, arg("basis"), arg("tensors"), kw_only(), arg("scale") = py::none(),
        arg("path") = "portable", arg("threads") = 1,
        "The float64 sums that the op rounds to its result, shape (d,).");
  m.def("reconstruct_", &reconstruct_, arg("params"), arg("origin").none(true), arg("basis"),
        arg("theta"), kw_only(), arg("scale") = py::none(), arg("path") = "portable",
        arg("threads") = 1);
  m.def("trial_", &trial_, arg("params"), arg("point"), arg("direction"), arg("alpha"), kw_only(),
        arg("path") = "portable", arg("threads") = 1);
  m.def("gram_append_", &gram_append_, arg("snapshots"), arg("index"), arg("params"), arg("anchor"),
        kw_only(), arg("scale") = py::none(), arg("path") = "portable", arg("threads") = 1,
        "Writes the row and returns its products, shape (index + 1,).");
  m.def("gram", &gram, arg("snapshots"), kw_only(), arg("scale") = py::none(),
        arg("path") = "portable", arg("threads") = 1);
  m.def("form_basis_", &form_basis_, arg("out"), arg("snapshots"), arg("coefficients"), kw_only(),
        arg("scale") = py::none(), arg("path") = "portable", arg("threads") = 1);

  py::class_<Plan>(m, "Plan")
      .def_readonly("numel", &Plan::numel)
      .def_readonly("tile", &Plan::tile)
      .def_readonly("tiles", &Plan::tiles)
      .def_readonly("tiles_per_chunk", &Plan::tiles_per_chunk)
      .def_readonly("chunks", &Plan::chunks)
      .def("chunk_begin", &Plan::chunk_begin)
      .def("chunk_end", &Plan::chunk_end);
  m.def("make_plan", &make_plan, arg("numel"), arg("tile") = kTile, arg("max_chunks") = kMaxChunks);
  m.def("make_gram_plan", &make_gram_plan, arg("rows"), arg("numel"));
  m.def("find_entry", &find_pretended, arg("sizes"), arg("index"),
        "The tensor that holds element `index`, counting those of size 0 out.");
  m.def("pieces", &pieces, arg("sizes"), arg("begin"), arg("end"),
        "(tensor, offset in it, position in [begin, end), count), tensors of size 0 not counted.");
  m.def("widen", &widen_codes, arg("codes"));
  m.def("narrow", &narrow_values, arg("values"), arg("dtype"));

#if defined(DLDR_SANITIZE)
  m.attr("SANITIZERS") = DLDR_SANITIZE;
  m.def("read_past_the_end", &read_past_the_end);
  m.def("overflow", &overflow);
#else
  m.attr("SANITIZERS") = "";
#endif
}

}  // namespace dldr
