// The d x d algebra of a P-BFGS step: update the inverse Hessian H with a curvature pair (s, y),
// then find the direction. One source for the CPU (one thread) and for CUDA (one block of threads):
// `Team` says how work is divided. The rules are those of dldr_ext/optim/algebra/bfgs.py, where
// their sources are named.
#pragma once

#include <cmath>

#include "kernels.h"

namespace dldr {

// What takes long, in terms of how a team divides work. A team may have its own way.
template <class Team>
struct Division {
  DLDR_HOST_DEVICE const Team& team() const { return static_cast<const Team&>(*this); }

  // to = H x
  DLDR_HOST_DEVICE void multiply(const double* H, int d, const double* x, double* to) const {
    team().each(d, [&](int i) {
      double sum = 0;
      // H is symmetric: by columns, neighbouring threads read neighbouring numbers.
      for (int j = 0; j < d; ++j) sum += H[j * d + i] * x[j];
      to[i] = sum;
    });
    team().sync();
  }

  // H += s v' + v s', symmetric to the bit.
  DLDR_HOST_DEVICE void add(double* H, int d, const double* s, const double* v) const {
    team().grid(d, d, [&](int i, int j) { H[i * d + j] += s[i] * v[j] + v[i] * s[j]; });
    team().sync();
  }

  // The largest pivot of H's Cholesky factorization by the smallest; infinite if one is not
  // positive. `factor` has room for d x d numbers, `quotient` for d.
  DLDR_HOST_DEVICE double pivots(const double* H, int d, double* factor, double* quotient) const {
    team().each(d * d, [&](int i) { factor[i] = H[i]; });
    team().sync();
    double smallest = INFINITY, largest = 0;
    for (int k = 0; k < d; ++k) {
      const double pivot = factor[k * d + k];
      if (!(pivot > 0)) return INFINITY;
      smallest = pivot < smallest ? pivot : smallest;
      largest = pivot > largest ? pivot : largest;
      // Rows below the pivot; row k stays as it is: entry (i, j) loses f_ik f_jk / pivot.
      const int next = k + 1, left = d - next;
      team().each(left, [&](int j) { quotient[j] = factor[(next + j) * d + k] / pivot; });
      team().sync();
      team().grid(left, left, [&](int i, int j) {
        double* const row = factor + (next + i) * d;
        if (j <= i) row[next + j] -= row[k] * quotient[j];
      });
      team().sync();
    }
    return largest / smallest;
  }
};

// One thread does everything. Indices are 32 bits wide, as d <= 1024 is, and none is divided: on a
// GPU that takes longer than the arithmetic.
struct Alone : Division<Alone> {
  template <class F>
  void each(int count, F&& f) const {
    for (int i = 0; i < count; ++i) f(i);
  }
  template <class F>
  void grid(int rows, int columns, F&& f) const {
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) f(i, j);
    }
  }
  template <class F>
  double sum(int count, F&& f) const {
    double total = 0;
    for (int i = 0; i < count; ++i) total += f(i);
    return total;
  }
  void sync() const {}
};

template <class Team>
class QuasiNewton {
 public:
  DLDR_HOST_DEVICE QuasiNewton(const Team& team, const QuasiNewtonArgs& args)
      : team_(team), args_(args), d_(static_cast<int>(args.dim)) {}

  // Every thread of the team calls it; `p` and H are written by the threads together.
  DLDR_HOST_DEVICE void run() {
    double updated = 0, was_reset = 0, bound = NAN;
    if (args_.s != nullptr) {
      updated = update();
      if (updated != 0 && !args_.published) {
        bound = condition();
        if (!(bound < kCondition)) {
          updated = 0;
          was_reset = 1;
          reset();
        }
      }
    }
    const double size = std::sqrt(dot(args_.c, args_.c));
    double slope = direction();
    if (!descends(slope, size)) {
      reset();
      was_reset = 1;
      slope = direction();
    }
    const double values[kQuasiNewtonInfo] = {slope,
                                             size,
                                             updated,
                                             was_reset,
                                             descends(slope, size) ? 1.0 : 0.0,
                                             bound,
                                             std::sqrt(dot(args_.p, args_.p))};
    team_.each(1, [&](int) {
      for (int k = 0; k < static_cast<int>(kQuasiNewtonInfo); ++k) args_.info[k] = values[k];
    });
  }

