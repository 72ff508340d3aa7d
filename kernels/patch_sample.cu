// The SSOD sampling step on the GPU: the op of patch_sample.cpp, in two launches.
//
// The first kernel is the matrix product z @ [weight; ood_weight].T, of which no logit reaches memory: each block
// reduces its tile to one (maximum, sum of exponentials) a row, and sets aside the logits of the true class and of the
// OOD row. The second merges a row's tiles in a fixed order, so results are the same bit for bit from run to run.
//
// Two products share that epilogue. Hopper's: CUTLASS's TMA and WGMMA mainloop, 16-bit and evenly spaced rows only.
// The portable one: any GPU since sm_80, type and strides; mma.sync in 16 bits, FFMA in 32.
//
// Compile without --use_fast_math: the sums in 32 bits are compensated, and NaN has to stay NaN.

#include "patch_sample.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <type_traits>

// CUTLASS is read where its kernel is compiled, and by the host's compiler, which registers CuTe's device constants.
// For every other architecture it would take most of the time.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#undef NDEBUG  // an assertion is a function call, and makes the products wait for each other
#define NDEBUG
#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/gemm/collective/collective_builder.hpp>
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SSOD_HOPPER 1
#endif

namespace {

using namespace ssod_edge;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;

// ---- What the kernels share -----------------------------------------------------------------------------------------

// A few numbers that are read one by one: a bias.
struct Values {
  const void* data;
  ScalarType type;
  int64_t stride;
};

// A matrix whose rows are read. `vector`: features are adjacent and every row starts at a multiple of 16 bytes.
struct Operand {
  const void* data;
  int64_t feature_stride;
  bool vector;
};

struct Problem {
  int64_t rows;  // patches, of all images
  int64_t patches, depth, classes;
  uint32_t row_tiles, class_tiles;  // class_tiles covers the OOD row too
  Operand z;
  int64_t image_stride, patch_stride;
  Operand weight;
  int64_t class_stride;
  const void* ood_weight;  // null without the OOD row; its features are as far apart as those of `weight`
  Values bias, ood_bias;
  const int64_t* target;
  int64_t target_stride;
  float2* partial;      // [class_tiles][rows]: maximum, sum of exp(logit - maximum)
  float* target_logit;  // [rows], written where the target is a class
  float* id_logit;      // [rows]
};

__device__ inline float read(const Values& values, int64_t index) {
  switch (values.type) {
    case ScalarType::BFloat16: return static_cast<const BFloat16*>(values.data)[index * values.stride];
    case ScalarType::Half: return static_cast<const Half*>(values.data)[index * values.stride];
    default: return static_cast<const float*>(values.data)[index * values.stride];
  }
}

// The bias of a column. Where no class is, minus infinity keeps what the padding gave out of the softmax.
__device__ inline float bias_of(const Problem& problem, int64_t column) {
  return column < problem.classes ? read(problem.bias, column) : -kInfinity;
}

// Rows fit 32 bits; a 64-bit division is a function call, in the middle of Hopper's pipeline.
__device__ inline int64_t image_of(const Problem& problem, int64_t row) {
  return static_cast<uint32_t>(row) / static_cast<uint32_t>(problem.patches);
}

__device__ inline int64_t target_of(const Problem& problem, int64_t row) {
  return problem.target[image_of(problem, row) * problem.target_stride];
}

// Which of the tile's columns holds the logit of the row's true class; -1 if none does.
__device__ inline int target_column(const Problem& problem, int64_t row, int64_t first_class, int columns) {
  if (row >= problem.rows) return -1;
  const int64_t target = target_of(problem, row);
  const bool here = target >= first_class && target < first_class + columns && target < problem.classes;
  return here ? static_cast<int>(target - first_class) : -1;
}

// Eight row tiles go through all class tiles together: blocks that run at a time share both operands in the L2 cache.
struct Tile {
  uint32_t row, column;
};

__host__ __device__ inline Tile tile_at(uint32_t index, uint32_t row_tiles, uint32_t class_tiles) {
  constexpr uint32_t kGroup = 8;
  const uint32_t first = index / (kGroup * class_tiles) * kGroup;
  const uint32_t height = row_tiles - first < kGroup ? row_tiles - first : kGroup;
  const uint32_t within = index - first * class_tiles;
  return {first + within % height, within / height};
}

// ---- Instructions ---------------------------------------------------------------------------------------------------

template <typename T>
__device__ inline float exponential(float x) {
  if constexpr (std::is_same_v<T, float>) return expf(x);
  float y;  // two units in the last place: far below what 16-bit operands leave
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * kLog2E));
  return y;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies `bytes` of 16 to shared memory and clears the rest; done when wait_copies says so.
