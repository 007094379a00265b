// What the CUDA kernels of this folder say in PTX: copies that complete on barriers, clusters, fragments, conversions.
// HALF: 0 where x is bf16, 1 where it is fp16. sm_90 or newer.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Barriers in shared memory, and the copies that complete on them -------------------------------------------

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(barrier), "r"(phase) : "memory");
}

// What this thread has read from shared memory or written to it comes before copies that start behind a later barrier.
__device__ __forceinline__ void before_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// What is read once leaves the L2 first.
__device__ __forceinline__ u64 read_once() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ u64 read_again() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// Addresses and size: multiples of 16 bytes.
__device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}
// A matrix in global memory and how boxes of it lie in shared memory: a CUtensorMap, which the launcher makes.
struct alignas(64) Matrix {
  u64 opaque[16];
};
// The box at this column and row; zeros beyond the matrix.
__device__ __forceinline__ void copy_box(u32 to, const Matrix& from, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&from), "r"(column), "r"(row), "r"(barrier) : "memory");
}
__device__ __forceinline__ void copy_box(u32 to, const Matrix& from, int column, int row, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], "
      "[%4], %5;" ::"r"(to), "l"(&from), "r"(column), "r"(row), "r"(barrier), "l"(policy) : "memory");
}
// Asks for a box, or so many bytes in units of 16, to be in the L2, from where they are copied later.
__device__ __forceinline__ void prefetch_box(const Matrix& from, int column, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(&from), "r"(column), "r"(row)
               : "memory");
}
__device__ __forceinline__ void prefetch_bulk(const void* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
// The box to this address in the first so many blocks of the cluster, completing on the barrier of each.
template <int BLOCKS>
__device__ __forceinline__ void copy_box_to_blocks(u32 to, const Matrix& from, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], "
      "[%4], %5;" ::"r"(to), "l"(&from), "r"(column), "r"(row), "r"(barrier), "h"((u16)((1 << BLOCKS) - 1)) : "memory");
}

// The box from shared memory to this column and row; nothing beyond the matrix. Copies back of a thread form groups.
__device__ __forceinline__ void copy_box_back(u32 from, const Matrix& to, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&to), "r"(column),
               "r"(row), "r"(from) : "memory");
}
__device__ __forceinline__ void copies_back_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All of this thread's, but the last so many that were committed, have left shared memory; or all are in global memory.
template <int BUT = 0>
__device__ __forceinline__ void copies_back_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(BUT) : "memory");
}
__device__ __forceinline__ void copies_back_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Grids that overlap in time (programmatic dependent launch) --------------------------------------------------

__device__ __forceinline__ void wait_for_previous_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_grid_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Of what a previous grid may have written: not to be moved before the wait.
__device__ __forceinline__ uint4 load_16(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 load_8(const void* p) {
  uint2 v;
  asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

// Past the L1, for what is read again once a grid ahead has ended.
__device__ __forceinline__ long long load_8_from_L2(const long long* p) {
  long long v;
  asm volatile("ld.global.cg.s64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ u16 load_2(const void* p) {
  u16 v;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}

// Clusters ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ int cluster_size() {
  int blocks;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
  return blocks;
}
// That all blocks of the cluster have made their barriers, in two halves: each says that it has, and waits for the others.
__device__ __forceinline__ void cluster_ready() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// That what this thread has sent to other blocks is on its way, instead of the first half.
__device__ __forceinline__ void cluster_sent() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void add(float4& sum, float4 v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; }
// To this shared address of another block of the cluster, completing on its barrier.
__device__ __forceinline__ void cluster_store(u32 address, u32 barrier, u32 rank, float4 v) {
  asm volatile(
      "{ .reg .b32 to, on;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 on, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%3, %4, %5, %6}, [on]; }" ::"r"(address),
      "r"(barrier), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ __forceinline__ void cluster_store(u32 address, u32 barrier, u32 rank, float v) {
  asm volatile(
      "{ .reg .b32 to, on;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 on, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [to], %3, [on]; }" ::"r"(address), "r"(barrier),
      "r"(rank), "f"(v) : "memory");
}
// So many bytes, in units of 16, from here to this shared address of another block, completing on its barrier.
__device__ __forceinline__ void copy_to_block(u32 rank, u32 to, u32 from, u32 bytes, u32 barrier) {
  asm volatile(
      "{ .reg .b32 there, on;\n"
      "mapa.shared::cluster.u32 there, %0, %4;\n"
      "mapa.shared::cluster.u32 on, %3, %4;\n"
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [there], [%1], %2, [on]; }" ::"r"(to),
      "r"(from), "r"(bytes), "r"(barrier), "r"(rank) : "memory");
}
// At the barrier of another block, or of this one.
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, u32 rank) {
  asm volatile(
      "{ .reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(barrier), "r"(rank) : "memory");
}
// For what blocks of the cluster store here.
__device__ __forceinline__ void barrier_wait_cluster(u32 barrier, u32 phase) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(barrier), "r"(phase) : "memory");
}
// Fragments --------------------------------------------------------------------------------------------------

__device__ __forceinline__ void load_matrices(u32* v, u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(row) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(u32* v, u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(row) : "memory");
}

#if HALF
#define HALF_TYPE "f16"
#define ONES 0x3C003C00u    // 1, 1
#define MAGIC 0x64006400u   // 1024: an integer below 1024 in its low bits is added to it
#define EIGHT 0x64086408u   // 1024 + 8
#define BIAS128 0x64806480u // 1024 + 128
#else
#define HALF_TYPE "bf16"
#define ONES 0x3F803F80u
#define MAGIC 0x43004300u // 128: an integer below 128 in its low bits is added to it
#define EIGHT 0x43084308u // 128 + 8
#endif

// d [16, 8] fp32 += a [16, 16] · b [16, 8]
__device__ __forceinline__ void multiply_add(float* d, const u32* a, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." HALF_TYPE "." HALF_TYPE
      ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d = a · b + c, where the upper 8 rows of c are (c0, c1), the others 0
__device__ __forceinline__ void multiply(float* d, const u32* a, u32 b0, u32 b1, float c0, float c1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." HALF_TYPE "." HALF_TYPE
      ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%12};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(0.f));
}

