// The selective scan, forward and backward (ops/selective_scan.py has the equations).
//
// One lane is one channel; the N states of LANES channels are N vectors, TILE of them in registers at a time, so every
// load of u, delta, z is contiguous in (B, L, E), and B_t[n], C_t[n] are broadcasts. Threads share out units: a batch row
// times GROUP channels. A unit goes through time in chunks of CHUNK steps, inside a chunk through its channel vectors.
// No result depends on which thread ran a unit: sums over channels and rows are made in a fixed order from partial sums.
#pragma once
#include "vec.h"

namespace {

constexpr int64_t CHUNK = 32;   // steps between kept states; the backward recomputes a chunk at a time, in cache
constexpr int64_t GROUP = 128;  // channels of a unit; the sums over channels for dB and dC keep one partial each

struct View {  // (B, L, *) whose last dimension is contiguous
  void* data;
  int64_t batch, time;  // strides in elements
  template <class X>
  X* row(int64_t b, int64_t t) const {
    return (X*)data + b * batch + t * time;
  }
};

struct ScanArgs {
  int64_t batch, length, inner, state, threads;
  View u, delta, B, C, z, y, dy, du, ddelta, dB, dC, dz;
  const float *A, *D, *bias;      // (E, N), (E), (E)
  const uint8_t* starts;          // (B, L): a document begins; or null
  const float* first;             // (B, E, N) or null: zeros
  float *last, *kept;             // (B, E, N); (B, chunks, vectors of E, N, LANES): state before each chunk; or null
  const float* dlast;             // (B, E, N) or null: zeros
  float *dA, *dD, *dbias, *dfirst;  // (B, E, N), (B, E), (B, E): one partial a row; (B, E, N) or null
  float* dBC;                     // (B, groups, L, 2 N): partial sums over the channels of a group
};

// Moves a (rows of E, N) block between memory and one vector for each state.
INLINE void gather(vf* to, const float* from, int64_t N, int lanes, float scale) {
  for (int64_t n = 0; n < N; n++) {
    vf x = {};
    if (from)
      for (int i = 0; i < lanes; i++) x[i] = from[i * N + n] * scale;
    to[n] = x;
  }
}

INLINE void scatter(float* to, const vf* from, int64_t N, int lanes) {
  for (int64_t n = 0; n < N; n++)
    for (int i = 0; i < lanes; i++) to[i * N + n] = from[n][i];
}

// Step sizes dt, inputs x = dt u, and the skip D u, of one channel vector over a chunk.
template <class X>
INLINE void prepare(const ScanArgs& a, int64_t b, int64_t t0, int64_t T, int64_t e, int lanes, vf* dt, vf* x, vf* y,
                    vf* slope = nullptr) {
  vf bias = load(a.bias + e, lanes), D = load(a.D + e, lanes);
  for (int64_t t = 0; t < T; t++) {
    vf u = load(a.u.row<X>(b, t0 + t) + e, lanes);
    dt[t] = softplus(load(a.delta.row<X>(b, t0 + t) + e, lanes) + bias, slope ? slope + t : nullptr);
    x[t] = dt[t] * u;
    y[t] = D * u;
  }
}

template <class X>
INLINE void read_BC(const ScanArgs& a, int64_t b, int64_t t0, int64_t T, float* B, float* C) {
  const int64_t N = a.state;
  for (int64_t t = 0; t < T; t++) {
    const X *B_t = a.B.row<X>(b, t0 + t), *C_t = a.C.row<X>(b, t0 + t);
    for (int64_t n = 0; n < N; n++) B[t * N + n] = to_float(B_t[n]), C[t * N + n] = to_float(C_t[n]);
  }
}

// NT states of one channel vector over a chunk. A2 = A log2(e). With KEEP the decays and the states after each step are
// written to `decays` and `states`, both (T, NT).
template <int NT, bool KEEP>
INLINE void advance(int64_t T, int64_t N, const vf* A2, vf* h, const vf* dt, const vf* x, vf* y, const float* B,
                    const float* C, const uint8_t* starts, vf* decays, vf* states) {
  vf s[NT];
  for (int j = 0; j < NT; j++) s[j] = h[j];
  for (int64_t t = 0; t < T; t++) {
    if (starts && starts[t])
      for (int j = 0; j < NT; j++) s[j] = vf{};
    const vf step = dt[t], input = x[t];
    vf even = y[t], odd = {};  // two chains, so that additions need not wait for each other
    const float *B_t = B + t * N, *C_t = C + t * N;
#pragma GCC unroll 16
    for (int j = 0; j < NT; j++) {
      vf decay = exp2v(step * A2[j]);
      s[j] = decay * s[j] + input * B_t[j];
      (j % 2 ? odd : even) += s[j] * C_t[j];
      if (KEEP) decays[t * NT + j] = decay, states[t * NT + j] = s[j];
    }
    y[t] = even + odd;
  }
  for (int j = 0; j < NT; j++) h[j] = s[j];
}

template <class X>
void scan_forward(const ScanArgs& a) {
  const int64_t N = a.state, E = a.inner, L = a.length;
  const int64_t groups = ceil_div(E, GROUP), vectors = ceil_div(E, LANES), chunks = ceil_div(L, CHUNK);
#pragma omp parallel num_threads(a.threads)
  {
    vf* A2 = scratch(2 * GROUP / LANES * N);
    vf *h = A2 + GROUP / LANES * N, *dt = scratch(3 * CHUNK), *x = dt + CHUNK, *y = x + CHUNK;
    float* B = (float*)scratch(ceil_div(2 * CHUNK * N, LANES));
    float* C = B + CHUNK * N;
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < a.batch * groups; unit++) {
      const int64_t b = unit / groups, e0 = unit % groups * GROUP, e1 = min64(e0 + GROUP, E);
      for (int64_t e = e0, k = 0; e < e1; e += LANES, k += N) {
        const int lanes = (int)min64(LANES, e1 - e);
        gather(A2 + k, a.A + e * N, N, lanes, LOG2E);
        gather(h + k, a.first ? a.first + (b * E + e) * N : nullptr, N, lanes, 1);
      }
      for (int64_t c = 0; c < chunks; c++) {
        const int64_t t0 = c * CHUNK, T = min64(CHUNK, L - t0);
        const uint8_t* starts = a.starts ? a.starts + b * L + t0 : nullptr;
        read_BC<X>(a, b, t0, T, B, C);
        for (int64_t e = e0, k = 0; e < e1; e += LANES, k += N) {
          const int lanes = (int)min64(LANES, e1 - e);
          if (a.kept) memcpy(a.kept + ((b * chunks + c) * vectors + e / LANES) * N * LANES, h + k, N * sizeof(vf));
          prepare<X>(a, b, t0, T, e, lanes, dt, x, y);
          int64_t n = 0;
          for (; n + TILE <= N; n += TILE)
            advance<TILE, false>(T, N, A2 + k + n, h + k + n, dt, x, y, B + n, C + n, starts, nullptr, nullptr);
          for (; n < N; n++)
            advance<1, false>(T, N, A2 + k + n, h + k + n, dt, x, y, B + n, C + n, starts, nullptr, nullptr);
          for (int64_t t = 0; t < T; t++) {
            vf z = load(a.z.row<X>(b, t0 + t) + e, lanes);
            store(a.y.row<X>(b, t0 + t) + e, y[t] * z * sigmoid(z), lanes);
          }
        }
      }
      if (a.last)
        for (int64_t e = e0, k = 0; e < e1; e += LANES, k += N)
          scatter(a.last + (b * E + e) * N, h + k, N, (int)min64(LANES, e1 - e));
    }
    free(A2), free(dt), free(B);
  }
}

