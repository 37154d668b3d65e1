// The encoder's kernel as AOTInductor's code calls it: a C function that launches a cubin which its object carries.
#include <cuda.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "parameters.h"

// Two forms of the kernel: with as many blocks for a user as it takes, and with half of them, for twice as many users.
asm(".pushsection .rodata\n"
    ".balign 16\n"
    "grc_encoder_wide: .incbin \"" GRC_WIDE_CUBIN "\"\n"
    ".balign 16\n"
    "grc_encoder_half: .incbin \"" GRC_HALF_CUBIN "\"\n"
    ".globl grc_encoder_wide, grc_encoder_half\n"
    ".hidden grc_encoder_wide, grc_encoder_half\n"
    ".popsection\n");
extern "C" const unsigned char grc_encoder_wide[], grc_encoder_half[];

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

// A form of the kernel on one device.
struct Kernel {
  CUmodule module = nullptr;
  CUfunction function = nullptr;
  unsigned blocks = 0;  // of a user
  int users = 0;        // at once

  Kernel(const unsigned char* cubin, unsigned cluster) : blocks(cluster) {
    check(cuModuleLoadData(&module, cubin), "it can't be loaded");
    check(cuModuleGetFunction(&function, module, "grc_encoder"), "it is not in its module");
    check(cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, grc::ENCODER_MEMORY),
          "this GPU has too little shared memory");
    check(cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1),
          "this GPU has no clusters of 16 blocks");
    CUlaunchAttribute attribute{};
    attribute.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim = {cluster, 1, 1};
    CUlaunchConfig launch{};
    launch.gridDimX = cluster, launch.gridDimY = launch.gridDimZ = 1;
    launch.blockDimX = grc::ENCODER_THREADS, launch.blockDimY = launch.blockDimZ = 1;
    launch.sharedMemBytes = grc::ENCODER_MEMORY;
    launch.attrs = &attribute, launch.numAttrs = 1;
    check(cuOccupancyMaxActiveClusters(&users, function, &launch), "its clusters can't be counted");
    if (users == 0) throw std::runtime_error("the encoder's kernel: this GPU has no room for a cluster");
  }
};

// Both forms on every device, loaded when one is first launched there, which is never inside of a capture.
class Kernels {
 public:
  ~Kernels() {
    for (auto& [device, forms] : forms_)
      for (const Kernel& kernel : forms) cuModuleUnload(kernel.module);  // fails, and may, once CUDA has gone
  }

  const Kernel& on(int device, int64_t users) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Kernel>& forms = forms_[device];
    if (forms.empty()) forms = {Kernel(grc_encoder_wide, GRC_WIDE), Kernel(grc_encoder_half, GRC_HALF)};
    return forms[users > forms[0].users];
  }

 private:
  std::mutex mutex_;
  std::map<int, std::vector<Kernel>> forms_;
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
    const Kernel& kernel = kernels.on(device, sizes[0]);
    check(cuLaunchKernel(kernel.function, static_cast<unsigned>(sizes[0]) * kernel.blocks, 1, 1, grc::ENCODER_THREADS, 1, 1,
                         grc::ENCODER_MEMORY, static_cast<CUstream>(stream), arguments, nullptr),
          "it can't be launched");
  }
  *ret0 = y;
  return AOTI_TORCH_SUCCESS;
}
