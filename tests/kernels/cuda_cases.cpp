// Drives every CUDA kernel without Python, whose interpreter no sanitizer sees into: small
// integers, whose sums are exact, against loops written from the definitions.
//
//   cuda_cases small [kernel]  a few blocks each
//   cuda_cases far [kernel]    two rows of more than 2^31 elements, the blocks at both ends
//   cuda_cases planted         reads behind the last row: for a memory checker to find
//
// Exits with 1 at the first wrong number. test_kernel_planted.py builds and runs it. With
// DLDR_ON_GPU it runs the kernels on a GPU (small and planted alone): tools/gpu.py builds it so,
// for compute-sanitizer and ncu.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda/cuda_kernels.h"
#include "cuda/formats.cuh"
#include "quasi_newton.h"

#if defined(DLDR_ON_GPU)
#include <cuda_runtime.h>
namespace emulated {  // what the emulation has beyond a GPU
bool many_parameters;
int64_t sampled_blocks;
}  // namespace emulated
#endif

namespace {

using namespace dldr;
using cuda::Stream;

constexpr int64_t kSparse = 1 << 20;  // bytes
// Wider than 2^31 elements of any format: a wrapped offset hits it.
constexpr int64_t kGuard = int64_t{16} << 30;

// Numbers in memory of exactly their size: small ones NaN, large ones zeros that cost no memory
// until they are written.
class Array {
 public:
  Array(DType dtype, int64_t size) : dtype_(dtype), bytes_(size * dtype_size(dtype)) {
#if defined(DLDR_ON_GPU)
    cuda::check(cudaMallocManaged(&data_, static_cast<size_t>(max_of(bytes_, 1))), "memory");
    std::memset(data_, 0xff, static_cast<size_t>(bytes_));
    return;
#endif
    if (bytes_ < kSparse) {
      data_ = new char[static_cast<size_t>(bytes_)];
      std::memset(data_, 0xff, static_cast<size_t>(bytes_));
      return;
    }
    void* const all = mmap(nullptr, static_cast<size_t>(bytes_ + 2 * kGuard), PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) throw std::runtime_error("mmap failed");
    data_ = static_cast<char*>(all) + kGuard;
    if (mprotect(data_, static_cast<size_t>(bytes_), PROT_READ | PROT_WRITE) != 0) {
      throw std::runtime_error("mprotect failed");
    }
  }
  Array(const Array&) = delete;
  ~Array() {
#if defined(DLDR_ON_GPU)
    cudaFree(data_);
    return;
#endif
    if (bytes_ < kSparse) {
      delete[] data_;
    } else {
      munmap(data_ - kGuard, static_cast<size_t>(bytes_ + 2 * kGuard));
    }
  }

  void* at(int64_t i = 0) { return data_ + i * dtype_size(dtype_); }
  double get(int64_t i) {
#if defined(DLDR_ON_GPU)
    cuda::check(cudaDeviceSynchronize(), "kernel");
#endif
    double value = 0;
    cuda::dispatch(dtype_,
                   [&](auto* type) { value = cuda::widen(*static_cast<decltype(type)>(at(i))); });
    return value;
  }
  void put(int64_t i, double value) {
    cuda::dispatch(dtype_, [&](auto* type) {
      cuda::narrow(static_cast<float>(value), *static_cast<decltype(type)>(at(i)));
    });
  }
  void fill(int64_t size, const std::function<double(int64_t)>& value) {
    for (int64_t i = 0; i < size; ++i) put(i, value(i));
  }

