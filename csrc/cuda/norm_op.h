// Arguments of the CUDA norms: from torch's tensors to the words of norm.h. Shared by the bindings (*_op.cpp).

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "../checks.h"
#include "aligned.h"
#include "norm.h"
#include "torch_device.h"

namespace javis::cuda {

inline int64_t row_stride(const std::optional<Tensor>& tensor) { return tensor.has_value() ? tensor->stride(0) : 0; }

struct NormSizes {
  int64_t batch, tokens, width, frames, dtype;
};

inline NormSizes check_norm_inputs(const Tensor& x, const std::optional<Tensor>& frame_mask) {
  STD_TORCH_CHECK(x.dim() == 3, "x has ", x.dim(), " dimensions, expected 3: [B, N, C]");
  NormSizes sizes{x.size(0), x.size(1), x.size(2), 1, 0};
  switch (x.scalar_type()) {
    case ScalarType::Float: sizes.dtype = kFloat32; break;
    case ScalarType::BFloat16: sizes.dtype = kBfloat16; break;
    case ScalarType::Half: sizes.dtype = kFloat16; break;
    default: STD_TORCH_CHECK(false, "x must be float32, bfloat16 or float16");
  }
  STD_TORCH_CHECK(
      sizes.width > 0 && sizes.width % 8 == 0 && sizes.width <= kMaxNormWidth, "width ", sizes.width,
      " is not a multiple of 8 up to ", kMaxNormWidth);
  if (frame_mask.has_value()) {
    STD_TORCH_CHECK(frame_mask->dim() == 2 && frame_mask->size(0) == sizes.batch, "frame_mask must be [B, T]");
    sizes.frames = frame_mask->size(1);
    check_dtype(*frame_mask, ScalarType::Bool, "frame_mask");
    check_dense(*frame_mask, "frame_mask");
    STD_TORCH_CHECK(
        sizes.frames > 0 && sizes.tokens % sizes.frames == 0, "frame_mask has ", sizes.frames, " frames, which does not divide ",
        sizes.tokens, " tokens");
  }
  return sizes;
}

// A tensor of tokens like x, with rows that can be read.
inline Tensor check_tokens(const Tensor& tensor, const Tensor& x, const NormSizes& sizes, const char* name) {
  check_shape(tensor, {sizes.batch, sizes.tokens, sizes.width}, name);
  check_dtype(tensor, x.scalar_type(), name);
  return with_aligned_rows(tensor);
}

// Modulation: all of it float32, or all of the dtype of x. Empty stays empty.
inline std::optional<Tensor> check_modulation(
    const std::optional<Tensor>& tensor, const NormSizes& sizes, ScalarType dtype, const char* name) {
  if (!tensor.has_value()) return std::nullopt;
  check_shape(*tensor, {sizes.batch, sizes.width}, name);
  check_dtype(*tensor, dtype, name);
  return with_aligned_rows(*tensor);
}

inline ScalarType modulation_dtype(const Tensor& scale, const Tensor& x) {
  STD_TORCH_CHECK(
      scale.scalar_type() == ScalarType::Float || scale.scalar_type() == x.scalar_type(),
      "scale must be float32 or have the dtype of x");
  return scale.scalar_type();
}

inline void check_statistic(const Tensor& tensor, const NormSizes& sizes, const char* name) {
  check_shape(tensor, {sizes.batch, sizes.tokens}, name);
  check_dtype(tensor, ScalarType::Float, name);
  check_dense(tensor, name);
}

// Where frames take the modulation of timestep 0, it must be there.
inline void check_masked(const std::optional<Tensor>& frame_mask, std::initializer_list<const std::optional<Tensor>*> needed) {
  if (!frame_mask.has_value()) return;
  for (const std::optional<Tensor>* tensor : needed)
    STD_TORCH_CHECK(tensor->has_value(), "frame_mask needs the modulation of timestep 0");
}

// Modulation and outputs are kept here until the kernel has been launched; their memory then belongs to the stream.
struct ForwardCall {
  NormSizes sizes;
  ScalarType modulation_type;
  std::optional<Tensor> gate, shift, scale, gate0, shift0, scale0;
  NormForward words{};

