// Attention in float32 on the CPU, forward and backward, as XLA FFI ops. The arithmetic is in
// attention_kernels.h.
//
//   y = w v / sum w,  w = e ** (s - max s),  s = q k^T / sqrt(size) where seen, and w = 0 elsewhere
//
// XLA multiplies a batch of small matrices on one thread; here heads are tasks. Weights are never
// kept: a block of queries has its own, forward, and again backward. Keys after the last one that a
// block sees, half of them in a causal mask, are left out. The few queries of a decoding step read a
// cache as it lies, as far as it is filled.
//
// Compiled at first use by attention.py, with the headers of the jaxlib that will load it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <string_view>
#include <vector>

#include "tasks.h"
#include "variants.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// The rows of one head in memory.
struct Rows {
  float* at;
  int64_t stride;
  Rows from(int64_t row) const { return {at + row * stride, stride}; }
};

// Which keys queries see: a byte each, with a step of 0 where all queries, or all keys, agree.
struct Seen {
  const uint8_t* at;
  int64_t by_query, by_key;

  // One past the last key that any of the queries sees.
  int64_t end(int64_t query, int64_t rows, int64_t keys) const {
    int64_t most = 0;
    for (int64_t q = query; q < query + rows && most < keys; q++) {
      const uint8_t* own = at + q * by_query;
      if (!by_key) {
        if (*own) most = keys;
        continue;
      }
      int64_t k = keys;
      for (uint64_t eight = 0; k >= most + 8; k -= 8) {
        memcpy(&eight, own + k - 8, sizeof eight);
        if (eight) break;
      }
      while (k > most && !own[k - 1]) k--;
      most = std::max(most, k);
    }
    return most;
  }
};

// q and y are (batch, length, heads, size), k and v (batch, keys, groups, size), a group for as many
// heads in a row; what is seen (batch, heads, length, keys), any of them 1 for all.
struct Shapes {
  int64_t batch, length, heads, size, keys, groups;
  int64_t mask[4];

  Rows queries(const float* x, int64_t b, int64_t head) const {
    return {const_cast<float*>(x) + (b * length * heads + head) * size, heads * size};
  }
  Rows of_keys(const float* x, int64_t b, int64_t group) const {
    return {const_cast<float*>(x) + (b * keys * groups + group) * size, groups * size};
  }
  Seen seen(const uint8_t* x, int64_t b, int64_t head) const {
    const int64_t matrix = (mask[0] > 1 ? b * mask[1] : 0) + (mask[1] > 1 ? head : 0);
    return {x + matrix * mask[2] * mask[3], mask[2] > 1 ? mask[3] : 0, mask[3] > 1};
  }
};

struct Arrays {
  const float *q, *k, *v;
  const uint8_t* seen;
  float *y, *log_sum;  // the latter (batch, heads, length)
  const float* g;      // what meets y backward
  float *dq, *dk, *dv;
};

namespace portable {
#define BYTES 32
#include "attention_kernels.h"
}  // namespace portable

#if defined(__x86_64__)
BEGIN("avx2,fma")
namespace avx2 {
#define BYTES 32
#include "attention_kernels.h"
}  // namespace avx2
END
BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma")
namespace avx512 {
#define BYTES 64
#include "attention_kernels.h"
}  // namespace avx512
END
#endif

struct Variant {
  const char* name;
  bool (*runs_here)();
  void (*forward)(const Shapes&, const Arrays&, int64_t, int64_t, int64_t, int64_t);
  void (*backward)(const Shapes&, const Arrays&, int64_t, int64_t);
  void (*cached)(const Shapes&, const Arrays&, int64_t, int64_t);
};

static const Variant kVariants[] = {  // the best first
#if defined(__x86_64__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     },
     avx512::forward, avx512::backward, avx512::cached},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     avx2::forward, avx2::backward, avx2::cached},
#endif
    {"portable", [] { return true; }, portable::forward, portable::backward, portable::cached},
};

static const Variant* find(std::string_view name) { return find_in(kVariants, name); }

extern "C" const char* bitnet_variant(int i) { return name_in(kVariants, i); }

// 1 if the named variant computes what it should on this CPU, 0 if not, -1 if it cannot run here.
extern "C" int bitnet_check(const char* name) {
  const Variant* variant = find(name);
  if (!variant) return -1;
  // One head whose values are all 1 gives 1, and their gradients add up to those of y.
  const int64_t length = 53, keys = 77, size = 20;
  std::vector<float> q(length * size), k(keys * size), v(keys * size, 1.0f), y(length * size, 0.0f);
  std::vector<float> sum(length), g(length * size, 0.5f), dq(q), dk(k), dv(k);
  for (size_t i = 0; i < q.size(); i++) q[i] = float(i % 7) - 3;
  for (size_t i = 0; i < k.size(); i++) k[i] = float(i % 5) - 2;
  std::vector<uint8_t> seen(length * keys);
  for (int64_t i = 0; i < length; i++)
    for (int64_t j = 0; j < keys; j++) seen[i * keys + j] = j <= i;
  const Shapes shapes{1, length, 1, size, keys, 1, {1, 1, length, keys}};
  const Arrays arrays{q.data(), k.data(),   v.data(), seen.data(), y.data(),
                      sum.data(), g.data(), dq.data(), dk.data(),  dv.data()};
  variant->forward(shapes, arrays, 0, 0, 0, length);
  variant->backward(shapes, arrays, 0, 0);
  float total = 0;
  std::vector<float> few(3 * size);
  const Shapes three{1, 3, 1, size, keys, 1, {1, 1, 3, keys}};
  variant->cached(three, {q.data(), k.data(), v.data(), seen.data(), few.data()}, 0, 0);
  y.insert(y.end(), few.begin(), few.end());
  for (float value : y)
    if (!(std::abs(value - 1) < 1e-5f)) return 0;
  for (float value : dv) total += value;
  return std::abs(total - 0.5f * length * size) < 0.01f;
}

