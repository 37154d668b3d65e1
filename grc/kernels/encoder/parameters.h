// What the launch of the encoder's kernel is given: shared by cuda.cu and shim.cpp.
#pragma once

namespace grc {

constexpr int ENCODER_THREADS = 17 * 32;       // of a block
constexpr int ENCODER_MEMORY = 227 * 1024;     // bytes of shared memory of a block: all that there is

struct EncoderParameters {
  const unsigned short* x;        // [users, STEPS, WIDTH], 16-bit like the weights
  unsigned short* y;              // [users, STEPS, WIDTH]
  const unsigned short* weights;  // for every slice of a row, and layer: what threads read, in their order
  const float* vectors;           // for every slice of a row, and layer: see Vectors
  int layers;
};

}  // namespace grc
