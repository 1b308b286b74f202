// Forward and backward passes where each query has a list of keys of its own
//
// A block of queries would see nearly all keys that any of them lists. So a query is
// computed alone, with all heads that share its list: its keys are read from where they
// lie. Vectors run along the elements of keys and values, as in few.h.

#ifndef ATTNLAB_LISTED_H_
#define ATTNLAB_LISTED_H_

#include <algorithm>

#include "few.h"

namespace attnlab {
namespace ATTNLAB_ISA {
namespace {

// Queries of a key head in a unit of work of the forward pass.
constexpr int64_t kListedQueries = 32;

// What one query sees, for a run of the heads that share a key head.
struct Listed {
  const Problem& c;
  const Operand lists;  // blocks of keys of each query, -1 = none
  const int64_t p_wide, d_wide;
  int64_t b = 0, kh = 0;
  int32_t* slots;     // slots of keys that the query sees
  int32_t* sorted;    // a list, if it is not sorted
  int64_t count = 0;        // number of slots
  float* q;                 // [group][p_wide]
  float* z;                 // logits of a tile: [group][kKeys]

  Listed(const Problem& c, Work<float>& w)
      : c(c), lists(c.arg(c.lists)), p_wide(up(c.P, kWidth)), d_wide(up(c.D, kWidth)) {
    static thread_local Buffer<int32_t> slot_room, sorted_room;
    slots = slot_room.get(lists.payload * c.list_block);
    sorted = sorted_room.get(lists.payload);
    q = w.q.get(c.group * p_wide);
    z = w.probs.get(c.group * kKeys);
  }

  const int32_t* list_of(int64_t n, int64_t t) const {
    // There is a list for each query head, for each key head, or for all.
    const bool shared = lists.array.dims[1] == c.K;
    return lists.as<int32_t>(b, shared ? n / c.group : n, t);
  }

  // Calls f(n, heads) for each run of heads from n on whose lists for query t are equal.
  template <class F>
  INLINE void each_run(int64_t t, F f) {
    const int64_t stop = (kh + 1) * c.group;
    for (int64_t n = kh * c.group; n < stop;) {
      const int32_t* list = list_of(n, t);
      int64_t next = n + 1;
      while (next < stop && std::equal(list, list + lists.payload, list_of(next, t)))
        ++next;
      f(n, next - n);
      n = next;
    }
  }

  // Finds the slots of [from, to) that query t of head n sees, each once. The position of
  // a key is its slot.
  void look(int64_t n, int64_t t, int64_t from, int64_t to) {
    const Panel panel(c, b, n, t, t + 1);
    count = 0;
    if (panel.occupied == 0) return;
    const bool decided = limits(panel.positions[0], &from, &to);
    const int32_t* list = list_of(n, t);
    if (!std::is_sorted(list, list + lists.payload)) {
      std::copy(list, list + lists.payload, sorted);
      std::sort(sorted, sorted + lists.payload);
      list = sorted;
    }
    int64_t last = -1;
    for (int64_t i = 0; i < lists.payload; ++i) {
      const int64_t block = list[i];
      if (block <= last) continue;
      last = block;
      const int64_t end = least((block + 1) * c.list_block, to);
      for (int64_t s = most(block * c.list_block, from); s < end; ++s)
        slots[count++] = (int32_t)s;
    }
    if (decided) return;
    const int64_t listed = count;
    count = 0;
    for (int64_t i = 0; i < listed; i += kKeys) {
      uint32_t words[kKeys];
      const int64_t some = least(kKeys, listed - i);
      Mask(c, panel, slots + i, some).evaluate(c.mask, words);
      for (int64_t k = 0; k < some; ++k)
        if (words[k] & 1) slots[count++] = slots[i + k];
    }
  }

