// Runs CUDA kernels on a CPU, for tests at toy sizes: every thread of a block is a fiber (ucontext) with its own stack,
// and one operating-system thread switches between them. Blocks run one after another.
//
// A fiber runs until it waits: at __syncthreads(), or in a function of a whole warp (shuffles, mma, ldmatrix). Then the
// next one runs. The order is that of a seed (javis_emulator_order), so that a kernel that forgot to wait gives another
// result under another order; under an odd seed each warp also runs as far ahead of the others as it gets. What is caught and reported as an error of the launch:
//   - lanes of a warp that meet in different functions, threads that leave while others wait;
//   - 16-byte accesses, ldmatrix and cp.async at unaligned addresses, or outside shared memory and the buffers that the
//     test has declared (javis_emulator_buffer). Plain accesses p[i] are caught by -fsanitize=address;
//   - grids and blocks beyond the limits of the hardware.
// Shared memory is full of NaN when a block starts. Copies by cp.async happen when they are waited for, not before.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
// The sanitizer goes over the whole stack at each switch, so it is not larger than kernels need.
#define JAVIS_FIBER_STACK (128 * 1024)

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct float2 {
  float x, y;
};

namespace javis::emulator {

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

// What a lane brings to a function of a whole warp.
struct Meeting {
  const char* what = nullptr;
  unsigned lanes = 0;
  const void* in = nullptr;
  void* out = nullptr;
};

enum class State { ready, at_block, at_warp, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::done;
  dim3 thread;
  unsigned number = 0;
  Meeting meeting;
  std::vector<Copy> open_copies;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

struct Range {
  const char* begin;
  const char* end;
  std::string name;
};

struct Machine {
  dim3 grid, block, block_index;
  std::vector<std::unique_ptr<Fiber>> pool;  // with their stacks, for the next launch
  std::vector<Fiber*> fibers;                // of the block that runs
  std::vector<unsigned> order;
  Fiber* running = nullptr;
  ucontext_t scheduler;
  std::function<void()> kernel;
  std::string error;
  std::map<const void*, Range> shared;  // place in the source -> its memory, for the block that runs
  Range dynamic{nullptr, nullptr, "dynamic shared memory"};
  std::vector<Range> buffers;           // declared by the test; none: global addresses are not checked
  unsigned seed = 0;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  void* fake_stack = nullptr;
};

inline Machine machine;

inline std::string where() {
  char text[160];
  const dim3 t = machine.running->thread, b = machine.block_index;
  std::snprintf(text, sizeof text, " in thread (%u, %u, %u) of block (%u, %u, %u)", t.x, t.y, t.z, b.x, b.y, b.z);
  return text;
}

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what + where()); }

// --- switching ---------------------------------------------------------------------------------------------------------

inline void to_scheduler(bool for_good) {
  Fiber* self = machine.running;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, machine.scheduler_stack, machine.scheduler_stack_size);
#endif
  if (for_good)
    setcontext(&machine.scheduler);
  else
    swapcontext(&self->context, &machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
  try {
    machine.kernel();
  } catch (const std::exception& problem) {
    if (machine.error.empty()) machine.error = problem.what();
  }
  machine.running->state = State::done;
  to_scheduler(true);
}

inline void resume(Fiber& fiber) {
  machine.running = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.fake_stack, fiber.stack.get(), JAVIS_FIBER_STACK);
#endif
  swapcontext(&machine.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
#endif
}

inline void wait(State state) {
  machine.running->state = state;
  to_scheduler(false);
}