__device__ inline void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's commits are unfinished.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// sums [16, 8] += a [16, 16] @ b [8, 16] transposed.
template <typename T>
__device__ inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// ---- The epilogue ---------------------------------------------------------------------------------------------------

// With all logits at minus infinity any shift will do, and this one keeps a NaN visible.
__device__ inline float shift_of(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

// Reduces a tile of products to one float2 a row, (maximum, sum of exponentials). A thread holds logit(r, i) of kRows
// rows and kCount columns; kLanes adjacent lanes hold the rest of the rows, and all get the result.
template <typename T, int kRows, int kCount, int kLanes, typename Logit, typename Row, typename Column>
__device__ inline void reduce_tile(const Problem& problem, int64_t first_row, const float* bias, int ood_column,
                                   const int (&targets)[kRows], Logit&& logit, Row&& row, Column&& column,
                                   float2 (&partial)[kRows]) {
  if (ood_column >= 0) {
    const float ood_bias = read(problem.ood_bias, 0);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (column(i) != ood_column) continue;
        const int64_t at = first_row + row(r);
        if (at < problem.rows) problem.id_logit[at] = logit(r, i) + ood_bias;
        logit(r, i) = 0.0f;  // whatever it was, it is no class
      }
    }
  }
  float maximum[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) maximum[r] = -kInfinity;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float add = bias[column(i)];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      logit(r, i) += add;
      maximum[r] = fmaxf(maximum[r], logit(r, i));
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (targets[r] < 0) continue;  // few tiles hold a row's target, so the search is kept out of the others
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (column(i) == targets[r]) problem.target_logit[first_row + row(r)] = logit(r, i);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int lane = kLanes / 2; lane > 0; lane /= 2)
      maximum[r] = fmaxf(maximum[r], __shfl_xor_sync(0xffffffffu, maximum[r], lane));
    const float shift = shift_of(maximum[r]);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += exponential<T>(logit(r, i) - shift);
#pragma unroll
    for (int lane = kLanes / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
    partial[r] = make_float2(maximum[r], sum);
  }
}

// Merges the class tiles of each row, and labels it.
constexpr int kFinishThreads = 128;

__global__ void __launch_bounds__(kFinishThreads)
    finish(const Problem problem, float upper, float lower, float* confidence, int8_t* label) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (row >= problem.rows) return;
  const int64_t target = target_of(problem, row);
  float value = std::numeric_limits<float>::quiet_NaN();
  if (target >= 0 && target < problem.classes) {
    const float2* partial = problem.partial + row;
    float maximum = -kInfinity;
#pragma unroll 8
    for (uint32_t tile = 0; tile < problem.class_tiles; ++tile)
      maximum = fmaxf(maximum, partial[tile * problem.rows].x);
    const float shift = shift_of(maximum);
    double sum = 0.0;  // hundreds of terms, and a digit to lose
#pragma unroll 8
    for (uint32_t tile = 0; tile < problem.class_tiles; ++tile) {
      const float2 part = partial[tile * problem.rows];
      sum += part.y * expf(part.x - shift);
    }
    value = expf(problem.target_logit[row] - maximum) / static_cast<float>(sum);
  }
  confidence[row] = value;
  label[row] = value >= upper ? 1 : value < lower ? 0 : -1;
}

// ---- The portable product -------------------------------------------------------------------------------------------

constexpr int kThreads = 256;
constexpr int kStages = 3;
constexpr int kRowBytes = 64;        // of a row in one stage
constexpr int kPitch = kRowBytes + 16;  // with it, eight adjacent rows lie in different banks

// A thread's share of the block's tile of products. Operands are in shared memory, features of a row adjacent.
template <typename T>
struct Sums {  // mma.sync: warps are 4 x 2, each 32 rows and 64 columns
  static constexpr int kTileRows = 128, kTileColumns = 128;
  static constexpr int kRows = 4, kCount = 16, kLanes = 4, kSlices = 2;  // kSlices: warps that share a row

  float sums[2][8][4] = {};

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp_row() { return threadIdx.x / 64 * 32; }
  __device__ static int slice() { return threadIdx.x / 32 % 2; }
  __device__ static int row(int r) { return warp_row() + r / 2 * 16 + r % 2 * 8 + lane() / 4; }
  __device__ static int column(int i) { return slice() * 64 + i / 2 * 8 + lane() % 4 * 2 + i % 2; }
  __device__ float& logit(int r, int i) { return sums[r / 2][i / 2][r % 2 * 2 + i % 2]; }

