// y = x @ W.T + bias on packed weights, for few tokens: the time is that of reading the weight. Fused with it, on demand:
// an RMSNorm of x, a gate on the two halves of y, a residual that is added.
//
// The weight is the left operand of mma.m16n8k16, so that few tokens fill its short side. Each warp works on its own
// part of the weight, which one thread of the last warp brings to the warp's ring in shared memory; no warp waits for
// another: the warps of a block and the blocks of a cluster take K in turns, and their sums meet at the end, in a fixed
// order. The first copies of a grid, which are weights, start before the grid that computes x has ended.
//
// Defines: HALF, WARPS (that compute), STAGES (of a ring), UNIT (along K, of a stage), TILES (of 8 tokens: M ≤ 8 TILES),
// ONE (1 if M = 1 and TILES = 1), NORM (1 if x is normalized), GATED (1 if y is silu(first half of x @ W.T) · second half;
// a block computes channels of both), INT4 (0: the weight is int8), GROUP (weights along K that share a scale; 0: all of an
// int8 channel), and for int4 PANELS (of 64 channels that a block computes), for int8 ROWS (of 16 channels; UNIT is 128).
// Boxes: of int4's scales the block's channels and a unit's groups, as they are; of int8's q the block's channels and
// 128 k, swizzled by 128 bytes; of each half of the channels where y is gated.
// Grid: as many blocks for each PANELS or ROWS as a cluster has, along x.

#include "ptx.cuh"

extern __shared__ __align__(1024) u8 shared[];

#define HEAD 2048 // bytes, of the barriers and from SQUARES on of the sums of squares, ahead of the rings and the sums
#define PARTS 1016 // where the barrier of the sums of other blocks is
#define SQUARES 1024
#define TOKENS (ONE ? 1 : TILES * 8)
#define HALVES (1 + GATED)
#define PAD 32 // between tokens of x in shared memory, against bank conflicts
#define THREADS (WARPS * 32 + 32)
#define RINGS (WARPS * STAGES) // stages in all: unit i of the block goes to i % RINGS

// What the last warp does: it brings the units begin ... end to the rings, by fetch(unit, stage, barrier).
template <typename Fetch>
__device__ __forceinline__ void produce(int begin, int end, u32 full, u32 empty, Fetch fetch) {
  if (threadIdx.x != WARPS * 32) return;
  int stage = 0, phase = 1;
  for (int unit = begin; unit < end; unit++) {
    barrier_wait(empty + stage * 8, phase);
    fetch(unit, stage, full + stage * 8);
    if (++stage == RINGS) stage = 0, phase ^= 1;
  }
}

// What a warp does when it has read a stage: it gives the stage back and goes on to its next one.
__device__ __forceinline__ void next_stage(u32 empty, int& stage, int& phase) {
  before_copies();
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(empty + stage * 8);
  if ((stage += WARPS) >= RINGS) stage -= RINGS, phase ^= 1;
}

__device__ __forceinline__ void make_barriers(u32 full, u32 empty) {
  if (threadIdx.x < RINGS) {
    barrier_init(full + threadIdx.x * 8, 1);
    barrier_init(empty + threadIdx.x * 8, 1);
    if (threadIdx.x == 0) barrier_init(shared_address(shared) + PARTS, 1);
    barriers_ready();
  }
  __syncthreads();
  if (cluster_size() > 1) cluster_ready(); // for `finish`
}

// d of a tile, tokens 8 m and on: rows g and g + 8 are the channels `low` and `high` of the block
template <int CHANNELS>
__device__ __forceinline__ void keep(const float* d, int m, int low, int high, int M) {
  float* sums = (float*)(shared + HEAD) + threadIdx.x / 32 * M * CHANNELS;
#pragma unroll
  for (int i = 0; i < 2 - ONE; i++) {
    const int token = m * 8 + threadIdx.x % 4 * 2 + i;
    if (token < M) {
      sums[token * CHANNELS + low] = d[i];
      sums[token * CHANNELS + high] = d[2 + i];
    }
  }
}

// What stands around the product; null where there is nothing.
struct Around {
  const u16 *scale, *bias, *residual;
  float eps; // of the norm
};

