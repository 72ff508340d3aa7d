// What the CPU and the CUDA implementation of the sampling step share: the shapes, and the checks of the arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>

namespace ssod_edge {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Patch p = n * patches + l of image n lies at n * image_stride + l * patch_stride, its features feature_stride apart.
struct Features {
  int64_t images, patches, depth;
  int64_t image_stride, patch_stride, feature_stride;
  int64_t count() const { return images * patches; }
};

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

// Every argument of `sample`, whatever the device. The Python face checks the same and adds the fix.
//
//   z           [images, patches, D], any strides; float32, bfloat16 or float16
//   weight      [M, D] and bias [M] of the classifier
//   ood_weight  [D] and ood_bias [] of the OOD row, or neither
//   target      int64 [images], the class of each image; negative: its patches are ignored
inline Features check_arguments(const Tensor& z, const Tensor& weight, const Tensor& bias,
                                const std::optional<Tensor>& ood_weight, const std::optional<Tensor>& ood_bias,
                                const Tensor& target) {
  STD_TORCH_CHECK(z.dim() == 3, "z must be [images, patches, D], got ", shape_of(z));
  STD_TORCH_CHECK(is_float(z.scalar_type()), "z must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == z.size(2) && weight.size(0) >= 1, "weight must be [M, ",
                  z.size(2), "] to fit z, got ", shape_of(weight));
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == weight.size(0), "bias must be [", weight.size(0),
                  "] to fit weight, got ", shape_of(bias));
  STD_TORCH_CHECK(ood_weight.has_value() == ood_bias.has_value(), "ood_weight and ood_bias come together");
  if (ood_weight) {
    STD_TORCH_CHECK(ood_weight->dim() == 1 && ood_weight->size(0) == z.size(2), "ood_weight must be [", z.size(2),
                    "] to fit z, got ", shape_of(*ood_weight));
    STD_TORCH_CHECK(ood_bias->numel() == 1, "ood_bias must have one element, got ", shape_of(*ood_bias));
  }
  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == z.size(0) && target.scalar_type() == ScalarType::Long,
                  "target must be int64 [", z.size(0), "], one an image, got ", shape_of(target));
  for (const Tensor* other : {&weight, &bias, ood_weight ? &*ood_weight : &bias, ood_bias ? &*ood_bias : &bias}) {
    STD_TORCH_CHECK(is_float(other->scalar_type()), "weights and biases must be float32, bfloat16 or float16");
    STD_TORCH_CHECK(other->get_device_index() == z.get_device_index() && other->is_cuda() == z.is_cuda(),
                    "z, weights and biases must be on one device");
  }
  STD_TORCH_CHECK(target.is_cuda() == z.is_cuda() && target.get_device_index() == z.get_device_index(),
                  "target must be on the device of z");
  return {z.size(0), z.size(1), z.size(2), z.stride(0), z.stride(1), z.stride(2)};
}

}  // namespace ssod_edge