  __device__ void multiply(const unsigned char* a, const unsigned char* b, bool) {
    a += (warp_row() + lane() % 16) * kPitch + lane() / 16 * 16;
    b += (slice() * 64 + lane() / 16 * 8 + lane() % 8) * kPitch + lane() / 8 % 2 * 16;
#pragma unroll
    for (int k = 0; k < kRowBytes; k += 32) {  // 16 features
      uint32_t left[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_matrices(left[m], a + m * 16 * kPitch + k);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t right[4];
        load_matrices(right, b + n * 16 * kPitch + k);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add<T>(sums[m][2 * n], left[m], right[0], right[1]);
          multiply_add<T>(sums[m][2 * n + 1], left[m], right[2], right[3]);
        }
      }
    }
  }
};

template <>
struct Sums<float> {  // FFMA: threads are 16 x 16, rows and columns of a thread are 16 apart
  static constexpr int kTileRows = 128, kTileColumns = 64;
  static constexpr int kRows = 8, kCount = 4, kLanes = 16, kSlices = 1;

  // Products go to `sums`, and those every 32 features to `totals`. What a total rounds off starts the next sum.
  float sums[kRows][kCount] = {}, totals[kRows][kCount] = {};

  __device__ static int slice() { return 0; }
  __device__ static int row(int r) { return threadIdx.x / 16 + r * 16; }
  __device__ static int column(int i) { return threadIdx.x % 16 + i * 16; }
  __device__ float& logit(int r, int i) { return totals[r][i]; }

  __device__ void multiply(const unsigned char* a, const unsigned char* b, bool add) {
    a += row(0) * kPitch;
    b += column(0) * kPitch;
#pragma unroll 1
    for (int k = 0; k < kRowBytes; k += 16) {  // 4 features
      float4 right[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) right[i] = *reinterpret_cast<const float4*>(b + i * 16 * kPitch + k);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 left = *reinterpret_cast<const float4*>(a + r * 16 * kPitch + k);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          sums[r][i] = fmaf(left.x, right[i].x, sums[r][i]);
          sums[r][i] = fmaf(left.y, right[i].y, sums[r][i]);
          sums[r][i] = fmaf(left.z, right[i].z, sums[r][i]);
          sums[r][i] = fmaf(left.w, right[i].w, sums[r][i]);
        }
      }
    }
    if (!add) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float total = totals[r][i] + sums[r][i];
        const float lost = sums[r][i] - (total - totals[r][i]);
        sums[r][i] = fminf(fmaxf(lost, -1e30f), 1e30f);  // an infinite total loses NaN, and has to stay infinite
        totals[r][i] = total;
      }
    }
  }
};

template <typename T>
struct Shared {
  static constexpr int kRows = Sums<T>::kTileRows, kColumns = Sums<T>::kTileColumns;
  alignas(16) unsigned char z[kStages][kRows * kPitch];
  alignas(16) unsigned char weight[kStages][kColumns * kPitch];
  const T* z_row[kRows];  // null: no such row
  const T* weight_row[kColumns];
  float bias[kColumns];
  float2 partial[Sums<T>::kSlices][kRows];
};

// Fills one stage of an operand. What lies outside the matrix is zero, in both operands.
template <typename T, int kRows>
__device__ inline void load_stage(unsigned char* stage, const T* const* rows, const Operand& operand, int first,
                                  int depth) {
  constexpr int kVector = 16 / sizeof(T), kChunks = kRowBytes / 16;
  static_assert(kRows * kChunks % kThreads == 0);
  if (operand.vector) {
#pragma unroll
    for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks, feature = first + chunk * kVector;
      unsigned char* to = stage + row * kPitch + chunk * 16;
      const T* from = rows[row];
      if (from == nullptr || feature >= depth) {
        *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
      } else {
        copy_async(to, from + feature, min(depth - feature, kVector) * static_cast<int>(sizeof(T)));
      }
    }
    return;
  }
  // Adjacent threads take adjacent memory: features of a row, or rows where features are apart (NCHW).
  const bool along_rows = operand.feature_stride != 1;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = along_rows ? i % kRows : i / kChunks, chunk = along_rows ? i / kRows : i % kChunks;
    const T* from = rows[row];
    alignas(16) T values[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const int feature = first + chunk * kVector + v;
      values[v] = from != nullptr && feature < depth ? from[feature * operand.feature_stride] : static_cast<T>(0.0f);
    }
    *reinterpret_cast<uint4*>(stage + row * kPitch + chunk * 16) = *reinterpret_cast<const uint4*>(values);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) sample_portable(const Problem problem) {
  constexpr int kRows = Shared<T>::kRows, kColumns = Shared<T>::kColumns, kDepth = kRowBytes / sizeof(T);
  extern __shared__ __align__(16) unsigned char dynamic_memory[];
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(dynamic_memory);
  const int thread = threadIdx.x;
  const Tile tile = tile_at(blockIdx.x, problem.row_tiles, problem.class_tiles);
  const int64_t first_row = static_cast<int64_t>(tile.row) * kRows;
  const int64_t first_class = static_cast<int64_t>(tile.column) * kColumns;

  for (int i = thread; i < kRows; i += kThreads) {
    const int64_t row = first_row + i, image = image_of(problem, row), patch = row - image * problem.patches;
    const T* z = static_cast<const T*>(problem.z.data);
    shared.z_row[i] = row < problem.rows ? z + image * problem.image_stride + patch * problem.patch_stride : nullptr;
  }
  for (int i = thread; i < kColumns; i += kThreads) {
    const int64_t column = first_class + i;
    const T* row = column == problem.classes ? static_cast<const T*>(problem.ood_weight) : nullptr;
    if (column < problem.classes) row = static_cast<const T*>(problem.weight.data) + column * problem.class_stride;
    shared.weight_row[i] = row;
    shared.bias[i] = bias_of(problem, column);
  }
  __syncthreads();

  const int depth = static_cast<int>(problem.depth), steps = (depth - 1) / kDepth + 1;
  const auto load = [&](int step) {
    if (step < steps) {
      const int stage = step % kStages;
      load_stage<T, kRows>(shared.z[stage], shared.z_row, problem.z, step * kDepth, depth);
      load_stage<T, kColumns>(shared.weight[stage], shared.weight_row, problem.weight, step * kDepth, depth);
    }
    commit_copies();  // one commit a step, empty or not: wait_copies counts them
  };
  Sums<T> sums;
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // this stage has come, for all threads, and all are done with the stage that is filled next
    load(step + kStages - 1);
    const int stage = step % kStages;
    sums.multiply(shared.z[stage], shared.weight[stage], step % 2 == 1 || step + 1 == steps);
  }

  int targets[Sums<T>::kRows];
