// Attention of few query rows over a packed cache (kv_cache.py): the time is that of reading the cache.
//
// Query heads that share a KV head, and the new tokens of each, are the rows of one small matrix, so that the cache is
// read once. What a row of the batch sees is dealt out to its blocks, on the device, from positions: a block that gets
// nothing ends at once. All of them go through the cache side by side, so that they read few pages of memory at a time.
// Each warp works on units of 32 tokens of its own, which one of its threads brings to its ring in shared memory; no warp
// waits for another: warps, then blocks, meet at the end, in a fixed order. The products are those of kv_products.cuh: the
// scale of a key of 8 bits meets its score, that of a value its probability. Of keys by channel the block that is in the
// window comes from there, by plain loads: it is two units at most.
//
// While the grids ahead still run, each warp asks for its first unit to be in the L2 when they have ended. That is a hint,
// by positions that they may be about to write, and right whatever they write, as all see the same L2.
//
// Defines: FP16 (q and y are fp16, else bf16), HEAD (a multiple of 16, for int4 of 32), KEYS and VALUES (0: int8, 1:
// e4m3, 2: int4), GROUP (d that share a scale of int4: 32 or a multiple), TILES (of 8 rows), WARPS, STAGES (of a warp's
// ring), MASK (0: none, 1: bool, 2: as q, 3: fp32), SINKS (0: none, 1: bf16, 2: fp16, 3: fp32); of keys by channel BLOCK,
// the tokens that share a scale, a multiple of 32, and WINDOW (0: bf16, 1: fp16, 2: fp32).
// Boxes: 32 tokens of SEGMENT bytes, swizzled by as many.

#include "kv_products.cuh"

extern __shared__ __align__(1024) u8 shared[];

#define LEAST 4 // units of a block that works, about, where there are few
#define BARRIERS 1024 // bytes, ahead of the ring
#define RINGS (WARPS * STAGES)
#define ROWS (TILES * 8)
#define COMBINERS 128 // threads of a block of `kv_combine`
#define PITCH (HEAD + 4) // of sums in shared memory, against bank conflicts
#define LOG2E 1.4426950408889634f
#define NOTHING (-1e30f) // the largest score where there is none

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ u32 of_y(float low, float high) {
#if FP16
  u32 v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
#else
  return to_bf16(low, high);
#endif
}

// The first position that token t of row b sees and the last; S and -1 where it sees none. For a hint it is asked before
// the grids ahead have ended, so that nothing of it may stay in the L1.
__device__ __forceinline__ int2 seen(const long long* positions, const long long* start, int b, int t, int T, int S,
                                     int window) {
  const long long last = load_8_from_L2(positions + (size_t)b * T + t);
  long long first = start ? max(load_8_from_L2(start + b), 0ll) : 0;
  if (window > 0) first = max(first, last - window + 1);
  return first > last || first >= S ? make_int2(S, -1) : make_int2((int)first, (int)min(last, S - 1ll));
}

// That of a query head, in powers of 2.
__device__ __forceinline__ float sink_of(const u8* sinks, int head) {
#if SINKS == 1
  return __uint_as_float((u32)load_2(sinks + head * 2) << 16) * LOG2E;
#elif SINKS == 2
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(load_2(sinks + head * 2)));
  return f * LOG2E;
#elif SINKS == 3
  return ((const float*)sinks)[head] * LOG2E;
#else
  return NOTHING;
#endif
}

