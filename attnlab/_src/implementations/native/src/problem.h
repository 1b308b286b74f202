// Number formats and scratch buffers; a call, read from its program; panels of queries.

#ifndef ATTNLAB_PROBLEM_H_
#define ATTNLAB_PROBLEM_H_

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernel.h"
#include "vectors.h"

namespace attnlab {
namespace ATTNLAB_ISA {
namespace {

// Scratch memory that grows and never shrinks; each thread has its own.
template <class T>
class Buffer {
 public:
  ~Buffer() { free(data_); }
  T* get(int64_t n) {
    if (n > size_ || data_ == nullptr) {  // get(0) must not return null
      free(data_);
      size_ = 0;
      data_ = (T*)aligned_alloc(64, up((n > 0 ? n : 1) * sizeof(T), 64));
      if (data_ == nullptr) abort();
      size_ = n;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// From bfloat16 to float and back, rounded to nearest even.
INLINE float widen(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
INLINE uint16_t narrow(float f) {
  uint32_t x;
  memcpy(&x, &f, 4);
  uint32_t rounded = (x + 0x7fff + (x >> 16 & 1)) >> 16;
  return (uint16_t)(f != f ? x >> 16 | 64 : rounded);
}

struct Float16 {
  uint16_t bits;
};
INLINE float widen(Float16 x) {
  // Subnormal numbers are handled apart: shifted as below, they would be subnormal
  // floats, which may be flushed to zero.
  if ((x.bits & 0x7c00) == 0) {
    const float f = (float)(x.bits & 0x3ff) * 0x1p-24f;
    return x.bits & 0x8000 ? -f : f;
  }
  // Shifts exponent and fraction into place; the product corrects the exponent's bias.
  uint32_t bits = (uint32_t)(x.bits & 0x7fff) << 13;
  float f;
  memcpy(&f, &bits, 4);
  f *= 0x1p112f;
  memcpy(&bits, &f, 4);
  if ((x.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  bits |= (uint32_t)(x.bits & 0x8000) << 16;
  memcpy(&f, &bits, 4);
  return f;
}
INLINE Float16 to_float16(float f) {
  uint32_t x;
  memcpy(&x, &f, 4);
  const uint32_t sign = x >> 16 & 0x8000;
  x &= 0x7fffffff;
  uint32_t half;
  if (x > 0x7f800000) {
    half = 0x7e00;
  } else if (x >= 0x47800000) {
    half = 0x7c00;
  } else if (x < 0x38800000) {  // subnormal or zero: the sum rounds it
    float sum;
    memcpy(&sum, &x, 4);
    sum += 0.5f;
    memcpy(&half, &sum, 4);
    half -= 0x3f000000;
  } else {
    half = (x - 0x38000000 + 0xfff + (x >> 13 & 1)) >> 13;
  }
  return {(uint16_t)(sign | half)};
}

struct Half {  // bfloat16
  uint16_t bits;
};
INLINE float number(float x) { return x; }
INLINE float number(Half x) { return widen(x.bits); }
INLINE float number(Float16 x) { return widen(x); }

// Loads kWidth numbers as floats.
INLINE vf wide(const float* p) { return load<vf>(p); }
INLINE vf wide(const Half* p) {
  typedef uint16_t half __attribute__((vector_size(kWidth * 2)));
  return (vf)(__builtin_convertvector(load<half>(p), vu) << 16);
}
INLINE vf wide(const Float16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(load<__m256i>(p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(load<__m128i>(p));
#else
  vf v;
  for (int i = 0; i < kWidth; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

template <class T>
INLINE void widen_all(const T* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, wide(in + i));
  for (; i < n; ++i) out[i] = number(in[i]);
}
// Loads n elements of x, from element `at` on, as floats.
void load_floats(const Array& x, int64_t at, int64_t n, float* out) {
  if (x.type == Type::f32)
    memcpy(out, (const float*)x.data + at, n * 4);
  else if (x.type == Type::bf16)
    widen_all((const Half*)x.data + at, n, out);
  else
    widen_all((const Float16*)x.data + at, n, out);
}
void store_floats(const Array& x, int64_t at, int64_t n, const float* in) {
  if (x.type == Type::f32) {
    memcpy((float*)x.data + at, in, n * 4);
  } else if (x.type == Type::bf16) {
    uint16_t* p = (uint16_t*)x.data + at;
    for (int64_t i = 0; i < n; ++i) p[i] = narrow(in[i]);
  } else {
    Float16* p = (Float16*)x.data + at;
    for (int64_t i = 0; i < n; ++i) p[i] = to_float16(in[i]);
  }
}

// An array [B, N, T, S, *payload]; the first four axes are full, or 1 and broadcast.
struct Operand {
  Array array;
  int64_t stride[4];
  int64_t payload;

  explicit Operand(const Array& a) : array(a), payload(1) {
    for (int i = 4; i < a.rank; ++i) payload *= a.dims[i];
    int64_t size = payload;
    for (int i = 3; i >= 0; --i) {
      stride[i] = a.dims[i] == 1 ? 0 : size;
      size *= a.dims[i];
    }
  }
  int64_t at(int64_t b, int64_t n, int64_t t = 0, int64_t s = 0) const {
    return b * stride[0] + n * stride[1] + t * stride[2] + s * stride[3];
  }
  template <class T>
  const T* as(int64_t b, int64_t n, int64_t t = 0, int64_t s = 0) const {
    return (const T*)array.data + at(b, n, t, s);
  }
  float number(int64_t i) const {
    float x;
    load_floats(array, i, 1, &x);
    return x;
  }
};

enum Score { kInner, kAdditive, kMlp };
enum Activation { kRelu, kTanh, kSigmoid, kSilu, kGelu };
enum Pass { kPanels, kFew, kListed };  // forward.h and backward.h, few.h, listed.h
enum ModifierKind { kSoftCap, kAlibi, kRelative, kBias };
enum { kWantQuery = 1, kWantKey = 2, kWantValue = 4, kWantParams = 8 };

struct Modifier {
  ModifierKind kind;
  Operand operand;
  int64_t left, right;  // of kRelative: offsets are clamped to [-left, right]
  int64_t gradient;     // index of a result, or -1
};

constexpr int kMaxModifiers = 16;  // MOST_MODIFIERS in program.py

struct Problem {
  const Call& call;
  int64_t id;  // unique to this call
  // Examples, queries, keys, query heads, key heads, sizes of a key and a value; N / K.
  int64_t B, T, S, N, K, P, D, group;
  int score, activation;
  bool narrow_products;  // products of bfloat16 are allowed
  Pass pass;
  int64_t drop_below;  // a 24-bit hash below it drops an entry; -1: no dropout
  int64_t block_q, block_k, slices, wanted;
  int64_t rows;   // number of query blocks
  int64_t tiles;  // number of key tiles
  int64_t num_params, first_param, first_param_gradient;
  // Indices of arguments, or -1. `words` is the first of dropout's two.
  int64_t words;
  int64_t d_lse;
  int64_t head_scale;
  int64_t lists, list_block;  // of kListed: lists of blocks of so many keys
  int num_modifiers;
  Modifier* modifiers;
  const int64_t* mask;
  Operand query_positions, key_positions;

  Problem(const Call& c, Modifier* storage)
      : call(c), modifiers(storage), query_positions(c.args[3]), key_positions(c.args[4]) {
    const int64_t* q = c.args[0].dims;
    const int64_t* v = c.args[2].dims;
    B = q[0], T = q[1], N = q[2], P = q[3], S = v[1], K = v[2], D = v[3];
    group = N / K;
    const int64_t* p = c.program;
    score = (int)p[0], activation = (int)p[1];
    narrow_products = p[2] != 0, pass = (Pass)p[3];
    drop_below = p[4], block_q = p[5], block_k = p[6], slices = p[7], wanted = p[8];
    num_params = p[9], first_param = p[10], first_param_gradient = p[11];
    words = p[12], d_lse = p[13];
    head_scale = p[14];
    lists = p[15], list_block = p[16];
    num_modifiers = (int)p[17];
    p += 18;
    for (int i = 0; i < num_modifiers; ++i, p += 5) {
      // `storage` is uninitialised memory; Modifier is trivially copyable.
      Modifier m = {(ModifierKind)p[0], Operand(c.args[p[1]]), p[2], p[3], p[4]};
      memcpy((void*)&storage[i], &m, sizeof m);
    }
    mask = p;
    rows = (T + block_q - 1) / block_q;
    tiles = (S + kKeys - 1) / kKeys;
    static int64_t calls = 0;
    id = __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
  }
  const Array& arg(int64_t i) const { return call.args[i]; }
  const Array& ret(int64_t i) const { return call.rets[i]; }
  // The factor of a head's inner products.
  float scale(int64_t b, int64_t n) const {
    const float constant = (float)call.logit_scale;
    if (head_scale < 0) return constant;
    return constant * *Operand(arg(head_scale)).as<float>(b, n);
  }
  int64_t query_at(int64_t b, int64_t t, int64_t n, int64_t size) const {
    return ((b * T + t) * N + n) * size;
  }
  int64_t key_at(int64_t b, int64_t s, int64_t k, int64_t size) const {
    return ((b * S + s) * K + k) * size;
  }
};

// A panel: up to kLanes consecutive queries of one head, one per lane.
struct Panel {
  int64_t b, n, t0;
  int lanes;          // number of lanes in use
  uint32_t occupied;  // bits of the lanes whose position is not negative
  int32_t positions[kLanes];

  Panel() {}
  Panel(const Problem& c, int64_t b, int64_t n, int64_t t0, int64_t end)
      : b(b), n(n), t0(t0), lanes((int)least(kLanes, end - t0)), occupied(0) {
    for (int i = 0; i < kLanes; ++i) {
      positions[i] = i < lanes ? *c.query_positions.as<int32_t>(b, 0, t0 + i) : -1;
      if (positions[i] >= 0) occupied |= 1u << i;
    }
  }
  // The query of lane i; lanes that are not in use repeat the last one.
  int64_t lane(int i) const { return t0 + (i < lanes ? i : lanes - 1); }
};

// Calls f(s0, s1, full) for each interval of keys that the plan lists for block r of
// queries. If `full`, all its queries see all keys of the interval.
template <class F>
void each_interval(const Problem& c, int64_t b, int64_t n, int64_t r, F f) {
  for (int kind = 0; kind < 2; ++kind) {
    const Array &lo = c.arg(5 + 2 * kind), &hi = c.arg(6 + 2 * kind);
    const int64_t m = lo.dims[3];
    int64_t at = (lo.dims[0] == 1 ? 0 : b) * lo.dims[1] + (lo.dims[1] == 1 ? 0 : n);
    at = (at * lo.dims[2] + r) * m;
    for (int64_t i = 0; i < m; ++i) {
      int64_t first = most(((const int32_t*)lo.data)[at + i], 0) * c.block_k;
      int64_t end = least(((const int32_t*)hi.data)[at + i] * c.block_k, c.S);
      if (first < end) f(first, end, kind == 0);
    }
  }
}

}  // namespace
}  // namespace ATTNLAB_ISA
}  // namespace attnlab

#endif  // ATTNLAB_PROBLEM_H_
