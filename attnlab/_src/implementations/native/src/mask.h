// Evaluates a mask, a program in prefix notation, to one bit per key and lane.

#ifndef ATTNLAB_MASK_H_
#define ATTNLAB_MASK_H_

#include <algorithm>

#include "problem.h"

namespace attnlab {
namespace ATTNLAB_ISA {
namespace {

// Codes of mask programs, and the numbers that follow each; `argument` is an index.
enum MaskCode {
  kFull,
  kWindow,         // left, right (-1: no limit), step
  kAnchor,         // side (0 query, 1 key), count, then lo, hi of each run
  kChunked,        // size
  kFlags,          // argument: booleans along queries, or along keys
  kDocuments,      // arguments: ids of queries, of keys
  kDense,          // argument: booleans
  kBlocks,         // argument: key blocks of each query block; queries, keys in a block
  kAnchorIndices,  // argument: positions; side
  kSelected,       // argument: key blocks of each query; keys in a block
  kBits,           // argument: words of 32 queries for each key
  kAnd,            // count, parts
  kOr,             // count, parts
  kNot,            // part
  kPerHead,        // count, length of each part, parts
};

constexpr int64_t kLongestCompared = 64;

INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

struct Mask {
  const Problem& c;
  const Panel& panel;
  int64_t s0, count;
  const int32_t* keys;  // positions of keys
  vi positions[2];      // of queries

  Mask(const Problem& c, const Panel& panel, int64_t s0, int64_t count)
      : c(c), panel(panel), s0(s0), count(count) {
    keys = c.key_positions.as<int32_t>(panel.b, 0, 0, s0);
    for (int j = 0; j < 2; ++j) positions[j] = load<vi>(panel.positions + j * kWidth);
  }
  // For keys at any positions; the program must read nothing else of them.
  Mask(const Problem& c, const Panel& panel, const int32_t* keys, int64_t count)
      : c(c), panel(panel), s0(0), count(count), keys(keys) {
    for (int j = 0; j < 2; ++j) positions[j] = load<vi>(panel.positions + j * kWidth);
  }

  static INLINE uint32_t bits(vi low, vi high) {
    return to_bits(low) | to_bits(high) << kWidth;
  }
  template <class F>
  static INLINE uint32_t each_lane(F f) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= (uint32_t)(f(i) ? 1 : 0) << i;
    return bits;
  }

  const int64_t* window(const int64_t* code, uint32_t* out) const {
    int64_t left = code[0], right = code[1], step = code[2];
    int32_t rest[kLanes];
    if (step > 1)
      for (int i = 0; i < kLanes; ++i) {
        int64_t p = panel.positions[i];
        rest[i] = (int32_t)(p - floor_div(p, step) * step);
      }
    for (int64_t k = 0; k < count; ++k) {
      int32_t s = keys[k];
      // s + left has 64 bits: it may exceed INT32_MAX.
      vi low = splat(left < 0 ? INT32_MAX : (int32_t)least(s + left, INT32_MAX));
      vi high = splat(right < 0 ? INT32_MIN : (int32_t)(s - right));
      out[k] = bits((positions[0] <= low) & (positions[0] >= high),
                    (positions[1] <= low) & (positions[1] >= high));
      if (step > 1) {
        vi own = splat((int32_t)(s - floor_div(s, step) * step));
        out[k] &= bits(load<vi>(rest) == own, load<vi>(rest + kWidth) == own);
      }
    }
    return code + 3;
  }

  const int64_t* anchor(const int64_t* code, uint32_t* out) const {
    int64_t side = code[0], runs = code[1];
    const int64_t* run = code + 2;
    auto member = [&](int32_t p) {
      for (int64_t r = 0; r < runs; ++r)
        if (p >= run[2 * r] && p < run[2 * r + 1]) return true;
      return false;
    };
    if (side == 0) {
      uint32_t word = each_lane([&](int i) { return member(panel.positions[i]); });
      for (int64_t k = 0; k < count; ++k) out[k] = word;
    } else {
      for (int64_t k = 0; k < count; ++k) out[k] = member(keys[k]) ? ~0u : 0u;
    }
    return run + 2 * runs;
  }

  const int64_t* chunked(const int64_t* code, uint32_t* out) const {
    int64_t size = code[0];
    int32_t own[kLanes];
    for (int i = 0; i < kLanes; ++i)
      own[i] = (int32_t)floor_div(panel.positions[i], size);
    for (int64_t k = 0; k < count; ++k) {
      vi chunk = splat((int32_t)floor_div(keys[k], size));
      out[k] = bits(load<vi>(own) == chunk, load<vi>(own + kWidth) == chunk);
    }
    return code + 1;
  }

