// wgmma on the CPU, as the PTX manual describes it in "Asynchronous Warpgroup Level Matrix
// Multiply-Accumulate Instructions". Nothing is computed before the wait; until then D holds a NaN,
// and nothing of A, B or D may change.
#pragma once

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

namespace gptj_q8::cuda {

constexpr bool kHasWgmma = true;
constexpr int kWarpgroup = 128;

inline void fence_async_proxy(Q8_HERE) {
  if (!emulated::left_out(site)) emulated::show_copies();
}
inline void wgmma_fence(Q8_HERE) {
  if (!emulated::left_out(site)) emulated::set_registers_fenced(true);
}

struct Commit {
  static void together(Commit**, int) { emulated::commit_work(); }
};
inline void wgmma_commit(Q8_HERE) {
  Commit mine;
  emulated::collect(kWarpgroup, mine, site);
  emulated::set_registers_fenced(false);
}

struct Finish {
  static void together(Finish**, int) { emulated::finish_work(); }
};
template <int Count>
void wgmma_wait(float (&)[Count][8][4], Q8_HERE) {
  if (emulated::left_out(site)) return;
  Finish mine;
  emulated::collect(kWarpgroup, mine, site);
}

// B [64, 16] of 16-bit values in shared memory, k along the rows, from its descriptor.
class DescribedMatrix {
 public:
  DescribedMatrix(uint64_t descriptor, emulated::Site site) {
    const auto bits = [&](int from, int count) {
      return static_cast<uint32_t>(descriptor >> from & ((uint64_t{1} << count) - 1));
    };
    start_ = bits(0, 14) << 4;
    // Bits 16 to 29, the distance between the two halves of k, mean nothing in this layout.
    eight_rows_ = bits(32, 14) << 4;
    if (bits(62, 2) != 1 || bits(49, 3) != 0) {
      emulated::fail(site, "only rows of 128 bytes, exchanged as they begin, are emulated");
    }
    if (bits(14, 2) != 0 || bits(30, 2) != 0 || bits(46, 3) != 0 || bits(52, 10) != 0) {
      emulated::fail(site, "unused bits of the descriptor are set");
    }
    if (start_ % 1024 >= 128 || eight_rows_ % 1024 != 0) {
      emulated::fail(site, "the matrix does not begin with the pattern of eight rows");
    }
  }

  // Eight rows of 128 bytes follow each other, eight_rows_ from one such group to the next. The
  // hardware exchanges pieces of 16 bytes: bits 4 to 6 of an address take the exclusive or with
  // bits 7 to 9.
  const uint16_t* at(int row, int k) const {
    const uint32_t plain = start_ + row / 8 * eight_rows_ + row % 8 * 128 + 2 * k;
    const uint32_t place = plain ^ (plain >> 7 & 7) << 4;
    return reinterpret_cast<const uint16_t*>(emulated::shared_memory() + place);
  }

 private:
  uint32_t start_, eight_rows_;
};

// D[64, 64] += A[64, 16] @ B[64, 16].T. Warp w of the four has the rows 16 w and on: in each as
// mma_16x8x16 has of A; of D, as that has, for each eight rows of B.
template <class T>
struct Wgmma {
  float (*d)[4];
  const uint32_t* a;
  uint64_t b;
  emulated::Site site;

  static void together(Wgmma** lanes, int) {
    const Wgmma& first = *lanes[0];
    const DescribedMatrix matrix(first.b, first.site);
    emulated::check_copies_shown(first.site);
    Work work{first.site, matrix, {}, {}, {}, {}, {}};
    for (int lane = 0; lane < kWarpgroup; ++lane) {
      if (lanes[lane]->b != first.b) emulated::fail(first.site, "lanes differ in the descriptor");
      work.d[lane] = lanes[lane]->d;
      work.a_places[lane] = lanes[lane]->a;
      std::copy_n(lanes[lane]->a, 4, work.a[lane].begin());
      if (!is_pending(lanes[lane]->d)) {
        std::copy_n(&lanes[lane]->d[0][0], 32,
                    work.begun.emplace_back(lane, Sums{}).second.begin());
        std::fill_n(&lanes[lane]->d[0][0], 32, float_of(kPending));
      }
    }
    for (int row = 0; row < 64; ++row) {
      for (int k = 0; k < 16; ++k) work.b[row][k] = *matrix.at(row, k);
    }
    emulated::start_work([work] { work.finish(); });
  }

 private:
  static constexpr uint32_t kPending = 0x7fc0dead;
  using Sums = std::array<float, 32>;

  static bool is_pending(float (*d)[4]) {
    return std::all_of(&d[0][0], &d[0][0] + 32, [](float v) { return bits_of(v) == kPending; });
  }

  struct Work {
    emulated::Site site;
    DescribedMatrix matrix;
    std::array<float (*)[4], kWarpgroup> d;
    std::array<const uint32_t*, kWarpgroup> a_places;
    std::array<std::array<uint32_t, 4>, kWarpgroup> a;
    std::array<std::array<uint16_t, 16>, 64> b;
    std::vector<std::pair<int, Sums>> begun;  // lanes whose D nothing pending writes, and D

    void finish() const {
      for (const auto& [lane, sums] : begun) {
        if (!is_pending(d[lane])) emulated::fail(site, "D was changed before the wait");
        std::copy(sums.begin(), sums.end(), &d[lane][0][0]);
      }
      for (int row = 0; row < 64; ++row) {
        for (int k = 0; k < 16; ++k) {
          if (b[row][k] != *matrix.at(row, k)) emulated::fail(site, "B changed before the wait");
        }
      }
      for (int lane = 0; lane < kWarpgroup; ++lane) {
        if (!std::equal(a[lane].begin(), a[lane].end(), a_places[lane])) {
          emulated::fail(site, "A was changed before the wait");
        }
      }
      for (int lane = 0; lane < kWarpgroup; ++lane) {
        for (int i = 0; i < 32; ++i) {
          const int below = i % 4 / 2;  // row g of the warp's sixteen, or g + 8
          const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
          float sum = d[lane][i / 4][i % 4];
          for (int k = 0; k < 16; ++k) {
            const int owner = lane / 4 * 4 + k % 8 / 2;  // of A's row, in the same warp
            const float weight = unpack<T>(a[owner][k / 8 * 2 + below], k % 2);
            sum += weight * widen(T{b[column][k]});
          }
          d[lane][i / 4][i % 4] = sum;
        }
      }
    }
  };
};
template <class T>
void wgmma_64x64x16(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, Q8_HERE) {
  emulated::check_registers_fenced(site);
  Wgmma<T> mine{d, a, b, site};
  emulated::collect(kWarpgroup, mine, site);
}

}  // namespace gptj_q8::cuda
