// What kernels/ptx.cuh says in PTX, and CUDA of itself, for a CPU: the threads of a block take turns (run.cpp), and those of
// a warp meet where they do something together. For the right results alone, not for what comes of threads that run at
// once: copies are there at once, and the numbers that products add up are not rounded in between.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
#define __align__(bytes)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct int2 { int x, y; };
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
using std::max;
using std::min;

template <class To, class From>
To bits_of(From from) {
  To to{};
  memcpy(&to, &from, std::min(sizeof to, sizeof from));
  return to;
}
inline float __uint_as_float(u32 v) { return bits_of<float>(v); }
inline float __int_as_float(int v) { return bits_of<float>(v); }
inline float __fdividef(float a, float b) { return a / b; }

[[noreturn]] inline void fail(const char* what) { throw what; } // to `attention`, in run.cpp

// Threads ----------------------------------------------------------------------------------------------------

struct Index { unsigned x; };
extern Index threadIdx, blockIdx;
void others(); // have a turn

struct Meeting { // of a warp, or of a block
  int there = 0;
  unsigned count = 0;

  template <class Do>
  void operator()(int of, Do all_are_there) {
    const unsigned now = count;
    if (++there == of) {
      all_are_there();
      there = 0, count++;
    }
    while (count == now) others();
  }
};
typedef std::array<std::array<u64, 8>, 32> Words; // of each lane
struct Warp {
  Meeting meeting;
  Words in[2], out[2]; // by turns: a lane may still read what the last meeting gave
};
extern std::vector<Warp> warps;
extern Meeting block;
extern int block_threads;

// What `work` makes for this lane of the words of all.
template <class Work>
std::array<u64, 8> together(const std::array<u64, 8>& mine, Work work) {
  Warp& warp = warps[threadIdx.x / 32];
  const unsigned turn = warp.meeting.count % 2, lane = threadIdx.x % 32;
  warp.in[turn][lane] = mine;
  warp.meeting(32, [&] { work(warp.in[turn], warp.out[turn]); });
  return warp.out[turn][lane];
}
inline void __syncwarp() { together({}, [](Words&, Words&) {}); }
inline void __syncthreads() { block(block_threads, [] {}); }
template <class T>
T __shfl_sync(u32, T v, int from) {
  return bits_of<T>(together({bits_of<u64>(v), (u64)from % 32}, [](Words& in, Words& out) {
    for (int i = 0; i < 32; i++) out[i][0] = in[in[i][1]][0];
  })[0]);
}
template <class T>
T __shfl_xor_sync(u32, T v, int by) { return __shfl_sync(~0u, v, threadIdx.x % 32 ^ by); }
inline int __reduce_max_sync(u32, int v) {
  return (int)together({(u64)(long long)v}, [](Words& in, Words& out) {
    long long most = (long long)in[0][0];
    for (auto& each : in) most = max(most, (long long)each[0]);
    for (auto& each : out) each[0] = (u64)most;
  })[0];
}
inline int __reduce_min_sync(u32, int v) { return -__reduce_max_sync(~0u, -v); }
inline bool __any_sync(u32, bool v) { return __reduce_max_sync(~0u, v); }

// Numbers ----------------------------------------------------------------------------------------------------

