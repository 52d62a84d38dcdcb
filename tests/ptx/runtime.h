// Launches of translated kernels.
#pragma once

#include <string>

#include "ptx.h"

namespace ptx {

// shared: bytes besides those that the kernel declares. Throws what goes wrong in its threads.
void launch(const std::string& name, unsigned blocks, unsigned threads, unsigned shared, char* const* arguments);

}  // namespace ptx