  // Narrows a range of keys to what a window shows; false if the mask is another one.
  bool limits(int64_t position, int64_t* from, int64_t* to) const {
    const int64_t* code = c.mask;
    if (code[0] == kFull) return true;
    if (code[0] != kWindow || code[3] != 1) return false;
    if (code[1] >= 0) *from = most(*from, position - code[1]);
    if (code[2] >= 0) *to = least(*to, position + code[2] + 1);
    return true;
  }

  // Loads the rows of some heads of an array [B, T, N, size], times a factor.
  void load(const Array& x, int64_t t, int64_t n, int64_t heads, int64_t size,
            int64_t width, const float* factors, float* out) const {
    for (int64_t g = 0; g < heads; ++g) {
      float* row = out + g * width;
      load_floats(x, c.query_at(b, t, n + g, size), size, row);
      memset(row + size, 0, (width - size) * 4);
      for (int64_t i = 0; i < size; ++i) row[i] *= factors[g];
    }
  }

  // Pointers to the rows of the slots [first, first + some), rounded up by the last one.
  template <class T>
  void rows_of(const T* x, int64_t first, int64_t some, int64_t size, const T** at) const {
    for (int64_t i = 0; i < up(some, kWidth); ++i)
      at[i] = x + c.key_at(b, slots[first + least(i, some - 1)], kh, size);
  }
  // Slots lie anywhere, so no hardware knows which ones come next.
  template <class T>
  INLINE void fetch(const T* x, int64_t first, int64_t some, int64_t size) const {
    for (int64_t i = 0; i < some; ++i)
      fetch_ahead(x + c.key_at(b, slots[first + i], kh, size), size);
  }

  // Products of `heads` rows with the rows at some pointers: [heads][kKeys].
  template <class T>
  void products(const float* rows, int64_t heads, int64_t size, const T* const* at,
                int64_t some, float* out) const {
    const int64_t width = up(size, kWidth);
    int64_t g = 0;
    for (; g + kTogether <= heads; g += kTogether)
      for (int64_t k = 0; k < some; k += kWidth)
        compare<kProduct, kTogether>(c, rows + g * width, nullptr, at + k, size,
                                     out + g * kKeys + k);
    for (; g < heads; ++g)
      for (int64_t k = 0; k < some; k += kWidth)
        compare<kProduct, 1>(c, rows + g * width, nullptr, at + k, size,
                             out + g * kKeys + k);
  }

