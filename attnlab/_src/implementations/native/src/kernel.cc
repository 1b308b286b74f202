// Attention, forward and backward, for one instruction set.
//
// Each vector lane holds one query. A panel is kLanes queries of one head; its logits
// and outputs are stored transposed, as [key][lane] and [element][lane]. Every product
// then broadcasts a scalar, multiplies it by a vector and adds: there are no reductions
// across lanes, and operands need no GEMM-style packing. One function, `outer_block`,
// computes the five products of attention and those of an MLP score.
//
// For each block of queries, the plan lists intervals of keys, which are cut into tiles
// of at most kKeys keys. In an interval that is not full, the mask, a small program
// (see `Mask`), yields one bit per key and lane; keys at either end of a tile that no
// lane sees are skipped.

#include "backward.h"
#include "choosing.h"
#include "few.h"
#include "forward.h"
#include "kernel.h"
#include "listed.h"

#ifndef ATTNLAB_ISA
#error "ATTNLAB_ISA names the instruction set"
#endif

namespace attnlab {
namespace ATTNLAB_ISA {
namespace {

// The number of work units that is enough to balance the load of the cores, and the
// greatest number of query blocks in a unit.
constexpr int64_t kUnits = 64, kMostRows = 8;

template <class F>
void parallel(const Call& call, int64_t count, F&& f) {
  call.parallel.run(
      call.parallel.pool, count,
      [](void* context, int64_t unit) { (*static_cast<F*>(context))(unit); }, &f);
}

// Calls f with a number of the keys' type.
template <class F>
void of_type(const Problem& c, F f) {
  const Type type = c.arg(1).type;
  type == Type::f32 ? f(0.0f) : type == Type::bf16 ? f(Half{}) : f(Float16{});
}

// Runs a forward or backward pass for each slice of the keys of each example.
template <int kComparison>
void each_slice(const Problem& c, bool forward) {
  parallel(c.call, c.B * c.slices, [&](int64_t unit) {
    const int64_t b = unit / c.slices, slice = unit % c.slices;
    of_type(c, [&](auto element) {
      typedef decltype(element) T;
      forward ? few_forward<kComparison, T>(c, b, slice)
              : few_backward<kComparison, T>(c, b, slice);
    });
  });
}

void run_few(const Problem& c, bool forward) {
  if (c.score == kInner)
    each_slice<kProduct>(c, forward);
  else if (c.score == kAdditive)
    each_slice<kTanhSum>(c, forward);
  else
    each_slice<kPerceptron>(c, forward);
}

template <class E>
void run_forward(const Problem& c) {
  if (c.pass == kListed) {
    const int64_t parts = (c.T + kListedQueries - 1) / kListedQueries;
    return parallel(c.call, c.B * c.K * parts, [&](int64_t unit) {
      const int64_t head = unit / parts, t0 = (parts - 1 - unit % parts) * kListedQueries;
      of_type(c, [&](auto element) {
        listed_forward<decltype(element)>(c, head / c.K, head % c.K, t0,
                                          least(t0 + kListedQueries, c.T));
      });
    });
  }
  if (c.pass == kFew) {
    run_few(c, true);
    return parallel(c.call, c.B, [&](int64_t b) { merge_slices(c, b); });
  }
  // Units go key head by key head, and within a unit all query heads of a key head come
  // one after another, so that packed keys are reused. Within a head, the last query
  // blocks come first: under a causal mask they take longest.
  const int64_t heads = c.B * c.K;
  const int64_t few =
      most(least(c.B * c.N * c.rows / kUnits, kMostRows) / c.group, 1);
  const int64_t parts = (c.rows + few - 1) / few;
  parallel(c.call, heads * parts, [&](int64_t unit) {
    const int64_t head = unit / parts, part = parts - 1 - unit % parts;
    for (int64_t r = part * few; r < least((part + 1) * few, c.rows); ++r)
      for (int64_t g = 0; g < c.group; ++g)
        forward_rows<E>(c, head / c.K, head % c.K * c.group + g, r);
  });
}

template <class E>
void run_backward(const Problem& c) {
  parallel(c.call, c.B * c.rows + c.num_modifiers, [&](int64_t unit) {
    if (unit < c.B * c.rows) return row_products(c, unit / c.rows, unit % c.rows);
    const Modifier& m = c.modifiers[unit - c.B * c.rows];
    if (m.gradient < 0) return;
    const Array& a = c.ret(m.gradient);
    int64_t size = 4;
    for (int i = 0; i < a.rank; ++i) size *= a.dims[i];
    memset(a.data, 0, size);
  });
  const int64_t heads = c.B * c.K;
  if (c.pass == kFew)
    run_few(c, false);
  else if (c.pass == kListed)
    parallel(c.call, heads * c.slices, [&](int64_t unit) {
      of_type(c, [&](auto element) {
        listed_backward<decltype(element)>(c, unit % heads / c.K, unit % heads % c.K,
                                           unit / heads);
      });
    });
  else
    parallel(c.call, heads * c.slices, [&](int64_t unit) {
      const int64_t head = unit % heads;
      backward_keys<E>(c, head / c.K, head % c.K, unit / heads);
    });
  if (c.wanted & kWantQuery)
    parallel(c.call, c.B * c.N * c.rows, [&](int64_t unit) {
      const int64_t r = unit / (c.B * c.N), rest = unit % (c.B * c.N);
      finish_queries<E>(c, rest / c.N, rest % c.N, r);
    });
}

bool pairs(const Problem& c) {
#if defined(__AVX512BF16__)
  bool narrow = c.narrow_products && c.score == kInner;
  for (int i = 0; i < 3; ++i) narrow = narrow && c.arg(i).type == Type::bf16;
  return narrow;
#else
  (void)c;
  return false;
#endif
}

struct ModifierStorage {
  alignas(Modifier) char bytes[kMaxModifiers * sizeof(Modifier)];
};

void forward(const Call& call) {
  ModifierStorage storage;
  Problem c(call, (Modifier*)storage.bytes);
  pairs(c) ? run_forward<Pair>(c) : run_forward<float>(c);
}

void backward(const Call& call) {
  ModifierStorage storage;
  Problem c(call, (Modifier*)storage.bytes);
  pairs(c) ? run_backward<Pair>(c) : run_backward<float>(c);
}

// The last panels come first: under a causal mask they take longest.
void choose(const Call& call) {
  const Problem c(call, nullptr);
  const int64_t panels = (c.T + kLanes - 1) / kLanes;
  parallel(call, c.B * panels, [&](int64_t unit) {
    choose_keys(c, unit / panels, (panels - 1 - unit % panels) * kLanes);
  });
}

}  // namespace

extern const Kernel kernel = {forward, backward, choose};

}  // namespace ATTNLAB_ISA
}  // namespace attnlab
