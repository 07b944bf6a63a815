// Runs every CPU kernel on heap buffers of exactly the right size, without Python or PyTorch, and
// compares with plain loops in double. Built with AddressSanitizer and UndefinedBehaviorSanitizer
// by test_cpu_build.py, so that one byte read or written outside a buffer ends it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../csrc/cpu/isa.h"

namespace {

using namespace gptj_q8;

std::mt19937 generator(1);

float normal() {
  return std::normal_distribution<float>()(generator);
}

// Three threads, whatever the machine, over three even pieces.
const Pool kThreads{[](int64_t count, int64_t, Pool::Task task, void* context) {
                      std::vector<std::thread> threads;
                      for (int i = 0; i < 3; ++i) {
                        const int64_t begin = count * i / 3, end = count * (i + 1) / 3;
                        if (begin < end) threads.emplace_back(task, context, begin, end);
                      }
                      for (std::thread& thread : threads) thread.join();
                    },
                    [] { return int64_t{3}; }};

template <class T>
std::vector<T> random_values(int64_t n) {
  std::vector<T> values(n);
  for (T& value : values) from_float(normal(), &value);
  return values;
}

int failures = 0;

void expect(bool right, const char* what, int64_t m, int64_t n, int64_t k, int shift) {
  if (right) return;
  ++failures;
  std::printf("%s: wrong at M=%lld N=%lld K=%lld block=%d\n", what, static_cast<long long>(m),
              static_cast<long long>(n), static_cast<long long>(k), 1 << shift);
}

double squares(const std::vector<double>& values) {
  double sum = 0;
  for (double value : values) sum += value * value;
  return sum;
}

// size: what errors are relative to, as a sum of squares.
template <class T>
bool close(const std::vector<T>& actual, const std::vector<double>& truth, double bound,
           double size) {
  double error = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    const double difference = to_float(actual[i]) - truth[i];
    error += difference * difference;
  }
  return std::sqrt(error) <= bound * std::sqrt(size);
}
template <class T>
bool close(const std::vector<T>& actual, const std::vector<double>& truth, double bound) {
  return close(actual, truth, bound, squares(truth));
}

// Whether these are the nearest levels, as near as their widest gap tells, and the right scales.
bool encodes(const std::vector<double>& truth, const std::vector<uint8_t>& codes,
             const std::vector<float>& absmax, int shift, const std::vector<float>& codebook) {
  const double gap = 1.0 / 128;
  std::vector<double> largest(absmax.size());
  for (size_t i = 0; i < truth.size(); ++i) {
    largest[i >> shift] = std::max(largest[i >> shift], std::abs(truth[i]));
  }
  for (size_t i = 0; i < truth.size(); ++i) {
    const double scale = largest[i >> shift];
    if (std::abs(absmax[i >> shift] - scale) > 1e-6 * scale) return false;
    const double within = std::clamp(truth[i], codebook[0] * scale, codebook[255] * scale);
    if (std::abs(codebook[codes[i]] * scale - within) > 0.501 * gap * scale) return false;
  }
  return true;
}

