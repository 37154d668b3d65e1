// Products of whole tiles by AMX: 16 rows of x times 16 columns of a panel, 64 bytes of each along K at a time. Included by
// low_formats.h inside its namespace.
//
// A panel's groups of steps are a tile's operand as they lie. The instructions are written out, so that no compiler flag
// is needed, and each names its tiles: 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 columns of the weight.

namespace amx {

constexpr int64_t kSide = 16;   // rows of a tile, and its lanes of 32 bits
constexpr int64_t kBytes = 64;  // of a row of a tile
static_assert(kLanes == kSide);

// Whether the CPU has tiles and this feature (a bit of CPUID's leaf 7, EDX), and Linux lets this process use them. It asks
// for the permission, which the kernel wants because tiles are 8 KiB more to save with each thread.
inline bool usable(unsigned feature) {
  constexpr unsigned kTiles = 1u << 24;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kTiles) || !(edx & feature)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {kBytes, kBytes, kBytes, kBytes, kBytes, kBytes, kBytes, kBytes};
  uint8_t rows[16] = {kSide, kSide, kSide, kSide, kSide, kSide, kSide, kSide};
};
static_assert(sizeof(Config) == 64);
inline constexpr Config kFull;

// Eight full tiles for this thread. What was configured before comes back after: oneDNN remembers what it configured.
class Scope {
 public:
  Scope() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    asm volatile("ldtilecfg %0" ::"m"(kFull));
  }
  ~Scope() { asm volatile("ldtilecfg %0" ::"m"(before_)); }
  Scope(const Scope&) = delete;

 private:
  alignas(64) uint8_t before_[sizeof(Config)];
};

template <class Elements>
struct ByTile : Elements {
  using Scope = amx::Scope;
  static constexpr int64_t kUnit = kSide, kUnits = 2, kAlign = kBytes / sizeof(typename Elements::Input), kOdd = 1;
};

struct Int8 : ByTile<Bytes> {
  static constexpr unsigned kFeature = 1u << 25;
  static constexpr int64_t kFewest = 7;  // rows from which tiles pay
  template <int SUM, int X, int W>
  static void dot() {  // of unsigned and signed bytes
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(X), "i"(W));
  }
};

struct Bf16 : ByTile<Halves> {
  static constexpr unsigned kFeature = 1u << 22;
  static constexpr int64_t kFewest = 3;
  template <int SUM, int X, int W>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(X), "i"(W));
  }
};

// Neither tells the compiler what it reads and writes, which would have it keep no address in a register: see `settle`.
template <int TILE>
void load(const char* source, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(source), "r"(stride), "i"(TILE));
}

template <int TILE>
void store(void* target, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(target), "r"(stride), "i"(TILE));
}

// What is in memory is what was written before.
inline void settle() {
  asm volatile("" ::: "memory");
}

// sums += x w over one step of 64 bytes: of UNITS tiles of x one under the other, and VECS tiles of w `apart`.
template <class Format, int UNITS, int VECS>
[[gnu::always_inline]] inline void multiply(const char* x, int64_t stride, const char* w, int64_t apart, int64_t line) {
  load<4>(x, stride);
  if constexpr (UNITS > 1) load<5>(x + kSide * stride, stride);
  const auto column = [=]<int J>(std::integral_constant<int, J>) __attribute__((always_inline)) {
    load<6 + J % 2>(w + J * apart, line);
    Format::template dot<J, 4, 6 + J % 2>();
    if constexpr (UNITS > 1) Format::template dot<VECS + J, 5, 6 + J % 2>();
  };
  [=]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
    (column(std::integral_constant<int, J>{}), ...);
  }(std::make_integer_sequence<int, VECS>{});
}

template <class Format, int UNITS, int VECS>
void tile(const Gemm& g, const Tile& t) {
  if constexpr (UNITS * VECS > 4) {  // more sums than tiles for them
    tile<Format, UNITS, 2>(g, t);
    tile<Format, UNITS, VECS - 2>(g, {t.row, t.col + 2 * kSide, t.rows});
  } else {
    constexpr int64_t kSize = sizeof(typename Format::Input), kLine = kPanel * Format::kGroup * kSize;
    const int64_t stride = g.stride * kSize;
    const char* x = static_cast<const char*>(g.x) + t.row * stride;
    const char* w = static_cast<const char*>(g.weight) +
                    (t.col / kPanel * kPanel * g.depth + t.col % kPanel * Format::kGroup) * kSize;
    int64_t groups = g.depth / Format::kGroup;
    settle();
    asm volatile("tilezero %tmm0; tilezero %tmm1; tilezero %tmm2; tilezero %tmm3");
    for (; groups >= kSide; groups -= kSide, x += kBytes, w += kSide * kLine)
      multiply<Format, UNITS, VECS>(x, stride, w, kBytes, kLine);
    if (groups > 0) {  // the last groups of the panel, and zeros after them
      alignas(64) char last[VECS][kSide][kBytes] = {};
      for (int64_t line = 0; line < groups; ++line)
        for (int64_t j = 0; j < VECS; ++j) std::memcpy(last[j][line], w + line * kLine + j * kBytes, kBytes);
      settle();
      multiply<Format, UNITS, VECS>(x, stride, &last[0][0][0], kSide * kBytes, kBytes);
    }
    alignas(64) std::conditional_t<std::is_same_v<typename Format::Sum, Ints>, int32_t, float>
        sums[UNITS * kSide][VECS * kSide];
    const auto keep = [&]<int I>(std::integral_constant<int, I>) {
      store<I>(&sums[I / VECS * kSide][I % VECS * kSide], sizeof(sums[0]));
    };
    [&]<int... I>(std::integer_sequence<int, I...>) {
      (keep(std::integral_constant<int, I>{}), ...);
    }(std::make_integer_sequence<int, UNITS * VECS>{});
    settle();
    write(g, t, &sums[0][0], t.rows, VECS);
  }
}

#include "low_table.h"

}  // namespace amx
