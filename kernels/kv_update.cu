// New keys or values into a packed cache (kv_cache.py): a warp quantizes a head of a token and stores it; or one new key
// by channel, where the heads of a row are a block of threads, as they share `held`.
//
// Defines: INPUT (0: bf16, 1: fp16, 2: fp32) and HEAD (a multiple of 16); KIND (0: int8, 1: e4m3, 2: int4), GROUP (d that
// share a scale: all of HEAD, or 32 or 64) and WARPS; or, by channel, BLOCK (tokens that share a scale), WINDOW (as INPUT)
// and THREADS.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#define PAIRS (HEAD / 2)
#define LARGEST (KIND == 0 ? 127.f : 448.f)
#define TINY 1.17549435e-38f
#define TURNS ((PAIRS + 31) / 32) // of a warp, two neighbours for each lane
#define LANES (GROUP == HEAD ? 32 : GROUP / 2) // that share a scale
#define OF_TURN (GROUP == HEAD ? TURNS : 1)    // turns that do

extern "C" __device__ void __assertfail(const char* what, const char* file, u32 line, const char* function,
                                       size_t size);

__device__ __forceinline__ float from_bf16(u16 v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ u16 to_bf16(float f) {
  u16 v;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
  return v;
}
// Two neighbours, the first of which is element `at`. KIND_OF: as INPUT.
template <int KIND_OF>
__device__ __forceinline__ float2 load(const u8* p, size_t at) {
  if (KIND_OF == 2) return make_float2(((const float*)p)[at], ((const float*)p)[at + 1]);
  const u16 low = ((const u16*)p)[at], high = ((const u16*)p)[at + 1];
  if (KIND_OF == 0) return make_float2(from_bf16(low), from_bf16(high));
  float2 f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f.x) : "h"(low));
  asm("cvt.f32.f16 %0, %1;" : "=f"(f.y) : "h"(high));
  return f;
}
__device__ __forceinline__ bool finite(float f) { return fabsf(f) <= 3.402823466e+38f; }
__device__ __forceinline__ int code(float f, int least, int most) { return min(max(__float2int_rn(f), least), most); }

// A scale and a minimum, as they are stored and as numbers, of what goes from low to high; NaN where some is not good.
struct Scale {
  u32 stored;
  float scale, minimum;
};
__device__ __forceinline__ Scale scale_of(float low, float high, bool good) {
  const u16 bottom = to_bf16(low);
  const float minimum = from_bf16(bottom), exact = fmaxf(__fdiv_rn(high, 15.f) - __fdiv_rn(minimum, 15.f), TINY);
  const u16 scale = to_bf16(good && finite(exact) ? exact : __int_as_float(0x7FC00000));
  return {scale | (u32)bottom << 16, from_bf16(scale), minimum};
}
__device__ __forceinline__ int code_of(float f, const Scale& by) {
  return code(__fdiv_rn(f - by.minimum, by.scale), 0, 15);
}

#ifdef BLOCK
__device__ __forceinline__ float value_of(int code, u32 stored) {
  return __fadd_rn(__fmul_rn(code, from_bf16((u16)stored)), from_bf16((u16)(stored >> 16)));
}
__device__ __forceinline__ void store(u8* window, size_t at, float low, float high) { // two neighbours
#if WINDOW == 2
  *(float2*)(window + at * 4) = make_float2(low, high);
#elif WINDOW == 1
  u32 v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  *(u32*)(window + at * 2) = v;
#else
  *(u32*)(window + at * 2) = to_bf16(low) | (u32)to_bf16(high) << 16;
#endif
}

// input [B, H, HEAD] by its strides, for positions [B] by theirs -> window [B, H, BLOCK, HEAD] and held [B]; where a row
// goes to another block, its window -> codes [B, H, P, HEAD] and scales [B, H, P / BLOCK, HEAD] first, and the window has
// what is in the other one. Each thread has two channels of a head. Grid: B.
extern "C" __global__ void __launch_bounds__(THREADS)
kv_step(const u8* input, const long long* positions, u8* codes, u32* scales, u8* window, long long* held, int H, int P,
        int row_stride, int head_stride, int position_stride) {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const int b = blockIdx.x;
  const long long position = positions[(size_t)b * position_stride];
  if (position < 0 || position >= P) {
    if (threadIdx.x == 0)
      __assertfail("a position is outside of the KV cache: make it longer, or begin anew", "kv_update.cu", __LINE__,
                   "kv_step", 1);
    return;
  }
  const int now = (int)position / BLOCK, before = (int)held[b];
  for (int i = threadIdx.x; i < H * PAIRS; i += THREADS) {
    const int of_row = i / PAIRS, pair = i % PAIRS;
    const size_t head = (size_t)b * H + of_row, kept = head * BLOCK * HEAD + pair * 2; // in the window
    if (now != before) {
      float2 low = make_float2(__int_as_float(0x7F800000), __int_as_float(0x7F800000)), high = make_float2(-low.x, -low.y);
      bool good_x = true, good_y = true;
#pragma unroll 16
      for (int t = 0; t < BLOCK; t++) {
        const float2 x = load<WINDOW>(window, kept + t * HEAD);
        low = make_float2(fminf(low.x, x.x), fminf(low.y, x.y));
        high = make_float2(fmaxf(high.x, x.x), fmaxf(high.y, x.y));
        good_x &= finite(x.x), good_y &= finite(x.y);
      }
      const Scale even = scale_of(low.x, high.x, good_x), odd = scale_of(low.y, high.y, good_y);
      u32* of_channel = scales + (head * (P / BLOCK) + before) * HEAD + pair * 2;
      of_channel[0] = even.stored, of_channel[1] = odd.stored;
      u8* to = codes + (head * P + before * BLOCK) * PAIRS + pair;
      const u8* from = codes + (head * P + now * BLOCK) * PAIRS + pair;
      of_channel = scales + (head * (P / BLOCK) + now) * HEAD + pair * 2;
      const u32 of_even = of_channel[0], of_odd = of_channel[1];
#pragma unroll 16
      for (int t = 0; t < BLOCK; t++) {
        const float2 x = load<WINDOW>(window, kept + t * HEAD);
        to[t * PAIRS] = (u8)(code_of(x.x, even) | code_of(x.y, odd) << 4);
        const int both = from[t * PAIRS];
        store(window, kept + t * HEAD, value_of(both & 15, of_even), value_of(both >> 4, of_odd));
      }
    }
    const float2 x = load<INPUT>(input, (size_t)b * row_stride + (size_t)of_row * head_stride + pair * 2);
    store(window, kept + position % BLOCK * HEAD, x.x, x.y);
  }
  __syncthreads(); // all have read which block it was
  if (threadIdx.x == 0) held[b] = now;
}
#else

