// Backward pass
//
// A unit of work is a slice of the keys of one key head of one example. It takes its
// keys in chunks that fit in the cache and, for each chunk, visits all panels of
// queries that see some of it. So each gradient of a key or value is written by one
// unit only. Query gradients are stored per slice; `finish_queries` then adds them in
// the order of the slices.

#ifndef ATTNLAB_BACKWARD_H_
#define ATTNLAB_BACKWARD_H_

#include "forward.h"

namespace attnlab {
namespace ATTNLAB_ISA {
namespace {

constexpr int64_t kMaxTiles = 128;  // in a chunk of keys

// delta = d_output . output - d_lse, for each query of a block.
void row_products(const Problem& c, int64_t b, int64_t r) {
  static thread_local Buffer<float> room;
  float* above = room.get(c.D);
  const float* output = (const float*)c.arg(9).data;
  float* delta = (float*)c.ret(4).data;
  const int64_t t1 = least((r + 1) * c.block_q, c.T);
  for (int64_t t = r * c.block_q; t < t1; ++t)
    for (int64_t n = 0; n < c.N; ++n) {
      const int64_t row = (b * c.T + t) * c.N + n;
      load_floats(c.arg(11), row * c.D, c.D, above);
      const float* o = output + row * c.D;
      vf sums = {};
      int64_t d = 0;
      for (; d + kWidth <= c.D; d += kWidth) sums += load<vf>(o + d) * load<vf>(above + d);
      float total = sum(sums);
      for (; d < c.D; ++d) total += o[d] * above[d];
      if (c.d_lse >= 0) {
        float more;
        load_floats(c.arg(c.d_lse), row, 1, &more);
        total -= more;
      }
      delta[row] = total;
    }
}

// The query gradients of one block in one slice, [panel][up(P, 8)][kLanes]. The number
// of queries is rounded up to a multiple of 32, and so of kLanes.
INLINE float* query_gradient(const Problem& c, int64_t slice, int64_t b, int64_t n,
                             int64_t r) {
  const int64_t block = up(c.block_q, 32) * up(c.P, 8);
  return (float*)c.ret(3).data + (((slice * c.B + b) * c.N + n) * c.rows + r) * block;
}

template <class E>
struct BackPanel {
  Panel panel;
  Scale scale;
  E *q, *d_o;               // [P][kLanes], [D][kLanes], or pairs of elements
  E *q_across, *d_o_across;  // [kLanes][stride], or pairs of lanes
  float shift[kLanes], delta[kLanes];
  uint32_t lost;  // bits of lanes whose query or d_output is not finite; both are zero
};

template <class E>
void load_panel(const Problem& c, Work<E>& w, int64_t b, int64_t n, int64_t t0, int64_t t1,
                BackPanel<E>& s) {
  const int64_t p_stride = up(c.P, kWidth), d_stride = up(c.D, kWidth);
  s.panel = Panel(c, b, n, t0, t1);
  s.scale = scale_of(c, b, n, (E*)0);
  float* rows = w.rows.get(kLanes * (p_stride + d_stride));
  float* d_rows = rows + kLanes * p_stride;
  load_rows(c, c.arg(0), s.panel, c.P, p_stride, s.scale.queries, rows);
  load_rows(c, c.arg(11), s.panel, c.D, d_stride, (float)c.call.keep_scale, d_rows);
  s.lost = 0;
  for (int i = 0; i < s.panel.lanes; ++i) {
    float *row = rows + i * p_stride, *d_row = d_rows + i * d_stride;
    if (are_finite(row, c.P) && are_finite(d_row, c.D)) continue;
    s.lost |= 1u << i;
    memset(row, 0, c.P * 4);
    memset(d_row, 0, c.D * 4);
  }
  s.q = w.q.get(up(c.P, 2) * kLanes), s.d_o = w.d_o.get(up(c.D, 2) * kLanes);
  to_lanes(rows, p_stride, c.P, s.q);
  to_lanes(d_rows, d_stride, c.D, s.d_o);
  s.q_across = w.q_across.get(kLanes * p_stride);
  s.d_o_across = w.d_o_across.get(kLanes * d_stride);
  across_lanes(rows, p_stride, s.q_across);
  across_lanes(d_rows, d_stride, s.d_o_across);
  const float* lse = (const float*)c.arg(10).data;
  const float* delta = (const float*)c.ret(4).data;
  for (int i = 0; i < kLanes; ++i) {
    const int64_t row = (b * c.T + s.panel.t0 + i) * c.N + n;
    const bool there = i < s.panel.lanes && lse[row] != -INFINITY;
    s.shift[i] = there ? lse[row] : INFINITY;
    s.delta[i] = there ? delta[row] : 0.0f;
    if (!there) s.lost &= ~(1u << i);
  }
}

template <class E>
struct BackTile {
  const Problem& c;
  Work<E>& w;
  const Network& network;
  NetworkGradients& d_network;
  const BackPanel<E>& s;
  Keys<E> keys;
  int64_t s0, slice;
  float *d_q, *d_key, *d_value;

