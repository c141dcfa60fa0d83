// One token of a whole model for a few rows: what decoding does (ops/decode.py).
//
// Reading the matrices is nearly all of its time, so they are read once, in the dtype they have, for all rows; all
// arithmetic is fp32. One parallel region lasts from the embedding to the logits: starting one for every product would
// cost more than convolution, scan and norm together, and so would returning to Python for every block.
#pragma once
#include <omp.h>

#include "vec.h"

namespace {

struct BlockArgs {
  const float* norm;                                          // (D)
  const void *in_weight, *x_weight, *dt_weight, *out_weight;  // (2 E, D), (R + 2 N, E), (E, R), (D, E)
  const float *in_bias, *out_bias;                            // or null
  const float *conv_weight, *conv_bias;                       // (K, E); (E) or null
  const float *dt_bias, *A, *D;                               // (E), (E, N), (E)
};

struct StepArgs {
  int64_t batch, width, inner, state, rank, taps, vocabulary, blocks, threads;
  const BlockArgs* block;
  const float *embedding, *norm;               // (V, D), (D)
  const void* head;                            // (V, D)
  const int64_t* token;                        // (B)
  const float* const *conv_state, *const *ssm_state;  // of each block (B, S, E), (B, E, N)
  float *new_conv_state, *new_ssm_state;       // (blocks, B, S, E), (blocks, B, E, N)
  float* logits;                               // (B, V)
  float *normed, *xz, *x, *projected, *y, *out;  // scratch: (threads, B, 2 D), (B, 2 E), (B, E), (B, R + 2 N), (B, E), (B, D)
  float eps;
};

// Rows [begin, end) of weight (n, width) times M vectors: out[m, row] = sum weight[row] in[m] + bias[row].
template <class W, int M>
void product(const W* weight, const float* bias, const float* in, int64_t in_stride, float* out, int64_t out_stride,
             int64_t width, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const W* w = weight + r * width;
    vf even[M] = {}, odd[M] = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES) {
      vf w0 = load(w + i), w1 = load(w + i + LANES);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        even[m] += w0 * load(in + m * in_stride + i);
        odd[m] += w1 * load(in + m * in_stride + i + LANES);
      }
    }
    for (; i < width; i += LANES) {
      const int lanes = (int)min64(LANES, width - i);
      vf w0 = load(w + i, lanes);
      for (int m = 0; m < M; m++) even[m] += w0 * load(in + m * in_stride + i, lanes);
    }
    for (int m = 0; m < M; m++) out[m * out_stride + r] = sum(even[m] + odd[m]) + (bias ? bias[r] : 0.0f);
  }
}

// All of weight (n, width) times the M vectors, called by every thread of a parallel region.
template <class W>
void shared_product(const W* weight, const float* bias, const float* in, int64_t in_stride, float* out,
                    int64_t out_stride, int64_t M, int64_t n, int64_t width) {
  constexpr int64_t BLOCK = 16;
#pragma omp for schedule(static)
  for (int64_t block = 0; block < ceil_div(n, BLOCK); block++) {
    const int64_t begin = block * BLOCK, end = min64(begin + BLOCK, n);
    int64_t m = 0;
    for (; m + 4 <= M; m += 4)
      product<W, 4>(weight, bias, in + m * in_stride, in_stride, out + m * out_stride, out_stride, width, begin, end);
    for (; m < M; m++)
      product<W, 1>(weight, bias, in + m * in_stride, in_stride, out + m * out_stride, out_stride, width, begin, end);
  }
}

// stream += out, and y = RMSNorm(stream): by every thread into memory of its own, which costs less than to wait.
INLINE void add_norm(float* stream, float* y, const float* out, const float* weight, int64_t width, float eps) {
  vf squares = {};
  for (int64_t i = 0; i < width; i += LANES) {
    const int lanes = (int)min64(LANES, width - i);
    vf s = load(stream + i, lanes);
    if (out) s += load(out + i, lanes);
    store(stream + i, s, lanes);
    squares += s * s;
  }
  const float scale = 1.0f / __builtin_sqrtf(sum(squares) / (float)width + eps);
  for (int64_t i = 0; i < width; i += LANES) {
    const int lanes = (int)min64(LANES, width - i);
    store(y + i, load(stream + i, lanes) * scale * load(weight + i, lanes), lanes);
  }
}