#pragma unroll
  for (int r = 0; r < Sums<T>::kRows; ++r)
    targets[r] = target_column(problem, first_row + sums.row(r), first_class, kColumns);
  const int64_t ood_column = problem.classes - first_class;
  const bool ood_here = problem.ood_weight != nullptr && ood_column >= 0 && ood_column < kColumns;
  float2 partial[Sums<T>::kRows];
  reduce_tile<T, Sums<T>::kRows, Sums<T>::kCount, Sums<T>::kLanes>(
      problem, first_row, shared.bias, ood_here ? static_cast<int>(ood_column) : -1, targets,
      [&](int r, int i) -> float& { return sums.logit(r, i); }, [&](int r) { return sums.row(r); },
      [&](int i) { return sums.column(i); }, partial);
  if (thread % Sums<T>::kLanes == 0) {
#pragma unroll
    for (int r = 0; r < Sums<T>::kRows; ++r) shared.partial[sums.slice()][sums.row(r)] = partial[r];
  }
  __syncthreads();
  if (thread >= kRows || first_row + thread >= problem.rows) return;
  float2 merged = shared.partial[0][thread];
#pragma unroll
  for (int slice = 1; slice < Sums<T>::kSlices; ++slice) {
    const float2 other = shared.partial[slice][thread];
    const float maximum = fmaxf(merged.x, other.x), shift = shift_of(maximum);
    merged.y = merged.y * exponential<T>(merged.x - shift) + other.y * exponential<T>(other.x - shift);
    merged.x = maximum;
  }
  problem.partial[tile.column * problem.rows + first_row + thread] = merged;
}

// ---- Hopper's product -----------------------------------------------------------------------------------------------

// CUTLASS's cooperative mainloop: one warp group loads by TMA, two multiply 64 rows each. Clusters of two blocks take
// two row tiles of the same classes, and each loads half of the weights for both. The two multiplying groups are not
// synchronised with each other, so one's epilogue runs beside the other's products.
constexpr int kHopperRows = 128, kHopperColumns = 256, kHopperDepth = 64, kHopperStages = 4, kHopperCluster = 2;
constexpr int kHopperThreads = 384;
// The OOD row is loaded from its own memory, with the seven rows of nothing that complete a swizzle pattern, as the
// last columns of the last tile. The classes of that tile stop before it.
constexpr int kOodRows = 8;
constexpr int kHalfColumns = kHopperColumns / kHopperCluster;
constexpr int kHopperShared = 1024 + kHopperStages * (kHopperRows + kHopperColumns) * kHopperDepth * 2 +  // operands
                              2 * 2 * kHopperColumns * 4 + 1024;  // biases; barriers, and room to align

// How TMA sees the operands: a box is 64 features of some rows. Outside the matrix it reads zeros.
struct HopperMaps {
  CUtensorMap z;             // boxes of kHopperRows
  CUtensorMap weight;        // boxes of kHalfColumns
  CUtensorMap weight_short;  // boxes that leave room for the OOD row
  CUtensorMap ood_weight;    // boxes of kOodRows
};

