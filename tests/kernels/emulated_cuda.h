// Carries out CUDA kernels on the CPU: the same .cu files, compiled by the host compiler, with
// grids, blocks, shared memory, barriers and warp shuffles. Blocks run one after the other. The
// threads of a block are
//   - fibers that take turns at barriers and shuffles (the default: fast, deterministic, and a
//     barrier that some thread never reaches is reported), or
//   - threads of the operating system (DLDR_EMULATED_THREADS), for the thread sanitizer, which then
//     reports a missing barrier as the race that it is.
// Dynamic shared memory is allocated for each block at its exact size, full of NaN, so that the
// address sanitizer sees what lies outside and sums show what was never written.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(DLDR_EMULATED_THREADS)
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <semaphore>
#include <thread>
#else
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulated {

constexpr int kLanes = 32;
constexpr size_t kSlot = 32;  // bytes that a lane gives others at a time
// The limits of the smallest architecture that the kernels are built for.
constexpr int64_t kMaxShared = 99 << 10;
constexpr int64_t kDefaultShared = 48 << 10;
constexpr int64_t kMaxThreads = 1024;
constexpr int64_t kMaxGridX = 0x7fffffff;
constexpr int64_t kMaxGridY = 0xffff;

class Block;

#if !defined(DLDR_EMULATED_THREADS)
// Fibers start with swapcontext and then switch with these: no system call.
using Jump = void* [5];

// The address sanitizer need not know: each fiber goes on where it stopped.
[[gnu::noinline, gnu::no_sanitize("address")]] inline void jump_to(Jump& jump) {
  __builtin_longjmp(jump, 1);
}
#endif

struct Thread {
  dim3 index;
  Block* block = nullptr;
  int warp = 0, lane = 0;
  unsigned turn = 0;    // of its shuffles
  unsigned counts = 0;  // of the block, that it took part in
#if !defined(DLDR_EMULATED_THREADS)
  ucontext_t context{};
  Jump jump{};
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
#endif
};

inline thread_local Thread* self = nullptr;
inline dim3 block_index, block_size, grid_size;
inline cudaError_t last_error = cudaSuccess;
// Whether the driver takes 32 KiB of arguments.
inline bool many_parameters = true;
// What kernels have asked for beyond the default.
inline std::map<const void*, int64_t> requests;
// Of a grid with more blocks along x, only so many at either end are run; 0: all.
inline int64_t sampled_blocks = 0;
// A graph that is being captured: launches are kept, with the arguments that they have, not run.
inline std::vector<std::function<void()>>* captured = nullptr;

#if defined(DLDR_EMULATED_THREADS)

// Not std::barrier: its waiters also meet in counters that all barriers share, an order that a GPU
// does not have and that hid two of three dropped barriers of quasi_newton.cu from the sanitizer.
class Barrier {
 public:
  explicit Barrier(int threads) : expected_(threads) {}
  void wait() {
    std::unique_lock lock(mutex_);
    ++arrived_;
    if (release()) return;
    turned_.wait(lock, [this, turn = turn_] { return turn != turn_; });
  }
  void leave() {
    const std::lock_guard lock(mutex_);
    --expected_;
    release();
  }

 private:
  bool release() {
    if (arrived_ < expected_ || arrived_ == 0) return false;
    arrived_ = 0;
    ++turn_;
    turned_.notify_all();
    return true;
  }
  std::mutex mutex_;
  std::condition_variable turned_;
  int expected_, arrived_ = 0, turn_ = 0;
};

// Threads that stay from block to block: to start one costs a millisecond under the sanitizer.
class Crew {
 public:
  // Runs work(0) ... work(count - 1) at the same time.
  void run(size_t count, const std::function<void(size_t)>& work) {
    work_ = &work;
    left_ = count;
    while (workers_.size() < count) {
      Worker& worker = workers_.emplace_back();
      worker.thread = std::thread([this, &worker, i = workers_.size() - 1] {
        for (worker.go.acquire(); work_ != nullptr; worker.go.acquire()) {
          (*work_)(i);
          if (--left_ == 0) finished_.release();
        }
      });
    }
    for (size_t i = 0; i < count; ++i) workers_[i].go.release();
    finished_.acquire();
  }
  ~Crew() {
    work_ = nullptr;
    for (Worker& worker : workers_) worker.go.release();
    for (Worker& worker : workers_) worker.thread.join();
  }

 private:
  struct Worker {
    std::binary_semaphore go{0};
    std::thread thread;
  };
  std::deque<Worker> workers_;
  const std::function<void(size_t)>* work_ = nullptr;
  std::atomic<size_t> left_{0};
  std::binary_semaphore finished_{0};
};

#else

inline ucontext_t scheduler_start;
inline Jump scheduler;

// From a thread to the scheduler, which comes back with resume.
[[gnu::noinline]] inline void give_way() {
  if (__builtin_setjmp(self->jump) == 0) jump_to(scheduler);
}

// From the scheduler to a thread, until it gives way or ends.
[[gnu::noinline]] inline void resume(Thread& thread) {
  self = &thread;
  if (__builtin_setjmp(scheduler) != 0) return;
  if (thread.started) jump_to(thread.jump);
  thread.started = true;
  swapcontext(&scheduler_start, &thread.context);
}

inline bool progress = false;

class Barrier {
 public:
  explicit Barrier(int threads) : expected_(threads) {}
  void wait() {
    const int turn = turn_;
    ++arrived_;
    release();
    while (turn == turn_) give_way();
  }
  void leave() {
    --expected_;
    release();
  }

 private:
  void release() {
    if (arrived_ < expected_ || arrived_ == 0) return;
    arrived_ = 0;
    ++turn_;
    progress = true;
  }
  int expected_, arrived_ = 0, turn_ = 0;
};

#endif

class Block {
 public:
  Block(int threads, int64_t shared, const std::function<void()>& body)
      : all_(threads), body_(body), shared_(static_cast<size_t>(shared)) {
    for (auto& byte : shared_) byte = static_cast<char>(0xff);
    for (int begin = 0; begin < threads; begin += kLanes) {
      const int lanes = threads - begin < kLanes ? threads - begin : kLanes;
      warps_.push_back(std::make_unique<Warp>(lanes));
    }
    threads_.resize(static_cast<size_t>(threads));
    for (int t = 0; t < threads; ++t) {
      Thread& thread = threads_[static_cast<size_t>(t)];
      thread.index = dim3(static_cast<unsigned>(t));
      thread.block = this;
      thread.warp = t / kLanes;
      thread.lane = t % kLanes;
    }
  }

  void* shared() { return shared_.data(); }
  void sync() { all_.wait(); }
  // How many threads of the block call it with true.
  int count(bool yes) {
    const size_t turn = self->counts++ % 3;
    if (yes) __atomic_fetch_add(&counts_[turn], 1, __ATOMIC_RELAXED);
    all_.wait();
    const int all = __atomic_load_n(&counts_[turn], __ATOMIC_RELAXED);
    // Of the turn before last, whose readers have all passed this barrier, for the turn after next.
    if (self == &threads_[0]) __atomic_store_n(&counts_[(turn + 2) % 3], 0, __ATOMIC_RELAXED);
    return all;
  }

  // The value that the lane with number lane ^ mask gives.
  template <class T>
  T exchange(T value, int mask) {
    static_assert(sizeof(T) <= kSlot);
    Warp& warp = *warps_[static_cast<size_t>(self->warp)];
    // Two buffers in turn: nobody writes the next value over one that is still to be read.
    auto& slots = warp.slots[self->turn++ % 2];
    std::memcpy(&slots[self->lane], &value, sizeof(T));
    warp.barrier.wait();
    T other;
    std::memcpy(&other, &slots[self->lane ^ mask], sizeof(T));
    return other;
  }

  // What every lane gives, at its place.
  template <class T>
  void gather(const T& value, T (&all)[kLanes]) {
    static_assert(sizeof(T) <= kSlot);
    Warp& warp = *warps_[static_cast<size_t>(self->warp)];
    auto& slots = warp.slots[self->turn++ % 2];
    std::memcpy(&slots[self->lane], &value, sizeof(T));
    warp.barrier.wait();
    for (int i = 0; i < kLanes; ++i) std::memcpy(&all[i], &slots[i], sizeof(T));
  }

  void run() {
#if defined(DLDR_EMULATED_THREADS)
    static Crew crew;
    crew.run(threads_.size(), [this](size_t i) { enter(threads_[i]); });
#else
    for (Thread& thread : threads_) {
      thread.stack = take_stack();
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStack;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, &Block::start, 0);
    }
    for (size_t left = threads_.size(); left > 0 && !error_;) {
      progress = false;
      for (Thread& thread : threads_) {
        if (thread.done || error_) continue;
        resume(thread);
        if (thread.done) {
          --left;
          progress = true;
        }
      }
      if (!progress && !error_) {
        error_ = std::make_exception_ptr(
            std::logic_error("deadlock: a barrier that not every thread of the block reaches"));
      }
    }
    for (Thread& thread : threads_) stacks().push_back(std::move(thread.stack));
    self = nullptr;
#endif
    if (error_) std::rethrow_exception(error_);
  }

 private:
  struct Warp {
    explicit Warp(int lanes) : barrier(lanes) {}
    Barrier barrier;
    char slots[2][kLanes][kSlot];
  };

  void enter(Thread& thread) {
    self = &thread;
    try {
      body_();
    } catch (...) {
      error_ = std::current_exception();
    }
    // A thread that has returned holds nobody up.
    all_.leave();
    warps_[static_cast<size_t>(thread.warp)]->barrier.leave();
  }

#if !defined(DLDR_EMULATED_THREADS)
  static constexpr size_t kStack = 256 << 10;
  static std::vector<std::unique_ptr<char[]>>& stacks() {
    static std::vector<std::unique_ptr<char[]>> unused;
    return unused;
  }
  static std::unique_ptr<char[]> take_stack() {
    if (stacks().empty()) return std::unique_ptr<char[]>(new char[kStack]);
    auto stack = std::move(stacks().back());
    stacks().pop_back();
    return stack;
  }
  static void start() {
    Thread& thread = *self;
    thread.block->enter(thread);
    thread.done = true;
    jump_to(scheduler);
  }
#endif

  Barrier all_;
  int counts_[3] = {};
  const std::function<void()>& body_;
  std::vector<char> shared_;
  std::vector<std::unique_ptr<Warp>> warps_;
  std::vector<Thread> threads_;
  std::exception_ptr error_;
};

