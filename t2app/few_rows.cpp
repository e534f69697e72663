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

#include <vector>

namespace {

constexpr int64_t kRowsAtOnce = 4;
constexpr int64_t kWeightRowsAtOnce = 16;

inline __m256 widen(const uint16_t* source) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

inline float sum(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// One row of W (length k, a multiple of 16) against R rows of x.
template <int R>
inline void products(const uint16_t* weights, const float* x, int64_t k, float* result) {
  __m256 even[R], odd[R];
  for (int r = 0; r < R; ++r) even[r] = odd[r] = _mm256_setzero_ps();
  for (int64_t i = 0; i < k; i += 16) {
    const __m256 first = widen(weights + i), second = widen(weights + i + 8);
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
  const at::Tensor wide = x.to(at::kFloat).contiguous();
  const at::Tensor wide_bias = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  at::Tensor y = at::empty({rows, n}, x.options());
  const uint16_t* w = bits(weight);
  const float* source = wide.const_data_ptr<float>();
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

// side + V((z − 1) ⊙ Vᵀ side) for the rows from `first` on, the other rows as they are. side (rows, narrow) and vectors
// (rank, narrow), row i a singular vector, are bfloat16; delta (1 or edited rows, rank) is z − 1 in float32. Each vector
// is read once, for its coordinate and for its contribution.
at::Tensor few_rows_edited(const at::Tensor& side, const at::Tensor& vectors, const at::Tensor& delta, int64_t first,
                           int64_t edited) {
  check(side, vectors);
  const int64_t rows = side.size(0), narrow = side.size(1), rank = vectors.size(0);
  TORCH_CHECK(first >= 0 && edited > 0 && first + edited <= rows, "the edited rows are not in the batch");
  TORCH_CHECK(delta.scalar_type() == at::kFloat && delta.is_contiguous(), "contiguous float32 was expected for z - 1");
  TORCH_CHECK(delta.dim() == 2 && delta.size(1) == rank && (delta.size(0) == 1 || delta.size(0) == edited),
              "z - 1 does not match the rows or the rank");
  at::Tensor result = side.clone(at::MemoryFormat::Contiguous);
  auto* target = result.mutable_data_ptr<at::BFloat16>() + first * narrow;
  std::vector<float> source(target, target + edited * narrow);
  const int64_t threads = at::get_num_threads(), size = edited * narrow;
  std::vector<float> sums(threads * size, 0.0f);
  const uint16_t* v = bits(vectors);
  const float* d = delta.const_data_ptr<float>();
  const int64_t delta_stride = delta.size(0) == 1 ? 0 : rank;
  at::parallel_for(0, rank, (rank + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    float* mine = sums.data() + at::get_thread_num() * size;
    for (int64_t i = begin; i < end; ++i) {
      const uint16_t* vector = v + i * narrow;
      for (int64_t row = 0; row < edited; ++row) {
        float coordinate;
        products<1>(vector, source.data() + row * narrow, narrow, &coordinate);
        const __m256 scale = _mm256_set1_ps(coordinate * d[row * delta_stride + i]);
        float* sum = mine + row * narrow;
        for (int64_t j = 0; j < narrow; j += 8) {
          _mm256_storeu_ps(sum + j, _mm256_fmadd_ps(widen(vector + j), scale, _mm256_loadu_ps(sum + j)));
        }
      }
    }
  });
  for (int64_t j = 0; j < size; ++j) {
    float value = source[j];
    for (int64_t thread = 0; thread < threads; ++thread) value += sums[thread * size + j];
    target[j] = value;
  }
  return result;
}

}  // namespace

TORCH_LIBRARY(t2app, library) {
  library.def("few_rows_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", &few_rows_linear);
  library.def("few_rows_edited(Tensor side, Tensor vectors, Tensor delta, int first, int edited) -> Tensor",
              &few_rows_edited);
}