#if defined(SSOD_HOPPER)
template <typename T>
struct HopperTraits {
  using Element = std::conditional_t<std::is_same_v<T, BFloat16>, cutlass::bfloat16_t, cutlass::half_t>;
  using TileShape = cute::Shape<cute::Int<kHopperRows>, cute::Int<kHopperColumns>, cute::Int<kHopperDepth>>;
  using ClusterShape = cute::Shape<cute::Int<kHopperCluster>, cute::_1, cute::_1>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, 8, Element,
      cutlass::layout::ColumnMajor, 8, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCount<kHopperStages>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Pipeline = typename Mainloop::MainloopPipeline;
  using PipelineState = typename Mainloop::PipelineState;
  using TiledMma = typename Mainloop::TiledMma;

  struct Shared {
    alignas(1024) typename Mainloop::TensorStorage tensors;
    alignas(16) float bias[2][2][kHopperColumns];  // of each multiplying group, for this tile and the next
    alignas(16) typename Mainloop::PipelineStorage pipeline;
  };
  static_assert(sizeof(Shared) + 1024 <= kHopperShared);
  static_assert(cute::size(TiledMma{}) == 256 && Mainloop::TmaTransactionBytes == (kHopperRows + kHopperColumns) * 128);
};
#endif

// `steps` is the depth in stages.
template <typename T>
__global__ void __launch_bounds__(kHopperThreads, 1)
    sample_hopper(const __grid_constant__ HopperMaps maps, const Problem problem, int steps) {
#if defined(SSOD_HOPPER)
  using Traits = HopperTraits<T>;
  using Mainloop = typename Traits::Mainloop;
  using Pipeline = typename Traits::Pipeline;

  extern __shared__ __align__(1024) unsigned char hopper_memory[];
  const uint32_t skip = (0u - shared_address(hopper_memory)) % 1024;  // to where a swizzle pattern may start
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(hopper_memory + skip);
  const int thread = threadIdx.x, group = cutlass::canonical_warp_group_idx();
  const int rank = static_cast<int>(cute::block_rank_in_cluster());

  typename Pipeline::Params pipeline_params;
  pipeline_params.role = group == 0 ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
  pipeline_params.is_leader = thread == 0;
  pipeline_params.num_consumers = cute::size(typename Traits::TiledMma{});
  pipeline_params.transaction_bytes = Mainloop::TmaTransactionBytes;
  Pipeline pipeline(shared.pipeline, pipeline_params, typename Traits::ClusterShape{});
  cute::cluster_arrive_relaxed();  // no block touches another's barriers before they are set up
  cute::cluster_wait();

  const uint32_t row_pairs = (problem.row_tiles + kHopperCluster - 1) / kHopperCluster;
  const uint32_t units = row_pairs * problem.class_tiles, stride = gridDim.x / kHopperCluster;

  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (thread != 0) return;
    constexpr auto kNoHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
    constexpr uint16_t kBoth = 3;  // blocks of the cluster
    auto* z_memory = reinterpret_cast<T*>(shared.tensors.smem_A.data());
    auto* weight_memory = reinterpret_cast<T*>(shared.tensors.smem_B.data());
    auto state = cutlass::make_producer_start_state<Pipeline>();
    for (uint32_t unit = blockIdx.x / kHopperCluster; unit < units; unit += stride) {
      const Tile tile = tile_at(unit, row_pairs, problem.class_tiles);
      const int row = static_cast<int>(tile.row * kHopperCluster + rank) * kHopperRows;
      const int column = static_cast<int>(tile.column) * kHopperColumns + rank * kHalfColumns;
      // The OOD row belongs to the second half of the last tile.
      const bool ood =
          problem.ood_weight != nullptr && rank == kHopperCluster - 1 && tile.column + 1 == problem.class_tiles;
      const CUtensorMap* weight_map = ood ? &maps.weight_short : &maps.weight;
      for (int step = 0; step < steps; ++step, ++state) {
        pipeline.producer_acquire(state);
        uint64_t* barrier = pipeline.producer_get_barrier(state);
        const int depth = step * kHopperDepth;
        T* z = z_memory + state.index() * kHopperRows * kHopperDepth;
        T* weight = weight_memory + (state.index() * kHopperColumns + rank * kHalfColumns) * kHopperDepth;
        cute::SM90_TMA_LOAD_2D::copy(&maps.z, barrier, kNoHint, z, depth, row);
        cute::SM90_TMA_LOAD_MULTICAST_2D::copy(weight_map, barrier, kBoth, kNoHint, weight, depth, column);
        if (!ood) continue;
        T* ood_weight = weight + (kHalfColumns - kOodRows) * kHopperDepth;
        cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&maps.ood_weight, barrier, kBoth, kNoHint, ood_weight, depth, 0);
      }
    }
    pipeline.producer_tail(state);  // the other block may still be signalling this one
    return;
  }

  cutlass::arch::warpgroup_reg_alloc<232>();
  const int consumer = thread - 128;
  Mainloop mainloop;
  const typename Mainloop::Params unused{};
  typename Traits::TiledMma tiled_mma;
  const auto coordinates = tiled_mma.get_slice(consumer).partition_C(
      cute::make_identity_tensor(cute::Shape<cute::Int<kHopperRows>, cute::Int<kHopperColumns>>{}));
  // A thread's accumulators are pairs of columns of two rows, in 32 groups of eight columns.
  const auto row_of = [&](int r) { return static_cast<int>(cute::get<0>(coordinates(2 * r))); };
  const auto column_of = [&](int i) { return static_cast<int>(cute::get<1>(coordinates(i / 2 * 4 + i % 2))); };
  typename Traits::PipelineState state;
  uint32_t turn = 0;
  for (uint32_t unit = blockIdx.x / kHopperCluster; unit < units; unit += stride, turn ^= 1) {
    const Tile tile = tile_at(unit, row_pairs, problem.class_tiles);
    const int64_t first_row = static_cast<int64_t>(tile.row * kHopperCluster + rank) * kHopperRows;
    const int64_t first_class = static_cast<int64_t>(tile.column) * kHopperColumns;
    // What the epilogue reads is asked for here, and comes during the products.
    float next_bias[2];
    for (int i = 0; i < 2; ++i) next_bias[i] = bias_of(problem, first_class + consumer % 128 + i * 128);
    int targets[2];
    for (int r = 0; r < 2; ++r)
      targets[r] = target_column(problem, first_row + row_of(r), first_class, kHopperColumns);

    auto sums = cute::partition_fragment_C(tiled_mma, cute::Shape<cute::Int<kHopperRows>, cute::Int<kHopperColumns>>{});
    static_assert(cute::size(sums) == 128);
    mainloop.mma(pipeline, state, sums, steps, consumer, shared.tensors, unused);
    mainloop.mma_tail(pipeline, state, steps);
    state.advance(steps);
    cute::warpgroup_fence_operand(sums);

    // Two buffers take turns: with one barrier a tile, nobody writes what another still reads.
    float* bias = shared.bias[group - 1][turn];
    for (int i = 0; i < 2; ++i) bias[consumer % 128 + i * 128] = next_bias[i];
    cutlass::arch::NamedBarrier::sync(128, group);
    const bool ood = problem.ood_weight != nullptr && tile.column + 1 == problem.class_tiles;
    float2 partial[2];
    reduce_tile<T, 2, 64, 4>(
        problem, first_row, bias, ood ? kHopperColumns - kOodRows : -1, targets,
        [&](int r, int i) -> float& { return sums(i / 2 * 4 + r * 2 + i % 2); }, row_of, column_of, partial);
    for (int r = 0; r < 2; ++r) {
      const int64_t row = first_row + row_of(r);
      if (thread % 4 == 0 && row < problem.rows) problem.partial[tile.column * problem.rows + row] = partial[r];
    }
  }