// All lanes of `lanes` meet here: the last one to come runs `combine` on the inputs and outputs of them all.
template <typename In, typename Out>
void meet(const char* what, unsigned lanes, const In& in, Out& out,
          void (*combine)(const In* const (&)[32], Out* const (&)[32], unsigned)) {
  Fiber& self = *machine.running;
  const unsigned first = self.number / 32 * 32, lane = self.number % 32;
  if (((lanes >> lane) & 1u) == 0) fail(std::string(what) + ": the lane is not in its own mask");
  self.meeting = {what, lanes, &in, &out};
  self.state = State::at_warp;
  const In* inputs[32] = {};
  Out* outputs[32] = {};
  for (unsigned other = 0; other < 32; ++other) {
    if (((lanes >> other) & 1u) == 0) continue;
    if (first + other >= machine.fibers.size()) fail(std::string(what) + ": the last warp of the block is not full");
    const Fiber& fiber = *machine.fibers[first + other];
    if (fiber.state == State::done) fail(std::string(what) + ": a lane has left the kernel");
    if (fiber.state != State::at_warp) {  // not here yet
      to_scheduler(false);
      return;
    }
    if (std::strcmp(fiber.meeting.what, what) != 0 || fiber.meeting.lanes != lanes)
      fail(std::string(what) + ": another lane of the warp is in " + fiber.meeting.what);
    inputs[other] = static_cast<const In*>(fiber.meeting.in);
    outputs[other] = static_cast<Out*>(fiber.meeting.out);
  }
  combine(inputs, outputs, lanes);
  for (unsigned other = 0; other < 32; ++other)
    if ((lanes >> other) & 1u) machine.fibers[first + other]->state = State::ready;
}

// --- running a block -----------------------------------------------------------------------------------------------------

inline void start(Fiber& fiber, unsigned number) {
  if (!fiber.stack) fiber.stack.reset(new char[JAVIS_FIBER_STACK]);
  const dim3 size = machine.block;
  fiber.number = number;
  fiber.thread = dim3(number % size.x, number / size.x % size.y, number / (size.x * size.y));
  fiber.open_copies.clear();
  fiber.groups.clear();
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = JAVIS_FIBER_STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  fiber.state = State::ready;
}

// Runs the warp of this thread as far as it gets without the others.
inline void run_ahead(unsigned thread) {
  const size_t first = thread / 32 * 32, last = std::min<size_t>(first + 32, machine.fibers.size());
  for (bool moved = true; moved && machine.error.empty();) {
    moved = false;
    for (size_t i = first; i < last && machine.error.empty(); ++i) {
      if (machine.fibers[i]->state != State::ready) continue;
      moved = true;
      resume(*machine.fibers[i]);
    }
  }
}

inline void run_block() {
  auto& fibers = machine.fibers;
  for (unsigned i = 0; i < fibers.size(); ++i) start(*fibers[i], i);
  for (;;) {
    bool moved = false;
    for (const unsigned i : machine.order) {
      if (fibers[i]->state != State::ready) continue;
      moved = true;
      resume(*fibers[i]);
      if (machine.seed % 2 == 1) run_ahead(i);
      if (!machine.error.empty()) return;
    }
    if (moved) continue;
    size_t done = 0, at_block = 0;
    for (const Fiber* fiber : fibers) {
      done += fiber->state == State::done;
      at_block += fiber->state == State::at_block;
    }
    if (done == fibers.size()) return;
    if (at_block != fibers.size()) {
      for (Fiber* fiber : fibers) {
        if (fiber->state == State::done) continue;
        machine.running = fiber;
        const char* place = fiber->state == State::at_block ? "__syncthreads" : fiber->meeting.what;
        machine.error = std::string("deadlock: waits in ") + place + where() + ", where not all threads come; " +
                        std::to_string(done) + " of " + std::to_string(fibers.size()) + " have left the kernel";
        return;
      }
    }
    for (Fiber* fiber : fibers) fiber->state = State::ready;
  }
}

inline Range allocate(size_t bytes, std::string name) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, std::max<size_t>(bytes, 1)) != 0) throw std::bad_alloc();
  std::memset(memory, 0xff, bytes);  // NaN as float, bf16 and fp16
  const char* begin = static_cast<char*>(memory);
  return {begin, begin + bytes, std::move(name)};
}

inline void release_shared() {
  for (auto& [place, range] : machine.shared) std::free(const_cast<char*>(range.begin));
  machine.shared.clear();
  std::free(const_cast<char*>(machine.dynamic.begin));
  machine.dynamic.begin = machine.dynamic.end = nullptr;
}

