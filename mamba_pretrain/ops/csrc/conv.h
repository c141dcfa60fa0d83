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

// K is the number of taps where the compiler is to know it, else 0; `lanes` is a constant where it is LANES.
template <class X, int K>
INLINE void forward_row(const ConvArgs& a, int64_t b, int64_t t, int64_t e, int lanes, int64_t near) {
  const int64_t taps = K ? K : a.taps;
  vf sum = a.bias ? load(a.bias + e, lanes) : vf{};
  for (int64_t j = taps - 1; j >= 0; j--)
    if (j < near) sum += load(a.weight + (taps - 1 - j) * a.inner + e, lanes) * input<X>(a, b, t - j, e, lanes);
  store(a.y.row<X>(b, t) + e, sum * sigmoid(sum), lanes);
}

template <class X, int K>
void conv_forward(const ConvArgs& a) {
  const int64_t L = a.length, E = a.inner, chunks = ceil_div(L, CHUNK);
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
  for (int64_t unit = 0; unit < a.batch * chunks; unit++) {
    const int64_t b = unit / chunks, t0 = unit % chunks * CHUNK, t1 = min64(t0 + CHUNK, L);
    for (int64_t t = t0; t < t1; t++) {
      const int64_t near = reach(a.starts ? a.starts + b * L : nullptr, t, a.taps);
      int64_t e = 0;
      if (K && near == K && t >= K - 1)  // nearly always: every tap is there, and none is in the state
        for (; e + LANES <= E; e += LANES) forward_row<X, K>(a, b, t, e, LANES, K);
      for (; e < E; e += LANES) forward_row<X, 0>(a, b, t, e, (int)min64(LANES, E - e), near);
    }
  }
}

// One step of one channel vector, going back. dsum is the gradient before SiLU; step t - j receives
// weight[K - 1 - j] dsum if j < near. The gradients that are not complete yet wait in wait[0 .. K - 1], that of t first.
template <class X, int K>
INLINE void backward_row(const ConvArgs& a, int64_t b, int64_t t, int64_t e, int lanes, int64_t near, const vf* weight,
                         vf bias, vf* wait, vf* dweight, vf* dbias, bool is_last) {
  const int64_t taps = K ? K : a.taps, S = taps - 1;
  vf sum = bias;
  for (int64_t j = S; j >= 0; j--)
    if (j < near) sum += weight[S - j] * input<X>(a, b, t - j, e, lanes);
  vf s = sigmoid(sum);
  vf dsum = load(a.dy.row<X>(b, t) + e, lanes) * s * (1.0f + sum * (1.0f - s));
  *dbias += dsum;
  for (int64_t j = 0; j < taps; j++)
    if (j < near) {
      wait[j] += weight[S - j] * dsum;
      dweight[S - j] += dsum * input<X>(a, b, t - j, e, lanes);
    }
  vf dx = wait[0];
  for (int64_t j = 0; j < S; j++) wait[j] = wait[j + 1];
  wait[S] = vf{};
  if (is_last) dx += load(a.dlast + (b * S + S - a.length + t) * a.inner + e, lanes);
  store(a.dx.row<X>(b, t) + e, dx, lanes);
}

template <class X, int K>
void conv_backward(const ConvArgs& a) {
  const int64_t L = a.length, E = a.inner, taps = a.taps, S = taps - 1, groups = ceil_div(E, GROUP);
  const int64_t of_group = GROUP / LANES * taps;
#pragma omp parallel num_threads(a.threads)
  {
    vf *wait = scratch(3 * of_group), *dweight = wait + of_group, *weight = dweight + of_group;
    vf* dbias = scratch(GROUP / LANES);
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < a.batch * groups; unit++) {
      const int64_t b = unit / groups, e0 = unit % groups * GROUP, e1 = min64(e0 + GROUP, E);
      const uint8_t* starts = a.starts ? a.starts + b * L : nullptr;
      const int64_t passed = a.dlast ? reach(starts, L - 1, S) : 0;  // steps that the last state holds
      memset(wait, 0, 2 * of_group * sizeof(vf)), memset(dbias, 0, GROUP / LANES * sizeof(vf));
      for (int64_t e = e0, v = 0; e < e1; e += LANES, v++)
        for (int64_t k = 0; k < taps; k++) weight[v * taps + k] = load(a.weight + k * E + e, (int)min64(LANES, e1 - e));
      for (int64_t t1 = L; t1 > 0; t1 -= min64(CHUNK, t1)) {
        const int64_t t0 = t1 > CHUNK ? t1 - CHUNK : 0;
        int64_t near[CHUNK];
        for (int64_t t = t0; t < t1; t++) near[t - t0] = reach(starts, t, taps);
        for (int64_t e = e0, v = 0; e < e1; e += LANES, v++) {
          const int lanes = (int)min64(LANES, e1 - e);
          const vf bias = a.bias ? load(a.bias + e, lanes) : vf{};
          const vf* w = weight + v * taps;
          vf *waits = wait + v * taps, *dw = dweight + v * taps;
          for (int64_t t = t1 - 1; t >= t0; t--) {
            const bool is_last = L - 1 - t < passed;
            if (K && lanes == LANES && near[t - t0] == K && t >= K - 1)
              backward_row<X, K>(a, b, t, e, LANES, K, w, bias, waits, dw, dbias + v, is_last);
            else
              backward_row<X, 0>(a, b, t, e, lanes, near[t - t0], w, bias, waits, dw, dbias + v, is_last);
          }
        }
      }
      for (int64_t e = e0, v = 0; e < e1; e += LANES, v++) {
        const int lanes = (int)min64(LANES, e1 - e);
        for (int64_t k = 0; k < taps; k++) store(a.dweight + (b * taps + k) * E + e, dweight[v * taps + k], lanes);
        store(a.dbias + b * E + e, dbias[v], lanes);
        for (int64_t j = 0; a.dfirst && j < S; j++) {  // the state's steps are -1, -2, ..
          vf d = wait[v * taps + j];
          if (L + j < passed) d += load(a.dlast + (b * S + S - 1 - L - j) * E + e, lanes);
          store(a.dfirst + (b * S + S - 1 - j) * E + e, d, lanes);
        }
      }
    }
    free(wait), free(dbias);
  }
}

}  // namespace
