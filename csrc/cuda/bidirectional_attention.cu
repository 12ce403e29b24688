// Video asks audio and audio asks video, with one score matrix for both softmaxes. bf16 or fp16, sums in float32.
// The formulas and the plan: docs/kernels/bidirectional_attention.md.
//
// A block of threads owns one split of the video of one head, and passes over it in tiles of 64 tokens. A warp owns 16
// audio tokens for good: the sums of their softmax over the video stay in registers, their queries in shared memory. Per
// tile
//   1. it makes S' (16 audio x 64 video), adds exp(S' - running maximum) v_video to its sums, and says what the largest
//      score of each video token is among its audio tokens;
//   2. (barrier) with the maxima of all warps it writes exp(S' - maximum) to shared memory;
//   3. (barrier) the warps share out the products of that with v_audio by rows and columns, and finish the video tokens.
// The next tile is on its way from memory meanwhile. A second kernel adds the sums of the splits, in order.
// More audio tokens than a block has warps for: the block passes over its video again for the next ones and adds to the
// rows it left in memory. A warp reads there what it wrote itself.

#include "bidirectional_tiles.cuh"

namespace javis::cuda {
namespace {

// javis/kernels/ops/bidirectional_attention/contract.py asks the device for these.
static_assert(Plan<64>::kShared == 137472 && Plan<72>::kShared == 137472 && Plan<128>::kShared == 160000);

template <typename T, int DP>
__global__ void __launch_bounds__(Plan<DP>::kThreads, 1)
    bidirectional_forward(const BidirectionalArguments a, const float scale) {
  using P = Plan<DP>;
  JAVIS_DYNAMIC_SHARED(shared);
  T* const tiles = reinterpret_cast<T*>(shared);  // q, v of an even tile, q, v of an odd one
  T* const queries = reinterpret_cast<T*>(shared + P::kAtQueries);
  T* const values = reinterpret_cast<T*>(shared + P::kAtValues);
  T* const p = reinterpret_cast<T*>(shared + P::kAtP);
  float* const maxima = reinterpret_cast<float*>(shared + P::kAtMaxima);   // [warps, 64]
  float* const row_maxima = reinterpret_cast<float*>(shared + P::kAtRows);  // [64]
  const int size = DP == 72 ? 72 : static_cast<int>(a.size);  // 72 is compiled as such
  const int n_video = static_cast<int>(a.n_video), n_audio = static_cast<int>(a.n_audio);
  const int warp = warp_id(), lane = lane_id(), g = lane / 4, t = lane % 4;
  const int split = static_cast<int>(blockIdx.x), pair = static_cast<int>(blockIdx.y);
  const int heads = static_cast<int>(a.heads);
  const int64_t b = pair / heads, h = pair % heads, width = a.heads * size;
  const T* const qv = static_cast<const T*>(a.q_video) + b * a.qv_b + h * size;
  const T* const vv = static_cast<const T*>(a.v_video) + b * a.vv_b + h * size;
  const T* const qa = static_cast<const T*>(a.q_audio) + b * a.qa_b + h * size;
  const T* const va = static_cast<const T*>(a.v_audio) + b * a.va_b + h * size;

  const int per_split = static_cast<int>(a.tiles_per_split), begin = split * per_split, all = (n_video + kTile - 1) / kTile;
  const int end = begin + per_split < all ? begin + per_split : all;
  const auto fetch_video = [&](int tile) {
    T* const to = tiles + (tile & 1) * 2 * kTile * P::kPitch;
    fetch<T, DP>(to, qv, a.qv_n, tile * kTile, kTile, n_video, size);
    fetch<T, DP>(to + kTile * P::kPitch, vv, a.vv_n, tile * kTile, kTile, n_video, size);
  };

  for (int chunk = 0; chunk < n_audio; chunk += P::kAudio) {
    const int here = n_audio - chunk < P::kAudio ? n_audio - chunk : P::kAudio;
    const int warps = (here + 15) / 16;  // that have audio tokens; the others only help with the rows
    const int own = chunk + 16 * warp;
    __syncthreads();  // the values of the chunk before are still read
    fetch<T, DP>(queries, qa, a.qa_n, chunk, 16 * warps, n_audio, size);
    fetch<T, DP>(values, va, a.va_n, chunk, 16 * warps, n_audio, size);
    fetch_video(begin);
    cp_async_commit();
    Audio<DP> audio;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      audio.maximum[half] = kMinusInfinity;
      audio.total[half] = 0.f;
    }
#pragma unroll
    for (int n = 0; n < P::kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) audio.sums[n][i] = 0.f;
    cp_async_wait<0>();
    __syncthreads();

    for (int tile = begin; tile < end; ++tile) {
      const T* const q_tile = tiles + (tile & 1) * 2 * kTile * P::kPitch;
      const int first = tile * kTile;
      if (tile + 1 < end) fetch_video(tile + 1);  // into what was read before the last two barriers
      cp_async_commit();

      float s[8][4];
      if (warp < warps) {
        scores_of<T, DP>(queries + 16 * warp * P::kPitch, q_tile, s);
        if (first + kTile > n_video || own + 16 > n_audio) {  // -inf where there is no token
#pragma unroll
          for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              if (first + 8 * n + 2 * t + i % 2 >= n_video || own + g + 8 * (i / 2) >= n_audio) s[n][i] = kMinusInfinity;
        }
        add_video<T, DP>(audio, q_tile + kTile * P::kPitch, s, scale);
        float largest[8][2];
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) largest[n][e] = fmaxf(s[n][e], s[n][2 + e]);
        largest_of_columns(largest);
        store8(maxima + warp * kTile + 2 * lane, {{bits_of(largest[0][0]), bits_of(largest[0][1])}});
      }
      __syncthreads();

      if (warp < warps) {
        float top[2] = {kMinusInfinity, kMinusInfinity};  // of video tokens 2 lane, 2 lane + 1
#pragma unroll 2
        for (int w = 0; w < warps; ++w) {
          const Vec8 x = load8(maxima + w * kTile + 2 * lane);
          top[0] = fmaxf(top[0], float_of(x.word[0]));
          top[1] = fmaxf(top[1], float_of(x.word[1]));
        }
        if (warp == 0) store8(row_maxima + 2 * lane, {{bits_of(top[0]), bits_of(top[1])}});
        const float base[2] = {finite(top[0]) * scale, finite(top[1]) * scale};
        T* const to = p + (16 * warp + g) * kPitchP + 2 * t;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const float low = shuffle_from(base[0], 4 * n + t), high = shuffle_from(base[1], 4 * n + t);
#pragma unroll
          for (int half = 0; half < 2; ++half)
            store4(to + 8 * half * kPitchP + 8 * n, pack2<T>(fast_exp2(s[n][2 * half] * scale - low),
                                                             fast_exp2(s[n][2 * half + 1] * scale - high)));
        }
      }
      cp_async_wait<0>();
      __syncthreads();

