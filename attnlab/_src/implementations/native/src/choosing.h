// The keys that an indexer scores best for each query
//
// The score of a pair is the sum over heads of weight * max(0, query . key). Each lane
// holds a query and has a list of candidates: keys that scored more than its threshold.
// A full list is cut to the best ones, the least of which is the next threshold. Keys
// come in order, so that of equal ones the first stays, and lists are always ascending.

#ifndef ATTNLAB_CHOOSING_H_
#define ATTNLAB_CHOOSING_H_

#include "mask.h"
#include "products.h"

namespace attnlab {
namespace ATTNLAB_ISA {
namespace {

constexpr int32_t kHidden = INT32_MIN;

// Integers in the order of the numbers; kHidden for NaN and -inf.
INLINE vi in_order(vf x) {
  const vi bits = (vi)x;
  const vi shown = x > splat(-INFINITY);
  return ((bits ^ ((bits >> 31) & INT32_MAX)) & shown) | (splat(kHidden) & ~shown);
}

// The lanes whose bits are set, in order; what follows them means nothing.
INLINE vi compress(vi x, uint32_t bits) {
#if defined(__AVX512F__)
  return (vi)_mm512_maskz_compress_epi32((__mmask16)bits, (__m512i)x);
#elif defined(__AVX2__)
  const uint64_t bytes = _pdep_u64(bits, 0x0101010101010101) * 0xff;
  const uint64_t lanes = _pext_u64(0x0706050403020100, bytes);
  const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)lanes));
  return (vi)_mm256_permutevar8x32_epi32((__m256i)x, order);
#else
  vi found = {};
  for (int n = 0; bits; bits &= bits - 1) found[n++] = x[__builtin_ctz(bits)];
  return found;
#endif
}

// How many of n scores are `least_one` or more. Rounds n up to a multiple of kWidth.
INLINE int64_t how_many(const int32_t* scores, int64_t n, int32_t least_one) {
  vi found = {};
  for (int64_t i = 0; i < n; i += kWidth)
    found -= (vi)(load<vi>(scores + i) >= splat(least_one));
  int64_t total = 0;
  for (int i = 0; i < kWidth; ++i) total += found[i];
  return total;
}

struct Candidates {
  int32_t *scores, *slots;
  int64_t n;

  // Adds the candidates whose bits are set. There is room for a vector after the last.
  INLINE void add(vi score, vi slot, uint32_t bits) {
    store(scores + n, compress(score, bits));
    store(slots + n, compress(slot, bits));
    n += __builtin_popcount(bits);
  }

  // Keeps the `count` best of more candidates; returns a score that later ones must
  // exceed.
  int32_t cut(int64_t count) {
    store(scores + n, splat(kHidden));
    // The greatest number that `count` scores reach, bit by bit from the highest.
    uint32_t reached = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
      const int64_t found = how_many(scores, n, (int32_t)((reached | bit) ^ 1u << 31));
      if (found >= count) reached |= bit;
      if (found == count) break;
    }
    const int32_t bound = (int32_t)(reached ^ 1u << 31);
    // Of those that are equal to it, the first are kept.
    int64_t ties = count - how_many(scores, n, bound + 1);
    const int64_t before = n;
    n = 0;
    for (int64_t i = 0; i < before; i += kWidth) {
      const vi score = load<vi>(scores + i), slot = load<vi>(slots + i);
      uint32_t bits = to_bits((vi)(score > splat(bound)));
      uint32_t equal = to_bits((vi)(score == splat(bound)));
      for (; equal && ties; equal &= equal - 1, --ties) bits |= equal & -equal;
      add(score, slot, bits);
    }
    return bound;
  }
};

