// Weight-only int8 and int4 linear layers on the CPU: y = x @ w.T + bias, summed in fp32.
//
// A task is a panel of 64 columns of y by up to PANEL_TILES tiles of up to ROWS rows. It goes along K in chunks: the
// panel's codes become words (cpu_native.h), and every tile multiplies them in registers. Codes are exact in bf16, and
// scales enter in fp32, once per group or chunk; only int4 under many rows of bf16 is first rounded to bf16 weights
// (Rounded). What is summed in which order depends on the shapes alone, not on the threads.
#include "cpu_native.h"

namespace {

// ---- The product -----------------------------------------------------------------------------------------

// out [R, 64] += scale [64] * (a [steps, R] x words [steps, 64]) + zero [64] * sums [R]
template <class P, bool ZERO, class W, int R>
void tile(const float* a, W words, long steps, const float* scale, const float* zero, const float* sums, float* out) {
  for (int v0 = 0; v0 < 4; v0 += VECTORS) {
    f32x16 sum[R][VECTORS] = {};
    for (long s = 0; s < steps; s++) {
      f32x16 w[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) w[v] = words(s, v0 + v);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sum[r][v] = P::madd(sum[r][v], a[s * R + r], w[v]);
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) {
        const long j = (v0 + v) * LANES;
        f32x16 y = load<f32x16>(out + r * COLUMNS + j) + sum[r][v] * load<f32x16>(scale + j);
        if (ZERO) y += load<f32x16>(zero + j) * sums[r];
        store(out + r * COLUMNS + j, y);
      }
  }
}

template <class P, bool ZERO, class W> constexpr decltype(&tile<P, ZERO, W, 1>) TILES[] = {
    nullptr,             tile<P, ZERO, W, 1>, tile<P, ZERO, W, 2>, tile<P, ZERO, W, 3>,
    tile<P, ZERO, W, 4>, tile<P, ZERO, W, 5>, tile<P, ZERO, W, 6>};

// Packs rows [first, first + rows) of x over K [k0, k1): words a[step, row], and sums[group, m] unless null
template <class P>
void pack(const Problem& p, long first, long rows, long k0, long k1, float* a, long group, float* sums) {
  const long count = k1 - k0, whole = count / P::STEP;
  for (long r = first; r < first + rows; r++, a++) {
    float line[CHUNK];
    if (P::STEP == 1 || sums) widen(p.x, p.dtype, r * p.k + k0, count, line);
    for (long g = 0; sums && g < count / group; g++) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (long i = g * group; i < (g + 1) * group; i++) sum += line[i];
      sums[g * p.m + r] = sum;
    }
    if (P::STEP == 1) {
      for (long s = 0; s < whole; s++) a[s * rows] = line[s];
    } else {
      auto* x = static_cast<const uint16_t*>(p.x) + r * p.k + k0;
      for (long s = 0; s < whole; s++) a[s * rows] = load<float>(x + 2 * s);
      const uint32_t last = x[count - 1];
      if (count % 2) a[whole * rows] = load<float>(&last);
    }
  }
}

template <class P, class W> int product(const Problem& p, const W& weight) {
  const long panels = ceil_div(p.n, COLUMNS), tiles = ceil_div(p.m, ROWS), heights = ceil_div(tiles, PANEL_TILES);
  const long tasks = panels * heights, threads = std::min<long>(p.threads, std::max(tasks, tiles));
  const auto begin = [&](long tile) { return tile * p.m / tiles; };  // tiles differ by one row at most
  const auto line = [](long floats) { return ceil_div(floats, LANES) * LANES; };
  const long size_a = line(p.m * ceil_div(p.k, P::STEP)), size_sums = W::ZERO ? line(p.k / weight.group * p.m) : 0;
  const long size_words = CHUNK / P::STEP * COLUMNS, size_scale = ceil_div(CHUNK, weight.group) * COLUMNS;
  const long own = size_words + 2 * size_scale + std::min(p.m, PANEL_TILES * ROWS) * COLUMNS;
  Workspace space(size_a + size_sums + threads * own);
  if (!space.data) return 1;
  float *a = space.data, *sums = a + size_a;
  const auto at = [&](long tile, long k0, long k1) {  // packed x: [chunk, tile, step, row]
    return a + k0 / P::STEP * p.m + begin(tile) * ceil_div(k1 - k0, P::STEP);
  };
  std::atomic<long> packed{0};  // in place of a barrier, which would wait for threads that have yet to be scheduled
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic) nowait
    for (long t = 0; t < tiles; t++) {
      for (long k0 = 0; k0 < p.k; k0 += CHUNK) {
        const long k1 = std::min(k0 + CHUNK, p.k);
        float* total = W::ZERO ? sums + k0 / weight.group * p.m : nullptr;
        pack<P>(p, begin(t), begin(t + 1) - begin(t), k0, k1, at(t, k0, k1), weight.group, total);
      }
      packed++;
    }
    while (packed < tiles) std::this_thread::yield();
