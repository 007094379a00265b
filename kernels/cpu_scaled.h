// What int8 linear layers on int8 activations share on the CPU: y = (x - zero) @ q.T * x_scale * scale + bias.
//
// As in cpu_native.cpp, a task is a panel of 64 columns of y by some tiles of rows, and goes along K in chunks. Sums are
// int32 and exact. A Kernel says how x is packed and a tile is multiplied. It may add OFFSET to the codes of x, where
// its instruction takes unsigned ones; what that adds to the sums is taken off again. Each kernel is a file of its own:
// in one, compilers make both slower.
#pragma once
#include "cpu_native.h"

struct Call {  // shapes and layouts: cpu_native.py; scales and zeros of x with a stride of 0 are one for all rows
  const int8_t* x;
  long m, n, k;
  const float* x_scale;
  long scale_stride;
  const int32_t* x_zero;
  long zero_stride;
  const int8_t* q;
  const void* scale;
  long scale_dtype;
  const int32_t* sums;
  const float* bias;
  void* y;
  long dtype;
  int threads;
};

int dots(const Call& call);  // 0, or 1 where there is no memory left

namespace {

// out [64] += the sums of the codes of a panel, for the GROUP columns from j on
template <class Kernel> void total(const typename Kernel::Panel& panel, long j, int32_t* out) {
  static const struct Ones {
    typename Kernel::Step steps[Kernel::CHUNK / Kernel::STEP];
    Ones() { std::fill_n(reinterpret_cast<int8_t*>(steps), sizeof steps, 1); }
  } ONES;
  Kernel::template tile<1>(ONES.steps, panel, j, out);
}

template <class Kernel> constexpr decltype(&Kernel::template tile<1>) TILES[] = {
    nullptr,
    Kernel::template tile<1>,
    Kernel::template tile<2>,
    Kernel::template tile<3>,
    Kernel::template tile<4>,
    Kernel::template tile<5>,
    Kernel::template tile<6>};

template <class Kernel> int product(const Call& p) {
  const Int8 weight{p.q, p.scale, p.scale_dtype, 1, p.n, p.k};
  constexpr long FLOATS = sizeof(typename Kernel::Step) / sizeof(float);
  const long panels = ceil_div(p.n, COLUMNS), tiles = ceil_div(p.m, ROWS), heights = ceil_div(tiles, Kernel::TASK_TILES);
  const long tasks = panels * heights, threads = std::min<long>(p.threads, std::max(tasks, tiles));
  const auto begin = [&](long tile) { return tile * p.m / tiles; };  // tiles differ by one row at most
  const auto line = [](long words) { return ceil_div(words, LANES) * LANES; };
  const long steps = ceil_div(p.k, Kernel::STEP), size_a = line(p.m * steps * FLOATS);
  const long own = Kernel::WORDS + std::min(p.m, Kernel::TASK_TILES * ROWS) * COLUMNS;
  Workspace space(size_a + threads * own);
  if (!space.data) return 1;
  auto* a = reinterpret_cast<typename Kernel::Step*>(space.data);
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
          Kernel::pack(p.x + (first + r) * p.k + k0, k1 - k0, at(t, k0, k1) + r, count);
      }
      packed++;
    }
    while (packed < tiles) std::this_thread::yield();
#pragma omp for schedule(dynamic) nowait
    for (long task = 0; task < tasks; task++) {
      float* words = blocks + omp_get_thread_num() * own;
      auto* exact = reinterpret_cast<int32_t*>(words + Kernel::WORDS);
      const long panel = task / heights, j0 = panel * COLUMNS, columns = std::min(COLUMNS, p.n - j0);
      const long first = task % heights * Kernel::TASK_TILES, last = std::min(first + Kernel::TASK_TILES, tiles);
      const long top = begin(first), bottom = begin(last);
      int32_t of_columns[COLUMNS] = {};  // sums of the codes of a column
      if (p.sums) std::copy_n(p.sums + j0, columns, of_columns);
      std::fill_n(exact, (bottom - top) * COLUMNS, 0);
      for (long k0 = 0; k0 < p.k; k0 += Kernel::CHUNK) {
        const long k1 = std::min(k0 + Kernel::CHUNK, p.k);
        const typename Kernel::Panel codes(weight, panel, k0, k1, words);
        for (long j = 0; j < columns; j += Kernel::GROUP) {
          for (long t = first; t < last; t++)
            TILES<Kernel>[begin(t + 1) - begin(t)](at(t, k0, k1), codes, j, exact + (begin(t) - top) * COLUMNS);
          if (Kernel::OFFSET && !p.sums) total<Kernel>(codes, j, of_columns);
        }
      }
      float scale[COLUMNS], bias[COLUMNS] = {}, y[COLUMNS];
      weight.scales(panel, 0, scale, nullptr);
      if (p.bias) std::copy_n(p.bias + j0, columns, bias);
      for (long r = top; r < bottom; r++, exact += COLUMNS) {
        const uint32_t zero = Kernel::OFFSET + (p.x_zero ? p.x_zero[r * p.zero_stride] : 0);
        const float of_row = p.x_scale[r * p.scale_stride];
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
