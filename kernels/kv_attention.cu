// Attention of few query rows over a packed cache (kv_cache.py): the time is that of reading the cache.
//
// Query heads that share a KV head, and the new tokens of each, are the rows of one small matrix, so that the cache is
// read once. What a row of the batch sees is dealt out to its blocks, on the device, from positions: a block that gets
// nothing ends at once. All of them go through the cache side by side, so that they read few pages of memory at a time.
// Each warp works on units of 32 tokens of its own, which one of its threads brings to its ring in shared memory; no warp
// waits for another: warps, then blocks, meet at the end, in a fixed order. The products are those of kv_products.cuh: the
// scale of a key of 8 bits meets its score, that of a value its probability. Of keys by channel the block that is in the
// window comes from there as it is, all of it to the blocks of threads that have some of its units.
//
// While the grids ahead still run, warps ask for the first units to be in the L2 when they have ended, by positions that
// those may be about to write: that is a hint, and right whatever they write, as all see the same L2. By the same
// positions each warp copies its first unit once they have ended, before it knows the positions as they are then; were
// there others, it copies anew.
//
// Defines: FP16 (q and y are fp16, else bf16), HEAD (a multiple of 16, for int4 of 32), KEYS and VALUES (0: int8, 1:
// e4m3, 2: int4), GROUP (d that share a scale of int4: 32 or a multiple), TILES (of 8 rows), WARPS, STAGES (of a warp's
// ring), AHEAD (units of a block that are asked for), MASK (0: none, 1: bool, 2: as q, 3: fp32), SINKS (0: none, 1: bf16,
// 2: fp16, 3: fp32); of keys by channel BLOCK, the tokens that share a scale, a multiple of 32, and WINDOW (0: bf16, 1:
// fp16, 2: fp32).
// Boxes: 32 tokens of SEGMENT bytes, swizzled by as many.

#include "kv_units.cuh"

extern __shared__ __align__(1024) u8 shared[];

#define ROWS (TILES * 8)
#define COMBINERS ((HEAD + 127) / 128 * 32) // threads of a block of `kv_combine`
#define PITCH (HEAD + 4) // of sums in shared memory, against bank conflicts
#define LOG2E 1.4426950408889634f
#define NOTHING (-1e30f) // the largest score where there is none

__device__ __forceinline__ u32 of_y(float low, float high) {
#if FP16
  return to_fp16(low, high);
#else
  return to_halves(low, high);
#endif
}

