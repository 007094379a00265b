// The two products of attention over a packed cache, for kv_attention.cu, which says what is defined.
//
// Both have codes as the left operand of mma.m16n8k16, so that few rows fill its short side: scores = K · qᵀ, 16 tokens at
// a time, and yᵀ = Vᵀ · pᵀ, 16 of a head's dimensions at a time, where ldmatrix transposes codes in pairs. Products are of
// bf16, where q is fp16 too, sums in fp32.
//
// Codes become bf16 numbers in registers, exactly, and scales stay with the other operand or the sums. Of 8 bits they are
// left to the caller. Keys of int4 are cut out as they are: bits 0-3 of a bf16 number are a code times 2^-133, bits 4-7 one
// times 2^-129. q is lifted to them, for which it has to be below 2^67, and takes the scale if it is that of a channel; by
// token sums of a group do. Minima are a product of their own. Values of int4 are code - 8, as sums of many codes that are
// all positive would hang on how p is rounded with their scales; what is in the middle, minimum + 8 scale, is a product of
// its own, too.
#pragma once

#define HALF 0
#include "ptx.cuh"

#define INT8 0
#define FP8 1
#define INT4 2
#define UNIT 32 // tokens
#define THREADS (WARPS * 32)
#define LIFT 60 // binary orders
#define UNIT_4 0x1p73f // 2^(133 - LIFT)
#define UNIT_8 0x1p13f // of what other codes become

template <int KIND>
struct Format {
  static constexpr int CHUNK = KIND == INT4 ? 32 : 16; // d in 16 bytes
  static constexpr int CHUNKS = HEAD / CHUNK;
  static constexpr int SEGMENT = CHUNKS <= 2 ? 32 : CHUNKS <= 4 ? 64 : 128;
  static constexpr int SEGMENTS = (CHUNKS * 16 + SEGMENT - 1) / SEGMENT;
  static constexpr int GROUPS = KIND == INT4 ? HEAD / GROUP : 1; // scales of a token, 4 bytes each
  static constexpr int CODES = SEGMENTS * SEGMENT * UNIT;        // bytes of a unit
  static constexpr int SCALES = UNIT * GROUPS * 4;
  static constexpr float OF_SCORES = KIND == INT4 ? UNIT_4 : KIND == INT8 ? UNIT_8 : 1; // lacking from products with q,
  static constexpr float OF_VALUES = KIND == FP8 ? 1 : UNIT_8;                           // and with p
};
typedef Format<KEYS> Keys;
typedef Format<VALUES> Values;
#ifdef BLOCK
constexpr int KEY_SCALES = HEAD * 4; // bytes of a unit
#else
constexpr int KEY_SCALES = Keys::SCALES;
#endif
constexpr int STAGE = Keys::CODES + Values::CODES, STAGE_SCALES = KEY_SCALES + Values::SCALES; // bytes

__device__ __forceinline__ float from_half(u16 v) {
#if FP16
  return from_fp16(v);
#else
  return to_float(v);
#endif
}
__device__ __forceinline__ u32 of_q(u32 v) { // two of q in bf16
#if FP16
  return to_halves(from_half((u16)v), from_half((u16)(v >> 16)));
#else
  return v;
#endif
}
// Codes of 8 bits in bytes 0 and 2, or `odd`: 1 and 3, exactly. int8 over UNIT_8: a byte alone is so many times 2^-133 as a
// bf16 number, and the codes have become bytes by adding 128. e4m3 moves to where bf16 has exponent and mantissa.
template <int KIND>
__device__ __forceinline__ u32 from_8(u32 v, int odd) {
  if (KIND == INT8) {
    const u32 bytes = v ^ 0x80808080u;
    return multiply_add2(odd ? permute(bytes, 0, 0x4341) : bytes & 0x00FF00FFu, 0x7B807B80u, 0xBC80BC80u); // 2^120, -2^-6
  }
  const u32 high = odd ? v : v << 8;
  return multiply2(mask_or(high >> 4, 0x07F007F0u, high & 0x80008000u), 0x7B807B80u); // 2^120
}
#define LOW 0x000F000Fu // codes of 4 bits in a register
#define HIGH 0x00F000F0u
#define SCALES_OF 0x5410 // of two pairs of a scale and a minimum, and
#define MINIMA_OF 0x7632
#define EIGHTS 0x41004100u
// (code - 8) / UNIT_8 of the codes in bits 0-3 and 16-19, or `high`: 4-7 and 20-23, exactly
__device__ __forceinline__ u32 from_4(u32 v, int high) {
  return multiply_add2(v & (high ? HIGH : LOW), high ? 0x79807980u : 0x7B807B80u, 0xBA80BA80u); // 2^116, 2^120, -2^-10
}
// What lifts q to codes as they are: 2^LIFT twice, and 2^(LIFT - 4)
#define LIFT_LOW 0x5D805D80u
#define LIFT_HIGH 0x5B805B80u

