// y = x @ W.T + bias on packed weights, for tokens enough to fill wgmma: the time is that of the tensor cores.
//
// One thread brings x and the weight to shared memory, in boxes. Each consumer warpgroup turns the codes of its channels
// into a half precision left operand in registers, a batch of products ahead of the tensor cores, which take x from shared
// memory. Either a block works on tile after tile, and copies run ahead into the next one while y is written; or the
// blocks of a cluster share K of one tile and add up their sums in a fixed order (SPLIT).
//
// Defines: HALF, TOKENS (of a block: 16, 32, 64, 128 or 256), GROUPS (consumer warpgroups), TALL (of 64 channels that each
// computes: 1 or 2), SPLIT (0 or 1), STAGES (of 64 k), BATCH (1 or 2: products of 16 k that are issued together),
// PRODUCERS (threads, of which one copies), INT4 (0: the weight is int8), GROUP (weights along K that share a scale; 0:
// all of an int8 channel). Where two warpgroups have more sums than they have registers, PRODUCERS is 128: only whole
// warpgroups give registers away.
// Boxes, of a step of 64 k: of x TOKENS rows, swizzled by 128 bytes; of int8's q the block's channels, swizzled by 64
// bytes; of int4's q the block's panels, of its scales the block's channels, as they are. Of y: TOKENS rows of 64
// channels, swizzled by 128 bytes.
// Grid, along x: at most as many blocks as tiles of 64 GROUPS TALL channels and TOKENS tokens; if SPLIT, as many for each
// tile as a cluster has, at most as many as there are steps of 64 k.

#define SUM(x) "+f"(x)
#include "wgmma.cuh"

extern __shared__ __align__(1024) u8 shared[];

#define CHANNELS (64 * GROUPS * TALL)
#define CONSUMERS (128 * GROUPS)            // threads
#define X_BYTES (TOKENS * 128)              // of a stage: 64 k of each token, in the 128-byte swizzle of wgmma
#define WIDTH (TOKENS < 128 ? TOKENS : 128) // tokens of one wgmma: d[4 i + 2 h + j] of a thread is row g + 8 h of its
                                            // warp's 16, token 8 i + 2 t + j, where g is lane / 4 and t is lane % 4
#define PITCH (CHANNELS + 8)                // floats between tokens of the sums in shared memory

// wgmma -------------------------------------------------------------------------------------------------------

#define PRODUCT(width, sums, a0, a1, a2, a3, b, when, ...)                                                         \
  asm volatile("{ .reg .pred add; setp.ne.b32 add, " when ", 0;\n"                                                  \
               "wgmma.mma_async.sync.aligned.m64n" width "k16.f32." HALF_TYPE "." HALF_TYPE " {" sums "},{" a0 "," a1 \
               "," a2 "," a3 "}," b ", add, 1, 1, 0; }"                                                            \
               : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(add))

// d [64, WIDTH] fp32 = a [64, 16] · x [16, WIDTH], added to d if `add`
__device__ __forceinline__ void product(float* d, const u32* a, u64 x, int add) {
#if TOKENS == 16
  PRODUCT("16", N8, "%8", "%9", "%10", "%11", "%12", "%13", F4(0), F4(4));
#elif TOKENS == 32
  PRODUCT("32", N16, "%16", "%17", "%18", "%19", "%20", "%21", F16(0));
#elif TOKENS == 64
  PRODUCT("64", N32, "%32", "%33", "%34", "%35", "%36", "%37", F16(0), F16(16));
#else
  PRODUCT("128", N64, "%64", "%65", "%66", "%67", "%68", "%69", F16(0), F16(16), F16(32), F16(48));
#endif
}

// The weights --------------------------------------------------------------------------------------------------

