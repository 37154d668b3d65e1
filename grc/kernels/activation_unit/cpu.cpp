// scores [B, S] = act2(act1([k, k * q] W1 + row) W2 + b2) w3 + b3 for every step k of every user q's history; a unit of one
// hidden layer has no W2, and its scores are act1(..) w3 + b3.
//
// [k, k * q] W1 is k (Wk + diag(q) Wp): joining the two once for a user halves the first layer's products. All layers of
// a block of steps follow each other, so that nothing between them leaves the cache.

#include <memory>

#include "grc/gemm.h"
#include "grc/linear.h"

namespace {

using namespace grc;

constexpr int64_t kSteps = 48;  // of a block: eight full tiles

int64_t panelled(int64_t n) {
  return at::divup(n, gemm::kPanel) * gemm::kPanel;
}

// Rows [k, n] of weights into panels [n / kPanel, k, kPanel], padded by zeros. `make(row, column, count)` gives lanes.
template <class Make>
void into_panels(float* panels, int64_t k, int64_t n, const Make& make) {
  for (int64_t row = 0; row < k; ++row)
    for (int64_t col = 0; col < panelled(n); col += kLanes) {
      float* target = panels + col / gemm::kPanel * gemm::kPanel * k + row * gemm::kPanel + col % gemm::kPanel;
      const int64_t count = std::min(kLanes, n - col);
      (count > 0 ? make(row, col, count) : Lanes(0.f)).store(target);
    }
}

const float* matrix(AtenTensorHandle handle, const char* name, int64_t rows, int64_t n) {
  const View view(handle);
  bool contiguous = false;
  check(aoti_torch_is_contiguous(handle, &contiguous));
  const bool fits = view.rank == 2 && view.sizes[0] == rows && view.sizes[1] == n;
  if (view.dtype != aoti_torch_dtype_float32() || !fits || !contiguous)
    throw std::invalid_argument(std::string(name) + " is not a contiguous float32 [" + std::to_string(rows) + ", " +
                                std::to_string(n) + "]");
  return static_cast<const float*>(view.data);
}

gemm::Epilogue epilogue(const float* bias, AtenTensorHandle* gate, const char* name, int64_t activation, int64_t n) {
  require(activation >= 0 && activation <= static_cast<int64_t>(gemm::Activation::dice), "activations are 0 to 8");
  gemm::Epilogue e{.bias = bias, .activation = static_cast<gemm::Activation>(activation)};
  if (const int64_t rows = gemm::gate_rows(e.activation)) {
    require(gate != nullptr, "prelu and dice need a gate");
    e.gate = {matrix(*gate, name, rows, n), n};
  }
  return e;
}

struct Unit {
  gemm::Matrix query, keys, row;
  const float *first, *second, *head;  // second in panels; null in a unit of one hidden layer
  int64_t steps, width, n1, n2;
  gemm::Epilogue one, two, three;
};

// What one thread needs for a block.
struct Space {
  std::unique_ptr<float[]> weight, y1, y2;
  int64_t user = -1;

  explicit Space(const Unit& u)
      : weight(new float[panelled(u.n1) * u.width]), y1(new float[kSteps * u.n1]), y2(u.second ? new float[kSteps * u.n2] : nullptr) {}
};

void block(const Unit& u, Space& space, int64_t user, int64_t s0, int64_t rows, float* scores) {
  if (space.user != user) {
    const float* query = u.query.data + user * u.query.stride;
    into_panels(space.weight.get(), u.width, u.n1, [&](int64_t row, int64_t col, int64_t count) {
      const Lanes pair = Lanes::loadu(u.first + (u.width + row) * u.n1 + col, count);
      return at::vec::fmadd(Lanes(query[row]), pair, Lanes::loadu(u.first + row * u.n1 + col, count));
    });
    space.user = user;
  }
  gemm::Epilogue one = u.one;
  one.bias = u.row.data + user * u.row.stride;
  const gemm::Matrix keys{u.keys.data + (user * u.steps + s0) * u.keys.stride, u.keys.stride};
  const gemm::Gemm first{keys, space.weight.get(), space.y1.get(), rows, u.n1, u.width, one};
  gemm::panels(first, 0, rows, 0, at::divup(u.n1, kLanes));
  const float* last = space.y1.get();
  if (u.second) {
    const gemm::Gemm second{{last, u.n1}, u.second, space.y2.get(), rows, u.n2, u.n1, u.two};
    gemm::panels(second, 0, rows, 0, at::divup(u.n2, kLanes));
    last = space.y2.get();
  }
  gemm::narrow({{last, u.n2}, u.head, scores + user * u.steps + s0, rows, 1, u.n2, u.three}, 0, rows);
}

}  // namespace

