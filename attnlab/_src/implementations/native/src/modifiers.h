// Modifiers of the logits of a tile, their gradients, and dropout.

#ifndef ATTNLAB_MODIFIERS_H_
#define ATTNLAB_MODIFIERS_H_

#include "problem.h"

namespace attnlab {
namespace ATTNLAB_ISA {
namespace {

// Broadcasts the operand's values for a tile to [key][kLanes].
void operand_tile(const Operand& x, const Panel& panel, int64_t s0, int64_t first,
                  int64_t end, float* out) {
  float row[kKeys];
  if (x.stride[2] == 0) {
    for (int64_t k = first; k < end; ++k) {
      vf v = splat(x.number(x.at(panel.b, panel.n, 0, s0 + k)));
      store(out + k * kLanes, v), store(out + k * kLanes + kWidth, v);
    }
    return;
  }
  for (int i = 0; i < kLanes; ++i) {
    const int64_t at = x.at(panel.b, panel.n, panel.lane(i), s0 + first);
    if (x.stride[3] == 0) {
      float v = x.number(at);
      for (int64_t k = first; k < end; ++k) out[k * kLanes + i] = v;
    } else {
      load_floats(x.array, at, end - first, row);
      for (int64_t k = first; k < end; ++k) out[k * kLanes + i] = row[k - first];
    }
  }
}

// Where the gradient of a modifier's operand is accumulated: floats [slices or 1, B, N,
// T or 1, S or 1, *payload]. No two units of work write to the same element.
struct GradientPlace {
  float* data;
  int64_t along_t, along_s;

  GradientPlace(const Problem& c, const Modifier& m, int64_t slice, const Panel& p) {
    const Array& a = c.ret(m.gradient);
    const int64_t t = a.dims[3], s = a.dims[4];
    int64_t size = m.operand.payload;
    along_s = s == 1 ? 0 : size;
    along_t = t == 1 ? 0 : s * size;
    if (a.dims[0] == 1) slice = 0;
    data = (float*)a.data + ((slice * c.B + p.b) * c.N + p.n) * t * s * size;
  }
};

// Adds a tile [key][kLanes] of gradients to the gradient of the operand.
void add_tile(const GradientPlace& g, const Panel& panel, int64_t s0, int64_t first,
              int64_t end, const float* tile) {
  if (g.along_t == 0) {
    for (int64_t k = first; k < end; ++k) {
      vf low = load<vf>(tile + k * kLanes), high = load<vf>(tile + k * kLanes + kWidth);
      g.data[(s0 + k) * g.along_s] += sum(low + high);
    }
    return;
  }
  for (int i = 0; i < panel.lanes; ++i) {
    float* at = g.data + (panel.t0 + i) * g.along_t;
    for (int64_t k = first; k < end; ++k) at[(s0 + k) * g.along_s] += tile[k * kLanes + i];
  }
}

struct Modifying {
  const Problem& c;
  const Panel& panel;
  const int32_t* keys;  // positions of keys from s0 on
  int64_t s0;
  Buffer<float>& values;  // kKeys * kLanes, values of an operand
  Buffer<float>& before;  // kKeys * kLanes per modifier, the logits before it

  // The indices of key k in a table of relative offsets, [kLanes].
  void offsets(const Modifier& m, int64_t k, int32_t* out) const {
    for (int i = 0; i < kLanes; ++i) {
      int64_t offset = (int64_t)keys[k] - panel.positions[i];
      offset = most(least(offset, m.right), -m.left);
      out[i] = (int32_t)(offset + m.left);
    }
  }
  INLINE vf distance(int64_t k, int j) const {
    vi d = load<vi>(panel.positions + j * kWidth) - keys[k];
    return __builtin_convertvector(d < 0 ? -d : d, vf);
  }
  float* kept(int i) const {
    return before.get((int64_t)c.num_modifiers * kKeys * kLanes) + i * kKeys * kLanes;
  }

