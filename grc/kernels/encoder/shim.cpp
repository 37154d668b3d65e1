// The encoder's kernel as AOTInductor's code calls it: a C function that launches the cubin which its object carries.
#include <cuda.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "parameters.h"

asm(".pushsection .rodata\n"
    ".balign 16\n"
    ".hidden grc_encoder_cubin\n"
    ".global grc_encoder_cubin\n"
    "grc_encoder_cubin:\n"
    ".incbin \"" GRC_CUBIN "\"\n"
    ".popsection\n");
extern "C" const unsigned char grc_encoder_cubin[];

namespace {

void check(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  const char* name = nullptr;
  cuGetErrorName(result, &name);
  throw std::runtime_error(std::string("the encoder's kernel: ") + what + ": " + (name ? name : "unknown error"));
}

void check(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("the encoder's kernel: a tensor can't be read or made");
}

// The kernel on every device, loaded when it is first launched there, which is never inside of a capture.
class Kernels {
 public:
  ~Kernels() {
    for (auto& [device, module] : modules_) cuModuleUnload(module);  // fails, and need not succeed, once CUDA has gone
  }

  CUfunction on(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    CUfunction& kernel = functions_[device];
    if (kernel == nullptr) {
      check(cuModuleLoadData(&modules_[device], grc_encoder_cubin), "it can't be loaded");
      check(cuModuleGetFunction(&kernel, modules_[device], "encoder"), "it is not in its module");
      check(cuFuncSetAttribute(kernel, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, grc::ENCODER_MEMORY),
            "this GPU has too little shared memory");
      check(cuFuncSetAttribute(kernel, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1),
            "this GPU has no clusters of 16 blocks");
    }
    return kernel;
  }

 private:
  std::mutex mutex_;
  std::map<int, CUmodule> modules_;
  std::map<int, CUfunction> functions_;
};

Kernels kernels;

template <class T>
T* data(AtenTensorHandle tensor) {
  void* at = nullptr;
  check(aoti_torch_get_data_ptr(tensor, &at));
  return static_cast<T*>(at);
}

}  // namespace

extern "C" AOTITorchError aoti_torch_cuda_encoder(
    AtenTensorHandle x, AtenTensorHandle weights, AtenTensorHandle vectors, int64_t layers, AtenTensorHandle* ret0) {
  int64_t *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0, device_type = 0, device = 0;
  check(aoti_torch_get_sizes(x, &sizes));
  check(aoti_torch_get_strides(x, &strides));
  check(aoti_torch_get_dtype(x, &dtype));
  check(aoti_torch_get_device_type(x, &device_type));
  check(aoti_torch_get_device_index(x, &device));
  const int64_t whole[3] = {sizes[1] * sizes[2], sizes[2], 1};
  for (int d = 0; d < 3; d++)
    if (sizes[d] > 1 && strides[d] != whole[d]) throw std::runtime_error("the encoder's kernel: x is not contiguous");
  AtenTensorHandle y = nullptr;
  check(aoti_torch_empty_strided(3, sizes, whole, dtype, device_type, device, &y));
  if (sizes[0] > 0) {
    grc::EncoderParameters parameters{
        data<const unsigned short>(x), data<unsigned short>(y), data<const unsigned short>(weights), data<const float>(vectors),
        static_cast<int>(layers)};
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(device, &stream));
    void* arguments[] = {&parameters};
    check(cuLaunchKernel(kernels.on(device), static_cast<unsigned>(sizes[0]) * GRC_CLUSTER, 1, 1, grc::ENCODER_THREADS, 1, 1,
                         grc::ENCODER_MEMORY, static_cast<CUstream>(stream), arguments, nullptr),
          "it can't be launched");
  }
  *ret0 = y;
  return AOTI_TORCH_SUCCESS;
}
