// hopper.h of the kernels on a CPU: every thread of a cluster is a fiber, and whoever waits lets others run.
//
// In which order they run, and when what was sent arrives, is drawn from a seed, so that other seeds show other races. What
// no fiber can get beyond is told as a deadlock.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

typedef unsigned int u32;
typedef unsigned short u16;

#define INLINE inline
#define CONSTANT constexpr
#define KERNEL(threads, cluster) void
#define PARAMETERS const
#define __device__

struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

struct Index { unsigned x = 0; };
inline Index threadIdx, blockIdx;

namespace emulated {

constexpr int LANES = 32, MEMORY = 1 << 20;  // bytes of a block's addresses, in which the next one's begin
constexpr int STACK = 64 << 10;
constexpr int LONG = 1 << 29;  // rounds: until nothing else happens
constexpr const char* LATE = "something was sent to a block that had ended";

struct Meeting {
  int here = 0, turn = 0;
};

struct Warp {
  Meeting meeting;
  u32 values[2][LANES][6];  // of this meeting and of the next
};

struct Block {
  std::vector<unsigned char> bytes;
  unsigned char* memory = nullptr;
  std::vector<Warp> warps;
  Meeting meeting;
  int running = 0;  // threads
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int block, thread;
  bool ended = false;
  const int* watched = nullptr;  // it waits until this is another number than `left`
  int left = 0;
};

struct Sent {
  int due;  // the round in which it arrives
  std::function<void()> arrive;
};

struct Cluster {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Sent> sent;
  int round = 0;
  std::mt19937 random;
  ucontext_t scheduler;
  std::function<void()> body;
  Meeting meeting;
  Fiber* running = nullptr;
  bool moved = false;
  int first_block = 0;
  std::exception_ptr error;
};

inline Cluster* cluster = nullptr;

inline void let_others() { swapcontext(&cluster->running->context, &cluster->scheduler); }

inline void wait_for_change(const int& number, int left) {
  cluster->running->watched = &number, cluster->running->left = left;
  while (number == left) let_others();
  cluster->running->watched = nullptr;
  cluster->moved = true;
}

inline void meet(Meeting& meeting, int count) {
  const int turn = meeting.turn;
  cluster->moved = true;
  if (++meeting.here == count) {
    meeting.here = 0;
    meeting.turn++;
  }
  wait_for_change(meeting.turn, turn);
}

inline Block& block() { return cluster->blocks[cluster->running->block]; }
inline Warp& warp() { return block().warps[cluster->running->thread / LANES]; }
inline int lane() { return cluster->running->thread % LANES; }

// What every lane of the warp gives, once all have given it.
template <int COUNT>
u32 (&shared(const u32 (&mine)[COUNT]))[LANES][6] {
  Warp& own = warp();
  auto& values = own.values[own.meeting.turn % 2];
  std::copy(mine, mine + COUNT, values[lane()]);
  meet(own.meeting, LANES);
  return values;
}

inline void enter() {
  try {
    cluster->body();
  } catch (...) {
    cluster->error = std::current_exception();
  }
  cluster->running->ended = true;
  cluster->blocks[cluster->running->block].running--;
  let_others();
}

// A warp stands still for some rounds, or for as long as others can go on without it; or all of a block do.
inline void stop(Cluster& own, std::vector<int>& still) {
  const int chosen = own.random() % still.size(), each = still.size() / own.blocks.size();
  const int kind = own.random() % 64;
  if (kind == 0)
    for (int i = 0; i < each; i++) still[chosen / each * each + i] = LONG;
  else
    still[chosen] = kind < 4 ? LONG : own.random() % 64;
}

// One cluster from beginning to end. Throws std::runtime_error where no thread can go on.
inline void run(int index, int blocks, int threads, std::uint32_t seed, std::function<void()> body) {
  Cluster own;
  cluster = &own;
  own.body = std::move(body), own.first_block = index * blocks;
  own.random.seed(seed);
  own.blocks.resize(blocks);
  for (Block& block : own.blocks) {
    block.bytes.assign(MEMORY + 128, 0xff);  // NaN
    block.memory = reinterpret_cast<unsigned char*>((reinterpret_cast<std::uintptr_t>(block.bytes.data()) + 127) / 128 * 128);
    block.warps.resize(threads / LANES);
    block.running = threads;
  }
  own.fibers.resize(blocks * threads);
  for (int i = 0; i < blocks * threads; i++) {
    Fiber& fiber = own.fibers[i];
    fiber.block = i / threads, fiber.thread = i % threads;
    fiber.stack.reset(new char[STACK]);
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, STACK};
    fiber.context.uc_link = &own.scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<int> warps(blocks * threads / LANES), still(warps.size());
  for (size_t i = 0; i < warps.size(); i++) warps[i] = i;
  bool quiet = false;  // nothing happened in the round before, and none stand still in this one
  for (bool any = true; any;) {
    any = false;
    own.round++;
    const auto arrived = std::partition(own.sent.begin(), own.sent.end(), [&](const Sent& s) { return s.due > own.round; });
    std::shuffle(arrived, own.sent.end(), own.random);
    own.moved = arrived != own.sent.end();
    for (auto each = arrived; each != own.sent.end(); each++) each->arrive();
    own.sent.erase(arrived, own.sent.end());
    std::shuffle(warps.begin(), warps.end(), own.random);
    if (quiet) {
      std::fill(still.begin(), still.end(), 0);
      for (Sent& s : own.sent) s.due = own.round;
    } else {
      stop(own, still);
    }
    for (const int warp : warps) {
      const bool stands = still[warp] > 0 && still[warp]--;
      for (int lane = 0; lane < LANES; lane++) {
        Fiber& fiber = own.fibers[warp * LANES + lane];
        any = any || !fiber.ended;
        if (fiber.ended || stands || (fiber.watched && *fiber.watched == fiber.left)) continue;
        own.running = &fiber;
        threadIdx.x = fiber.thread, blockIdx.x = own.first_block + fiber.block;
        swapcontext(&own.scheduler, &fiber.context);
        own.moved = own.moved || fiber.ended;
        if (own.error) std::rethrow_exception(own.error);
      }
    }
    if (any && quiet && !own.moved && own.sent.empty()) throw std::runtime_error("deadlock");
    quiet = !own.moved;
  }
  if (!own.sent.empty()) throw std::runtime_error(LATE);
}

inline unsigned char* at(u32 address) {
  Block& block = cluster->blocks[address / MEMORY];
  if (block.running == 0) throw std::runtime_error(LATE);
  return block.memory + address % MEMORY;
}

inline float half(u16 v) {
#if GRC_BF16
  const u32 bits = static_cast<u32>(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
#else
  _Float16 h;
  std::memcpy(&h, &v, 2);
  return static_cast<float>(h);
#endif
}

inline u32 rounded(float v) {
#if GRC_BF16
  u32 bits;
  std::memcpy(&bits, &v, 4);
  return v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#else
  const _Float16 h = static_cast<_Float16>(v);
  u16 bits;
  std::memcpy(&bits, &h, 2);
  return bits;
#endif
}

}  // namespace emulated

inline u32 packed(float low, float high) { return emulated::rounded(low) | emulated::rounded(high) << 16; }
inline float wide(u16 v) { return emulated::half(v); }
inline u32 bits(float v) {
  u32 b;
  std::memcpy(&b, &v, 4);
  return b;
}
inline float infinity() { return INFINITY; }
inline float exponential(float v) { return std::exp(v); }
inline float one_over_root(float v) { return 1.f / std::sqrt(v); }

// Rows of a are those of the threads that divide by four to it, columns of b too; each thread has two numbers of a register.
inline void product(float4& sum, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const auto& all = emulated::shared<6>({a0, a1, a2, a3, b0, b1});
  const int row = emulated::lane() / 4, quad = emulated::lane() % 4;
  float* out[4] = {&sum.x, &sum.y, &sum.z, &sum.w};
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 4; k++)
      for (int part = 0; part < 2; part++) {
        const u32 a = all[row * 4 + k][part * 2 + i / 2], b = all[(quad * 2 + i % 2) * 4 + k][4 + part];
        *out[i] += wide(static_cast<u16>(a)) * wide(static_cast<u16>(b)) + wide(static_cast<u16>(a >> 16)) * wide(static_cast<u16>(b >> 16));
      }
}