 private:
  static constexpr double kCurvature = 1e-8, kDescent = 1e-10, kCondition = 1e12;
  static constexpr double kTiny = 1e-200, kPublished = 1e-20, kPowell = 0.2;

  DLDR_HOST_DEVICE double dot(const double* a, const double* b) const {
    return team_.sum(d_, [&](int i) { return a[i] * b[i]; });
  }

  DLDR_HOST_DEVICE void multiply(const double* x, double* to) const {
    team_.multiply(args_.H, d_, x, to);
  }

  // The BFGS update of H. Returns 1 if it was made, 2 if with a damped y, else 0.
  DLDR_HOST_DEVICE double update() {
    double* const y = args_.scratch;
    double* const Hy = y + d_;
    double* const v = Hy + d_;
    const double* const s = args_.s;
    team_.each(d_, [&](int i) { y[i] = args_.y[i]; });
    team_.sync();
    const double ss = dot(s, s);
    double yy = dot(y, y), sy = dot(s, y), factor = 1;
    bool damped = false;
    if (args_.published) {
      if (!(sy > kPublished)) return 0;
    } else {
      if (!(std::isfinite(ss + yy + sy) && ss > kTiny && yy > kTiny)) return 0;
      if (args_.fresh) {
        multiply(y, Hy);
        const double scale = sy / dot(y, Hy);
        if (scale > 1) factor = scale;
      }
      if (args_.damped) damped = damp(y, factor, yy, sy);
      if (!(sy > kCurvature * std::sqrt(ss * yy))) return 0;
    }
    if (factor != 1) {
      team_.each(d_ * d_, [&](int i) { args_.H[i] *= factor; });
      team_.sync();
    }
    multiply(y, Hy);
    const double weight = 0.5 * (1 + dot(y, Hy) / sy) / sy;
    team_.each(d_, [&](int i) { v[i] = weight * s[i] - Hy[i] / sy; });
    team_.sync();
    // (I - s y'/sy) H (I - y s'/sy) + s s'/sy
    team_.add(args_.H, d_, s, v);
    return damped ? 2 : 1;
  }

  // Powell's damping of y: at least a fraction of the curvature s.H^-1 s that H, times `factor`,
  // predicts is kept. Returns whether y had to change.
  DLDR_HOST_DEVICE bool damp(double* y, double factor, double& yy, double& sy) const {
    const double predicted = dot(args_.s, args_.hs) / factor;
    if (sy >= kPowell * predicted) return false;
    const double t = (1 - kPowell) * predicted / (predicted - sy);
    team_.each(d_, [&](int i) { y[i] = t * y[i] + (1 - t) * (args_.hs[i] / factor); });
    team_.sync();
    yy = dot(y, y);
    sy = dot(args_.s, y);
    return true;
  }

  // A lower bound on H's condition number: the pivots are squares of the factor's diagonal.
  DLDR_HOST_DEVICE double condition() const {
    double* const quotient = args_.scratch + 3 * d_;
    return team_.pivots(args_.H, d_, quotient + d_, quotient);
  }

  DLDR_HOST_DEVICE void reset() const {
    team_.sync();
    team_.grid(d_, d_,
               [&](int i, int j) { args_.H[i * d_ + j] = i == j ? args_.initial[i] : 0.0; });
    team_.sync();
  }

  // p = -H c; returns its slope c.p.
  DLDR_HOST_DEVICE double direction() const {
    multiply(args_.c, args_.p);
    team_.each(d_, [&](int i) { args_.p[i] = -args_.p[i]; });
    team_.sync();
    return dot(args_.c, args_.p);
  }

  DLDR_HOST_DEVICE bool descends(double slope, double size) const {
    const double bound = kDescent * size * std::sqrt(dot(args_.p, args_.p));
    return std::isfinite(bound) && slope < -bound;
  }

  const Team& team_;
  const QuasiNewtonArgs& args_;
  int d_;
};

}  // namespace dldr
