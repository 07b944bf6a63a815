// Runs every CUDA op on device buffers of exactly the right size, without Python or PyTorch, and
// compares with plain loops in double: what compute-sanitizer looks at, which slows all it watches.
// benchmarks/sanitizer.py builds it with nvcc; test_cuda_driver.py runs it on the CPU emulator.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../csrc/common/format.h"
#include "../csrc/cuda/kernels.h"

namespace {

using namespace gptj_q8;

std::mt19937 generator(1);
int failures = 0;

void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("CUDA: %s\n", cudaGetErrorString(error));
  std::exit(2);
}

#if defined(Q8_CUDA_ON_CPU)
void* allocate(size_t bytes) {
  return std::malloc(bytes);
}
void release(void* p) {
  std::free(p);
}
void copy(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
}
#else
void* allocate(size_t bytes) {
  void* p = nullptr;
  must(cudaMalloc(&p, bytes));
  return p;
}
void release(void* p) {
  must(cudaFree(p));
}
void copy(void* to, const void* from, size_t bytes) {
  must(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));  // waits for the kernels before it
}
#endif

// An array on the device; null if it is empty, as the ops want it.
template <class T>
class Array {
 public:
  explicit Array(const std::vector<T>& values)
      : size_(values.size()), p_(size_ ? allocate(bytes()) : nullptr) {
    if (p_) copy(p_, values.data(), bytes());
  }
  explicit Array(size_t size) : Array(std::vector<T>(size)) {}
  Array(const Array&) = delete;
  ~Array() {
    if (p_) release(p_);
  }
  T* get() const { return static_cast<T*>(p_); }
  std::vector<T> values() const {
    std::vector<T> found(size_);
    copy(found.data(), p_, bytes());
    return found;
  }

 private:
  size_t bytes() const { return size_ * sizeof(T); }
  size_t size_;
  void* p_;
};

template <class T>
std::vector<T> random_values(int64_t n) {
  std::vector<T> values(n);
  std::normal_distribution<float> normal;
  for (T& value : values) from_float(normal(generator), &value);
  return values;
}

template <class T>
void expect(const Array<T>& actual, const std::vector<double>& truth, double bound,
            const char* what, int64_t m, int64_t n, int64_t k) {
  const std::vector<T> values = actual.values();
  double error = 0, size = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    const double difference = to_float(values[i]) - truth[i];
    error += difference * difference;
    size += truth[i] * truth[i];
  }
  if (std::sqrt(error) <= bound * std::sqrt(size)) return;  // a NaN fails
  ++failures;
  std::printf("%s: wrong at M=%d N=%d K=%d\n", what, static_cast<int>(m), static_cast<int>(n),
              static_cast<int>(k));
}