// Adds up what the warps keep, [warp][token][channel], then the blocks of the cluster -> y. Each block writes a slice of y,
// whose sums the others bring to it, behind RING bytes of the rings or the sums. `first`: channel of the first half.
template <int CHANNELS, int RING>
__device__ __forceinline__ void finish(const Around& around, u16* y, int M, int N, int K, int first) {
  constexpr int WIDE = CHANNELS / HALVES / 4, SUMS = WARPS * TOKENS * CHANNELS * 4; // float4s of a half, bytes
  float4* sums = (float4*)(shared + HEAD);
  float4* parts = (float4*)(shared + HEAD + (RING > SUMS ? RING : SUMS)); // [block][slice][half]
  float* squares = (float*)(shared + SQUARES);                            // [warp][token]
  float* squares_of_blocks = squares + WARPS * TOKENS;                    // [block][token]
  const int total = M * WIDE, blocks = cluster_size(), rank = blockIdx.x % blocks, width = N / HALVES;
  const int slice = (total + blocks - 1) / blocks;
  auto square = [&](const float* from, int count, int token) {
    float sum = 0;
    for (int i = 0; i < count; i++) sum += from[i * TOKENS + token];
    return sum;
  };
  auto write = [&](int i, const float4* sum) {
    const int token = i / WIDE, n = first + i % WIDE * 4;
    float norm = 1;
    if (NORM) {
      const float sum = blocks == 1 ? square(squares, WARPS, token) : square(squares_of_blocks, blocks, token);
      norm = rsqrtf(sum / K + around.eps);
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (n + j < width) {
        float value[HALVES];
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
          const int channel = n + j + h * width;
          value[h] = (&sum[h].x)[j] * norm;
          if (around.scale) value[h] *= to_float(around.scale[channel]);
          if (around.bias) value[h] += to_float(around.bias[channel]);
        }
        if (GATED) value[0] *= value[HALVES - 1] / (1 + __expf(-value[0]));
        const size_t at = (size_t)token * width + n + j;
        if (around.residual) value[0] += to_float(load_2(around.residual + at));
        y[at] = to_half(value[0]);
      }
  };
  __syncthreads();
  const u32 barrier = shared_address(shared) + PARTS;
  if (blocks > 1) {
    const int mine = max(min(slice, total - rank * slice), 0);
    if (threadIdx.x == 0) barrier_expect(barrier, blocks * (mine * HALVES * 16 + NORM * M * 4));
    cluster_wait();
  }
  for (int i = threadIdx.x; i < total; i += THREADS) {
    float4 sum[HALVES];
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      const float4* at = sums + i / WIDE * (WIDE * HALVES) + h * WIDE + i % WIDE;
      sum[h] = at[0];
#pragma unroll
      for (int w = 1; w < WARPS; w++) add(sum[h], at[w * total * HALVES]);
      if (blocks > 1)
        cluster_store(shared_address(parts + (rank * slice + i % slice) * HALVES + h), barrier, i / slice, sum[h]);
    }
    if (blocks == 1) write(i, sum);
  }
  if (blocks == 1) return;
  if (NORM)
    for (int i = threadIdx.x; i < M * blocks; i += THREADS)
      cluster_store(shared_address(squares_of_blocks + rank * TOKENS + i % M), barrier, i / M,
                    square(squares, WARPS, i % M));
  barrier_wait_cluster(barrier, 0);
  for (int i = threadIdx.x; i < slice && rank * slice + i < total; i += THREADS) {
    float4 sum[HALVES];
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      sum[h] = parts[i * HALVES + h];
      for (int r = 1; r < blocks; r++) add(sum[h], parts[(r * slice + i) * HALVES + h]);
    }
    write(rank * slice + i, sum);
  }
}

// What the warps but the last do where x is normalized: x · norm of the block's k, from `begin` on, -> shared memory, so
// that only the sums have to be divided; and each warp's part of the sums of squares. -> where x [M, length + PAD] is.
template <int CHANNELS, int RING>
__device__ __forceinline__ const u16* weigh(const u16* x, const u16* norm, int M, int K, int begin, int length) {
  constexpr int SUMS = WARPS * TOKENS * CHANNELS * 4;
  const int blocks = cluster_size(), parts = blocks > 1 ? TOKENS * CHANNELS * 4 + 32 * blocks : 0;
  u16* weighed = (u16*)(shared + HEAD + (RING > SUMS ? RING : SUMS) + parts);
  for (int token = 0; token < M; token++) {
    float sum = 0;
#pragma unroll 4
    for (int k = threadIdx.x * 8; k < length; k += WARPS * 256) {
      uint4 v = load_16(x + (size_t)token * K + begin + k);
      const uint4 w = *(const uint4*)(norm + begin + k);
      for (u32 pair : {v.x, v.y, v.z, v.w}) {
        const float2 f = to_floats(pair);
        sum = fmaf(f.x, f.x, fmaf(f.y, f.y, sum));
      }
      v = make_uint4(multiply2(v.x, w.x), multiply2(v.y, w.y), multiply2(v.z, w.z), multiply2(v.w, w.w));
      *(uint4*)(weighed + token * (length + PAD) + k) = v;
    }
    for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
    if (threadIdx.x % 32 == 0) ((float*)(shared + SQUARES))[threadIdx.x / 32 * TOKENS + token] = sum;
  }
  asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
  return weighed;
}

