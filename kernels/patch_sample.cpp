// The SSOD sampling step on the CPU (the paper's Eq. 12 and 13): for each patch the softmax probability of its true
// class, the label that follows from it, and the ID logit, without ever holding the [patches, classes] logits.
//
// Classes are taken in tiles and patches in chunks. The logits of one chunk and tile come from the library's matrix
// product, stay in the cache, and are reduced there to (maximum, sum of exponentials, logit of the true class). Few
// classes, for which a general product is slow, have a product of their own.

#include "patch_sample.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

namespace {

using namespace ssod_edge;

constexpr int64_t kChunk = 256;       // patches whose logits are held at a time: kChunk x kTile floats fit an L2 cache
constexpr int64_t kTile = 1024;       // classes held at a time
constexpr int64_t kLanes = 16;        // floats in the widest vector
constexpr int64_t kFewClasses = 31;   // with the OOD row, two vectors
constexpr int64_t kRows = 16;         // patches done at a time, with few classes
constexpr int64_t kSpan = 128;        // products that one running sum takes
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What has been seen of a patch's logits so far.
struct Softmax {
  float maximum = -kInfinity;
  float sum = 0.0f;   // of exp(logit - maximum)
  float target = 0.0f;  // logit of the true class
};

// ---- One body, compiled for each instruction set -------------------------------------------------------------------

#define SSOD_INLINE static inline __attribute__((always_inline))

// exp(x) for x <= 0, relative error below 2e-7; NaN stays NaN, and what is too small for a float of full precision is
// zero. Cody and Waite's reduction, a polynomial on |r| <= ln2/2.
SSOD_INLINE float exp_nonpositive(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer that stands in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float scale = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
  return x < -87.0f ? 0.0f : p * scale;
}

// Takes `count` more logits of one patch into account; the bias is added on the way.
SSOD_INLINE void accumulate_body(const float* logits, const float* bias, int64_t count, Softmax& state) {
  float maximum = -kInfinity;
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < count; ++j) {
    const float logit = logits[j] + bias[j];
    maximum = logit > maximum ? logit : maximum;
  }
  maximum = std::max(maximum, state.maximum);
  // With all logits at minus infinity any shift will do, and this one keeps a NaN visible.
  const float shift = maximum == -kInfinity ? 0.0f : maximum;
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) {
    sum += exp_nonpositive(logits[j] + bias[j] - shift);
  }
  state.sum = (state.sum == 0.0f ? 0.0f : state.sum * std::exp(state.maximum - shift)) + sum;
  state.maximum = maximum;
}

// logits[i][0..width) = rows[i] . packed, for kRows patches. `packed` is [depth][width], aligned to a vector.
// kStep patches share a load of the weights; their sums have to fit the registers.
template <int64_t kWidth, int64_t kVectors, int64_t kStep>
SSOD_INLINE void few_classes_body(const float* const* rows, const float* packed, int64_t depth, float* logits) {
  typedef float Vector __attribute__((vector_size(kWidth * sizeof(float)), may_alias));
  for (int64_t first = 0; first < kRows; first += kStep) {
    Vector totals[kStep][kVectors] = {};
    // Sums of sums: one running sum over a thousand products would round off a digit.
    for (int64_t begin = 0; begin < depth; begin += kSpan) {
      Vector sums[kStep][kVectors] = {};
      const int64_t end = begin + kSpan < depth ? begin + kSpan : depth;
      for (int64_t d = begin; d < end; ++d) {
        Vector w[kVectors];
        for (int64_t v = 0; v < kVectors; ++v)
          w[v] = *reinterpret_cast<const Vector*>(packed + (d * kVectors + v) * kWidth);
        for (int64_t i = 0; i < kStep; ++i)
          for (int64_t v = 0; v < kVectors; ++v) sums[i][v] += w[v] * rows[first + i][d];
      }
      for (int64_t i = 0; i < kStep; ++i)
        for (int64_t v = 0; v < kVectors; ++v) totals[i][v] += sums[i][v];
    }
    for (int64_t i = 0; i < kStep; ++i)
      for (int64_t v = 0; v < kVectors; ++v)
        *reinterpret_cast<Vector*>(logits + ((first + i) * kVectors + v) * kWidth) = totals[i][v];
  }
}