// What the backward of one channel vector over one chunk reads and adds to; arrays of vectors, one for each step.
struct Reverse {
  const vf *dt, *x, *dy;  // dy: gradient of y before the gate
  vf *y, *dx, *dexponent;  // y again; gradients of x, and of dt through the exponent dt A
  vf *decays, *states;     // (T, NT)
};

// NT states of one channel vector, back over a chunk. `h` is the state before the chunk; `g` the gradient of the state
// after it, and on return of the state before it. dB and dC, (T, N) vectors, collect what is to be summed over channels.
template <int NT>
INLINE void reverse(int64_t T, int64_t N, const vf* A2, const vf* h, vf* g, vf* dA, const Reverse& r, const float* B,
                    const float* C, vf* dB, vf* dC, const uint8_t* starts) {
  vf after[NT], s[NT], sum_A[NT];
  for (int j = 0; j < NT; j++) s[j] = h[j];
  advance<NT, true>(T, N, A2, s, r.dt, r.x, r.y, B, C, starts, r.decays, r.states);
  for (int j = 0; j < NT; j++) after[j] = g[j], sum_A[j] = dA[j];
  for (int64_t t = T - 1; t >= 0; t--) {
    const vf dy = r.dy[t], x = r.x[t], step = r.dt[t];
    const vf* before = t > 0 ? r.states + (t - 1) * NT : h;
    const float *B_t = B + t * N, *C_t = C + t * N;
    vf dx = r.dx[t], dexponent = r.dexponent[t];
    const bool fresh = starts && starts[t];
#pragma GCC unroll 16
    for (int j = 0; j < NT; j++) {
      vf dh = after[j] + dy * C_t[j];
      dC[t * N + j] += dy * r.states[t * NT + j];
      dB[t * N + j] += dh * x;
      dx += dh * B_t[j];
      after[j] = dh * r.decays[t * NT + j];
      vf w = after[j] * before[j];
      if (!fresh) {  // at a document's first step nothing reaches back
        dexponent += w * A2[j];
        sum_A[j] += w * step;
      }
    }
    if (fresh)
      for (int j = 0; j < NT; j++) after[j] = vf{};
    r.dx[t] = dx, r.dexponent[t] = dexponent;
  }
  for (int j = 0; j < NT; j++) g[j] = after[j], dA[j] = sum_A[j];
}

