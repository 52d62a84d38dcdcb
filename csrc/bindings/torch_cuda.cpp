// Functions of torch that the CUDA code uses: memory of the caching allocator, and the current stream.
#ifdef FUSED_ADAPTIVE_WITH_CUDA
#include <dlfcn.h>

#include <algorithm>

#include "cuda/runtime.h"
#include "plan/tensors.h"

namespace fused_adaptive::cuda {

cudaStream_t current_stream(int device) {
  // The symbol is looked up at run time, so one library loads with every torch. dlopen is needed since torch's
  // libraries are not in the global scope.
  using Function = int32_t (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library != nullptr ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Function>(symbol);
  }();
  void* stream = nullptr;
  // Without the current stream a step would run on the default stream, not in order with the code around it.
  FA_CHECK(function != nullptr,
           "this torch does not tell its current CUDA stream (libtorch_cuda.so has no "
           "aoti_torch_get_current_cuda_stream): use backend='triton'");
  FA_CHECK(function(device, &stream) == AOTI_TORCH_SUCCESS,
           "torch does not tell its current CUDA stream; check the driver with nvidia-smi");
  return static_cast<cudaStream_t>(stream);
}

std::shared_ptr<void> allocate(int device, size_t bytes) {
  const int64_t size = std::max<int64_t>(static_cast<int64_t>(bytes), 16), stride = 1;
  AtenTensorHandle made = nullptr;
  FA_TORCH(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cuda(), device,
                                    &made));
  const torch::stable::Tensor tensor(made);
  return {tensor.data_ptr(), OfTensor{tensor}};
}

}  // namespace fused_adaptive::cuda
#endif
