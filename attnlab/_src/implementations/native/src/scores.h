// Logits of a tile; gradients of additive and MLP scores.

#ifndef ATTNLAB_SCORES_H_
#define ATTNLAB_SCORES_H_

#include "problem.h"
#include "products.h"
#include "tiles.h"

namespace attnlab {
namespace ATTNLAB_ISA {
namespace {

// s = 1 / (1 + exp(-z)), and `missing` = 1 - s, computed without cancellation.
INLINE vf sigmoid(vf z, vf* missing) {
  vf e = exp2_(least(splat(126.0f), z * -kLog2e));
  vf s = 1.0f / (1.0f + e);
  *missing = e * s;
  return s;
}

// 2 sqrt(2 / pi) (z + 0.044715 z^3); gelu(z), by tanh, is z times the sigmoid of it.
INLINE vf gelu_inner(vf z) { return 1.5957691216057308f * z * (1.0f + 0.044715f * z * z); }

INLINE vf activate(int kind, vf z) {
  vf missing;
  switch (kind) {
    case kRelu:
      return greater((vf){}, z);
    case kTanh:
      return tanh_(z);
    case kSigmoid:
      return sigmoid(z, &missing);
    case kSilu:
      return z * sigmoid(z, &missing);
    default:
      return z * sigmoid(gelu_inner(z), &missing);
  }
}
// The derivative of `activate`.
INLINE vf slope(int kind, vf z) {
  vf missing, s;
  switch (kind) {
    case kRelu:
      return z > 0 ? splat(1.0f) : (vf){};
    case kTanh:
      s = tanh_(z);
      return 1.0f - s * s;
    case kSigmoid:
      s = sigmoid(z, &missing);
      return s * missing;
    case kSilu:
      s = sigmoid(z, &missing);
      return s + z * s * missing;
    default:
      s = sigmoid(gelu_inner(z), &missing);
      return s + z * s * missing * 1.5957691216057308f * (1.0f + 3 * 0.044715f * z * z);
  }
}

constexpr int kMaxLayers = 10;  // MOST_LAYERS in program.py

struct Layer {
  int64_t in, out, width, wide;  // width: up(out, kRows); wide: up(out, kWidth)
  float *weight, *bias;          // [in][width], [width]
  float *x, *z;                  // input [in][kLanes]; pre-activation [width][kLanes]
  float *dx, *dz, *dz_rows;      // gradients; dz_rows is dz transposed, [kLanes][wide]
};

// The parameters of one head's additive or MLP score, and scratch for one key.
struct Network {
  int64_t first, last;  // sizes of the first and the last hidden layer
  int num_layers;
  Layer layers[kMaxLayers];
  float* weight;  // [last]
  float* x;  // activations of the last hidden layer, [last][kLanes]
};

// Gradients of the parameters of one head.
struct NetworkGradients {
  float* weight;              // [last][kLanes]
  float* bias[kMaxLayers];    // [out][kLanes]
  float* layer[kMaxLayers];   // [up(in, kWideRows)][wide]
};

Network network_of(const Problem& c, Buffer<float>& room, int64_t b, int64_t n) {
  Network w;
  w.num_layers = (int)(c.num_params - 1) / 2;
  int64_t total = 0;
  w.first = c.P;
  int64_t size = w.first;
  for (int i = 0; i < w.num_layers; ++i) {
    Layer& y = w.layers[i];
    y.in = size;
    y.out = size = c.arg(c.first_param + 2 * i).dims[5];
    y.width = up(y.out, kRows), y.wide = up(y.out, kWidth);
    total += y.in * y.width + y.width +
             kLanes * (2 * up(y.in, kRows) + 2 * y.width + y.wide);
  }
  w.last = size;
  total += up(w.last, 16) + up(w.last, kRows) * kLanes;
  total += 16 * (8 * w.num_layers + 8);
  float* p = room.get(total);
  auto take = [&](int64_t count) {
    float* at = p;
    p += up(count, 16);
    return at;
  };
  for (int i = 0; i < w.num_layers; ++i) {
    Layer& y = w.layers[i];
    Operand weight(c.arg(c.first_param + 2 * i)), bias(c.arg(c.first_param + 2 * i + 1));
    y.weight = take(y.in * y.width), y.bias = take(y.width);
    y.x = take(up(y.in, kRows) * kLanes), y.dx = take(up(y.in, kRows) * kLanes);
    y.z = take(y.width * kLanes), y.dz = take(y.width * kLanes);
    y.dz_rows = take(kLanes * y.wide);
    memset(y.x, 0, up(y.in, kRows) * kLanes * 4);
    memset(y.dz_rows, 0, kLanes * y.wide * 4);
    for (int64_t r = 0; r < y.in; ++r) {
      load_floats(weight.array, weight.at(b, n) + r * y.out, y.out, y.weight + r * y.width);
      memset(y.weight + r * y.width + y.out, 0, (y.width - y.out) * 4);
    }
    load_floats(bias.array, bias.at(b, n), y.out, y.bias);
    memset(y.bias + y.out, 0, (y.width - y.out) * 4);
  }
  Operand weight(c.arg(c.first_param + c.num_params - 1));
  w.weight = take(w.last);
  load_floats(weight.array, weight.at(b, n), w.last, w.weight);
  w.x = take(up(w.last, kRows) * kLanes);
  return w;
}

// Additive logits of keys [first, end); if kKeep, also each tanh: kept[key][P][kLanes].
template <bool kKeep>
void additive_logits(const Network& w, const float* q, const float* rows, int64_t stride,
                     int64_t first, int64_t end, float* tile, float* kept) {
  for (int64_t k = first; k < end; ++k) {
    vf sums[2] = {};
    const float* key = rows + k * stride;
    for (int64_t p = 0; p < w.first; ++p)
      for (int j = 0; j < 2; ++j) {
        const int64_t at = p * kLanes + j * kWidth;
        vf t = tanh_(load<vf>(q + at) + key[p]);
        if (kKeep) store(kept + (k - first) * w.first * kLanes + at, t);
        sums[j] += w.weight[p] * t;
      }
    for (int j = 0; j < 2; ++j) store(tile + k * kLanes + j * kWidth, sums[j]);
  }
}

// Adds the gradients of queries [P][kLanes], keys [key][key_width] and the weight,
// given those of the logits, d_tile.
void additive_gradients(const Network& w, const float* kept, int64_t first, int64_t end,
                        const float* d_tile, float* d_q, float* d_keys, int64_t key_width,
                        NetworkGradients& d) {
  for (int64_t p = 0; p < w.first; ++p) {
    // Partial sums of a few keys: one sum over all keys would round noticeably more.
    vf d_query[2] = {}, d_weight[2] = {};
    for (int64_t k = first; k < end; ++k) {
      vf total = {};
      for (int j = 0; j < 2; ++j) {
        vf t = load<vf>(kept + ((k - first) * w.first + p) * kLanes + j * kWidth);
        vf d_logit = load<vf>(d_tile + k * kLanes + j * kWidth);
        vf part = d_logit - d_logit * t * t;
        d_weight[j] += d_logit * t;
        d_query[j] += part;
        total += part;
      }
      d_keys[k * key_width + p] += w.weight[p] * sum(total);
    }
    for (int j = 0; j < 2; ++j) {
      float* at = d_q + p * kLanes + j * kWidth;
      store(at, load<vf>(at) + w.weight[p] * d_query[j]);
      float* weight = d.weight + p * kLanes + j * kWidth;
      store(weight, load<vf>(weight) + d_weight[j]);
    }
  }
}

// Computes the activations of one key and its logits, as two vectors.
INLINE void network_forward(const Problem& c, const Network& w, const float* q,
                            const float* key, vf* logit) {
  const int kind = c.activation;
  float* x = w.num_layers ? w.layers[0].x : w.x;
  for (int64_t p = 0; p < 2 * w.first; ++p) {
    vf z = load<vf>(q + p * kWidth) + key[p / 2];
    store(x + p * kWidth, activate(kind, z));
  }
  for (int i = 0; i < w.num_layers; ++i) {
    const Layer& y = w.layers[i];
    for (int64_t o = 0; o < 2 * y.width; ++o)
      store(y.z + o * kWidth, splat(y.bias[o / 2]));
    outer<float, false>(y.z, y.x, y.weight, y.width, y.out, y.in, true);
    float* next = i + 1 < w.num_layers ? w.layers[i + 1].x : w.x;
    for (int64_t o = 0; o < 2 * y.out; ++o)
      store(next + o * kWidth, activate(kind, load<vf>(y.z + o * kWidth)));
  }
  logit[0] = logit[1] = (vf){};
  for (int64_t o = 0; o < w.last; ++o)
    for (int j = 0; j < 2; ++j)
      logit[j] += w.weight[o] * load<vf>(w.x + o * kLanes + j * kWidth);
}

void network_gradients(const Problem& c, const Network& w, const float* q,
                       const float* rows, int64_t stride, int64_t first, int64_t end,
                       const float* d_tile, float* d_q, float* d_keys, int64_t key_width,
                       NetworkGradients& d) {
  const int kind = c.activation;
  for (int64_t k = first; k < end; ++k) {
    const float* key = rows + k * stride;
    vf logit[2], d_logit[2];
    network_forward(c, w, q, key, logit);
    for (int j = 0; j < 2; ++j) d_logit[j] = load<vf>(d_tile + k * kLanes + j * kWidth);
    for (int64_t o = 0; o < w.last; ++o)
      for (int j = 0; j < 2; ++j) {
        const int64_t at = o * kLanes + j * kWidth;
        store(d.weight + at, load<vf>(d.weight + at) + d_logit[j] * load<vf>(w.x + at));
      }
    const float* d_above = nullptr;  // gradient of a layer's output; null for the last
    for (int i = w.num_layers - 1; i >= 0; --i) {
      const Layer& y = w.layers[i];
      for (int64_t o = 0; o < y.out; ++o)
        for (int j = 0; j < 2; ++j) {
          const int64_t at = o * kLanes + j * kWidth;
          vf above = d_above ? load<vf>(d_above + at) : w.weight[o] * d_logit[j];
          vf dz = above * slope(kind, load<vf>(y.z + at));
          store(y.dz + at, dz);
          store(d.bias[i] + at, load<vf>(d.bias[i] + at) + dz);
        }
      from_lanes(y.dz, y.out, y.wide, y.dz_rows);
      outer_wide<float, true>(d.layer[i], y.dz_rows, y.x, kLanes, up(y.in, kWideRows),
                              kLanes, y.wide);
      // `outer` rounds rows up, and would read beyond the weights.
      int64_t whole = y.in / kRows * kRows;
      outer<float, true>(y.dx, y.dz, y.weight, y.width, whole, y.out, false);
      for (int64_t r = whole; r < y.in; ++r)
        outer_block<float, 1, 2, true>(y.dx + r * kLanes, kLanes, y.dz, kLanes,
                                       y.weight + r * y.width, y.width, y.out, false);
      d_above = y.dx;
    }
    for (int64_t p = 0; p < w.first; ++p) {
      vf total = {};
      for (int j = 0; j < 2; ++j) {
        const int64_t at = p * kLanes + j * kWidth;
        vf z = load<vf>(q + at) + key[p];
        vf above = d_above ? load<vf>(d_above + at) : w.weight[p] * d_logit[j];
        vf dz = above * slope(kind, z);
        store(d_q + at, load<vf>(d_q + at) + dz);
        total += dz;
      }
      d_keys[k * key_width + p] += sum(total);
    }
  }
}

// The scale of a head's inner products, as two factors: of queries when they are
// loaded, and of logits. Queries in bfloat16 are scaled by powers of two only, which is
// exact; any other scale is applied to the logits.
struct Scale {
  float queries, logits;
};
INLINE Scale scale_of(const Problem& c, int64_t b, int64_t n, float*) {
  return {c.scale(b, n), 1.0f};
}
INLINE Scale scale_of(const Problem& c, int64_t b, int64_t n, Pair*) {
  const float scale = c.scale(b, n);
  int exponent;
  if (frexpf(scale, &exponent) == 0.5f) return {scale, 1.0f};
  return {1.0f, scale};
}

INLINE void multiply(float* tile, int64_t first, int64_t end, float by) {
  if (by == 1.0f) return;
  for (int64_t i = first * kLanes; i < end * kLanes; i += kWidth)
    store(tile + i, load<vf>(tile + i) * by);
}

template <class E>
INLINE void logits(const Problem& c, const Network&, const E* q, const Keys<E>& keys,
                   Scale scale, int64_t first, int64_t end, float* tile) {
  outer<E, true>(tile + first * kLanes, q, keys.rows + first * keys.stride, keys.stride,
                 end - first, steps(c.P, (E*)0), false);
  multiply(tile, first, end, scale.logits);
}
template <>
INLINE void logits<float>(const Problem& c, const Network& w, const float* q,
                          const Keys<float>& keys, Scale, int64_t first, int64_t end,
                          float* tile) {
  if (c.score == kInner) {
    outer<float, true>(tile + first * kLanes, q, keys.rows + first * keys.stride,
                       keys.stride, end - first, c.P, false);
  } else if (c.score == kAdditive) {
    additive_logits<false>(w, q, keys.rows, keys.stride, first, end, tile, nullptr);
  } else {
    for (int64_t k = first; k < end; ++k) {
      vf logit[2];
      network_forward(c, w, q, keys.rows + k * keys.stride, logit);
      for (int j = 0; j < 2; ++j) store(tile + k * kLanes + j * kWidth, logit[j]);
    }
  }
}

}  // namespace
}  // namespace ATTNLAB_ISA
}  // namespace attnlab

#endif  // ATTNLAB_SCORES_H_
