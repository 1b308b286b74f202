// Forward and backward passes for few queries
//
// There are too few queries to fill the lanes of vectors, so vectors run along the
// elements of keys and values; vectors of logits and weights run along the keys of a
// tile. Most of the time goes to reading keys and values, so they are read nearly in
// memory order: a few slots at a time, with all their heads. A unit of work is a slice
// of the keys of one example, with all heads; slices are merged in order.

#ifndef ATTNLAB_FEW_H_
#define ATTNLAB_FEW_H_

#include "backward.h"

namespace attnlab {
namespace ATTNLAB_ISA {
namespace {

// How queries and keys are compared: `query . key`, or `weight . act(query + key)`.
enum Comparison { kProduct, kTanhSum, kPerceptron };

// Writes kWidth floats: the first `count` elements of x, then zeros.
template <class T>
__attribute__((noinline)) void first_elements(const T* x, int64_t count, float* out) {
  for (int64_t i = 0; i < kWidth; ++i) out[i] = i < count ? number(x[i]) : 0.0f;
}
// Elements [i, i + kWidth) of x, zeros from `size` on.
template <class T>
INLINE vf elements(const T* x, int64_t i, int64_t size) {
  if (i + kWidth <= size) return wide(x + i);
  float part[kWidth];
  first_elements(x + i, size - i, part);
  return load<vf>(part);
}

template <int kStep>
INLINE void fold(vf* v) {
  constexpr std::make_integer_sequence<int, kWidth> lanes{};
  for (int i = 0; i < kStep; ++i)
    v[i] = halves<kStep>(v[i], v[i + kStep], false, lanes) +
           halves<kStep>(v[i], v[i + kStep], true, lanes);
}
// Lane i of the result is the sum of the lanes of vector i.
INLINE vf sums_of(vf* v) {
  if (kWidth > 8) fold<(kWidth > 8 ? 8 : 1)>(v);
  if (kWidth > 4) fold<(kWidth > 4 ? 4 : 1)>(v);
  fold<2>(v);
  fold<1>(v);
  return v[0];
}

// The number of queries of one key head, and of vectors of a value, that are kept in
// registers at once.
constexpr int kTogether = kRows / 2;

// Compares kQueries queries, [up(size, kWidth)] each, with kWidth keys; writes
// out[query][0 : kWidth], with rows kKeys apart.
template <int kComparison, int kQueries, class T>
INLINE void compare(const Problem& c, const float* queries, const float* const* weights,
                    const T* const* keys, int64_t size, float* out) {
  constexpr int kSome = 4;
  const int64_t width = up(size, kWidth);
  vf sums[kQueries][kWidth];
  for (int first = 0; first < kWidth; first += kSome) {
    vf some[kQueries][kSome] = {};
    for (int64_t p = 0; p < size; p += kWidth) {
      vf k[kSome];
      for (int i = 0; i < kSome; ++i) k[i] = elements(keys[first + i], p, size);
      for (int j = 0; j < kQueries; ++j) {
        const vf q = load<vf>(queries + j * width + p);
        const vf w = kComparison == kProduct ? q : load<vf>(weights[j] + p);
        for (int i = 0; i < kSome; ++i)
          if (kComparison == kProduct)
            some[j][i] += q * k[i];
          else if (kComparison == kTanhSum)
            some[j][i] += w * tanh_(q + k[i]);
          else
            some[j][i] += w * activate(c.activation, q + k[i]);
      }
    }
    for (int j = 0; j < kQueries; ++j)
      for (int i = 0; i < kSome; ++i) sums[j][first + i] = some[j][i];
  }
  for (int j = 0; j < kQueries; ++j) store(out + j * kKeys, sums_of(sums[j]));
}

// All queries of one example, and what they see of the current tile of keys. Query t of
// head n is row n * T + t.
struct Few {
  const Problem& c;
  const int64_t b, rows, p_wide, d_wide;
  const bool is_far;             // keys and values do not fit in the caches
  Panel* panels;                 // [N]
  float *q, *weight;             // [rows][p_wide], [N][p_wide]
  float *z, *tile;               // logits [rows][kKeys]; [kKeys][kLanes] for modifiers
  uint32_t (*words)[kKeys];      // [N], one bit per query
  bool* sees;                    // [N]: whether the head sees some key of the tile
  float* nothing;                // zeros, the size of a key or value
  int64_t s0 = 0, count = 0;
  int64_t first = 0, end = 0;    // keys of the tile that some head sees
  Buffer<float>&values, &before;

