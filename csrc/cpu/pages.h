// Huge pages for memory that is written once and read for every token.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstddef>
#include <cstdint>

namespace gptj_q8 {

// Asks Linux to back fresh memory with pages of 2 MB when it is first written. A product with one
// row reads each code once, so with pages of 4 KB it waits for the TLB. Only advice: where the
// system declines, or the memory was used before, nothing changes.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  constexpr size_t kHugePage = size_t{2} << 20;
  if (bytes < kHugePage) return;
  // Outwards to whole pages: areas side by side merge then, and a huge page may span two of them.
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(data) / page * page;
  const auto end = reinterpret_cast<uintptr_t>(data) + bytes;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace gptj_q8