// s += K · qᵀ of 32 tokens, 16 and 16, whose codes and scales are these in shared memory. Of int4 alone the scales are in
// it; sums: of q, by `load_sums`.
template <int KIND>
__device__ __forceinline__ void scores_of(float (*s)[TILES][4], u32 codes, const u32* scales, const uint2* q,
                                          const uint2* sums) {
  typedef Format<KIND> F;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  constexpr int WIDE = F::SEGMENT / 16;
  const u32 mine = codes + lane % 16 * F::SEGMENT, swizzle = (lane % 8 * F::SEGMENT / 128 % WIDE ^ lane / 16) * 16;
  if (KIND == INT4) {
    const int first = min(2 * t, F::CHUNKS - 1) * 32 / GROUP, second = min(2 * t + 1, F::CHUNKS - 1) * 32 / GROUP;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u32 *low = scales + (half * 16 + g) * F::GROUPS, *high = low + 8 * F::GROUPS;
      const u32 l = permute(low[first], low[second], MINIMA_OF), h = permute(high[first], high[second], MINIMA_OF);
      const u32 a[4] = {l, h, l, h};
#pragma unroll
      for (int m = 0; m < TILES; m++) multiply_add(s[half][m], a, sums[m].x, sums[m].y);
    }
  }
#pragma unroll
  for (int c = 0; c < F::CHUNKS; c += 2) {
    u32 v[2][4];
#pragma unroll
    for (int half = 0; half < 2; half++)
      load_matrices(v[half], mine + half * 16 * F::SEGMENT + c / WIDE * (UNIT * F::SEGMENT) + (c % WIDE * 16 ^ swizzle));
#pragma unroll
    for (int k = 0; k < 2 && c + k < F::CHUNKS; k++) {
      if (KIND == INT4) {
        float of[2][TILES][4] = {};
#pragma unroll
        for (int j = 0; j < 2; j++) { // d: 8 t + 2 j and 4 more, 8 t + 2 j + 1 and 4 more
#pragma unroll
          for (int m = 0; m < TILES; m++) {
            const uint2 b = q[(((c + k) * 2 + j) * TILES + m) * 32 + lane];
#pragma unroll
            for (int half = 0; half < 2; half++) {
              const u32 l = v[half][2 * k] >> 8 * j, h = v[half][2 * k + 1] >> 8 * j; // tokens g and g + 8
              const u32 a[4] = {l & LOW, h & LOW, l & HIGH, h & HIGH};
              multiply_add(of[half][m], a, b.x, b.y);
            }
          }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const u32* pairs = scales + (half * 16 + g) * F::GROUPS + (c + k) * 32 / GROUP;
          const float low = __uint_as_float(pairs[0] << 16), high = __uint_as_float(pairs[8 * F::GROUPS] << 16);
#pragma unroll
          for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[half][m][i] = fmaf(of[half][m][i], i < 2 ? low : high, s[half][m][i]);
        }
      } else { // d: 4 t and 4 t + 2, 4 t + 1 and 4 t + 3
#pragma unroll
        for (int m = 0; m < TILES; m++) {
          const uint2 b = q[((c + k) * TILES + m) * 32 + lane];
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const u32 l = v[half][2 * k], h = v[half][2 * k + 1];
            const u32 a[4] = {from_8<KIND>(l, 0), from_8<KIND>(h, 0), from_8<KIND>(l, 1), from_8<KIND>(h, 1)};
            multiply_add(s[half][m], a, b.x, b.y);
          }
        }
      }
    }
  }
}
#ifdef BLOCK
// The same of int4 by channel: scales [HEAD], of all 32 tokens
__device__ __forceinline__ void scores_by_channel(float (*s)[TILES][4], u32 codes, const uint4* scales, const uint2* q) {
  const int lane = threadIdx.x % 32, t = lane % 4;
  constexpr int WIDE = Keys::SEGMENT / 16;
  const u32 mine = codes + lane % 16 * Keys::SEGMENT, swizzle = (lane % 8 * Keys::SEGMENT / 128 % WIDE ^ lane / 16) * 16;
  float minima[TILES][4] = {}; // of any token
#pragma unroll
  for (int c = 0; c < Keys::CHUNKS; c += 2) {
    u32 v[2][4];
#pragma unroll
    for (int half = 0; half < 2; half++)
      load_matrices(v[half],
                    mine + half * 16 * Keys::SEGMENT + c / WIDE * (UNIT * Keys::SEGMENT) + (c % WIDE * 16 ^ swizzle));
#pragma unroll
    for (int k = 0; k < 2 && c + k < Keys::CHUNKS; k++) {
      const uint4 first = scales[(c + k) * 8 + 2 * t], last = scales[(c + k) * 8 + 2 * t + 1]; // d: 8 t, 8 t + 4 and on
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const u32 d0 = j ? first.z : first.x, d4 = j ? last.z : last.x, d1 = j ? first.w : first.y,
                  d5 = j ? last.w : last.y;
        const u32 even = permute(d0, d4, MINIMA_OF), odd = permute(d1, d5, MINIMA_OF), both[4] = {even, even, odd, odd};
        const u32 by_even = multiply2(permute(d0, d4, SCALES_OF), LIFT_LOW);
        const u32 by_odd = multiply2(permute(d1, d5, SCALES_OF), LIFT_HIGH);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
          const uint2 b = q[(((c + k) * 2 + j) * TILES + m) * 32 + lane];
          multiply_add(minima[m], both, b.x, b.y);
          const u32 scaled_even = multiply2(b.x, by_even), scaled_odd = multiply2(b.y, by_odd);
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const u32 l = v[half][2 * k] >> 8 * j, h = v[half][2 * k + 1] >> 8 * j; // tokens g and g + 8
            const u32 a[4] = {l & LOW, h & LOW, l & HIGH, h & HIGH};
            multiply_add(s[half][m], a, scaled_even, scaled_odd);
          }
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * TILES * 4; i++)
    (&s[0][0][0])[i] = fmaf((&minima[0][0])[i % (TILES * 4)], 1 / UNIT_4, (&s[0][0][0])[i]);
}
// Eight neighbours of the window in bf16.
__device__ __forceinline__ uint4 load_window(const u8* window, int at) {
#if WINDOW == 2
  const uint4 a = *(const uint4*)(window + at * 4), b = *(const uint4*)(window + at * 4 + 16);
  const auto both = [](u32 low, u32 high) { return to_halves(__uint_as_float(low), __uint_as_float(high)); };
  return make_uint4(both(a.x, a.y), both(a.z, a.w), both(b.x, b.y), both(b.z, b.w));
#else
  const uint4 v = *(const uint4*)(window + at * 2);
#if WINDOW == 1
  const auto both = [](u32 pair) { return to_halves(from_fp16((u16)pair), from_fp16((u16)(pair >> 16))); };
  return make_uint4(both(v.x), both(v.y), both(v.z), both(v.w));
#endif
  return v;
#endif
}
// The same of 16 tokens in the window, [16, HEAD] from element `at` on in shared memory, as they are.
__device__ __forceinline__ void scores_of_window(float (*s)[4], const u8* window, int at, const uint2* q) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll 2
  for (int c = 0; c < Keys::CHUNKS; c++) {
    const uint4 low = load_window(window, at + g * HEAD + c * 32 + 8 * t);
    const uint4 high = load_window(window, at + (g + 8) * HEAD + c * 32 + 8 * t);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const u32 l0 = j ? low.y : low.x, l4 = j ? low.w : low.z, h0 = j ? high.y : high.x, h4 = j ? high.w : high.z;
      const u32 a[4] = {permute(l0, l4, 0x5410), permute(h0, h4, 0x5410), permute(l0, l4, 0x7632),
                        permute(h0, h4, 0x7632)};
#pragma unroll
      for (int m = 0; m < TILES; m++) {
        const uint2 b = q[((c * 2 + j) * TILES + m) * 32 + lane];
        multiply_add(s[m], a, b.x, b.y);
      }
    }
  }
}
#endif
// q of the KV head [rows, HEAD] on its way to where `scores_of` reads its fragments, [HEAD / 16][TILES][lane]; zeros beyond
// the rows. Where codes are int4 by token, its sums over 32 d follow, [TILES][lane]: what minima are multiplied by, a
// bf16 number and what that lacks, for dimensions of a product 0-7 and 8-15.
struct Query {
  static constexpr int PARTS = Keys::CHUNKS * TILES * 32, TURNS = (PARTS + THREADS - 1) / THREADS;
  uint4 parts[TURNS]; // of this thread: of 8 bits the first half of each

