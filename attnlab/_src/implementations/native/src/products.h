// The products of attention and MLP scores: each step adds a scalar times a vector.

#ifndef ATTNLAB_PRODUCTS_H_
#define ATTNLAB_PRODUCTS_H_

#include "vectors.h"

namespace attnlab {
namespace ATTNLAB_ISA {
namespace {

INLINE void fma(vf& sum, vf a, float b) { sum += a * b; }
INLINE void fma(vf& sum, vu a, Pair b) {
#if defined(__AVX512BF16__)
  sum = (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32(b.bits));
#else
  (void)sum, (void)a, (void)b;  // never called
#endif
}
template <class E>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef vf type;
};
template <>
struct VectorOf<Pair> {
  typedef vu type;
};

// For kN rows: out[row][0 : kVectors * kWidth] is set to (or, if `add`, increased by)
// the sum over steps of scalar(row, step) * vector(step).
//
// kAlong: the scalars of a row are contiguous, and rows are `stride` apart; otherwise
// the scalars of a step are contiguous, and steps are `stride` apart.
// kApart: `out` is added after the steps, not before: partial sums reduce the rounding
// error of a very long sum.
template <class E, int kN, int kVectors, bool kAlong, bool kApart = false>
INLINE void outer_block(float* __restrict__ out, int64_t out_stride, const E* vectors,
                        int64_t vector_stride, const E* scalars, int64_t stride,
                        int64_t steps, bool add) {
  typedef typename VectorOf<E>::type V;
  vf sums[kN][kVectors];
  for (int i = 0; i < kN; ++i)
    for (int j = 0; j < kVectors; ++j)
      sums[i][j] = add && !kApart ? load<vf>(out + i * out_stride + j * kWidth) : (vf){};
  const E* rows[kN];
  for (int i = 0; i < kN; ++i) rows[i] = kAlong ? scalars + i * stride : scalars;
  for (int64_t step = 0; step < steps; ++step) {
    V v[kVectors];
    for (int j = 0; j < kVectors; ++j)
      v[j] = load<V>(vectors + step * vector_stride + j * kWidth);
    for (int i = 0; i < kN; ++i) {
      E scalar = kAlong ? rows[i][step] : scalars[step * stride + i];
      for (int j = 0; j < kVectors; ++j) fma(sums[i][j], v[j], scalar);
    }
  }
  for (int i = 0; i < kN; ++i)
    for (int j = 0; j < kVectors; ++j) {
      float* at = out + i * out_stride + j * kWidth;
      store(at, add && kApart ? load<vf>(at) + sums[i][j] : sums[i][j]);
    }
}

// `outer_block` for any number of rows, out[row][0 : kLanes]. Rounds `rows` up to a
// multiple of kRows.
template <class E, bool kAlong>
__attribute__((noinline)) void outer(float* out, const E* lanes, const E* scalars,
                                     int64_t stride, int64_t rows, int64_t steps,
                                     bool add) {
  for (int64_t r = 0; r < rows; r += kRows)
    outer_block<E, kRows, 2, kAlong>(out + r * kLanes, kLanes, lanes, kLanes,
                                     kAlong ? scalars + r * stride : scalars + r, stride,
                                     steps, add);
}

// out[row][0:width] += sum over steps of scalars[row][step] * vectors[step][0:width]
// Rounds `rows` up to a multiple of kWideRows; `width` is a multiple of kWidth.
template <class E, bool kApart = false>
__attribute__((noinline)) void outer_wide(float* out, const E* vectors, const E* scalars,
                                          int64_t stride, int64_t rows, int64_t steps,
                                          int64_t width) {
  for (int64_t x = 0; x < width; x += kWideVectors * kWidth) {
    int64_t left = (width - x) / kWidth;
    for (int64_t r = 0; r < rows; r += kWideRows) {
      float* o = out + r * width + x;
      const E* s = scalars + r * stride;
      if (left >= kWideVectors) {
        outer_block<E, kWideRows, kWideVectors, true, kApart>(o, width, vectors + x, width,
                                                              s, stride, steps, true);
        continue;
      }
      for (int64_t j = 0; j < left; ++j)
        outer_block<E, kWideRows, 1, true, kApart>(o + j * kWidth, width,
                                                   vectors + x + j * kWidth, width, s,
                                                   stride, steps, true);
    }
  }
}

}  // namespace
}  // namespace ATTNLAB_ISA
}  // namespace attnlab

#endif  // ATTNLAB_PRODUCTS_H_
