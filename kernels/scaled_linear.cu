// y = function((x @ W.T) * scales + bias) on x and W of 8 bits, and on 2:4 sparse W of 8 or 16, read as they are.
//
// One thread brings x and the weight to shared memory, in boxes; consumer warpgroups multiply. Blocks work on tile
// after tile, and copies run ahead into the next one while y is written. The blocks of a cluster may be neighbours:
// they have different channels of the same tokens, and each brings a part of x to all. Or the blocks of a cluster
// share K of one tile and add up their sums in a fixed order (SPLIT).
//
// Defines: KIND (0: int8, 1: float8 e4m3, 2: half precision, sparse only), SPARSE (0 or 1), HALF (of y, and of KIND
// 2), TOKENS (of a block: 8, 16, 32, 64, 128 or 256), GROUPS (consumer warpgroups), TALL (of 64 channels that each
// computes: 1 or 2), STAGES, AWAY (tokens of y that leave at a time), BUFFERS (for those in shared memory: 1 if they
// are all, else 2 or more), BOXES (of x in a stage, 128 bytes of k each: 1 or 2), NEIGHBOURS (blocks that share x: 1,
// 2 or 4), SPLIT (0 or 1), PRODUCERS (threads, of which one copies; 128 where two warpgroups have more sums than they
// have registers), WIDE_SCALES (scales of channels are fp32, else as y), ZEROS (whether x has zero points), FUNCTION
// (0: none, 1: GELU, 2: GELU by tanh).
// Boxes: of x TOKENS / NEIGHBOURS rows of 128 bytes, swizzled; of q the block's channels, the bytes that belong to a
// stage, swizzled by as many as they are, 64 or 128; of indices, where sparse, likewise, as they are. Of y: AWAY rows
// of 64 channels, swizzled by 128 bytes.
// Grid, along x: at most as many blocks as tiles of 64 GROUPS TALL channels and TOKENS tokens, in clusters of
// NEIGHBOURS; if SPLIT, as many for each tile as a cluster has.

#if KIND == 0
#define SUM(x) "+r"(x)
#define NUMBER int
#else
#define SUM(x) "+f"(x)
#define NUMBER float
#endif
#include "wgmma.cuh"

extern __shared__ __align__(1024) u8 shared[];

#define CHANNELS (64 * GROUPS * TALL)
#define CONSUMERS (128 * GROUPS)                      // threads
#define ITEM (KIND == 2 ? 2 : 1)                      // bytes
#define STEP (BOXES * 128 / ITEM)                     // k of a stage
#define X_BYTES (TOKENS * BOXES * 128)                // of a stage
#define ROW (BOXES * 128 / (1 + SPARSE))              // bytes of a channel in a stage: 128, or, sparse, 64
#define PIECES (ROW > 128 ? 2 : 1)                    // boxes of the weight in a stage
#define Q_BYTES (CHANNELS * ROW)
#define INDEX_ROW (SPARSE ? max(STEP / 8, 16) : 0)    // bytes of a channel: a nibble for 4 of k; no copy is of less than 16,
#define INDEX_STEPS (SPARSE ? INDEX_ROW * 8 / STEP : 1) // and so it may be of two stages: STAGES and steps are even then
#define STAGE_BYTES ((X_BYTES + Q_BYTES + CHANNELS * INDEX_ROW + 1023) / 1024 * 1024)
#define PITCH (CHANNELS + 8)                          // numbers between tokens of the sums in shared memory
#define PART (AWAY < 64 ? AWAY : 64)                  // tokens that a loop is unrolled over
#define TOKEN_SCALES 1024                             // where those of each warpgroup start, behind the barriers
#define AHEAD (SPLIT ? 1024 : 3072)                   // bytes: of both, in front of the ring and the sums
#define PRODUCTS (BOXES * 128 / AT_ONCE)              // of a stage, for 64 channels
#define TOGETHER 8 // tiles of tokens that meet the same weights one after another, so that those are in the L2

// wgmma: of a warp's 16 channels and the tile's tokens, d[4 i + 2 h + j] of a thread is channel g + 8 h, token
// 8 i + 2 t + j, where g is lane / 4 and t is lane % 4.

