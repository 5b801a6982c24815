// The d x d algebra of a P-BFGS step: learn from a pair (s, y), then find the direction. One source
// for the CPU (one thread) and for CUDA (one block of threads): `Team` says how work is shared. The
// rules are those of dldr_ext/optim/bfgs.py, where their sources are named.
#pragma once

#include <cmath>

#include "kernels.h"

namespace dldr {

// One thread does everything.
struct Alone {
  template <class F>
  void each(int64_t count, F&& f) const {
    for (int64_t i = 0; i < count; ++i) f(i);
  }
  template <class F>
  double sum(int64_t count, F&& f) const {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += f(i);
    return total;
  }
  void sync() const {}
};

template <class Team>
class QuasiNewton {
 public:
  DLDR_HOST_DEVICE QuasiNewton(const Team& team, const QuasiNewtonArgs& args)
      : team_(team), args_(args), d_(args.dim) {}

  // Every thread of the team calls it; `info` and `p` are written by all, b by their owners.
  DLDR_HOST_DEVICE void run() {
    double learned = 0, reset = 0, bound = NAN;
    if (args_.s != nullptr) {
      learned = learn();
      if (learned != 0 && !args_.published) {
        bound = condition();
        if (!(bound < kCondition)) {
          learned = 0;
          reset = 1;
          forget();
        }
      }
    }
    const double size = std::sqrt(dot(args_.c, args_.c));
    double slope = direction();
    if (!descends(slope, size)) {
      forget();
      reset = 1;
      slope = direction();
    }
    const double values[kQuasiNewtonInfo] = {slope,
                                             size,
                                             learned,
                                             reset,
                                             descends(slope, size) ? 1.0 : 0.0,
                                             bound,
                                             std::sqrt(dot(args_.p, args_.p))};
    team_.each(kQuasiNewtonInfo, [&](int64_t i) { args_.info[i] = values[i]; });
  }

 private:
  static constexpr double kCurvature = 1e-8, kDescent = 1e-10, kCondition = 1e12;
  static constexpr double kTiny = 1e-200, kPublished = 1e-20, kPowell = 0.2;

  DLDR_HOST_DEVICE double dot(const double* a, const double* b) const {
    return team_.sum(d_, [&](int64_t i) { return a[i] * b[i]; });
  }

  // to = B x
  DLDR_HOST_DEVICE void multiply(const double* x, double* to) const {
    team_.each(d_, [&](int64_t i) {
      double sum = 0;
      // B is symmetric: by columns, neighbouring threads read neighbouring numbers.
      for (int64_t j = 0; j < d_; ++j) sum += args_.b[j * d_ + i] * x[j];
      to[i] = sum;
    });
    team_.sync();
  }

  // 1 if b learned, 2 from a damped y, else 0.
  DLDR_HOST_DEVICE double learn() {
    double* const y = args_.scratch;
    double* const by = y + d_;
    double* const v = by + d_;
    const double* const s = args_.s;
    team_.each(d_, [&](int64_t i) { y[i] = args_.y[i]; });
    team_.sync();
    const double ss = dot(s, s);
    double yy = dot(y, y), sy = dot(s, y), factor = 1;
    bool damped = false;
    if (args_.published) {
      if (!(sy > kPublished)) return 0;
    } else {
      if (!(std::isfinite(ss + yy + sy) && ss > kTiny && yy > kTiny)) return 0;
      if (args_.fresh) {
        multiply(y, by);
        const double scale = sy / dot(y, by);
        if (scale > 1) factor = scale;
      }
      if (args_.damped) damped = damp(y, factor, yy, sy);
      if (!(sy > kCurvature * std::sqrt(ss * yy))) return 0;
    }
    if (factor != 1) {
      team_.each(d_ * d_, [&](int64_t i) { args_.b[i] *= factor; });
      team_.sync();
    }
    multiply(y, by);
    const double weight = 0.5 * (1 + dot(y, by) / sy) / sy;
    team_.each(d_, [&](int64_t i) { v[i] = weight * s[i] - by[i] / sy; });
    team_.sync();
    // (I - s y'/sy) B (I - y s'/sy) + s s'/sy, symmetric to the bit.
    team_.each(d_ * d_, [&](int64_t k) {
      const int64_t i = k / d_, j = k % d_;
      args_.b[k] += s[i] * v[j] + v[i] * s[j];
    });
    team_.sync();
    return damped ? 2 : 1;
  }

  // Powell's damping of y: it keeps a part of the curvature s.B^-1 s that B, times `factor`,
  // believes in. Whether it had to change y.
  DLDR_HOST_DEVICE bool damp(double* y, double factor, double& yy, double& sy) const {
    const double believed = dot(args_.s, args_.hs) / factor;
    if (sy >= kPowell * believed) return false;
    const double t = (1 - kPowell) * believed / (believed - sy);
    team_.each(d_, [&](int64_t i) { y[i] = t * y[i] + (1 - t) * (args_.hs[i] / factor); });
    team_.sync();
    yy = dot(y, y);
    sy = dot(args_.s, y);
    return true;
  }

  // A lower bound on B's condition number, from the diagonal of its Cholesky factor; infinite if B
  // is not positive definite.
  DLDR_HOST_DEVICE double condition() const {
    double* const factor = args_.scratch + 3 * d_;
    team_.each(d_ * d_, [&](int64_t i) { factor[i] = args_.b[i]; });
    team_.sync();
    double smallest = INFINITY, largest = 0;
    for (int64_t k = 0; k < d_; ++k) {
      const double pivot = factor[k * d_ + k];
      if (!(pivot > 0)) return INFINITY;
      smallest = pivot < smallest ? pivot : smallest;
      largest = pivot > largest ? pivot : largest;
      // Rows below the pivot; row k stays as it is: entry (i, j) loses f_ik f_jk / pivot.
      team_.each((d_ - k - 1) * (d_ - k - 1), [&](int64_t p) {
        const int64_t i = k + 1 + p / (d_ - k - 1), j = k + 1 + p % (d_ - k - 1);
        if (j <= i) factor[i * d_ + j] -= factor[i * d_ + k] * (factor[j * d_ + k] / pivot);
      });
      team_.sync();
    }
    return largest / smallest;  // the pivots are squares of the factor's diagonal
  }

  DLDR_HOST_DEVICE void forget() const {
    team_.sync();
    team_.each(d_ * d_,
               [&](int64_t k) { args_.b[k] = k / d_ == k % d_ ? args_.guess[k % d_] : 0.0; });
    team_.sync();
  }

  // p = -B c; returns its slope c.p.
  DLDR_HOST_DEVICE double direction() const {
    multiply(args_.c, args_.p);
    team_.each(d_, [&](int64_t i) { args_.p[i] = -args_.p[i]; });
    team_.sync();
    return dot(args_.c, args_.p);
  }

  DLDR_HOST_DEVICE bool descends(double slope, double size) const {
    const double bound = kDescent * size * std::sqrt(dot(args_.p, args_.p));
    return std::isfinite(bound) && slope < -bound;
  }

  const Team& team_;
  const QuasiNewtonArgs& args_;
  int64_t d_;
};

}  // namespace dldr