#pragma omp for schedule(dynamic) nowait
    for (long task = 0; task < tasks; task++) {
      float *words = sums + size_sums + omp_get_thread_num() * own, *scale = words + size_words;
      float *zero = scale + size_scale, *y = zero + size_scale;
      const long panel = task / heights, j0 = panel * COLUMNS, columns = std::min(COLUMNS, p.n - j0);
      const long first = task % heights * PANEL_TILES, last = std::min(first + PANEL_TILES, tiles);
      const long top = begin(first), bottom = begin(last);
      std::fill(y, y + (bottom - top) * COLUMNS, 0.f);
      for (long r = 0; p.bias && r < bottom - top; r++) std::copy_n(p.bias + j0, columns, y + r * COLUMNS);
      for (long k0 = 0; k0 < p.k; k0 += CHUNK) {
        const long k1 = std::min(k0 + CHUNK, p.k), groups = ceil_div(k1 - k0, weight.group);
        const long steps = ceil_div(std::min(k1 - k0, weight.group), P::STEP);
        for (long g = 0; g < groups; g++)
          weight.scales(panel, k0 + g * weight.group, scale + g * COLUMNS, zero + g * COLUMNS);
        const auto multiply = [&](auto source) {
          for (long t = first; t < last; t++) {
            const long rows = begin(t + 1) - begin(t);
            for (long g = 0; g < groups; g++)
              TILES<P, W::ZERO, decltype(source)>[rows](
                  at(t, k0, k1) + g * steps * rows, source.from(g * steps), steps, scale + g * COLUMNS,
                  zero + g * COLUMNS, sums + (k0 / weight.group + g) * p.m + begin(t), y + (begin(t) - top) * COLUMNS);
          }
        };
        if constexpr (W::ZERO)
          if (tiles == 1) {  // read once: straight from the codes
            multiply(weight.template direct<P>(panel, k0));
            continue;
          }
        weight.template unpack<P>(panel, k0, k1, words);
        multiply(Unpacked{words});
      }
      const long bytes = p.dtype == FP32 ? 4 : 2;
      for (long r = top; r < bottom; r++) {
        const char* ahead = static_cast<char*>(p.y) + ((r + 16) * p.n + j0) * bytes;  // rows of y lie far apart
        for (long i = 0; i < columns * bytes; i += 64) __builtin_prefetch(ahead + i, 1);
        narrow(y + (r - top) * COLUMNS, columns, p.y, p.dtype, r * p.n + j0);
      }
    }
  }
  return 0;
}