#if KIND == 0
#define TYPES "s32.s8.s8"
#define TAIL ""
#elif KIND == 1
#define TYPES "f32.e4m3.e4m3"
#define TAIL ", 1, 1"
#else
#define TYPES "f32." HALF_TYPE "." HALF_TYPE
#define TAIL ", 1, 1, 0, 0"
#endif
#if SPARSE // 64 bytes of k; all threads have indices of 8 bit numbers, the first two of each four those of 16 bit ones
#define AT_ONCE 64
#define INSTRUCTION(width, k, sums, a, b, e) "wgmma.mma_async.sp.sync.aligned.m64n" width k TYPES " {" sums "}, " a "," b "," e ", 0, add" TAIL ";"
#if KIND == 2
#define SIZE "k32."
#else
#define SIZE "k64."
#endif
#else
#define AT_ONCE 32
#define INSTRUCTION(width, k, sums, a, b, e) "wgmma.mma_async.sync.aligned.m64n" width k TYPES " {" sums "}, " a "," b ", add" TAIL ";"
#define SIZE "k32."
#endif
#define PRODUCT(width, sums, a, b, e, when, ...)                                                        \
  asm volatile("{ .reg .pred add; setp.ne.b32 add, " when ", 0;\n" INSTRUCTION(width, SIZE, sums, a, b, e) " }" \
               : __VA_ARGS__ : "l"(w), "l"(x), "r"(indices), "r"(add))

// Where `never` does not hold, no more than a use of the register here.
__device__ __forceinline__ void still_used(u32 v, bool never) {
  asm volatile("{ .reg .pred never; setp.ne.b32 never, %1, 0; @never st.shared.u32 [%0], %0; }" ::"r"(v), "r"((int)never) : "memory");
}

// d [64, TOKENS] = w [64, k] · x [k, TOKENS], added to d if `add`; k: AT_ONCE bytes
__device__ __forceinline__ void product(NUMBER* d, u64 w, u64 x, u32 indices, int add) {
#if TOKENS == 8
  PRODUCT("8", N4, "%4", "%5", "%6", "%7", F4(0));
#elif TOKENS == 16
  PRODUCT("16", N8, "%8", "%9", "%10", "%11", F4(0), F4(4));
#elif TOKENS == 32
  PRODUCT("32", N16, "%16", "%17", "%18", "%19", F16(0));
#elif TOKENS == 64
  PRODUCT("64", N32, "%32", "%33", "%34", "%35", F16(0), F16(16));
#elif TOKENS == 128
  PRODUCT("128", N64, "%64", "%65", "%66", "%67", F64(0));
#else
  PRODUCT("256", N128, "%128", "%129", "%130", "%131", F64(0), F64(64));
#endif
}

// What becomes of the sums ---------------------------------------------------------------------------------------

#if WIDE_SCALES
typedef float Scale;
__device__ __forceinline__ float of_scale(float v) { return v; }
#else
typedef u16 Scale;
__device__ __forceinline__ float of_scale(u16 v) { return to_float(v); }
#endif
// From the kernel ahead: not from a cache that may be older than that.
__device__ __forceinline__ float fresh(const float* p) {
  float v;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ int fresh(const int* p) {
  int v;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

struct Scales { // of tokens and channels; null where there are none
  const float* x;
  const int* zero;
  const Scale* q;
  const int* sums; // of the codes of each channel
  const u16* bias;
  int x_step, q_step; // 1 where each token has its scale and zero point, and each channel its scale; 0 where all share one
};
struct Token {
  float scale;
  int zero;
};
struct Channel {
  float scale, bias;
  int sum;
};
__device__ __forceinline__ float scale_of(const Scales& s, int m) { return s.x ? fresh(s.x + m * s.x_step) : 1; }
__device__ __forceinline__ int zero_of(const Scales& s, int m) { return ZEROS ? fresh(s.zero + m * s.x_step) : 0; }
__device__ __forceinline__ Channel channel_of(const Scales& s, int n) {
  return {s.q ? of_scale(s.q[n * s.q_step]) : 1, s.bias ? to_float(s.bias[n]) : 0, ZEROS ? s.sums[n] : 0};
}

// GELU(y) = max(y, 0) - |y| P(Z > |y|), for Z normal or as its approximation by tanh has it. The logarithm of that tail is
// nearly a polynomial: the relative error is below 1.8e-4 up to |y| = 4; beyond LAST it is 0 to fp32's accuracy of y.
#if FUNCTION == 1
#define LAST 5.6f
#define TAIL_LOGARITHM(a) \
  fmaf(fmaf(fmaf(fmaf(fmaf(-3.0094091e-4f, a, 5.6296843e-3f), a, -4.7547565e-2f), a, -0.4650881f), a, -1.1487085f), a, -1.0001573f)
#elif FUNCTION == 2
#define LAST 5.f
#define TAIL_LOGARITHM(a)                                                                                                \
  fmaf(fmaf(fmaf(fmaf(fmaf(fmaf(3.4927563e-4f, a, -4.6085723e-3f), a, 1.5432358e-2f), a, -5.3798508e-2f), a, -0.4639975f), a, \
            -1.1480103f), a, -1.0002482f)
#endif
__device__ __forceinline__ float function(float y) {
#if FUNCTION
  const float a = fminf(fabsf(y), LAST);
  float tail, positive;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(tail) : "f"(TAIL_LOGARITHM(a)));
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(positive) : "f"(y));
  return fmaf(-a, tail, positive);
#else
  return y;
#endif
}
__device__ __forceinline__ float scaled(NUMBER sum, Token m, Channel n) {
#if ZEROS
  sum -= m.zero * n.sum;
#endif
  return function(fmaf((float)sum, m.scale * n.scale, n.bias));
}