template <class X>
void scan_backward(const ScanArgs& a) {
  constexpr int HALF = TILE / 2;  // the gradients of A share the registers
  constexpr float LN2 = 0.693147180559945309f;
  const int64_t N = a.state, E = a.inner, L = a.length;
  const int64_t groups = ceil_div(E, GROUP), vectors = ceil_div(E, LANES), chunks = ceil_div(L, CHUNK);
#pragma omp parallel num_threads(a.threads)
  {
    const int64_t of_group = GROUP / LANES * N;
    vf *A2 = scratch(3 * of_group + N), *g = A2 + of_group, *dA = g + of_group, *h = dA + of_group;
    vf *dD = scratch(2 * GROUP / LANES), *dbias = dD + GROUP / LANES;
    vf *steps = scratch(8 * CHUNK), *dt = steps, *x = dt + CHUNK, *dy = x + CHUNK;
    vf *gate = steps + 6 * CHUNK, *slope = gate + CHUNK;
    vf *saved = scratch(2 * CHUNK * HALF), *dB = scratch(2 * CHUNK * N), *dC = dB + CHUNK * N;
    Reverse r = {dt, x, dy, dy + CHUNK, dy + 2 * CHUNK, dy + 3 * CHUNK, saved, saved + CHUNK * HALF};
    float* B = (float*)scratch(ceil_div(2 * CHUNK * N, LANES));
    float* C = B + CHUNK * N;
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < a.batch * groups; unit++) {
      const int64_t b = unit / groups, e0 = unit % groups * GROUP, e1 = min64(e0 + GROUP, E);
      for (int64_t e = e0, k = 0; e < e1; e += LANES, k += N) {
        const int lanes = (int)min64(LANES, e1 - e);
        gather(A2 + k, a.A + e * N, N, lanes, LOG2E);
        gather(g + k, a.dlast ? a.dlast + (b * E + e) * N : nullptr, N, lanes, 1);
      }
      memset(dA, 0, of_group * sizeof(vf)), memset(dD, 0, 2 * GROUP / LANES * sizeof(vf));
      for (int64_t c = chunks - 1; c >= 0; c--) {
        const int64_t t0 = c * CHUNK, T = min64(CHUNK, L - t0);
        const uint8_t* starts = a.starts ? a.starts + b * L + t0 : nullptr;
        read_BC<X>(a, b, t0, T, B, C);
        memset(dB, 0, 2 * CHUNK * N * sizeof(vf));
        for (int64_t e = e0, k = 0, v = 0; e < e1; e += LANES, k += N, v++) {
          const int lanes = (int)min64(LANES, e1 - e);
          memcpy(h, a.kept + ((b * chunks + c) * vectors + e / LANES) * N * LANES, N * sizeof(vf));
          prepare<X>(a, b, t0, T, e, lanes, dt, x, r.y, slope);
          for (int64_t t = 0; t < T; t++) {
            vf z = load(a.z.row<X>(b, t0 + t) + e, lanes);
            gate[t] = sigmoid(z);
            dy[t] = load(a.dy.row<X>(b, t0 + t) + e, lanes) * z * gate[t];
            r.dx[t] = r.dexponent[t] = vf{};
          }
          int64_t n = 0;
          for (; n + HALF <= N; n += HALF)
            reverse<HALF>(T, N, A2 + k + n, h + n, g + k + n, dA + k + n, r, B + n, C + n, dB + n, dC + n, starts);
          for (; n < N; n++)
            reverse<1>(T, N, A2 + k + n, h + n, g + k + n, dA + k + n, r, B + n, C + n, dB + n, dC + n, starts);
          vf D = load(a.D + e, lanes);
          for (int64_t t = 0; t < T; t++) {
            vf u = load(a.u.row<X>(b, t0 + t) + e, lanes), z = load(a.z.row<X>(b, t0 + t) + e, lanes);
            vf dout = load(a.dy.row<X>(b, t0 + t) + e, lanes);
            vf ddelta = (r.dexponent[t] * LN2 + r.dx[t] * u) * slope[t];
            dbias[v] += ddelta;
            dD[v] += dy[t] * u;
            store(a.ddelta.row<X>(b, t0 + t) + e, ddelta, lanes);
            store(a.du.row<X>(b, t0 + t) + e, r.dx[t] * dt[t] + dy[t] * D, lanes);
            store(a.dz.row<X>(b, t0 + t) + e, dout * r.y[t] * gate[t] * (1.0f + z * (1.0f - gate[t])), lanes);
          }
        }
        for (int64_t t = 0; t < T; t++) {
          float* to = a.dBC + (unit * L + t0 + t) * 2 * N;
          for (int64_t n = 0; n < N; n++) to[n] = sum(dB[t * N + n]), to[N + n] = sum(dC[t * N + n]);
        }
      }
      for (int64_t e = e0, k = 0, v = 0; e < e1; e += LANES, k += N, v++) {
        const int lanes = (int)min64(LANES, e1 - e);
        scatter(a.dA + (b * E + e) * N, dA + k, N, lanes);
        store(a.dD + b * E + e, dD[v], lanes), store(a.dbias + b * E + e, dbias[v], lanes);
        if (a.dfirst) scatter(a.dfirst + (b * E + e) * N, g + k, N, lanes);
      }
    }
    free(A2), free(dD), free(steps), free(saved), free(dB), free(B);
#pragma omp for
    for (int64_t row = 0; row < a.batch * L; row++) {
      const int64_t b = row / L, t = row % L;
      X *dB_t = a.dB.row<X>(b, t), *dC_t = a.dC.row<X>(b, t);
      for (int64_t n = 0; n < N; n++) {
        float sum_B = 0, sum_C = 0;
        for (int64_t group = 0; group < groups; group++) {
          const float* from = a.dBC + ((b * groups + group) * L + t) * 2 * N + n;
          sum_B += from[0], sum_C += from[N];
        }
        from_float(dB_t + n, sum_B), from_float(dC_t + n, sum_C);
      }
    }
  }
}

}  // namespace
