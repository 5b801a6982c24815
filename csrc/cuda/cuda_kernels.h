// The torch-free CUDA kernels: what their host functions take. All pointers are device memory,
// every function only queues work on the stream, and scratch memory is the caller's: as many bytes
// as the *_scratch function of the same name says, aligned to 16, in use until the stream has gone
// past the call.
#pragma once

#include "../kernels.h"

namespace dldr::cuda {

struct Stream {
  void* handle = nullptr;
  int64_t multiprocessors = 1;
};

// Tile of project and of the Gram products: the elements whose products one block sums up. The
// order of every sum depends on it and on n alone.
#if !defined(DLDR_DOT_TILE)  // benchmarks/gpu/sweep.cu tries others
#define DLDR_DOT_TILE 2048
#endif
constexpr int64_t kDotTile = DLDR_DOT_TILE;
// Right-hand sides that one read of the rows serves.
constexpr int64_t kMaxLists = 8;
// Rows that the op allocates start at multiples of this many bytes.
constexpr int64_t kRowAlign = 256;

// out[k * rows + r] = product of basis row r with list k; `list` holds the `lists` lists one behind
// the other. `out` is float32, float64 with a float64 basis.
int64_t project_scratch(const Rows& basis, int64_t list_size, int64_t lists);
void project(const Rows& basis, const EntryList& list, int64_t lists, void* out, void* scratch,
             const Stream& stream);

// list = origin + theta @ basis; origin may be null.
int64_t reconstruct_scratch(int64_t list_size);
void reconstruct(const Rows& basis, const void* origin, const void* theta, const EntryList& list,
                 void* scratch, const Stream& stream);

// direction = theta @ basis and residual = list - coordinates @ basis, in one read of the basis.
int64_t reconstruct_residual_scratch(int64_t list_size);
void reconstruct_residual(const Rows& basis, const void* theta, const void* coordinates,
                          const EntryList& list, void* direction, void* residual, void* scratch,
                          const Stream& stream);

// list = point + alpha * direction; both float64 if `wide`, else float32.
int64_t trial_scratch(int64_t list_size);
void trial(const EntryList& list, int64_t numel, const void* point, const void* direction,
           double alpha, bool wide, void* scratch, const Stream& stream);

// row = round(list - anchor), one row of the snapshots; `row_scale` is its row of the scales.
int64_t store_snapshot_scratch(int64_t list_size);
void store_snapshot(const Rows& snapshots, const EntryList& list, const void* anchor, void* row,
                    float* row_scale, void* scratch, const Stream& stream);

// gram[i, j] and gram[j, i] for index <= i < index + count and j <= i, from the stored rows;
// element (i, j) of gram lies at gram + i * row_stride + j * column_stride.
int64_t gram_block_scratch(const Rows& snapshots, int64_t index, int64_t count);
void gram_block(const Rows& snapshots, int64_t index, int64_t count, double* gram,
                int64_t row_stride, int64_t column_stride, void* scratch, const Stream& stream);

// All products of the rows with each other, (rows, rows).
int64_t gram_scratch(const Rows& snapshots);
void gram(const Rows& snapshots, double* out, void* scratch, const Stream& stream);

// out[r, i] = round(sum over t of coefficients[r, t] * snapshots[t, i]), rows of `out` being
// `out_stride` elements apart.
void form_basis(const Rows& snapshots, const double* coefficients, int64_t dim, void* out,
                DType out_dtype, int64_t out_stride, const Stream& stream);

// One block of threads does the whole d x d algebra of a step; scratch memory is in the arguments.
void quasi_newton(const QuasiNewtonArgs& args, const Stream& stream);

}  // namespace dldr::cuda
