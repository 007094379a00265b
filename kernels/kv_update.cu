// New keys or values into a packed cache (kv_cache.py): a warp quantizes a head of a token and stores it.
//
// Defines: INPUT (0: bf16, 1: fp16, 2: fp32), KIND (0: int8, 1: e4m3, 2: int4), HEAD (a multiple of 16), GROUP (d that
// share a scale: all of HEAD, or 32 or 64), WARPS.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#define PAIRS (HEAD / 2)
#define TURNS ((PAIRS + 31) / 32) // of a warp, two neighbours for each lane
#define LANES (GROUP == HEAD ? 32 : GROUP / 2) // that share a scale
#define OF_TURN (GROUP == HEAD ? TURNS : 1)    // turns that do
#define LARGEST (KIND == 0 ? 127.f : 448.f)
#define TINY 1.17549435e-38f

extern "C" __device__ void __assertfail(const char* what, const char* file, u32 line, const char* function,
                                       size_t size);

__device__ __forceinline__ float2 load(const void* p) {
#if INPUT == 2
  return make_float2(((const float*)p)[0], ((const float*)p)[1]);
#else
  const u16 low = ((const u16*)p)[0], high = ((const u16*)p)[1];
#if INPUT == 1
  float2 f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f.x) : "h"(low));
  asm("cvt.f32.f16 %0, %1;" : "=f"(f.y) : "h"(high));
  return f;
#else
  return make_float2(__uint_as_float((u32)low << 16), __uint_as_float((u32)high << 16));
#endif
#endif
}
__device__ __forceinline__ u16 to_bf16(float f) {
  u16 v;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
  return v;
}
__device__ __forceinline__ float from_bf16(u16 v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ bool finite(float f) { return fabsf(f) <= 3.402823466e+38f; }
__device__ __forceinline__ int code(float f, int least, int most) { return min(max(__float2int_rn(f), least), most); }

// input [B, H, T, HEAD] by its strides; positions [B, T] by the stride of B -> codes and scales of a cache
// [B, H, S, HEAD]; codes whose scale is NaN are 0. Grid: enough warps for B H T.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
kv_store(const u8* input, const long long* positions, u8* codes, u8* scales, int heads, int H, int T, int S,
          int row_stride, int head_stride, int token_stride, int position_stride) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
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
    x[i] = pair < PAIRS ? load(input + (at + pair * 2) * (INPUT == 2 ? 4 : 2)) : make_float2(0, 0);
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
    const u16 stored = to_bf16(low);
    const float minimum = from_bf16(stored), exact = fmaxf(__fdiv_rn(high, 15.f) - __fdiv_rn(minimum, 15.f), TINY);
    const u16 of_scale = to_bf16(good && finite(exact) ? exact : __int_as_float(0x7FC00000));
    const float scale = from_bf16(of_scale);
    if (first) ((u32*)scales)[group] = of_scale | (u32)stored << 16;
#pragma unroll
    for (int j = i; j < i + OF_TURN; j++)
      if (j * 32 + lane < PAIRS) {
        const int even = code(__fdiv_rn(x[j].x - minimum, scale), 0, 15);
        const int odd = code(__fdiv_rn(x[j].y - minimum, scale), 0, 15);
        codes[to * PAIRS + j * 32 + lane] = (u8)(even | odd << 4);
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
