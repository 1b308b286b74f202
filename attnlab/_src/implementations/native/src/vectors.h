// SIMD vectors of one instruction set, and functions on them.

#ifndef ATTNLAB_VECTORS_H_
#define ATTNLAB_VECTORS_H_

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#if defined(__x86_64__)
#if !defined(__clang__)  // GCC's immintrin.h triggers this warning
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace attnlab {
namespace ATTNLAB_ISA {
namespace {

// kWidth: floats in a vector. A block of `outer` has kRows rows; one of `outer_wide`
// has kWideRows rows of kWideVectors vectors.
#if defined(__AVX512F__)
constexpr int kWidth = 16, kRows = 8, kWideVectors = 4, kWideRows = 4;
#elif defined(__AVX2__)
constexpr int kWidth = 8, kRows = 4, kWideVectors = 2, kWideRows = 4;
#else
constexpr int kWidth = 4, kRows = 4, kWideVectors = 2, kWideRows = 4;
#endif
constexpr int kLanes = 2 * kWidth;  // queries in a panel
constexpr int kKeys = 64;           // keys in a tile
// Arrays of up to this many bytes stay in the caches during a call. (Measured:
// prefetching keys of this size makes a call a tenth slower.)
constexpr int64_t kCached = 10 << 20;
constexpr float kLowest = -3.4028234663852886e38f;

typedef float vf __attribute__((vector_size(kWidth * 4)));
typedef int32_t vi __attribute__((vector_size(kWidth * 4)));
typedef uint32_t vu __attribute__((vector_size(kWidth * 4)));

// Two bfloat16 numbers in one word, the first in the lower half.
struct Pair {
  uint32_t bits;
};

#define INLINE inline __attribute__((always_inline))

INLINE int64_t up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <class V, class T>
INLINE V load(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
INLINE void store(T* p, V v) {
  memcpy(p, &v, sizeof v);
}
// A non-temporal store to p, which is aligned to a vector. `streamed` makes such stores
// visible to other threads.
INLINE void stream(float* p, vf v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}
INLINE void streamed() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}
INLINE vf splat(float x) { return x - (vf){}; }
INLINE vi splat(int32_t x) { return x - (vi){}; }
INLINE vu splat(uint32_t x) { return x - (vu){}; }
INLINE vf greater(vf a, vf b) { return a > b ? a : b; }
INLINE vf least(vf a, vf b) { return a < b ? a : b; }
INLINE vi lanes_from(int32_t start) {
  vi v;
  for (int i = 0; i < kWidth; ++i) v[i] = start + i;
  return v;
}

// One bit per lane of a comparison's result.
INLINE uint32_t to_bits(vi mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= (uint32_t)(mask[i] & 1) << i;
  return bits;
#endif
}

// Whether all n numbers are finite.
bool are_finite(const float* x, int64_t n) {
  int32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    bad |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return !bad;
}
bool are_finite(const uint16_t* x, int64_t n) {  // bfloat16
  uint16_t bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= (x[i] & 0x7f80u) == 0x7f80u;
  return !bad;
}

INLINE float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
#endif
}

constexpr float kLog2e = 1.44269504088896341f;

// Interleaves the even blocks of kStep lanes of a and b; if `second`, the odd ones.
template <int kStep, int... kLane>
INLINE vf halves(vf a, vf b, bool second, std::integer_sequence<int, kLane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return second ? __builtin_shufflevector(
                      a, b, (kLane & kStep ? kWidth + kLane : kLane + kStep)...)
                : __builtin_shufflevector(
                      a, b, (kLane & kStep ? kWidth + kLane - kStep : kLane)...);
#else
  vf out;
  for (int l = 0; l < kWidth; ++l)
    out[l] = second ? (l & kStep ? b[l] : a[l + kStep]) : (l & kStep ? b[l - kStep] : a[l]);
  return out;
#endif
}
template <int kStep>
INLINE void swap_blocks(vf* v) {
  constexpr std::make_integer_sequence<int, kWidth> lanes{};
  for (int i = 0; i < kWidth; ++i) {
    if (i & kStep) continue;
    vf a = v[i], b = v[i + kStep];
    v[i] = halves<kStep>(a, b, false, lanes);
    v[i + kStep] = halves<kStep>(a, b, true, lanes);
  }
}
// Lane l of vector i becomes lane i of vector l.
INLINE void transpose(vf* v) {
  if (kWidth > 8) swap_blocks<(kWidth > 8 ? 8 : 1)>(v);
  if (kWidth > 4) swap_blocks<(kWidth > 4 ? 4 : 1)>(v);
  swap_blocks<2>(v);
  swap_blocks<1>(v);
}

// 2^x to about 1 ulp; 0 for x = -inf.
INLINE vf exp2_(vf x) {
#if defined(__AVX512F__)
  vf c = greater(splat(-150.0f), x);  // this order propagates NaN
  vf n = (vf)_mm512_roundscale_ps((__m512)c, 8);
#else
  vf c = greater(splat(-127.0f), x);
  vf shifted = c + 12582912.0f;
  vf n = shifted - 12582912.0f;
#endif
  vf r = c - n;
  vf y = splat(1.5345811e-4f);
  y = y * r + 1.3399931e-3f;
  y = y * r + 9.6184890e-3f;
  y = y * r + 5.5503286e-2f;
  y = y * r + 2.4022646e-1f;
  y = y * r + 6.9314718e-1f;
  y = y * r + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  vf result = (vf)((vi)y + ((vi)shifted << 23));
  return x < -126.0f ? (vf){} : result;
#endif
}

// a / b to about half an ulp; b must be neither tiny nor huge.
INLINE vf divide(vf a, vf b) {
#if defined(__AVX512F__)
  vf y = (vf)_mm512_rcp14_ps((__m512)b);
  vf ratio = a * y;
  return ratio + (a - ratio * b) * y;
#else
  return a / b;
#endif
}

// tanh by the rational approximation that Eigen and XLA use.
INLINE vf tanh_(vf x) {
  // This order of arguments propagates NaN.
  vf c = greater(splat(-7.90531110763549805f), x);
  c = least(splat(7.90531110763549805f), c);
  vf s = c * c;
  vf p = splat(-2.76076847742355e-16f);
  p = p * s + 2.00018790482477e-13f;
  p = p * s + -8.60467152213735e-11f;
  p = p * s + 5.12229709037114e-08f;
  p = p * s + 1.48572235717979e-05f;
  p = p * s + 6.37261928875436e-04f;
  p = p * s + 4.89352455891786e-03f;
  vf q = splat(1.19825839466702e-06f);
  q = q * s + 1.18534705686654e-04f;
  q = q * s + 2.26843463243900e-03f;
  q = q * s + 4.89352518554385e-03f;
  return divide(c * p, q);
}

}  // namespace
}  // namespace ATTNLAB_ISA
}  // namespace attnlab

#endif  // ATTNLAB_VECTORS_H_