inline void* shared_memory(const void* place, size_t bytes, const char* name) {
  auto found = machine.shared.find(place);
  if (found == machine.shared.end()) found = machine.shared.emplace(place, allocate(bytes, name)).first;
  return const_cast<char*>(found->second.begin);
}

// Null, or what went wrong.
inline const char* run(dim3 grid, dim3 block, size_t dynamic_shared, std::function<void()> kernel) {
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) return "invalid configuration: 1 to 1024 threads in a block";
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return "invalid configuration: grid too large";
  if (dynamic_shared > 227 * 1024) return "invalid configuration: more than 227 KiB of shared memory";
  machine.grid = grid;
  machine.block = block;
  machine.kernel = std::move(kernel);
  machine.error.clear();
  machine.fibers.resize(threads);
  machine.order.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    if (i >= machine.pool.size()) machine.pool.push_back(std::make_unique<Fiber>());
    machine.fibers[i] = machine.pool[i].get();
    machine.order[i] = i;
  }
  std::mt19937 random(machine.seed);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        if (machine.seed != 0) std::shuffle(machine.order.begin(), machine.order.end(), random);
        machine.block_index = dim3(x, y, z);
        machine.dynamic = allocate(dynamic_shared, "dynamic shared memory");
        run_block();
        release_shared();
        if (!machine.error.empty()) return machine.error.c_str();
      }
  return nullptr;
}

// --- addresses -----------------------------------------------------------------------------------------------------------

inline bool inside(const Range& range, const char* begin, size_t bytes) {
  return begin >= range.begin && begin + bytes <= range.end;
}

inline bool is_shared(const void* pointer, size_t bytes) {
  const char* begin = static_cast<const char*>(pointer);
  if (machine.dynamic.begin != nullptr && inside(machine.dynamic, begin, bytes)) return true;
  return std::any_of(machine.shared.begin(), machine.shared.end(),
                     [&](const auto& entry) { return inside(entry.second, begin, bytes); });
}

inline void check_aligned(const void* pointer, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
    fail(std::string(what) + ": address not divisible by " + std::to_string(bytes));
}

inline void check_shared(const void* pointer, size_t bytes, const char* what) {
  check_aligned(pointer, bytes, what);
  if (!is_shared(pointer, bytes)) fail(std::string(what) + ": not an address in shared memory");
}

inline void check_global(const void* pointer, size_t bytes, const char* what) {
  check_aligned(pointer, bytes, what);
  if (machine.buffers.empty()) return;
  for (const Range& range : machine.buffers)
    if (inside(range, static_cast<const char*>(pointer), bytes)) return;
  fail(std::string(what) + ": outside the buffers of this call");
}

inline void check_any(const void* pointer, size_t bytes, const char* what) {
  if (is_shared(pointer, bytes))
    check_aligned(pointer, bytes, what);
  else
    check_global(pointer, bytes, what);
}

}  // namespace javis::emulator

#define threadIdx (::javis::emulator::machine.running->thread)
#define blockIdx (::javis::emulator::machine.block_index)
#define blockDim (::javis::emulator::machine.block)
#define gridDim (::javis::emulator::machine.grid)

inline void __syncthreads() { javis::emulator::wait(javis::emulator::State::at_block); }
inline void __syncwarp(unsigned lanes = 0xffffffffu) {
  int nothing = 0;
  javis::emulator::meet<int, int>("__syncwarp", lanes, nothing, nothing,
                                  [](const int* const (&)[32], int* const (&)[32], unsigned) {});
}

// Called by the tests, through ctypes.
extern "C" __attribute__((visibility("default"), weak)) void javis_emulator_order(unsigned seed) {
  javis::emulator::machine.seed = seed;  // 0: threads in their order; odd: warps run ahead
}
extern "C" __attribute__((visibility("default"), weak)) void javis_emulator_buffer(const void* begin, size_t bytes) {
  const char* first = static_cast<const char*>(begin);
  javis::emulator::machine.buffers.push_back({first, first + bytes, "buffer"});
}
extern "C" __attribute__((visibility("default"), weak)) void javis_emulator_forget_buffers() {
  javis::emulator::machine.buffers.clear();
}