 private:
  DType dtype_;
  int64_t bytes_;
  char* data_;
};

struct Shape {
  DType dtype;
  int64_t rows, numel, stride, lists;
  DType wide() const { return dtype == DType::f64 ? DType::f64 : DType::f32; }
};

// The elements that are not zero and are looked at: all of them, or those that the blocks at both
// ends surely have.
std::vector<int64_t> seen(int64_t numel) {
  constexpr int64_t kEnd = 64;
  std::vector<int64_t> all;
  for (int64_t i = 0; i < numel; ++i) {
    if (numel > kSparse && i == kEnd) i = numel - kEnd;
    all.push_back(i);
  }
  return all;
}

double number(int64_t row, int64_t i) { return static_cast<double>((5 * row + 3 * i) % 7 - 3); }

void expect(const char* what, int64_t i, double found, double right, double tolerance = 0) {
  if (std::fabs(found - right) <= tolerance || (std::isnan(found) && std::isnan(right))) return;
  throw std::runtime_error(std::string(what) + "[" + std::to_string(i) + "]: expected " +
                           std::to_string(right) + ", got " + std::to_string(found));
}

// Rows of numbers, times 1 or 2 in formats with a scale.
class Stored {
 public:
  explicit Stored(const Shape& shape)
      : shape_(shape),
        blocks_(ceil_div(shape.numel, kScaleBlock)),
        data_(shape.dtype, (shape.rows - 1) * shape.stride + shape.numel),
        scale_(DType::f32, shape.rows * blocks_) {
    for (int64_t r = 0; r < shape.rows; ++r) {
      for (const int64_t i : seen(shape.numel)) {
        data_.put(r * shape.stride + i, number(r, i));
        scale_.put(r * blocks_ + i / kScaleBlock, factor(r, i));
      }
    }
  }
  Rows rows() {
    Rows rows{data_.at(), shape_.dtype, shape_.rows, shape_.numel, shape_.stride, nullptr};
    if (is_quantized(shape_.dtype)) rows.scale = scale(0);
    return rows;
  }
  void* row(int64_t r) { return data_.at(r * shape_.stride); }
  float* scale(int64_t r) { return static_cast<float*>(scale_.at(r * blocks_)); }
  double value(int64_t r, int64_t i) const { return number(r, i) * factor(r, i); }
  // What lies in memory now.
  double get(int64_t r, int64_t i) {
    const double x = data_.get(r * shape_.stride + i);
    return is_quantized(shape_.dtype) ? x * scale_.get(r * blocks_ + i / kScaleBlock) : x;
  }

 private:
  double factor(int64_t r, int64_t i) const {
    return is_quantized(shape_.dtype) ? static_cast<double>(1 + (r + i / kScaleBlock) % 2) : 1;
  }
  Shape shape_;
  int64_t blocks_;
  Array data_, scale_;
};

// A list of tensors of all floating-point formats, with numbers(row, ...) at the elements seen of
// each of `count` vectors.
class List {
 public:
  List(int64_t numel, int64_t count, int64_t row, int64_t pieces) {
    constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f64, DType::f16};
    const int64_t total = numel * count;
    // The last tensor of a long list begins past 2^31, in the last tile.
    const auto border = [&](int64_t k) {
      return k == pieces - 1 && total > kSparse ? total - 32 : total * k / pieces;
    };
    for (int64_t k = 0; k < pieces; ++k) {
      Entry entry;
      entry.begin = border(k);
      entry.numel = border(k + 1) - entry.begin;
      entry.dtype = kTypes[k % 4];
      entry.data = arrays_.emplace_back(entry.dtype, entry.numel).at();
      entries_.push_back(entry);
    }
    fill(numel, count, row);
  }
  void fill(int64_t numel, int64_t count, int64_t row) {
    for (int64_t k = 0; k < count; ++k) {
      for (const int64_t i : seen(numel)) {
        const int64_t to = k * numel + i, piece = find_entry(view(), to);
        arrays_[static_cast<size_t>(piece)].put(to - entries_[static_cast<size_t>(piece)].begin,
                                                number(row + k, i));
      }
    }
  }
  EntryList view() const { return {entries_.data(), size()}; }
  int64_t size() const { return static_cast<int64_t>(entries_.size()); }
  double get(int64_t i) {
    const int64_t piece = find_entry(view(), i);
    return arrays_[static_cast<size_t>(piece)].get(i - entries_[static_cast<size_t>(piece)].begin);
  }

 private:
  std::deque<Array> arrays_;
  std::vector<Entry> entries_;
};

struct Vector : Array {
  Vector(DType dtype, int64_t numel, int64_t row) : Array(dtype, numel) {
    for (const int64_t i : seen(numel)) put(i, number(row, i));
  }
};