// Few rows of x against int8: dot products along K, each weight read once. Scales of groups meet their codes
template <int M, bool GROUPED> int dots(const Problem& p, const Int8& weight) {
  constexpr long TOGETHER = 4;
  const long line = ceil_div(p.k, LANES) * LANES, groups = GROUPED ? weight.groups : 1;
  const long own = ceil_div(TOGETHER * groups, LANES) * LANES;  // scales that a thread has in work
  Workspace space(M * line + p.threads * own);
  if (!space.data) return 1;
  float* x = space.data;
  for (long r = 0; r < M; r++) {
    std::fill(x + (r + 1) * line - LANES, x + (r + 1) * line, 0.f);
    widen(p.x, p.dtype, r * p.k, p.k, x + r * line);
  }
#pragma omp parallel for schedule(dynamic) num_threads(p.threads)
  for (long j0 = 0; j0 < p.n; j0 += COLUMNS) {
    const long columns = std::min(COLUMNS, p.n - j0);
    float y[M][COLUMNS + TOGETHER], *scale = x + M * line + omp_get_thread_num() * own;
    for (long j = 0; j < columns; j += TOGETHER) {
      const int8_t* q[TOGETHER];
      for (long i = 0; i < TOGETHER; i++) {
        const long n = std::min(j0 + j + i, p.n - 1);
        q[i] = weight.q + n * p.k;
        widen(weight.scale, weight.dtype, n * groups, groups, scale + i * groups);
      }
      f32x16 sum[TOGETHER][M] = {};
      const auto step = [&](long k, long g, const auto& at) {
#pragma GCC unroll 4
        for (long i = 0; i < TOGETHER; i++) {
          __builtin_prefetch(q[i] + TOGETHER * p.k + k, 0, 2);
          const f32x16 w = GROUPED ? codes8(at(i)) * scale[i * groups + g] : codes8(at(i));
#pragma GCC unroll 4
          for (long r = 0; r < M; r++) sum[i][r] += w * load<f32x16>(x + r * line + k);
        }
      };
      const long whole = p.k / LANES * LANES, group = GROUPED ? weight.group : whole;
      for (long g = 0; g < groups; g++)
        for (long k = g * group; k < (g + 1) * group; k += LANES) step(k, g, [&](long i) { return q[i] + k; });
      if (whole < p.k) {  // never with groups
        int8_t tail[TOGETHER][LANES] = {};
        for (long i = 0; i < TOGETHER; i++) memcpy(tail[i], q[i] + whole, p.k - whole);
        step(whole, 0, [&](long i) { return tail[i]; });
      }
      for (long i = 0; i < TOGETHER; i++)
        for (long r = 0; r < M; r++) {
          const float bias = p.bias ? p.bias[std::min(j0 + j + i, p.n - 1)] : 0;
          y[r][j + i] = total(sum[i][r]) * (GROUPED ? 1 : scale[i]) + bias;
        }
    }
    for (long r = 0; r < M; r++) narrow(y[r], columns, p.y, p.dtype, r * p.n + j0);
  }
  return 0;
}

}  // namespace

// Both return 0, or 1 where there is no memory left. Shapes and layouts: cpu_native.py
extern "C" int int8_linear(const void* x, long dtype, long m, long n, long k, const int8_t* q, const void* scale,
                           long scale_dtype, long groups, const float* bias, void* y, int threads) {
  const Problem problem{x, dtype, m, n, k, bias, y, threads};
  const Int8 weight{q, scale, scale_dtype, groups, n, k};
  constexpr decltype(&dots<1, false>) DOTS[][2] = {{nullptr, nullptr},
                                                   {dots<1, false>, dots<1, true>},
                                                   {dots<2, false>, dots<2, true>},
                                                   {dots<3, false>, dots<3, true>},
                                                   {dots<4, false>, dots<4, true>}};
  if (m <= DOT_ROWS) return DOTS[m][groups > 1](problem, weight);
#ifdef PAIRS
  if (dtype == BF16) return product<Bf16>(problem, weight);
#endif
  return product<Fp32>(problem, weight);
}

extern "C" int int4_linear(const void* x, long dtype, long m, long n, long k, const uint8_t* q, const void* scale_zero,
                           long scale_dtype, long group, const float* bias, void* y, int threads) {
  const Problem problem{x, dtype, m, n, k, bias, y, threads};
  const Int4 weight{q, scale_zero, scale_dtype, group, n, k};
#ifdef PAIRS
  if (dtype == BF16) return m > ROUNDED_ROWS ? product<Bf16>(problem, Rounded{weight}) : product<Bf16>(problem, weight);
#endif
  return product<Fp32>(problem, weight);
}
