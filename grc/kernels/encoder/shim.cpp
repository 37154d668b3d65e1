// The encoder's kernel as AOTInductor's code calls it: a C function that launches a cubin which its object carries.
#include <launch.h>

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

static grc::Kernels kernels({
    {grc_encoder_wide, "grc_encoder", GRC_WIDE, grc::ENCODER_THREADS, grc::ENCODER_MEMORY},
    {grc_encoder_half, "grc_encoder", GRC_HALF, grc::ENCODER_THREADS, grc::ENCODER_MEMORY},
});

extern "C" AOTITorchError aoti_torch_cuda_encoder(
    AtenTensorHandle x, AtenTensorHandle weights, AtenTensorHandle vectors, int64_t layers, AtenTensorHandle* ret0) {
  const grc::Lying lying(x);
  const int64_t users = lying.sizes[0];
  if (lying.row() != lying.sizes[2]) throw std::runtime_error("the encoder's kernel: x is not contiguous");
  AtenTensorHandle y = lying.like({users, lying.sizes[1], lying.sizes[2]});
  if (users > 0) {
    grc::EncoderParameters parameters{
        grc::data<const unsigned short>(x), grc::data<unsigned short>(y), grc::data<const unsigned short>(weights),
        grc::data<const float>(vectors), static_cast<int>(layers)};
    const std::vector<grc::Kernel>& forms = kernels.on(lying.device());
    forms[users > forms[0].clusters].launch(users, lying.device(), &parameters);
  }
  *ret0 = y;
  return AOTI_TORCH_SUCCESS;
}