#endif
}

// ---- Host -----------------------------------------------------------------------------------------------------------

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) cudaGetLastError();  // taken back, or PyTorch's next launch would fail with it
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

const char* name_of(ScalarType type) {
  return type == ScalarType::Float ? "float32" : type == ScalarType::BFloat16 ? "bfloat16" : "float16";
}

int64_t tiles(int64_t count, int64_t tile) { return (count + tile - 1) / tile; }

// A dimension of one element has whatever stride suits.
int64_t stride_of(const Tensor& tensor, int64_t dim, int64_t otherwise) {
  return tensor.size(dim) == 1 ? otherwise : tensor.stride(dim);
}

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// The kernels count tiles in 32 bits, and eight times the tiles.
void set_tiles(Problem& problem, int64_t row_tiles, int64_t class_tiles) {
  STD_TORCH_CHECK(row_tiles <= std::numeric_limits<int32_t>::max() / 16 / class_tiles, "too many tiles: ", row_tiles,
                  " of patches by ", class_tiles, " of classes");
  problem.row_tiles = static_cast<uint32_t>(row_tiles);
  problem.class_tiles = static_cast<uint32_t>(class_tiles);
}

int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// Rows of z as TMA needs them: how far they are apart, or 0 if they are not evenly spaced.
int64_t row_stride(const Problem& problem) {
  const int64_t images = problem.rows / problem.patches;
  if (problem.patches == 1) return images == 1 ? problem.depth : problem.image_stride;
  return images == 1 || problem.image_stride == problem.patches * problem.patch_stride ? problem.patch_stride : 0;
}

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// Asked of the driver at run time, so that the extension loads where there is none.
EncodeTensorMap encode_tensor_map() {
  static const EncodeTensorMap function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<EncodeTensorMap>(error == cudaSuccess && found == cudaDriverEntryPointSuccess ? pointer
                                                                                                         : nullptr);
  }();
  return function;
}