template <class T>
void gather(const T& value, T (&all)[kLanes]) {
  self->block->gather(value, all);
}

inline void* dynamic_shared() { return self->block->shared(); }

inline void run(const void* kernel, dim3 grid, int block, int64_t shared,
                const std::function<void()>& body) {
  if (captured != nullptr) {
    captured->push_back([=] { run(kernel, grid, block, shared, body); });
    return;
  }
  if (grid.x < 1 || grid.x > kMaxGridX || grid.y < 1 || grid.y > kMaxGridY || block < 1 ||
      block > kMaxThreads || shared > kMaxShared) {
    last_error = cudaErrorInvalidValue;
    return;
  }
  // With two threads of the host, one's request may come between the other's and its launch.
  if (shared > kDefaultShared && requests[kernel] != shared) {
    throw std::logic_error("shared memory that was not asked for");
  }
  grid_size = grid;
  block_size = dim3(static_cast<unsigned>(block));
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      if (sampled_blocks > 0 && x >= sampled_blocks && x + sampled_blocks < grid.x) continue;
      block_index = dim3(x, y);
      Block(block, shared, body).run();
    }
  }
}

}  // namespace emulated

#define threadIdx (::emulated::self->index)
#define blockIdx (::emulated::block_index)
#define blockDim (::emulated::block_size)
#define gridDim (::emulated::grid_size)

inline void __syncthreads() { emulated::self->block->sync(); }
inline int __syncthreads_count(int predicate) {
  return emulated::self->block->count(predicate != 0);
}
// Blocks run one after the other.
inline void __threadfence() {}
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
inline unsigned long long atomicCAS(unsigned long long* at, unsigned long long expected,
                                    unsigned long long value) {
  __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int mask) {
  // Every lane that is left out waits for nothing and gives nothing.
  if (lanes != 0xffffffffu) throw std::logic_error("a shuffle among some lanes of a warp only");
  return emulated::self->block->exchange(value, mask);
}

inline const char* cudaGetErrorString(cudaError_t) { return "invalid launch"; }
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulated::last_error;
  emulated::last_error = cudaSuccess;
  return error;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > emulated::kMaxShared) return cudaErrorInvalidValue;
  if (emulated::requests.count(kernel) > 0 && emulated::requests[kernel] != bytes) {
    throw std::logic_error("a kernel asks for shared memory of several sizes: threads would race");
  }
  emulated::requests[kernel] = bytes;
  return cudaSuccess;
}

#define DLDR_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::emulated::dynamic_shared())

namespace dldr::cuda {
using std::fma;  // for float too
}
