// int8 linear layers on int8 activations on the CPU, for few rows: dot products of four codes at a time (VNNI).
#ifdef __AVX512VNNI__
#include "cpu_scaled.h"

namespace {

// Both sides are read along K as they lie, 64 codes a step, so that nothing is unpacked; each output of a tile has a
// vector of sums. All rows of a task meet some columns, then the next: a near cache holds that many rows.
struct Dots {
  static constexpr long STEP = 64, CHUNK = 4096, WORDS = 0, GROUP = 4, TASK_TILES = 16;
  static constexpr int32_t OFFSET = 128;
  typedef __m512i Step;

  // The steps of one row of x [count], `stride` apart
  static void pack(const int8_t* x, long count, Step* a, long stride) {
    for (long i = 0; i < count; i += STEP)
      a[i / STEP * stride] = _mm512_xor_si512(codes(x + i, count - i), _mm512_set1_epi8(-128));
  }

  static __m512i codes(const int8_t* p, long count) {  // 0 behind the last
    return _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, std::min(count, STEP)), p);
  }

  struct Panel {
    const int8_t* q;
    long stride, columns, count;
    Panel(const Int8& weight, long panel, long k0, long k1, float*)
        : q(weight.q + panel * COLUMNS * weight.k + k0),
          stride(weight.k),
          columns(std::min(COLUMNS, weight.n - panel * COLUMNS)),
          count(k1 - k0) {}
  };

  // out [R, 64] += x [steps, R] · panel, for the GROUP columns from j on
  template <int R> static void tile(const Step* x, const Panel& panel, long j, int32_t* out) {
    const int8_t* q[GROUP];  // columns beyond the last are the last
    for (long c = 0; c < GROUP; c++) q[c] = panel.q + std::min(j + c, panel.columns - 1) * panel.stride;
    i32x16 sum[R][GROUP] = {};
    const auto step = [&](auto codes_of) __attribute__((always_inline)) {
      i32x16 w[GROUP];
#pragma GCC unroll 4
      for (int c = 0; c < GROUP; c++) w[c] = codes_of(q[c]);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        __m512i row = x[r];
        asm("" : "+v"(row));  // once into a register, not once for each product
#pragma GCC unroll 4
        for (int c = 0; c < GROUP; c++) sum[r][c] = madd(sum[r][c], row, w[c]);
      }
      x += R;
    };
    long k = 0;
    for (; k + STEP <= panel.count; k += STEP)
      step([&](const int8_t* p) {
        __builtin_prefetch(p + k + GROUP * panel.stride, 0, 2);  // what the next columns need
        return load<i32x16>(p + k);
      });
    if (k < panel.count) step([&](const int8_t* p) { return (i32x16)codes(p + k, panel.count - k); });
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      int32_t* at = out + r * COLUMNS + j;
      store(at, _mm_add_epi32(load<__m128i>(at), totals(sum[r][0], sum[r][1], sum[r][2], sum[r][3])));
    }
  }

  static i32x16 madd(i32x16 sum, __m512i x, i32x16 w) {
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, x, (__m512i)w);
  }

  // The total of each of four vectors
  static __m128i totals(i32x16 a, i32x16 b, i32x16 c, i32x16 d) {
    const auto low = [](auto u, auto v) { return (i32x16)_mm512_unpacklo_epi32((__m512i)u, (__m512i)v); };
    const auto high = [](auto u, auto v) { return (i32x16)_mm512_unpackhi_epi32((__m512i)u, (__m512i)v); };
    const __m512i ab = (__m512i)(low(a, b) + high(a, b)), cd = (__m512i)(low(c, d) + high(c, d));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  }
};

}  // namespace

int dots(const Call& call) { return product<Dots>(call); }
#endif