CUtensorMap tensor_map(const void* data, ScalarType type, int64_t depth, int64_t rows, int64_t stride, int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(depth), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};  // bytes
  const cuuint32_t box[2] = {kHopperDepth, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult result = encode_tensor_map()(
      &map, type == ScalarType::Half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled refused [", rows, ", ", depth, "] with stride ",
                  stride, ": error ", static_cast<int>(result));
  return map;
}

template <typename T>
bool hopper_takes(const Problem& problem, int device) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, device) != 9 ||
      device_attribute(cudaDevAttrComputeCapabilityMinor, device) != 0)
    return false;
  const int64_t z_stride = row_stride(problem);
  const bool fits = problem.z.vector && problem.weight.vector && problem.depth > 0 && problem.depth % 8 == 0 &&
                    z_stride >= problem.depth && problem.class_stride >= problem.depth &&
                    problem.classes < std::numeric_limits<int32_t>::max() - 1024;  // TMA's coordinates
  if (!fits || encode_tensor_map() == nullptr) return false;
  // Built without sm_90a the kernel is an empty body, with a handful of registers.
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, sample_hopper<T>) == cudaSuccess) return attributes.numRegs > 128;
  cudaGetLastError();  // the portable kernel's launch will say it better
  return false;
}

template <typename T>
void launch_hopper(const Problem& problem, ScalarType type, int device, cudaStream_t stream) {
  const auto weight_map = [&](int rows) {
    return tensor_map(problem.weight.data, type, problem.depth, problem.classes, problem.class_stride, rows);
  };
  HopperMaps maps;
  maps.z = tensor_map(problem.z.data, type, problem.depth, problem.rows, row_stride(problem), kHopperRows);
  maps.weight = weight_map(kHalfColumns);
  maps.weight_short = weight_map(kHalfColumns - kOodRows);
  maps.ood_weight = maps.weight_short;  // not read without the OOD row
  if (problem.ood_weight != nullptr)
    maps.ood_weight = tensor_map(problem.ood_weight, type, problem.depth, 1, problem.depth, kOodRows);

  check(cudaFuncSetAttribute(sample_hopper<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kHopperShared),
        "sample_hopper's shared memory");
  const uint32_t units = (problem.row_tiles + kHopperCluster - 1) / kHopperCluster * problem.class_tiles;
  const uint32_t clusters =
      std::min<uint32_t>(units, device_attribute(cudaDevAttrMultiProcessorCount, device) / kHopperCluster);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(clusters * kHopperCluster);
  config.blockDim = dim3(kHopperThreads);
  config.dynamicSmemBytes = kHopperShared;
  config.stream = stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kHopperCluster, 1, 1};
  config.attrs = &cluster;
  config.numAttrs = 1;
  const int steps = static_cast<int>(tiles(problem.depth, kHopperDepth));
  check(cudaLaunchKernelEx(&config, sample_hopper<T>, maps, problem, steps), "launch of sample_hopper");
}

template <typename T>
void launch_portable(const Problem& problem, cudaStream_t stream) {
  check(cudaFuncSetAttribute(sample_portable<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<T>)),
        "sample_portable's shared memory");
  sample_portable<T><<<problem.row_tiles * problem.class_tiles, kThreads, sizeof(Shared<T>), stream>>>(problem);
  check(cudaGetLastError(), "launch of sample_portable");
}

// The product: its tiles, the memory for what is kept of them, and the launch. `like` says where memory is.
template <typename T>
Tensor multiply(Problem& problem, const Tensor& like, int device, cudaStream_t stream) {
  const int64_t columns = problem.classes + (problem.ood_weight ? 1 : 0);
  bool hopper = false;
  if constexpr (!std::is_same_v<T, float>) hopper = hopper_takes<T>(problem, device);
  if (hopper) {
    const int64_t room = problem.classes + (problem.ood_weight ? kOodRows : 0);
    set_tiles(problem, tiles(problem.rows, kHopperRows), tiles(room, kHopperColumns));
  } else {
    set_tiles(problem, tiles(problem.rows, Sums<T>::kTileRows), tiles(columns, Sums<T>::kTileColumns));
  }
  const int64_t size = (2 * static_cast<int64_t>(problem.class_tiles) + 1) * problem.rows;
  Tensor workspace = torch::stable::new_empty(like, {&size, 1}, ScalarType::Float);
  problem.partial = static_cast<float2*>(workspace.mutable_data_ptr());
  problem.target_logit = workspace.mutable_data_ptr<float>() + 2 * problem.class_tiles * problem.rows;
  if constexpr (!std::is_same_v<T, float>) {
    if (hopper) {
      launch_hopper<T>(problem, like.scalar_type(), device, stream);
      return workspace;
    }
  }
  launch_portable<T>(problem, stream);
  return workspace;
}