// The lists of a panel of queries, int32 [B, T, count]: slots, after -1 where the mask
// shows fewer.
void choose_keys(const Problem& c, int64_t b, int64_t t0) {
  static thread_local Buffer<float> query_room, key_room, row_room;
  static thread_local Buffer<int32_t> list_room;
  const int64_t heads = c.N, size = c.P, count = c.ret(0).dims[2];
  const int64_t room = up(most(2 * count, count + kKeys), kWidth) + kWidth;
  const Panel panel(c, b, 0, t0, c.T);
  float* queries = query_room.get(heads * (size + 1) * kLanes);  // [head][element][lane]
  float* weights = queries + heads * size * kLanes;              // [head][lane]
  float* row = row_room.get(most(size, heads));
  for (int i = 0; i < kLanes; ++i) {
    for (int64_t j = 0; j < heads; ++j) {
      load_floats(c.arg(0), c.query_at(b, panel.lane(i), j, size), size, row);
      for (int64_t p = 0; p < size; ++p) queries[(j * size + p) * kLanes + i] = row[p];
    }
    load_floats(c.arg(c.first_param), (b * c.T + panel.lane(i)) * heads, heads, row);
    for (int64_t j = 0; j < heads; ++j) weights[j * kLanes + i] = row[j];
  }
  Candidates lists[kLanes];
  int32_t bounds[kLanes];
  int32_t* lanes = list_room.get(2 * kLanes * room);
  for (int i = 0; i < kLanes; ++i) {
    lists[i] = {lanes + 2 * i * room, lanes + (2 * i + 1) * room, 0};
    bounds[i] = kHidden;
  }
  float* packed = key_room.get(kKeys * size);
  alignas(64) float logits[kKeys * kLanes], scores[kKeys * kLanes];
  for (int64_t s0 = 0; s0 < c.S; s0 += kKeys) {
    const int64_t some = least(kKeys, c.S - s0);
    uint32_t words[kKeys];
    int64_t first, end;
    Mask(c, panel, s0, some).range(words, &first, &end);
    if (first == end) continue;
    first = first / kRows * kRows;
    // Rows are contiguous, but those after the last one are read, too.
    const int64_t at = c.key_at(b, s0, 0, size);
    const float* keys = (const float*)c.arg(1).data + at;
    if (c.arg(1).type != Type::f32 || some < kKeys) {
      load_floats(c.arg(1), at, some * size, packed);
      memset(packed + some * size, 0, (up(some, kRows) - some) * size * 4);
      keys = packed;
    }
    for (int64_t j = 0; j < heads; ++j) {
      outer<float, true>(logits, queries + j * size * kLanes, keys + first * size, size,
                         end - first, size, false);
      for (int64_t k = 0; k < end - first; ++k)
        for (int v = 0; v < kLanes; v += kWidth) {
          float* total = scores + k * kLanes + v;
          // This order of arguments propagates NaN.
          const vf shown = greater(vf{}, load<vf>(logits + k * kLanes + v));
          const vf before = j == 0 ? vf{} : load<vf>(total);
          store(total, before + shown * load<vf>(weights + j * kLanes + v));
        }
    }
    for (int64_t k0 = 0; k0 < end - first; k0 += kWidth)
      for (int j = 0; j < 2; ++j) {
        vf rows[kWidth];  // of keys, then of queries
        for (int k = 0; k < kWidth; ++k) {
          const bool there = k0 + k < end - first;
          const float* row = scores + (there ? k0 + k : 0) * kLanes + j * kWidth;
          rows[k] = where_shown(there ? words[first + k0 + k] : 0, j, load<vf>(row),
                                splat(-INFINITY));
        }
        transpose(rows);
        const vi slots = lanes_from((int32_t)(s0 + first + k0));
        for (int k = 0; k < kWidth; ++k) {
          const int i = j * kWidth + k;
          const vi score = in_order(rows[k]);
          const uint32_t better = to_bits((vi)(score > splat(bounds[i])));
          if (!better) continue;
          if (lists[i].n > room - 2 * kWidth) bounds[i] = lists[i].cut(count);
          lists[i].add(score, slots, better);
        }
      }
  }
  for (int i = 0; i < panel.lanes; ++i) {
    Candidates& list = lists[i];
    if (list.n > count) list.cut(count);
    int32_t* out = (int32_t*)c.ret(0).data + (b * c.T + t0 + i) * count;
    const int64_t none = count - list.n;
    std::fill(out, out + none, -1);
    std::copy(list.slots, list.slots + list.n, out + none);
  }
}

}  // namespace
}  // namespace ATTNLAB_ISA
}  // namespace attnlab

#endif  // ATTNLAB_CHOOSING_H_