#define SPAN (GROUP && GROUP < UNIT ? GROUP : UNIT) // along K, with one scale
#define SPANS (UNIT / SPAN)

#if INT4
#define CHANNELS (64 * PANELS)
#define IN_HALF (PANELS / HALVES) // panels
#define CODE_BYTES (PANELS * UNIT * 32)
#define STAGE (CODE_BYTES + SPANS * CHANNELS * 4) // bytes

// x [M, K], q [P, K, 32] uint8, scale_zero [K / GROUP, 64 P, 2], bias [N], norm [K], residual (as y), any of these three
// null -> y [M, N / HALVES]; K % UNIT = 0, N % (64 HALVES) = 0 if gated
extern "C" __global__ void __launch_bounds__(THREADS, TILES * PANELS == 1 && !NORM ? 16 / WARPS : 1)
int4_small(const u16* x, const u8* __restrict__ q, const __grid_constant__ Matrix scale_zero, const u16* __restrict__ bias,
           const u16* __restrict__ norm, const u16* residual, u16* y, float eps, int M, int N, int K) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int blocks = cluster_size(), rank = blockIdx.x % blocks;
  const int P = (N + 63) / 64 / HALVES, panel = blockIdx.x / blocks * IN_HALF; // panels of a half, the block's first
  const int units = K / UNIT, begin = units * rank / blocks, end = units * (rank + 1) / blocks;
  const u32 full = shared_address(shared), empty = full + RINGS * 8, ring = full + HEAD;
  make_barriers(full, empty);
  float out[PANELS][4][TILES][4] = {};

  if (warp == WARPS) {
    const u64 policy = read_once();
    produce(begin, end, full, empty, [&](int unit, int stage, u32 barrier) {
      const u32 to = ring + stage * STAGE;
      barrier_expect(barrier, STAGE);
#pragma unroll
      for (int p = 0; p < PANELS; p++) { // of a panel that is not there nothing is kept
        const int at = min(panel + p % IN_HALF, P - 1) + p / IN_HALF * P;
        const u8* from = q + ((size_t)at * K + (size_t)unit * UNIT) * 32;
        copy_bulk(to + p * UNIT * 32, from, UNIT * 32, barrier, policy);
      }
#pragma unroll
      for (int h = 0; h < HALVES; h++)
        copy_box(to + CODE_BYTES + h * (SPANS * IN_HALF * 256), scale_zero, (panel + h * P) * 64, unit * UNIT / GROUP,
                 barrier, policy);
    });
  } else {
    // Which k goes where in a tile is free if x agrees: here so that a thread reads 8 neighbours of x at a time, and
    // threads of odd t swap their pairs, which halves the bank conflicts of reading the codes.
    const int row = lane % 8, matrix = lane / 8;
    const u32 mine = (8 * (row / 2) + row % 2 + 2 * ((matrix & 1) ^ (row / 2 & 1))) * 32 + matrix / 2 * 16;
    const u32 ones[4] = {ONES, ONES, ONES, ONES};
    wait_for_previous_grid();
    let_next_grid_start();
    const int length = (end - begin) * UNIT;
    if (NORM) x = weigh<CHANNELS, RINGS * STAGE>(x, norm, M, K, begin * UNIT, length) - begin * UNIT;
    const int pitch = NORM ? length + PAD : K;
    uint4 xs[TILES][UNIT / 32];
    auto read = [&](int unit) {
#pragma unroll
      for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int u = 0; u < UNIT / 32; u++) {
          const u16* at = x + (size_t)(m * 8 + g) * pitch + unit * UNIT + u * 32 + t * 8;
          xs[m][u] = make_uint4(0, 0, 0, 0);
          if (m * 8 + g < M && unit < end) xs[m][u] = NORM ? *(const uint4*)at : load_16(at);
        }
    };
    read(begin + warp);
    int stage = warp, phase = 0;
    for (int unit = begin + warp; unit < end; unit += WARPS) {
      u32 b[UNIT / 16][TILES][2];
      float total[SPANS][TILES][4]; // the sums of x, which meet the zero points
#pragma unroll
      for (int j = 0; j < UNIT / 16; j++)
#pragma unroll
        for (int m = 0; m < TILES; m++) {
          const uint4 v = xs[m][j / 2];
          const u32 first = j % 2 ? v.z : v.x, second = j % 2 ? v.w : v.y;
          b[j][m][0] = t & 1 ? second : first;
          b[j][m][1] = t & 1 ? first : second;
          float* sum = total[j / (SPAN / 16)][m];
          if (j % (SPAN / 16)) multiply_add(sum, ones, b[j][m][0], b[j][m][1]);
          else multiply(sum, ones, b[j][m][0], b[j][m][1], 0, 0);
        }
      read(unit + WARPS);
      const u32 codes = ring + stage * STAGE + mine;
      const uint2* pairs = (const uint2*)(shared + HEAD + stage * STAGE + CODE_BYTES) + g;
      barrier_wait(full + stage * 8, phase);
#pragma unroll
      for (int p = 0; p < PANELS; p++)
#pragma unroll
        for (int s = 0; s < SPANS; s++) {
          float acc[4][TILES][4];
#pragma unroll
          for (int j = s * (SPAN / 16); j < (s + 1) * (SPAN / 16); j++) {
            u32 v[4];
            load_matrices_transposed(v, codes + p * UNIT * 32 + j / 2 * 1024 + j % 2 * 128);
#pragma unroll
            for (int i = 0; i < 4; i++) { // channels 16 (i / 2) + 2 g + i % 2, and 32 above
              const u32* w = v + i / 2 * 2;
              u32 a[4];
              from_int4(w[0] >> i % 2 * 8, a[0], a[1]);
              from_int4(w[1] >> i % 2 * 8, a[2], a[3]);
#pragma unroll
              for (int m = 0; m < TILES; m++) {
                const float* sum = total[s][m];
                if (j > s * (SPAN / 16)) multiply_add(acc[i][m], a, b[j][m][0], b[j][m][1]);
                else multiply(acc[i][m], a, b[j][m][0], b[j][m][1], -OFFSET * sum[0], -OFFSET * sum[1]);
              }
            }
          }
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const uint2* at = pairs + ((p / IN_HALF * SPANS + s) * IN_HALF + p % IN_HALF) * 32 + h * 8;
            const uint2 low = at[0], high = at[16];
#pragma unroll
            for (int i = 0; i < 2; i++) {
              const float2 l = to_floats(i ? low.y : low.x), u = to_floats(i ? high.y : high.x);
              const float scale[2] = {l.x, u.x * INT4_UNIT};
#pragma unroll
              for (int m = 0; m < TILES; m++)
#pragma unroll
                for (int e = 0; e < 4; e += 1 + ONE) {
                  float& sum = out[p][h * 2 + i][m][e];
                  sum = fmaf(total[s][m][e], e < 2 ? l.y : u.y, sum);
                  sum = fmaf(acc[h * 2 + i][m][e], scale[e / 2], sum);
                }
            }
          }
        }
      next_stage(empty, stage, phase);
    }
  }
  __syncthreads();
  if (warp < WARPS)
