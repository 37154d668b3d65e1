// Included before what AOTInductor generates, whose entry points print every exception beside returning its message:
//   std::cerr << "Error: " << e.what() << '\n';
// An id that a kernel refuses is a client's fault, which the runtime names: no line of it on stderr. Other failures are printed.

#pragma once

#ifdef __cplusplus  // weights come as assembly

#include <cstring>
#include <iostream>

namespace grc {

struct Printed {
  std::ostream& out;
  bool failure;  // what the exception says follows

  std::ostream& operator<<(const char* text) const {
    static thread_local std::ostream nowhere(nullptr);
    const bool refused = failure && std::strncmp(text, "id ", 3) == 0 && std::strstr(text, " is outside ");
    if (refused) return nowhere;
    return failure ? out << "Error: " << text : out << text;
  }
  template <class T>
  std::ostream& operator<<(const T& value) const {
    return out << value;
  }
};

}  // namespace grc

// The seven characters of "Error: ": this one is taken before that of the standard, which is a template.
inline grc::Printed operator<<(std::ostream& out, const char (&text)[8]) {
  const bool failure = std::strcmp(text, "Error: ") == 0;
  if (!failure) out << static_cast<const char*>(text);
  return {out, failure};
}

#endif
