// The kernels of towers as AOTInductor's code calls them: a C function that launches one of the cubins which its object carries.
#include <launch.h>

#include "parameters.h"

// GRC_KERNELS is KERNEL(tower, rows and blocks of a cluster, path of the cubin) for each of them, towers one after
// the other.
#define SYMBOL(tower, rows) "grc_tower_" #tower "_" #rows
#define KERNEL(tower, rows, blocks, path) \
  ".balign 16\n.globl " SYMBOL(tower, rows) "\n.hidden " SYMBOL(tower, rows) "\n" SYMBOL(tower, rows) ": .incbin \"" path "\"\n"
asm(".pushsection .rodata\n" GRC_KERNELS ".popsection\n");
#undef KERNEL

#define KERNEL(tower, rows, blocks, path) extern "C" const unsigned char grc_tower_##tower##_##rows[];
GRC_KERNELS
#undef KERNEL

namespace {

#define KERNEL(tower, rows, blocks, path) {grc_tower_##tower##_##rows, "grc_tower", blocks, grc::TOWER_THREADS, grc::TOWER_MEMORY},
grc::Kernels kernels({GRC_KERNELS});
#undef KERNEL

struct Choice {
  int tower, rows;
};

#define KERNEL(tower, rows, blocks, path) {tower, rows},
constexpr Choice choices[] = {GRC_KERNELS};
#undef KERNEL

// The first of a tower's kernels for which all rows are on the GPU at once, or the last.
size_t chosen(const std::vector<grc::Kernel>& all, int tower, int64_t count) {
  size_t found = all.size();
  for (size_t i = 0; i < all.size(); i++) {
    if (choices[i].tower != tower) continue;
    found = i;
    if (count <= static_cast<int64_t>(all[i].clusters) * choices[i].rows) break;
  }
  if (found == all.size()) throw std::runtime_error("the tower's kernel: there is none of this number");
  return found;
}

}  // namespace

extern "C" AOTITorchError aoti_torch_cuda_tower(
    AtenTensorHandle x, AtenTensorHandle* add, AtenTensorHandle weights, AtenTensorHandle vectors, int64_t columns, int64_t kernel,
    AtenTensorHandle* ret0) {
  const grc::Lying lying(x);
  const int64_t count = lying.rows();
  std::vector<int64_t> shape(lying.sizes, lying.sizes + lying.dims);
  shape.back() = columns;
  AtenTensorHandle y = lying.like(shape);
  if (count > 0) {
    const AtenTensorHandle more = add == nullptr ? nullptr : *add;
    grc::TowerParameters parameters{
        grc::data<const unsigned short>(x),
        lying.row(),
        more == nullptr ? nullptr : grc::data<const unsigned short>(more),
        more == nullptr ? 0 : grc::Lying(more).row(),
        grc::data<unsigned short>(y),
        grc::data<const unsigned short>(weights),
        grc::data<const float>(vectors),
        static_cast<int>(count)};
    const std::vector<grc::Kernel>& all = kernels.on(lying.device());
    const size_t at = chosen(all, static_cast<int>(kernel), count);
    all[at].launch((count + choices[at].rows - 1) / choices[at].rows, lying.device(), &parameters);
  }
  *ret0 = y;
  return AOTI_TORCH_SUCCESS;
}