double combine(const Stored& stored, int64_t rows, int64_t i, int64_t theta) {
  double sum = 0;
  for (int64_t r = 0; r < rows; ++r) sum += number(theta, r) * stored.value(r, i);
  return sum;
}

double product(const Shape& shape, const std::function<double(int64_t)>& a,
               const std::function<double(int64_t)>& b) {
  double sum = 0;
  for (const int64_t i : seen(shape.numel)) sum += a(i) * b(i);
  return sum;
}

// Bytes of scratch memory: where most blocks are left out, their sums are to be zeros.
int64_t room(const Shape& shape, int64_t bytes) {
  return max_of(bytes, shape.numel > kSparse ? kSparse : 0);
}

void project(const Shape& shape) {
  Stored basis(shape);
  List list(shape.numel, shape.lists, 20, 2 + shape.lists);
  Array out(shape.wide(), shape.lists * shape.rows);
  Array scratch(DType::i8,
                room(shape, cuda::project_scratch(basis.rows(), list.size(), shape.lists)));
  cuda::project(basis.rows(), list.view(), shape.lists, out.at(), scratch.at(), Stream{});
  for (int64_t j = 0; j < shape.lists * shape.rows; ++j) {
    const int64_t k = j / shape.rows, r = j % shape.rows;
    const double right = product(
        shape, [&](int64_t i) { return basis.value(r, i); },
        [&](int64_t i) { return number(20 + k, i); });
    expect("project", j, out.get(j), right);
  }
}

void reconstruct(const Shape& shape) {
  Stored basis(shape);
  Vector origin(shape.wide(), shape.numel, 20), theta(shape.wide(), shape.rows, 30);
  List params(shape.numel, 1, 40, 3);
  Array scratch(DType::i8, cuda::reconstruct_scratch(params.size()));
  cuda::reconstruct(basis.rows(), origin.at(), theta.at(), params.view(), scratch.at(), Stream{});
  for (const int64_t i : seen(shape.numel)) {
    expect("reconstruct", i, params.get(i), number(20, i) + combine(basis, shape.rows, i, 30));
  }
}

void reconstruct_residual(const Shape& shape) {
  Stored basis(shape);
  Vector theta(shape.wide(), shape.rows, 30), coordinates(shape.wide(), shape.rows, 31);
  List list(shape.numel, 1, 40, 3);
  Array direction(shape.wide(), shape.numel), residual(shape.wide(), shape.numel);
  Array scratch(DType::i8, cuda::reconstruct_residual_scratch(list.size()));
  cuda::reconstruct_residual(basis.rows(), theta.at(), coordinates.at(), list.view(),
                             direction.at(), residual.at(), scratch.at(), Stream{});
  for (const int64_t i : seen(shape.numel)) {
    expect("direction", i, direction.get(i), combine(basis, shape.rows, i, 30));
    expect("residual", i, residual.get(i), number(40, i) - combine(basis, shape.rows, i, 31));
  }
}

void trial(const Shape& shape) {
  Vector point(shape.wide(), shape.numel, 20), direction(shape.wide(), shape.numel, 30);
  // Few tensors; then more than a kernel's arguments hold, for list.cu's in one launch or several.
  for (const int64_t pieces : {3, 230, 300}) {
    emulated::many_parameters = pieces < 300;
    List params(shape.numel, 1, 40, shape.numel > kSparse ? 3 : pieces);
    Array scratch(DType::i8, cuda::trial_scratch(params.size()));
    cuda::trial(params.view(), shape.numel, point.at(), direction.at(), 2.0,
                shape.dtype == DType::f64, scratch.at(), Stream{});
    for (const int64_t i : seen(shape.numel)) {
      expect("trial", i, params.get(i), number(20, i) + 2 * number(30, i));
    }
  }
}

