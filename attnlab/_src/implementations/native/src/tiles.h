// Packs tiles of keys and values, and panels of queries, for the products.

#ifndef ATTNLAB_TILES_H_
#define ATTNLAB_TILES_H_

#include "problem.h"
#include "products.h"

namespace attnlab {
namespace ATTNLAB_ISA {
namespace {

// A key or value with elements that are not finite is packed as zeros: a product would
// multiply it by the weight 0 of hidden pairs, and 0 * NaN is NaN. It is marked, so
// that `lose` can set the results of queries that see it to NaN.
enum { kLostKey = 1, kLostValue = 2 };

template <class E>
struct Keys {
  E* rows;       // [key][stride]: contiguous elements of each key
  E* across;     // [key or pair of keys][width]; for floats the same as rows
  E* values;     // [key or pair of keys][value_width]
  E* value_rows; // [key][value_stride], for the backward pass
  uint8_t* lost; // [key]: kLostKey | kLostValue; lost[kKeys] is the OR of all
  int64_t stride, width, value_width, value_stride;
};

// The number of steps of a product that sums over n elements, singly or in pairs.
INLINE int64_t steps(int64_t n, float*) { return n; }
INLINE int64_t steps(int64_t n, Pair*) { return (n + 1) / 2; }

// Rows allocated for a tile; some are spare, as products round the number of keys up.
constexpr int64_t kTileRows = kKeys + kRows;

template <class E>
struct KeyBuffers {
  Buffer<E> rows, across, values, value_rows;
  Buffer<uint8_t> lost;
};

INLINE void sizes_of(Keys<float>& k, int64_t p, int64_t d) {
  k.stride = k.width = up(p, kRows);
  k.value_width = k.value_stride = up(d, kRows);
}
INLINE void sizes_of(Keys<Pair>& k, int64_t p, int64_t d) {
  k.stride = (p + 1) / 2, k.width = up(p, kRows);
  k.value_width = up(d, kRows), k.value_stride = (d + 1) / 2;
}

// Rows of one head are too far apart for hardware prefetching, so they are prefetched
// kAhead rows ahead. These functions must be inlined: GCC removes calls of a function
// that only prefetches, as if it had no effect.
constexpr int64_t kAhead = 8;
template <class T>
INLINE void fetch_ahead(const T* x, int64_t size) {
  for (int64_t i = 0; i < size; i += 64 / sizeof(T)) __builtin_prefetch(x + i);
}
INLINE void fetch_ahead(const Array& x, int64_t at, int64_t size) {
  if (x.type == Type::f32)
    fetch_ahead((const float*)x.data + at, size);
  else
    fetch_ahead((const uint16_t*)x.data + at, size);
}

// Packs keys and values [s0, s0 + count) of one head. Keys or values that are not
// finite, and rows up to the next multiple of kRows become zeros.
void pack_keys(const Problem& c, int64_t b, int64_t kh, int64_t s0, int64_t count,
               bool backward, Keys<float>& k) {
  (void)backward;
  const Array &key = c.arg(1), &value = c.arg(2);
  uint8_t any = 0;
  for (int64_t i = 0; i < up(count, kRows); ++i) {
    float* r = k.rows + i * k.stride;
    float* v = k.values + i * k.value_width;
    if (i + kAhead < count) {
      fetch_ahead(key, c.key_at(b, s0 + i + kAhead, kh, c.P), c.P);
      fetch_ahead(value, c.key_at(b, s0 + i + kAhead, kh, c.D), c.D);
    }
    if (i < count) {
      load_floats(key, c.key_at(b, s0 + i, kh, c.P), c.P, r);
      for (int64_t p = c.P; p < k.stride; ++p) r[p] = 0;
      load_floats(value, c.key_at(b, s0 + i, kh, c.D), c.D, v);
      for (int64_t d = c.D; d < k.value_width; ++d) v[d] = 0;
      uint8_t lost = 0;
      if (!are_finite(r, c.P)) lost |= kLostKey, memset(r, 0, c.P * 4);
      if (!are_finite(v, c.D)) lost |= kLostValue, memset(v, 0, c.D * 4);
      any |= k.lost[i] = lost;
    } else {
      memset(r, 0, k.stride * 4);
      memset(v, 0, k.value_width * 4);
      k.lost[i] = 0;
    }
  }
  k.lost[kKeys] = any;
}

void pack_pairs(const uint16_t* x, int64_t row_stride, const bool* reads, int64_t count,
                int64_t size, int64_t width, Pair* out) {
  for (int64_t i = 0; i < up(count, kRows); i += 2) {
    const uint16_t* a = x + i * row_stride;
    const uint16_t* b = a + row_stride;
    Pair* o = out + i / 2 * width;
    const bool first = i < count && reads[i];
    const bool second = i + 1 < count && reads[i + 1];
    if (first && second)
      for (int64_t p = 0; p < size; ++p) o[p].bits = a[p] | (uint32_t)b[p] << 16;
    else if (first)
      for (int64_t p = 0; p < size; ++p) o[p].bits = a[p];
    else if (second)
      for (int64_t p = 0; p < size; ++p) o[p].bits = (uint32_t)b[p] << 16;
    else
      memset((void*)o, 0, size * 4);
    for (int64_t p = size; p < width; ++p) o[p].bits = 0;
  }
}

void pack_rows(const uint16_t* x, int64_t row_stride, const bool* reads, int64_t count,
               int64_t size, int64_t stride, Pair* out) {
  for (int64_t i = 0; i < count; ++i) {
    if (size % 2) out[(i + 1) * stride - 1].bits = 0;
    if (reads[i])
      memcpy((void*)(out + i * stride), x + i * row_stride, size * 2);
    else
      memset((void*)(out + i * stride), 0, size * 2);
  }
  memset((void*)(out + count * stride), 0, (up(count, kRows) - count) * stride * 4);
}

void pack_keys(const Problem& c, int64_t b, int64_t kh, int64_t s0, int64_t count,
               bool backward, Keys<Pair>& k) {
  const uint16_t* key = (const uint16_t*)c.arg(1).data + c.key_at(b, s0, kh, c.P);
  const uint16_t* value = (const uint16_t*)c.arg(2).data + c.key_at(b, s0, kh, c.D);
  bool keys[kKeys], values[kKeys];  // which are copied
  uint8_t any = 0;
  for (int64_t i = 0; i < count; ++i) {
    keys[i] = are_finite(key + i * c.K * c.P, c.P);
    values[i] = are_finite(value + i * c.K * c.D, c.D);
    k.lost[i] = (keys[i] ? 0 : kLostKey) | (values[i] ? 0 : kLostValue);
    any |= k.lost[i];
  }
  k.lost[kKeys] = any;
  pack_rows(key, c.K * c.P, keys, count, c.P, k.stride, k.rows);
  if (backward) {
    pack_pairs(key, c.K * c.P, keys, count, c.P, k.width, k.across);
    pack_rows(value, c.K * c.D, values, count, c.D, k.value_stride, k.value_rows);
  } else {
    pack_pairs(value, c.K * c.D, values, count, c.D, k.value_width, k.values);
  }
}

void reserve(Keys<float>& k, KeyBuffers<float>& from, int64_t count) {
  k.rows = k.across = from.rows.get(count * k.stride);
  k.values = k.value_rows = from.values.get(count * k.value_width);
  k.lost = from.lost.get(count);
}
void reserve(Keys<Pair>& k, KeyBuffers<Pair>& from, int64_t count) {
  k.rows = from.rows.get(count * k.stride);
  k.across = from.across.get(count / 2 * k.width);
  k.values = from.values.get(count / 2 * k.value_width);
  k.value_rows = from.value_rows.get(count * k.value_stride);
  k.lost = from.lost.get(count);
}

// A thread's cache of packed key tiles, direct-mapped by index, so that successive
// query blocks of a head need not pack them again.
template <class E>
class TileCache {
 public:
  Keys<E> get(const Problem& c, int64_t b, int64_t kh, int64_t index) {
    Keys<E> keys;
    sizes_of(keys, c.P, c.D);
    if (call_ != c.id) {
      const int64_t bytes = kTileRows * (keys.stride + keys.value_width) * sizeof(E);
      slots_ = most(least(kCacheBytes / most(bytes, 1), c.tiles), 1);
      memset(tags_.get(slots_), -1, slots_ * sizeof(int64_t));
      call_ = c.id;
    }
    reserve(keys, buffers_, slots_ * kTileRows);
    const int64_t slot = index % slots_;
    keys.rows += slot * kTileRows * keys.stride;
    keys.values += steps(slot * kTileRows, (E*)0) * keys.value_width;
    keys.lost += slot * kTileRows;
    int64_t* tag = tags_.get(slots_) + slot;
    const int64_t wanted = (b * c.K + kh) * c.tiles + index;
    if (*tag != wanted) {
      const int64_t s0 = index * kKeys;
      pack_keys(c, b, kh, s0, least(kKeys, c.S - s0), false, keys);
      *tag = wanted;
    }
    return keys;
  }