  // Keys [from, to) of the tile.
  void run(int64_t from, int64_t to, bool full) {
    uint32_t words[kKeys];
    int64_t first, end;
    const bool masked = see(c, s.panel, s0, from, to, full, words, &first, &end);
    if (first == end) return;
    // Additive scores take few keys at a time: each tanh is kept for the gradient.
    const int64_t step = c.score == kAdditive ? kRows : kKeys;
    for (int64_t k = first; k < end; k += step)
      part(k, least(k + step, end), masked ? words : nullptr);
  }

  void part(int64_t first, int64_t end, const uint32_t* words) {
    const int64_t p_wide = up(c.P, kWidth), d_wide = up(c.D, kWidth);
    float* p = w.tile.get(kTile);
    float* d = w.tile2.get(kTile);
    float* kept = nullptr;
    if (c.score == kAdditive) {
      kept = w.kept.get(kRows * c.P * kLanes);
      additive_logits<true>(network, (const float*)s.q, (const float*)keys.rows, keys.stride,
                            first, end, p, kept);
    } else {
      logits(c, network, s.q, keys, s.scale, first, end, p);
    }
    Modifying modifying{c, s.panel, c.key_positions.as<int32_t>(s.panel.b, 0, 0, s0), s0,
                        w.values, w.before};
    if (c.num_modifiers) modifying.apply(first, end, p, true);
    outer<E, true>(d + first * kLanes, s.d_o, keys.value_rows + first * keys.value_stride,
                   keys.value_stride, end - first, steps(c.D, (E*)0), false);
    vf shift[2], delta[2];
    for (int j = 0; j < 2; ++j) {
      shift[j] = load<vf>(s.shift + j * kWidth);
      delta[j] = load<vf>(s.delta + j * kWidth);
    }
    for (int64_t k = first; k < end; ++k)
      for (int j = 0; j < 2; ++j) {
        const int64_t at = k * kLanes + j * kWidth;
        vf x = exp2_((load<vf>(p + at) - shift[j]) * kLog2e);
        if (s.lost) x = where_shown(s.lost, j, splat(NAN), x);
        vf y = x * (load<vf>(d + at) - delta[j]);
        if (words) {
          x = where_shown(words[k], j, x, (vf){});
          y = where_shown(words[k], j, y, (vf){});
        }
        store(p + at, x);
        if (c.drop_below < 0) store(d + at, y);
      }
    if (c.drop_below >= 0) {
      Dropout drop(c, s.panel, s0);
      for (int64_t k = first; k < end; ++k)
        for (int j = 0; j < 2; ++j) {
          const int64_t at = k * kLanes + j * kWidth;
          vi kept = drop.kept(k, j);
          vf x = load<vf>(p + at);
          vf above = kept ? load<vf>(d + at) : (vf){};
          vf y = x * (above - delta[j]);
          if (words) y = where_shown(words[k], j, y, (vf){});
          store(d + at, y);
          store(p + at, kept ? x : (vf){});
        }
    }
    // Zeros for the products, which round the number of keys up.
    const int64_t whole = up(end, kRows) * kLanes;
    memset(p + end * kLanes, 0, (whole - end * kLanes) * 4);
    memset(d + end * kLanes, 0, (whole - end * kLanes) * 4);
    const int64_t key_rows = up(end, kWideRows) - first;
    const int64_t along = steps(kLanes, (E*)0);
    E* x = w.probs.get(kTile);
    if (c.wanted & kWantValue) {
      over_lanes(p, first, first + key_rows, x);
      outer_wide<E>(d_value + first * d_wide, s.d_o_across, x + first * along, along, key_rows,
                    along, d_wide);
    }
    if (!(c.wanted & ~kWantValue)) return;
    modifying.gradients(first, end, d, slice);
    if (c.score == kInner) {
      if (c.wanted & kWantQuery) {
        x = w.probs.get(kTile);
        over_keys(d, first, end, x);
        const int64_t at = steps(first, (E*)0);
        outer<E, false>(d_q, x + at * kLanes, keys.across + at * keys.width, keys.width, c.P,
                        steps(end - first, (E*)0), true);
      }
      if (c.wanted & kWantKey) {
        multiply(d, first, end, s.scale.logits);
        x = w.probs.get(kTile);
        over_lanes(d, first, first + key_rows, x);
        outer_wide<E>(d_key + first * p_wide, s.q_across, x + first * along, along, key_rows,
                      along, p_wide);
      }
      return;
    }
    // Additive and MLP scores are computed in float32 only: E is float.
    if (c.score == kAdditive)
      additive_gradients(network, kept, first, end, d, d_q, d_key, p_wide, d_network);
    else
      network_gradients(c, network, (const float*)s.q, (const float*)keys.rows, keys.stride,
                        first, end, d, d_q, d_key, p_wide, d_network);
  }
};

NetworkGradients gradients_of(const Network& w, float* p) {
  NetworkGradients d;
  d.weight = p;
  p += up(w.last, 16) * kLanes;
  for (int i = 0; i < w.num_layers; ++i) {
    const Layer& y = w.layers[i];
    d.bias[i] = p;
    p += up(y.out, 16) * kLanes;
    d.layer[i] = p;
    p += up(y.in, kWideRows) * y.wide;
  }
  return d;
}
int64_t gradients_size(const Network& w) {
  int64_t total = up(w.last, 16) * kLanes;
  for (int i = 0; i < w.num_layers; ++i)
    total += up(w.layers[i].out, 16) * kLanes +
             up(w.layers[i].in, kWideRows) * w.layers[i].wide;
  return total;
}

// Stores the gradients of one head's parameters, summed over lanes, in the results
// [slices, B, N, *payload].
void store_gradients(const Problem& c, const Network& w, const NetworkGradients& d,
                     int64_t slice, int64_t b, int64_t n) {
  const int64_t row = (slice * c.B + b) * c.N + n;
  auto lanes = [](const float* p) {
    return sum(load<vf>(p) + load<vf>(p + kWidth));
  };
  for (int i = 0; i < w.num_layers; ++i) {
    const Layer& y = w.layers[i];
    float* weight = (float*)c.ret(c.first_param_gradient + 2 * i).data + row * y.in * y.out;
    for (int64_t r = 0; r < y.in; ++r)
      memcpy(weight + r * y.out, d.layer[i] + r * y.wide, y.out * 4);
    float* bias = (float*)c.ret(c.first_param_gradient + 2 * i + 1).data + row * y.out;
    for (int64_t o = 0; o < y.out; ++o) bias[o] = lanes(d.bias[i] + o * kLanes);
  }
  float* weight =
      (float*)c.ret(c.first_param_gradient + c.num_params - 1).data + row * w.last;
  for (int64_t o = 0; o < w.last; ++o) weight[o] = lanes(d.weight + o * kLanes);
}

template <class E>
void backward_keys(const Problem& c, int64_t b, int64_t kh, int64_t slice) {
  Work<E>& w = work<E>();
  const int64_t p_wide = up(c.P, kWidth), d_wide = up(c.D, kWidth);
  const int64_t each = up((c.S + c.slices - 1) / c.slices, kKeys);
  const int64_t slice0 = least(slice * each, c.S), slice1 = least(slice0 + each, c.S);
  const int64_t whole = up(c.block_q, 32) * up(c.P, 8);
  if (c.wanted & kWantQuery)
    for (int64_t g = 0; g < c.group; ++g)
      memset(query_gradient(c, slice, b, kh * c.group + g, 0), 0, c.rows * whole * 4);

  static thread_local Buffer<NetworkGradients> heads;
  static thread_local Buffer<float> unused;
  Network network{};
  NetworkGradients* d_network = heads.get(c.group);
  if (c.score != kInner) {
    network = network_of(c, w.network, b, kh * c.group);
    const int64_t size = gradients_size(network);
    float* sums = w.gradients.get(size * c.group);
    memset(sums, 0, size * c.group * 4);
    for (int64_t g = 0; g < c.group; ++g)
      d_network[g] = gradients_of(network, sums + g * size);
  }

  // A chunk's keys, values and their gradients fill about half of an L2 cache.
  int64_t chunk = (512 << 10) / most(8 * (p_wide + d_wide), 1) / kKeys * kKeys;
  chunk = most(least(least(chunk, kMaxTiles * kKeys), up(slice1 - slice0, kKeys)), kKeys);
  Keys<E> keys;
  sizes_of(keys, c.P, c.D);
  reserve(keys, w.keys, chunk / kKeys * kTileRows);
  float* d_key = w.d_key.get((chunk + kRows) * p_wide);
  float* d_value = w.d_value.get((chunk + kRows) * d_wide);
  float* d_unused = unused.get(up(c.P, 8) * kLanes);

  for (int64_t c0 = slice0; c0 < slice1; c0 += chunk) {
    const int64_t c1 = least(c0 + chunk, slice1);
    memset(d_key, 0, (chunk + kRows) * p_wide * 4);
    memset(d_value, 0, (chunk + kRows) * d_wide * 4);
    bool packed[kMaxTiles] = {};
    for (int64_t g = 0; g < c.group; ++g) {
      const int64_t n = kh * c.group + g;
      if (c.score != kInner) network = network_of(c, w.network, b, n);
      for (int64_t r = 0; r < c.rows; ++r) {
        bool any = false;
        each_interval(c, b, n, r, [&](int64_t from, int64_t to, bool) {
          any |= from < c1 && to > c0;
        });
        if (!any) continue;
        const int64_t t0 = r * c.block_q, t1 = least(t0 + c.block_q, c.T);
        float* d_q = c.wanted & kWantQuery ? query_gradient(c, slice, b, n, r) : nullptr;
        for (int64_t t = t0; t < t1; t += kLanes) {
          BackPanel<E> s;
          load_panel(c, w, b, n, t, t1, s);
          each_interval(c, b, n, r, [&](int64_t from, int64_t to, bool full) {
            from = most(from, c0), to = least(to, c1);
            while (from < to) {
              const int64_t index = (from - c0) / kKeys, tile0 = c0 + index * kKeys;
              const int64_t tile1 = least(tile0 + kKeys, c1), stop = least(to, tile1);
              Keys<E> k = keys;
              k.rows += index * kTileRows * k.stride;
              k.value_rows += index * kTileRows * k.value_stride;
              k.across += steps(index * kTileRows, (E*)0) * k.width;
              k.values += steps(index * kTileRows, (E*)0) * k.value_width;
              k.lost += index * kTileRows;
              if (!packed[index]) pack_keys(c, b, kh, tile0, tile1 - tile0, true, k);
              packed[index] = true;
              BackTile<E>{c, w, network, d_network[g], s, k, tile0, slice,
                          d_q ? d_q : d_unused, d_key + (tile0 - c0) * p_wide,
                          d_value + (tile0 - c0) * d_wide}
                  .run(from - tile0, stop - tile0, full);
              from = stop;
            }
          });
          if (d_q) d_q += up(c.P, 8) * kLanes;
        }
      }
    }
    for (int64_t s = c0; s < c1; ++s) {
      if (c.wanted & kWantKey)
        store_floats(c.ret(1), c.key_at(b, s, kh, c.P), c.P, d_key + (s - c0) * p_wide);
      if (c.wanted & kWantValue)
        store_floats(c.ret(2), c.key_at(b, s, kh, c.D), c.D, d_value + (s - c0) * d_wide);
    }
  }
  if (c.wanted & kWantParams)
    for (int64_t g = 0; g < c.group; ++g) {
      network = network_of(c, w.network, b, kh * c.group + g);
      store_gradients(c, network, d_network[g], slice, b, kh * c.group + g);
    }
}

// Sums the query gradients of a block over slices, always in order. The result is the
// gradient of `head_scale * query`.
template <class E>
void finish_queries(const Problem& c, int64_t b, int64_t n, int64_t r) {
  Work<E>& w = work<E>();
  const int64_t t0 = r * c.block_q, t1 = least(t0 + c.block_q, c.T);
  const int64_t size = up(c.P, 8) * kLanes;
  float* total = w.tile.get(size);
  const int64_t stride = up(c.P, kWidth);
  float* rows = w.rows.get(kLanes * stride);
  for (int64_t t = t0, i = 0; t < t1; t += kLanes, ++i) {
    for (int64_t slice = 0; slice < c.slices; ++slice) {
      const float* part = query_gradient(c, slice, b, n, r) + i * size;
      for (int64_t x = 0; x < size; ++x) total[x] = slice ? total[x] + part[x] : part[x];
    }
    for (int64_t x = 0; x < size; ++x) total[x] *= (float)c.call.logit_scale;
    from_lanes(total, c.P, stride, rows);
    for (int l = 0; l < least(kLanes, t1 - t); ++l)
      store_floats(c.ret(0), c.query_at(b, t + l, n, c.P), c.P, rows + l * stride);
  }
}

}  // namespace
}  // namespace ATTNLAB_ISA
}  // namespace attnlab

#endif  // ATTNLAB_BACKWARD_H_
