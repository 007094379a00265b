// What a block of threads reads of packed caches, and when it is asked for, for kv_attention.cu, which says what is defined.
#pragma once

#include "kv_products.cuh"

#define LEAST 4 // units of a block that works, about, where there are few
#define BARRIERS 1024 // bytes, ahead of the ring: one of each stage, and that of the window
#define RINGS (WARPS * STAGES)

// What a token of a row of the batch sees, lane t asking for token t. For a hint it is asked before the grids ahead have
// ended, so that nothing of it may stay in the L1.
struct Asked {
  long long position, start;
};
struct Sight {
  const long long *positions, *start; // of the row; start may be null
  int T, S, window;

  __device__ __forceinline__ Asked ask() const {
    const int t = threadIdx.x % 32;
    return {t < T ? load_8_from_L2(positions + t) : -1, t < T && start ? load_8_from_L2(start) : 0};
  }
  // The first position that is seen and the last; S and -1 where none is.
  __device__ __forceinline__ int2 seen(const Asked& by) const {
    long long first = max(by.start, 0ll);
    if (window > 0) first = max(first, by.position - window + 1);
    return first > by.position || first >= S ? make_int2(S, -1) : make_int2((int)first, (int)min(by.position, S - 1ll));
  }
};

// What a block reads of what a row sees. Units are dealt out in turn: i is that of token (begin + i step) UNIT.
struct Work {
  int begin, step, units;

  __device__ __forceinline__ int token(int i) const { return (begin + i * step) * UNIT; }
  __device__ __forceinline__ bool has(int unit) const { // of the cache
    const int at = unit - begin;
    return at >= 0 && at % step == 0 && at / step < units;
  }
  __device__ __forceinline__ bool operator!=(const Work& other) const {
    return begin != other.begin || step != other.step || units != other.units;
  }
};
__device__ __forceinline__ Work work_of(int2 seen, int block, int blocks) { // seen: of this lane's token
  const int first = __reduce_min_sync(~0u, seen.x), last = __reduce_max_sync(~0u, seen.y);
  const int from = first / UNIT, units = max((last + UNIT) / UNIT - from, 0);
  const int step = max(min(blocks, (units + LEAST - 1) / LEAST), 1);
  return {from + block, step, block < step ? (units - block + step - 1) / step : 0};
}

// The units of a head, in global memory and in a ring of stages in shared memory: codes, and behind all of those scales.
struct Units {
  const Matrix &k, &v;
  const u8 *k_scales, *v_scales;
  int head, S;
  u32 full; // the barriers
  u64 policy;

  // Where the unit of a token is: codes by rows of the matrices, scales by bytes.
  struct Place {
    size_t k, v, k_scales, v_scales;
    u32 k_bytes, v_bytes; // of scales
  };
  __device__ __forceinline__ Place at(int token) const {
    const u32 count = min(UNIT, S - token);
    const size_t row = (size_t)head * S + token;
#ifdef BLOCK
    const size_t k_row = (size_t)head * ((S + BLOCK - 1) / BLOCK * BLOCK) + token;
    return {k_row, row, k_row / BLOCK * KEY_SCALES, row * Values::GROUPS * 4, KEY_SCALES, count * Values::GROUPS * 4};
#else
    return {row, row, row * Keys::GROUPS * 4, row * Values::GROUPS * 4, count * Keys::GROUPS * 4, count * Values::GROUPS * 4};
#endif
  }
  // Asks for it to be in the L2.
  __device__ __forceinline__ void prefetch(int token) const {
    const Place from = at(token);
#pragma unroll
    for (int i = 0; i < Keys::SEGMENTS; i++) prefetch_box(k, i * Keys::SEGMENT, from.k);
    prefetch_bulk(k_scales + from.k_scales, from.k_bytes);
#pragma unroll
    for (int i = 0; i < Values::SEGMENTS; i++) prefetch_box(v, i * Values::SEGMENT, from.v);
    prefetch_bulk(v_scales + from.v_scales, from.v_bytes);
  }
  // To a stage, completing on its barrier; by one thread.
  __device__ __forceinline__ void copy(int token, int stage) const {
    const Place from = at(token);
    const u32 barrier = full + stage * 8, codes = full + BARRIERS + stage * STAGE;
    const u32 scales = full + BARRIERS + RINGS * STAGE + stage * STAGE_SCALES;
    barrier_expect(barrier, STAGE + from.k_bytes + from.v_bytes);
#pragma unroll
    for (int i = 0; i < Keys::SEGMENTS; i++)
      copy_box(codes + i * UNIT * Keys::SEGMENT, k, i * Keys::SEGMENT, from.k, barrier, policy);
    copy_bulk(scales, k_scales + from.k_scales, from.k_bytes, barrier, policy);
#pragma unroll
    for (int i = 0; i < Values::SEGMENTS; i++)
      copy_box(codes + Keys::CODES + i * UNIT * Values::SEGMENT, v, i * Values::SEGMENT, from.v, barrier, policy);
    copy_bulk(scales + KEY_SCALES, v_scales + from.v_scales, from.v_bytes, barrier, policy);
  }
};