 private:
  static constexpr int64_t kCacheBytes = 6 << 20;
  KeyBuffers<E> buffers_;
  Buffer<int64_t> tags_;
  int64_t call_ = 0, slots_ = 0;
};

// Transposes rows of a panel, [kLanes][stride], to [element][kLanes]; `stride` is a
// multiple of kWidth.
void to_lanes(const float* rows, int64_t stride, int64_t size, float* out) {
  for (int64_t p = 0; p < size; p += kWidth)
    for (int j = 0; j < 2; ++j) {
      vf v[kWidth];
      for (int i = 0; i < kWidth; ++i) v[i] = load<vf>(rows + (j * kWidth + i) * stride + p);
      transpose(v);
      const int64_t n = least(kWidth, size - p);
      for (int64_t i = 0; i < n; ++i) store(out + (p + i) * kLanes + j * kWidth, v[i]);
    }
}
// The inverse of `to_lanes`.
void from_lanes(const float* tile, int64_t size, int64_t stride, float* rows) {
  for (int64_t p = 0; p < size; p += kWidth)
    for (int j = 0; j < 2; ++j) {
      vf v[kWidth];
      const int64_t n = least(kWidth, size - p);
      for (int64_t i = 0; i < kWidth; ++i)
        v[i] = i < n ? load<vf>(tile + (p + i) * kLanes + j * kWidth) : (vf){};
      transpose(v);
      for (int i = 0; i < kWidth; ++i) store(rows + (j * kWidth + i) * stride + p, v[i]);
    }
}
// Rounds to bfloat16, in the lower half of each word.
INLINE vu halfword(vf x) {
#if defined(__AVX512BF16__)
  return (vu)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  vu u = (vu)x;
  return (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
#endif
}
void to_lanes(const float* rows, int64_t stride, int64_t size, Pair* out) {
  static thread_local Buffer<float> room;
  const int64_t words = up(stride / 2, kWidth);
  float* pairs = room.get(kLanes * words + kWidth);
  for (int i = 0; i < kLanes; ++i) {
    // The row in bfloat16; each word holds two adjacent elements.
    typedef uint16_t half __attribute__((vector_size(kWidth * 2)));
    uint16_t* row = (uint16_t*)(pairs + i * words);
    for (int64_t p = 0; p < stride; p += kWidth)
      store(row + p, __builtin_convertvector(halfword(load<vf>(rows + i * stride + p)), half));
    memset(row + stride, 0, (2 * words - stride) * 2);
  }
  to_lanes(pairs, words, (size + 1) / 2, (float*)out);
}

// Converts floats [key][kLanes] for products that sum over keys:
// [key or pair of keys][kLanes].
void over_keys(float* tile, int64_t first, int64_t end, float*& out) {
  (void)first, (void)end;
  out = tile;
}
void over_keys(float* tile, int64_t first, int64_t end, Pair*& out) {
  for (int64_t k = first; k < end; k += 2)
    for (int j = 0; j < 2; ++j) {
      vu a = halfword(load<vf>(tile + k * kLanes + j * kWidth)), b = {};
      if (k + 1 < end)
        b = halfword(load<vf>(tile + (k + 1) * kLanes + j * kWidth)) << 16;
      store(&out[k / 2 * kLanes + j * kWidth], a | b);
    }
}
// Converts floats [key][kLanes] for products that sum over lanes:
// [key][lane or pair of lanes].
void over_lanes(float* tile, int64_t first, int64_t end, float*& out) {
  (void)first, (void)end;
  out = tile;
}
void over_lanes(float* tile, int64_t first, int64_t end, Pair*& out) {
#if defined(__AVX512BF16__)
  for (int64_t k = first; k < end; ++k) {
    __m512bh both = _mm512_cvtne2ps_pbh((__m512)load<vf>(tile + k * kLanes + kWidth),
                                        (__m512)load<vf>(tile + k * kLanes));
    memcpy((void*)&out[k * kWidth], &both, sizeof both);
  }
#else
  (void)tile, (void)first, (void)end, (void)out;
#endif
}
// Converts rows of a panel, [kLanes][stride], for products that sum over lanes:
// [lane or pair of lanes][stride].
void across_lanes(float* rows, int64_t stride, float*& out) {
  (void)stride;
  out = rows;
}
void across_lanes(float* rows, int64_t stride, Pair*& out) {
  for (int i = 0; i < kLanes; i += 2)
    for (int64_t p = 0; p < stride; p += kWidth)
      store(&out[i / 2 * stride + p],
            halfword(load<vf>(rows + i * stride + p)) |
                halfword(load<vf>(rows + (i + 1) * stride + p)) << 16);
}

}  // namespace
}  // namespace ATTNLAB_ISA
}  // namespace attnlab

#endif  // ATTNLAB_TILES_H_