template <class T>
void check(DType dtype, double bound, int64_t m, int64_t n, int64_t k, int shift,
           const std::vector<float>& codebook) {
  const int64_t numel = n * k, blocks = ceil_div(numel, int64_t{1} << shift);
  const std::vector<T> weight = random_values<T>(numel);
  std::vector<uint8_t> codes(numel);
  std::vector<float> absmax(blocks);
  kernels().quantize(
      {weight.data(), dtype, numel, shift, codebook.data(), codes.data(), absmax.data()}, kThreads);
  std::vector<double> decoded(numel);
  bool nearest = true;
  for (int64_t i = 0; i < numel; ++i) {
    const float r = normalize(to_float(weight[i]), absmax[i >> shift]);
    int code = 0;
    while (code < 255 && midpoint(codebook[code], codebook[code + 1]) < r) ++code;
    nearest &= code == codes[i];
    decoded[i] = codebook[codes[i]] * absmax[i >> shift];
  }
  expect(nearest, "quantize", m, n, k, shift);

  const Weight matrix{codes.data(), absmax.data(), codebook.data(), shift, n, k};
  const Weight flat{codes.data(), absmax.data(), codebook.data(), shift, 1, numel};
  std::vector<T> values(numel);
  kernels().dequantize({flat, values.data(), dtype}, kThreads);
  expect(close(values, decoded, bound), "dequantize", m, n, k, shift);

  const std::vector<int64_t> ids{n - 1, 0};
  std::vector<T> rows(2 * k);
  kernels().embedding({ids.data(), 2, matrix, rows.data(), dtype}, kThreads);
  std::vector<double> chosen(decoded.end() - k, decoded.end());
  chosen.insert(chosen.end(), decoded.begin(), decoded.begin() + k);
  expect(close(rows, chosen, bound), "embedding", m, n, k, shift);

  const std::vector<T> x = random_values<T>(m * k), dy = random_values<T>(m * n);
  const std::vector<float> bias = random_values<float>(n);
  std::vector<T> y(m * n), dx(m * k);
  std::vector<double> y_truth(m * n), dx_truth(m * k);
  // Of terms: what they add up to may be near 0 where there are few.
  double y_size = 0, dx_size = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      y_truth[i * n + j] = bias[j];
      y_size += double{bias[j]} * bias[j];
      for (int64_t l = 0; l < k; ++l) {
        const double y_term = to_float(x[i * k + l]) * decoded[j * k + l];
        const double dx_term = to_float(dy[i * n + j]) * decoded[j * k + l];
        y_truth[i * n + j] += y_term;
        dx_truth[i * k + l] += dx_term;
        y_size += y_term * y_term;
        dx_size += dx_term * dx_term;
      }
    }
  }
  kernels().linear({x.data(), dtype, m, matrix, bias.data(), y.data()}, kThreads);
  expect(close(y, y_truth, 2 * bound, y_size), "linear", m, n, k, shift);
  kernels().linear_grad_input({dy.data(), dtype, m, matrix, dx.data()}, kThreads);
  expect(close(dx, dx_truth, 2 * bound, dx_size), "linear_grad_input", m, n, k, shift);

  std::vector<float> scratch(blocks);
  std::vector<int64_t> counts(64);
  kernels().histogram({weight.data(), dtype, numel, shift, 64, scratch.data(), counts.data()},
                      kThreads);
  std::vector<int64_t> counts_truth(64);
  const float largest = *std::max_element(absmax.begin(), absmax.end());
  for (int64_t i = 0; i < numel; ++i) {
    const float scale = absmax[i >> shift], relative = scale / largest;
    const float r = scale == 0 ? 0 : to_float(weight[i]) / scale;
    const int bin = std::min(63, static_cast<int>((r + 1) * 32));
    counts_truth[bin] += std::llrint(double{relative * relative} * (1 << 30));
  }
  expect(counts == counts_truth, "histogram", m, n, k, shift);

  std::vector<T> param = weight;
  std::vector<uint8_t> m_codes = codes, v_codes(numel, 200);
  std::vector<float> m_absmax = absmax, v_absmax(blocks, 1.0f);
  const double lr = 0.5, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, decay = 0.01;
  kernels().adam_step({param.data(), dtype, values.data(), dtype, numel, shift, m_codes.data(),
                       m_absmax.data(), v_codes.data(), v_absmax.data(), codebook.data(),
                       codebook.data(), lr, beta1, beta2, eps, decay, 3},
                      kThreads);
  std::vector<double> param_truth(numel), m_truth(numel), v_truth(numel);
  for (int64_t i = 0; i < numel; ++i) {
    const double g = to_float(values[i]), before = to_float(weight[i]);
    m_truth[i] = beta1 * decoded[i] + (1 - beta1) * g;
    v_truth[i] = beta2 * codebook[200] + (1 - beta2) * g * g;
    const double root = std::sqrt(v_truth[i] / (1 - std::pow(beta2, 3))) + eps;
    param_truth[i] = before * (1 - lr * decay) - lr / (1 - std::pow(beta1, 3)) * m_truth[i] / root;
  }
  expect(close(param, param_truth, bound), "adam_step", m, n, k, shift);
  expect(encodes(m_truth, m_codes, m_absmax, shift, codebook), "adam_step: m", m, n, k, shift);
  expect(encodes(v_truth, v_codes, v_absmax, shift, codebook), "adam_step: v", m, n, k, shift);
}

}  // namespace

// With arguments: of these instruction sets alone.
int main(int count, char** names) {
  std::vector<float> exact(256), arbitrary(256);
  for (int i = 0; i < 256; ++i) {
    arbitrary[i] = (i - 128) / 128.0f * 0.987654321f;
    exact[i] = (i - 128) / 128.0f;
  }
  const auto wanted = [&](const char* isa) {
    return count == 1 || std::any_of(names + 1, names + count,
                                     [&](const char* name) { return !std::strcmp(name, isa); });
  };
  const int64_t shapes[][3] = {{1, 1, 1},    {2, 3, 5},     {3, 7, 33},     {4, 65, 100},
                               {5, 17, 257}, {13, 66, 130}, {7, 130, 64},   {70, 5, 1030},
                               {6, 64, 512}, {1, 9, 4500},  {4, 12, 256},   {16, 40, 1100},
                               {5, 33, 64},  {33, 97, 832}, {81, 20, 1056}, {37, 301, 384}};
  for (int i = 0; usable_isa(i) != nullptr; ++i) {
    if (!wanted(usable_isa(i))) continue;
    select_isa(usable_isa(i));
    for (const auto& [m, n, k] : shapes) {
      for (int shift : {5, 6, 8, 12}) {
        for (const auto& codebook : {exact, arbitrary}) {
          check<float>(DType::float32, 5e-6, m, n, k, shift, codebook);
          check<bf16>(DType::bfloat16, 4e-3, m, n, k, shift, codebook);
          check<f16>(DType::float16, 5e-4, m, n, k, shift, codebook);
        }
      }
    }
    // Several strips for each thread, and more rows than one pass takes.
    check<bf16>(DType::bfloat16, 4e-3, 66, 1700, 32, 5, exact);
    check<bf16>(DType::bfloat16, 4e-3, 520, 70, 50, 5, arbitrary);
    // A gradient over several panels of the reduction: 27 panels of columns, nine for each thread.
    check<float>(DType::float32, 5e-6, 5, 1100, 1701, 8, exact);
    check<bf16>(DType::bfloat16, 4e-3, 5, 1100, 1701, 8, exact);
    check<bf16>(DType::bfloat16, 4e-3, 5, 1100, 1701, 6, arbitrary);
    // Its strips of columns with one scale in each row: two passes of rows, two panels of the
    // reduction.
    check<float>(DType::float32, 5e-6, 530, 520, 384, 7, exact);
    check<f16>(DType::float16, 5e-4, 530, 520, 384, 7, exact);
    std::printf("%s: %d failures\n", usable_isa(i), failures);
  }
  return failures == 0 ? 0 : 1;
}
