// The two products of attention over a packed cache, for kv_attention.cu, which says what is defined.
//
// Both have codes as the left operand of mma.m16n8k16, so that few rows fill its short side: scores = K · qᵀ, 16 tokens at
// a time, and yᵀ = Vᵀ · pᵀ, 16 of a head's dimensions at a time, where ldmatrix transposes codes in pairs. Codes become bf16
// in registers: of 8 bits exactly, their scales being left to the caller, int4 as bf16(code * scale + minimum). Products
// are of bf16, where q is fp16 too, sums in fp32.
#pragma once

#define HALF 0
#include "ptx.cuh"

#define INT8 0
#define FP8 1
#define INT4 2
#define UNIT 32 // tokens
#define THREADS (WARPS * 32)
#define UNIT_4 0x1p43f // of what int4 becomes,
#define UNIT_8 0x1p13f // and int8

template <int KIND>
struct Format {
  static constexpr int CHUNK = KIND == INT4 ? 32 : 16; // d in 16 bytes
  static constexpr int CHUNKS = HEAD / CHUNK;
  static constexpr int SEGMENT = CHUNKS <= 2 ? 32 : CHUNKS <= 4 ? 64 : 128;
  static constexpr int SEGMENTS = (CHUNKS * 16 + SEGMENT - 1) / SEGMENT;
  static constexpr int GROUPS = KIND == INT4 ? HEAD / GROUP : 1; // scales of a token, 4 bytes each
  static constexpr int CODES = SEGMENTS * SEGMENT * UNIT;        // bytes of a unit
  static constexpr int SCALES = UNIT * GROUPS * 4;
  static constexpr float FACTOR = KIND == INT4 ? UNIT_4 : KIND == INT8 ? UNIT_8 : 1; // lacking from the products
};
typedef Format<KEYS> Keys;
typedef Format<VALUES> Values;
#ifdef BLOCK
constexpr int KEY_SCALES = HEAD * 4; // bytes of a unit
#else
constexpr int KEY_SCALES = Keys::SCALES;
#endif
constexpr int STAGE = Keys::CODES + Values::CODES, STAGE_SCALES = KEY_SCALES + Values::SCALES; // bytes

