// The scheduler of emulated blocks and threads.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulation {

int processors = 2, blocks_a_processor = 2, launches = 0;
bool is_capturing = false, has_code = true;

namespace {

// 0: blocks one after the other; 1: blocks and threads in reverse order; 2: all blocks in turns, from barrier to
// barrier. 3, 4, 5: the same with the threads in the other order.
int order = 0;
bool threads_are_reversed() { return (order % 3 == 1) != (order >= 3); }

constexpr size_t kStack = 256 * 1024;
constexpr unsigned kWarp = 32;

jmp_buf scheduler;
const std::function<void()>* body;

// A thread of a block. The next block reuses its stack.
struct Fiber {
  ucontext_t context;
  jmp_buf point;
  bool started = false, done = true;
  bool fenced = false;   // since its last barrier
  bool in_warp = false;  // waits for the other threads of its warp
};

Fiber* current;
std::string failure;  // message of a thread
ucontext_t maker;

void live() {
  for (;;) {
    (*body)();
    current->done = true;
    if (_setjmp(current->point) == 0) _longjmp(scheduler, 1);
  }
}

void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.point, 1);
  fiber.started = true;
  void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, live, 0);
  setcontext(&fiber.context);
}

struct Memory {
  const void* name;
  std::unique_ptr<char[]> data;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Memory> memory;
  bool done = false;
};

using Graph = std::vector<std::function<void()>>;

std::vector<Block> pool;
std::vector<Graph> graphs;
int unfenced = 0;
Block* current_block;

// Runs these threads of one warp to their next barrier or their end. Returns how many have ended.
unsigned advance_warp(Block& block, unsigned first, unsigned count, unsigned threads) {
  for (;;) {
    unsigned done = 0, waiting = 0;
    for (unsigned i = first; i < first + count; ++i) {
      threadIdx.x = threads_are_reversed() ? threads - 1 - i : i;
      Fiber& fiber = *block.fibers[threadIdx.x];
      fiber.in_warp = false;
      if (!fiber.done) resume(fiber);
      if (!failure.empty()) throw std::runtime_error(std::exchange(failure, ""));
      done += fiber.done;
      waiting += fiber.in_warp;
    }
    if (waiting == 0) return done;
    if (waiting != count) throw std::runtime_error("the threads of a warp have parted");
  }
}

// Runs every thread of a block to its next barrier or its end.
void advance(Block& block, unsigned number, unsigned threads) {
  current_block = &block;
  blockIdx.x = number;
  unsigned done = 0;
  for (unsigned i = 0; i < threads; i += kWarp) {
    done += advance_warp(block, i, std::min(kWarp, threads - i), threads);
  }
  if (done != 0 && done != threads) {
    std::fprintf(stderr, "emulation: %u threads of a block have ended, the others wait at a barrier\n", done);
    std::abort();
  }
  block.done = done == threads;
}

}  // namespace

void record(std::function<void()> launch) { graphs.back().push_back(std::move(launch)); }

void fence() { current->fenced = true; }
void count_unfenced() { unfenced += !current->fenced; }

void barrier() {
  current->fenced = false;
  if (_setjmp(current->point) == 0) _longjmp(scheduler, 1);
}

void warp_barrier() {
  current->in_warp = true;
  barrier();
}

void fail(const std::string& why) {
  failure = why;
  _longjmp(scheduler, 1);
}

void* shared(const void* name, size_t bytes) {
  for (const Memory& memory : current_block->memory) {
    if (memory.name == name) return memory.data.get();
  }
  current_block->memory.push_back({name, std::unique_ptr<char[]>(new char[bytes])});
  std::memset(current_block->memory.back().data.get(), 0xA5, bytes);
  return current_block->memory.back().data.get();
}

namespace {

void run_all(unsigned blocks, unsigned threads) {
  gridDim = dim3(blocks);
  blockDim = dim3(threads);
  if (pool.size() < blocks) pool.resize(blocks);
  for (unsigned b = 0; b < blocks; ++b) {
    Block& block = pool[b];
    block.memory.clear();
    block.done = false;
    while (block.fibers.size() < threads) block.fibers.push_back(std::make_unique<Fiber>());
    for (unsigned t = 0; t < threads; ++t) block.fibers[t]->done = block.fibers[t]->fenced = false;
  }
  if (order % 3 == 2) {
    for (bool all = false; !all;) {
      all = true;
      for (unsigned b = 0; b < blocks; ++b) {
        if (!pool[b].done) advance(pool[b], b, threads);
        all = all && pool[b].done;
      }
    }
    return;
  }
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned b = order % 3 == 1 ? blocks - 1 - i : i;
    while (!pool[b].done) advance(pool[b], b, threads);
  }
}

}  // namespace

void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  ++launches;
  body = &kernel;
  try {
    run_all(blocks, threads);
  } catch (...) {
    pool.clear();  // its threads have not ended
    throw;
  }
}

}  // namespace emulation

#pragma GCC visibility push(default)
extern "C" {
void emulation_configure(int order, int processors, int blocks_a_processor) {
  emulation::order = order;
  emulation::processors = processors;
  emulation::blocks_a_processor = blocks_a_processor;
}
// The number of the captured graph, or of the next one.
int emulation_capture(int on) {
  if (on != 0) emulation::graphs.emplace_back();
  emulation::is_capturing = on != 0;
  return static_cast<int>(emulation::graphs.size()) - 1;
}
void emulation_replay(int graph) {
  for (const auto& launch : emulation::graphs[graph]) launch();
}
void emulation_has_code(int has) { emulation::has_code = has != 0; }
int emulation_unfenced() { return std::exchange(emulation::unfenced, 0); }
int emulation_launches() { return std::exchange(emulation::launches, 0); }
}