// q [B, H, rows, HEAD], rows = G T, of which row r is token r % T; caches [B, H, S, HEAD], their scales [B, H, S,
// GROUPS], 4 bytes each; of keys by channel codes [B, H, P, HEAD], scales [B, H, P / BLOCK, HEAD], window [B, H, BLOCK,
// HEAD] and held [B]; positions [B, T]; start [B] or null; mask by its strides; sinks [H G] -> y as q, where a row of the
// batch has one block; else sums [B H, blocks, rows, HEAD] and, of each, tops [B H, blocks, rows]: the largest score, in
// powers of 2, and the sum of probabilities, 0 and no sums where a block has no tokens, for `kv_combine`. S % 4 = 0.
// Scores are (q · k) * scale, or cap * tanh of it where cap > 0.
// Grid: blocks B H.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
kv_attend(const u16* q, const __grid_constant__ Matrix k, const u8* k_scales, const __grid_constant__ Matrix v,
          const u8* v_scales, const u8* k_window, const long long* k_held, const long long* positions,
          const long long* start, const u8* mask, const u8* sinks, u16* y, float* sums, float2* tops, float scale,
          float cap, int window, int blocks, int H, int rows, int T, int S, int mask_row, int mask_head,
          int mask_token) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int head = blockIdx.x / blocks, block = blockIdx.x % blocks, b = head / H;
  const u32 full = shared_address(shared), ring = full + BARRIERS;
  const u64 policy = read_once();
  // What a row of the batch sees, and what of it is this block's.
  struct Work {
    int2 mine; // of this lane's token
    int begin, step, units; // unit i of the block is that of token (begin + i step) UNIT

    __device__ __forceinline__ int token(int unit) const { return (begin + unit * step) * UNIT; }
  };
  auto work_of = [&] {
    Work w;
    w.mine = lane < T ? seen(positions, start, b, lane, T, S, window) : make_int2(S, -1);
    const int first = __reduce_min_sync(~0u, w.mine.x), last = __reduce_max_sync(~0u, w.mine.y);
    const int from = first / UNIT, units = max((last + UNIT) / UNIT - from, 0);
    w.step = min(blocks, (units + LEAST - 1) / LEAST);
    w.begin = from + block;
    w.units = block < w.step ? (units - block + w.step - 1) / w.step : 0;
    return w;
  };
  // Where a unit is: its codes by rows of the matrices, its scales by bytes.
  struct Place {
    size_t k, v, k_scales, v_scales;
    u32 k_bytes, v_bytes; // of scales
  };
  auto place_of = [&](int token) {
    const u32 count = min(UNIT, S - token);
    const size_t at = (size_t)head * S + token;
#ifdef BLOCK
    const size_t k_at = (size_t)head * ((S + BLOCK - 1) / BLOCK * BLOCK) + token;
    return Place{k_at, at, k_at / BLOCK * KEY_SCALES, at * Values::GROUPS * 4, KEY_SCALES, count * Values::GROUPS * 4};
#else
    return Place{at, at, at * Keys::GROUPS * 4, at * Values::GROUPS * 4, count * Keys::GROUPS * 4,
                 count * Values::GROUPS * 4};
#endif
  };
  auto fetch = [&](const Work& w, int unit, int stage) { // unit: of the block; lane 0 alone
    const Place at = place_of(w.token(unit));
    const u32 barrier = full + stage * 8, codes = ring + stage * STAGE;
    const u32 scales = ring + RINGS * STAGE + stage * STAGE_SCALES;
    barrier_expect(barrier, STAGE + at.k_bytes + at.v_bytes);
#pragma unroll
    for (int i = 0; i < Keys::SEGMENTS; i++)
      copy_box(codes + i * UNIT * Keys::SEGMENT, k, i * Keys::SEGMENT, at.k, barrier, policy);
    copy_bulk(scales, k_scales + at.k_scales, at.k_bytes, barrier, policy);
#pragma unroll
    for (int i = 0; i < Values::SEGMENTS; i++)
      copy_box(codes + Keys::CODES + i * UNIT * Values::SEGMENT, v, i * Values::SEGMENT, at.v, barrier, policy);
    copy_bulk(scales + KEY_SCALES, v_scales + at.v_scales, at.v_bytes, barrier, policy);
  };
  let_next_grid_start();
  if (threadIdx.x < RINGS) {
    barrier_init(full + threadIdx.x * 8, 1);
    barriers_ready();
  }
#ifndef BLOCK // by channel it takes longer than it saves
  if (const Work likely = work_of(); lane == 0 && warp < likely.units) {
    const Place at = place_of(likely.token(warp));
#pragma unroll
    for (int i = 0; i < Keys::SEGMENTS; i++) prefetch_box(k, i * Keys::SEGMENT, at.k);
    prefetch_bulk(k_scales + at.k_scales, at.k_bytes);
#pragma unroll
    for (int i = 0; i < Values::SEGMENTS; i++) prefetch_box(v, i * Values::SEGMENT, at.v);
    prefetch_bulk(v_scales + at.v_scales, at.v_bytes);
  }