__device__ __forceinline__ u32 to_bf16(float low, float high) {
  u32 v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
__device__ __forceinline__ u32 transpose(u32 v) {
  u32 d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v));
  return d;
}
__device__ __forceinline__ float from_half(u16 v) {
#if FP16
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
#else
  return __uint_as_float((u32)v << 16);
#endif
}
__device__ __forceinline__ u32 of_q(u32 v) { // two of q in bf16
#if FP16
  return to_bf16(from_half((u16)v), from_half((u16)(v >> 16)));
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
// Bits 0-3 or 4-7 as a bf16 number are a code times 2^-133 or 2^-129: a scale of both halves of a register, below 2^38,
// that takes this back, and a minimum, both over UNIT_4.
struct Scales {
  u32 low, high, minimum;
};
__device__ __forceinline__ Scales scales_of(u32 scale, u32 minimum) {
  return {multiply2(scale, 0x6C806C80u), multiply2(scale, 0x6A806A80u), multiply2(minimum, 0x2A002A00u)};
}
// (code * scale + minimum) / UNIT_4 of the codes in bits 0-3 and 16-19, or `high`: 4-7 and 20-23
__device__ __forceinline__ u32 from_4(u32 v, int high, const Scales& by) {
  return multiply_add2(v & (high ? 0x00F000F0u : 0x000F000Fu), high ? by.high : by.low, by.minimum);
}

// s += K · qᵀ of 16 tokens, whose codes and scales are these in shared memory; of int4 alone the scales are in it
template <int KIND>
__device__ __forceinline__ void scores_of(float (*s)[4], u32 codes, const u32* scales, const uint2* q) {
  typedef Format<KIND> F;
  const int lane = threadIdx.x % 32, g = lane / 4;
  constexpr int WIDE = F::SEGMENT / 16;
  const u32 mine = codes + lane % 16 * F::SEGMENT, swizzle = (lane % 8 * F::SEGMENT / 128 % WIDE ^ lane / 16) * 16;
#pragma unroll
  for (int c = 0; c < F::CHUNKS; c += 2) {
    u32 v[4];
    load_matrices(v, mine + c / WIDE * (UNIT * F::SEGMENT) + (c % WIDE * 16 ^ swizzle));
#pragma unroll
    for (int k = 0; k < 2 && c + k < F::CHUNKS; k++) {
      const u32 low = v[2 * k], high = v[2 * k + 1]; // tokens g and g + 8
      if (KIND == INT4) {
        const u32* pairs = scales + g * F::GROUPS + (c + k) * 32 / GROUP;
        const u32 of_low = pairs[0], of_high = pairs[8 * F::GROUPS];
        const Scales by_low = scales_of(permute(of_low, 0, 0x1010), permute(of_low, 0, 0x3232));
        const Scales by_high = scales_of(permute(of_high, 0, 0x1010), permute(of_high, 0, 0x3232));
#pragma unroll
        for (int j = 0; j < 2; j++) { // d: 8 t + 2 j and 4 more, 8 t + 2 j + 1 and 4 more
          const u32 l = low >> 8 * j, h = high >> 8 * j;
          const u32 a[4] = {from_4(l, 0, by_low), from_4(h, 0, by_high), from_4(l, 1, by_low), from_4(h, 1, by_high)};
#pragma unroll
          for (int m = 0; m < TILES; m++) {
            const uint2 b = q[(((c + k) * 2 + j) * TILES + m) * 32 + lane];
            multiply_add(s[m], a, b.x, b.y);
          }
        }
      } else { // d: 4 t and 4 t + 2, 4 t + 1 and 4 t + 3
        const u32 a[4] = {from_8<KIND>(low, 0), from_8<KIND>(high, 0), from_8<KIND>(low, 1), from_8<KIND>(high, 1)};
#pragma unroll
        for (int m = 0; m < TILES; m++) {
          const uint2 b = q[((c + k) * TILES + m) * 32 + lane];
          multiply_add(s[m], a, b.x, b.y);
        }
      }
    }
  }
}
#ifdef BLOCK
// The same of int4 by channel: scales [HEAD], of all 16 tokens
__device__ __forceinline__ void scores_by_channel(float (*s)[4], u32 codes, const uint4* scales, const uint2* q) {
  const int lane = threadIdx.x % 32, t = lane % 4;
  constexpr int WIDE = Keys::SEGMENT / 16;
  const u32 mine = codes + lane % 16 * Keys::SEGMENT, swizzle = (lane % 8 * Keys::SEGMENT / 128 % WIDE ^ lane / 16) * 16;
#pragma unroll
  for (int c = 0; c < Keys::CHUNKS; c += 2) {
    u32 v[4];
    load_matrices(v, mine + c / WIDE * (UNIT * Keys::SEGMENT) + (c % WIDE * 16 ^ swizzle));
#pragma unroll
    for (int k = 0; k < 2 && c + k < Keys::CHUNKS; k++) {
      const uint4 first = scales[(c + k) * 8 + 2 * t], last = scales[(c + k) * 8 + 2 * t + 1]; // d: 8 t, 8 t + 4 and on
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const u32 a0 = j ? first.z : first.x, a4 = j ? last.z : last.x, a1 = j ? first.w : first.y,
                  a5 = j ? last.w : last.y;
        const Scales even = scales_of(permute(a0, a4, 0x5410), permute(a0, a4, 0x7632));
        const Scales odd = scales_of(permute(a1, a5, 0x5410), permute(a1, a5, 0x7632));
        const u32 l = v[2 * k] >> 8 * j, h = v[2 * k + 1] >> 8 * j; // tokens g and g + 8
        const u32 a[4] = {from_4(l, 0, even), from_4(h, 0, even), from_4(l, 1, odd), from_4(h, 1, odd)};
#pragma unroll
        for (int m = 0; m < TILES; m++) {
          const uint2 b = q[(((c + k) * 2 + j) * TILES + m) * 32 + lane];
          multiply_add(s[m], a, b.x, b.y);
        }
      }
    }
  }
}
// Eight neighbours of the window in bf16.
__device__ __forceinline__ uint4 load_window(const u8* window, size_t at) {
#if WINDOW == 2
  const uint4 a = load_16(window + at * 4), b = load_16(window + at * 4 + 16);
  const auto both = [](u32 low, u32 high) { return to_bf16(__uint_as_float(low), __uint_as_float(high)); };
  return make_uint4(both(a.x, a.y), both(a.z, a.w), both(b.x, b.y), both(b.z, b.w));
#else
  const uint4 v = load_16(window + at * 2);
#if WINDOW == 1
  const auto both = [](u32 pair) {
    float low, high;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high) : "r"(pair));
    return to_bf16(low, high);
  };
  return make_uint4(both(v.x), both(v.y), both(v.z), both(v.w));