  const int64_t* dense(const int64_t* code, uint32_t* out) const {
    Operand x(c.arg(code[0]));
    if (x.stride[2] == 0) {
      const uint8_t* p = x.as<uint8_t>(panel.b, panel.n, 0, s0);
      for (int64_t k = 0; k < count; ++k) out[k] = p[k * x.stride[3]] ? ~0u : 0u;
      return code + 1;
    }
    for (int64_t k = 0; k < count; ++k) out[k] = 0;
    for (int i = 0; i < panel.lanes; ++i) {
      const uint8_t* p = x.as<uint8_t>(panel.b, panel.n, panel.t0 + i, s0);
      for (int64_t k = 0; k < count; ++k)
        out[k] |= (uint32_t)(p[k * x.stride[3]] != 0) << i;
    }
    return code + 1;
  }

  const int64_t* documents(const int64_t* code, uint32_t* out) const {
    Operand q(c.arg(code[0])), k(c.arg(code[1]));
    int32_t own[kLanes];
    for (int i = 0; i < kLanes; ++i)
      own[i] = *q.as<int32_t>(panel.b, panel.n, panel.lane(i));
    const int32_t* ids = k.as<int32_t>(panel.b, panel.n, 0, s0);
    for (int64_t j = 0; j < count; ++j) {
      vi id = splat(ids[j * k.stride[3]]);
      out[j] = ids[j * k.stride[3]] < 0
                   ? 0u
                   : bits(load<vi>(own) == id, load<vi>(own + kWidth) == id);
    }
    return code + 2;
  }

  const int64_t* blocks(const int64_t* code, uint32_t* out) const {
    Operand x(c.arg(code[0]));
    const int64_t queries = code[1], entries = x.array.dims[4];
    const int32_t* table = x.as<int32_t>(panel.b, panel.n);
    const int32_t* lists[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      int64_t block = floor_div(panel.positions[i], queries);
      lists[i] = block >= 0 && block < entries ? table + block * x.array.dims[5] : nullptr;
    }
    listed(lists, x.array.dims[5], code[2], out);
    return code + 3;
  }

  const int64_t* selected(const int64_t* code, uint32_t* out) const {
    Operand x(c.arg(code[0]));
    const int32_t* lists[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int32_t* own = x.as<int32_t>(panel.b, panel.n, panel.lane(i));
      const bool same = i && std::equal(own, own + x.payload, lists[i - 1]);
      lists[i] = same ? lists[i - 1] : own;
    }
    listed(lists, x.payload, code[1], out);
    return code + 2;
  }

  // Which lanes list the block, of `size` keys, of each key.
  void listed(const int32_t* const* lists, int64_t each, int64_t size,
              uint32_t* out) const {
    int64_t last = -1;
    uint32_t word = 0;
    for (int64_t k = 0; k < count; ++k) {
      int64_t block = keys[k] < 0 ? -1 : keys[k] / size;
      if (block >= 0 && block != last) {
        last = block;
        const int32_t* known = nullptr;
        bool found = false;
        word = each_lane([&](int i) {
          if (lists[i] != known) {  // lanes in a row may share a list
            known = lists[i];
            found = known != nullptr && is_listed(known, each, (int32_t)block);
          }
          return found;
        });
      }
      out[k] = block < 0 ? 0 : word;
    }
  }

  // Long lists are sorted: see _LONGEST_COMPARED in masks/lists.py.
  static bool is_listed(const int32_t* list, int64_t each, int32_t block) {
    if (each > kLongestCompared) return std::binary_search(list, list + each, block);
    return std::find(list, list + each, block) != list + each;
  }

  const int64_t* anchor_indices(const int64_t* code, uint32_t* out) const {
    Operand x(c.arg(code[0]));
    const int32_t* index = x.as<int32_t>(panel.b, panel.n);
    auto member = [&](int32_t p) {
      for (int64_t r = 0; r < x.payload; ++r)
        if (index[r] == p) return true;
      return false;
    };
    if (code[1] == 0) {
      uint32_t word = each_lane([&](int i) { return member(panel.positions[i]); });
      for (int64_t k = 0; k < count; ++k) out[k] = word;
    } else {
      for (int64_t k = 0; k < count; ++k) out[k] = member(keys[k]) ? ~0u : 0u;
    }
    return code + 2;
  }

