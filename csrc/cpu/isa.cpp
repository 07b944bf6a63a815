#include "isa.h"

#include <atomic>
#include <cstring>

#if defined(Q8_HAVE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gptj_q8 {
namespace {

#define Q8_KERNELS(isa)                                                                \
  Kernels {                                                                            \
    #isa, isa::quantize, isa::histogram, isa::dequantize, isa::embedding, isa::linear, \
        isa::linear_grad_input, isa::adam_step                                         \
  }

bool always() {
  return true;
}

// __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the registers.
#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

[[maybe_unused]] bool has_avx512bw() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("bmi2");
}

[[maybe_unused]] bool has_avx512() {
  return has_avx512bw() && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512bf16");
}

#if defined(Q8_HAVE_AMX)
// Linux saves the tile registers of processes that have asked for them, and of no others. Asking,
// as PyTorch's own products do too, needs larger stacks for signals from then on (12 KB;
// sigaltstack refuses smaller ones), and is refused where a thread has a smaller one already.
bool has_amx() {
#if defined(Q8_TILES)
  return has_avx512();
#else
  constexpr int kAskForPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  unsigned a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) && (d & kBf16) &&
         syscall(SYS_arch_prctl, kAskForPermission, kTileData) == 0;
#endif
}
#endif
#endif

struct Isa {
  Kernels kernels;
  bool (*usable)();
};

// Best first. setup.py defines Q8_HAVE_<ISA> for those it compiles.
const Isa kIsas[] = {
#if defined(Q8_HAVE_AMX)
    {{"amx", avx512::quantize, avx512::histogram, avx512::dequantize, avx512::embedding,
      amx::linear, amx::linear_grad_input, avx512::adam_step},
     has_amx},
#endif
#if defined(Q8_HAVE_AVX512)
    {Q8_KERNELS(avx512), has_avx512},
#endif
#if defined(Q8_HAVE_AVX512BW)
    {Q8_KERNELS(avx512bw), has_avx512bw},
#endif
#if defined(Q8_HAVE_AVX2)
    {Q8_KERNELS(avx2), has_avx2},
#endif
#if defined(Q8_HAVE_NEON)
    {Q8_KERNELS(neon), always},
#endif
    {Q8_KERNELS(portable), always},
};

const Kernels* best() {
  for (const Isa& isa : kIsas) {
    if (isa.usable()) return &isa.kernels;
  }
  return nullptr;  // not reached: portable is always usable
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* now = chosen.load(std::memory_order_acquire);
  if (now == nullptr) {
    now = best();
    chosen.store(now, std::memory_order_release);
  }
  return *now;
}

bool select_isa(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    chosen.store(best(), std::memory_order_release);
    return true;
  }
  for (const Isa& isa : kIsas) {
    if (std::strcmp(name, isa.kernels.name) == 0 && isa.usable()) {
      chosen.store(&isa.kernels, std::memory_order_release);
      return true;
    }
  }
  return false;
}

const char* usable_isa(int i) {
  for (const Isa& isa : kIsas) {
    if (isa.usable() && i-- == 0) return isa.kernels.name;
  }
  return nullptr;
}

}  // namespace gptj_q8