// Confidence of kRows patches from their logits [kRows][width]. Patches, not classes, fill the vectors.
SSOD_INLINE void few_confidences_body(const float* logits, int64_t width, const float* bias, int64_t classes,
                                      const int64_t* target, float* confidence) {
  float column[kFewClasses][kRows], maximum[kRows], sum[kRows], chosen[kRows];
  for (int64_t i = 0; i < kRows; ++i) {
    maximum[i] = -kInfinity;
    sum[i] = 0.0f;
    chosen[i] = target[i] < 0 ? __builtin_nanf("") : logits[i * width + target[i]] + bias[target[i]];
  }
  for (int64_t j = 0; j < classes; ++j) {
    for (int64_t i = 0; i < kRows; ++i) column[j][i] = logits[i * width + j] + bias[j];
    for (int64_t i = 0; i < kRows; ++i) maximum[i] = column[j][i] > maximum[i] ? column[j][i] : maximum[i];
  }
  // With all logits at minus infinity any shift will do, and this one keeps a NaN visible.
  for (int64_t i = 0; i < kRows; ++i) maximum[i] = maximum[i] == -kInfinity ? 0.0f : maximum[i];
  for (int64_t j = 0; j < classes; ++j)
    for (int64_t i = 0; i < kRows; ++i) sum[i] += exp_nonpositive(column[j][i] - maximum[i]);
  for (int64_t i = 0; i < kRows; ++i) confidence[i] = exp_nonpositive(chosen[i] - maximum[i]) / sum[i];
}

// bfloat16 is the upper half of a float.
SSOD_INLINE void widen_bfloat16_body(const uint16_t* from, float* to, int64_t count) {
  typedef uint32_t Bits __attribute__((may_alias));
  Bits* bits = reinterpret_cast<Bits*>(to);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) bits[i] = static_cast<uint32_t>(from[i]) << 16;
}

static void widen_half_portable(const uint16_t* from, float* to, int64_t count) {
  const auto* halves = reinterpret_cast<const c10::Half*>(from);
  for (int64_t i = 0; i < count; ++i) to[i] = halves[i];
}

#if defined(__x86_64__)
__attribute__((target("avx2,f16c"))) void widen_half_f16c(const uint16_t* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  widen_half_portable(from + i, to + i, count - i);
}
#endif

struct Routines {
  void (*accumulate)(const float*, const float*, int64_t, Softmax&);
  void (*few_classes_1)(const float* const*, const float*, int64_t, float*);
  void (*few_classes_2)(const float* const*, const float*, int64_t, float*);
  void (*few_confidences)(const float*, int64_t, const float*, int64_t, const int64_t*, float*);
  void (*widen_bfloat16)(const uint16_t*, float*, int64_t);
  void (*widen_half)(const uint16_t*, float*, int64_t);
};

#define SSOD_ROUTINES(NAME, TARGET, WIDTH, STEP_1, STEP_2, WIDEN_HALF)                                                \
  TARGET static void accumulate_##NAME(const float* logits, const float* bias, int64_t count, Softmax& state) {       \
    accumulate_body(logits, bias, count, state);                                                                      \
  }                                                                                                                   \
  TARGET static void few_1_##NAME(const float* const* rows, const float* packed, int64_t depth, float* logits) {      \
    few_classes_body<WIDTH, kLanes / WIDTH, STEP_1>(rows, packed, depth, logits);                                     \
  }                                                                                                                   \
  TARGET static void few_2_##NAME(const float* const* rows, const float* packed, int64_t depth, float* logits) {      \
    few_classes_body<WIDTH, 2 * kLanes / WIDTH, STEP_2>(rows, packed, depth, logits);                                 \
  }                                                                                                                   \
  TARGET static void few_confidences_##NAME(const float* logits, int64_t width, const float* bias, int64_t classes,   \
                                            const int64_t* target, float* confidence) {                               \
    few_confidences_body(logits, width, bias, classes, target, confidence);                                           \
  }                                                                                                                   \
  TARGET static void widen_bfloat16_##NAME(const uint16_t* from, float* to, int64_t count) {                          \
    widen_bfloat16_body(from, to, count);                                                                             \
  }                                                                                                                   \
  static const Routines routines_##NAME = {accumulate_##NAME,      few_1_##NAME,          few_2_##NAME,               \
                                           few_confidences_##NAME, widen_bfloat16_##NAME, WIDEN_HALF};

