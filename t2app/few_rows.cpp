// A linear layer and a spectral edit for a few rows, bfloat16 weights and no 16-bit arithmetic in the CPU.
//
// Decoding multiplies one or two rows by every weight of the model, so a step costs what reading the weights costs, if
// each weight is read and widened once for all rows. Every row sums in the same order whatever the number of rows: what
// a row gets does not depend on its company.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t kRowsAtOnce = 4;
constexpr int64_t kWeightRowsAtOnce = 16;
// Fewer vectors than this are done before a second thread has woken up.
constexpr int64_t kVectorsPerThread = 200;

// Sixteen bfloat16 as two vectors of float32: the even elements (the low halves of 32-bit lanes) and the odd ones.
// Two cheap instructions where widening in order takes a shuffle for every eight; x is put in this order once instead.
inline __m256 even_elements(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 odd_elements(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
inline __m256i load_pairs(const uint16_t* source) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
}

// Where element i of a row stands once each block of sixteen holds its even elements first.
inline int64_t place(int64_t i) { return (i & ~int64_t{15}) + (i & 1) * 8 + ((i & 15) >> 1); }

std::vector<float> even_first(const at::BFloat16* x, int64_t rows, int64_t k) {
  std::vector<float> result(rows * k);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < k; ++i) result[r * k + place(i)] = x[r * k + i];
  return result;
}

inline float sum(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// One row of W (length k, a multiple of 16) against R rows of x in `even_first` order.
template <int R>
inline void products(const uint16_t* weights, const float* x, int64_t k, float* result) {
  __m256 even[R], odd[R];
  for (int r = 0; r < R; ++r) even[r] = odd[r] = _mm256_setzero_ps();
  for (int64_t i = 0; i < k; i += 16) {
    const __m256i pairs = load_pairs(weights + i);
    const __m256 first = even_elements(pairs), second = odd_elements(pairs);
    for (int r = 0; r < R; ++r) {
      even[r] = _mm256_fmadd_ps(first, _mm256_loadu_ps(x + r * k + i), even[r]);
      odd[r] = _mm256_fmadd_ps(second, _mm256_loadu_ps(x + r * k + i + 8), odd[r]);
    }
  }
  for (int r = 0; r < R; ++r) result[r] = sum(_mm256_add_ps(even[r], odd[r]));
}

void products(int64_t rows, const uint16_t* weights, const float* x, int64_t k, float* result) {
  switch (rows) {
    case 1: return products<1>(weights, x, k, result);
    case 2: return products<2>(weights, x, k, result);
    case 3: return products<3>(weights, x, k, result);
    default: return products<4>(weights, x, k, result);
  }
}

void check(const at::Tensor& x, const at::Tensor& matrix) {
  TORCH_CHECK(x.dim() == 2 && matrix.dim() == 2 && x.size(1) == matrix.size(1), "shapes do not match");
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && matrix.scalar_type() == at::kBFloat16, "bfloat16 was expected");
  TORCH_CHECK(matrix.is_contiguous() && x.size(1) % 16 == 0, "a contiguous matrix was expected, its rows of 16·n");
}

const uint16_t* bits(const at::Tensor& matrix) {
  return reinterpret_cast<const uint16_t*>(matrix.const_data_ptr<at::BFloat16>());
}

// y = x Wᵀ + b. x (rows, in_features) and weight (out_features, in_features) are contiguous bfloat16; in_features divides by 16.
at::Tensor few_rows_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  check(x, weight);
  const int64_t rows = x.size(0), k = x.size(1), n = weight.size(0);
  const at::Tensor x_in_order = x.contiguous();
  const std::vector<float> wide = even_first(x_in_order.const_data_ptr<at::BFloat16>(), rows, k);
  const at::Tensor wide_bias = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  at::Tensor y = at::empty({rows, n}, x.options());
  const uint16_t* w = bits(weight);
  const float* source = wide.data();
  const float* b = bias ? wide_bias.const_data_ptr<float>() : nullptr;
  auto* target = y.mutable_data_ptr<at::BFloat16>();
  at::parallel_for(0, n, 2 * kWeightRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; tile += kWeightRowsAtOnce) {
      const int64_t tile_end = std::min(tile + kWeightRowsAtOnce, end);
      for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
        const int64_t count = std::min(kRowsAtOnce, rows - row);
        for (int64_t o = tile; o < tile_end; ++o) {
          float result[kRowsAtOnce];
          products(count, w + o * k, source + row * k, k, result);
          for (int64_t r = 0; r < count; ++r) target[(row + r) * n + o] = result[r] + (b ? b[o] : 0.0f);
        }
      }
    }
  });
  return y;
}

