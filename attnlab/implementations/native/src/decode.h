// Forward for few queries and many keys
//
// Reading the keys is all the work, so they are read as they lie: slot by slot, all
// heads of a slot after another. Slices of the keys are merged in their order.

#ifndef ATTNLAB_DECODE_H_
#define ATTNLAB_DECODE_H_

#include "forward.h"

namespace attnlab {
namespace ATTNLAB_ISA {
namespace {

template <class T>
INLINE float dot(const float* a, const T* b, int64_t size) {
  vf sums = {};
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) sums += load<vf>(a + i) * wide(b + i);
  float total = sum(sums);
  for (; i < size; ++i) total += a[i] * number(b[i]);
  return total;
}
template <class T>
INLINE void add_scaled(float* out, float scale, const T* x, int64_t size) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth)
    store(out + i, load<vf>(out + i) + scale * wide(x + i));
  for (; i < size; ++i) out[i] += scale * number(x[i]);
}

// A slice's part of one query: [D] sums, the maximum, the total.
INLINE float* part_of(const Problem& c, int64_t slice, int64_t b, int64_t t, int64_t n) {
  return (float*)c.ret(2).data + (((slice * c.B + b) * c.T + t) * c.N + n) * (c.D + 2);
}

template <class T>
void decode_keys(const Problem& c, int64_t b, int64_t slice) {
  Work<float>& w = work<float>();
  static thread_local Buffer<Panel> panel_room;
  static thread_local Buffer<Running> running_room;
  const int64_t each = up((c.S + c.slices - 1) / c.slices, kKeys);
  const int64_t slice0 = least(slice * each, c.S), slice1 = least(slice0 + each, c.S);
  Panel* panels = panel_room.get(c.N);
  Running* sums = running_room.get(c.N);
  float* tiles = w.tile.get(c.N * kKeys * kLanes);
  memset(tiles, 0, c.N * kKeys * kLanes * 4);
  float* q = w.rows.get(c.N * c.T * c.P);
  float* o = w.out.get(c.N * c.T * c.D);
  memset(o, 0, c.N * c.T * c.D * 4);
  struct Range {
    int64_t first, end;
    uint32_t words[kKeys];
  };
  static thread_local Buffer<Range> range_room;
  Range* ranges = range_room.get(c.N);
  for (int64_t n = 0; n < c.N; ++n) {
    panels[n] = Panel(c, b, n, 0, c.T);
    sums[n].reset();
    for (int64_t t = 0; t < c.T; ++t)
      load_floats(c.arg(0), c.query_at(b, t, n, c.P), c.P, q + (n * c.T + t) * c.P);
  }
  const T* keys = (const T*)c.arg(1).data;
  const T* values = (const T*)c.arg(2).data;
  for (int64_t s0 = slice0; s0 < slice1; s0 += kKeys) {
    const int64_t count = least(kKeys, slice1 - s0);
    int64_t first = count, end = 0;  // that some head sees
    for (int64_t n = 0; n < c.N; ++n) {
      Range& r = ranges[n];
      bool some = false, full = false;
      each_interval(c, b, n, 0, [&](int64_t from, int64_t to, bool is_full) {
        some |= from < s0 + count && to > s0;
        full |= is_full && from <= s0 && to >= s0 + count;
      });
      r.first = r.end = 0;
      if (full) {
        r.end = count;
        for (int64_t k = 0; k < count; ++k) r.words[k] = ~0u;
      } else if (some) {
        Mask(c, panels[n], s0, count).range(r.words, &r.first, &r.end);
      }
      if (r.first < r.end) first = least(first, r.first), end = most(end, r.end);
    }
    for (int64_t k = first; k < end; ++k)
      for (int64_t n = 0; n < c.N; ++n) {
        if (k < ranges[n].first || k >= ranges[n].end) continue;
        const T* key = keys + c.key_at(b, s0 + k, n / c.group, c.P);
        for (int64_t t = 0; t < c.T; ++t)
          tiles[(n * kKeys + k) * kLanes + t] = dot(q + (n * c.T + t) * c.P, key, c.P);
      }
    for (int64_t n = 0; n < c.N; ++n) {
      const Range& r = ranges[n];
      if (r.first == r.end) continue;
      float* tile = tiles + n * kKeys * kLanes;
      if (c.num_modifiers)
        Modifying{c, panels[n], c.key_positions.as<int32_t>(b, 0, 0, s0), s0, w.values,
                  w.before}
            .apply(r.first, r.end, tile, false);
      softmax<1>(c, panels[n], sums[n], s0, r.first, r.end, r.words, tile,
                 [&](const vf* factors) {
                   for (int64_t t = 0; t < c.T; ++t)
                     for (int64_t d = 0; d < c.D; ++d)
                       o[(n * c.T + t) * c.D + d] *= factors[0][t];
                 });
    }
    for (int64_t k = first; k < end; ++k)
      for (int64_t n = 0; n < c.N; ++n) {
        if (k < ranges[n].first || k >= ranges[n].end) continue;
        const T* value = values + c.key_at(b, s0 + k, n / c.group, c.D);
        for (int64_t t = 0; t < c.T; ++t)
          add_scaled(o + (n * c.T + t) * c.D, tiles[(n * kKeys + k) * kLanes + t], value,
                     c.D);
      }
  }
  for (int64_t n = 0; n < c.N; ++n)
    for (int64_t t = 0; t < c.T; ++t) {
      float* part = part_of(c, slice, b, t, n);
      memcpy(part, o + (n * c.T + t) * c.D, c.D * 4);
      part[c.D] = sums[n].top[t], part[c.D + 1] = sums[n].total[t];
    }
}

void merge_slices(const Problem& c, int64_t b) {
  for (int64_t t = 0; t < c.T; ++t)
    for (int64_t n = 0; n < c.N; ++n) {
      float top = kLowest, total = 0;
      for (int64_t i = 0; i < c.slices; ++i) {
        const float* part = part_of(c, i, b, t, n);
        if (part[c.D + 1] > 0 && part[c.D] > top) top = part[c.D];
      }
      float* out = (float*)c.ret(0).data + c.query_at(b, t, n, c.D);
      memset(out, 0, c.D * 4);
      for (int64_t i = 0; i < c.slices; ++i) {
        const float* part = part_of(c, i, b, t, n);
        if (part[c.D + 1] == 0) continue;
        const float share = expf(part[c.D] - top);
        total += part[c.D + 1] * share;
        add_scaled(out, share, part, c.D);
      }
      const bool alive = total > 0;
      const float scale = alive ? (float)c.call.keep_scale / total : 0.0f;
      for (int64_t d = 0; d < c.D; ++d) out[d] = alive ? out[d] * scale : 0.0f;
      ((float*)c.ret(1).data)[(b * c.T + t) * c.N + n] =
          alive ? top + logf(total) : -INFINITY;
    }
}

}  // namespace
}  // namespace ATTNLAB_ISA
}  // namespace attnlab

#endif  // ATTNLAB_DECODE_H_