#endif
  __syncthreads();
  wait_for_previous_grid();

  const Work work = work_of();
  const int2 mine = work.mine;
  const int units = work.units;
  if (blocks > 1 && units == 0) {
    if (threadIdx.x < rows) tops[(size_t)blockIdx.x * rows + threadIdx.x] = make_float2(NOTHING, 0);
    return;
  }
  // between these, all rows see all
  const int all_from = __reduce_max_sync(~0u, lane < T ? mine.x : 0);
  const int all_to = MASK ? 0 : __reduce_min_sync(~0u, lane < T ? mine.y : S) + 1;

  float out[HEAD / 16][TILES][4] = {};
  float top[TILES][2], sum[TILES][2] = {}; // of rows 2 t and 2 t + 1
#pragma unroll
  for (int i = 0; i < TILES * 2; i++) top[i / 2][i % 2] = NOTHING;

  if (lane == 0)
    for (int stage = warp; stage < min(units, RINGS); stage += WARPS) fetch(work, stage, stage);
  __syncwarp();
  uint2* fragments = (uint2*)(shared + BARRIERS + RINGS * (STAGE + STAGE_SCALES));
  keep_q(fragments, q + (size_t)head * rows * HEAD, rows);
  __syncthreads();
  int2 sees[TILES][2];
  const u8* masks[TILES][2];
#pragma unroll
  for (int m = 0; m < TILES; m++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int of = min(m * 8 + 2 * t + e, rows - 1), token = of % T;
      sees[m][e].x = __shfl_sync(~0u, mine.x, token);
      sees[m][e].y = __shfl_sync(~0u, mine.y, token);
      const size_t at = (size_t)b * mask_row + (size_t)(head % H * (rows / T) + of / T) * mask_head;
      masks[m][e] = mask + (at + (size_t)token * mask_token) * (MASK == 3 ? 4 : MASK == 2 ? 2 : 1);
    }
  }
  const float plain = scale * (cap > 0 ? 1 / cap : LOG2E);
#ifdef BLOCK
  const long long held = k_held[b];
#endif
  int stage = warp, phase = 0;
  for (int unit = warp; unit < units; unit += WARPS) {
    const int token = work.token(unit);
    const u32 codes = ring + stage * STAGE;
    u32* k_pairs = (u32*)(shared + BARRIERS + RINGS * STAGE + stage * STAGE_SCALES);
    u32* v_pairs = k_pairs + KEY_SCALES / 4;
    const bool edge = token < all_from || token + UNIT > all_to;
    barrier_wait(full + stage * 8, phase);
    if (edge) { // values that no row sees count nothing, whatever they are
      bool any = false;
      for (int i = 0; i < T; i++)
        any |= token + lane >= __shfl_sync(~0u, mine.x, i) & token + lane <= __shfl_sync(~0u, mine.y, i);
      if (!any)
        for (int i = 0; i < Values::GROUPS; i++) v_pairs[lane * Values::GROUPS + i] = 0;
      __syncwarp();
    }
    float s[2][TILES][4] = {}; // of tokens g, twice, and g + 8, in each half of the unit
    float factor = plain * Keys::FACTOR;
#ifdef BLOCK
    if (token / BLOCK == held) {
      factor = plain;
#pragma unroll
      for (int half = 0; half < 2; half++)
        scores_of_window(s[half], k_window, ((size_t)head * BLOCK + token % BLOCK + half * 16) * HEAD, fragments);
    } else {
#pragma unroll
      for (int half = 0; half < 2; half++)
        scores_by_channel(s[half], codes + half * 16 * Keys::SEGMENT, (const uint4*)k_pairs, fragments);
    }
#endif
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u32* pairs = k_pairs + half * 16 * Keys::GROUPS;
#ifndef BLOCK
      scores_of<KEYS>(s[half], codes + half * 16 * Keys::SEGMENT, pairs, fragments);
#endif
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float by = KEYS == INT4 ? factor : factor * __uint_as_float(pairs[g + 8 * h]);
#pragma unroll
        for (int m = 0; m < TILES; m++) s[half][m][2 * h] *= by, s[half][m][2 * h + 1] *= by;
      }
    }
    if (cap > 0)
#pragma unroll
      for (int i = 0; i < 2 * TILES * 4; i++) {
        float& score = (&s[0][0][0])[i];
        score = cap * LOG2E * (1 - __fdividef(2, exp2_fast(2 * LOG2E * score) + 1)); // tanh
      }
    if (edge)
