// int8 linear layers on int8 activations on the CPU: y = (x - zero) @ q.T * x_scale * scale + bias.
//
// As in cpu_native.cpp, a task is a panel of 64 columns of y by some tiles of rows, and goes along K in chunks. Sums are
// int32 and exact: of four products at a time where the processor can (VNNI), else in fp32, which holds those of a chunk.
#include "cpu_native.h"

namespace {

#ifdef __AVX512VNNI__
struct Bytes {  // the instruction takes unsigned codes on one side: OFFSET is added to those of q
  static constexpr long STEP = 4, CHUNK = 2048;
  static constexpr int32_t OFFSET = 128;
  typedef i32x16 Sum;

  static i32x16 madd(i32x16 sum, float a, f32x16 w) {
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)_mm512_set1_ps(a));
  }
  static void codes8(__m512i codes, float* words) { store(words, _mm512_xor_si512(codes, _mm512_set1_epi8(-128))); }

  // The words of one row of x [count], `stride` apart
  static void pack(const int8_t* x, long count, float* a, long stride) {
    const long whole = count / STEP;
    for (long s = 0; s < whole; s++) a[s * stride] = load<float>(x + s * STEP);
    if (count % STEP) {
      int8_t last[STEP] = {};
      memcpy(last, x + whole * STEP, count % STEP);
      a[whole * stride] = load<float>(last);
    }
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

// out [R, 64] += a [steps, R] x words [steps, 64]
template <int R> void tile(const float* a, const float* words, long steps, int32_t* out) {
  for (int v0 = 0; v0 < 4; v0 += VECTORS) {
    Bytes::Sum sum[R][VECTORS] = {};
    for (long s = 0; s < steps; s++) {
      f32x16 w[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) w[v] = load<f32x16>(words + s * COLUMNS + (v0 + v) * LANES);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sum[r][v] = Bytes::madd(sum[r][v], a[s * R + r], w[v]);
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

constexpr decltype(&tile<1>) TILES[] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

struct Activation {  // codes [m, k]; scales and zeros, which may be null, [m] or, where their stride is 0, [1]
  const int8_t* codes;
  const float* scale;
  const int32_t* zero;
  long scale_stride, zero_stride;
};

int product(const Activation& x, const Int8& weight, const int32_t* weight_sums, const Problem& p) {
  const long panels = ceil_div(p.n, COLUMNS), tiles = ceil_div(p.m, ROWS), heights = ceil_div(tiles, PANEL_TILES);
  const long tasks = panels * heights, threads = std::min<long>(p.threads, std::max(tasks, tiles));
  const auto begin = [&](long tile) { return tile * p.m / tiles; };  // tiles differ by one row at most
  const auto words_of = [](long count) { return ceil_div(count, Bytes::STEP); };
  const auto line = [](long words) { return ceil_div(words, LANES) * LANES; };
  const long size_a = line(p.m * words_of(p.k)), size_words = words_of(Bytes::CHUNK) * COLUMNS;
  const long own = size_words + std::min(p.m, PANEL_TILES * ROWS) * COLUMNS;
  Workspace space(size_a + line(p.m) + threads * own);
  if (!space.data) return 1;
  float *a = space.data, *blocks = a + size_a + line(p.m);
  auto* sums = reinterpret_cast<int32_t*>(a + size_a);  // of the rows of x
  const auto at = [&](long tile, long k0, long k1) {  // packed x: [chunk, tile, step, row]
    return a + k0 / Bytes::STEP * p.m + begin(tile) * words_of(k1 - k0);
  };
  std::atomic<long> packed{0};  // in place of a barrier, which would wait for threads that have yet to be scheduled
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic) nowait
    for (long t = 0; t < tiles; t++) {
      const long first = begin(t), count = begin(t + 1) - first;
      for (long k0 = 0; k0 < p.k; k0 += Bytes::CHUNK) {
        const long k1 = std::min(k0 + Bytes::CHUNK, p.k);
        for (long r = 0; r < count; r++)
          Bytes::pack(x.codes + (first + r) * p.k + k0, k1 - k0, at(t, k0, k1) + r, count);
      }
      for (long r = first; r < first + count; r++) {
        int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < p.k; i++) sum += x.codes[r * p.k + i];
        sums[r] = sum;
      }
      packed++;
    }
    while (packed < tiles) std::this_thread::yield();
#pragma omp for schedule(dynamic) nowait
    for (long task = 0; task < tasks; task++) {
      float* words = blocks + omp_get_thread_num() * own;
      auto* exact = reinterpret_cast<int32_t*>(words + size_words);
      const long panel = task / heights, j0 = panel * COLUMNS, columns = std::min(COLUMNS, p.n - j0);
      const long first = task % heights * PANEL_TILES, last = std::min(first + PANEL_TILES, tiles);
      const long top = begin(first), bottom = begin(last);
      std::fill_n(exact, (bottom - top) * COLUMNS, 0);
      for (long k0 = 0; k0 < p.k; k0 += Bytes::CHUNK) {
        const long k1 = std::min(k0 + Bytes::CHUNK, p.k);
        weight.unpack<Bytes>(panel, k0, k1, words);
        for (long t = first; t < last; t++)
          TILES[begin(t + 1) - begin(t)](at(t, k0, k1), words, words_of(k1 - k0), exact + (begin(t) - top) * COLUMNS);
      }
      float scale[COLUMNS], bias[COLUMNS] = {}, y[COLUMNS];
      uint32_t of_columns[COLUMNS] = {};
      weight.scales(panel, 0, scale, nullptr);
      if (p.bias) std::copy_n(p.bias + j0, columns, bias);
      if (x.zero) std::copy_n(weight_sums + j0, columns, of_columns);
      for (long r = top; r < bottom; r++, exact += COLUMNS) {
        const uint32_t offset = Bytes::OFFSET * sums[r], zero = x.zero ? x.zero[r * x.zero_stride] : 0;
        const float of_row = x.scale[r * x.scale_stride];
#pragma omp simd
        for (long j = 0; j < COLUMNS; j++) {
          const int32_t sum = exact[j] - offset - zero * of_columns[j];  // unsigned on the way: there it may overflow
          y[j] = float(sum) * scale[j] * of_row + bias[j];
        }
        narrow(y, columns, p.y, p.dtype, r * p.n + j0);
      }
    }
  }
  return 0;
}

}  // namespace

// Returns 0, or 1 where there is no memory left. Shapes and layouts: cpu_native.py
extern "C" int int8_scaled_linear(const int8_t* x, long m, long n, long k, const float* x_scale, long scale_stride,
                                  const int32_t* x_zero, long zero_stride, const int8_t* q, const void* scale,
                                  long scale_dtype, const int32_t* sums, const float* bias, void* y, long dtype,
                                  int threads) {
  const Activation activation{x, x_scale, x_zero, scale_stride, zero_stride};
  const Problem problem{nullptr, dtype, m, n, k, bias, y, threads};
  return product(activation, Int8{q, scale, scale_dtype, 1, n, k}, sums, problem);
}