// input [B, H, T, HEAD] by its strides; positions [B, T] by the stride of B -> codes and scales of a cache
// [B, H, S, HEAD]; codes whose scale is NaN are 0. Grid: enough warps for B H T.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
kv_store(const u8* input, const long long* positions, u8* codes, u8* scales, int heads, int H, int T, int S,
          int row_stride, int head_stride, int token_stride, int position_stride) {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const int lane = threadIdx.x % 32, warp = blockIdx.x * WARPS + threadIdx.x / 32;
  if (warp >= heads * T) return;
  const int head = warp / T, t = warp % T, b = head / H;
  const long long position = positions[(size_t)b * position_stride + t];
  if (position < 0 || position >= S) {
    if (lane == 0)
      __assertfail("a position is outside of the KV cache: make it longer, or begin anew", "kv_update.cu", __LINE__,
                   "kv_store", 1);
    return;
  }
  const size_t at = (size_t)b * row_stride + (size_t)(head % H) * head_stride + (size_t)t * token_stride;
  const size_t to = (size_t)head * S + position;
  float2 x[TURNS];
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
    const int pair = i * 32 + lane;
    x[i] = pair < PAIRS ? load<INPUT>(input, at + pair * 2) : make_float2(0, 0);
  }
#pragma unroll
  for (int i = 0; i < TURNS; i += OF_TURN) {
    const bool first = lane % LANES == 0 && i * 32 + lane < PAIRS;
    const size_t group = to * (HEAD / GROUP) + (GROUP == HEAD ? 0 : (i * 32 + lane) / LANES);
#if KIND == 2
    float low = __int_as_float(0x7F800000), high = -low;
    bool good = true;
#pragma unroll
    for (int j = i; j < i + OF_TURN; j++)
      if (j * 32 + lane < PAIRS) {
        low = fminf(low, fminf(x[j].x, x[j].y)), high = fmaxf(high, fmaxf(x[j].x, x[j].y));
        good &= finite(x[j].x) & finite(x[j].y);
      }
    for (int other = LANES / 2; other; other /= 2) {
      low = fminf(low, __shfl_xor_sync(~0u, low, other)), high = fmaxf(high, __shfl_xor_sync(~0u, high, other));
      good &= (bool)__shfl_xor_sync(~0u, (int)good, other);
    }
    const Scale by = scale_of(low, high, good);
    if (first) ((u32*)scales)[group] = by.stored;
#pragma unroll
    for (int j = i; j < i + OF_TURN; j++)
      if (j * 32 + lane < PAIRS) {
        codes[to * PAIRS + j * 32 + lane] = (u8)(code_of(x[j].x, by) | code_of(x[j].y, by) << 4);
      }
#else
    int most = 0; // the bits of magnitudes are ordered as they are, NaN above all
#pragma unroll
    for (int j = i; j < i + OF_TURN; j++)
      most = max(most, max(__float_as_int(x[j].x) & 0x7FFFFFFF, __float_as_int(x[j].y) & 0x7FFFFFFF));
    for (int other = LANES / 2; other; other /= 2) most = max(most, __shfl_xor_sync(~0u, most, other));
    const float largest = __int_as_float(most);
    const float scale = finite(largest) ? fmaxf(__fdiv_rn(largest, LARGEST), TINY) : __int_as_float(0x7FC00000);
    const float inverse = __frcp_rn(scale);
    if (first) ((float*)scales)[group] = scale;
#pragma unroll
    for (int j = i; j < i + OF_TURN; j++)
      if (j * 32 + lane < PAIRS) {
        u16 both;
#if KIND == 0
        both = (u8)code(x[j].x * inverse, -127, 127) | (u8)code(x[j].y * inverse, -127, 127) << 8;
#else
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(x[j].y * inverse), "f"(x[j].x * inverse));
        if (!finite(largest)) both = 0;
#endif
        ((u16*)codes)[to * PAIRS + j * 32 + lane] = both;
      }
#endif
  }
}
#endif
