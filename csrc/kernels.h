// The torch-free CPU kernels: arguments, and one table of functions for each instruction set.
// Every function works on chunks [begin, end) of a plan, so that the caller chooses the threads.
#pragma once

#include "plan.h"

// Whether the compiler knows AVX-512 BF16 and AMX.
#if !defined(__x86_64__) || !defined(__linux__)
#define DLDR_X86_MMA 0
#elif defined(__clang__)
#define DLDR_X86_MMA (__clang_major__ >= 12)
#else
#define DLDR_X86_MMA (__GNUC__ >= 11)
#endif

namespace dldr {

// Rows of stored numbers: element i of row r is data[r * stride + i], times
// scale[r * ceil(numel / kScaleBlock) + i / kScaleBlock] where scale is given.
struct Rows {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0;
  int64_t numel = 0;
  int64_t stride = 0;
  const float* scale = nullptr;
};

// Arithmetic is float32, or float64 where the rows are float64: `wide` pointers are of that type.

// partials[(chunk * count + k) * rows + r] = sum over the chunk of rows[r, i] * lists[k][i]
struct ProjectArgs {
  Plan plan;
  Rows basis;
  const EntryList* lists = nullptr;
  int64_t count = 1;
  double* partials = nullptr;
};

// list[i] = origin[i] + sum over r of theta[r] * basis[r, i]
struct ReconstructArgs {
  Plan plan;
  Rows basis;
  EntryList list;
  const void* origin = nullptr;  // wide, or null for zeros
  const void* theta = nullptr;   // wide
};

// direction[i] = sum over r of theta[r] * basis[r, i]; residual[i] = list[i] - the same sum with
// coordinates. All but the basis and the list are wide.
struct ResidualArgs {
  Plan plan;
  Rows basis;
  EntryList list;
  const void* theta = nullptr;
  const void* coordinates = nullptr;
  void* direction = nullptr;
  void* residual = nullptr;
};

// list[i] = point[i] + alpha * direction[i]
struct TrialArgs {
  Plan plan;
  EntryList list;
  const void* point = nullptr;
  const void* direction = nullptr;
  double alpha = 0;
  bool wide = false;  // point and direction are float64
};

// Row `index` = round(list - anchor); partials[chunk * (index + 1) + t] = its product with row t.
// store_snapshot writes the row alone.
struct GramAppendArgs {
  Plan plan;
  Rows snapshots;  // rows [0, index] are touched
  EntryList list;
  const void* anchor = nullptr;  // wide
  int64_t index = 0;
  void* row = nullptr;         // row `index` of the snapshots
  float* row_scale = nullptr;  // and of its scale
  double* partials = nullptr;
};

// partials[((chunk - first) * count + k) * (index + count) + t], t <= index + k, = product of rows
// index + k and t over the chunk, the same to the bit as gram_append's.
struct GramBlockArgs {
  Plan plan;
  Rows snapshots;
  int64_t index = 0;
  int64_t count = 0;
  int64_t first = 0;  // the chunk whose sums are the first in partials
  double* partials = nullptr;
};

// partials[chunk * rows * rows + r * rows + t], t <= r, = product of rows r and t over the chunk.
// Runs over tasks: task k makes strip k % gram_strips(rows) of chunk k / gram_strips(rows).
struct GramArgs {
  Plan plan;
  Rows snapshots;
  double* partials = nullptr;
};

// out[r, i] = round(sum over t of coefficients[r * T + t] * snapshots[t, i])
struct FormBasisArgs {
  Plan plan;
  Rows snapshots;
  const double* coefficients = nullptr;
  int64_t dim = 0;
  void* out = nullptr;
  DType out_dtype = DType::f32;
};

// The d x d algebra of a step (quasi_newton.h), all float64. H, the inverse Hessian, is updated
// first with the curvature pair (s, y), unless s is null; hs is H^-1 s. Then p = -H c. H is reset
// to diag(initial) where it is no longer usable.
struct QuasiNewtonArgs {
  int64_t dim = 0;
  double* H = nullptr;
  const double* initial = nullptr;
  const double* c = nullptr;
  const double* s = nullptr;
  const double* y = nullptr;
  const double* hs = nullptr;
  bool fresh = false;      // H is still diag(initial): it may be scaled up before its update
  bool damped = false;     // Powell's damping
  bool published = false;  // the rule of the paper's code instead
  double* p = nullptr;
  double* info = nullptr;  // kQuasiNewtonInfo numbers
  double* scratch = nullptr;
};
// The facts of a step: c.p, |c|, whether H was updated (2: with a damped y), whether it was reset,
// whether p is a descent direction, a lower bound on H's condition number (NaN without an update),
// |p|.
constexpr int64_t kQuasiNewtonInfo = 7;
constexpr int64_t quasi_newton_scratch(int64_t dim) { return dim * (dim + 4); }

struct CpuKernels {
  const char* name;
  void (*project)(const ProjectArgs&, int64_t begin, int64_t end);
  void (*reconstruct)(const ReconstructArgs&, int64_t begin, int64_t end);
  void (*reconstruct_residual)(const ResidualArgs&, int64_t begin, int64_t end);
  void (*trial)(const TrialArgs&, int64_t begin, int64_t end);
  void (*store_snapshot)(const GramAppendArgs&, int64_t begin, int64_t end);
  void (*gram_append)(const GramAppendArgs&, int64_t begin, int64_t end);
  void (*gram_block)(const GramBlockArgs&, int64_t begin, int64_t end);
  void (*gram)(const GramArgs&, int64_t begin, int64_t end);
  void (*form_basis)(const FormBasisArgs&, int64_t begin, int64_t end);
};

// What a unit with matrix instructions does for itself; everything else is that of another unit.
struct MmaKernels {
  const char* name;
  void (*gram)(const GramArgs&, int64_t begin, int64_t end);
  void (*form_basis)(const FormBasisArgs&, int64_t begin, int64_t end);

  CpuKernels over(CpuKernels base) const {
    base.name = name;
    base.gram = gram;
    base.form_basis = form_basis;
    return base;
  }
};

// sums[k] += sum over chunks of partials[chunk * width + k], in order of the chunks.
void add_chunks(const double* partials, int64_t chunks, int64_t width, double* sums);
// The same from zero.
void reduce_chunks(const double* partials, int64_t chunks, int64_t width, double* sums);

}  // namespace dldr
