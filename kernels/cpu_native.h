// What the kernels for the CPU share: vectors, dtypes, how a step of K is held and multiplied, where weights come from.
//
// A panel is 64 columns of y. Its codes become 32-bit words [step, 64] that the near caches hold. A word is one fp32
// value (Fp32) or two bf16 neighbours along K (Bf16).
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <omp.h>
#include <thread>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define WIDE 1
#include <immintrin.h>
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define PAIRS 1
#endif
#endif

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
#ifdef __aarch64__
typedef __fp16 half;
#else
typedef _Float16 half;
#endif

namespace {

enum Dtype { FP32, BF16, FP16 };
constexpr long LANES = 16, COLUMNS = 64, CHUNK = 1024;  // CHUNK: of K, a multiple of every group
constexpr long ROWS = 6, PANEL_TILES = 64, DOT_ROWS = 4, ROUNDED_ROWS = 32;
#ifdef WIDE
constexpr int VECTORS = 4;  // of a tile's row that registers hold: 6 x 4 of 32
#else
constexpr int VECTORS = 1;
#endif

long ceil_div(long a, long b) { return (a + b - 1) / b; }

template <class V> V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class V> void store(void* p, const V& v) { memcpy(p, &v, sizeof v); }

struct bf16 {
  uint16_t bits;
};

float wide(float value) { return value; }
float wide(half value) { return value; }
float wide(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  return load<float>(&bits);
}

void round_to(float& out, float value) { out = value; }
void round_to(half& out, float value) { out = half(value); }
void round_to(bf16& out, float value) {  // to nearest even
  const uint32_t bits = load<uint32_t>(&value), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = value != value ? 0x7fc0 : rounded;
}

template <class F> void with_type(long dtype, F f) {
  dtype == FP32 ? f(float()) : dtype == BF16 ? f(bf16()) : f(half());
}

// dst[i] = src[first + i], widened to fp32
void widen(const void* src, long dtype, long first, long count, float* dst) {
  with_type(dtype, [=](auto type) {
    auto* p = static_cast<const decltype(type)*>(src) + first;
    long i = 0;
#ifdef WIDE  // compilers leave fp16 scalar
    for (; dtype == FP16 && i + LANES <= count; i += LANES) store(dst + i, _mm512_cvtph_ps(load<__m256i>(p + i)));
#endif
#pragma omp simd
    for (long j = i; j < count; j++) dst[j] = wide(p[j]);
  });
}

// dst[first + i] = src[i], rounded to `dtype`
void narrow(const float* src, long count, void* dst, long dtype, long first) {
  with_type(dtype, [=](auto type) {
    auto* p = static_cast<decltype(type)*>(dst) + first;
    long i = 0;
#ifdef WIDE
    for (; dtype == FP16 && i + LANES <= count; i += LANES) store(p + i, _mm512_cvtps_ph(load<__m512>(src + i), 0));
#endif
#pragma omp simd
    for (long j = i; j < count; j++) round_to(p[j], src[j]);
  });
}

struct Problem {  // x [m, k] and y [m, n] of `dtype`, bias [n] or null
  const void* x;
  long dtype, m, n, k;
  const float* bias;
  void* y;
  int threads;
};

struct Workspace {
  float* data;
  explicit Workspace(long floats) : data(new (std::align_val_t(64), std::nothrow) float[floats]) {}
  ~Workspace() { operator delete[](data, std::align_val_t(64)); }
};

f32x16 codes8(const int8_t* q) {
#ifdef WIDE
  return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(q)));
#else
  return __builtin_convertvector(__builtin_convertvector(load<i8x16>(q), i32x16), f32x16);
#endif
}

float total(f32x16 v) {
#ifdef WIDE
  return _mm512_reduce_add_ps((__m512)v);
#else
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += v[i];
  return sum;
#endif
}

#ifdef WIDE
// Transposes 16 x 16 dwords: within blocks of 4 x 4, then the blocks
void transpose(__m512i (&r)[LANES]) {
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]);
    const __m512i c = _mm512_unpackhi_epi32(r[i], r[i + 1]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
    r[i] = _mm512_unpacklo_epi64(a, b), r[i + 1] = _mm512_unpackhi_epi64(a, b);
    r[i + 2] = _mm512_unpacklo_epi64(c, d), r[i + 3] = _mm512_unpackhi_epi64(c, d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd), d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    r[i] = _mm512_shuffle_i32x4(a, b, 0x88), r[i + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88), r[i + 12] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
}