// That of a query head, in powers of 2.
__device__ __forceinline__ float sink_of(const u8* sinks, int head) {
#if SINKS == 1
  return to_float(load_2(sinks + head * 2)) * LOG2E;
#elif SINKS == 2
  return from_fp16(load_2(sinks + head * 2)) * LOG2E;
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
  const u32 full = shared_address(shared);
  const Units units{k, v, k_scales, v_scales, head, S, full, read_once()};
  const Sight sight{positions + (size_t)b * T, start ? start + b : nullptr, T, S, window};
  let_next_grid_start();
  if (threadIdx.x <= RINGS) {
    barrier_init(full + threadIdx.x * 8, 1);
    barriers_ready();
  }
  const Work likely = work_of(sight.seen(sight.ask()), block, blocks);
  if (lane == 0)
    for (int i = warp; i < min(likely.units, AHEAD); i += WARPS) units.prefetch(likely.token(i));
  __syncthreads();
  wait_for_previous_grid();

  Query query; // ahead of the copies, behind which it would wait for as long as they take
  query.load(q + (size_t)head * rows * HEAD, rows);
#ifdef BLOCK
  const long long held = load_8_from_L2(k_held + b);
#endif
  const Asked asked = sight.ask();
  if (lane == 0 && warp < likely.units) units.copy(likely.token(warp), warp);
  __syncwarp();
  const int2 mine = sight.seen(asked);
  const Work work = work_of(mine, block, blocks);
  int phase = 0;
  if (work != likely) { // all stages anew
    if (warp < likely.units) {
      barrier_wait(full + warp * 8, 0);
    } else if (lane == 0) {
      barrier_arrive(full + warp * 8);
    }
    __syncwarp();
    if (lane == 0) {
      for (int stage = warp + WARPS; stage < RINGS; stage += WARPS) barrier_arrive(full + stage * 8);
      if (warp < work.units) units.copy(work.token(warp), warp);
    }
    __syncwarp();
    phase = 1;
  }
  if (blocks > 1 && work.units == 0) {
    if (threadIdx.x < rows) tops[(size_t)blockIdx.x * rows + threadIdx.x] = make_float2(NOTHING, 0);
    return;
  }
  // between these, all rows see all
  const int all_from = __reduce_max_sync(~0u, lane < T ? mine.x : 0);
  const int all_to = MASK ? 0 : __reduce_min_sync(~0u, lane < T ? mine.y : S) + 1;

  uint2* fragments = (uint2*)(shared + BARRIERS + RINGS * (STAGE + STAGE_SCALES));
  u8* kept = (u8*)(fragments + TILES * (HEAD * 2 + 32)); // the window
  float out[HEAD / 16][TILES][4] = {}, middles[TILES][4] = {};
  float top[TILES][2], sum[TILES][2] = {}; // of rows 2 t and 2 t + 1
#pragma unroll
  for (int i = 0; i < TILES * 2; i++) top[i / 2][i % 2] = NOTHING;

#ifdef BLOCK
  bool here = false;
  for (int i = 0; i < BLOCK / UNIT; i++) here |= work.has((int)held * (BLOCK / UNIT) + i);
  if (here && threadIdx.x == 0) {
    const u32 bytes = BLOCK * HEAD * (WINDOW == 2 ? 4 : 2);
    barrier_expect(full + RINGS * 8, bytes);
    copy_bulk(shared_address(kept), k_window + (size_t)head * bytes, bytes, full + RINGS * 8, units.policy);
  }
#endif
  query.keep(fragments);
  __syncthreads();
  if (lane == 0)
    for (int i = warp + WARPS; i < min(work.units, RINGS); i += WARPS) units.copy(work.token(i), i);
  __syncwarp();
  uint2 sums_of_q[TILES];
#ifndef BLOCK
  if (KEYS == INT4) load_sums(sums_of_q, fragments);
#endif
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
  int stage = warp;
  for (int i = warp; i < work.units; i += WARPS) {
    barrier_wait(full + stage * 8, phase);
    const int token = work.token(i);
    const u32 k_codes = full + BARRIERS + stage * STAGE, v_codes = k_codes + Keys::CODES;
    u32* k_pairs = (u32*)(shared + BARRIERS + RINGS * STAGE + stage * STAGE_SCALES);
    u32* v_pairs = k_pairs + KEY_SCALES / 4;
    const bool edge = token < all_from || token + UNIT > all_to;
    if (edge) { // values that no row sees count nothing, whatever they are
      bool any = false;
      for (int of = 0; of < T; of++)
        any |= token + lane >= __shfl_sync(~0u, mine.x, of) & token + lane <= __shfl_sync(~0u, mine.y, of);
      if (!any)
        for (int group = 0; group < Values::GROUPS; group++) v_pairs[lane * Values::GROUPS + group] = 0;
      __syncwarp();
    }
    float s[2][TILES][4] = {}; // of tokens g, twice, and g + 8, in each half of the unit
    float factor = plain * Keys::OF_SCORES;
#ifdef BLOCK
    if (token / BLOCK == held) {
      factor = plain;
      barrier_wait(full + RINGS * 8, 0);
#pragma unroll
      for (int half = 0; half < 2; half++)
        scores_of_window(s[half], kept, (token % BLOCK + half * 16) * HEAD, fragments);
    } else {
      scores_by_channel(s, k_codes, (const uint4*)k_pairs, fragments);
    }
#else
    scores_of<KEYS>(s, k_codes, k_pairs, fragments, sums_of_q);
#endif
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u32* pairs = k_pairs + half * 16 * Keys::GROUPS;
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
        if (VALUES == INT4) middles[m][e] *= by;
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
          p[m][h] = transpose(to_halves(even * by, odd * by));
        }
      }
      add_values<VALUES>(out, middles, v_codes + half * 16 * Values::SEGMENT, pairs, p);
    }
    before_copies();
    __syncwarp();
    if (lane == 0 && i + RINGS < work.units) units.copy(work.token(i + RINGS), stage);
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
      float2 result = make_float2(out[c][m][e] * Values::OF_VALUES, out[c][m][e + 2] * Values::OF_VALUES);
      if (VALUES == INT4) {
        const float middle = __shfl_sync(~0u, middles[m][e], c / 2 * 32 / GROUP * 4 + t);
        result.x += middle, result.y += middle;
      }
      *(float2*)(sums_of_warps + row * PITCH + d) = result;
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
    const size_t to = (size_t)blockIdx.x * rows + row;
    const float by = blocks > 1 ? 1 : total == 0 ? 0 : 1 / total;
    result.x *= by, result.y *= by, result.z *= by, result.w *= by;
    if (blocks > 1) {
      *(float4*)(sums + to * HEAD + d) = result;
      if (d == 0) tops[to] = make_float2(largest, total);
    } else {
      *(uint2*)(y + to * HEAD + d) = make_uint2(of_y(result.x, result.y), of_y(result.z, result.w));
    }
  }
}

