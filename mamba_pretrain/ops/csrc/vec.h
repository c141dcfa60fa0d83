// Vectors of LANES floats in the compiler's own vector extension (GCC, Clang), and the few functions the kernels need.
//
// One translation unit is compiled for one instruction set (-mavx512f ..., -mavx2 -mfma, or neither), and nothing here
// has external linkage, so no two builds can mix.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int TILE = 16;  // states of one channel vector that stay in registers
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int TILE = 8;
#else
constexpr int LANES = 4;
constexpr int TILE = 8;
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))

INLINE vf splat(float x) { return x - vf{}; }

INLINE vf widen(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

INLINE vh narrow(vf x) {  // to nearest, ties to even; NaN stays NaN
  vu bits = (vu)x;
  vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  vu is_nan = (vu)(x != x);
  return __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), vh);
}

// The first `lanes` elements; the others read as zero and are not written.
INLINE vf load(const float* p, int lanes = LANES) {
  vf x = {};
  if (lanes == LANES) {
    memcpy(&x, p, sizeof x);
  } else {
    for (int i = 0; i < lanes; i++) x[i] = p[i];
  }
  return x;
}

INLINE vf load(const bf16* p, int lanes = LANES) {
  vh h = {};
  if (lanes == LANES) {
    memcpy(&h, p, sizeof h);
  } else {
    for (int i = 0; i < lanes; i++) h[i] = p[i];
  }
  return widen(h);
}

INLINE void store(float* p, vf x, int lanes = LANES) {
  if (lanes == LANES) {
    memcpy(p, &x, sizeof x);
  } else {
    for (int i = 0; i < lanes; i++) p[i] = x[i];
  }
}

INLINE void store(bf16* p, vf x, int lanes = LANES) {
  vh h = narrow(x);
  if (lanes == LANES) {
    memcpy(p, &h, sizeof h);
  } else {
    for (int i = 0; i < lanes; i++) p[i] = h[i];
  }
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
INLINE void from_float(float* p, float x) { *p = x; }
INLINE void from_float(bf16* p, float x) { store(p, splat(x), 1); }

INLINE float sum(vf x) {  // always in the same order
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) x[i] += x[i + half];
  return x[0];
#endif
}

INLINE vf max(vf a, vf b) { return a > b ? a : b; }

// 2^x to 1.1 units in the last place: 2^round(x) times 1 + f q(f) for the rest f in [-1/2, 1/2], where q is the minimax
// polynomial of (2^f - 1) / f (relative error 2e-9). The leading 1 is exact: a decay close to 1 is multiplied over
// thousands of steps, and must not drift. Overflow gives infinity, underflow zero, NaN itself.
INLINE vf exp2v(vf x, vf rest = vf{}) {  // 2^(x + rest), where rest is what rounding took from x
#if defined(__AVX512F__)
  vf n = (vf)_mm512_maskz_roundscale_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = x < -151.0f ? splat(-151.0f) : x;
  x = x > 129.0f ? splat(129.0f) : x;
  const vf magic = splat(12582912.0f);  // 1.5 x 2^23: a sum with it has no room for a fraction
  vf shifted = x + magic;
  vf n = shifted - magic;
#endif
  vf f = (x - n) + rest;
  vf p = splat(0x1.41fbbcp-13f);
  p = p * f + 0x1.5f3e54p-10f;
  p = p * f + 0x1.3b2d4cp-7f;
  p = p * f + 0x1.c6aee8p-5f;
  p = p * f + 0x1.ebfbdcp-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  vi e = (vi)shifted - (vi)magic;  // in two factors, since 2^-151 and 2^129 are no floats
  vi low = e >> 1;
  return p * (vf)((low + 127) << 23) * (vf)((e - low + 127) << 23);
#endif
}

constexpr float LOG2E = 0x1.715476p+0f, LOG2E_REST = 0x1.4ae0cp-26f;  // log2(e) in two floats

INLINE vf expv(vf x) {
  x = x < -120.0f ? splat(-120.0f) : x;  // further out e^x is the same zero or infinity,
  x = x > 120.0f ? splat(120.0f) : x;    // and what rounding takes from y is no longer small
  vf y = x * LOG2E;
  return exp2v(y, (x * LOG2E - y) + x * LOG2E_REST);
}

// log(x) for normal positive x: x = 2^e m with m in [sqrt(1/2), sqrt(2)), and log(m) by the series of atanh.
INLINE vf logv(vf x) {
  vi e = ((vi)x - 0x3f3504f3) >> 23;
  vf m = (vf)((vi)x - (e << 23));
  vf s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  vf series = splat(2.0f / 9);
  series = series * s2 + 2.0f / 7;
  series = series * s2 + 2.0f / 5;
  series = series * s2 + 2.0f / 3;
  series = series * s2 * s + 2.0f * s;
  vf k = __builtin_convertvector(e, vf);
  return k * 0.693359375f + (series + k * -2.12194440e-4f);
}

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + expv(-x)); }

// log(1 + e^x), its tail kept; x itself above 20, as in torch.nn.functional.softplus. `slope` is the derivative.
INLINE vf softplus(vf x, vf* slope = nullptr) {
  vf y = expv(x), u = 1.0f + y, inverse = 1.0f / u;
  vf small = logv(u) + (y - (u - 1.0f)) * inverse;  // what 1 + y rounds away comes back in
  if (slope) *slope = x > 20.0f ? splat(1.0f) : y * inverse;
  return x > 20.0f ? x : small;
}

INLINE vf* scratch(int64_t vectors) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, (size_t)(vectors > 0 ? vectors : 1) * sizeof(vf))) abort();
  return (vf*)p;
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