// Byte i of each dword, as fp32
__m512 byte_of(__m512i dwords, int i) {
#ifdef __AVX512VNNI__
  return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi32(1 << 8 * i), dwords));
#else
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(dwords, 24 - 8 * i), 24));
#endif
}
#endif

// ---- Words: how a step of K is held and multiplied --------------------------------------------------------

struct Fp32 {
  static constexpr long STEP = 1;

  static f32x16 madd(f32x16 sum, float a, f32x16 w) { return sum + w * a; }

  // Words of columns 16v .. 16v + 15 at step s of an int4 panel
  static f32x16 codes4(const uint8_t* q, long s, int v) {
    const void* p = q + s * 32 + v % 2 * 16;
#ifdef WIDE  // the lookup reads the low four bits of an index alone
    const __m512i bytes = _mm512_cvtepu8_epi32(load<__m128i>(p));
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (f32x16)_mm512_permutexvar_ps(v < 2 ? bytes : _mm512_srli_epi32(bytes, 4), table);
#else
    const i32x16 bytes = __builtin_convertvector(load<u8x16>(p), i32x16);
    return __builtin_convertvector((v < 2 ? bytes & 15 : bytes >> 4) - 8, f32x16);
#endif
  }
#ifdef WIDE
  // Words of 4 neighbours along K, the bytes of each dword of `codes`
  static void codes8(__m512i codes, float* words) {
    for (int i = 0; i < 4; i++) store(words + i * COLUMNS, byte_of(codes, i));
  }
#endif
};

#ifdef PAIRS
constexpr uint16_t BF16_CODES[] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,  // -8 .. -1
                                   0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};  // 0 .. 7
constexpr struct Orders {  // that make pairs of two rows of a panel: of codes for columns from 0 and 16, of bf16
  uint8_t codes[2][64] = {};
  uint16_t values[32] = {};
  constexpr Orders() {
    for (int i = 0; i < 128; i++) codes[i / 64][i % 64] = i / 4 + i % 4 / 2 * 32;
    for (int i = 0; i < 32; i++) values[i] = i / 2 + i % 2 * 16;
  }
} ORDERS;

struct Bf16 {
  static constexpr long STEP = 2;

  static f32x16 madd(f32x16 sum, float a, f32x16 w) {
    return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_ps(a));
  }

  // A dword per column: bytes [code of k, 0, code of k + 1, 0] become two words, each an index of the table
  static f32x16 codes4(const uint8_t* q, long s, int v) {
    const __m512i bytes = _mm512_maskz_permutexvar_epi8(0x5555555555555555, load<__m512i>(ORDERS.codes[v % 2]),
                                                        load<__m512i>(q + s * 64));
    const __m512i table = _mm512_broadcast_i64x4(load<__m256i>(BF16_CODES));  // bit 4 of an index is not ours
    return (f32x16)_mm512_permutexvar_epi16(v < 2 ? bytes : _mm512_srli_epi16(bytes, 4), table);
  }

  static void codes8(__m512i codes, float* words) {
    const __m512i upper = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
    for (int i = 0; i < 2; i++) {  // exact in bf16: the upper half of fp32 is the value
      const __m512i even = (__m512i)byte_of(codes, 2 * i), odd = (__m512i)byte_of(codes, 2 * i + 1);
      store(words + i * COLUMNS, _mm512_mask_shuffle_epi8(odd, 0x3333333333333333, even, upper));
    }
  }
};
#endif

// ---- Weights: where the words of a panel come from --------------------------------------------------------

struct Unpacked {  // words [steps, 64]
  const float* words;
  Unpacked from(long step) const { return {words + step * COLUMNS}; }
  f32x16 operator()(long s, int v) const { return load<f32x16>(words + s * COLUMNS + v * LANES); }
};

template <class P> struct Nibbles {  // codes of one panel of int4
  const uint8_t* q;
  Nibbles from(long step) const { return {q + step * P::STEP * 32}; }
  f32x16 operator()(long s, int v) const { return P::codes4(q, s, v); }
};

struct Int4 {
  static constexpr bool ZERO = true;
  const uint8_t* q;
  const void* scale_zero;
  long dtype, group, n, k;