  // Evaluates the part at `code`, writing a word per key; returns the part's end.
  const int64_t* evaluate(const int64_t* code, uint32_t* out) const {
    const int64_t op = *code++;
    switch (op) {
      case kFull:
        for (int64_t k = 0; k < count; ++k) out[k] = ~0u;
        return code;
      case kWindow:
        return window(code, out);
      case kAnchor:
        return anchor(code, out);
      case kChunked:
        return chunked(code, out);
      case kFlags:
      case kDense:
        return dense(code, out);
      case kDocuments:
        return documents(code, out);
      case kBlocks:
        return blocks(code, out);
      case kSelected:
        return selected(code, out);
      case kAnchorIndices:
        return anchor_indices(code, out);
      case kBits: {
        Operand x(c.arg(code[0]));
        // [B or 1, N or 1, ceil(T / 32), S]
        const Array& a = x.array;
        int64_t row = (a.dims[0] == 1 ? 0 : panel.b) * a.dims[1] +
                      (a.dims[1] == 1 ? 0 : panel.n);
        row = row * a.dims[2] + panel.t0 / 32;
        const uint32_t* words = (const uint32_t*)a.data + row * a.dims[3] + s0;
        const int shift = (int)(panel.t0 % 32);
        for (int64_t k = 0; k < count; ++k) out[k] = words[k] >> shift;
        // A panel may begin anywhere in a word and reach into the next one.
        if (shift > 32 - kLanes && panel.t0 / 32 + 1 < a.dims[2])
          for (int64_t k = 0; k < count; ++k)
            out[k] |= words[k + a.dims[3]] << (32 - shift);
        return code + 1;
      }
      case kAnd:
      case kOr: {
        int64_t parts = *code++;
        code = evaluate(code, out);
        uint32_t more[kKeys];
        for (int64_t i = 1; i < parts; ++i) {
          code = evaluate(code, more);
          if (op == kAnd)
            for (int64_t k = 0; k < count; ++k) out[k] &= more[k];
          else
            for (int64_t k = 0; k < count; ++k) out[k] |= more[k];
        }
        return code;
      }
      case kNot:
        code = evaluate(code, out);
        for (int64_t k = 0; k < count; ++k) out[k] = ~out[k];
        return code;
      case kPerHead: {
        int64_t parts = *code++;
        const int64_t* sizes = code;
        code += parts;
        for (int64_t i = 0; i < parts; ++i) {
          if (i == panel.n) evaluate(code, out);
          code += sizes[i];
        }
        return code;
      }
    }
    return code;
  }

  // Writes the words of all keys, and the smallest range with all keys some lane sees.
  void range(uint32_t* out, int64_t* first, int64_t* end) const {
    evaluate(c.mask, out);
    for (int64_t k = 0; k < count; ++k)
      out[k] = keys[k] < 0 ? 0u : out[k] & panel.occupied;
    *first = 0, *end = count;
    while (*end > 0 && out[*end - 1] == 0) --*end;
    while (*first < *end && out[*first] == 0) ++*first;
  }
};

// Finds what a panel sees of keys [from, to) of the tile at s0: a range [first, end),
// where `first` is a multiple of kRows. Returns false if all lanes see all of its keys;
// otherwise `words` holds one bit per lane for each key.
INLINE bool see(const Problem& c, const Panel& panel, int64_t s0, int64_t from, int64_t to,
                bool full, uint32_t* words, int64_t* first, int64_t* end) {
  *first = from, *end = to;
  if (full && from % kRows == 0) return false;
  memset(words, 0, kKeys * sizeof *words);
  if (full) {
    for (int64_t k = from; k < to; ++k) words[k] = ~0u;
  } else {
    Mask(c, panel, s0 + from, to - from).range(words + from, first, end);
    if (*first == *end) return true;
    *first += from, *end += from;
  }
  *first = *first / kRows * kRows;
  return true;
}

// For vector j of a panel: x in the lanes whose bit of `word` is set, else `hidden`.
INLINE vf where_shown(uint32_t word, int j, vf x, vf hidden) {
#if defined(__AVX512F__)
  return (vf)_mm512_mask_blend_ps((__mmask16)(word >> (j * kWidth)), (__m512)hidden,
                                  (__m512)x);
#else
  vu bit = splat(1u) << (vu)lanes_from(j * kWidth);
  return (splat(word) & bit) != 0 ? x : hidden;
#endif
}

}  // namespace
}  // namespace ATTNLAB_ISA
}  // namespace attnlab

#endif  // ATTNLAB_MASK_H_