void store_snapshot(const Shape& shape) {
  Stored snapshots(shape);
  const int64_t index = shape.rows - 1;
  Vector anchor(shape.wide(), shape.numel, 20);
  List params(shape.numel, 1, 40, 3);
  Array scratch(DType::i8, cuda::store_snapshot_scratch(params.size()));
  const bool scaled = is_quantized(shape.dtype);
  cuda::store_snapshot(snapshots.rows(), params.view(), anchor.at(), snapshots.row(index),
                       scaled ? snapshots.scale(index) : nullptr, scratch.at(), Stream{});
  for (const int64_t i : seen(shape.numel)) {
    expect("store_snapshot", i, snapshots.get(index, i), number(40, i) - number(20, i),
           scaled ? 6 / 127.0 : 0);
  }
}

void gram_block(const Shape& shape) {
  Stored snapshots(shape);
  const int64_t index = shape.rows - shape.lists;
  Array gram(DType::f64, shape.rows * shape.rows);
  Array scratch(DType::i8,
                room(shape, cuda::gram_block_scratch(snapshots.rows(), index, shape.lists)));
  cuda::gram_block(snapshots.rows(), index, shape.lists, static_cast<double*>(gram.at()),
                   shape.rows, 1, scratch.at(), Stream{});
  for (int64_t j = index * shape.rows; j < shape.rows * shape.rows; ++j) {
    const double right = product(
        shape, [&](int64_t i) { return snapshots.value(j / shape.rows, i); },
        [&](int64_t i) { return snapshots.value(j % shape.rows, i); });
    expect("gram_block", j, gram.get(j), right);
  }
}

void gram(const Shape& shape) {
  Stored snapshots(shape);
  Array out(DType::f64, shape.rows * shape.rows);
  Array scratch(DType::i8, room(shape, cuda::gram_scratch(snapshots.rows())));
  cuda::gram(snapshots.rows(), static_cast<double*>(out.at()), scratch.at(), Stream{});
  for (int64_t j = 0; j < shape.rows * shape.rows; ++j) {
    const double right = product(
        shape, [&](int64_t i) { return snapshots.value(j / shape.rows, i); },
        [&](int64_t i) { return snapshots.value(j % shape.rows, i); });
    expect("gram", j, out.get(j), right);
  }
}

// So many rows that their pairs fill no dimension of a grid but the first.
void tall_gram(DType dtype) {
  constexpr int64_t kRows = 12000, kNumel = 128;  // sparse memory, hence zeros
  emulated::sampled_blocks = 1;
  Array data(dtype, kRows * kNumel), scale(DType::f32, kRows), out(DType::f64, kRows * kRows);
  Rows rows{data.at(), dtype, kRows, kNumel, kNumel, nullptr};
  for (int64_t i = 0; i < kRows; ++i) scale.put(i, 1);
  if (is_quantized(dtype)) rows.scale = static_cast<float*>(scale.at());
  for (const int64_t r : {int64_t{0}, kRows - 1}) data.put(r * kNumel, 3);
  Array scratch(DType::i8, cuda::gram_scratch(rows));
  cuda::gram(rows, static_cast<double*>(out.at()), scratch.at(), Stream{});
  expect("tall gram", 0, out.get(0), 9);
}

void form_basis(const Shape& shape) {
  constexpr int64_t kDim = 5;
  Stored snapshots(shape);
  Array coefficients(DType::f64, kDim * shape.rows);
  coefficients.fill(kDim * shape.rows, [&](int64_t j) { return number(j / shape.rows, j); });
  Array out(DType::f32, (kDim - 1) * shape.stride + shape.numel);
  cuda::form_basis(snapshots.rows(), static_cast<double*>(coefficients.at()), kDim, out.at(),
                   DType::f32, shape.stride, Stream{});
  for (int64_t k = 0; k < kDim; ++k) {
    for (const int64_t i : seen(shape.numel)) {
      double right = 0;
      for (int64_t t = 0; t < shape.rows; ++t) {
        right += number(k, k * shape.rows + t) * snapshots.value(t, i);
      }
      expect("form_basis", k * shape.stride + i, out.get(k * shape.stride + i), right);
    }
  }
}

