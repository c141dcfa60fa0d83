// What works on one row at a time: residual add with RMSNorm (ops/add_norm.py), and softmax cross entropy in place
// (ops/cross_entropy.py).
#pragma once
#include "vec.h"

namespace {

struct NormArgs {
  int64_t rows, width, threads, parts;
  const void* x;               // (rows, width)
  const float *residual, *weight;  // residual null: no stream yet
  float* stream;               // residual + x
  void* y;
  float* scale;                // (rows): 1 / sqrt(mean(stream^2) + eps)
  float eps;
  const void* dy;
  const float* dstream;        // or null: zeros
  void* dx;
  float *dresidual, *dweight;  // (rows, width) or null; (parts, width): partial sums, the total in the first
};

template <class X, class Y>
void norm_forward(const NormArgs& a) {
  const int64_t D = a.width;
#pragma omp parallel for num_threads(a.threads)
  for (int64_t r = 0; r < a.rows; r++) {
    const X* x = (const X*)a.x + r * D;
    const float* residual = a.residual ? a.residual + r * D : nullptr;
    float* stream = a.stream + r * D;
    vf squares = {};
    for (int64_t i = 0; i < D; i += LANES) {
      const int lanes = (int)min64(LANES, D - i);
      vf s = load(x + i, lanes);
      if (residual) s = load(residual + i, lanes) + s;
      squares += s * s;
      store(stream + i, s, lanes);
    }
    const float scale = 1.0f / __builtin_sqrtf(sum(squares) / (float)D + a.eps);
    a.scale[r] = scale;
    for (int64_t i = 0; i < D; i += LANES) {
      const int lanes = (int)min64(LANES, D - i);
      store((Y*)a.y + r * D + i, load(stream + i, lanes) * scale * load(a.weight + i, lanes), lanes);
    }
  }
}

// d stream = scale (w dy) - scale^3 mean(w dy stream) stream, plus the gradient of the stream itself.
template <class X, class Y>
void norm_backward(const NormArgs& a) {
  const int64_t D = a.width;
#pragma omp parallel for num_threads(a.threads)
  for (int64_t part = 0; part < a.parts; part++) {
    float* dweight = a.dweight + part * D;
    memset(dweight, 0, D * sizeof(float));
    for (int64_t r = a.rows * part / a.parts; r < a.rows * (part + 1) / a.parts; r++) {
      const Y* dy = (const Y*)a.dy + r * D;
      const float *stream = a.stream + r * D, scale = a.scale[r];
      vf dots = {};
      for (int64_t i = 0; i < D; i += LANES) {
        const int lanes = (int)min64(LANES, D - i);
        vf d = load(dy + i, lanes), s = load(stream + i, lanes);
        dots += d * load(a.weight + i, lanes) * s;
        store(dweight + i, load(dweight + i, lanes) + d * s * scale, lanes);
      }
      const float mean = sum(dots) / (float)D * scale * scale * scale;
      for (int64_t i = 0; i < D; i += LANES) {
        const int lanes = (int)min64(LANES, D - i);
        vf d = load(dy + i, lanes) * load(a.weight + i, lanes) * scale - load(stream + i, lanes) * mean;
        if (a.dstream) d += load(a.dstream + r * D + i, lanes);
        store((X*)a.dx + r * D + i, d, lanes);
        if (a.dresidual) store(a.dresidual + r * D + i, d, lanes);
      }
    }
  }
  for (int64_t part = 1; part < a.parts; part++)
    for (int64_t i = 0; i < D; i++) a.dweight[i] += a.dweight[part * D + i];
}

struct LossArgs {
  int64_t rows, columns, vocabulary, threads;
  void* logits;           // (rows, columns); becomes softmax - onehot, zero in the columns past the vocabulary
  const int64_t* labels;  // (rows), -100: the row counts nothing
  float* loss;            // (rows)
  int64_t gradient;       // 0: leave the logits as they are
};

template <class X>
void cross_entropy(const LossArgs& a) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.threads)
  for (int64_t r = 0; r < a.rows; r++) {
    X* row = (X*)a.logits + r * a.columns;
    const int64_t label = a.labels[r], V = a.vocabulary;
    if (label < 0) {
      a.loss[r] = 0;
      if (a.gradient) memset(row, 0, a.columns * sizeof(X));
      continue;
    }
    vf top = splat(-__builtin_inff());
    int64_t i = 0;
    for (; i + LANES <= V; i += LANES) top = max(top, load(row + i));
    float largest = -__builtin_inff();
    for (int j = 0; j < LANES; j++) largest = top[j] > largest ? top[j] : largest;
    for (; i < V; i++) largest = to_float(row[i]) > largest ? to_float(row[i]) : largest;
    vf sums = {};
    float tail = 0;
    for (i = 0; i + LANES <= V;) {  // in blocks: a sum of thousands one by one loses digits
      vf block = {};
      for (const int64_t end = min64(i + 64 * LANES, V - LANES + 1); i < end; i += LANES)
        block += expv(load(row + i) - largest);
      sums += block;
    }
    for (; i < V; i++) tail += expv(splat(to_float(row[i]) - largest))[0];
    const float total = sum(sums) + tail, at_label = to_float(row[label]);
    const float log_sum = (total == total ? logv(splat(total))[0] : total) + largest;  // logv takes no NaN
    a.loss[r] = log_sum - at_label;
    if (!a.gradient) continue;
    const float scale = 1.0f / total;  // log_sum is rounded at its own size, some twenty times that of 1
    for (i = 0; i + LANES <= V; i += LANES) store(row + i, expv(load(row + i) - largest) * scale);
    for (; i < V; i++) from_float(row + i, expv(splat(to_float(row[i]) - largest))[0] * scale);
    from_float(row + label, expv(splat(at_label - largest))[0] * scale - 1.0f);
    memset(row + V, 0, (a.columns - V) * sizeof(X));
  }
}

}  // namespace