SSOD_ROUTINES(portable, , 4, 2, 1, widen_half_portable)
#if defined(__x86_64__)
SSOD_ROUTINES(avx2, __attribute__((target("avx2,fma"))), 8, 4, 2, widen_half_f16c)
SSOD_ROUTINES(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), 16, 8, 8, widen_half_f16c)
#endif

// The best of this processor, or the one that SSOD_EDGE_CPU names (for tests; ignored if it cannot run here).
const Routines& choose_routines() {
  const char* wanted = std::getenv("SSOD_EDGE_CPU");
  const auto allowed = [&](const char* name) { return wanted == nullptr || std::strcmp(wanted, name) == 0; };
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && allowed("avx512")) return routines_avx512;
  if (avx2 && allowed("avx2")) return routines_avx2;
#endif
  return routines_portable;
}

const Routines& routines() {
  static const Routines& chosen = choose_routines();
  return chosen;
}

// ---- Tensors ---------------------------------------------------------------------------------------------------------

float element(const void* data, ScalarType type, int64_t index) {
  switch (type) {
    case ScalarType::BFloat16: return static_cast<const c10::BFloat16*>(data)[index];
    case ScalarType::Half: return static_cast<const c10::Half*>(data)[index];
    default: return static_cast<const float*>(data)[index];
  }
}

const void* offset(const void* data, ScalarType type, int64_t elements) {
  return static_cast<const char*>(data) + elements * (type == ScalarType::Float ? 4 : 2);
}

// fp32 copy of `count` elements that lie `stride` apart.
void widen(const void* data, ScalarType type, int64_t stride, int64_t count, float* to) {
  if (stride == 1 && type == ScalarType::Float) {
    std::memcpy(to, data, count * sizeof(float));
  } else if (stride == 1 && type == ScalarType::BFloat16) {
    routines().widen_bfloat16(static_cast<const uint16_t*>(data), to, count);
  } else if (stride == 1) {
    routines().widen_half(static_cast<const uint16_t*>(data), to, count);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = element(data, type, i * stride);
  }
}

// Row `index` of a matrix, in fp32.
void widen_row(const Tensor& matrix, int64_t index, float* to) {
  widen(offset(matrix.const_data_ptr(), matrix.scalar_type(), index * matrix.stride(0)), matrix.scalar_type(),
        matrix.stride(1), matrix.size(1), to);
}

std::vector<float> to_floats(const Tensor& tensor) {
  std::vector<float> values(tensor.numel());
  const int64_t stride = tensor.dim() == 0 ? 1 : tensor.stride(0);
  widen(tensor.const_data_ptr(), tensor.scalar_type(), stride, tensor.numel(), values.data());
  return values;
}

// Rows of a strided [rows, depth] operand as contiguous fp32: the tensor's own memory where that is what it holds.
struct Rows {
  const float* data;
  int64_t stride;
};

Rows feature_rows(const void* z, ScalarType type, const Features& f, int64_t first, int64_t count, std::vector<float>& scratch) {
  const bool even = f.patches == 1 || f.images == 1 || f.image_stride == f.patches * f.patch_stride;
  const int64_t step = f.patches == 1 ? f.image_stride : f.patch_stride;
  if (type == ScalarType::Float && f.feature_stride == 1 && even && step >= f.depth) {
    return {static_cast<const float*>(z) + first * step, step};
  }
  scratch.resize(count * f.depth);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t image = (first + i) / f.patches, patch = (first + i) % f.patches;
    const int64_t at = image * f.image_stride + patch * f.patch_stride;
    widen(offset(z, type, at), type, f.feature_stride, f.depth, scratch.data() + i * f.depth);
  }
  return {scratch.data(), f.depth};
}