inline u32 of_lane(u32 v, int lane) { return emulated::shared<1>({v})[lane][0]; }
inline float of_other(float v, int apart) {
  const u32 found = emulated::shared<1>({bits(v)})[emulated::lane() ^ apart][0];
  float f;
  std::memcpy(&f, &found, 4);
  return f;
}
inline void meet_warp() { emulated::meet(emulated::warp().meeting, emulated::LANES); }

template <int COUNT>
void meet() {
  emulated::meet(emulated::block().meeting, COUNT);
}

inline unsigned char* block_memory() { return emulated::block().memory; }
inline int rank() { return emulated::cluster->running->block; }
inline void meet_cluster() { emulated::meet(emulated::cluster->meeting, static_cast<int>(emulated::cluster->fibers.size())); }
inline void ready() {}

inline u32 local(const void* shared) {
  const auto offset = static_cast<const unsigned char*>(shared) - block_memory();
  return static_cast<u32>(rank() * emulated::MEMORY + offset);
}

inline u32 at_peer(const void* mine, int peer) { return local(mine) % emulated::MEMORY + peer * emulated::MEMORY; }

struct Barrier {
  int arrivals, missing, bytes, turn;

  u32 at() const { return local(this); }

  void open(int count) { *this = {count, count, 0, 0}; }

  void arrive_after(u32) {  // what a fiber has loaded is there
    missing--;
    check();
  }

  void expect(int more) {
    bytes += more;
    arrive_after(0);
  }

  void received(int count) {
    bytes -= count;
    check();
  }

  void wait(int number) {  // as the instruction does, which sees no more than whether turns are odd
    while (turn % 2 == number % 2) emulated::wait_for_change(turn, turn);
  }

 private:
  void check() {
    emulated::cluster->moved = true;
    if (missing < 0) throw std::runtime_error("more arrivals at a barrier than it was opened for");
    if (missing == 0 && bytes == 0) missing = arrivals, turn++;
  }
};

inline void barriers_opened() {}

namespace emulated {

// Most of what is sent arrives soon, some of it late, and some only when no thread can go on without it.
inline void post(std::function<void()> arrive) {
  const int kind = cluster->random() % 256;
  const int rounds = kind == 0 ? LONG : kind < 3 ? cluster->random() % 64 : cluster->random() % 4;
  cluster->sent.push_back({cluster->round + rounds, std::move(arrive)});
}

template <class T>
void post(u32 to, u32 mail, T v) {
  post([=] {
    std::memcpy(at(to), &v, sizeof(v));
    reinterpret_cast<Barrier*>(at(mail))->received(sizeof(v));
  });
}

}  // namespace emulated

inline void send(u32 to, u32 mail, uint4 v) { emulated::post(to, mail, v); }
inline void send(u32 to, u32 mail, float a, float b) { emulated::post(to, mail, make_float2(a, b)); }

inline void copy(void* to, const void* from, int bytes, const Barrier& there) {
  const u32 address = local(to), mail = there.at();
  emulated::post([=] {
    std::memcpy(emulated::at(address), from, bytes);
    reinterpret_cast<Barrier*>(emulated::at(mail))->received(bytes);
  });
}
