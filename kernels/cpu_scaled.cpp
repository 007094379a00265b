// int8 linear layers on int8 activations on the CPU: y = (x - zero) @ q.T * x_scale * scale + bias.
//
// As in cpu_native.cpp, a task is a panel of 64 columns of y by some tiles of rows, and goes along K in chunks. Sums are
// int32 and exact: of four products at a time where the processor can (VNNI), else in fp32, which holds those of a chunk.
// The rows of a task are so few that a near cache holds them, as all of them meet each column of the panel in turn.
#include "cpu_native.h"

namespace {

constexpr long TASK_TILES = 16;

#ifdef __AVX512VNNI__
// Both sides are read along K as they lie, 64 codes a step, so that nothing is unpacked; each output of a tile has a
// vector of sums. The instruction takes unsigned codes on one side: OFFSET is added to those of x.
struct Kernel {
  static constexpr long STEP = 64, CHUNK = 4096, WORDS = 0, GROUP = 4;
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

  // out [64] += the sums of the codes, for the GROUP columns from j on
  static void total(const Panel& panel, long j, int32_t* out) {
    static const struct Ones {
      Step steps[CHUNK / STEP];
      Ones() { std::fill_n(steps, CHUNK / STEP, _mm512_set1_epi8(1)); }
    } ONES;
    tile<1>(ONES.steps, panel, j, out);
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
#else
struct Kernel {
  static constexpr long STEP = 1, CHUNK = 1024, WORDS = CHUNK * COLUMNS, GROUP = COLUMNS;
  static constexpr int32_t OFFSET = 0;
  typedef float Step;

  static void pack(const int8_t* x, long count, Step* a, long stride) {
    for (long i = 0; i < count; i++) a[i * stride] = x[i];
  }

  struct Panel {
    const float* words;
    long steps;
    Panel(const Int8& weight, long panel, long k0, long k1, float* space) : words(space), steps(k1 - k0) {
      weight.unpack<Fp32>(panel, k0, k1, space);
    }
  };

  static void total(const Panel&, long, int32_t*) {}  // which nothing needs without an OFFSET

  // out [R, 64] += x [steps, R] · panel
  template <int R> static void tile(const Step* x, const Panel& panel, long, int32_t* out) {
    for (int v0 = 0; v0 < 4; v0 += VECTORS) {
      f32x16 sum[R][VECTORS] = {};
      for (long s = 0; s < panel.steps; s++) {
        f32x16 w[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) w[v] = load<f32x16>(panel.words + s * COLUMNS + (v0 + v) * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; v++) sum[r][v] = Fp32::madd(sum[r][v], x[s * R + r], w[v]);
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
          int32_t* at = out + r * COLUMNS + (v0 + v) * LANES;
          store(at, load<i32x16>(at) + __builtin_convertvector(sum[r][v], i32x16));
        }
    }
  }
};
#endif

constexpr decltype(&Kernel::tile<1>) TILES[] = {
    nullptr, Kernel::tile<1>, Kernel::tile<2>, Kernel::tile<3>, Kernel::tile<4>, Kernel::tile<5>, Kernel::tile<6>};

struct Activation {  // codes [m, k]; scales and zeros, which may be null, [m] or, where their stride is 0, [1]
  const int8_t* codes;
  const float* scale;
  const int32_t* zero;
  long scale_stride, zero_stride;
};

int product(const Activation& x, const Int8& weight, const int32_t* weight_sums, const Problem& p) {
  constexpr long FLOATS = sizeof(Kernel::Step) / sizeof(float);
  const long panels = ceil_div(p.n, COLUMNS), tiles = ceil_div(p.m, ROWS), heights = ceil_div(tiles, TASK_TILES);
  const long tasks = panels * heights, threads = std::min<long>(p.threads, std::max(tasks, tiles));
  const auto begin = [&](long tile) { return tile * p.m / tiles; };  // tiles differ by one row at most
  const auto line = [](long words) { return ceil_div(words, LANES) * LANES; };
  const long steps = ceil_div(p.k, Kernel::STEP), size_a = line(p.m * steps * FLOATS);
  const long own = Kernel::WORDS + std::min(p.m, TASK_TILES * ROWS) * COLUMNS;
  Workspace space(size_a + threads * own);
  if (!space.data) return 1;
  auto* a = reinterpret_cast<Kernel::Step*>(space.data);
  float* blocks = space.data + size_a;
  const auto at = [&](long tile, long k0, long k1) {  // packed x: [chunk, tile, step, row]
    return a + k0 / Kernel::STEP * p.m + begin(tile) * ceil_div(k1 - k0, Kernel::STEP);
  };
  std::atomic<long> packed{0};  // in place of a barrier, which would wait for threads that have yet to be scheduled
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic) nowait
    for (long t = 0; t < tiles; t++) {
      const long first = begin(t), count = begin(t + 1) - first;
      for (long k0 = 0; k0 < p.k; k0 += Kernel::CHUNK) {
        const long k1 = std::min(k0 + Kernel::CHUNK, p.k);
        for (long r = 0; r < count; r++)
          Kernel::pack(x.codes + (first + r) * p.k + k0, k1 - k0, at(t, k0, k1) + r, count);
      }
      packed++;
    }
    while (packed < tiles) std::this_thread::yield();
#pragma omp for schedule(dynamic) nowait
    for (long task = 0; task < tasks; task++) {
      float* words = blocks + omp_get_thread_num() * own;
      auto* exact = reinterpret_cast<int32_t*>(words + Kernel::WORDS);
      const long panel = task / heights, j0 = panel * COLUMNS, columns = std::min(COLUMNS, p.n - j0);
      const long first = task % heights * TASK_TILES, last = std::min(first + TASK_TILES, tiles);
      const long top = begin(first), bottom = begin(last);
      int32_t of_columns[COLUMNS] = {};  // sums of the codes of a column
      if (weight_sums) std::copy_n(weight_sums + j0, columns, of_columns);
      std::fill_n(exact, (bottom - top) * COLUMNS, 0);
      for (long k0 = 0; k0 < p.k; k0 += Kernel::CHUNK) {
        const long k1 = std::min(k0 + Kernel::CHUNK, p.k);
        const Kernel::Panel codes(weight, panel, k0, k1, words);
        for (long j = 0; j < columns; j += Kernel::GROUP) {
          for (long t = first; t < last; t++)
            TILES[begin(t + 1) - begin(t)](at(t, k0, k1), codes, j, exact + (begin(t) - top) * COLUMNS);
          if (!weight_sums) Kernel::total(codes, j, of_columns);
        }
      }
      float scale[COLUMNS], bias[COLUMNS] = {}, y[COLUMNS];
      weight.scales(panel, 0, scale, nullptr);
      if (p.bias) std::copy_n(p.bias + j0, columns, bias);
      for (long r = top; r < bottom; r++, exact += COLUMNS) {
        const uint32_t zero = Kernel::OFFSET + (x.zero ? x.zero[r * x.zero_stride] : 0);
        const float of_row = x.scale[r * x.scale_stride];
#pragma omp simd
        for (long j = 0; j < COLUMNS; j++) {
          const int32_t sum = exact[j] - zero * of_columns[j];  // unsigned on the way: there it may overflow
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