  void scales(long panel, long k0, float* scale, float* zero) const {
    const long first = (k0 / group * ceil_div(n, COLUMNS) + panel) * COLUMNS * 2;
    float pairs[COLUMNS][2];
    widen(scale_zero, dtype, first, 2 * COLUMNS, pairs[0]);
    for (long j = 0; j < COLUMNS; j++) scale[j] = pairs[j][0], zero[j] = pairs[j][1];
  }
  template <class P> Nibbles<P> direct(long panel, long k0) const { return {q + (panel * k + k0) * 32}; }

  template <class P> void unpack(long panel, long k0, long k1, float* words) const {
    const Nibbles<P> codes = direct<P>(panel, k0);
    for (long s = 0; s < (k1 - k0) / P::STEP; s++)
      for (int v = 0; v < 4; v++) store(words + s * COLUMNS + v * LANES, codes(s, v));
  }
};

#ifdef PAIRS
struct Rounded {  // int4 as weights in bf16, which many rows of x pay for: their groups need no sums of their own
  static constexpr bool ZERO = false;
  Int4 from;
  long group = CHUNK;

  void scales(long, long, float* scale, float*) const { std::fill_n(scale, COLUMNS, 1.f); }

  template <class P> void unpack(long panel, long k0, long k1, float* words) const {
    float scale[COLUMNS], zero[COLUMNS];
    for (; k0 < k1; k0 += from.group) {
      from.scales(panel, k0, scale, zero);
      const Nibbles<Fp32> codes = from.direct<Fp32>(panel, k0);
      for (long s = 0; s < from.group; s += 2, words += COLUMNS)
        for (int v = 0; v < 4; v++) {
          const f32x16 a = load<f32x16>(scale + v * LANES), b = load<f32x16>(zero + v * LANES);
          const __m512bh rows = _mm512_cvtne2ps_pbh((__m512)(codes(s + 1, v) * a + b), (__m512)(codes(s, v) * a + b));
          store(words + v * LANES, _mm512_permutexvar_epi16(load<__m512i>(ORDERS.values), (__m512i)rows));
        }
    }
  }
};
#endif

struct Int8 {
  static constexpr bool ZERO = false;
  const int8_t* q;
  const void* scale;  // [n, groups]
  long dtype, groups, n, k, group = groups == 1 ? CHUNK : k / groups;

  void scales(long panel, long k0, float* out, float*) const {
    const long first = panel * COLUMNS, g = groups == 1 ? 0 : k0 / group;
    with_type(dtype, [&](auto type) {
      auto* p = static_cast<const decltype(type)*>(scale) + g;
      for (long j = 0; j < COLUMNS; j++) out[j] = first + j < n ? wide(p[(first + j) * groups]) : 0;
    });
  }
  template <class P> void unpack(long panel, long k0, long k1, float* words) const {
    for (long j = 0; j < COLUMNS; j += LANES) {
      const long left = n - panel * COLUMNS - j;  // columns beyond the last are zero
      const int8_t* rows = q + (panel * COLUMNS + j) * k;
#ifdef WIDE
      for (long p = k0; p < k1; p += 4 * LANES) {
        __m512i r[LANES];
        if (left >= LANES && k1 - p >= 4 * LANES) {
#pragma GCC unroll 16
          for (long i = 0; i < LANES; i++) {
            __builtin_prefetch(rows + i * k + p + CHUNK, 0, 2);
            r[i] = load<__m512i>(rows + i * k + p);
          }
        } else {
          const __mmask64 some = _bzhi_u64(~0ull, std::min(k1 - p, 4 * LANES));
#pragma GCC unroll 16
          for (long i = 0; i < LANES; i++)
            r[i] = i < left ? _mm512_maskz_loadu_epi8(some, rows + i * k + p) : _mm512_setzero_si512();
        }
        transpose(r);
        float* out = words + (p - k0) / P::STEP * COLUMNS + j;
#pragma GCC unroll 16
        for (long i = 0; i < LANES; i++) P::codes8(r[i], out + 4 / P::STEP * i * COLUMNS);
      }
#else
      for (long i = 0; i < LANES; i++)
        for (long p = k0; p < k1; p++) words[(p - k0) * COLUMNS + j + i] = i < left ? rows[i * k + p] : 0;
#endif
    }
  }
};

}  // namespace