// Four 8 × 8 matrices of halves, from fragments with channels as rows, to rows that are tokens: one for each lane, 16 bytes.
__device__ __forceinline__ void store_matrices_transposed(u32 row, const u32* v) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3]) : "memory");
}
__device__ __forceinline__ void store_2_matrices_transposed(u32 row, const u32* v) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(row), "r"(v[0]), "r"(v[1]));
}

#if SPLIT
#define RESULT u16*
#else
#define RESULT const __grid_constant__ Matrix
#endif

// x [M, K], q [N, K], or [N, K/2] and indices [N, K/8] where sparse -> y [M, N]; what a stage has beyond K is zeros;
// N % 8 = 0
extern "C" __global__ void __launch_bounds__(CONSUMERS + PRODUCERS, 1)
scaled_linear(const __grid_constant__ Matrix x, const __grid_constant__ Matrix q,
#if SPARSE
              const __grid_constant__ Matrix indices,
#endif
              const float* __restrict__ x_scale, const int* __restrict__ x_zero, const Scale* __restrict__ q_scale,
              const int* __restrict__ q_sums, const u16* __restrict__ bias, RESULT y, int x_step, int q_step, int M,
              int N, int K) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32 % 4, g = lane / 4, t = lane % 4;
  const Scales scales = {x_scale, x_zero, q_scale, q_sums, bias, x_step, q_step};
  const int blocks = SPLIT ? cluster_size() : NEIGHBOURS, rank = blockIdx.x % blocks;
  const int all_steps = (K + STEP - 1) / STEP;
  const int begin = SPLIT ? all_steps * rank / blocks : 0, end = SPLIT ? all_steps * (rank + 1) / blocks : all_steps;
  const int high_tiles = (M + TOKENS - 1) / TOKENS, wide = CHANNELS * NEIGHBOURS; // a tile is as wide as all neighbours'
  const int tiles = high_tiles * ((N + wide - 1) / wide), first_tile = blockIdx.x / blocks, stride = gridDim.x / blocks;
  int channel, token; // of the tile
  auto place = [&](int tile) {
    const int before = tile / (tiles / high_tiles * TOGETHER) * TOGETHER, together = min(TOGETHER, high_tiles - before);
    const int left = tile - before * (tiles / high_tiles);
    channel = left / together * wide + (NEIGHBOURS > 1 ? rank * CHANNELS : 0), token = (before + left % together) * TOKENS;
  };
  place(first_tile);
  const u32 full = shared_address(shared), empty = full + STAGES * 8, ring = full + AHEAD;
  if (thread == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, GROUPS * 4 * NEIGHBOURS);
    }
    if (SPLIT) barrier_init(empty + STAGES * 8, 1);
    barriers_ready();
  }
  __syncthreads();