#if INT4
#define KERNEL int4_wide
#define CODE_BYTES (CHANNELS * 32)
#define SCALE_BYTES (CHANNELS * SPANS * 4)
#else
#define KERNEL int8_wide
#define CODE_BYTES (CHANNELS * 64)
#define SCALE_BYTES 0
#endif
#define SPANS (GROUP && GROUP < 64 ? 64 / GROUP : 1) // scales along a stage
#define BARRIERS 1024 // bytes, ahead of the ring and the sums
#define STAGE_BYTES ((X_BYTES + CODE_BYTES + SCALE_BYTES + 1023) / 1024 * 1024)

#if INT4
#define SCALES const __grid_constant__ Matrix
#else
#define SCALES const u16* __restrict__
#endif
#if SPLIT
#define RESULT u16*
#else
#define RESULT const __grid_constant__ Matrix
#endif
#define TOGETHER 8 // tiles of tokens that meet the same weights one after another, so that those are in the L2

// q and scales as small_linear.cu has them; x [M, K], bias [N] or null -> y [M, N]; K % 64 = 0, N % 8 = 0
extern "C" __global__ void __launch_bounds__(CONSUMERS + PRODUCERS, 1)
KERNEL(const __grid_constant__ Matrix x, const __grid_constant__ Matrix q, SCALES scales, const u16* __restrict__ bias,
       RESULT y, int M, int N, int K) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32 % 4, g = lane / 4, t = lane % 4;
  const int blocks = SPLIT ? cluster_size() : 1, rank = blockIdx.x % blocks;
  const int steps = K / 64, begin = steps * rank / blocks, end = steps * (rank + 1) / blocks;
  const int high_tiles = (M + TOKENS - 1) / TOKENS, tiles = high_tiles * ((N + CHANNELS - 1) / CHANNELS);
  const int first_tile = blockIdx.x / blocks, stride = gridDim.x / blocks;
  int channel, token; // of the tile
  auto place = [&](int tile) {
    const int before = tile / (tiles / high_tiles * TOGETHER) * TOGETHER, together = min(TOGETHER, high_tiles - before);
    const int left = tile - before * (tiles / high_tiles);
    channel = left / together * CHANNELS, token = (before + left % together) * TOKENS;
  };
  place(first_tile);
  const u32 full = shared_address(shared), empty = full + STAGES * 8, ring = full + BARRIERS;
  if (thread == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, GROUPS * 4);
    }
    if (SPLIT) barrier_init(empty + STAGES * 8, 1);
    barriers_ready();
  }
  __syncthreads();
#if SPLIT
  float* sums = (float*)(shared + BARRIERS); // [TOKENS][PITCH], once all steps are done
  const int ring_or_sums = max(STAGES * STAGE_BYTES, TOKENS * PITCH * 4);
  float* parts = (float*)(shared + BARRIERS + ring_or_sums); // [other block][token of the slice][PITCH]
  const u32 parts_ready = empty + STAGES * 8;
  cluster_ready();