#pragma unroll
      for (int i = 0; i < 2 * TILES * 4; i++) {
        const int half = i / (TILES * 4), m = i / 4 % TILES, e = i % 2, at = token + half * 16 + i % 4 / 2 * 8 + g;
        float& score = s[half][m][i % 4];
        const bool here = at >= sees[m][e].x && at <= sees[m][e].y;
        if (MASK == 2 && here) score = fmaf(from_half(((const u16*)masks[m][e])[at]), LOG2E, score);
        if (MASK == 3 && here) score = fmaf(((const float*)masks[m][e])[at], LOG2E, score);
        if (!here || MASK == 1 && !masks[m][e][at]) score = -__int_as_float(0x7F800000);
      }
    float largest[TILES][2];
    bool more = false;
#pragma unroll
    for (int i = 0; i < TILES * 2; i++) {
      const int m = i / 2, e = i % 2;
      float& l = largest[m][e];
      l = fmaxf(fmaxf(s[0][m][e], s[0][m][e + 2]), fmaxf(s[1][m][e], s[1][m][e + 2]));
      for (int other = 4; other < 32; other *= 2) l = fmaxf(l, __shfl_xor_sync(~0u, l, other));
      more |= l > top[m][e];
    }
    if (__any_sync(~0u, more))
#pragma unroll
      for (int i = 0; i < TILES * 2; i++) {
        const int m = i / 2, e = i % 2;
        const float now = fmaxf(top[m][e], largest[m][e]), by = exp2_fast(top[m][e] - now);
        top[m][e] = now, sum[m][e] *= by;
#pragma unroll
        for (int c = 0; c < HEAD / 16; c++) out[c][m][e] *= by, out[c][m][e + 2] *= by;
      }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 p[TILES][2];
      const u32* pairs = v_pairs + half * 16 * Values::GROUPS;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float by = VALUES == INT4 ? 1 : __uint_as_float(pairs[g + 8 * h]);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
          const float* of = s[half][m] + 2 * h;
          const float even = exp2_fast(of[0] - top[m][0]), odd = exp2_fast(of[1] - top[m][1]);
          sum[m][0] += even, sum[m][1] += odd;
          p[m][h] = transpose(to_bf16(even * by, odd * by));
        }
      }
      add_values<VALUES>(out, codes + Keys::CODES + half * 16 * Values::SEGMENT, pairs, p);
    }
    before_copies();
    __syncwarp();
    if (lane == 0 && unit + RINGS < units) fetch(work, unit + RINGS, stage);
    if ((stage += WARPS) >= RINGS) stage -= RINGS, phase ^= 1;
  }

  // the sums of the warps, in place of the ring: [warp][row][PITCH], and ahead of them [warp][row]: top and sum
  __syncthreads();
  float2* of_warps = (float2*)(shared + BARRIERS);
  float* sums_of_warps = (float*)(of_warps + WARPS * ROWS);
#pragma unroll
  for (int i = 0; i < TILES * 2; i++) {
    const int m = i / 2, e = i % 2, row = warp * ROWS + m * 8 + 2 * t + e;
    float total = sum[m][e];
    for (int other = 4; other < 32; other *= 2) total += __shfl_xor_sync(~0u, total, other);
    if (g == 0) of_warps[row] = make_float2(top[m][e], total);
#pragma unroll
    for (int c = 0; c < HEAD / 16; c++) {
      const int d = VALUES == INT4 ? c / 2 * 32 + c % 2 * 2 + 4 * g : c * 16 + 2 * g;
      *(float2*)(sums_of_warps + row * PITCH + d) = make_float2(out[c][m][e], out[c][m][e + 2]);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * (HEAD / 4); i += THREADS) {
    const int row = i / (HEAD / 4), d = i % (HEAD / 4) * 4;
    float largest = NOTHING, total = 0;
    float4 result = {};
#pragma unroll
    for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, of_warps[w * ROWS + row].x);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float2 of = of_warps[w * ROWS + row];
      const float4 s = *(const float4*)(sums_of_warps + (w * ROWS + row) * PITCH + d);
      const float by = exp2_fast(of.x - largest);
      total = fmaf(of.y, by, total);
      result.x = fmaf(s.x, by, result.x), result.y = fmaf(s.y, by, result.y);
      result.z = fmaf(s.z, by, result.z), result.w = fmaf(s.w, by, result.w);
    }
    if (SINKS && blocks == 1) {
      const float sink = sink_of(sinks, head % H * (rows / T) + row / T), highest = fmaxf(largest, sink);
      const float by = exp2_fast(largest - highest);
      total = fmaf(total, by, exp2_fast(sink - highest));
      result.x *= by, result.y *= by, result.z *= by, result.w *= by;
    }
    const size_t to = (blocks > 1 ? (size_t)blockIdx.x : head) * rows + row;
    const float by = Values::FACTOR * (blocks > 1 ? 1 : total == 0 ? 0 : 1 / total);
    result.x *= by, result.y *= by, result.z *= by, result.w *= by;
    if (blocks > 1) {
      *(float4*)(sums + to * HEAD + d) = result;
      if (d == 0) tops[to] = make_float2(largest, total);
    } else {
      *(uint2*)(y + to * HEAD + d) = make_uint2(of_y(result.x, result.y), of_y(result.z, result.w));
    }
  }
}