#if SPLIT
  NUMBER* sums = (NUMBER*)(shared + AHEAD); // [TOKENS][PITCH], once all steps are done
  const int ring_or_sums = max(STAGES * STAGE_BYTES, TOKENS * PITCH * 4);
  NUMBER* parts = (NUMBER*)(shared + AHEAD + ring_or_sums); // [other block][token of the slice][PITCH]
  const u32 parts_ready = empty + STAGES * 8;
#endif
  if (SPLIT || NEIGHBOURS > 1) cluster_ready();

  if (thread >= CONSUMERS) { // -------------------------------------------------------------------------- producers
#if PRODUCERS == 128
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
#endif
    if (NEIGHBOURS > 1) cluster_wait(); // the others' barriers are made
    const u64 policy = high_tiles > 1 ? read_again() : read_once();
    auto fetch_weight = [&](int step, int stage) {
      const u32 to = ring + stage * STAGE_BYTES + X_BYTES, barrier = full + stage * 8;
      barrier_expect(barrier, X_BYTES + Q_BYTES + (step % INDEX_STEPS ? 0 : CHANNELS * INDEX_ROW));
      for (int i = 0; i < PIECES; i++)
        copy_box(to + i * CHANNELS * 128, q, (step * PIECES + i) * (ROW / PIECES / ITEM), channel, barrier, policy);
#if SPARSE
      if (step % INDEX_STEPS == 0) copy_box(to + Q_BYTES, indices, step / INDEX_STEPS * INDEX_ROW, channel, barrier, policy);
#endif
    };
    if (thread == CONSUMERS) {
      if (NEIGHBOURS == 1)
        for (int s = 0; s < STAGES && begin + s < end; s++) fetch_weight(begin + s, s);
      wait_for_previous_grid();
      let_next_grid_start();
      int stage = 0, phase = 1;
      for (int tile = first_tile; tile < tiles; tile += stride) {
        place(tile);
        for (int step = begin; step < end; step++) {
          barrier_wait(empty + stage * 8, phase);
          if (NEIGHBOURS > 1 || tile != first_tile || step >= begin + STAGES) fetch_weight(step, stage);
          for (int i = 0; i < BOXES; i++) {
            const u32 to = ring + stage * STAGE_BYTES + i * TOKENS * 128, k = (step * BOXES + i) * (128 / ITEM);
#if NEIGHBOURS > 1
            copy_box_to_blocks<NEIGHBOURS>(to + rank * (TOKENS / NEIGHBOURS * 128), x, k, token + rank * (TOKENS / NEIGHBOURS),
                                           full + stage * 8);
#else
            copy_box(to, x, k, token, full + stage * 8);
#endif
          }
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      }
    }
    __syncwarp();
    if (SPLIT) cluster_wait();
    if (SPLIT || NEIGHBOURS > 1) { // as the consumers do
      cluster_sent();
      cluster_wait();
    }
  } else { // ------------------------------------------------------------------------------------------- consumers
#if PRODUCERS == 128
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
#endif
    if (NEIGHBOURS > 1) cluster_wait();
    const int group = thread / 128, first = group * 64 * TALL + warp * 16; // of the warp's channels
    NUMBER d[TALL][TOKENS / 2];
    typedef u32 Which[PRODUCTS][TALL]; // indices of the sparse weight
    Which which[2] = {};
    int stage = 0, phase = 0;
    auto release = [&](int stage) { // to all who copy into it
      if (lane < NEIGHBOURS) NEIGHBOURS > 1 ? barrier_arrive_at(empty + stage * 8, lane) : barrier_arrive(empty + stage * 8);
    };
    for (int tile = first_tile; tile < tiles; tile += stride) {
      int before = -1;
      auto multiply = [&](int step, Which& mine, Which& others) {
        const u32 base = ring + stage * STAGE_BYTES, weights = base + X_BYTES + group * TALL * 64 * min(ROW, 128);
        barrier_wait(full + stage * 8, phase);
#if SPARSE
        const u8* rows = shared + AHEAD + (stage - stage % INDEX_STEPS) * STAGE_BYTES + X_BYTES + Q_BYTES +
                         (first + g) * INDEX_ROW + stage % INDEX_STEPS * (STEP / 8);
#pragma unroll
        for (int j = 0; j < PRODUCTS; j++)
#pragma unroll
          for (int r = 0; r < TALL; r++) {
#if KIND == 2 // both rows of a thread, 16 of k
            const u8* at = rows + r * 64 * INDEX_ROW + j * 4 + t % 2 * 2;
            mine[j][r] = *(const u16*)at | (u32) * (const u16*)(at + 8 * INDEX_ROW) << 16;
#else // one of them, 32 of k
            mine[j][r] = *(const u32*)(rows + (r * 64 + t % 2 * 8) * INDEX_ROW + j * 8 + t / 2 * 4);
#endif
          }
#endif
        operands_ready();
#pragma unroll
        for (int j = 0; j < PRODUCTS; j++)
#pragma unroll
          for (int r = 0; r < TALL; r++) {
            const int at = j * (ROW / PRODUCTS); // byte of a row of the weight
            const u32 piece = weights + r * 64 * min(ROW, 128) + at / 128 * (CHANNELS * 128);
            const u64 w = descriptor<(ROW < 128 ? 64 : 128)>(piece) + at % 128 / 16;
            const u64 v = descriptor(base + j * AT_ONCE / 128 * (TOKENS * 128)) + j * AT_ONCE % 128 / 16;
            product(d[r], w, v, SPARSE ? mine[j][r] : 0, step > begin || j);
          }
        products_commit();
        products_wait<1>();
#if SPARSE // the products before read these registers until now, which the compiler does not know
#pragma unroll
        for (int j = 0; j < PRODUCTS; j++)
#pragma unroll
          for (int r = 0; r < TALL; r++) still_used(others[j][r], K < 0);
#endif
        if (before >= 0) release(before);
        before = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
      };
      for (int step = begin; step < end; step += 2) {
        multiply(step, which[0], which[1]);
        if (step + 1 < end) multiply(step + 1, which[1], which[0]);
      }
      wait_for_previous_grid(); // whose the scales of x are
#if !SPLIT
      place(tile);
      float* token_scales = (float*)(shared + TOKEN_SCALES) + group * TOKENS;
#pragma unroll
      for (int i = 0; i < TOKENS; i += 128)
        if (TOKENS >= 128 || thread % 128 < TOKENS)
          token_scales[i + thread % 128] = scale_of(scales, min(token + i + thread % 128, M - 1));
#if ZEROS
      int zero_of_lane[(TOKENS + 31) / 32]; // of each 32 tokens one
#pragma unroll
      for (int i = 0; i < (TOKENS + 31) / 32; i++) zero_of_lane[i] = zero_of(scales, min(token + i * 32 + lane, M - 1));
#endif
      Channel n[TALL][2];
#pragma unroll
      for (int i = 0; i < TALL * 2; i++)
        n[i / 2][i % 2] = channel_of(scales, min(channel + first + i / 2 * 64 + g + i % 2 * 8, N - 1));
      if (thread % 128 == 0) copies_back_read(); // y of the tile before
      asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
      float2 two[2][2]; // scales of this thread's tokens of 16, and of the next 16, which are here when they are needed
      auto scales_of = [&](int i, float2* two) {
        two[0] = *(const float2*)(token_scales + i + 2 * t);
        if (AWAY >= 16) two[1] = *(const float2*)(token_scales + i + 8 + 2 * t);
      };
      scales_of(0, two[0]);
#endif
      products_wait<0>();
#if !SPLIT
      release(before);
#pragma unroll
      for (int part = 0; part < TOKENS; part += PART) {
        const int start = part / AWAY * AWAY; // of what leaves together
        const u32 written = ring + STAGES * STAGE_BYTES + (group * BUFFERS + start / AWAY % BUFFERS) * TALL * (AWAY * 128);
#pragma unroll
        for (int i = part; i < part + PART; i += 16) {
          const int now = i / 16 % 2;
          if (i + 16 < TOKENS) scales_of(i + 16, two[1 - now]);
          Token m[2][2];
#pragma unroll
          for (int j = 0; j < (AWAY < 16 ? 1 : 2); j++) {
            m[j][0].scale = two[now][j].x, m[j][1].scale = two[now][j].y;
#if ZEROS
#pragma unroll
            for (int h = 0; h < 2; h++)
              m[j][h].zero = __shfl_sync(~0u, zero_of_lane[i / 32], i % 32 + j * 8 + 2 * t + h);
#endif
          }
          const int row = i - start + lane / 16 * 8 + lane % 8, c = warp * 32 + lane / 8 % 2 * 16;
#pragma unroll
          for (int r = 0; r < TALL; r++) {
            u32 v[4];
#pragma unroll
            for (int j = 0; j < (AWAY < 16 ? 2 : 4); j++) {
              const NUMBER* from = d[r] + (i + j / 2 * 8) / 2 + j % 2 * 2;
              v[j] = to_halves(scaled(from[0], m[j / 2][0], n[r][j % 2]), scaled(from[1], m[j / 2][1], n[r][j % 2]));
            }
            const u32 block = written + r * (AWAY * 128); // [token][64 channels]
            if (AWAY < 16)
              store_2_matrices_transposed(block + lane % 8 * 128 + (c ^ lane % 8 * 16), v);
            else
              store_matrices_transposed(block + row * 128 + (c ^ row % 8 * 16), v);
          }
        }
        if (part + PART < start + AWAY) continue;
        before_copies();
        if (BUFFERS > 1 && thread % 128 == 0) copies_back_read<(BUFFERS > 1 ? BUFFERS - 2 : 0)>(); // where the next go
        asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
        if (thread % 128 == 0) {
          for (int r = 0; r < TALL; r++)
            copy_box_back(written + r * (AWAY * 128), y, channel + (group * TALL + r) * 64, token + start);
          copies_back_commit();
        }
      }
#endif
    }
#if !SPLIT
    if (thread % 128 == 0) copies_back_done();
    __syncwarp();
    if (NEIGHBOURS > 1) { // nothing comes from the others any more
      cluster_sent();
      cluster_wait();
    }
#else
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
#pragma unroll
    for (int r = 0; r < TALL; r++)
#pragma unroll
      for (int i = 0; i < TOKENS / 2; i++)
        sums[(i / 4 * 8 + 2 * t + i % 2) * PITCH + first + r * 64 + g + (i & 2 ? 8 : 0)] = d[r][i];
    before_copies();
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
    // Each block writes some tokens of y, whose sums the others bring to it.
    const int rows = min(TOKENS, M - token), slice = (rows + blocks - 1) / blocks;
    auto tokens_of = [&](int block) { return max(min(slice, rows - block * slice), 0); };
    auto part = [&](int of, int at) { return parts + (of - (of > at)) * slice * PITCH; }; // what block `at` has of another
    if (thread == 0) barrier_expect(parts_ready, (blocks - 1) * tokens_of(rank) * (PITCH * 4));
    cluster_wait(); // all of them have started
    if (thread < blocks && thread != rank && tokens_of(thread))
      copy_to_block(thread, shared_address(part(rank, thread)), shared_address(sums + thread * slice * PITCH),
                    tokens_of(thread) * (PITCH * 4), parts_ready);
    barrier_wait_cluster(parts_ready, 0);
    __syncwarp();
    cluster_ready(); // to end
    for (int i = thread; i < tokens_of(rank) * (CHANNELS / 8); i += CONSUMERS) {
      const int row = i / (CHANNELS / 8), c = i % (CHANNELS / 8) * 8, n = channel + c;
      if (n >= N) continue;
      const int at = token + rank * slice + row;
      const Token m = {scale_of(scales, at), zero_of(scales, at)};
      NUMBER total[8] = {};
      for (int r = 0; r < blocks; r++) {
        const NUMBER* from = (r == rank ? sums + rank * slice * PITCH : part(r, rank)) + row * PITCH + c;
#pragma unroll
        for (int j = 0; j < 8; j++) total[j] += from[j];
      }
      u32 out[4];
#pragma unroll
      for (int j = 0; j < 4; j++)
        out[j] = to_halves(scaled(total[2 * j], m, channel_of(scales, n + 2 * j)),
                           scaled(total[2 * j + 1], m, channel_of(scales, n + 2 * j + 1)));
      *(uint4*)(y + (size_t)at * N + n) = make_uint4(out[0], out[1], out[2], out[3]);
    }
    __syncwarp();
    cluster_wait(); // what the others have of this block has left it
#endif
  }
}