  void apply(int64_t first, int64_t end, float* tile, bool keep) const {
    for (int i = 0; i < c.num_modifiers; ++i) {
      const Modifier& m = c.modifiers[i];
      const Operand& x = m.operand;
      float* v = values.get(kKeys * kLanes);
      if (keep && m.kind == kSoftCap)
        memcpy(kept(i) + first * kLanes, tile + first * kLanes,
               (end - first) * kLanes * 4);
      if (m.kind == kSoftCap || m.kind == kBias)
        operand_tile(x, panel, s0, first, end, v);
      const float* table = nullptr;
      float slope = 0;
      if (m.kind == kRelative) table = x.as<float>(panel.b, panel.n);
      if (m.kind == kAlibi) slope = x.number(x.at(panel.b, panel.n));
      for (int64_t k = first; k < end; ++k) {
        int32_t place[kLanes];
        float found[kLanes];
        if (m.kind == kRelative) {
          offsets(m, k, place);
          for (int l = 0; l < kLanes; ++l) found[l] = table[place[l]];
        }
        for (int j = 0; j < 2; ++j) {
          float* at = tile + k * kLanes + j * kWidth;
          vf z = load<vf>(at);
          if (m.kind == kSoftCap) {
            vf cap = load<vf>(v + k * kLanes + j * kWidth);
            z = cap * tanh_(z / cap);
          } else if (m.kind == kBias) {
            z += load<vf>(v + k * kLanes + j * kWidth);
          } else if (m.kind == kRelative) {
            z += load<vf>(found + j * kWidth);
          } else {
            z -= slope * distance(k, j);
          }
          store(at, z);
        }
      }
    }
  }

  // Turns gradients of the logits after the modifiers into those before them, in place,
  // and accumulates the gradients of the operands.
  void gradients(int64_t first, int64_t end, float* d_tile, int64_t slice) const {
    for (int i = c.num_modifiers - 1; i >= 0; --i) {
      const Modifier& m = c.modifiers[i];
      float* v = values.get(kKeys * kLanes);
      if (m.kind == kSoftCap) {
        operand_tile(m.operand, panel, s0, first, end, v);
        const float* z = kept(i);
        for (int64_t k = first; k < end; ++k)
          for (int j = 0; j < 2; ++j) {
            const int64_t at = k * kLanes + j * kWidth;
            vf d = load<vf>(d_tile + at), cap = load<vf>(v + at);
            vf x = load<vf>(z + at) / cap;
            vf t = tanh_(x), down = 1.0f - t * t;
            // Where a pair is hidden, d is 0, but x and t may not be finite.
            store(v + at, d == 0 ? (vf){} : d * (t - x * down));
            store(d_tile + at, d == 0 ? (vf){} : d * down);
          }
        if (m.gradient >= 0)
          add_tile(GradientPlace(c, m, slice, panel), panel, s0, first, end, v);
        continue;
      }
      if (m.gradient < 0) continue;
      GradientPlace g(c, m, slice, panel);
      if (m.kind == kBias) {
        add_tile(g, panel, s0, first, end, d_tile);
      } else if (m.kind == kRelative) {
        for (int64_t k = first; k < end; ++k) {
          int32_t place[kLanes];
          offsets(m, k, place);
          for (int l = 0; l < panel.lanes; ++l) g.data[place[l]] += d_tile[k * kLanes + l];
        }
      } else {
        vf total = {};
        for (int64_t k = first; k < end; ++k)
          for (int j = 0; j < 2; ++j) {
            vf d = load<vf>(d_tile + k * kLanes + j * kWidth);
            total -= d == 0 ? (vf){} : d * distance(k, j);
          }
        g.data[0] += sum(total);
      }
    }
  }
};

// Dropout: a hash of a row's word and a column's word decides whether an entry is kept.

struct Dropout {
  vu row[2];
  const uint32_t* columns;
  int64_t along;
  uint32_t below;

  Dropout(const Problem& c, const Panel& panel, int64_t s0) : below((uint32_t)c.drop_below) {
    Operand rows(c.arg(c.words)), cols(c.arg(c.words + 1));
    uint32_t words[kLanes];
    for (int i = 0; i < kLanes; ++i)
      words[i] = *rows.as<uint32_t>(panel.b, panel.n, panel.lane(i));
    for (int j = 0; j < 2; ++j) row[j] = load<vu>(words + j * kWidth);
    columns = cols.as<uint32_t>(panel.b, panel.n, 0, s0);
    along = cols.stride[3];
  }
  INLINE vi kept(int64_t k, int j) const {
    vu x = row[j] ^ columns[k * along];
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return (vi)(x >> 8 >= below);
  }
  bool keeps(int64_t k, int lane) const { return kept(k, lane / kWidth)[lane % kWidth]; }
};

}  // namespace
}  // namespace ATTNLAB_ISA
}  // namespace attnlab

#endif  // ATTNLAB_MODIFIERS_H_