inline float to_float(u32 v) { return bits_of<float>(v << 16); } // bf16 in the lower half
inline u32 to_half(double f) {
  const u32 bits = bits_of<u32>((float)f);
  return f != f ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline u32 to_halves(double low, double high) { return to_half(low) | to_half(high) << 16; }
inline float from_fp16(u16 v) { return (float)bits_of<_Float16>(v); }
inline u32 to_fp16(float low, float high) { return bits_of<u16>((_Float16)low) | (u32)bits_of<u16>((_Float16)high) << 16; }
inline u32 multiply_add2(u32 a, u32 b, u32 c) {
  return to_halves((double)to_float(a) * to_float(b) + to_float(c),
                   (double)to_float(a >> 16) * to_float(b >> 16) + to_float(c >> 16));
}
inline u32 multiply2(u32 a, u32 b) { return multiply_add2(a, b, 0x80008000u); }
inline u32 mask_or(u32 v, u32 mask, u32 set) { return (v & mask) | set; }
inline u32 permute(u32 a, u32 b, u32 which) {
  u32 v = 0;
  for (int i = 0; i < 4; i++) v |= (u32)((a | (u64)b << 32) >> (which >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return v;
}
inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0 : y;
}

// Fragments --------------------------------------------------------------------------------------------------

extern u8 shared[];
extern size_t shared_bytes;
inline u32 shared_address(const void* p) { return (u32)((const u8*)p - shared); }
inline u8* in_shared(u32 address, u32 bytes, u32 multiple) {
  if (address % multiple || address + bytes > shared_bytes) fail("an address in shared memory");
  return shared + address;
}

inline u32 transpose(u32 v) {
  return (u32)together({v}, [](Words& in, Words& out) {
    const auto at = [&](int row, int column) { return (u16)(in[row * 4 + column / 2][0] >> column % 2 * 16); };
    for (int i = 0; i < 32; i++) out[i][0] = at(i % 4 * 2, i / 4) | (u32)at(i % 4 * 2 + 1, i / 4) << 16;
  })[0];
}
inline void load_matrices(u32* v, u32 row) {
  const auto found = together({row}, [](Words& in, Words& out) {
    for (int i = 0; i < 32; i++)
      for (int k = 0; k < 4; k++) memcpy(&out[i][k], in_shared((u32)in[k * 8 + i / 4][0], 16, 16) + i % 4 * 4, 4);
  });
  for (int k = 0; k < 4; k++) v[k] = (u32)found[k];
}
inline void load_matrices_transposed(u32* v, u32 row) {
  load_matrices(v, row);
  for (int k = 0; k < 4; k++) v[k] = transpose(v[k]);
}
inline void multiply_add(float* d, const u32* a, u32 b0, u32 b1) {
  const auto two = [](auto low, auto high) { return bits_of<u32>(low) | (u64)bits_of<u32>(high) << 32; };
  const auto found = together(
      {two(a[0], a[1]), two(a[2], a[3]), two(b0, b1), two(d[0], d[1]), two(d[2], d[3])}, [](Words& in, Words& out) {
        const auto word = [&](int lane, int i) { return (u32)(in[lane][i / 2] >> i % 2 * 32); };
        double left[16][16], right[16][8];
        for (int i = 0; i < 32; i++)
          for (int k = 0; k < 6; k++)
            for (int h = 0; h < 2; h++) {
              const float f = to_float(word(i, k) >> h * 16);
              if (k < 4) left[i / 4 + k % 2 * 8][i % 4 * 2 + k / 2 * 8 + h] = f;
              if (k >= 4) right[i % 4 * 2 + (k - 4) * 8 + h][i / 4] = f;
            }
        for (int i = 0; i < 32; i++)
          for (int k = 0; k < 4; k++) {
            double sum = bits_of<float>(word(i, 6 + k));
            for (int j = 0; j < 16; j++) sum += left[i / 4 + k / 2 * 8][j] * right[j][i % 4 * 2 + k % 2];
            out[i][k] = bits_of<u32>((float)sum);
          }
      });
  for (int k = 0; k < 4; k++) d[k] = bits_of<float>((u32)found[k]);
}

// Copies -----------------------------------------------------------------------------------------------------

struct Barrier {
  int arrivals, missing;
  long bytes;
  u32 phase;
};
extern std::map<u32, Barrier> barriers;
inline void barrier_init(u32 barrier, u32 arrivals) { barriers[barrier] = {(int)arrivals, (int)arrivals, 0, 0}; }
inline void barriers_ready() {}
inline void barrier_change(u32 barrier, int arrivals, long bytes) {
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) fail("a barrier that was not made");
  Barrier& b = found->second;
  b.missing -= arrivals, b.bytes += bytes;
  if (b.missing < 0) fail("an arrival too many");
  if (b.missing == 0 && b.bytes == 0) b.missing = b.arrivals, b.phase ^= 1;
}
inline void barrier_arrive(u32 barrier) { barrier_change(barrier, 1, 0); }
inline void barrier_expect(u32 barrier, u32 bytes) { barrier_change(barrier, 1, bytes); }
inline void barrier_wait(u32 barrier, u32 phase) {
  while (barriers.at(barrier).phase == phase) others();
}
inline void before_copies() {}
inline u64 read_once() { return 0; }
struct Matrix { // boxes of 32 rows and so many bytes, swizzled by them
  const u8* from;
  long rows;
  int bytes, width;
};
inline void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier, u64) {
  if ((u64)from % 16 || bytes % 16) fail("the address or size of a copy");
  memcpy(in_shared(to, bytes, 16), from, bytes);
  barrier_change(barrier, 0, -(long)bytes);
}
inline void copy_box(u32 to, const Matrix& m, int column, int row, u32 barrier, u64) {
  in_shared(to, 32 * m.width, 8 * m.width);
  for (int r = 0; r < 32; r++)
    for (int c = 0; c < m.width; c++) {
      const u32 at = to + r * m.width + c;
      const bool is = row + r < m.rows && column + c < m.bytes;
      shared[at ^ (at >> 7 & (m.width / 16 - 1)) << 4] = is ? m.from[(long)(row + r) * m.bytes + column + c] : 0;
    }
  barrier_change(barrier, 0, -32l * m.width);
}
inline void prefetch_box(const Matrix& m, int column, int row) {
  if (row < 0 || row >= m.rows || column >= m.bytes) fail("a box outside of its matrix is asked for");
}
inline void prefetch_bulk(const void*, u32) {}

void wait_for_previous_grid();
inline void let_next_grid_start() {}
inline uint4 load_16(const void* p) { return *(const uint4*)p; }
inline uint2 load_8(const void* p) { return *(const uint2*)p; }
inline long long load_8_from_L2(const long long* p) { return *p; }
inline u16 load_2(const void* p) { return *(const u16*)p; }