// The coordinate of x along the singular vector `next`, while change += scale · the vector before it. Both in one pass
// over vectors one after another: memory then streams all the time. x and change are in `even_first` order.
template <bool kNext, bool kCurrent>
inline float edit_pass(const uint16_t* next, float scale, const float* x, int64_t narrow, float* change) {
  __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
  const __m256 scales = _mm256_set1_ps(scale);
  for (int64_t i = 0; i < narrow; i += 16) {
    if (kNext) {
      const __m256i pairs = load_pairs(next + i);
      even = _mm256_fmadd_ps(even_elements(pairs), _mm256_loadu_ps(x + i), even);
      odd = _mm256_fmadd_ps(odd_elements(pairs), _mm256_loadu_ps(x + i + 8), odd);
    }
    if (kCurrent) {
      const __m256i pairs = load_pairs(next - narrow + i);
      const __m256 first = _mm256_loadu_ps(change + i), second = _mm256_loadu_ps(change + i + 8);
      _mm256_storeu_ps(change + i, _mm256_fmadd_ps(even_elements(pairs), scales, first));
      _mm256_storeu_ps(change + i + 8, _mm256_fmadd_ps(odd_elements(pairs), scales, second));
    }
  }
  return sum(_mm256_add_ps(even, odd));
}

// side + V((z − 1) ⊙ Vᵀ side) for the rows from `first` on, the other rows as they are. side (rows, 1, narrow) and vectors
// (rank, narrow), row i a singular vector, are bfloat16; delta (1 or edited rows, rank) is z − 1 in float32. Each vector
// is read from memory once, for its coordinate and for its contribution.
at::Tensor few_rows_edited(const at::Tensor& side, const at::Tensor& vectors, const at::Tensor& delta, int64_t first,
                           int64_t edited) {
  check(side.squeeze(1), vectors);
  const int64_t rows = side.size(0), narrow = side.size(2), rank = vectors.size(0);
  TORCH_CHECK(first >= 0 && edited > 0 && first + edited <= rows, "the edited rows are not in the batch");
  TORCH_CHECK(delta.scalar_type() == at::kFloat && delta.is_contiguous(), "contiguous float32 was expected for z - 1");
  TORCH_CHECK(delta.dim() == 2 && delta.size(1) == rank && (delta.size(0) == 1 || delta.size(0) == edited),
              "z - 1 does not match the rows or the rank");
  at::Tensor result = side.clone(at::MemoryFormat::Contiguous);
  auto* target = result.mutable_data_ptr<at::BFloat16>() + first * narrow;
  const std::vector<float> source = even_first(target, edited, narrow);
  // Two cache lines between one thread's part and the next one's: they write to theirs all the time.
  const int64_t threads = at::get_num_threads(), stride = edited * narrow + 32;
  std::vector<float> changes(threads * stride, 0.0f);
  const uint16_t* v = bits(vectors);
  const float* d = delta.const_data_ptr<float>();
  const int64_t delta_stride = delta.size(0) == 1 ? 0 : rank;
  const int64_t grain = std::max(kVectorsPerThread, (rank + threads - 1) / threads);
  at::parallel_for(0, rank, grain, [&](int64_t begin, int64_t end) {
    float* mine = changes.data() + at::get_thread_num() * stride;
    for (int64_t row = 0; row < edited; ++row) {
      const float* x = source.data() + row * narrow;
      const float* scales = d + row * delta_stride;
      float* change = mine + row * narrow;
      float scale = edit_pass<true, false>(v + begin * narrow, 0.0f, x, narrow, change) * scales[begin];
      for (int64_t i = begin + 1; i < end; ++i) {
        scale = edit_pass<true, true>(v + i * narrow, scale, x, narrow, change) * scales[i];
      }
      edit_pass<false, true>(v + end * narrow, scale, x, narrow, change);
    }
  });
  for (int64_t row = 0; row < edited; ++row) {
    for (int64_t j = 0; j < narrow; ++j) {
      const int64_t at = row * narrow + place(j);
      float value = source[at];
      for (int64_t thread = 0; thread < threads; ++thread) value += changes[thread * stride + at];
      target[row * narrow + j] = value;
    }
  }
  return result;
}

}  // namespace

TORCH_LIBRARY(t2app, library) {
  library.def("few_rows_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", &few_rows_linear);
  library.def("few_rows_edited(Tensor side, Tensor vectors, Tensor delta, int first, int edited) -> Tensor",
              &few_rows_edited);
}