#endif

  if (thread >= CONSUMERS) { // -------------------------------------------------------------------------- producers
#if PRODUCERS == 128
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
#endif
    const u64 policy = high_tiles > 1 ? read_again() : read_once();
    auto fetch_weight = [&](int step, int stage) {
      const u32 to = ring + stage * STAGE_BYTES + X_BYTES, barrier = full + stage * 8;
      barrier_expect(barrier, X_BYTES + CODE_BYTES + SCALE_BYTES);
#if INT4
      copy_box(to, q, step * 256, channel / 64, barrier, policy);
      copy_box(to + CODE_BYTES, scales, channel, step * 64 / GROUP, barrier, policy);
#else
      copy_box(to, q, step * 64, channel, barrier, policy);
#endif
    };
    if (thread == CONSUMERS) {
      for (int s = 0; s < STAGES && begin + s < end; s++) fetch_weight(begin + s, s);
      wait_for_previous_grid();
      let_next_grid_start();
      int stage = 0, phase = 1;
      for (int tile = first_tile; tile < tiles; tile += stride) {
        place(tile);
        for (int step = begin; step < end; step++) {
          barrier_wait(empty + stage * 8, phase);
          if (tile != first_tile || step >= begin + STAGES) fetch_weight(step, stage);
          copy_box(ring + stage * STAGE_BYTES, x, step * 64, token, full + stage * 8);
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      }
    }
#if SPLIT // as the consumers do
    cluster_wait();
    cluster_ready();
    cluster_wait();
#endif
  } else { // ------------------------------------------------------------------------------------------- consumers
#if PRODUCERS == 128
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
#endif
    const int group = thread / 128;
#if INT4 // a warp has 16 (TALL = 1) or 32 channels of one half of a panel: 2 g + r of it, and 32 above
    const int panel = TALL == 1 ? group : group * 2 + warp / 2;
    const int low = panel * 64 + (TALL == 1 ? warp / 2 * 16 + warp % 2 : warp % 2 * 16) + 2 * g, high = low + 32, next = 1;
    const int shift = TALL == 1 ? warp % 2 * 8 : 0;
    const u32 mine = X_BYTES + panel * 2048 + lane * 32 + (TALL == 1 ? warp / 2 : warp % 2) * 16; // a row of a matrix
#else
    const int low = group * 64 * TALL + warp * 16 + g, high = low + 8, next = 64;
#if GROUP
    u16 ahead[SPANS][TALL][2]; // scales of the next step
    auto read = [&](int step) {
#pragma unroll
      for (int i = 0; i < SPANS * TALL * 2; i++) {
        const size_t n = min(channel + low + i / 2 % TALL * next + i % 2 * 8, N - 1);
        if (step < end) (&ahead[0][0][0])[i] = scales[n * (K / GROUP) + (step * 64 + i / (2 * TALL) * (64 / SPANS)) / GROUP];
      }
    };
#endif
#endif
    float d[TALL][TOKENS / WIDTH][WIDTH / 2];
    u32 a[2][BATCH][TALL][4];
    int stage = 0, phase = 0;
    for (int tile = first_tile; tile < tiles; tile += stride) {
      int before = -1;
#if !INT4 && GROUP
      place(tile);
      read(begin);
#endif
      for (int step = begin; step < end; step++) {
        const u32 base = ring + stage * STAGE_BYTES;
        const u64 xs = descriptor(base);
        const u8* codes = shared + BARRIERS + stage * STAGE_BYTES + X_BYTES;
        barrier_wait(full + stage * 8, phase);
#if INT4
        const u32* pairs = (const u32*)(codes + CODE_BYTES) + low;
        u32 v[4], scale[TALL][2], zero[TALL][2];
#elif GROUP
        u16 scale[SPANS][TALL][2];
#pragma unroll
        for (int i = 0; i < SPANS * TALL * 2; i++) (&scale[0][0][0])[i] = (&ahead[0][0][0])[i];
        read(step + 1);
#endif
#pragma unroll
        for (int j = 0; j < 4; j++) {
          u32(*operand)[4] = a[j / BATCH % 2][j % BATCH];
#if INT4
          if (j % 2 == 0) load_matrices_transposed(v, base + mine + j / 2 * 1024);
          if (j % (4 / SPANS) == 0)
#pragma unroll
            for (int i = 0; i < 2 * TALL; i++) {
              const u32 pair = pairs[j / (4 / SPANS) * CHANNELS + i / 2 + i % 2 * 32];
              int4_scale(pair, scale[i / 2][i % 2], zero[i / 2][i % 2]);
            }
#pragma unroll
          for (int r = 0; r < TALL; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) { // rows g, g + 8 and, 8 k further, again
              const u32 pair = v[j % 2 * 2 + i / 2] >> (TALL == 1 ? shift : r * 8);
              operand[r][i] = from_int4(pair, i % 2, scale[r][i % 2], zero[r][i % 2]);
            }
#else
#pragma unroll
          for (int r = 0; r < TALL; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const u8* at = codes + (low + r * 64 + i % 2 * 8) * 64 + (j ^ g / 2) * 16 + i / 2 * 8 + t * 2;
              operand[r][i] = from_int8(permute(*(const u16*)at, 0, 0x7170));
#if GROUP
              operand[r][i] = multiply2(operand[r][i], permute(scale[j / (4 / SPANS)][r][i % 2], 0, 0x1010));
#endif
            }
#endif
          if ((j + 1) % BATCH) continue;
          operands_ready();
#pragma unroll
          for (int k = j + 1 - BATCH; k <= j; k++)
#pragma unroll
            for (int r = 0; r < TALL; r++)
#pragma unroll
              for (int i = 0; i < TOKENS / WIDTH; i++)
                product(d[r][i], a[k / BATCH % 2][k % BATCH][r], xs + k * 2 + i * (WIDTH * 8), step > begin || k);
          products_commit();
          products_wait<1>(); // the batch before, whose operands come next
          if (j == BATCH - 1 && before >= 0 && lane == 0) barrier_arrive(empty + before * 8);
        }
        before = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
      products_wait<0>();
#if !SPLIT
      if (lane == 0) barrier_arrive(empty + before * 8);
      place(tile);
      u8* written = shared + BARRIERS + STAGES * STAGE_BYTES; // [block of 64 channels][token]
      if (thread % 128 == 0) copies_back_read();              // the tile before has left
      asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
#pragma unroll
      for (int r = 0; r < TALL; r++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int c = (h ? high : low) + r * next, n = min(channel + c, N - 1);
          const float shift = bias ? to_float(bias[n]) : 0;
#if INT4
          const float factor = INT4_UNIT;
#elif GROUP
          const float factor = 1;
#else
          const float factor = to_float(scales[n]);
#endif
#pragma unroll
          for (int odd = 0; odd < 2; odd++) {
            const int row = 2 * t + odd; // of 8
            u8* to = written + c / 64 * (TOKENS * 128) + row * 128 + (c % 64 * 2 ^ row * 16);
#pragma unroll
            for (int i = 0; i < TOKENS; i += 8)
              *(u16*)(to + i * 128) = to_half(fmaf(d[r][i / WIDTH][i % WIDTH / 2 + 2 * h + odd], factor, shift));
          }
        }
      before_copies();
      asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
      if (thread % 128 == 0) {
        for (int r = group * TALL; r < (group + 1) * TALL; r++)
          copy_box_back(shared_address(written) + r * (TOKENS * 128), y, channel + r * 64, token);
        copies_back_commit();
      }
#endif
    }
#if !SPLIT
    if (thread % 128 == 0) copies_back_done();
#else
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
#pragma unroll
    for (int r = 0; r < TALL; r++)
#pragma unroll
      for (int i = 0; i < TOKENS / WIDTH; i++)
#pragma unroll
        for (int j = 0; j < WIDTH / 2; j++)
          sums[(i * WIDTH + j / 4 * 8 + 2 * t + j % 2) * PITCH + (j & 2 ? high : low) + r * next] = d[r][i][j];
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
      u16 out[8];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float4 sum = {};
        for (int r = 0; r < blocks; r++) {
          const float* from = r == rank ? sums + rank * slice * PITCH : part(r, rank);
          add(sum, *(const float4*)(from + row * PITCH + c + half * 4));
        }
        const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int at = n + half * 4 + j;
#if INT4
          float value = values[j] * INT4_UNIT;
#elif GROUP
          float value = values[j];
#else
          float value = values[j] * to_float(scales[at]);
#endif
          if (bias) value += to_float(bias[at]);
          out[half * 4 + j] = to_half(value);
        }
      }
      *(uint4*)(y + (size_t)(token + rank * slice + row) * N + n) =
          make_uint4(out[0] | out[1] << 16, out[2] | out[3] << 16, out[4] | out[5] << 16, out[6] | out[7] << 16);
    }
    __syncwarp();
    cluster_wait(); // what the others have of this block has left it
#endif
  }
}