  __device__ __forceinline__ void load(const u16* q, int rows) {
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
      const int part = i * THREADS + threadIdx.x, lane = part % 32, row = part / 32 % TILES * 8 + lane / 4;
      const u16* at = q + (size_t)row * HEAD + part / (32 * TILES) * Keys::CHUNK + lane % 4 * (Keys::CHUNK / 4);
      parts[i] = make_uint4(0, 0, 0, 0);
      if (row >= rows || part >= PARTS) continue;
      if (KEYS == INT4) {
        parts[i] = load_16(at);
      } else {
        const uint2 v = load_8(at);
        parts[i].x = v.x, parts[i].y = v.y;
      }
    }
  }
  __device__ __forceinline__ void keep(uint2* fragments) const {
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
      const int part = i * THREADS + threadIdx.x; // a warp has all of a chunk, or nothing
      if (part >= PARTS) break;
      const u32 a = of_q(parts[i].x), b = of_q(parts[i].y), e = of_q(parts[i].z), f = of_q(parts[i].w);
      if (KEYS != INT4) {
        fragments[part] = make_uint2(permute(a, b, 0x5410), permute(a, b, 0x7632));
        continue;
      }
      uint2* to = fragments + part / (32 * TILES) * 64 * TILES + part % (32 * TILES);
      const u32 low[2] = {permute(a, e, 0x5410), permute(b, f, 0x5410)};
      const u32 high[2] = {permute(a, e, 0x7632), permute(b, f, 0x7632)};
#ifdef BLOCK
      to[0] = make_uint2(low[0], high[0]), to[32 * TILES] = make_uint2(low[1], high[1]);
#else
      to[0] = make_uint2(multiply2(low[0], LIFT_LOW), multiply2(high[0], LIFT_HIGH));
      to[32 * TILES] = make_uint2(multiply2(low[1], LIFT_LOW), multiply2(high[1], LIFT_HIGH));
      float sum = 0;
      for (u32 two : {a, b, e, f}) sum += __uint_as_float(two << 16) + __uint_as_float(two & 0xFFFF0000u);
      for (int other = 1; other < 4; other *= 2) sum += __shfl_xor_sync(~0u, sum, other);
      sum /= UNIT_4;
      const u32 most = to_halves(sum, 0), rest = to_halves(sum - __uint_as_float(most << 16), 0);
      const int c = part / (32 * TILES), m = part / 32 % TILES, g = part % 32 / 4;
      u16* sums = (u16*)(fragments + 2 * PARTS + m * 32 + g * 4 + c / 2) + c % 2;
      if (part % 4 == 0) sums[0] = (u16)most, sums[2] = (u16)rest;
      if (part % 4 == 0 && c % 2 == 0 && c + 1 == Keys::CHUNKS) sums[1] = 0, sums[3] = 0;
#endif
    }
  }
};
// What `Query` has kept of sums, of all tiles.
__device__ __forceinline__ void load_sums(uint2* sums, const uint2* fragments) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < TILES; m++)
    sums[m] = 2 * (lane % 4) < Keys::CHUNKS ? fragments[2 * Query::PARTS + m * 32 + lane] : make_uint2(0, 0);
}

