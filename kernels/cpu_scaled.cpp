// int8 linear layers on int8 activations on the CPU, for many rows: products of words, of four codes each where the
// processor can (VNNI), else of one in fp32, which holds the sums of a chunk exactly. The panel is unpacked into words
// [step, 64], which pays for many rows; few take cpu_dots.cpp.
#include "cpu_scaled.h"

namespace {

#ifdef __AVX512VNNI__
constexpr long DOTS_BELOW = 192;  // rows of x

// Words of four codes
struct Bytes {
  static constexpr long STEP = 4, CHUNK = 2048;
  static constexpr int32_t OFFSET = 128;
  typedef i32x16 Sum;

  static i32x16 madd(i32x16 sum, float a, f32x16 w) {
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)_mm512_set1_ps(a), (__m512i)w);
  }
  static void codes8(__m512i codes, float* words) { store(words, codes); }

  static void pack(const int8_t* x, long count, float* a, long stride) {
    const long whole = count / STEP;
    for (long s = 0; s < whole; s++) a[s * stride] = shifted(x + s * STEP);
    if (count % STEP) {
      int8_t last[STEP] = {};
      memcpy(last, x + whole * STEP, count % STEP);
      a[whole * stride] = shifted(last);
    }
  }
  static float shifted(const int8_t* codes) {
    const uint32_t word = load<uint32_t>(codes) ^ 0x80808080;
    return load<float>(&word);
  }
};
#else
struct Bytes : Fp32 {
  static constexpr long CHUNK = 1024;
  static constexpr int32_t OFFSET = 0;
  typedef f32x16 Sum;

  static void pack(const int8_t* x, long count, float* a, long stride) {
    for (long i = 0; i < count; i++) a[i * stride] = x[i];
  }
};
#endif

i32x16 whole(i32x16 sum) { return sum; }
i32x16 whole(f32x16 sum) { return __builtin_convertvector(sum, i32x16); }

struct Words {
  static constexpr long STEP = Bytes::STEP, CHUNK = Bytes::CHUNK, WORDS = CHUNK / STEP * COLUMNS;
  static constexpr long GROUP = COLUMNS, TASK_TILES = PANEL_TILES;
  static constexpr int32_t OFFSET = Bytes::OFFSET;
  typedef float Step;

  static void pack(const int8_t* x, long count, Step* a, long stride) { Bytes::pack(x, count, a, stride); }

  struct Panel {
    const float* words;
    long steps;
    Panel(const Int8& weight, long panel, long k0, long k1, float* space)
        : words(space), steps(ceil_div(k1 - k0, STEP)) {
      weight.unpack<Bytes>(panel, k0, k1, space);
    }
  };

  // out [R, 64] += x [steps, R] · panel
  template <int R> static void tile(const Step* x, const Panel& panel, long, int32_t* out) {
    for (int v0 = 0; v0 < 4; v0 += VECTORS) {
      Bytes::Sum sum[R][VECTORS] = {};
      for (long s = 0; s < panel.steps; s++) {
        f32x16 w[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) w[v] = load<f32x16>(panel.words + s * COLUMNS + (v0 + v) * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; v++) sum[r][v] = Bytes::madd(sum[r][v], x[s * R + r], w[v]);
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
          int32_t* at = out + r * COLUMNS + (v0 + v) * LANES;
          store(at, load<i32x16>(at) + whole(sum[r][v]));
        }
    }
  }
};

}  // namespace

// Returns 0, or 1 where there is no memory left. Shapes and layouts: cpu_native.py
extern "C" int int8_scaled_linear(const int8_t* x, long m, long n, long k, const float* x_scale, long scale_stride,
                                  const int32_t* x_zero, long zero_stride, const int8_t* q, const void* scale,
                                  long scale_dtype, const int32_t* sums, const float* bias, void* y, long dtype,
                                  int threads) {
  const Call call{x,     m,           n,    k,    x_scale, scale_stride, x_zero, zero_stride, q,
                  scale, scale_dtype, sums, bias, y,       dtype,        threads};
#ifdef __AVX512VNNI__
  if (m < DOTS_BELOW) return dots(call);
#endif
  return product<Words>(call);
}
