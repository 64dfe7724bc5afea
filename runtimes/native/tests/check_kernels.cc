// Every kernel on small odd sizes against loops on the CPU, without Python around it: what compute-sanitizer should run.
//
//   cmake -S runtimes/native -B build/native -DMODCOMPILE_TESTS=ON -DCMAKE_CUDA_ARCHITECTURES=native
//   cmake --build build/native
//   for tool in memcheck racecheck synccheck initcheck; do
//     compute-sanitizer --tool $tool --error-exitcode 1 build/native/check_kernels
//   done

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "modcompile_kernels.h"

namespace {

#define CHECK(condition)                                                     \
  do {                                                                       \
    if (!(condition)) {                                                      \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);   \
      std::exit(1);                                                          \
    }                                                                        \
  } while (false)

// Device memory of exactly its size, so that one byte too far is out of bounds.
template <typename T>
class OnDevice {
 public:
  explicit OnDevice(size_t count) : count_(count) {
    CHECK(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)) == cudaSuccess);
  }
  explicit OnDevice(const std::vector<T>& values) : OnDevice(values.size()) {
    CHECK(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
  }
  ~OnDevice() { cudaFree(data_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  T* get() const { return data_; }
  std::vector<T> values() const {
    std::vector<T> values(count_);
    CHECK(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

std::mt19937 generator(5);

std::vector<float> normal(size_t count) {
  std::normal_distribution<float> distribution;
  std::vector<float> values(count);
  for (float& value : values) value = std::round(distribution(generator) * 100) / 100;  // so that some tie
  return values;
}

std::vector<uint8_t> mask(size_t count) {
  std::vector<uint8_t> values(count);
  for (uint8_t& value : values) value = generator() % 10 < 7;
  return values;
}

// The contract, for logits that are numbers.
std::vector<int64_t> routed(const float* logits, const uint8_t* valid, size_t rows, size_t capacity) {
  std::vector<int64_t> order(rows);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [=](int64_t a, int64_t b) {
    return valid[a] != valid[b] ? valid[a] > valid[b] : logits[a] > logits[b];
  });
  order.resize(capacity);
  std::sort(order.begin(), order.end());
  return order;
}

void check_routed(const std::vector<float>& logits, const std::vector<uint8_t>& valid,
                  const OnDevice<int64_t>& positions, const OnDevice<uint8_t>& filled, size_t batch, size_t rows,
                  size_t capacity) {
  const auto found = positions.values();
  const auto found_filled = filled.values();
  for (size_t b = 0; b < batch; ++b) {
    const auto expected = routed(&logits[b * rows], &valid[b * rows], rows, capacity);
    for (size_t k = 0; k < capacity; ++k) {
      CHECK(found[b * capacity + k] == expected[k]);
      CHECK(found_filled[b * capacity + k] == valid[b * rows + static_cast<size_t>(expected[k])]);
    }
  }
}

void check(size_t batch, size_t rows, size_t capacity, size_t width) {
  const auto b = static_cast<int64_t>(batch), s = static_cast<int64_t>(rows), k = static_cast<int64_t>(capacity),
             d = static_cast<int64_t>(width);
  const auto logits = normal(batch * rows), x = normal(batch * rows * width), y = normal(batch * capacity * width);
  const auto weight = normal(width), gate = normal(batch * capacity);
  const auto valid = mask(batch * rows);
  const OnDevice<float> logits_there(logits), x_there(x), y_there(y), weight_there(weight), gate_there(gate);
  const OnDevice<float> bias_there(std::vector<float>{1});
  const OnDevice<uint8_t> valid_there(valid), filled(batch * capacity);
  const OnDevice<int64_t> positions(batch * capacity);

  CHECK(modcompile_route(logits_there.get(), valid_there.get(), positions.get(), 8, filled.get(), b, s, k, nullptr) ==
        cudaSuccess);
  check_routed(logits, valid, positions, filled, batch, rows, capacity);

  const OnDevice<uint32_t> workspace(std::vector<uint32_t>(modcompile_route_rows_workspace(b, s) / 4));
  const OnDevice<float> own_logits(batch * rows);
  for (int launch = 0; launch < 2; ++launch) {
    CHECK(modcompile_route_rows(x_there.get(), MODCOMPILE_FLOAT32, weight_there.get(), bias_there.get(),
                                valid_there.get(), own_logits.get(), positions.get(), 8, filled.get(), b, s, d, k,
                                workspace.get(), nullptr) == cudaSuccess);
    check_routed(own_logits.values(), valid, positions, filled, batch, rows, capacity);
  }

  // The sum of x and x, whose logits are those of a router of twice the weight.
  const OnDevice<float> summed_there(batch * rows * width), all_normed_there(batch * rows * width);
  for (int launch = 0; launch < 2; ++launch) {
    CHECK(modcompile_sum_norm_route_rows(x_there.get(), x_there.get(), nullptr, MODCOMPILE_FLOAT32, weight_there.get(),
                                         nullptr, 1e-5f, 1, weight_there.get(), bias_there.get(), valid_there.get(),
                                         summed_there.get(), all_normed_there.get(), own_logits.get(), positions.get(),
                                         8, filled.get(), b, s, d, k, workspace.get(), nullptr) == cudaSuccess);
    check_routed(own_logits.values(), valid, positions, filled, batch, rows, capacity);
  }
  const auto summed = summed_there.values();
  for (size_t i = 0; i < summed.size(); ++i) CHECK(summed[i] == 2 * x[i]);

  const OnDevice<float> rows_there(batch * capacity * width), merged_there(batch * rows * width);
  CHECK(modcompile_gather_rows(x_there.get(), positions.get(), 8, rows_there.get(), b, s, k, d * 4, nullptr) ==
        cudaSuccess);
  const OnDevice<float> again_there(batch * capacity * width), normed_there(batch * capacity * width);
  CHECK(modcompile_gather_norm_rows(x_there.get(), MODCOMPILE_FLOAT32, positions.get(), 8, weight_there.get(), nullptr,
                                    1e-5f, 1, again_there.get(), normed_there.get(), b, s, k, d, nullptr) ==
        cudaSuccess);
  CHECK(modcompile_merge_rows(x_there.get(), y_there.get(), positions.get(), 8, gate_there.get(), merged_there.get(),
                              MODCOMPILE_FLOAT32, b, s, k, d, nullptr, nullptr) == cudaSuccess);
  CHECK(modcompile_merge_rows(x_there.get(), y_there.get(), positions.get(), 8, gate_there.get(), x_there.get(),
                              MODCOMPILE_FLOAT32, b, s, k, d, nullptr, nullptr) == cudaSuccess);
  const OnDevice<float> pair_there(x), other_there(x);
  CHECK(modcompile_merge_row_pairs(pair_there.get(), y_there.get(), other_there.get(), y_there.get(), positions.get(), 8,
                                   gate_there.get(), pair_there.get(), other_there.get(), MODCOMPILE_FLOAT32, b, s, k,
                                   d, nullptr) == cudaSuccess);
  const auto chosen = positions.values();
  auto expected = x;
  const auto gathered = rows_there.values();
  CHECK(again_there.values() == gathered);
  for (size_t slot = 0; slot < batch * capacity; ++slot) {
    float* row = &expected[(slot / capacity * rows + static_cast<size_t>(chosen[slot])) * width];
    for (size_t i = 0; i < width; ++i) {
      CHECK(gathered[slot * width + i] == row[i]);
      const volatile float product = gate[slot] * (y[slot * width + i] - row[i]);  // rounded, not fused
      row[i] = gate[slot] == 1 ? y[slot * width + i] : row[i] + product;
    }
  }
  CHECK(merged_there.values() == expected);
  CHECK(x_there.values() == expected);
  CHECK(pair_there.values() == expected);
  CHECK(other_there.values() == expected);
}

}  // namespace

int main() {
  check(1, 1, 1, 1);
  check(3, 33, 5, 7);
  check(2, 1000, 125, 24);
  check(2, 70, 9, 1024);
  check(1, 70, 9, 2048);
  check(2, 2048, 2048, 8);
  check(2, 5000, 4999, 4);
  check(1, 12000, 1500, 3);
  check(1, 17000, 2125, 4);
  std::printf("all agree\n");
}
