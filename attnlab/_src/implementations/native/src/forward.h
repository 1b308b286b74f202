// Forward pass: online softmax over the tiles of keys that a block of queries sees.

#ifndef ATTNLAB_FORWARD_H_
#define ATTNLAB_FORWARD_H_

#include "mask.h"
#include "modifiers.h"
#include "scores.h"

namespace attnlab {
namespace ATTNLAB_ISA {
namespace {

constexpr int kTile = (kKeys + kRows) * kLanes;

// The running maximum and sum of the online softmax, for each lane of a panel.
struct Running {
  float top[kLanes], total[kLanes];
  void reset() {
    for (int l = 0; l < kLanes; ++l) top[l] = kLowest, total[l] = 0;
  }
};

template <class E>
struct State {
  Panel panel;
  E* q;      // [P, or pairs of elements][kLanes]
  float* o;  // [up(D, kRows)][kLanes]
  Running sums;
};

template <class E>
struct Work {
  KeyBuffers<E> keys;
  Buffer<float> rows, tile, tile2, out, values, before, network, gradients, d_key, d_value,
      kept;
  Buffer<E> q, probs, probs2, d_o, q_across, d_o_across;
  Buffer<State<E>> states;
  TileCache<E> cache;
};

template <class E>
Work<E>& work() {
  static thread_local Work<E> w;
  return w;
}

// Loads a panel's rows of x, times `scale`, as [kLanes][stride]. Lanes that are not in
// use become zeros.
void load_rows(const Problem& c, const Array& x, const Panel& p, int64_t size,
               int64_t stride, float scale, float* rows) {
  for (int i = 0; i < kLanes; ++i) {
    float* row = rows + i * stride;
    const int64_t read = i < p.lanes ? size : 0;
    if (read) load_floats(x, c.query_at(p.b, p.t0 + i, p.n, size), size, row);
    memset(row + read, 0, (stride - read) * 4);
  }
  if (scale != 1.0f)
    for (int64_t i = 0; i < kLanes * stride; ++i) rows[i] *= scale;
}

// One step of the online softmax: turns logits into exp(logit - running maximum),
// hidden ones into 0, and updates maximum and sum. When a maximum has grown, calls
// `shrink(factors)` to rescale the output. Uses only the first kVectors vectors of lanes.
template <int kVectors, class Shrink>
INLINE void softmax(const Problem& c, const Panel& panel, Running& s, int64_t s0,
                    int64_t first, int64_t end, const uint32_t* words, float* tile,
                    Shrink shrink) {
  vf old[kVectors], top[kVectors], total[kVectors];
  for (int j = 0; j < kVectors; ++j) {
    old[j] = top[j] = load<vf>(s.top + j * kWidth);
    total[j] = load<vf>(s.total + j * kWidth);
  }
  const vf hidden = splat(-INFINITY);
  for (int64_t k = first; k < end; ++k)
    for (int j = 0; j < kVectors; ++j) {
      float* at = tile + k * kLanes + j * kWidth;
      vf z = load<vf>(at);
      if (words) {
        z = where_shown(words[k], j, z, hidden);
        store(at, z);
      }
      top[j] = greater(z, top[j]);
    }
  uint32_t grown = 0;
  for (int j = 0; j < kVectors; ++j) grown |= to_bits(top[j] > old[j]);
  if (grown) {
    vf factors[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      factors[j] = exp2_((old[j] - top[j]) * kLog2e);
      total[j] *= factors[j];
      store(s.top + j * kWidth, top[j]);
    }
    shrink(factors);
  }
  for (int64_t k = first; k < end; ++k)
    for (int j = 0; j < kVectors; ++j) {
      float* at = tile + k * kLanes + j * kWidth;
      vf p = exp2_((load<vf>(at) - top[j]) * kLog2e);
      total[j] += p;
      store(at, p);
    }
  for (int j = 0; j < kVectors; ++j) store(s.total + j * kWidth, total[j]);
  if (c.drop_below >= 0) {
    Dropout drop(c, panel, s0);
    for (int64_t k = first; k < end; ++k)
      for (int j = 0; j < kVectors; ++j) {
        float* at = tile + k * kLanes + j * kWidth;
        store(at, drop.kept(k, j) ? load<vf>(at) : (vf){});
      }
  }
}

// Sets entries of a tile to NaN: for each key that has `mark`, those of the lanes that
// see it according to `words` (null: all lanes).
void lose(const uint8_t* marks, uint8_t mark, const uint32_t* words, int64_t first,
          int64_t end, float* tile) {
  for (int64_t k = first; k < end; ++k)
    for (int j = 0; j < 2; ++j) {
      float* at = tile + k * kLanes + j * kWidth;
      if (marks[k] & mark)
        store(at, where_shown(words ? words[k] : ~0u, j, splat(NAN), load<vf>(at)));
    }
}

template <class E>
void finish(const Problem& c, Work<E>& w, const State<E>& s) {
  const Panel& p = s.panel;
  float* output = (float*)c.ret(0).data;
  float* lse = (float*)c.ret(1).data;
  const int64_t stride = up(c.D, kWidth);
  float* rows = w.rows.get(kLanes * stride);
  from_lanes(s.o, c.D, stride, rows);
  const bool streams = c.B * c.T * c.N * c.D * 4 > kCached && c.D % kWidth == 0 &&
                       (uintptr_t)output % sizeof(vf) == 0;
  for (int i = 0; i < p.lanes; ++i) {
    const bool alive = s.sums.total[i] != 0;  // true for NaN, which must propagate
    const float scale = alive ? (float)c.call.keep_scale / s.sums.total[i] : 0.0f;
    float* o = output + c.query_at(p.b, p.t0 + i, p.n, c.D);
    const float* row = rows + i * stride;
    if (streams)
      for (int64_t d = 0; d < c.D; d += kWidth)
        stream(o + d, alive ? load<vf>(row + d) * scale : (vf){});
    else
      for (int64_t d = 0; d < c.D; ++d) o[d] = alive ? row[d] * scale : 0.0f;
    lse[(p.b * c.T + p.t0 + i) * c.N + p.n] =
        alive ? s.sums.top[i] + logf(s.sums.total[i]) : -INFINITY;
  }
  if (streams) streamed();
}

template <class E>
void forward_rows(const Problem& c, int64_t b, int64_t n, int64_t r) {
  Work<E>& w = work<E>();
  const int64_t t0 = r * c.block_q, t1 = least(t0 + c.block_q, c.T);
  const int64_t panels = (t1 - t0 + kLanes - 1) / kLanes;
  const int64_t q_size = steps(c.P, (E*)0) * kLanes, o_size = up(c.D, kRows) * kLanes;
  const int64_t stride = up(c.P, kWidth);
  State<E>* states = w.states.get(panels);
  E* q = w.q.get(panels * q_size);
  float* o = w.out.get(panels * o_size);
  float* rows = w.rows.get(kLanes * stride);
  const Scale scale = scale_of(c, b, n, (E*)0);
  memset(o, 0, panels * o_size * 4);
  for (int64_t i = 0; i < panels; ++i) {
    State<E>& s = states[i];
    s.panel = Panel(c, b, n, t0 + i * kLanes, t1);
    s.q = q + i * q_size, s.o = o + i * o_size;
    load_rows(c, c.arg(0), s.panel, c.P, stride, scale.queries, rows);
    to_lanes(rows, stride, c.P, s.q);
    s.sums.reset();
  }
  Network network{};
  if (c.score != kInner) network = network_of(c, w.network, b, n);
  float* tile = w.tile.get(kTile);
  E* probs = w.probs.get(kTile);
  each_interval(c, b, n, r, [&](int64_t from, int64_t to, bool full) {
    // Tiles begin at multiples of kKeys, whatever the plan's block size is.
    for (int64_t index = from / kKeys; index * kKeys < to; ++index) {
      const int64_t s0 = index * kKeys;
      const int64_t begin = most(from - s0, 0), stop = least(to - s0, kKeys);
      const Keys<E> keys = w.cache.get(c, b, n / c.group, index);
      const int32_t* positions = c.key_positions.as<int32_t>(b, 0, 0, s0);
      for (int64_t i = 0; i < panels; ++i) {
        State<E>& s = states[i];
        uint32_t words[kKeys];
        int64_t first, end;
        const bool masked =
            see(c, s.panel, s0, begin, stop, full, words, &first, &end);
        if (first == end) continue;
        logits(c, network, s.q, keys, scale, first, end, tile);
        if (c.num_modifiers)
          Modifying{c, s.panel, positions, s0, w.values, w.before}.apply(first, end, tile,
                                                                         false);
        const uint32_t* shown = masked ? words : nullptr;
        const uint8_t lost = keys.lost[kKeys];
        if (lost & kLostKey) lose(keys.lost, kLostKey, nullptr, first, end, tile);
        softmax<2>(c, s.panel, s.sums, s0, first, end, shown, tile,
                   [&](const vf* factors) {
                     for (int64_t d = 0; d < 2 * c.D; ++d)
                       store(s.o + d * kWidth, load<vf>(s.o + d * kWidth) * factors[d & 1]);
                   });
        if (lost & kLostValue) lose(keys.lost, kLostValue, shown, first, end, tile);
        E* p = probs;
        over_keys(tile, first, end, p);
        const int64_t at = steps(first, (E*)0);
        outer<E, false>(s.o, p + at * kLanes, keys.values + at * keys.value_width,
                        keys.value_width, c.D, steps(end - first, (E*)0), true);
      }
    }
  });
  for (int64_t i = 0; i < panels; ++i) finish(c, w, states[i]);
}

}  // namespace
}  // namespace ATTNLAB_ISA
}  // namespace attnlab

#endif  // ATTNLAB_FORWARD_H_