INLINE void conv_step(const StepArgs& a, const BlockArgs& w, const float* state, float* new_state) {
  const int64_t E = a.inner, S = a.taps - 1, vectors = ceil_div(E, LANES);
#pragma omp for schedule(static)
  for (int64_t unit = 0; unit < a.batch * vectors; unit++) {
    const int64_t b = unit / vectors, e = unit % vectors * LANES;
    const int lanes = (int)min64(LANES, E - e);
    const float* old = state + b * S * E + e;
    float* fresh = new_state + b * S * E + e;
    vf input = load(a.xz + b * 2 * E + e, lanes), sum = w.conv_bias ? load(w.conv_bias + e, lanes) : vf{};
    for (int64_t k = 0; k < S; k++) {
      vf past = load(old + k * E, lanes);
      sum += load(w.conv_weight + k * E + e, lanes) * past;
      if (k > 0) store(fresh + (k - 1) * E, past, lanes);
    }
    if (S > 0) store(fresh + (S - 1) * E, input, lanes);
    sum += load(w.conv_weight + S * E + e, lanes) * input;
    store(a.x + b * E + e, sum * sigmoid(sum), lanes);
  }
}

// Step sizes and gates of LANES channels at once; then, channel by channel, the lanes are states, which are contiguous in
// (B, E, N). y holds delta before softplus, and then the output.
INLINE void scan_step(const StepArgs& a, const BlockArgs& w, const float* state, float* new_state) {
  const int64_t E = a.inner, N = a.state, P = a.rank + 2 * N, vectors = ceil_div(E, LANES);
#pragma omp for schedule(static)
  for (int64_t unit = 0; unit < a.batch * vectors; unit++) {
    const int64_t b = unit / vectors, e = unit % vectors * LANES;
    const int lanes = (int)min64(LANES, E - e);
    const float *B = a.projected + b * P + a.rank, *C = B + N;
    const vf step = softplus(load(a.y + b * E + e, lanes)), z = load(a.xz + b * 2 * E + E + e, lanes);
    const vf x = load(a.x + b * E + e, lanes), input = step * x;
    vf y = load(w.D + e, lanes) * x;
    for (int i = 0; i < lanes; i++) {
      const int64_t at = (b * E + e + i) * N;
      vf dot = {};
      for (int64_t n = 0; n < N; n += LANES) {
        const int states = (int)min64(LANES, N - n);
        vf decay = exp2v(load(w.A + (e + i) * N + n, states) * LOG2E * step[i]);
        vf h = decay * load(state + at + n, states) + load(B + n, states) * input[i];
        store(new_state + at + n, h, states);
        dot += h * load(C + n, states);
      }
      y[i] += sum(dot);
    }
    store(a.y + b * E + e, y * z * sigmoid(z), lanes);
  }
}

template <class W>
void decode_step(const StepArgs& a) {
  const int64_t M = a.batch, D = a.width, E = a.inner, P = a.rank + 2 * a.state;
  const int64_t conv_size = M * (a.taps - 1) * E, ssm_size = M * E * a.state;
#pragma omp parallel num_threads(a.threads)
  {
    float* stream = a.normed + omp_get_thread_num() * 2 * M * D;
    float* y = stream + M * D;
    for (int64_t b = 0; b < M; b++) memcpy(stream + b * D, a.embedding + a.token[b] * D, D * sizeof(float));
    for (int64_t i = 0; i < a.blocks; i++) {
      const BlockArgs& w = a.block[i];
      for (int64_t b = 0; b < M; b++)
        add_norm(stream + b * D, y + b * D, i > 0 ? a.out + b * D : nullptr, w.norm, D, a.eps);
      shared_product((const W*)w.in_weight, w.in_bias, y, D, a.xz, 2 * E, M, 2 * E, D);
      conv_step(a, w, a.conv_state[i], a.new_conv_state + i * conv_size);
      shared_product((const W*)w.x_weight, nullptr, a.x, E, a.projected, P, M, P, E);
      shared_product((const W*)w.dt_weight, w.dt_bias, a.projected, P, a.y, E, M, E, a.rank);
      scan_step(a, w, a.ssm_state[i], a.new_ssm_state + i * ssm_size);
      shared_product((const W*)w.out_weight, w.out_bias, a.y, E, a.out, D, M, D, E);
    }
    for (int64_t b = 0; b < M; b++) add_norm(stream + b * D, y + b * D, a.out + b * D, a.norm, D, a.eps);
    shared_product((const W*)a.head, nullptr, y, D, a.logits, a.vocabulary, M, a.vocabulary, D);
  }
}

}  // namespace
