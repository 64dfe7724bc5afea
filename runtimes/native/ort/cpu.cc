// The ops on the CPU. One thread: where the residual stream is merged in place, as it mostly is, they read and write K
// rows and no more.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "ops.h"
#include "radix_select.h"

namespace modcompile {
namespace {

uint32_t key_of(float logit) {
  uint32_t bits;
  std::memcpy(&bits, &logit, sizeof(bits));
  return order_key(bits);
}

// One batch row. `keys` and `order` are scratch.
void route_row(const Route& op, int64_t batch_row, std::vector<uint32_t>& keys, std::vector<uint32_t>& order) {
  const float* logits = op.logits + batch_row * op.rows;
  const bool* valid = op.valid == nullptr ? nullptr : op.valid + batch_row * op.rows;
  std::transform(logits, logits + op.rows, keys.begin(), key_of);
  if (valid != nullptr) {
    const bool padding_enters = std::count(valid, valid + op.rows, true) < op.capacity;
    std::transform(keys.begin(), keys.end(), valid, keys.begin(),
                   [=](uint32_t key, bool is_valid) { return masked_key(key, is_valid, padding_enters); });
  }
  order = keys;
  const auto last = order.begin() + (op.capacity - 1);
  std::nth_element(order.begin(), last, order.end(), std::greater<>());
  const uint32_t threshold = *last;  // the K-th best key
  int64_t ties = op.capacity - std::count_if(keys.begin(), keys.end(), [=](uint32_t key) { return key > threshold; });

  int64_t* positions = op.positions + batch_row * op.capacity;
  bool* filled = op.filled + batch_row * op.capacity;
  for (int64_t row = 0; row < op.rows; ++row) {
    const uint32_t key = keys[static_cast<size_t>(row)];
    if (key < threshold || (key == threshold && ties-- <= 0)) continue;
    *positions++ = row;
    *filled++ = valid == nullptr || valid[row];
  }
}

// The type that an element's arithmetic is done in before it is rounded to the element.
template <typename T>
T widened(T value) { return value; }
float widened(Ort::Float16_t value) { return value.ToFloat(); }
float widened(Ort::BFloat16_t value) { return value.ToFloat(); }

// The logits of a linear router, for every row of the batch.
template <typename T>
void score(const RouteRows& op) {
  const auto* x = static_cast<const T*>(op.x);
  for (int64_t row = 0; row < op.route.batch * op.route.rows; ++row, x += op.width) {
    float sum = 0;
    for (int64_t i = 0; i < op.width; ++i) sum += widened(x[i]) * op.weight[i];
    op.logits[row] = sum + *op.bias;
  }
}

// Calls visit(slot, row) for every slot of the batch; both count from the first batch row on.
template <typename Visit>
void each_slot(const int64_t* positions, int64_t batch, int64_t rows, int64_t capacity, Visit visit) {
  for (int64_t slot = 0; slot < batch * capacity; ++slot) {
    const int64_t position = positions[slot];
    if (position < 0 || position >= rows) {
      ORT_CXX_API_THROW("position " + std::to_string(position) + " in slot " + std::to_string(slot % capacity) +
                            " is not one of " + std::to_string(rows) + " rows",
                        ORT_INVALID_ARGUMENT);
    }
    visit(slot, slot / capacity * rows + position);
  }
}

// A layer norm or an RMS norm of one row.
template <typename T>
void norm_row(const T* from, const T* weight, const T* bias, bool centered, float epsilon, int64_t size, T* normed) {
  const auto width = static_cast<double>(size);
  double mean = 0, squares = 0;
  for (int64_t i = 0; centered && i < size; ++i) mean += widened(from[i]) / width;
  for (int64_t i = 0; i < size; ++i) squares += (widened(from[i]) - mean) * (widened(from[i]) - mean);
  const double scale = 1 / std::sqrt(squares / width + epsilon);
  for (int64_t i = 0; i < size; ++i) {
    const double scaled = (widened(from[i]) - mean) * scale * widened(weight[i]);
    normed[i] = T(static_cast<float>(scaled + (bias == nullptr ? 0 : widened(bias[i]))));
  }
}

template <typename T>
void gather_norm(const GatherNormRows& op) {
  const auto* x = static_cast<const T*>(op.x);
  each_slot(op.positions, op.batch, op.rows, op.capacity, [&](int64_t slot, int64_t row) {
    const T* from = x + row * op.width;
    std::copy(from, from + op.width, static_cast<T*>(op.out) + slot * op.width);
    norm_row(from, static_cast<const T*>(op.weight), static_cast<const T*>(op.bias), op.centered, op.epsilon, op.width,
             static_cast<T*>(op.normed) + slot * op.width);
  });
}

template <typename T>
void sum_norm(const SumNormRouteRows& op) {
  const int64_t width = op.route.width;
  const auto* bias = static_cast<const T*>(op.product_bias);
  for (int64_t row = 0; row < op.route.route.batch * op.route.route.rows; ++row) {
    const T* residual = static_cast<const T*>(op.residual) + row * width;
    const T* product = static_cast<const T*>(op.product) + row * width;
    T* summed = static_cast<T*>(op.summed) + row * width;
    for (int64_t i = 0; i < width; ++i) {
      const float added = widened(product[i]) + (bias == nullptr ? 0.0f : widened(bias[i]));
      summed[i] = T(widened(residual[i]) + added);
    }
    norm_row(summed, static_cast<const T*>(op.norm_weight), static_cast<const T*>(op.norm_bias), op.centered,
             op.epsilon, width, static_cast<T*>(op.normed) + row * width);
  }
}

// x + gate * (y - x), each step rounded to T, as the reference rounds.
template <typename T>
T mix(T x, T y, T gate) {
  const T difference(widened(y) - widened(x));
  const T product(widened(gate) * widened(difference));
  return T(widened(x) + widened(product));
}

template <typename T>
void merge(const MergeRows& op) {
  const auto* x = static_cast<const T*>(op.x);
  const auto* y = static_cast<const T*>(op.y);
  const auto* gates = static_cast<const T*>(op.gate);
  auto* out = static_cast<T*>(op.out);
  if (out != x) std::memcpy(out, x, static_cast<size_t>(op.batch * op.rows * op.width) * sizeof(T));
  each_slot(op.positions, op.batch, op.rows, op.capacity, [&](int64_t slot, int64_t row) {
    const T gate = gates[slot];
    const T* updates = y + slot * op.width;
    T* merged = out + row * op.width;  // holds x
    if (widened(gate) == 1) {
      std::memcpy(merged, updates, static_cast<size_t>(op.width) * sizeof(T));
    } else if (widened(gate) != 0) {
      for (int64_t i = 0; i < op.width; ++i) merged[i] = mix(merged[i], updates[i], gate);
    }
  });
}

}  // namespace

void Cpu::run(const Route& op) const {
  std::vector<uint32_t> keys(static_cast<size_t>(op.rows)), order;
  for (int64_t batch_row = 0; batch_row < op.batch; ++batch_row) route_row(op, batch_row, keys, order);
}

void Cpu::run(const RouteRows& op, Kept&) const {
  if (op.element == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
    score<Ort::Float16_t>(op);
  } else if (op.element == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16) {
    score<Ort::BFloat16_t>(op);
  } else {
    score<float>(op);
  }
  run(op.route);
}

void Cpu::run(const SumNormRouteRows& op, Kept& kept) const {
  if (op.route.element == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
    sum_norm<Ort::Float16_t>(op);
  } else if (op.route.element == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16) {
    sum_norm<Ort::BFloat16_t>(op);
  } else {
    sum_norm<float>(op);
  }
  run(op.route, kept);
}

void Cpu::run(const GatherRows& op) const {
  const auto* x = static_cast<const char*>(op.x);
  auto* out = static_cast<char*>(op.out);
  each_slot(op.positions, op.batch, op.rows, op.capacity, [&](int64_t slot, int64_t row) {
    std::memcpy(out + slot * op.row_bytes, x + row * op.row_bytes, static_cast<size_t>(op.row_bytes));
  });
}

void Cpu::run(const GatherNormRows& op) const {
  if (op.element == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
    gather_norm<Ort::Float16_t>(op);
  } else if (op.element == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16) {
    gather_norm<Ort::BFloat16_t>(op);
  } else {
    gather_norm<float>(op);
  }
}

void Cpu::run(const MergeRows& op) const {
  switch (op.element) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return merge<float>(op);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return merge<Ort::Float16_t>(op);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return merge<Ort::BFloat16_t>(op);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE:
      return merge<double>(op);
    default:
      ORT_CXX_API_THROW("MergeRows has no kernel for this element type", ORT_NOT_IMPLEMENTED);
  }
}

void Cpu::run(const MergeRowPairs& op) const {
  MergeRows other = op.first;
  other.x = op.other_x;
  other.y = op.other_y;
  other.out = op.other_out;
  run(op.first);
  run(other);
}

}  // namespace modcompile