template <class T>
void check(DType dtype, double bound, int64_t m, int64_t n, int64_t k, int shift) {
  const int64_t numel = n * k, blocks = (numel + (int64_t{1} << shift) - 1) >> shift;
  std::vector<float> levels(256);
  for (int i = 0; i < 256; ++i) levels[i] = static_cast<float>((i - 128) / 128.0);
  const Array<float> codebook(levels);
  const std::vector<T> w = random_values<T>(numel);
  const Array<T> weight(w);
  Array<uint8_t> codes(numel);
  Array<float> absmax(blocks);
  must(cuda::quantize(
      {weight.get(), dtype, numel, shift, codebook.get(), codes.get(), absmax.get()}, nullptr));
  const std::vector<uint8_t> index = codes.values();
  const std::vector<float> scale = absmax.values();
  std::vector<double> decoded(numel);
  for (int64_t i = 0; i < numel; ++i) {
    decoded[i] = levels[index[i]] * scale[i >> shift];
    // A level is at most 1/256 of the scale away; the last one below 1 is 1/128 away from it.
    const double off = std::abs(decoded[i] - to_float(w[i]));
    if (off > scale[i >> shift] / 127.0) ++failures, std::printf("quantize: wrong\n");
  }

  const Weight matrix{codes.get(), absmax.get(), codebook.get(), shift, n, k};
  const Weight flat{codes.get(), absmax.get(), codebook.get(), shift, 1, numel};
  Array<T> out(numel);
  must(cuda::dequantize({flat, out.get(), dtype}, nullptr));
  expect(out, decoded, bound, "dequantize", m, n, k);

  const Array<int64_t> ids(std::vector<int64_t>{n - 1, 0});
  Array<T> rows(2 * k);
  must(cuda::embedding({ids.get(), true, 2, matrix, rows.get(), dtype}, nullptr));
  std::vector<double> chosen(decoded.end() - k, decoded.end());
  chosen.insert(chosen.end(), decoded.begin(), decoded.begin() + k);
  expect(rows, chosen, bound, "embedding", m, n, k);

  const std::vector<T> x = random_values<T>(m * k), dy = random_values<T>(m * n);
  const std::vector<float> bias = random_values<float>(n);
  std::vector<double> y_truth(m * n), dx_truth(m * k);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      y_truth[i * n + j] = bias[j];
      for (int64_t l = 0; l < k; ++l) {
        y_truth[i * n + j] += to_float(x[i * k + l]) * decoded[j * k + l];
        dx_truth[i * k + l] += to_float(dy[i * n + j]) * decoded[j * k + l];
      }
    }
  }
  cuda::Gpu gpu;
  must(cuda::current_gpu(&gpu));
  const Array<T> x_there(x), dy_there(dy);
  const Array<float> bias_there(bias);
  Array<T> y(m * n), dx(m * k);
  const cuda::LinearArgs linear{x_there.get(),    dtype,          m,      matrix,
                                bias_there.get(), DType::float32, y.get()};
  const Array<float> partial(cuda::linear_partials(linear, gpu));
  must(cuda::linear(linear, gpu, partial.get(), nullptr));
  expect(y, y_truth, 2 * bound, "linear", m, n, k);
  const LinearGradInputArgs gradient{dy_there.get(), dtype, m, matrix, dx.get()};
  const Array<float> partial_dx(cuda::linear_grad_input_partials(gradient, gpu));
  must(cuda::linear_grad_input(gradient, gpu, partial_dx.get(), nullptr));
  expect(dx, dx_truth, 2 * bound, "linear_grad_input", m, n, k);

  Array<float> scratch(blocks), largest(1);
  Array<int64_t> counts(64);
  must(cuda::histogram({weight.get(), dtype, numel, shift, 64, scratch.get(), counts.get()},
                       largest.get(), nullptr));
  if (scratch.values() != scale) ++failures, std::printf("histogram: wrong\n");

  // A zero gradient and no decay leave a parameter as it is.
  const Array<T> param(w), grad(std::vector<T>(numel, T{}));
  std::vector<float> positive(256);
  for (int i = 0; i < 256; ++i) positive[i] = static_cast<float>(i / 255.0);
  const Array<float> v_codebook(positive);
  Array<uint8_t> m_codes(std::vector<uint8_t>(numel, 128)), v_codes(numel);
  Array<float> m_absmax(blocks), v_absmax(blocks);
  must(cuda::adam_step({param.get(), dtype, grad.get(), dtype, numel, shift, m_codes.get(),
                        m_absmax.get(), v_codes.get(), v_absmax.get(), codebook.get(),
                        v_codebook.get(), 1e-3, 0.9, 0.999, 1e-8, 0.0, 1},
                       nullptr));
  const std::vector<T> after = param.values();
  if (std::memcmp(after.data(), w.data(), numel * sizeof(T)) != 0) {
    ++failures;
    std::printf("adam_step: wrong\n");
  }
}

}  // namespace

int main() {
  // For each kernel of a product: one row, a few, tensor cores, wgmma where there is, and what fits
  // none (odd columns).
  struct Size {
    int64_t m, n, k;
    int shift;
  };
  for (const Size& s : {Size{1, 64, 512, 8}, Size{4, 33, 256, 5}, Size{20, 96, 256, 8},
                        Size{66, 136, 384, 8}, Size{3, 37, 50, 7}}) {
    check<float>(DType::float32, 1e-5, s.m, s.n, s.k, s.shift);
    check<bf16>(DType::bfloat16, 3e-3, s.m, s.n, s.k, s.shift);
    check<f16>(DType::float16, 4e-4, s.m, s.n, s.k, s.shift);
  }
  std::printf(failures ? "%d results are wrong\n" : "every result is right\n", failures);
  return failures ? 1 : 0;
}
