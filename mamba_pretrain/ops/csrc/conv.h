// Depthwise causal convolution with SiLU, forward and backward (ops/causal_conv1d.py has the equation).
//
// Units, chunks and lanes are those of the scan. A tap counts if it lies in the document of its step: `reach` of a step
// is the number of taps that do. The state before the first step counts as S = K - 1 steps of the first document.
#pragma once
#include "scan.h"

namespace {

struct ConvArgs {
  int64_t batch, length, inner, taps, threads;
  View x, y, dy, dx;
  const float *weight, *bias;  // (K, E); (E) or null
  const uint8_t* starts;       // (B, L): a document begins; or null
  const float* first;          // (B, S, E) or null: zeros
  const float* dlast;          // (B, S, E) or null: zeros
  float *dweight, *dbias;      // (B, K, E), (B, E): one partial a row
  float* dfirst;               // (B, S, E) or null
};

// Steps back from t, t included, that belong to t's document; at most `taps`.
INLINE int64_t reach(const uint8_t* starts, int64_t t, int64_t taps) {
  if (starts)
    for (int64_t j = 0; j < taps && j <= t; j++)
      if (starts[t - j]) return j + 1;
  return taps;
}

// Input of step t; before the first step the state.
template <class X>
INLINE vf input(const ConvArgs& a, int64_t b, int64_t t, int64_t e, int lanes) {
  if (t >= 0) return load(a.x.row<X>(b, t) + e, lanes);
  if (!a.first) return vf{};
  return load(a.first + ((b + 1) * (a.taps - 1) + t) * a.inner + e, lanes);
}

template <class X>
INLINE vf before_silu(const ConvArgs& a, int64_t b, int64_t t, int64_t e, int lanes, int64_t near) {
  vf sum = a.bias ? load(a.bias + e, lanes) : vf{};
  for (int64_t j = near - 1; j >= 0; j--)
    sum += load(a.weight + (a.taps - 1 - j) * a.inner + e, lanes) * input<X>(a, b, t - j, e, lanes);
  return sum;
}

template <class X>
void conv_forward(const ConvArgs& a) {
  const int64_t L = a.length, E = a.inner, chunks = ceil_div(L, CHUNK);
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
  for (int64_t unit = 0; unit < a.batch * chunks; unit++) {
    const int64_t b = unit / chunks, t0 = unit % chunks * CHUNK, t1 = min64(t0 + CHUNK, L);
    const uint8_t* starts = a.starts ? a.starts + b * L : nullptr;
    for (int64_t t = t0; t < t1; t++) {
      const int64_t near = reach(starts, t, a.taps);
      X* y = a.y.row<X>(b, t);
      int64_t e = 0;
      if (a.taps == 4 && near == 4 && t >= 3) {  // nearly every step of every model
        const X *x0 = a.x.row<X>(b, t), *x1 = a.x.row<X>(b, t - 1), *x2 = a.x.row<X>(b, t - 2), *x3 = a.x.row<X>(b, t - 3);
        const float *w3 = a.weight, *w2 = w3 + E, *w1 = w2 + E, *w0 = w1 + E;
        for (; e + LANES <= E; e += LANES) {
          vf sum = a.bias ? load(a.bias + e) : vf{};
          sum += load(w3 + e) * load(x3 + e);
          sum += load(w2 + e) * load(x2 + e);
          sum += load(w1 + e) * load(x1 + e);
          sum += load(w0 + e) * load(x0 + e);
          store(y + e, sum * sigmoid(sum));
        }
      }
      for (; e < E; e += LANES) {
        const int lanes = (int)min64(LANES, E - e);
        vf sum = before_silu<X>(a, b, t, e, lanes, near);
        store(y + e, sum * sigmoid(sum), lanes);
      }
    }
  }
}

// Back over all steps of a channel vector, last to first. dsum_t is the gradient before SiLU; step t - j receives
// weight[K - 1 - j] dsum_t if j < reach(t). The K gradients that are not complete yet wait in `pending`.
template <class X>
void conv_backward(const ConvArgs& a) {
  const int64_t L = a.length, E = a.inner, K = a.taps, S = K - 1, groups = ceil_div(E, GROUP);
#pragma omp parallel num_threads(a.threads)
  {
    vf *pending = scratch(GROUP / LANES * K), *dweight = scratch(GROUP / LANES * K), *dbias = scratch(GROUP / LANES);
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < a.batch * groups; unit++) {
      const int64_t b = unit / groups, e0 = unit % groups * GROUP, e1 = min64(e0 + GROUP, E);
      const uint8_t* starts = a.starts ? a.starts + b * L : nullptr;
      memset(pending, 0, GROUP / LANES * K * sizeof(vf)), memset(dweight, 0, GROUP / LANES * K * sizeof(vf));
      memset(dbias, 0, GROUP / LANES * sizeof(vf));
      for (int64_t c1 = L; c1 > 0; c1 -= min64(CHUNK, c1)) {
        const int64_t c0 = c1 > CHUNK ? c1 - CHUNK : 0;
        for (int64_t e = e0, v = 0; e < e1; e += LANES, v++) {
          const int lanes = (int)min64(LANES, e1 - e);
          vf *wait = pending + v * K, *dw = dweight + v * K;
          for (int64_t t = c1 - 1; t >= c0; t--) {
            const int64_t near = reach(starts, t, K);
            vf sum = before_silu<X>(a, b, t, e, lanes, near);
            vf s = sigmoid(sum);
            vf dsum = load(a.dy.row<X>(b, t) + e, lanes) * s * (1.0f + sum * (1.0f - s));
            dbias[v] += dsum;
            for (int64_t j = 0; j < near; j++) {
              wait[j] += load(a.weight + (S - j) * E + e, lanes) * dsum;
              dw[S - j] += dsum * input<X>(a, b, t - j, e, lanes);
            }
            vf dx = wait[0];
            for (int64_t j = 0; j < S; j++) wait[j] = wait[j + 1];
            wait[S] = vf{};
            if (a.dlast && L - 1 - t < reach(starts, L - 1, S))
              dx += load(a.dlast + (b * S + S - L + t) * E + e, lanes);
            store(a.dx.row<X>(b, t) + e, dx, lanes);
          }
        }
      }
      for (int64_t e = e0, v = 0; e < e1; e += LANES, v++) {
        const int lanes = (int)min64(LANES, e1 - e);
        for (int64_t k = 0; k < K; k++) store(a.dweight + (b * K + k) * E + e, dweight[v * K + k], lanes);
        store(a.dbias + b * E + e, dbias[v], lanes);
        // The state's steps are -1, -2, ..; those that the last state still holds pass its gradient on.
        for (int64_t j = 0; a.dfirst && j < S; j++) {
          vf d = pending[v * K + j];
          if (a.dlast && L + j < reach(starts, L - 1, S)) d += load(a.dlast + (b * S + S - 1 - L - j) * E + e, lanes);
          store(a.dfirst + (b * S + S - 1 - j) * E + e, d, lanes);
        }
      }
    }
    free(pending), free(dweight), free(dbias);
  }
}

}  // namespace