#pragma unroll
    for (int p = 0; p < PANELS; p++)
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int m = 0; m < TILES; m++) {
          const int channel = p * 64 + i / 2 * 16 + 2 * g + i % 2;
          keep<CHANNELS>(out[p][i][m], m, channel, channel + 32, M);
        }
  finish<CHANNELS, RINGS * STAGE>({nullptr, bias, residual, eps}, y, M, N, K, panel * 64);
}
#else
#define IN_HALF (ROWS / HALVES)  // rows of 16 channels
#define STAGE (ROWS * 16 * UNIT) // bytes

// x [M, K], q [N, K] int8, scale [N] or [N, K / GROUP], bias [N], norm [K], residual (as y), any of these three null
// -> y [M, N / HALVES]; K % 16 = 0, N % (16 HALVES) = 0 if gated
extern "C" __global__ void __launch_bounds__(THREADS)
int8_small(const u16* x, const __grid_constant__ Matrix q, const u16* __restrict__ scale, const u16* __restrict__ bias,
           const u16* __restrict__ norm, const u16* residual, u16* y, float eps, int M, int N, int K) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int blocks = cluster_size(), rank = blockIdx.x % blocks, channel = blockIdx.x / blocks * IN_HALF * 16;
  const int units = (K + UNIT - 1) / UNIT, begin = units * rank / blocks, end = units * (rank + 1) / blocks;
  const u32 full = shared_address(shared), empty = full + RINGS * 8, ring = full + HEAD;
  make_barriers(full, empty);
  float out[ROWS][TILES][4] = {};

  if (warp == WARPS) {
    const u64 policy = read_once();
    produce(begin, end, full, empty, [&](int unit, int stage, u32 barrier) {
      barrier_expect(barrier, STAGE);
#pragma unroll
      for (int h = 0; h < HALVES; h++)
        copy_box(ring + stage * STAGE + h * (IN_HALF * 16 * UNIT), q, unit * UNIT, channel + h * (N / 2), barrier, policy);
    });
  } else {
    const u32 mine = (lane % 8 + lane / 8 % 2 * 8) * UNIT; // rows 0-7, 8-15, both 16 k further
    wait_for_previous_grid();
    let_next_grid_start();
    const int length = min(end * UNIT, K) - begin * UNIT;
    if (NORM) x = weigh<ROWS * 16, RINGS * STAGE>(x, norm, M, K, begin * UNIT, length) - begin * UNIT;
    const int pitch = NORM ? length + PAD : K;
    uint2 xs[TILES][UNIT / 16]; // beyond K zeros, as the codes there
    u16 scales[SPANS][ROWS][2];
    auto read = [&](int unit) {
#pragma unroll
      for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < UNIT / 16; i++) {
          const int k = unit * UNIT + i * 16;
          const u16* at = x + (size_t)(m * 8 + g) * pitch + k + t * 4;
          xs[m][i] = make_uint2(0, 0);
          if (m * 8 + g < M && k < min(end * UNIT, K)) xs[m][i] = NORM ? *(const uint2*)at : load_8(at);
        }
      if (GROUP && unit < end)
#pragma unroll
        for (int s = 0; s < SPANS; s++)
#pragma unroll
          for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
              const int n = channel + r % IN_HALF * 16 + g + h * 8 + r / IN_HALF * (N / 2);
              const size_t groups = K / max(GROUP, 1);
              scales[s][r][h] = scale[min(n, N - 1) * groups + (unit * UNIT + s * SPAN) / max(GROUP, 1)];
            }
    };
    read(begin + warp);
    int stage = warp, phase = 0;
    for (int unit = begin + warp; unit < end; unit += WARPS) {
      u32 b[UNIT / 16][TILES][2]; // the pairs (k, k + 2), (k + 1, k + 3), as bytes come apart
#pragma unroll
      for (int j = 0; j < UNIT / 16; j++)
#pragma unroll
        for (int m = 0; m < TILES; m++) {
          b[j][m][0] = permute(xs[m][j].x, xs[m][j].y, 0x5410);
          b[j][m][1] = permute(xs[m][j].x, xs[m][j].y, 0x7632);
        }
      float factor[SPANS][ROWS][2];
#pragma unroll
      for (int i = 0; i < SPANS * ROWS * 2; i++) (&factor[0][0][0])[i] = GROUP ? to_float((&scales[0][0][0])[i]) : 1;
      read(unit + WARPS);
      const u32 codes = ring + stage * STAGE + mine;
      barrier_wait(full + stage * 8, phase);
#pragma unroll
      for (int s = 0; s < SPANS; s++) {
        float of_span[ROWS][TILES][4] = {};
        float(*sums)[TILES][4] = GROUP ? of_span : out;
#pragma unroll
        for (int j = s * (SPAN / 16); j < (s + 1) * (SPAN / 16); j += 2)
#pragma unroll
          for (int r = 0; r < ROWS; r++) {
            u32 v[4];
            load_matrices(v, codes + r * 16 * UNIT + ((j + lane / 16) ^ lane % 8) * 16);
#pragma unroll
            for (int half = 0; half < 2; half++) {
              const u32 low = v[half * 2], high = v[half * 2 + 1];
              const u32 a[4] = {from_int8(low), from_int8(high), from_int8(low >> 8), from_int8(high >> 8)};
#pragma unroll
              for (int m = 0; m < TILES; m++) multiply_add(sums[r][m], a, b[j + half][m][0], b[j + half][m][1]);
            }
          }
        if (GROUP)
#pragma unroll
          for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int m = 0; m < TILES; m++)
#pragma unroll
              for (int e = 0; e < 4; e++) out[r][m][e] = fmaf(of_span[r][m][e], factor[s][r][e / 2], out[r][m][e]);
      }
      next_stage(empty, stage, phase);
    }
  }
  __syncthreads();
  if (warp < WARPS)
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int m = 0; m < TILES; m++) keep<ROWS * 16>(out[r][m], m, r * 16 + g, r * 16 + g + 8, M);
  finish<ROWS * 16, RINGS * STAGE>({GROUP ? nullptr : scale, bias, residual, eps}, y, M, N, K, channel);
}
#endif
