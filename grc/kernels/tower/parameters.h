// What the launch of the tower's kernel is given: shared by cuda.cu and shim.cpp.
#pragma once

namespace grc {

constexpr int TOWER_THREADS = 17 * 32;     // of a block
constexpr int TOWER_MEMORY = 227 * 1024;    // bytes of shared memory of a block: all that there is

struct TowerParameters {
  const unsigned short* x;        // [rows, depth of the first layer], 16-bit like the weights
  long long x_row;                // numbers from one row to the next
  const unsigned short* add;      // [rows, columns of the last layer], or nothing
  long long add_row;
  unsigned short* y;              // [rows, columns of the last layer]
  const unsigned short* weights;  // for every layer, and block: what threads read, in their order
  const float* vectors;           // for every block, and layer: biases, and slopes
  int rows;
};

}  // namespace grc
