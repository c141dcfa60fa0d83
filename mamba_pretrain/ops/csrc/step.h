// One step of a whole mixer for a few rows: what decoding does once a block and token (ops/mamba_inner.py).
//
// Reading the matrices is nearly all of its time, so they are read once, in the dtype they have, for all rows; all
// arithmetic is fp32. A parallel region lasts from the first product to the last: starting five would cost more than
// the convolution and the scan.
#pragma once
#include "vec.h"

namespace {

struct StepArgs {
  int64_t batch, width, inner, state, rank, taps, threads;
  const float* hidden;  // (B, D)
  const void *in_weight, *x_weight, *dt_weight, *out_weight;  // (2 E, D), (R + 2 N, E), (E, R), (D, E)
  const float *in_bias, *out_bias;                            // or null
  const float *conv_weight, *conv_bias;                       // (K, E); (E) or null
  const float *dt_bias, *A, *D;                               // (E), (E, N), (E)
  const float *conv_state, *ssm_state;                        // (B, S, E), (B, E, N)
  float *new_conv_state, *new_ssm_state, *out;                // out (B, D)
  float *xz, *x, *projected, *y;  // scratch: (B, 2 E), (B, E), (B, R + 2 N), (B, E)
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
      __builtin_prefetch(w + i + 1024);
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

template <class W>
void linear(const W* weight, const float* in, float* out, int64_t M, int64_t n, int64_t width, int64_t threads) {
#pragma omp parallel num_threads(threads)
  shared_product<W>(weight, nullptr, in, width, out, n, M, n, width);
}

template <class W>
void mixer_step(const StepArgs& a) {
  const int64_t E = a.inner, N = a.state, S = a.taps - 1, P = a.rank + 2 * N, vectors = ceil_div(E, LANES);
#pragma omp parallel num_threads(a.threads)
  {
    shared_product((const W*)a.in_weight, a.in_bias, a.hidden, a.width, a.xz, 2 * E, a.batch, 2 * E, a.width);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < a.batch * vectors; unit++) {
      const int64_t b = unit / vectors, e = unit % vectors * LANES;
      const int lanes = (int)min64(LANES, E - e);
      const float* old = a.conv_state + b * S * E + e;
      float* fresh = a.new_conv_state + b * S * E + e;
      vf input = load(a.xz + b * 2 * E + e, lanes), sum = a.conv_bias ? load(a.conv_bias + e, lanes) : vf{};
      for (int64_t k = 0; k < S; k++) {
        vf past = load(old + k * E, lanes);
        sum += load(a.conv_weight + k * E + e, lanes) * past;
        if (k > 0) store(fresh + (k - 1) * E, past, lanes);
      }
      if (S > 0) store(fresh + (S - 1) * E, input, lanes);
      sum += load(a.conv_weight + S * E + e, lanes) * input;
      store(a.x + b * E + e, sum * sigmoid(sum), lanes);
    }
    shared_product((const W*)a.x_weight, nullptr, a.x, E, a.projected, P, a.batch, P, E);
    shared_product((const W*)a.dt_weight, a.dt_bias, a.projected, P, a.y, E, a.batch, E, a.rank);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < a.batch * E; unit++) {  // here the lanes are states: they are contiguous
      const int64_t b = unit / E, e = unit % E;
      const float *B = a.projected + b * P + a.rank, *C = B + N, x = a.x[unit], z = a.xz[b * 2 * E + E + e];
      const float step = softplus(splat(a.y[unit]))[0];
      vf y = {};
      for (int64_t n = 0; n < N; n += LANES) {
        const int lanes = (int)min64(LANES, N - n);
        vf decay = exp2v(load(a.A + e * N + n, lanes) * LOG2E * step);
        vf h = decay * load(a.ssm_state + unit * N + n, lanes) + load(B + n, lanes) * (step * x);
        store(a.new_ssm_state + unit * N + n, h, lanes);
        y += h * load(C + n, lanes);
      }
      a.y[unit] = (sum(y) + a.D[e] * x) * z * sigmoid(splat(z))[0];
    }
    shared_product((const W*)a.out_weight, a.out_bias, a.y, E, a.out, a.width, a.batch, a.width, E);
  }
}

}  // namespace