#define LANES (HEAD / 4)
#define TEAMS (COMBINERS / LANES) // that take blocks in turns
#define AT_ONCE 8                 // of a team: blocks whose sums are on their way while the tops are

// sums and tops of `kv_attend`, sinks -> y. Grid: B H rows; shared: 4 bytes for each block.
extern "C" __global__ void __launch_bounds__(COMBINERS)
kv_combine(const float* sums, const float2* tops, const u8* sinks, u16* y, int blocks, int H, int rows, int T) {
  const int head = blockIdx.x / rows, row = blockIdx.x % rows, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __shared__ float of_warps[2][COMBINERS / 32];
  __shared__ float4 parts[COMBINERS];
  float* weights = (float*)shared;
  let_next_grid_start();
  wait_for_previous_grid();
  const float2* of = tops + (size_t)head * blocks * rows + row;
  const int team = threadIdx.x / LANES, d = threadIdx.x % LANES * 4;
  const float* at = sums + ((size_t)head * blocks * rows + row) * HEAD + d;
  const auto load = [&](int i) { return *(const float4*)(at + (size_t)i * rows * HEAD); };
  float4 first[AT_ONCE]; // of blocks without tokens whatever is there
#pragma unroll
  for (int j = 0; j < AT_ONCE; j++)
    if (team < TEAMS && team + j * TEAMS < blocks) first[j] = load(team + j * TEAMS);
  const float sink = sink_of(sinks, head % H * (rows / T) + row / T);
  float largest = fmaxf(sink, NOTHING), total = 0;
  for (int i = threadIdx.x; i < blocks; i += COMBINERS) largest = fmaxf(largest, of[(size_t)i * rows].x);
  for (int other = 16; other; other /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, other));
  if (lane == 0) of_warps[0][warp] = largest;
  __syncthreads();
  for (int w = 0; w < COMBINERS / 32; w++) largest = fmaxf(largest, of_warps[0][w]);
  for (int i = threadIdx.x; i < blocks; i += COMBINERS) {
    const float2 top = of[(size_t)i * rows];
    weights[i] = top.y == 0 ? 0 : exp2_fast(top.x - largest);
    total = fmaf(top.y, weights[i], total);
  }
  for (int other = 16; other; other /= 2) total += __shfl_xor_sync(~0u, total, other);
  if (lane == 0) of_warps[1][warp] = total;
  __syncthreads();
  total = SINKS ? exp2_fast(sink - largest) : 0;
  for (int w = 0; w < COMBINERS / 32; w++) total += of_warps[1][w];

  float4 result = {};
  const auto count = [&](int i, float4 s) {
    const float by = weights[i];
    if (by == 0) return;
    result.x = fmaf(s.x, by, result.x), result.y = fmaf(s.y, by, result.y);
    result.z = fmaf(s.z, by, result.z), result.w = fmaf(s.w, by, result.w);
  };
  if (team < TEAMS) {
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++)
      if (team + j * TEAMS < blocks) count(team + j * TEAMS, first[j]);
#pragma unroll 4
    for (int i = team + AT_ONCE * TEAMS; i < blocks; i += TEAMS) count(i, load(i));
  }
  parts[threadIdx.x] = result;
  __syncthreads();
  if (team) return;
  for (int i = 1; i < TEAMS; i++) add(result, parts[i * LANES + threadIdx.x]);
  const float by = total == 0 ? 0 : 1 / total;
  *(uint2*)(y + (size_t)blockIdx.x * HEAD + d) =
      make_uint2(of_y(result.x * by, result.y * by), of_y(result.z * by, result.w * by));
}