#define AT_ONCE 32 // blocks whose sums are on their way together

// sums and tops of `kv_attend`, sinks -> y. Grid: B H rows; a thread has four d, a lane the top of one block of 32.
extern "C" __global__ void __launch_bounds__(COMBINERS)
kv_combine(const float* sums, const float2* tops, const u8* sinks, u16* y, int blocks, int H, int rows, int T) {
  const int head = blockIdx.x / rows, row = blockIdx.x % rows, lane = threadIdx.x % 32, d = threadIdx.x * 4;
  let_next_grid_start();
  wait_for_previous_grid();
  const float sink = sink_of(sinks, head % H * (rows / T) + row / T);
  float largest = fmaxf(sink, NOTHING), total = SINKS ? exp2_fast(sink - largest) : 0;
  float4 result = {};
  for (int first = 0; first < blocks; first += AT_ONCE) {
    const size_t at = ((size_t)head * blocks + first) * rows + row;
    float4 of[AT_ONCE]; // of blocks without tokens whatever is there
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
      if (d < HEAD && first + i < blocks) of[i] = *(const float4*)(sums + (at + (size_t)i * rows) * HEAD + d);
    const float2 top = first + lane < blocks ? tops[at + (size_t)lane * rows] : make_float2(NOTHING, 0);
    float now = fmaxf(largest, top.x);
    for (int other = 16; other; other /= 2) now = fmaxf(now, __shfl_xor_sync(~0u, now, other));
    const float before = exp2_fast(largest - now), weight = top.y == 0 ? 0 : exp2_fast(top.x - now);
    float sum = top.y * weight;
    for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
    largest = now, total = fmaf(total, before, sum);
    result.x *= before, result.y *= before, result.z *= before, result.w *= before;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const float by = __shfl_sync(~0u, weight, i);
      if (by == 0) continue;
      result.x = fmaf(of[i].x, by, result.x), result.y = fmaf(of[i].y, by, result.y);
      result.z = fmaf(of[i].z, by, result.z), result.w = fmaf(of[i].w, by, result.w);
    }
  }
  if (d >= HEAD) return;
  const float by = total == 0 ? 0 : 1 / total;
  *(uint2*)(y + (size_t)blockIdx.x * HEAD + d) =
      make_uint2(of_y(result.x * by, result.y * by), of_y(result.z * by, result.w * by));
}