  Few(const Problem& c, Work<float>& w, int64_t b)
      : c(c),
        b(b),
        rows(c.N * c.T),
        p_wide(up(c.P, kWidth)),
        d_wide(up(c.D, kWidth)),
        is_far(c.B * c.S * c.K * (c.P + c.D) >
               kCached / (c.arg(1).type == Type::f32 ? 4 : 2)),
        values(w.values),
        before(w.before) {
    static thread_local Buffer<Panel> panel_room;
    static thread_local Buffer<uint32_t[kKeys]> word_room;
    static thread_local Buffer<bool> sees_room;
    static thread_local Buffer<float> nothing_room;
    panels = panel_room.get(c.N);
    words = word_room.get(c.N);
    sees = sees_room.get(c.N);
    nothing = nothing_room.get(most(p_wide, d_wide));
    memset(nothing, 0, most(p_wide, d_wide) * 4);
    q = w.q.get(rows * p_wide);
    weight = w.network.get(c.N * p_wide);
    z = w.probs.get(rows * kKeys);
    tile = w.tile.get(kKeys * kLanes);
    for (int64_t n = 0; n < c.N; ++n) {
      gather(c.arg(0), n, c.P, p_wide, c.scale(b, n), q);
      panels[n] = Panel(c, b, n, 0, c.T);
      if (c.score == kInner) continue;
      Operand own(c.arg(c.first_param + c.num_params - 1));
      memset(weight + n * p_wide, 0, p_wide * 4);
      load_floats(own.array, own.at(b, n), c.P, weight + n * p_wide);
    }
  }

  // Loads a head's rows of an array [B, T, N, size], padded with zeros. Dead rows are
  // loaded too: they only affect hidden pairs.
  void gather(const Array& x, int64_t n, int64_t size, int64_t width, float scale,
              float* out) const {
    for (int64_t t = 0; t < c.T; ++t) {
      float* row = out + (n * c.T + t) * width;
      load_floats(x, c.query_at(b, t, n, size), size, row);
      memset(row + size, 0, (width - size) * 4);
      for (int64_t i = 0; i < size; ++i) row[i] *= scale;
    }
  }

  // Makes keys [s, s + n) the current tile, and finds what each head sees of it.
  void look(int64_t s, int64_t n) {
    s0 = s, count = n;
    first = count, end = 0;
    for (int64_t head = 0; head < c.N; ++head) {
      uint32_t* seen = words[head];
      memset(seen, 0, sizeof words[head]);
      bool some = false, full = false;
      each_interval(c, b, head, 0, [&](int64_t from, int64_t to, bool is_full) {
        some |= from < s0 + count && to > s0;
        full |= is_full && from <= s0 && to >= s0 + count;
      });
      int64_t low = 0, high = some ? count : 0;
      if (full)
        for (int64_t k = 0; k < count; ++k) seen[k] = ~0u;
      else if (some)
        Mask(c, panels[head], s0, count).range(seen, &low, &high);
      sees[head] = low < high;
      if (sees[head]) first = least(first, low), end = most(end, high);
    }
    first = first / kWidth * kWidth;
  }

  // Pointers to keys (or values) [at, at + kWidth) of the tile: to the last slot beyond
  // the end of the tile. Prefetches the next ones if `is_far`.
  template <class T>
  void slots(const T* x, int64_t at, int64_t kh, int64_t size, const T** out) const {
    const T* const start = x + c.key_at(b, s0 + at, kh, size);
    const int64_t stride = c.K * size, last = count - 1 - at;
    const int64_t following = is_far ? least(c.S - s0 - at, 2 * kWidth) : 0;
    for (int64_t i = kWidth; i < following; ++i) fetch_ahead(start + i * stride, size);
    for (int64_t i = 0; i < kWidth; ++i) {
      const int64_t slot = least(i, last);
      out[i] = start + slot * stride;
    }
  }

  // Divides the rows of all heads that share key head kh and see some of the tile into
  // groups [row, row + count); calls f(row, count) with a compile-time `count`.
  template <class F>
  INLINE void each_row(int64_t kh, F f) const {
    const int64_t stop = (kh + 1) * c.group;
    for (int64_t n = kh * c.group; n < stop; ++n) {
      int64_t row = n * c.T;
      while (n < stop && sees[n]) ++n;
      const int64_t end = n * c.T;
      for (; row + kTogether <= end; row += kTogether)
        f(row, std::integral_constant<int, kTogether>{});
      for (; row < end; ++row) f(row, std::integral_constant<int, 1>{});
    }
  }