Tensor matrix(const float* data, std::array<int64_t, 2> size, std::array<int64_t, 2> stride) {
  return torch::stable::from_blob(const_cast<float*>(data), {size.data(), 2}, {stride.data(), 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Float);
}

// out [m, n] = a [m, k] @ b [n, k] transposed, by the library.
void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t m, int64_t n, int64_t k,
              float* out) {
  const Tensor left = matrix(a, {m, k}, {a_stride, 1});
  const Tensor right = matrix(b, {k, n}, {1, b_stride});
  const Tensor result = matrix(out, {m, n}, {n, 1});
  std::array<StableIValue, 3> stack{torch::stable::detail::from(left), torch::stable::detail::from(right),
                                    torch::stable::detail::from(result)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // owns the returned handle
}

struct Outputs {
  float* confidence;
  int8_t* label;
  float* id_logit;  // null without the OOD row
};

void label_patch(float confidence, float upper, float lower, int64_t p, const Outputs& out) {
  out.confidence[p] = confidence;
  out.label[p] = confidence >= upper ? 1 : confidence < lower ? 0 : -1;
}

struct alignas(kLanes * sizeof(float)) Lanes {
  float values[kLanes];
};

// Few classes: the OOD row is one more column, and kRows patches are done in one go.
void sample_few(const void* z, ScalarType type, const Features& f, const Tensor& weight, const std::vector<float>& bias,
                const std::vector<float>& ood_weight, const int64_t* target, float upper, float lower,
                const Outputs& out) {
  const Routines& run = routines();
  const int64_t classes = weight.size(0);
  const int64_t vectors = (classes + kLanes) / kLanes;  // classes + 1 columns, rounded up
  const int64_t width = vectors * kLanes;
  std::vector<Lanes> packed(std::max<int64_t>(f.depth, 1) * vectors, Lanes{});  // its first is named below in any case
  std::vector<float> row(f.depth);
  for (int64_t j = 0; j <= classes; ++j) {
    if (j < classes) widen_row(weight, j, row.data());
    const float* values = j < classes ? row.data() : ood_weight.data();
    for (int64_t d = 0; d < f.depth; ++d) packed[d * vectors + j / kLanes].values[j % kLanes] = values[d];
  }
  const auto multiply_rows = vectors == 1 ? run.few_classes_1 : run.few_classes_2;
  const int64_t blocks = (f.count() + kRows - 1) / kRows;
  torch::stable::parallel_for(0, blocks, 8, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch;
    std::vector<Lanes> products(kRows * vectors);
    const float* logits = products[0].values;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kRows, count = std::min(kRows, f.count() - first);
      const Rows rows = feature_rows(z, type, f, first, count, scratch);
      const float* row[kRows];
      int64_t targets[kRows];
      float confidence[kRows];
      for (int64_t i = 0; i < kRows; ++i) {  // the last patch fills up the last block
        const int64_t within = std::min(i, count - 1);
        row[i] = rows.data + within * rows.stride;
        targets[i] = target[(first + within) / f.patches];
      }
      multiply_rows(row, packed[0].values, f.depth, products[0].values);
      run.few_confidences(logits, width, bias.data(), classes, targets, confidence);
      for (int64_t i = 0; i < count; ++i) {
        label_patch(confidence[i], upper, lower, first + i, out);
        if (out.id_logit) out.id_logit[first + i] = logits[i * width + classes] + bias[classes];
      }
    }
  });
}