GRC_EXPORT AOTITorchError aoti_torch_cpu_activation_unit(
    AtenTensorHandle query, AtenTensorHandle keys, AtenTensorHandle row, AtenTensorHandle first,
    AtenTensorHandle* first_gate, AtenTensorHandle* second, AtenTensorHandle* second_bias, AtenTensorHandle* second_gate,
    AtenTensorHandle head, AtenTensorHandle head_bias, int64_t first_activation, int64_t second_activation,
    AtenTensorHandle* ret0) {
  return grc::guard([&] {
    const View history(keys), layer(second ? *second : first);
    require(history.rank == 3, "keys are [B, S, D]");
    require(layer.rank == 2, second ? "second is [N1, N2]" : "first is [2 D, N1]");
    require(!second == !second_bias, "second and second_bias come together");
    const int64_t users = history.sizes[0], steps = history.sizes[1], width = history.sizes[2];
    const int64_t n2 = layer.sizes[1], n1 = second ? layer.sizes[0] : n2;
    const Rows queries{View(query), "query"}, all_keys{history, "keys"}, rows{View(row), "row"};
    require(queries.count() == users && queries.width() == width, "query is [B, D]");
    require(rows.count() == users && rows.width() == n1, "row is [B, N1]");

    Unit u{queries.matrix(), all_keys.matrix(), rows.matrix()};
    u.steps = steps, u.width = width, u.n1 = n1, u.n2 = n2;
    u.first = matrix(first, "first", 2 * width, n1);
    const float* weight = second ? matrix(*second, "second", n1, n2) : nullptr;
    u.head = Finish::vector(head, "head", n2);
    u.one = epilogue(nullptr, first_gate, "first_gate", first_activation, n1);
    if (second) {
      const float* bias = Finish::vector(*second_bias, "second_bias", n2);
      u.two = epilogue(bias, second_gate, "second_gate", second_activation, n2);
    }
    u.three.bias = Finish::vector(head_bias, "head_bias", 1);

    Output scores({users, steps}, aoti_torch_dtype_float32());
    if (users * steps > 0) {
      const std::unique_ptr<float[]> panels(weight ? new float[panelled(n2) * n1] : nullptr);
      if (weight)
        into_panels(panels.get(), n1, n2, [&](int64_t k, int64_t col, int64_t count) {
          return Lanes::loadu(weight + k * n2 + col, count);
        });
      u.second = panels.get();

      // A block for each thread where there are few users; their weights are then joined more than once.
      const int64_t work = users * steps * (width * n1 + (weight ? n1 * n2 : 0));
      const int64_t threads =
          at::in_parallel_region() ? 1 : std::clamp<int64_t>(work / gemm::kGrain, 1, at::get_num_threads());
      const int64_t blocks = std::max(at::divup(steps, kSteps), std::min(steps, at::divup(threads, users)));
      const int64_t items = users * blocks;
      at::parallel_for(0, items, at::divup(items, threads), [&](int64_t begin, int64_t end) {
        Space space(u);
        for (int64_t item = begin; item < end; ++item) {
          const auto [s0, s1] = gemm::part(steps, blocks, item % blocks);
          if (s0 < s1) block(u, space, item / blocks, s0, s1 - s0, scores.data<float>());
        }
      });
    }
    *ret0 = scores.release();
  });
}