std::tuple<Tensor, Tensor, Tensor> sample_cuda(const Tensor& z, const Tensor& weight, const Tensor& bias,
                                               const std::optional<Tensor>& ood_weight,
                                               const std::optional<Tensor>& ood_bias, const Tensor& target,
                                               double upper, double lower) {
  const Features f = check_arguments(z, weight, bias, ood_weight, ood_bias, target);
  const ScalarType type = z.scalar_type();
  STD_TORCH_CHECK(weight.scalar_type() == type, "weight must be ", name_of(type), " like z, got ",
                  name_of(weight.scalar_type()));
  STD_TORCH_CHECK(!ood_weight || ood_weight->scalar_type() == type, "ood_weight must be ", name_of(type),
                  " like z, got ", name_of(ood_weight ? ood_weight->scalar_type() : type));
  const int device = z.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto make = [&](int64_t size, ScalarType element) { return torch::stable::new_empty(z, {&size, 1}, element); };
  Tensor confidence = make(f.count(), ScalarType::Float), label = make(f.count(), ScalarType::Char);
  Tensor id_logit = make(ood_weight ? f.count() : 0, ScalarType::Float);
  if (f.count() == 0) return {confidence, label, id_logit};
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() - 1024;  // room for a tile more
  STD_TORCH_CHECK(f.count() < kLimit && f.depth < kLimit, "z must have less than ", kLimit,
                  " patches and features, got ", shape_of(z));

  Problem problem = {};
  problem.rows = f.count();
  problem.patches = f.patches;
  problem.depth = f.depth;
  problem.classes = weight.size(0);
  const int64_t vector = 16 / static_cast<int64_t>(z.element_size());
  problem.image_stride = f.images == 1 ? 0 : f.image_stride;
  problem.patch_stride = f.patches == 1 ? 0 : f.patch_stride;
  problem.z = {z.const_data_ptr(), stride_of(z, 2, 1), false};
  problem.z.vector = problem.z.feature_stride == 1 && aligned(problem.z.data) && problem.image_stride % vector == 0 &&
                     problem.patch_stride % vector == 0;
  // Weights come with adjacent features, or are copied; maps of features never are.
  const auto adjacent = [](const Tensor& tensor, int64_t dim) {
    return stride_of(tensor, dim, 1) == 1 ? tensor : torch::stable::contiguous(tensor);
  };
  const Tensor classes = adjacent(weight, 1), ood = ood_weight ? adjacent(*ood_weight, 0) : classes;
  problem.class_stride = stride_of(classes, 0, f.depth);
  problem.weight = {classes.const_data_ptr(), 1, false};
  problem.weight.vector = aligned(problem.weight.data) && problem.class_stride % vector == 0;
  problem.bias = {bias.const_data_ptr(), bias.scalar_type(), bias.stride(0)};
  if (ood_weight) {
    // Null means no OOD row. Without features its pointer is null too, and whatever stands for it is not read.
    problem.ood_weight = f.depth > 0 ? ood.const_data_ptr() : ood_bias->const_data_ptr();
    problem.weight.vector = problem.weight.vector && aligned(problem.ood_weight);
    problem.ood_bias = {ood_bias->const_data_ptr(), ood_bias->scalar_type(), 0};
    problem.id_logit = id_logit.mutable_data_ptr<float>();
  }
  problem.target = target.const_data_ptr<int64_t>();
  problem.target_stride = target.stride(0);

  void* current = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  const auto stream = static_cast<cudaStream_t>(current);
  const auto multiply_as = type == ScalarType::Float      ? multiply<float>
                           : type == ScalarType::BFloat16 ? multiply<BFloat16>
                                                          : multiply<Half>;
  const Tensor workspace = multiply_as(problem, z, device, stream);
  // The thresholds are rounded once, from double, to the type they are compared in.
  finish<<<static_cast<uint32_t>(tiles(problem.rows, kFinishThreads)), kFinishThreads, 0, stream>>>(
      problem, static_cast<float>(upper), static_cast<float>(lower), confidence.mutable_data_ptr<float>(),
      label.mutable_data_ptr<int8_t>());
  check(cudaGetLastError(), "launch of finish");
  return {confidence, label, id_logit};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ssod_edge, CUDA, library) { library.impl("sample", TORCH_BOX(&sample_cuda)); }