// Any number of classes: tiles of classes outside, so that a tile of 16-bit weights is widened once.
void sample_many(const void* z, ScalarType type, const Features& f, const Tensor& weight, const std::vector<float>& bias,
                 const std::vector<float>& ood_weight, const int64_t* target, float upper, float lower,
                 const Outputs& out) {
  const Routines& run = routines();
  const int64_t classes = weight.size(0);
  const bool direct = weight.scalar_type() == ScalarType::Float && weight.stride(1) == 1 && weight.stride(0) >= f.depth;
  std::vector<Softmax> states(f.count());
  std::vector<float> widened(direct ? 0 : std::min(kTile, classes) * f.depth);
  const int64_t chunks = (f.count() + kChunk - 1) / kChunk;
  for (int64_t first_class = 0; first_class < classes; first_class += kTile) {
    const int64_t tile = std::min(kTile, classes - first_class);
    const float* w = widened.data();
    int64_t w_stride = f.depth;
    if (direct) {
      w = weight.const_data_ptr<float>() + first_class * weight.stride(0);
      w_stride = weight.stride(0);
    } else {
      for (int64_t j = 0; j < tile; ++j) widen_row(weight, first_class + j, widened.data() + j * f.depth);
    }
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch, logits(kChunk * tile);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * kChunk, count = std::min(kChunk, f.count() - first);
        const Rows rows = feature_rows(z, type, f, first, count, scratch);
        multiply(rows.data, rows.stride, w, w_stride, count, tile, f.depth, logits.data());
        for (int64_t i = 0; i < count; ++i) {
          const int64_t p = first + i, t = target[p / f.patches];
          run.accumulate(logits.data() + i * tile, bias.data() + first_class, tile, states[p]);
          if (t >= first_class && t < first_class + tile)
            states[p].target = logits[i * tile + t - first_class] + bias[t];
        }
        if (first_class + tile < classes) continue;
        if (out.id_logit) {
          multiply(rows.data, rows.stride, ood_weight.data(), f.depth, count, 1, f.depth, out.id_logit + first);
          for (int64_t p = first; p < first + count; ++p) out.id_logit[p] += bias[classes];
        }
        for (int64_t p = first; p < first + count; ++p) {
          const Softmax& state = states[p];
          const bool ignored = target[p / f.patches] < 0;
          label_patch(ignored ? std::nanf("") : std::exp(state.target - state.maximum) / state.sum, upper, lower, p, out);
        }
      }
    });
  }
}

std::tuple<Tensor, Tensor, Tensor> sample_cpu(const Tensor& z, const Tensor& weight, const Tensor& bias,
                                              const std::optional<Tensor>& ood_weight,
                                              const std::optional<Tensor>& ood_bias, const Tensor& target,
                                              double upper, double lower) {
  const Features f = check_arguments(z, weight, bias, ood_weight, ood_bias, target);
  const int64_t classes = weight.size(0);
  const auto make = [&](int64_t size, ScalarType type) { return torch::stable::new_empty(z, {&size, 1}, type); };
  Tensor confidence = make(f.count(), ScalarType::Float), label = make(f.count(), ScalarType::Char);
  Tensor id_logit = make(ood_weight ? f.count() : 0, ScalarType::Float);
  const Tensor targets = torch::stable::contiguous(target);
  const int64_t* target_data = targets.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < f.images && f.patches > 0; ++i)
    STD_TORCH_CHECK(target_data[i] < classes, "target must be below the ", classes, " classes, got ", target_data[i]);
  if (f.count() == 0) return {confidence, label, id_logit};

  // Without the OOD row its place is taken by zeros, and nothing is written.
  std::vector<float> biases = to_floats(bias), ood(f.depth, 0.0f);
  biases.push_back(0.0f);
  if (ood_weight) {
    ood = to_floats(*ood_weight);
    biases.back() = element(ood_bias->const_data_ptr(), ood_bias->scalar_type(), 0);
  }
  const Outputs out{confidence.mutable_data_ptr<float>(), label.mutable_data_ptr<int8_t>(),
                    ood_weight ? id_logit.mutable_data_ptr<float>() : nullptr};
  const void* data = z.const_data_ptr();
  // The thresholds are rounded once, from double, to the type they are compared in.
  const float up = static_cast<float>(upper), low = static_cast<float>(lower);
  if (classes <= kFewClasses) {
    sample_few(data, z.scalar_type(), f, weight, biases, ood, target_data, up, low, out);
  } else {
    sample_many(data, z.scalar_type(), f, weight, biases, ood, target_data, up, low, out);
  }
  return {confidence, label, id_logit};
}

}  // namespace

STABLE_TORCH_LIBRARY(ssod_edge, library) {
  library.def(
      "sample(Tensor z, Tensor weight, Tensor bias, Tensor? ood_weight, Tensor? ood_bias, Tensor target, "
      "float upper, float lower) -> (Tensor confidence, Tensor label, Tensor id_logit)");
}

STABLE_TORCH_LIBRARY_IMPL(ssod_edge, CPU, library) { library.impl("sample", TORCH_BOX(&sample_cpu)); }