// The block of threads against one thread: b, p and info, one behind the other.
void quasi_newton(const Shape& shape) {
  const int64_t d = shape.rows;
  const auto solve = [&](Array& found, bool block) {
    Array guess(DType::f64, d), s(DType::f64, d), y(DType::f64, d), hs(DType::f64, d);
    Array scratch(DType::f64, quasi_newton_scratch(d));
    guess.fill(d, [](int64_t) { return 1; });
    s.fill(d, [](int64_t i) { return number(2, i) / 8; });
    y.fill(d, [](int64_t i) { return number(2, i) / 4 + number(0, i * i) / 16; });
    hs.fill(d, [](int64_t i) { return number(2, i) / 16; });
    found.fill(d * d, [&](int64_t k) { return k / d == k % d ? 2 : 0; });
    QuasiNewtonArgs args;
    const auto data = [](Array& array) { return static_cast<double*>(array.at()); };
    args.dim = d;
    args.H = data(found);
    args.initial = data(guess);
    args.c = data(y);
    args.s = data(s);
    args.y = data(y);
    args.hs = data(hs);
    args.fresh = args.damped = true;
    args.p = args.H + d * d;
    args.info = args.p + d;
    args.scratch = data(scratch);
    if (block) {
      cuda::quasi_newton(args, Stream{});
    } else {
      QuasiNewton<Alone>(Alone(), args).run();
    }
  };
  const int64_t size = d * d + d + kQuasiNewtonInfo;
  Array many(DType::f64, size), one(DType::f64, size);
  solve(many, true);
  solve(one, false);
  for (int64_t j = 0; j < size; ++j) expect("quasi_newton", j, many.get(j), one.get(j), 1e-12);
  expect("quasi_newton learned", 0, many.get(d * d + d + 2), 1);
}

// Gradients to parameters in one captured graph, replayed with other gradients: it needs nothing of
// the host's memory, and leaves the device's as the next replay needs it.
#if defined(DLDR_ON_GPU)
void step(const Shape&) {}  // tests/cuda/test_cuda_streams.py captures real graphs
#else
void step(const Shape&) {
  const Shape shape{DType::f64, 9, 2101, 2112, 1};
  const int64_t d = shape.rows;
  Stored basis(shape);
  Vector origin(shape.dtype, shape.numel, 20);
  // Parameters travel in the arguments of a kernel, the many gradients in scratch memory.
  List gradients(shape.numel, 1, 40, 230), params(shape.numel, 1, 50, 3);
  Array c(shape.dtype, d), H(shape.dtype, d * d), p(shape.dtype, d);
  Array info(shape.dtype, kQuasiNewtonInfo), algebra(shape.dtype, quasi_newton_scratch(d));
  Array sums(DType::i8, cuda::project_scratch(basis.rows(), gradients.size(), 1));
  Array rest(DType::i8, cuda::reconstruct_scratch(params.size()));
  H.fill(d * d, [&](int64_t k) { return k / d == k % d ? 2 : 0; });
  QuasiNewtonArgs args;
  const auto data = [](Array& array) { return static_cast<double*>(array.at()); };
  args.dim = d;
  args.H = data(H);
  args.c = data(c);
  args.p = data(p);
  args.info = data(info);
  args.scratch = data(algebra);
  const auto run = [&](const EntryList& from, const EntryList& to) {
    cuda::project(basis.rows(), from, 1, c.at(), sums.at(), Stream{});
    cuda::quasi_newton(args, Stream{});
    cuda::reconstruct(basis.rows(), origin.at(), p.at(), to, rest.at(), Stream{});
  };
  std::vector<std::function<void()> > graph;
  {
    std::vector<Entry> from(gradients.view().entries, gradients.view().entries + gradients.size());
    std::vector<Entry> to(params.view().entries, params.view().entries + params.size());
    emulated::captured = &graph;
    run({from.data(), gradients.size()}, {to.data(), params.size()});
    emulated::captured = nullptr;
    std::fill(from.begin(), from.end(), Entry());
    std::fill(to.begin(), to.end(), Entry());
  }
  for (int64_t turn = 0; turn < 3; ++turn) {
    gradients.fill(shape.numel, 1, 40 + turn);
    for (const auto& launch : graph) launch();
    std::vector<double> replayed;
    for (int64_t i = 0; i < shape.numel; ++i) replayed.push_back(params.get(i));
    params.fill(shape.numel, 1, 50);
    run(gradients.view(), params.view());
    for (int64_t r = 0; r < d; ++r) {
      const double right = product(
          shape, [&](int64_t i) { return basis.value(r, i); },
          [&](int64_t i) { return number(40 + turn, i); });
      expect("step", r, p.get(r), -2 * right);
    }
    for (int64_t i = 0; i < shape.numel; ++i) {
      expect("replay", i, replayed[static_cast<size_t>(i)], params.get(i));
    }
    params.fill(shape.numel, 1, 60);
  }
}
#endif