  // out[head] += sum of weights[head][k] * (the row at pointer k). Eight sums at once
  // keep the units busy that multiply and add.
  template <class T>
  void add(const float* weights, int64_t heads, int64_t size, const T* const* at,
           int64_t some, float* out) const {
    int64_t g = 0;
    for (; g + 4 <= heads; g += 4) add_to<4, 2>(g, weights, size, at, some, out);
    for (; g + 2 <= heads; g += 2) add_to<2, 4>(g, weights, size, at, some, out);
    for (; g < heads; ++g) add_to<1, 4>(g, weights, size, at, some, out);
  }
  template <int kHeads, int kVectors, class T>
  void add_to(int64_t g, const float* weights, int64_t size, const T* const* at,
              int64_t some, float* out) const {
    const int64_t width = up(size, kWidth);
    weights += g * kKeys, out += g * width;
    int64_t d = 0;
    for (; d + kVectors * kWidth <= width; d += kVectors * kWidth)
      add_some<kHeads, kVectors>(out, d, size, weights, at, some);
    for (; d < size; d += kWidth)
      add_some<kHeads, 1>(out, d, size, weights, at, some);
  }
};

// out += sum over heads of weights[head] * rows[head], `weights` being kKeys apart.
INLINE void add_rows(const float* weights, const float* rows, int64_t heads, int64_t width,
                     float* out) {
  for (int64_t i = 0; i < width; i += kWidth) {
    vf total = load<vf>(out + i);
    for (int64_t g = 0; g < heads; ++g)
      total += weights[g * kKeys] * load<vf>(rows + g * width + i);
    store(out + i, total);
  }
}

template <class T>
void listed_forward(const Problem& c, int64_t b, int64_t kh, int64_t t0, int64_t t1) {
  Work<float>& w = work<float>();
  Listed all(c, w);
  all.b = b, all.kh = kh;
  float* o = w.out.get(c.group * all.d_wide);
  float* sums = w.kept.get(3 * c.group);
  float *tops = sums, *totals = sums + c.group, *factors = sums + 2 * c.group;
  const T *keys = (const T*)c.arg(1).data, *values = (const T*)c.arg(2).data;
  const T* at[kKeys];
  for (int64_t t = t0; t < t1; ++t)
    all.each_run(t, [&](int64_t n, int64_t heads) {
      all.look(n, t, 0, c.S);
      for (int64_t g = 0; g < heads; ++g)
        tops[g] = kLowest, totals[g] = 0, factors[g] = c.scale(b, n + g);
      all.load(c.arg(0), t, n, heads, c.P, all.p_wide, factors, all.q);
      memset(o, 0, heads * all.d_wide * 4);
      for (int64_t first = 0; first < all.count; first += kKeys) {
        const int64_t some = least(kKeys, all.count - first);
        const int64_t next = first + some, more = least(kKeys, all.count - next);
        all.fetch(values, first, some, c.D);
        all.rows_of(keys, first, some, c.P, at);
        all.products(all.q, heads, c.P, at, some, all.z);
        all.fetch(keys, next, more, c.P);
        for (int64_t g = 0; g < heads; ++g) {
          float* z = all.z + g * kKeys;
          for (int64_t k = some; k < up(some, kWidth); ++k) z[k] = -INFINITY;
          vf tall = splat(tops[g]);
          for (int64_t k = 0; k < some; k += kWidth) tall = greater(load<vf>(z + k), tall);
          float top = tall[0];
          for (int i = 1; i < kWidth; ++i) top = tall[i] > top ? tall[i] : top;
          if (top > tops[g]) {
            const float shrink = exp2_(splat((tops[g] - top) * kLog2e))[0];
            totals[g] *= shrink;
            float* row = o + g * all.d_wide;
            for (int64_t d = 0; d < all.d_wide; d += kWidth)
              store(row + d, load<vf>(row + d) * shrink);
            tops[g] = top;
          }
          vf total = {};
          for (int64_t k = 0; k < some; k += kWidth) {
            vf p = exp2_((load<vf>(z + k) - top) * kLog2e);
            total += p;
            store(z + k, p);
          }
          totals[g] += sum(total);
        }
        all.rows_of(values, first, some, c.D, at);
        all.add(all.z, heads, c.D, at, some, o);
      }
      for (int64_t g = 0; g < heads; ++g) {
        const bool alive = totals[g] != 0;  // true for NaN, which must propagate
        const float scale = alive ? 1.0f / totals[g] : 0.0f;
        float* out = (float*)c.ret(0).data + c.query_at(b, t, n + g, c.D);
        for (int64_t d = 0; d < c.D; ++d) out[d] = alive ? o[g * all.d_wide + d] * scale : 0;
        ((float*)c.ret(1).data)[(b * c.T + t) * c.N + n + g] =
            alive ? tops[g] + logf(totals[g]) : -INFINITY;
      }
    });
}

// A unit is a slice of the keys of one key head; it visits all queries, in order.
template <class T>
void listed_backward(const Problem& c, int64_t b, int64_t kh, int64_t slice) {
  Work<float>& w = work<float>();
  Listed all(c, w);
  all.b = b, all.kh = kh;
  const int64_t p_wide = all.p_wide, d_wide = all.d_wide, p_rows = up(c.P, 8);
  int64_t slice0, slice1;
  few_slice(c, slice, &slice0, &slice1);
  float* above = w.d_o.get(c.group * d_wide);
  float* d_q = w.rows.get(c.group * p_wide);
  float* d_z = w.probs2.get(c.group * kKeys);
  float* d_key = w.d_key.get((slice1 - slice0) * p_wide);
  float* d_value = w.d_value.get((slice1 - slice0) * d_wide);
  memset(d_key, 0, (slice1 - slice0) * p_wide * 4);
  memset(d_value, 0, (slice1 - slice0) * d_wide * 4);
  if (c.wanted & kWantQuery)
    for (int64_t g = 0; g < c.group; ++g)
      memset(query_gradient(c, slice, b, kh * c.group + g, 0), 0,
             c.rows * up(c.block_q, 32) * p_rows * 4);
  float* factors = w.kept.get(2 * c.group);
  float* kept = factors + c.group;
  for (int64_t g = 0; g < c.group; ++g) kept[g] = (float)c.call.keep_scale;
  const float *lse = (const float*)c.arg(10).data, *delta = (const float*)c.ret(4).data;
  const T *keys = (const T*)c.arg(1).data, *values = (const T*)c.arg(2).data;
  const T *at[kKeys], *at_value[kKeys];
  for (int64_t t = 0; t < c.T; ++t)
    all.each_run(t, [&](int64_t n, int64_t heads) {
      all.look(n, t, slice0, slice1);
      if (all.count == 0) return;
      for (int64_t g = 0; g < heads; ++g) factors[g] = c.scale(b, n + g);
      all.load(c.arg(0), t, n, heads, c.P, p_wide, factors, all.q);
      all.load(c.arg(11), t, n, heads, c.D, d_wide, kept, above);
      memset(d_q, 0, heads * p_wide * 4);
      for (int64_t first = 0; first < all.count; first += kKeys) {
        const int64_t some = least(kKeys, all.count - first);
        const int64_t next = first + some, more = least(kKeys, all.count - next);
        all.rows_of(keys, first, some, c.P, at);
        all.rows_of(values, first, some, c.D, at_value);
        all.products(all.q, heads, c.P, at, some, all.z);
        all.products(above, heads, c.D, at_value, some, d_z);
        all.fetch(keys, next, more, c.P);
        all.fetch(values, next, more, c.D);
        for (int64_t g = 0; g < heads; ++g) {
          const int64_t row = (b * c.T + t) * c.N + n + g;
          float *z = all.z + g * kKeys, *d = d_z + g * kKeys;
          for (int64_t k = 0; k < some; k += kWidth) {
            const vf x = exp2_((load<vf>(z + k) - lse[row]) * kLog2e);
            store(z + k, x);
            store(d + k, x * (load<vf>(d + k) - delta[row]));
          }
        }
        for (int64_t k = 0; k < some; ++k) {
          const int64_t s = all.slots[first + k] - slice0;
          if (c.wanted & kWantValue)
            add_rows(all.z + k, above, heads, d_wide, d_value + s * d_wide);
          if (c.wanted & kWantKey)
            add_rows(d_z + k, all.q, heads, p_wide, d_key + s * p_wide);
        }
        if (c.wanted & kWantQuery) all.add(d_z, heads, c.P, at, some, d_q);
      }
      if (!(c.wanted & kWantQuery)) return;
      const int64_t r = t / c.block_q, place = t - r * c.block_q;
      for (int64_t g = 0; g < heads; ++g) {
        float* out = query_gradient(c, slice, b, n + g, r) +
                     place / kLanes * p_rows * kLanes + place % kLanes;
        for (int64_t p = 0; p < c.P; ++p) out[p * kLanes] = d_q[g * p_wide + p];
      }
    });
  for (int64_t s = slice0; s < slice1; ++s) {
    if (c.wanted & kWantKey)
      store_floats(c.ret(1), c.key_at(b, s, kh, c.P), c.P, d_key + (s - slice0) * p_wide);
    if (c.wanted & kWantValue)
      store_floats(c.ret(2), c.key_at(b, s, kh, c.D), c.D, d_value + (s - slice0) * d_wide);
  }
}

}  // namespace
}  // namespace ATTNLAB_ISA
}  // namespace attnlab

#endif  // ATTNLAB_LISTED_H_
