// The tower's kernel on a CPU, as a function for ctypes: it answers with nothing, or with what went wrong.
#include <cuda.cu>
#include <string>

extern "C" const char* climb_tower(const void* x, long long x_row, const void* add, long long add_row, void* y, const void* weights,
                                   const void* vectors, int rows, unsigned seed) {
  static std::string message;
  const TowerParameters p{static_cast<const u16*>(x), x_row, static_cast<const u16*>(add), add_row, static_cast<u16*>(y),
                          static_cast<const u16*>(weights), static_cast<const float*>(vectors), rows};
  try {
    for (int i = 0; i * ROWS < rows; i++)
      emulated::run(i, CLUSTER, grc::TOWER_THREADS, seed + i, [&] { grc_tower(p); });
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}