      const int64_t token = b * n_video + first;
      for (int job = warp; job < P::kJobs; job += P::kWarps) {
        const int group = job / (kTile / 16), row = 16 * (job % (kTile / 16));
        const int64_t at = static_cast<int64_t>(pair) * n_video + first;
        const Rows rows{a.row_sums + at * size,
                        a.row_statistics + ((static_cast<int64_t>(pair) * P::kGroups + group) * n_video + first) * 2,
                        n_audio > P::kAudio, chunk == 0, chunk + P::kAudio >= n_audio};
        finish_video<T, DP>(p, values, warps, row, 8 * P::kGroup * group, size, n_video - first,
                            static_cast<T*>(a.to_video) + token * width + h * size, width, a.lse_video + at, rows,
                            row_maxima, scale);
      }
    }

    // What this split says to its audio tokens, for the second kernel.
    if (warp < warps) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = lanes_sum<4>(audio.total[half]);
        const int row = own + g + 8 * half;
        if (row >= n_audio) continue;
        const int64_t part = (static_cast<int64_t>(pair) * a.splits + split) * n_audio + row;
        if (t == 0) {
          a.part_maxima[part] = audio.maximum[half] == kMinusInfinity ? kMinusInfinity : audio.maximum[half] * scale;
          a.part_totals[part] = total;
        }
#pragma unroll
        for (int n = 0; n < P::kColumns; ++n) {
          const int column = 8 * n + 2 * t;
          if (column < size)
            store8(a.part_sums + part * size + column,
                   {{bits_of(audio.sums[n][2 * half]), bits_of(audio.sums[n][2 * half + 1])}});
        }
      }
    }
  }
}

