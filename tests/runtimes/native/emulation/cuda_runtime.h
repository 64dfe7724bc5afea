// Just enough of CUDA to compile our kernels with a C++ compiler and run them on a CPU, so that a machine without a GPU
// tests the very code that a GPU runs.
//
// Every thread of a CTA is a fiber, and CTAs run one after another. A fiber runs until it waits for its warp or its CTA;
// which one runs next is random, and a warp may come to the CTA's next barrier before others have left the last one, so
// that a missing barrier shows. Shared memory is filled with garbage before every CTA. A warp whose lanes wait in
// different places, and a CTA in which nobody can go on, end the process with a message: on a GPU they would be
// undefined. What is not seen here are races within what a warp does between two waits, and time.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulated_shared")))

extern "C" {
extern char __start_emulated_shared[] __attribute__((weak));
extern char __stop_emulated_shared[] __attribute__((weak));
}

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_) : x(x_) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx;
using std::max;
using std::min;

namespace emulation {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 * 1024;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel, block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

// Where a group of fibers meets: `generation` counts the meetings that are over.
struct Meeting {
  int members, arrived = 0;
  unsigned generation = 0;

  explicit Meeting(int members_) : members(members_) {}
};

struct Warp {
  Meeting meeting{kLanes};
  const char* operation = nullptr;  // what its lanes meet for
  uint64_t values[2][kLanes];       // of this meeting and of the last, which slow lanes may still read
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  jmp_buf resume_at;  // once it has a stack; a jump costs a hundredth of a swapcontext, which calls the kernel
  const Meeting* waits_for = nullptr;
  unsigned waits_since = 0;
  bool done = true;

  bool can_run() const { return !done && (waits_for == nullptr || waits_for->generation != waits_since); }
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Meeting everyone{0};
  std::function<void()> body;
  jmp_buf scheduler;
  std::mt19937 random{12345};
};

inline Block block;  // the one that runs

// From a fiber back to the scheduler, and on from here when that resumes the fiber.
inline void yield(Fiber& self) {
  if (_setjmp(self.resume_at) == 0) _longjmp(block.scheduler, 1);
}

inline void fiber_main() {
  for (;;) {  // CTA after CTA
    block.body();
    Fiber& self = block.fibers[threadIdx.x];
    self.done = true;
    yield(self);
  }
}

inline void resume(Fiber& fiber) {
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber.stack) _longjmp(fiber.resume_at, 1);
  fiber.stack.reset(new char[kStackBytes]);
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber.stack.get();
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, fiber_main, 0);
  setcontext(&start);
}

inline void wait(Meeting& meeting) {
  Fiber& self = block.fibers[threadIdx.x];
  self.waits_for = &meeting;
  self.waits_since = meeting.generation;
  if (++meeting.arrived == meeting.members) {
    meeting.arrived = 0;
    ++meeting.generation;
  }
  yield(self);
  self.waits_for = nullptr;
}

// All lanes give a value and get everyone's.
inline const uint64_t* exchange(const char* operation, unsigned mask, uint64_t value) {
  if (mask != 0xffffffffu) fail("a warp operation without all lanes");
  Warp& warp = block.warps[threadIdx.x / kLanes];
  if (warp.meeting.arrived > 0 && std::strcmp(warp.operation, operation) != 0) fail("the lanes of a warp diverged");
  warp.operation = operation;
  uint64_t* values = warp.values[warp.meeting.generation % 2];
  values[threadIdx.x % kLanes] = value;
  wait(warp.meeting);
  return values;
}

inline void run_block(unsigned threads) {
  if (threads % kLanes != 0) fail("a CTA of partial warps");
  if (__start_emulated_shared != nullptr) {
    std::memset(__start_emulated_shared, 0xa5, static_cast<size_t>(__stop_emulated_shared - __start_emulated_shared));
  }
  block.everyone = Meeting(static_cast<int>(threads));
  block.warps.assign(threads / kLanes, Warp());
  if (block.fibers.size() < threads) block.fibers.resize(threads);  // when none is under way
  for (unsigned thread = 0; thread < threads; ++thread) block.fibers[thread].done = false;
  std::vector<unsigned> order(block.warps.size());
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  for (bool progress = true; progress;) {
    progress = false;
    std::shuffle(order.begin(), order.end(), block.random);
    for (const unsigned warp : order) {
      const bool goes_on = block.random() % 2 == 0;
      for (bool runs = true; runs;) {
        runs = false;
        const unsigned first_lane = block.random() % kLanes;
        for (unsigned i = 0; i < kLanes; ++i) {
          threadIdx.x = warp * kLanes + (first_lane + i) % kLanes;
          Fiber& fiber = block.fibers[threadIdx.x];
          if (!fiber.can_run()) continue;
          runs = progress = true;
          resume(fiber);
        }
        runs = runs && goes_on;
      }
    }
  }
  for (const Fiber& fiber : block.fibers) {
    if (!fiber.done) fail("nobody can go on: a barrier that some threads never reach");
  }
}

}  // namespace emulation

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  emulation::Block& block = emulation::block;
  block.body = [=] { kernel(arguments...); };
  std::vector<unsigned> order(config->gridDim.x);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), block.random);
  for (const unsigned index : order) {
    blockIdx.x = index;
    emulation::run_block(config->blockDim.x);
  }
  return cudaSuccess;
}

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct cudaFuncAttributes {};

template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Parameters...)) {
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;  // few, so that small inputs take the paths of large ones
  return cudaSuccess;
}

inline void __syncthreads() { emulation::wait(emulation::block.everyone); }
inline void __threadfence() {}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const uint64_t* values = emulation::exchange("ballot", mask, predicate);
  unsigned lanes = 0;
  for (int i = 0; i < emulation::kLanes; ++i) lanes |= static_cast<unsigned>(values[i]) << i;
  return lanes;
}
inline bool __all_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

inline uint32_t __reduce_add_sync(unsigned mask, uint32_t value) {
  const uint64_t* values = emulation::exchange("reduce add", mask, value);
  uint32_t sum = 0;
  for (int i = 0; i < emulation::kLanes; ++i) sum += static_cast<uint32_t>(values[i]);
  return sum;
}

// The value of lane `from`, or one's own where there is no such lane.
template <typename T>
T emulated_shuffle(unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* values = emulation::exchange("shuffle", mask, bits);
  std::memcpy(&value, &values[from < 32 ? from : threadIdx.x % 32], sizeof value);
  return value;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulated_shuffle(mask, value, static_cast<unsigned>(lane) % 32);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset) {
  return emulated_shuffle(mask, value, threadIdx.x % 32 + offset);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulated_shuffle(mask, value, threadIdx.x % 32 ^ static_cast<unsigned>(lanes));
}

inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  const uint32_t before = *address;
  *address += value;
  return before;
}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float rsqrtf(float value) { return 1 / std::sqrt(value); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
