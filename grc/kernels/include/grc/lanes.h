// One vector of float32 lanes, read from and written to rows of float32, float16 or bfloat16.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <type_traits>

#include "tensor.h"

namespace grc {

using Lanes = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Lanes::size();

inline int64_t padded(int64_t width) {
  return (width + kLanes - 1) / kLanes * kLanes;
}

template <class T>
Lanes load(const T* source, int64_t count = kLanes) {
  if constexpr (std::is_same_v<T, float>) {
    return count == kLanes ? Lanes::loadu(source) : Lanes::loadu(source, count);
  } else {
    return std::get<0>(at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(source, count)));
  }
}

template <class T>
void store(T* target, const Lanes& value, int64_t count = kLanes) {
  if constexpr (std::is_same_v<T, float>) {
    if (count == kLanes)
      value.store(target);
    else
      value.store(target, count);
  } else {
    at::vec::convert_from_float<T>(value, Lanes(0.f)).store(target, count);
  }
}

template <class T>
struct Type {
  using type = T;
};

template <class Body>
void by_row_type(int32_t dtype, const Body& body) {
  if (dtype == aoti_torch_dtype_float32()) return body(Type<float>{});
  if (dtype == aoti_torch_dtype_bfloat16()) return body(Type<c10::BFloat16>{});
  if (dtype == aoti_torch_dtype_float16()) return body(Type<c10::Half>{});
  if (dtype == aoti_torch_dtype_uint8()) return body(Type<uint8_t>{});
  throw std::invalid_argument("the arena is float32, float16, bfloat16 or bytes");
}

template <class Body>
void by_id_type(int32_t dtype, const Body& body) {
  if (dtype == aoti_torch_dtype_int64()) return body(Type<int64_t>{});
  if (dtype == aoti_torch_dtype_int32()) return body(Type<int32_t>{});
  throw std::invalid_argument("ids are int32 or int64");
}

}  // namespace grc
