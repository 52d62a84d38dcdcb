// Launches translated kernels. Errors of their threads become exceptions of the launch.
#include "runtime.h"

#include <cuda_runtime.h>
#include <signal.h>

#include <map>
#include <set>
#include <stdexcept>
#include <string>

namespace ptx {
namespace {

std::map<std::string, const Kernel*>& kernels() {
  static std::map<std::string, const Kernel*> all;
  return all;
}

std::set<std::string> launched;
uint64_t shown[1024];  // values of the warp that runs

void on_bad_address(int) { emulation::fail("illegal memory access"); }

// While a kernel runs, a bad address is an error of the kernel and does not end the process.
class Guard {
 public:
  Guard() {
    struct sigaction action = {};
    action.sa_handler = on_bad_address;
    action.sa_flags = SA_NODEFER;
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~Guard() {
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &before_[i], nullptr);
  }

 private:
  static constexpr int kSignals[2] = {SIGSEGV, SIGBUS};
  struct sigaction before_[2];
};

}  // namespace

Kernel::Kernel(const char* name, Entry entry, unsigned shared) : name(name), entry(entry), shared(shared) {
  kernels()[name] = this;
}

unsigned thread() { return threadIdx.x; }
unsigned threads() { return blockDim.x; }
unsigned block() { return blockIdx.x; }
unsigned blocks() { return gridDim.x; }
void barrier() { emulation::barrier(); }
void warp_barrier() { emulation::warp_barrier(); }

void fault(const char* what, const char* instruction) {
  emulation::fail(std::string(what) + " in `" + instruction + "`, thread " + std::to_string(threadIdx.x) +
                  " of block " + std::to_string(blockIdx.x));
}

void show(uint64_t mine) { shown[threadIdx.x] = mine; }
uint64_t shown_by(unsigned lane) { return shown[threadIdx.x / 32 * 32 + lane]; }

void launch(const std::string& name, unsigned blocks, unsigned threads, unsigned shared, char* const* arguments) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) throw std::runtime_error("no PTX of " + name);
  const Kernel& kernel = *found->second;
  launched.insert(name);
  const unsigned size = kernel.shared + shared;
  const Guard guard;
  try {
    emulation::run(blocks, threads, [&] {
      char* const own = size != 0 ? static_cast<char*>(emulation::shared(&kernel, size)) : nullptr;
      kernel.entry(own, size, arguments);
    });
  } catch (const std::exception& error) {
    throw std::runtime_error(name + ": " + error.what());
  }
}

}  // namespace ptx

#pragma GCC visibility push(default)
extern "C" {

// The kernels that were launched since the last call, one per line.
const char* ptx_launched() {
  static std::string names;
  names.clear();
  for (const std::string& name : std::exchange(ptx::launched, {})) names += name + "\n";
  return names.c_str();
}

// The error message; empty if there is none.
const char* ptx_launch(const char* name, unsigned blocks, unsigned threads, unsigned shared, char* const* arguments) {
  static std::string error;
  error.clear();
  try {
    ptx::launch(name, blocks, threads, shared, arguments);
  } catch (const std::exception& caught) {
    error = caught.what();
  }
  return error.c_str();
}
}
