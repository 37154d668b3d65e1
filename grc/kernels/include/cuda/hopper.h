// What kernels need of a GPU with clusters of blocks, an instruction or two at a time. The tests have a second hopper.h, which
// does the same on a CPU: the kernels themselves name no instruction.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;

#define INLINE __device__ __forceinline__
#define CONSTANT __device__ constexpr
#define KERNEL(threads, cluster) extern "C" __global__ void __launch_bounds__(threads, 1) __cluster_dims__(cluster, 1, 1)
#define PARAMETERS const __grid_constant__

// ---- numbers: of 16 bits, two of them in a register, and float32 ----

#if GRC_BF16
#define TYPE "bf16"
#else
#define TYPE "f16"
#endif

INLINE u32 packed(float low, float high) {
  u32 both;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

INLINE float wide(u16 v) {
#if GRC_BF16
  return __uint_as_float(static_cast<u32>(v) << 16);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
#endif
}

INLINE u32 bits(float v) { return __float_as_uint(v); }
INLINE float infinity() { return __int_as_float(0x7f800000); }
INLINE float exponential(float v) { return __expf(v); }
INLINE float one_over_root(float v) { return rsqrtf(v); }

// sum += a @ b for a [16, 16] and b [16, 8], of which each thread of a warp has a part
INLINE void product(float4& sum, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum.x), "+f"(sum.y), "+f"(sum.z), "+f"(sum.w)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- threads of a warp, and of a block ----

INLINE u32 of_lane(u32 v, int lane) { return __shfl_sync(~0u, v, lane); }
INLINE float of_other(float v, int apart) { return __shfl_xor_sync(~0u, v, apart); }
INLINE void meet_warp() { __syncwarp(); }

// So many threads of the block have come here.
template <int COUNT>
INLINE void meet() {
  asm volatile("bar.sync 1, %0;" ::"n"(COUNT) : "memory");
}

// ---- blocks of a cluster, and their memory ----

INLINE unsigned char* block_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

INLINE int rank() {
  u32 r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}

// All threads of all blocks have come here, and see what the others wrote before.
INLINE void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The next kernel may begin, and all kernels before this one have ended: see grc/kernels/dependent.py.
INLINE void ready() { asm volatile("griddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;" ::: "memory"); }

INLINE u32 local(const void* shared) { return static_cast<u32>(__cvta_generic_to_shared(shared)); }

// The same place in another block's memory.
INLINE u32 at_peer(const void* mine, int peer) {
  u32 theirs;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(local(mine)), "r"(peer));
  return theirs;
}

struct Barrier {
  unsigned long long state;

  INLINE u32 at() const { return local(&state); }

  INLINE void open(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at()), "r"(arrivals) : "memory");
  }

  // Arrive once `loaded` has been loaded: where several processes share a GPU, a block may be stopped in between. An arrival does
  // not wait for loads that are under way, and one that is finished after a stop has then read what the copy engine put there
  // since (seen on an H200). That a grid is one block deep is more than the compiler knows.
  INLINE void arrive_after(u32 loaded) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at() + (loaded & (gridDim.z - 1))) : "memory");
  }

  INLINE void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at()), "r"(bytes) : "memory");
  }

  // Its time number `turn`, of which there were at most one more, has passed.
  INLINE void wait(int turn) {
    u32 done = 0;
    while (!done)
      asm volatile(
          "{\n\t.reg .pred p;\n\t"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, p;\n\t}"
          : "=r"(done) : "r"(at()), "r"(turn % 2) : "memory");
  }
};

// Barriers that were opened are such for other blocks too, once all have met.
INLINE void barriers_opened() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// `to` and `mail` are in the memory of one other block.
INLINE void send(u32 to, u32 mail, uint4 v) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(to),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(mail)
               : "memory");
}

INLINE void send(u32 to, u32 mail, float a, float b) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1,%2}, [%3];" ::"r"(to), "f"(a),
               "f"(b), "r"(mail)
               : "memory");
}

// Bytes from memory to this block's.
INLINE void copy(void* to, const void* from, int bytes, const Barrier& there) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(local(to)),
               "l"(from), "r"(bytes), "r"(there.at())
               : "memory");
}
