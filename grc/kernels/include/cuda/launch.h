// Kernels for clusters of blocks as AOTInductor's code calls them: cubins that the object carries, loaded where they are needed.
#pragma once

#include <cuda.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace grc {

inline void check(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  const char* name = nullptr;
  cuGetErrorName(result, &name);
  throw std::runtime_error(std::string("a kernel for clusters of blocks: ") + what + ": " + (name ? name : "unknown error"));
}

inline void check(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("a kernel for clusters of blocks: a tensor can't be read or made");
}

// A cubin, and how its kernel is launched.
struct Cubin {
  const unsigned char* bytes;
  const char* name;
  unsigned blocks, threads, memory;  // of a cluster, of a block, and bytes of that
};

// A kernel on one device.
struct Kernel {
  Cubin cubin;
  CUmodule module = nullptr;
  CUfunction function = nullptr;
  int clusters = 0;  // at once

  explicit Kernel(const Cubin& given) : cubin(given) {
    check(cuModuleLoadData(&module, cubin.bytes), "it can't be loaded");
    check(cuModuleGetFunction(&function, module, cubin.name), "it is not in its module");
    check(cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, static_cast<int>(cubin.memory)),
          "this GPU has too little shared memory");
    check(cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1),
          "this GPU has no clusters of 16 blocks");
    CUlaunchAttribute attribute{};
    attribute.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim = {cubin.blocks, 1, 1};
    CUlaunchConfig launch{};
    launch.gridDimX = cubin.blocks, launch.gridDimY = launch.gridDimZ = 1;
    launch.blockDimX = cubin.threads, launch.blockDimY = launch.blockDimZ = 1;
    launch.sharedMemBytes = cubin.memory;
    launch.attrs = &attribute, launch.numAttrs = 1;
    check(cuOccupancyMaxActiveClusters(&clusters, function, &launch), "its clusters can't be counted");
    if (clusters == 0) throw std::runtime_error("a kernel for clusters of blocks: this GPU has no room for one");
  }

  void launch(int64_t count, int device, void* parameters) const {
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(device, &stream));
    void* arguments[] = {parameters};
    check(cuLaunchKernel(function, static_cast<unsigned>(count) * cubin.blocks, 1, 1, cubin.threads, 1, 1, cubin.memory,
                         static_cast<CUstream>(stream), arguments, nullptr),
          "it can't be launched");
  }
};

// Forms of a kernel on every device, loaded when one is first launched there, which is never inside of a capture.
class Kernels {
 public:
  explicit Kernels(std::vector<Cubin> cubins) : cubins_(std::move(cubins)) {}

  ~Kernels() {
    for (auto& [device, forms] : forms_)
      for (const Kernel& kernel : forms) cuModuleUnload(kernel.module);  // fails, and may, once CUDA has gone
  }

  const std::vector<Kernel>& on(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Kernel>& forms = forms_[device];
    if (forms.empty()) forms = std::vector<Kernel>(cubins_.begin(), cubins_.end());
    return forms;
  }

 private:
  std::vector<Cubin> cubins_;
  std::mutex mutex_;
  std::map<int, std::vector<Kernel>> forms_;
};

// A tensor of a package, as it lies.
struct Lying {
  AtenTensorHandle handle;
  int64_t dims = 0;
  int64_t *sizes = nullptr, *strides = nullptr;

  explicit Lying(AtenTensorHandle tensor) : handle(tensor) {
    check(aoti_torch_get_dim(tensor, &dims));
    check(aoti_torch_get_sizes(tensor, &sizes));
    check(aoti_torch_get_strides(tensor, &strides));
  }

  // Numbers from one row to the next, where rows lie evenly. Throws std::runtime_error where they do not.
  int64_t row() const {
    const int64_t last = dims - 1, step = dims > 1 ? strides[last - 1] : sizes[last];
    bool even = sizes[last] <= 1 || strides[last] == 1;
    for (int64_t d = last - 2; d >= 0; d--) even = even && (sizes[d] <= 1 || strides[d] == strides[d + 1] * sizes[d + 1]);
    if (!even) throw std::runtime_error("a kernel for clusters of blocks: the rows of a tensor do not lie evenly");
    return step;
  }

  int64_t rows() const {
    int64_t count = 1;
    for (int64_t d = 0; d + 1 < dims; d++) count *= sizes[d];
    return count;
  }

  int device() const {
    int32_t index = 0;
    check(aoti_torch_get_device_index(handle, &index));
    return index;
  }

  // A tensor of this dtype on this device, in one piece.
  AtenTensorHandle like(const std::vector<int64_t>& shape) const {
    int32_t dtype = 0, type = 0;
    check(aoti_torch_get_dtype(handle, &dtype));
    check(aoti_torch_get_device_type(handle, &type));
    std::vector<int64_t> whole(shape.size(), 1);
    for (size_t d = shape.size(); d-- > 1;) whole[d - 1] = whole[d] * shape[d];
    AtenTensorHandle made = nullptr;
    check(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), whole.data(), dtype, type, device(), &made));
    return made;
  }
};

template <class T>
T* data(AtenTensorHandle tensor) {
  void* at = nullptr;
  check(aoti_torch_get_data_ptr(tensor, &at));
  return static_cast<T*>(at);
}

}  // namespace grc