  // Replaces values that are not finite, among `count` from key k on, by zeros, and
  // their weights by NaN where the value is seen: hidden values have the weight 0, and
  // 0 * NaN is NaN. Does nothing if all queries see all of these values.
  template <class T>
  void lose(int64_t kh, int64_t k, int64_t count, int64_t size, const T** at) const {
    const uint32_t all = c.T < 32 ? (1u << c.T) - 1 : ~0u;
    uint32_t seen = all;
    for (int64_t n = kh * c.group; n < (kh + 1) * c.group; ++n)
      if (sees[n])
        for (int64_t i = 0; i < count; ++i) seen &= words[n][k + i];
    if (seen == all) return;
    for (int64_t i = 0; i < count; ++i) {
      vf zeros = {};
      for (int64_t d = 0; d < size; d += kWidth) zeros += elements(at[i], d, size) * 0.0f;
      if (sum(zeros) == 0) continue;
      at[i] = (const T*)nothing;
      for (int64_t n = kh * c.group; n < (kh + 1) * c.group; ++n)
        for (int64_t t = 0; t < c.T; ++t)
          z[(n * c.T + t) * kKeys + k + i] = words[n][k + i] >> t & 1 ? NAN : 0.0f;
    }
  }

  // Logits of keys [first, end) before the modifiers.
  template <int kComparison, class T>
  void logits() {
    const T* keys = (const T*)c.arg(1).data;
    const T* at[kWidth];
    for (int64_t k = first; k < end; k += kWidth)
      for (int64_t kh = 0; kh < c.K; ++kh) {
        slots(keys, k, kh, c.P, at);
        each_row(kh, [&](int64_t row, auto count) {
          constexpr int kQueries = decltype(count)::value;
          const float* weights[kQueries];
          for (int j = 0; j < kQueries; ++j) weights[j] = weight + (row + j) / c.T * p_wide;
          compare<kComparison, kQueries>(c, q + row * p_wide, weights, at, c.P,
                                         z + row * kKeys + k);
        });
      }
  }

  // Transposes a head's rows [t][key] to the tile [key][lane], and back.
  void to_tile(const float* from) const {
    memset(tile, 0, kKeys * kLanes * 4);
    for (int64_t t = 0; t < c.T; ++t)
      for (int64_t k = first; k < end; ++k) tile[k * kLanes + t] = from[t * kKeys + k];
  }
  void from_tile(float* to) const {
    for (int64_t t = 0; t < c.T; ++t)
      for (int64_t k = first; k < end; ++k) to[t * kKeys + k] = tile[k * kLanes + t];
  }
  Modifying modifying(int64_t n) const {
    return {c, panels[n], c.key_positions.as<int32_t>(b, 0, 0, s0), s0, values, before};
  }
  void modify(int64_t n, bool keep) const {
    if (c.num_modifiers == 0) return;
    to_tile(z + n * c.T * kKeys);
    modifying(n).apply(first, end, tile, keep);
    from_tile(z + n * c.T * kKeys);
  }