#endif
  return v;
#endif
}
// The same of 16 tokens in the window, [16, HEAD] from element `at` on, as they are.
__device__ __forceinline__ void scores_of_window(float (*s)[4], const u8* window, size_t at, const uint2* q) {
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
// q of the KV head [rows, HEAD] -> its fragments for `scores_of`, [HEAD / 16][TILES][lane]; zeros beyond the rows
__device__ __forceinline__ void keep_q(uint2* fragments, const u16* q, int rows) {
  for (int i = threadIdx.x; i < Keys::CHUNKS * TILES * 32; i += THREADS) {
    const int lane = i % 32, m = i / 32 % TILES, c = i / (32 * TILES), row = m * 8 + lane / 4, t = lane % 4;
    const u16* at = q + (size_t)row * HEAD + c * Keys::CHUNK + t * (Keys::CHUNK / 4);
    if (KEYS == INT4) {
      const uint4 v = row < rows ? load_16(at) : make_uint4(0, 0, 0, 0);
      const u32 a = of_q(v.x), b = of_q(v.y), e = of_q(v.z), f = of_q(v.w);
      fragments[(c * 2 * TILES + m) * 32 + lane] = make_uint2(permute(a, e, 0x5410), permute(a, e, 0x7632));
      fragments[((c * 2 + 1) * TILES + m) * 32 + lane] = make_uint2(permute(b, f, 0x5410), permute(b, f, 0x7632));
    } else {
      const uint2 v = row < rows ? load_8(at) : make_uint2(0, 0);
      const u32 a = of_q(v.x), b = of_q(v.y);
      fragments[i] = make_uint2(permute(a, b, 0x5410), permute(a, b, 0x7632));
    }
  }
}

// yᵀ += Vᵀ · pᵀ of 16 tokens. y[i] holds, where values are of 8 bits, d = 16 i + 2 g of rows 2 t and 2 t + 1, and
// behind it d + 1; where they are int4, d = 32 (i / 2) + 4 g + 2 (i % 2), and d + 1.
template <int KIND>
__device__ __forceinline__ void add_values(float (*y)[TILES][4], u32 codes, const u32* scales, const u32 (*p)[2]) {
  typedef Format<KIND> F;
  const int lane = threadIdx.x % 32, t = lane % 4;
  constexpr int WIDE = F::SEGMENT / 16;
  const u32 mine = codes + lane % 16 * F::SEGMENT, swizzle = (lane % 8 * F::SEGMENT / 128 % WIDE ^ lane / 16) * 16;
#pragma unroll
  for (int c = 0; c < F::CHUNKS; c += 2) {
    u32 v[4];
    load_matrices_transposed(v, mine + c / WIDE * (UNIT * F::SEGMENT) + (c % WIDE * 16 ^ swizzle));
#pragma unroll
    for (int k = 0; k < 2 && c + k < F::CHUNKS; k++) {
      const u32 low = v[2 * k], high = v[2 * k + 1]; // tokens 2 t and 2 t + 1, 2 t + 8 and 2 t + 9
      if (KIND == INT4) {
        const u32* pairs = scales + 2 * t * F::GROUPS + (c + k) * 32 / GROUP;
        Scales by[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const u32 even = pairs[8 * h * F::GROUPS], odd = pairs[(8 * h + 1) * F::GROUPS];
          by[h] = scales_of(permute(even, odd, 0x5410), permute(even, odd, 0x7632));
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const u32 l = low >> 8 * j, h = high >> 8 * j;
          const u32 a[4] = {from_4(l, 0, by[0]), from_4(l, 1, by[0]), from_4(h, 0, by[1]), from_4(h, 1, by[1])};
#pragma unroll
          for (int m = 0; m < TILES; m++) multiply_add(y[(c + k) * 2 + j][m], a, p[m][0], p[m][1]);
        }
      } else {
        const u32 a[4] = {from_8<KIND>(low, 0), from_8<KIND>(low, 1), from_8<KIND>(high, 0), from_8<KIND>(high, 1)};
#pragma unroll
        for (int m = 0; m < TILES; m++) multiply_add(y[c + k][m], a, p[m][0], p[m][1]);
      }
    }
  }
}