// Four values of one audio token of one head: the parts of all splits, in order.
template <typename T>
__global__ void __launch_bounds__(128) bidirectional_merge(const BidirectionalArguments a) {
  const unsigned vectors = static_cast<unsigned>(a.size) / 4, pair = blockIdx.y;
  const unsigned i = blockIdx.x * 128 + threadIdx.x;  // below 2^31
  const int64_t token = i / vectors;
  const int column = static_cast<int>(4 * (i % vectors));
  if (token >= a.n_audio) return;
  const int64_t first = static_cast<int64_t>(pair) * a.splits * a.n_audio + token;
  float top = kMinusInfinity;
  for (int split = 0; split < a.splits; ++split)
    top = fmaxf(top, a.part_maxima[first + static_cast<int64_t>(split) * a.n_audio]);
  float total = 0.f, sums[4] = {};
  for (int split = 0; split < a.splits; ++split) {
    const int64_t part = first + static_cast<int64_t>(split) * a.n_audio;
    const float take = fast_exp2(a.part_maxima[part] - finite(top));
    const Vec16 x = load16(a.part_sums + part * a.size + column);
    total += a.part_totals[part] * take;
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[e] += float_of(x.word[e]) * take;
  }
  if (column == 0) a.lse_audio[pair * a.n_audio + token] = top + log2f(total);
  const float inverse = fast_reciprocal(total);
  const unsigned heads = static_cast<unsigned>(a.heads);
  const int64_t b = pair / heads, h = pair % heads, width = a.heads * a.size;
  store8(static_cast<T*>(a.to_audio) + (b * a.n_audio + token) * width + h * a.size + column,
         {{pack2<T>(sums[0] * inverse, sums[1] * inverse), pack2<T>(sums[2] * inverse, sums[3] * inverse)}});
}

template <typename T, int DP>
const char* start(const BidirectionalArguments& a, void* stream) {
  using P = Plan<DP>;
  const float scale = kLog2E / __builtin_sqrtf(static_cast<float>(a.size));
  const unsigned pairs = static_cast<unsigned>(a.batch) * static_cast<unsigned>(a.heads);
  const char* problem = launch<bidirectional_forward<T, DP>>(dim3(static_cast<unsigned>(a.splits), pairs),
                                                             dim3(P::kThreads), P::kShared, stream, a, scale);
  if (problem != nullptr) return problem;
  const int64_t vectors = a.n_audio * (a.size / 4);
  const dim3 grid(static_cast<unsigned>((vectors + 127) / 128), pairs);
  return launch<bidirectional_merge<T>>(grid, dim3(128), 0, stream, a);
}

template <typename T>
const char* start(const BidirectionalArguments& a, void* stream) {
  if (a.size == 72) return start<T, 72>(a, stream);
  return a.size <= 64 ? start<T, 64>(a, stream) : start<T, 128>(a, stream);
}

}  // namespace

JAVIS_ENTRY javis_cuda_bidirectional_attention(const BidirectionalArguments* arguments, void* stream) {
  const BidirectionalArguments& a = *arguments;
  if (a.size < kBidirectionalMinimum || a.size > kBidirectionalMaximum || a.size % 8 != 0)
    return "bidirectional_attention: heads of a multiple of 8 up to 128 values";
  if (a.batch < 1 || a.n_video < 1 || a.n_audio < 1) return "bidirectional_attention: nothing to attend to";
  if (static_cast<int64_t>(a.batch) * a.heads > 65535) return "bidirectional_attention: more heads than a grid holds";
  if (a.n_video >= int64_t{1} << 30 || a.n_audio >= int64_t{1} << 24) return "bidirectional_attention: too many tokens";
  return a.is_bf16 != 0 ? start<bf16>(a, stream) : start<fp16>(a, stream);
}

}  // namespace javis::cuda
