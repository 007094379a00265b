// kernels/kv_attention.cu on a CPU: its grids, block after block, the threads of each in turn.

#include <functional>
#include <ucontext.h>

#include "kv_attention.cu"

#define TURNS 100000 // of all threads, after which they are taken to wait for each other

Index threadIdx, blockIdx;
std::vector<Warp> warps;
Meeting block;
int block_threads;
std::map<u32, Barrier> barriers;
alignas(1024) u8 shared[232448];
size_t shared_bytes;

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 17);
  bool ended;
};
std::vector<Thread> threads(1024);
ucontext_t scheduler;
std::function<void()> kernel, at_the_last_moment;
const char* failure;
bool waited; // whether the grids ahead have ended, for this block

void others() { swapcontext(&threads[threadIdx.x].context, &scheduler); }
void run() {
  try {
    kernel();
  } catch (const char* what) {
    failure = what;
  }
  threads[threadIdx.x].ended = true;
}
void wait_for_previous_grid() {
  if (!waited) at_the_last_moment();
  waited = true;
}

void grid(int blocks, int count, size_t bytes, std::function<void()> ahead, std::function<void()> of) {
  kernel = of, block_threads = count, shared_bytes = bytes;
  for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
    ahead();
    waited = false, warps.assign(count / 32, {}), block = {}, barriers.clear();
    memset(shared, 0xFF, sizeof shared); // NaN
    for (int i = 0; i < count; i++) {
      Thread& thread = threads[i];
      getcontext(&thread.context);
      thread.ended = false, thread.context.uc_link = &scheduler;
      thread.context.uc_stack.ss_sp = thread.stack.data(), thread.context.uc_stack.ss_size = thread.stack.size();
      makecontext(&thread.context, run, 0);
    }
    int left = count;
    for (int turns = 0; left; turns++) {
      if (turns == TURNS) fail("threads wait for each other");
      for (threadIdx.x = 0; threadIdx.x < count; threadIdx.x++)
        if (!threads[threadIdx.x].ended) {
          swapcontext(&scheduler, &threads[threadIdx.x].context);
          left -= threads[threadIdx.x].ended;
          if (failure) fail(failure);
        }
    }
  }
}

// positions become `late`, where that is not null, when a block has waited for the grids ahead. Returns what is wrong.
extern "C" const char* attention(const u16* q, const u8* k, int k_bytes, int k_width, int k_length, const u8* k_scales,
                                 const u8* v, int v_bytes, int v_width, const u8* v_scales, const u8* k_window,
                                 const long long* k_held, long long* positions, const long long* late,
                                 const long long* start, const u8* mask, const u8* sinks, u16* y, float* sums,
                                 float2* tops, float scale, float cap, int window, int blocks, int B, int H, int rows,
                                 int T, int S, int mask_row, int mask_head, int mask_token, int bytes) {
  const Matrix keys{k, (long)B * H * k_length, k_bytes, k_width}, values{v, (long)B * H * S, v_bytes, v_width};
  const std::vector<long long> before(positions, positions + B * T);
  const auto set = [&](const long long* to) { memcpy(positions, to, before.size() * sizeof *to); };
  at_the_last_moment = [&] { if (late) set(late); };
  const auto attend = [&] {
    kv_attend(q, keys, k_scales, values, v_scales, k_window, k_held, positions, start, mask, sinks, y, sums, tops, scale,
              cap, window, blocks, H, rows, T, S, mask_row, mask_head, mask_token);
  };
  const auto combine = [&] { kv_combine(sums, tops, sinks, y, blocks, H, rows, T); };
  failure = nullptr;
  try {
    grid(B * H * blocks, THREADS, bytes, [&] { set(before.data()); }, attend);
    if (blocks > 1) grid(B * H * rows, COMBINERS, 0, [] {}, combine);
  } catch (const char* what) {
    return what;
  }
  return nullptr;
}