using Floats = ffi::Buffer<ffi::F32>;
using Mask = ffi::Buffer<ffi::PRED>;

// Whether each axis of what is seen is as long as its own, or 1.
static bool mask_fits(const Shapes& s) {
  const int64_t all[] = {s.batch, s.heads, s.length, s.keys};
  for (int i = 0; i < 4; i++)
    if (s.mask[i] != 1 && s.mask[i] != all[i]) return false;
  return true;
}

static bool shapes_of(const Floats& q, const Floats& k, const Floats& v, const Mask& seen,
                      Shapes* s) {
  const auto qd = q.dimensions(), kd = k.dimensions(), vd = v.dimensions(), wd = seen.dimensions();
  if (qd.size() != 4 || kd.size() != 4 || vd.size() != 4 || wd.size() != 4) return false;
  *s = {qd[0], qd[1], qd[2], qd[3], kd[1], kd[2], {wd[0], wd[1], wd[2], wd[3]}};
  for (int i = 0; i < 4; i++)
    if (kd[i] != vd[i]) return false;
  return mask_fits(*s) && kd[0] == qd[0] && kd[3] == qd[3] && s->groups && s->heads % s->groups == 0;
}

static ffi::Error Attention(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Mask seen,
                            ffi::Result<Floats> y, ffi::Result<Floats> log_sum,
                            std::string_view isa) {
  const Variant* variant = find(isa);
  if (!variant) return ffi::Error::InvalidArgument("this CPU does not run that variant");
  Shapes s;
  if (!shapes_of(q, k, v, seen, &s)) return ffi::Error::InvalidArgument("the shapes do not fit");
  Arrays a{q.typed_data(), k.typed_data(), v.typed_data(), (const uint8_t*)seen.typed_data(),
           y->typed_data(), log_sum->typed_data()};
  const int64_t tasks = s.batch * s.heads;
  if (!tasks || !s.length) return ffi::Error::Success();
  // Heads are cut where they are fewer than threads; every part transposes the keys for itself.
  const int64_t parts = std::clamp<int64_t>(2 * pool.num_threads() / tasks, 1, (s.length + 95) / 96);
  const int64_t rows = ((s.length + parts - 1) / parts + 47) / 48 * 48;
  run(pool, tasks * parts, [&](int64_t task) {
    const int64_t from = task % parts * rows, head = task / parts;
    if (from < s.length)
      variant->forward(s, a, head / s.heads, head % s.heads, from, std::min(s.length, from + rows));
  });
  return ffi::Error::Success();
}

static ffi::Error CachedAttention(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Mask seen,
                                  ffi::Result<Floats> y, std::string_view isa) {
  const Variant* variant = find(isa);
  if (!variant) return ffi::Error::InvalidArgument("this CPU does not run that variant");
  const auto qd = q.dimensions(), kd = k.dimensions(), vd = v.dimensions(), wd = seen.dimensions();
  bool fits = qd.size() == 4 && kd.size() == 4 && vd.size() == 4 && wd.size() == 4;
  fits = fits && kd[0] == qd[0] && vd[0] == qd[0] && kd[1] == vd[1] && kd[2] == qd[3] &&
         vd[3] == qd[3] && kd[3] == vd[2] && kd[1] && qd[2] % kd[1] == 0;
  if (!fits) return ffi::Error::InvalidArgument("the shapes do not fit");
  const Shapes s{qd[0], qd[1], qd[2], qd[3], vd[2], kd[1], {wd[0], wd[1], wd[2], wd[3]}};
  if (!mask_fits(s)) return ffi::Error::InvalidArgument("the shape of seen does not fit");
  const Arrays a{q.typed_data(), k.typed_data(), v.typed_data(), (const uint8_t*)seen.typed_data(),
                 y->typed_data()};
  run(pool, s.batch * s.groups,
      [&](int64_t task) { variant->cached(s, a, task / s.groups, task % s.groups); });
  return ffi::Error::Success();
}

static ffi::Error AttentionGradients(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Mask seen,
                                     Floats y, Floats log_sum, Floats g, ffi::Result<Floats> dq,
                                     ffi::Result<Floats> dk, ffi::Result<Floats> dv,
                                     std::string_view isa) {
  const Variant* variant = find(isa);
  if (!variant) return ffi::Error::InvalidArgument("this CPU does not run that variant");
  Shapes s;
  if (!shapes_of(q, k, v, seen, &s)) return ffi::Error::InvalidArgument("the shapes do not fit");
  const Arrays a{q.typed_data(),   k.typed_data(), v.typed_data(),   (const uint8_t*)seen.typed_data(),
                 y.typed_data(),   log_sum.typed_data(), g.typed_data(), dq->typed_data(),
                 dk->typed_data(), dv->typed_data()};
  run(pool, s.batch * s.groups,
      [&](int64_t task) { variant->backward(s, a, task / s.groups, task % s.groups); });
  return ffi::Error::Success();
}

// What all of them are given first: q, k, v and what is seen.
static auto operands() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<Mask>();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_attention, Attention,
                              operands().Ret<Floats>().Ret<Floats>().Attr<std::string_view>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_attention_cached, CachedAttention,
                              operands().Ret<Floats>().Attr<std::string_view>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_attention_gradients, AttentionGradients,
                              operands()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<std::string_view>("isa"));