void planted() {
  const Shape shape{DType::f32, 8, 2112, 2112, 1};
  Stored basis(shape);
  List list(shape.numel, 1, 20, 1);
  Rows rows = basis.rows();
  ++rows.rows;
  Array out(DType::f32, rows.rows);
  Array scratch(DType::i8, cuda::project_scratch(rows, list.size(), 1));
  cuda::project(rows, list.view(), 1, out.at(), scratch.at(), Stream{});
  std::printf("planted: %g\n", out.get(0));
}

struct Kernel {
  const char* name;
  void (*run)(const Shape&);
  int64_t rows, numel;  // of the small cases
};
constexpr Kernel kKernels[] = {
    {"project", project, 9, 2101},
    {"project", project, 9, 9001},   // more chunks than one launch adds up
    {"project", project, 9, 13001},  // and of several tiles
    {"reconstruct", reconstruct, 9, 2101},
    {"reconstruct_residual", reconstruct_residual, 9, 2101},
    {"trial", trial, 1, 2101},
    {"store_snapshot", store_snapshot, 3, 2101},
    {"gram_block", gram_block, 9, 2101},
    {"gram", gram, 45, 301},              // more groups of rows than one block takes
    {"form_basis", form_basis, 35, 301},  // more snapshots than are staged at a time
    {"quasi_newton", quasi_newton, 17, 0},
    {"quasi_newton", quasi_newton, 117, 0},  // in panels
    {"step", step, 9, 0},
};

}  // namespace

int main(int count, char** arguments) {
  const std::string size = count > 1 ? arguments[1] : "", only = count > 2 ? arguments[2] : "";
  if (size == "planted") {
    planted();
    return 0;
  }
  if (size != "small" && size != "far") {
    std::fprintf(stderr, "usage: %s small|far|planted [kernel]\n", arguments[0]);
    return 2;
  }
  const bool far = size == "far";
  emulated::sampled_blocks = far ? 1 : 0;
  constexpr int64_t kFar = (int64_t{1} << 31) + 77;
  // Operating system threads are slow, and these formats go past every barrier.
#if defined(DLDR_EMULATED_THREADS)
  const std::vector<DType> dtypes = {DType::i8, DType::f64};
  const auto skipped = [](const Kernel& kernel, DType dtype) {
    return dtype == DType::f64 && std::string(kernel.name) != "gram";
  };
#else
  const std::vector<DType> dtypes = {DType::f32, DType::i8, DType::f64, DType::bf16};
  const auto skipped = [](const Kernel&, DType) { return false; };
#endif
  for (const Kernel& kernel : kKernels) {
    if ((!only.empty() && only != kernel.name) || (far && kernel.numel == 0)) continue;
    for (const DType dtype : dtypes) {
      // Beside the formats that stand for all, float64 has a Gram kernel of its own.
      const bool own = dtype == DType::f64 && std::string(kernel.name) == "gram";
      if (far && dtype != DType::f32 && dtype != DType::i8 && !own) continue;
      if (kernel.numel == 0 && dtype != dtypes[0]) continue;  // has only float64
      if (skipped(kernel, dtype)) continue;
      const int64_t numel = far ? kFar : kernel.numel;
      try {
        if (far && std::string(kernel.name) == "gram") tall_gram(dtype);
        kernel.run({dtype, far ? 2 : kernel.rows, numel, ceil_div(numel, 16) * 16, far ? 1 : 3});
      } catch (const std::exception& error) {
        std::fprintf(stderr, "wrong: %s, dtype %d\n", error.what(), static_cast<int>(dtype));
        return 1;
      }
    }
    std::printf("%s: good\n", kernel.name);
    std::fflush(stdout);
  }
}
