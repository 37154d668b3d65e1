// The encoder's kernel on a CPU, as a function for ctypes: it answers with nothing, or with what went wrong.
#include <cuda.cu>
#include <string>

extern "C" const char* encode(const void* x, void* y, const void* weights, const void* vectors, int layers, int users, unsigned seed) {
  static std::string message;
  const EncoderParameters p{static_cast<const u16*>(x), static_cast<u16*>(y), static_cast<const u16*>(weights),
                            static_cast<const float*>(vectors), layers};
  try {
    for (int user = 0; user < users; user++)
      emulated::run(user, CLUSTER, grc::ENCODER_THREADS, seed + user, [&] { grc_encoder(p); });
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}
