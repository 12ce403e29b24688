// Attention between two streams on CUDA: arguments, memory, how the video is split. The kernels are in
// bidirectional_attention.cu.

#include <algorithm>
#include <limits>

#include "../checks.h"
#include "aligned.h"
#include "bidirectional_attention.h"
#include "ops.h"
#include "torch_device.h"

namespace javis::cuda {
namespace {

// Blocks of threads of a launch: two for each of the 132 processors of an H100, each of which has room for one. Not read
// from the device: results must not depend on its size.
constexpr int64_t kBlocks = 264;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tensor tokens_like(const Tensor& tensor, const Tensor& q_video, int64_t tokens, const char* name) {
  check_shape(tensor, {q_video.size(0), tokens, q_video.size(2)}, name);
  check_dtype(tensor, q_video.scalar_type(), name);
  return with_aligned_rows(tensor);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> bidirectional_attention(
    const Tensor& q_video_in, const Tensor& q_audio_in, const Tensor& v_video_in, const Tensor& v_audio_in,
    int64_t num_heads) {
  STD_TORCH_CHECK(q_video_in.dim() == 3 && q_audio_in.dim() == 3, "q_video and q_audio must be [B, N, E]");
  STD_TORCH_CHECK(
      q_video_in.scalar_type() == ScalarType::BFloat16 || q_video_in.scalar_type() == ScalarType::Half,
      "q_video must be bfloat16 or float16");
  const int64_t width = q_video_in.size(2), size = num_heads > 0 ? width / num_heads : 0;
  STD_TORCH_CHECK(
      num_heads > 0 && width % num_heads == 0 && size >= 8 && size <= kBidirectionalMaximum && size % 8 == 0, num_heads,
      " heads of ", width, " values: the size of a head must be a multiple of 8 up to ", kBidirectionalMaximum);
  BidirectionalArguments words{};
  words.batch = q_video_in.size(0), words.heads = num_heads, words.size = size;
  words.n_video = q_video_in.size(1), words.n_audio = q_audio_in.size(1);
  const OnDevice device(q_video_in);
  const Tensor q_video = tokens_like(q_video_in, q_video_in, words.n_video, "q_video");
  const Tensor q_audio = tokens_like(q_audio_in, q_video_in, words.n_audio, "q_audio");
  const Tensor v_video = tokens_like(v_video_in, q_video_in, words.n_video, "v_video");
  const Tensor v_audio = tokens_like(v_audio_in, q_video_in, words.n_audio, "v_audio");
  Tensor to_video = torch::stable::new_empty(q_video, {words.batch, words.n_video, width});
  Tensor to_audio = torch::stable::new_empty(q_video, {words.batch, words.n_audio, width});
  const auto floats = [](Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); };
  const auto workspace = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(q_video, shape, ScalarType::Float);
  };
  Tensor lse_video = workspace({words.batch, num_heads, words.n_video});
  Tensor lse_audio = workspace({words.batch, num_heads, words.n_audio});
  if (words.batch == 0 || words.n_video == 0 || words.n_audio == 0) {  // sums over no tokens
    torch::stable::zero_(to_video);
    torch::stable::zero_(to_audio);
    torch::stable::fill_(lse_video, -std::numeric_limits<double>::infinity());
    torch::stable::fill_(lse_audio, -std::numeric_limits<double>::infinity());
    return {to_video, to_audio, lse_video, lse_audio};
  }

  const int64_t pairs = words.batch * num_heads, tiles = ceil_div(words.n_video, kBidirectionalTile);
  const int64_t wanted = std::min(tiles, std::max<int64_t>(1, kBlocks / pairs));
  words.tiles_per_split = ceil_div(tiles, wanted);
  words.splits = ceil_div(tiles, words.tiles_per_split);
  Tensor part_sums = workspace({pairs, words.splits, words.n_audio, size});
  Tensor part_maxima = workspace({pairs, words.splits, words.n_audio});
  Tensor part_totals = workspace({pairs, words.splits, words.n_audio});
  const int64_t rows = words.n_audio > bidirectional_audio(static_cast<int>(size)) ? words.n_video : 0;
  Tensor row_sums = workspace({pairs, rows, size});
  Tensor row_statistics = workspace({pairs, bidirectional_column_groups(static_cast<int>(size)), rows, 2});

  words.q_video = q_video.const_data_ptr(), words.q_audio = q_audio.const_data_ptr();
  words.v_video = v_video.const_data_ptr(), words.v_audio = v_audio.const_data_ptr();
  words.to_video = to_video.mutable_data_ptr(), words.to_audio = to_audio.mutable_data_ptr();
  words.lse_video = floats(lse_video), words.lse_audio = floats(lse_audio);
  words.part_sums = floats(part_sums), words.part_maxima = floats(part_maxima), words.part_totals = floats(part_totals);
  words.row_sums = floats(row_sums), words.row_statistics = floats(row_statistics);
  words.qv_b = q_video.stride(0), words.qv_n = q_video.stride(1);
  words.qa_b = q_audio.stride(0), words.qa_n = q_audio.stride(1);
  words.vv_b = v_video.stride(0), words.vv_n = v_video.stride(1);
  words.va_b = v_audio.stride(0), words.va_n = v_audio.stride(1);
  words.is_bf16 = q_video.scalar_type() == ScalarType::BFloat16;
  check_launch(javis_cuda_bidirectional_attention(&words, device.stream()), "bidirectional_attention");
  return {to_video, to_audio, lse_video, lse_audio};
}

}  // namespace javis::cuda