  // For keys [k, k + kWidth): x where query t of head n sees the key, else `hidden`.
  INLINE vf shown(int64_t n, int64_t t, int64_t k, vf x, vf hidden) const {
    const vu bit = load<vu>(words[n] + k) >> (uint32_t)t & 1u;
    return bit != 0 ? x : hidden;
  }
};

// The result of one query in one slice: [D] weighted sums of values, the greatest
// logit, the sum of weights.
INLINE float* part_of(const Problem& c, int64_t slice, int64_t b, int64_t t, int64_t n) {
  return (float*)c.ret(2).data + (((slice * c.B + b) * c.T + t) * c.N + n) * (c.D + 2);
}

// out[query][d : d + kVectors * kWidth] += sum over `count` keys of
// weights[query][key] * values[key][d : d + kVectors * kWidth]
template <int kQueries, int kVectors, class T>
INLINE void add_some(float* out, int64_t d, int64_t size, const float* weights,
                     const T* const* values, int64_t count) {
  const int64_t width = up(size, kWidth);
  vf sums[kQueries][kVectors];
  for (int j = 0; j < kQueries; ++j)
    for (int i = 0; i < kVectors; ++i)
      sums[j][i] = load<vf>(out + j * width + d + i * kWidth);
  for (int64_t key = 0; key < count; ++key) {
    vf v[kVectors];
    for (int i = 0; i < kVectors; ++i) v[i] = elements(values[key], d + i * kWidth, size);
    for (int j = 0; j < kQueries; ++j)
      for (int i = 0; i < kVectors; ++i) sums[j][i] += weights[j * kKeys + key] * v[i];
  }
  for (int j = 0; j < kQueries; ++j)
    for (int i = 0; i < kVectors; ++i)
      store(out + j * width + d + i * kWidth, sums[j][i]);
}
template <int kQueries, class T>
INLINE void add_values(float* out, int64_t size, const float* weights,
                       const T* const* values, int64_t count) {
  int64_t d = 0;
  for (; d + kTogether * kWidth <= up(size, kWidth); d += kTogether * kWidth)
    add_some<kQueries, kTogether>(out, d, size, weights, values, count);
  for (; d < size; d += kWidth)
    add_some<kQueries, 1>(out, d, size, weights, values, count);
}

INLINE void few_slice(const Problem& c, int64_t slice, int64_t* s0, int64_t* s1) {
  const int64_t each = up((c.S + c.slices - 1) / c.slices, kKeys);
  *s0 = least(slice * each, c.S), *s1 = least(*s0 + each, c.S);
}

template <int kComparison, class T>
void few_forward(const Problem& c, int64_t b, int64_t slice) {
  Work<float>& w = work<float>();
  Few few(c, w, b);
  float* o = w.out.get(few.rows * few.d_wide);
  float* sums = w.kept.get(2 * few.rows);
  float *tops = sums, *totals = sums + few.rows;
  memset(o, 0, few.rows * few.d_wide * 4);
  for (int64_t row = 0; row < few.rows; ++row) tops[row] = kLowest, totals[row] = 0;
  const T* values = (const T*)c.arg(2).data;
  const T* at[kWidth];
  int64_t slice0, slice1;
  few_slice(c, slice, &slice0, &slice1);
  for (int64_t s0 = slice0; s0 < slice1; s0 += kKeys) {
    few.look(s0, least(kKeys, slice1 - s0));
    if (few.first >= few.end) continue;
    few.logits<kComparison, T>();
    for (int64_t n = 0; n < c.N; ++n) {
      if (!few.sees[n]) continue;
      few.modify(n, false);
      for (int64_t t = 0; t < c.T; ++t) {
        const int64_t row = n * c.T + t;
        float* z = few.z + row * kKeys;
        vf tall = splat(tops[row]);
        for (int64_t k = few.first; k < few.end; k += kWidth) {
          vf x = few.shown(n, t, k, load<vf>(z + k), splat(-INFINITY));
          store(z + k, x);
          tall = greater(x, tall);
        }
        float top = tall[0];
        for (int i = 1; i < kWidth; ++i) top = tall[i] > top ? tall[i] : top;
        if (top > tops[row]) {
          const float shrink = exp2_(splat((tops[row] - top) * kLog2e))[0];
          totals[row] *= shrink;
          for (int64_t d = 0; d < few.d_wide; d += kWidth)
            store(o + row * few.d_wide + d, load<vf>(o + row * few.d_wide + d) * shrink);
          tops[row] = top;
        }
        vf total = {};
        for (int64_t k = few.first; k < few.end; k += kWidth) {
          vf p = exp2_((load<vf>(z + k) - top) * kLog2e);
          total += p;
          store(z + k, p);
        }
        totals[row] += sum(total);
        if (c.drop_below >= 0) {
          Dropout drop(c, few.panels[n], s0);
          for (int64_t k = few.first; k < least(few.end, few.count); ++k)
            if (!drop.keeps(k, (int)t)) z[k] = 0;
        }
      }
    }
    for (int64_t k = few.first; k < few.end; k += kWidth)
      for (int64_t kh = 0; kh < c.K; ++kh) {
        few.slots(values, k, kh, c.D, at);
        const int64_t count = least(kWidth, few.count - k);
        few.lose(kh, k, count, c.D, at);
        few.each_row(kh, [&](int64_t row, auto rows) {
          add_values<decltype(rows)::value>(o + row * few.d_wide, c.D,
                                            few.z + row * kKeys + k, at, count);
        });
      }
  }
  for (int64_t n = 0; n < c.N; ++n)
    for (int64_t t = 0; t < c.T; ++t) {
      const int64_t row = n * c.T + t;
      float* part = part_of(c, slice, b, t, n);
      memcpy(part, o + row * few.d_wide, c.D * 4);
      part[c.D] = tops[row], part[c.D + 1] = totals[row];
    }
}

void merge_slices(const Problem& c, int64_t b) {
  for (int64_t t = 0; t < c.T; ++t)
    for (int64_t n = 0; n < c.N; ++n) {
      float top = kLowest, total = 0;
      for (int64_t i = 0; i < c.slices; ++i) {
        const float* part = part_of(c, i, b, t, n);
        if (part[c.D + 1] != 0 && part[c.D] > top) top = part[c.D];
      }
      float* out = (float*)c.ret(0).data + c.query_at(b, t, n, c.D);
      memset(out, 0, c.D * 4);
      for (int64_t i = 0; i < c.slices; ++i) {
        const float* part = part_of(c, i, b, t, n);
        if (part[c.D + 1] == 0) continue;
        const float share = expf(part[c.D] - top);
        total += part[c.D + 1] * share;
        for (int64_t d = 0; d < c.D; ++d) out[d] += share * part[d];
      }
      const bool alive = total != 0;  // true for NaN, which must propagate
      const float scale = alive ? (float)c.call.keep_scale / total : 0.0f;
      for (int64_t d = 0; d < c.D; ++d) out[d] = alive ? out[d] * scale : 0.0f;
      ((float*)c.ret(1).data)[(b * c.T + t) * c.N + n] =
          alive ? top + logf(total) : -INFINITY;
    }
}

// Adds the gradients of query, key and weight, given that of one logit.
template <int kComparison, class T>
INLINE void compare_gradients(const Problem& c, float d_logit, const float* query,
                              const T* key, const float* weight, float* d_query,
                              float* d_key, float* d_weight) {
  const int kind = c.activation;
  for (int64_t p = 0; p < c.P; p += kWidth) {
    const vf q = load<vf>(query + p), k = elements(key, p, c.P);
    vf to_query, to_key;
    if (kComparison == kProduct) {
      to_query = d_logit * k, to_key = d_logit * q;
    } else {
      const vf w = load<vf>(weight + p);
      vf act, down;
      if (kComparison == kTanhSum) {
        act = tanh_(q + k);
        down = 1.0f - act * act;
      } else {
        act = activate(kind, q + k);
        down = slope(kind, q + k);
      }
      to_query = to_key = d_logit * w * down;
      store(d_weight + p, load<vf>(d_weight + p) + d_logit * act);
    }
    store(d_query + p, load<vf>(d_query + p) + to_query);
    store(d_key + p, load<vf>(d_key + p) + to_key);
  }
}

template <int kComparison, class T>
void few_backward(const Problem& c, int64_t b, int64_t slice) {
  Work<float>& w = work<float>();
  Few few(c, w, b);
  const int64_t p_wide = few.p_wide, d_wide = few.d_wide;
  float* above = w.d_o.get(few.rows * d_wide);
  for (int64_t n = 0; n < c.N; ++n)
    few.gather(c.arg(11), n, c.D, d_wide, (float)c.call.keep_scale, above);
  float* d_query = w.rows.get(few.rows * p_wide);
  float* d_weight = w.gradients.get(c.N * p_wide);
  float* d_logits = w.probs2.get(few.rows * kKeys);
  float* d_key = w.d_key.get(kKeys * p_wide);
  float* d_value = w.d_value.get(kKeys * d_wide);
  memset(d_query, 0, few.rows * p_wide * 4);
  memset(d_weight, 0, c.N * p_wide * 4);
  const float *lse = (const float*)c.arg(10).data, *delta = (const float*)c.ret(4).data;
  const T *keys = (const T*)c.arg(1).data, *values = (const T*)c.arg(2).data;
  const T* at[kWidth];
  int64_t slice0, slice1;
  few_slice(c, slice, &slice0, &slice1);
  for (int64_t s0 = slice0; s0 < slice1; s0 += kKeys) {
    few.look(s0, least(kKeys, slice1 - s0));
    if (few.first < few.end) few.logits<kComparison, T>();
    for (int64_t kh = 0; kh < c.K; ++kh) {
      memset(d_key, 0, kKeys * p_wide * 4);
      memset(d_value, 0, kKeys * d_wide * 4);
      for (int64_t n = kh * c.group; n < (kh + 1) * c.group; ++n) {
        if (!few.sees[n]) continue;
        few.modify(n, true);
        for (int64_t k = few.first; k < few.end; k += kWidth) {
          few.slots(values, k, kh, c.D, at);
          for (int64_t row = n * c.T; row < (n + 1) * c.T; ++row)
            compare<kProduct, 1>(c, above + row * d_wide, nullptr, at, c.D,
                                 d_logits + row * kKeys + k);
        }
        for (int64_t t = 0; t < c.T; ++t) {
          const int64_t row = n * c.T + t, place = (b * c.T + t) * c.N + n;
          const bool alive = lse[place] != -INFINITY;
          const float shift = alive ? lse[place] : INFINITY;
          const float less = alive ? delta[place] : 0.0f;
          float *p = few.z + row * kKeys, *d = d_logits + row * kKeys;
          bool kept[kKeys];
          const int64_t stop = c.drop_below < 0 ? 0 : least(few.end, few.count);
          if (stop > 0) {
            Dropout drop(c, few.panels[n], s0);
            for (int64_t k = few.first; k < stop; ++k)
              if (!(kept[k] = drop.keeps(k, (int)t))) d[k] = 0;
          }
          for (int64_t k = few.first; k < few.end; k += kWidth) {
            const vf nothing = {};
            vf x = exp2_((load<vf>(p + k) - shift) * kLog2e);
            store(p + k, few.shown(n, t, k, x, nothing));
            store(d + k, few.shown(n, t, k, x * (load<vf>(d + k) - less), nothing));
          }
          for (int64_t k = few.first; k < stop; ++k)
            if (!kept[k]) p[k] = 0;
        }
        if (c.num_modifiers) {
          few.to_tile(d_logits + n * c.T * kKeys);
          few.modifying(n).gradients(few.first, few.end, few.tile, slice);
          few.from_tile(d_logits + n * c.T * kKeys);
        }
        for (int64_t k = few.first; k < least(few.end, few.count); ++k)
          for (int64_t t = 0; t < c.T; ++t) {
            if ((few.words[n][k] >> t & 1) == 0) continue;
            const int64_t row = n * c.T + t;
            const float weight = few.z[row * kKeys + k];
            if (c.wanted & kWantValue)
              for (int64_t i = 0; i < d_wide; i += kWidth)
                store(d_value + k * d_wide + i,
                      load<vf>(d_value + k * d_wide + i) +
                          weight * load<vf>(above + row * d_wide + i));
            if ((c.wanted & ~kWantValue) == 0) continue;
            compare_gradients<kComparison>(
                c, d_logits[row * kKeys + k], few.q + row * p_wide,
                keys + c.key_at(b, s0 + k, kh, c.P), few.weight + n * p_wide,
                d_query + row * p_wide, d_key + k * p_wide, d_weight + n * p_wide);
          }
      }
      for (int64_t k = 0; k < few.count; ++k) {
        if (c.wanted & kWantKey)
          store_floats(c.ret(1), c.key_at(b, s0 + k, kh, c.P), c.P, d_key + k * p_wide);
        if (c.wanted & kWantValue)
          store_floats(c.ret(2), c.key_at(b, s0 + k, kh, c.D), c.D, d_value + k * d_wide);
      }
    }
  }
  for (int64_t n = 0; n < c.N; ++n) {
    if (c.wanted & kWantQuery) {
      float* out = query_gradient(c, slice, b, n, 0);
      memset(out, 0, up(c.P, 8) * kLanes * 4);
      for (int64_t t = 0; t < c.T; ++t)
        for (int64_t p = 0; p < c.P; ++p)
          out[p * kLanes + t] = d_query[(n * c.T + t) * p_wide + p];
    }
    if (c.wanted & kWantParams)
      memcpy((float*)c.ret(c.first_param_gradient + c.num_params - 1).data +
                 ((slice * c.B + b) * c.N + n) * c.P,
             d_weight + n * p_wide, c.P * 4);
  }
}

}  // namespace
}  // namespace ATTNLAB_ISA
}  // namespace attnlab

#endif  // ATTNLAB_FEW_H_