// Numbers: two of a half precision in a register -------------------------------------------------------------

__device__ __forceinline__ u32 subtract2(u32 a, u32 b) {
  u32 d;
#if HALF
  asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#endif
  return d;
}
__device__ __forceinline__ u32 multiply2(u32 a, u32 b) {
  u32 d;
#if HALF
  asm("mul.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#endif
  return d;
}
__device__ __forceinline__ u32 multiply_add2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn." HALF_TYPE "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 bytes) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(bytes));
  return d;
}
// (v & mask) | set
__device__ __forceinline__ u32 mask_or(u32 v, u32 mask, u32 set) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(v), "r"(mask), "r"(set));
  return d;
}
// Of the codes in bits 0-3 and 16-19: code - 8 + OFFSET, exactly, one operation less than code - 8; of those in bits 4-7
// and 20-23: (code - 8) / INT4_UNIT.
#if HALF // fp32 sums of numbers above 1024 would lose too much
#define OFFSET 0.f
__device__ __forceinline__ void from_int4(u32 v, u32& low, u32& high) {
  low = subtract2(mask_or(v, 0x000F000Fu, MAGIC), EIGHT);
  high = subtract2(mask_or(v >> 4, 0x000F000Fu, MAGIC), EIGHT);
}
#else
#define OFFSET 136.f
__device__ __forceinline__ void from_int4(u32 v, u32& low, u32& high) {
  low = mask_or(v, 0x000F000Fu, MAGIC);
  high = multiply_add2(v & 0x00F000F0u, 0x79807980u, 0xBA80BA80u);
}
#endif
// A scale and a zero point, both halves of each the same, for `from_int4`.
__device__ __forceinline__ void int4_scale(u32 pair, u32& scale, u32& zero) {
  scale = permute(pair, 0, 0x1010), zero = permute(pair, 0, 0x3232);
#if !HALF
  zero = multiply2(zero, 0x39003900u); // / INT4_UNIT
#endif
}
// (code - 8) * scale + zero, rounded once and divided by INT4_UNIT, of the codes in bits 0-3 and 16-19, or `high`: 4-7, 20-23.
#if HALF
#define INT4_UNIT 1.f
__device__ __forceinline__ u32 from_int4(u32 v, int high, u32 scale, u32 zero) {
  return multiply_add2(subtract2(mask_or(high ? v >> 4 : v, 0x000F000Fu, MAGIC), EIGHT), scale, zero);
}
#else // bits as they are, below 256, are so many times 2^-133 as a number: no shift between the two
#define INT4_UNIT 0x1p13f
__device__ __forceinline__ u32 from_int4(u32 v, int high, u32 scale, u32 zero) {
  const u32 code = v & (high ? 0x00F000F0u : 0x000F000Fu), to_unit = high ? 0x79807980u : 0x7B807B80u; // 2^116, 2^120
  return multiply_add2(multiply_add2(code, to_unit, 0xBA80BA80u), scale, zero); // - 8 / INT4_UNIT
}
#endif
// the integers in bits 0-7 and 16-23, exactly
__device__ __forceinline__ u32 from_int8(u32 v) {
#if HALF
  return subtract2(mask_or(v ^ 0x00800080u, 0x00FF00FFu, MAGIC), BIAS128);
#else // the sign bit, of weight -128, is where adding 128 to MAGIC sets a bit
  return subtract2(mask_or(v, 0x007F007Fu, MAGIC), mask_or(v, 0x00800080u, MAGIC));
#endif
}
__device__ __forceinline__ float to_float(u16 v) {
  float f;
#if HALF
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
#else
  f = __uint_as_float((u32)v << 16);
#endif
  return f;
}
// Both of a register
__device__ __forceinline__ float2 to_floats(u32 v) {
#if HALF
  return make_float2(to_float((u16)v), to_float((u16)(v >> 16)));
#else
  return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xFFFF0000u));
#endif
}
__device__ __forceinline__ u16 to_half(float f) {
  u16 v;
  asm("cvt.rn." HALF_TYPE ".f32 %0, %1;" : "=h"(v) : "f"(f));
  return v;
}
__device__ __forceinline__ u32 to_halves(float low, float high) {
  u32 v;
  asm("cvt.rn." HALF_TYPE "x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
// The same of fp16, whatever HALF says.
__device__ __forceinline__ float from_fp16(u16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
}
__device__ __forceinline__ u32 to_fp16(float low, float high) {
  u32 v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
// 8 × 8 matrices of halves, a row of which four lanes hold, like those of `load_matrices`
__device__ __forceinline__ u32 transpose(u32 v) {
  u32 d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v));
  return d;
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