// yᵀ += Vᵀ · pᵀ of 16 tokens. y[i] holds, but for OF_VALUES, d = 16 i + 2 g of rows 2 t and 2 t + 1, and behind it d + 1;
// where values are int4, d = 32 (i / 2) + 4 g + 2 (i % 2), and d + 1, both but for what is added to `middles` of group g.
template <int KIND>
__device__ __forceinline__ void add_values(float (*y)[TILES][4], float (*middles)[4], u32 codes, const u32* scales,
                                           const u32 (*p)[2]) {
  typedef Format<KIND> F;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  constexpr int WIDE = F::SEGMENT / 16;
  const u32 mine = codes + lane % 16 * F::SEGMENT, swizzle = (lane % 8 * F::SEGMENT / 128 % WIDE ^ lane / 16) * 16;
  const u32* pairs = scales + 2 * t * F::GROUPS; // of tokens 2 t and 2 t + 1, then 2 t + 8 and 2 t + 9
  const auto both = [&](int h, int group, u32 bytes) {
    return permute(pairs[8 * h * F::GROUPS + group], pairs[(8 * h + 1) * F::GROUPS + group], bytes);
  };
  if (KIND == INT4) {
    const int group = min(g, F::GROUPS - 1);
    u32 a[4] = {};
#pragma unroll
    for (int h = 0; h < 2; h++) a[2 * h] = multiply_add2(both(h, group, SCALES_OF), EIGHTS, both(h, group, MINIMA_OF));
#pragma unroll
    for (int m = 0; m < TILES; m++) multiply_add(middles[m], a, p[m][0], p[m][1]);
  }
#pragma unroll
  for (int c = 0; c < F::CHUNKS; c += 2) {
    u32 v[4];
    load_matrices_transposed(v, mine + c / WIDE * (UNIT * F::SEGMENT) + (c % WIDE * 16 ^ swizzle));
#pragma unroll
    for (int k = 0; k < 2 && c + k < F::CHUNKS; k++) {
      const u32 low = v[2 * k], high = v[2 * k + 1];
      if (KIND == INT4) {
        const int group = (c + k) * 32 / GROUP;
        const u32 by[2] = {both(0, group, SCALES_OF), both(1, group, SCALES_OF)};
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const u32 l = low >> 8 * j, h = high >> 8 * j;
          const u32 a[4] = {from_4(l, 0), from_4(l, 1), from_4(h, 0), from_4(h, 1)};
#pragma unroll
          for (int m = 0; m < TILES; m++) {
            const u32 first = multiply2(p[m][0], by[0]), last = multiply2(p[m][1], by[1]);
            multiply_add(y[(c + k) * 2 + j][m], a, first, last);
          }
        }
      } else {
        const u32 a[4] = {from_8<KIND>(low, 0), from_8<KIND>(low, 1), from_8<KIND>(high, 0), from_8<KIND>(high, 1)};
#pragma unroll
        for (int m = 0; m < TILES; m++) multiply_add(y[c + k][m], a, p[m][0], p[m][1]);
      }
    }
  }
}