  ForwardCall(
      const Tensor& x, const std::optional<Tensor>& gate_in, const Tensor& shift_in, const Tensor& scale_in,
      const std::optional<Tensor>& gate0_in, const std::optional<Tensor>& shift0_in, const std::optional<Tensor>& scale0_in,
      const std::optional<Tensor>& frame_mask, double eps)
      : sizes(check_norm_inputs(x, frame_mask)), modulation_type(modulation_dtype(scale_in, x)) {
    check_masked(frame_mask, {&shift0_in, &scale0_in});
    if (gate_in.has_value()) check_masked(frame_mask, {&gate0_in});
    gate = check_modulation(gate_in, sizes, modulation_type, "gate");
    shift = check_modulation(shift_in, sizes, modulation_type, "shift");
    scale = check_modulation(scale_in, sizes, modulation_type, "scale");
    gate0 = check_modulation(gate0_in, sizes, modulation_type, "gate0");
    shift0 = check_modulation(shift0_in, sizes, modulation_type, "shift0");
    scale0 = check_modulation(scale0_in, sizes, modulation_type, "scale0");
    words.x = x.const_data_ptr();
    words.x_b = x.stride(0), words.x_n = x.stride(1);
    words.gate = data(gate), words.shift = data(shift), words.scale = data(scale);
    words.gate0 = data(gate0), words.shift0 = data(shift0), words.scale0 = data(scale0);
    words.gate_b = row_stride(gate), words.shift_b = row_stride(shift), words.scale_b = row_stride(scale);
    words.gate0_b = row_stride(gate0), words.shift0_b = row_stride(shift0), words.scale0_b = row_stride(scale0);
    words.frame_mask = static_cast<const uint8_t*>(data(frame_mask));
    words.batch = sizes.batch, words.tokens = sizes.tokens, words.width = sizes.width, words.frames = sizes.frames;
    words.dtype = sizes.dtype, words.float_modulation = modulation_type == ScalarType::Float;
    words.eps = eps;
  }
  void residual(const Tensor& h, const Tensor& r) {
    words.h = h.const_data_ptr();
    words.h_b = h.stride(0), words.h_n = h.stride(1);
    words.r = r.mutable_data_ptr();
  }
  void statistics(const Tensor& y, const Tensor& mean, const Tensor& rstd) {
    words.y = y.mutable_data_ptr();
    words.mean = static_cast<float*>(mean.mutable_data_ptr());
    words.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  }
  // q, and one scale a row unless y_scale is given.
  void float8(const Tensor& q, const std::optional<Tensor>& y_scale, const Tensor& row_scale) {
    words.y = q.mutable_data_ptr();
    words.fp8 = y_scale.has_value() ? kFp8Static : kFp8Rows;
    if (y_scale.has_value()) {
      check_dtype(*y_scale, ScalarType::Float, "y_scale");
      STD_TORCH_CHECK(y_scale->numel() == 1, "y_scale must be one number");
    }
    words.y_scale = static_cast<const float*>(data(y_scale));
    words.row_scale = y_scale.has_value() ? nullptr : static_cast<float*>(row_scale.mutable_data_ptr());
  }
};

inline Tensor new_tokens(const Tensor& x) { return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)}); }
inline Tensor new_float8(const Tensor& x) {
  return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)}, ScalarType::Float8_e4m3fn);
}
inline Tensor new_statistic(const Tensor& x) { return torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Float); }
inline Tensor new_row_scale(const Tensor& x, bool wanted) {
  return wanted ? new_statistic(x) : torch::stable::new_empty(x, {0}, ScalarType::Float);
}

// What both backward passes share: dx, the partial sums and dmodulation.
struct BackwardCall {
  NormSizes sizes;
  std::optional<Tensor> gate, scale, gate0, scale0;
  Tensor dx, partial, dmodulation;
  NormBackward words{};

  BackwardCall(
      const Tensor& dy, const Tensor& r, const Tensor& mean, const Tensor& rstd, const std::optional<Tensor>& gate_in,
      const Tensor& scale_in, const std::optional<Tensor>& gate0_in, const std::optional<Tensor>& scale0_in,
      const std::optional<Tensor>& frame_mask)
      : sizes(check_norm_inputs(r, frame_mask)) {
    const ScalarType type = modulation_dtype(scale_in, r);
    check_masked(frame_mask, {&scale0_in});
    if (gate_in.has_value()) check_masked(frame_mask, {&gate0_in});
    gate = check_modulation(gate_in, sizes, type, "gate");
    scale = check_modulation(scale_in, sizes, type, "scale");
    gate0 = check_modulation(gate0_in, sizes, type, "gate0");
    scale0 = check_modulation(scale0_in, sizes, type, "scale0");
    check_statistic(mean, sizes, "mean");
    check_statistic(rstd, sizes, "rstd");
    const int64_t places = sizes.tokens / sizes.frames, sums = norm_sums(gate.has_value());
    words.rows_per_part = norm_rows_per_part(sizes.batch * sizes.tokens, places);
    words.parts = (places + words.rows_per_part - 1) / words.rows_per_part;
    dx = new_tokens(r);
    partial = torch::stable::new_empty(r, {sizes.batch * sizes.frames * words.parts, sums, sizes.width}, ScalarType::Float);
    dmodulation = torch::stable::new_empty(
        r, {sums * (frame_mask.has_value() ? 2 : 1), sizes.batch, sizes.width}, type);
    if (sizes.batch * sizes.tokens == 0) torch::stable::zero_(dmodulation);
    words.dy = dy.const_data_ptr(), words.dy_b = dy.stride(0), words.dy_n = dy.stride(1);
    words.r = r.const_data_ptr(), words.r_b = r.stride(0), words.r_n = r.stride(1);
    words.mean = static_cast<const float*>(mean.const_data_ptr());
    words.rstd = static_cast<const float*>(rstd.const_data_ptr());
    words.gate = data(gate), words.scale = data(scale), words.gate0 = data(gate0), words.scale0 = data(scale0);
    words.gate_b = row_stride(gate), words.scale_b = row_stride(scale);
    words.gate0_b = row_stride(gate0), words.scale0_b = row_stride(scale0);
    words.frame_mask = static_cast<const uint8_t*>(data(frame_mask));
    words.dx = dx.mutable_data_ptr();
    words.partial = static_cast<float*>(partial.mutable_data_ptr());
    words.dmodulation = dmodulation.mutable_data_ptr();
    words.batch = sizes.batch, words.tokens = sizes.tokens, words.width = sizes.width, words.frames = sizes.frames;
    words.dtype = sizes.dtype, words.float_modulation = type == ScalarType::Float;
  }
  void residual(const Tensor& dr) { words.dr = dr.const_data_ptr(), words.dr_b = dr.stride(0), words.dr_n = dr.stride(1); }
  void gated(const Tensor& h, const Tensor& dh) {
    words.h = h.const_data_ptr(), words.h_b = h.stride(0), words.h_n = h.stride(1);
    words.dh = dh.mutable_data_ptr();
  }
};

}  // namespace javis::cuda
