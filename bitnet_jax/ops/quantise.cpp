// Float weights to packed ternary codes on the CPU, as XLA FFI ops: one pass for the sums of |w|,
// one for codes, bytes and the sums of what was kept, or for codes alone; and activations to int8,
// row by row.
//
// Every sum is of one output over its inputs, in their order, as reduce.py takes it, so that both
// have the same bits. Outputs are neighbours in memory, so the compiler makes vectors of them.
// Compiled at first use by quantise.py, with the headers of the jaxlib that will load it.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FAST __attribute__((target_clones("avx2", "default")))
#else
#define FAST
#endif

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint8_t Bytes8 __attribute__((vector_size(8)));

#include "vectors.h"

// Outputs of a task, at least and at most. Rows of 1024, a page, break prefetching off: the codes of
// 128 MB took 12 ms, of 8192 they take 7, and the sums and cuts of so many still fit the L2 cache.
constexpr int64_t NARROW = 1024, STRIP = 8192;

// out[j] += |w[i, j]| for `rows` rows i that lie n apart.
FAST static void add(const float* __restrict w, int64_t n, int64_t rows, int64_t columns,
                     float* __restrict out) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4, w += 4 * n)
    for (int64_t j = 0; j < columns; j++)
      out[j] = (((out[j] + std::fabs(w[j])) + std::fabs(w[n + j])) + std::fabs(w[2 * n + j])) +
               std::fabs(w[3 * n + j]);
  for (; i < rows; i++, w += n)
    for (int64_t j = 0; j < columns; j++) out[j] += std::fabs(w[j]);
}

// One input, into its place in the byte.
static void one(const float* w, int64_t columns, const float* cut, int q, uint8_t* bytes,
                float* kept, int32_t* count) {
  for (int64_t j = 0; j < columns; j++) {
    const int code = int(w[j] >= cut[j]) - int(w[j] <= -cut[j]);
    bytes[j] = uint8_t((q ? bytes[j] : 0x55) + code * (1 << 2 * q));
    if (kept && code) kept[j] += std::fabs(w[j]), count[j]++;
  }
}

// Four inputs that share their cuts, of eight outputs, to one byte an output. What vectors compare
// is -1 where it holds.
template <bool KEPT>
INLINE void four_of_eight(const float* w, int64_t n, const float* cut, uint8_t* bytes, float* kept,
                          int32_t* count) {
  const Floats c = load<Floats>(cut);
  Ints byte = Ints{} + 0x55, number = {};
  Floats sum = {};
  if (KEPT) sum = load<Floats>(kept), number = load<Ints>(count);
  for (int q = 0; q < 4; q++) {
    const Floats x = load<Floats>(w + q * n);
    const Ints above = x >= c, below = x <= -c;
    byte += (below - above) << 2 * q;
    if (KEPT) {
      number -= above | below;
      sum += (Floats)((Ints)x & 0x7fffffff & (above | below));
    }
  }
  const Bytes8 narrow = __builtin_convertvector(byte, Bytes8);
  memcpy(bytes, &narrow, sizeof narrow);
  if (KEPT) memcpy(kept, &sum, sizeof sum), memcpy(count, &number, sizeof number);
}

// Of all outputs; kept (unless null) and count as `quantise` says.
FAST static void four(const float* w, int64_t n, int64_t columns, const float* cut, uint8_t* bytes,
                      float* kept, int32_t* count) {
  int64_t j = 0;
  if (kept)
    for (; j + 8 <= columns; j += 8)
      four_of_eight<true>(w + j, n, cut + j, bytes + j, kept + j, count + j);
  else
    for (; j + 8 <= columns; j += 8)
      four_of_eight<false>(w + j, n, cut + j, bytes + j, nullptr, nullptr);
  for (int q = 0; q < 4; q++)
    one(w + q * n + j, columns - j, cut + j, q, bytes + j, kept ? kept + j : nullptr,
        kept ? count + j : nullptr);
}

// code = (w >= cut) - (w <= -cut), with a cut for every group of inputs and output; bytes as
// packed.py has them; kept and count (or null): sum and number of the |w| whose code is not 0.
static void quantise(const float* w, int64_t in, int64_t n, int64_t group, int64_t columns,
                     const float* cut, uint8_t* bytes, float* kept, int32_t* count) {
  for (int64_t i = 0; i < in; i += 4, bytes += n) {
    const int64_t g = i / group * n;
    if (i + 4 <= in && (i + 3) / group == i / group) {
      four(w + i * n, n, columns, cut + g, bytes, kept ? kept + g : nullptr,
           kept ? count + g : nullptr);
      continue;
    }
    for (int q = 0; q < 4 && i + q < in; q++) {
      const int64_t own = (i + q) / group * n;
      one(w + (i + q) * n, columns, cut + own, q, bytes, kept ? kept + own : nullptr,
          kept ? count + own : nullptr);
    }
  }
}

// codes = (w >= cut) - (w <= -cut) for a row of w, with a cut for each output or, of n 1, for all.
FAST static void signs(const float* __restrict w, int64_t n, const float* __restrict cut, bool each,
                       int8_t* __restrict codes) {
  const float all = *cut;
  if (each)
    for (int64_t j = 0; j < n; j++) codes[j] = int8_t((w[j] >= cut[j]) - (w[j] <= -cut[j]));
  else
    for (int64_t j = 0; j < n; j++) codes[j] = int8_t((w[j] >= all) - (w[j] <= -all));
}

// A token's features to int8: codes = round(127 x / largest), half to even; returns the scale.
FAST static float round_row(const float* __restrict x, int64_t n, float smallest,
                            int8_t* __restrict codes) {
  // Bits of |x| have the order of |x|, with NaN above all: a maximum of integers keeps it.
  int32_t most;
  std::memcpy(&most, &smallest, 4);
  for (int64_t i = 0; i < n; i++) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    most = std::max(most, bits & 0x7fffffff);
  }
  float largest;
  std::memcpy(&largest, &most, 4);
  const float factor = 127.0f / largest;
  for (int64_t i = 0; i < n; i++) {
    const float y = std::nearbyint(x[i] * factor);
    codes[i] = int8_t(int32_t(y == y ? y : 0.0f));
  }
  return largest * (1.0f / 127.0f);  // as XLA compiles largest / 127
}

// What build.py asks: there is one variant, the compiler's clones for instruction sets are inside it.
extern "C" const char* bitnet_variant(int i) { return i ? nullptr : "quantise"; }

static bool rounds() {
  for (int64_t n : {1, 7, 64, 333}) {
    std::vector<float> x(n);
    std::vector<int8_t> codes(n);
    for (int64_t i = 0; i < n; i++) x[i] = (i % 2 ? -0.5f : 0.5f) * float((i * 37 + n) % 255);
    float largest = 1;
    for (float y : x) largest = std::max(largest, std::fabs(y));
    const float factor = 127.0f / largest;
    if (round_row(x.data(), n, 1, codes.data()) != largest * (1.0f / 127.0f)) return false;
    for (int64_t i = 0; i < n; i++) {
      volatile float y = x[i] * factor;
      if (codes[i] != int(std::nearbyint(float(y)))) return false;
    }
  }
  return true;
}

// 1 if all passes give, on this CPU, what plain loops give, else 0.
extern "C" int bitnet_check(const char*) {
  if (!rounds()) return 0;
  for (int64_t in : {1, 7, 64})
    for (int64_t group : {3, 4, 64}) {
      const int64_t n = 77, groups = (in + group - 1) / group, packed = (in + 3) / 4;
      std::vector<float> w(in * n), cut(groups * n), sums(groups * n), kept(groups * n);
      std::vector<uint8_t> bytes(packed * n), codes(packed * n);
      std::vector<int32_t> count(groups * n);
      uint32_t random = 1;
      for (auto& x : w) x = int32_t((random = random * 1664525 + 1013904223) >> 8) / 8388608.0f - 1;
      for (auto& x : cut) x = 0.3f;
      w[0] = 0.3f;
      for (int64_t g = 0; g < groups; g++)
        add(w.data() + g * group * n, n, std::min(group, in - g * group), n, &sums[g * n]);
      quantise(w.data(), in, n, group, n, cut.data(), bytes.data(), kept.data(), count.data());
      quantise(w.data(), in, n, group, n, cut.data(), codes.data(), nullptr, nullptr);
      std::vector<int8_t> own(n), same(n);
      for (int64_t i = 0; i < in; i++) {
        signs(&w[i * n], n, cut.data(), true, own.data());
        signs(&w[i * n], n, cut.data(), false, same.data());
        for (int64_t j = 0; j < n; j++)
          for (const auto& found : {own, same})
            if (found[j] != (bytes[i / 4 * n + j] >> i % 4 * 2 & 3) - 1) return 0;
      }
      for (int64_t j = 0; j < n; j++)
        for (int64_t g = 0; g < groups; g++) {
          volatile float all = 0, some = 0;
          int32_t number = 0;
          for (int64_t i = g * group; i < std::min(in, (g + 1) * group); i++) {
            const float size = std::fabs(w[i * n + j]);
            const int code = size >= 0.3f ? (w[i * n + j] > 0 ? 1 : -1) : 0;
            all = all + size;
            if (code) some = some + size, number++;
            for (auto* found : {&bytes, &codes})
              if (((*found)[i / 4 * n + j] >> i % 4 * 2 & 3) != code + 1) return 0;
          }
          if (all != sums[g * n + j] || some != kept[g * n + j] || number != count[g * n + j])
            return 0;
        }
    }
  return 1;
}

// ---- The ops: w (stack, in, n), a group of 0 inputs means all of them; x (..., features) -------

template <class F>
static void each_strip(ffi::ThreadPool& pool, int64_t stack, int64_t n, F task) {
  const int64_t threads = pool.num_threads(), share = (n + threads - 1) / threads;
  const int64_t wide = std::clamp(stack < threads ? share : n, NARROW, STRIP);
  const int64_t strips = (n + wide - 1) / wide;
  run(pool, stack * strips, [&](int64_t t) {
    const int64_t first = t % strips * wide;
    task(t / strips, first, std::min(wide, n - first));
  });
}

// x[0] = the sum of n values: the first half plus the second, until one is left.
static void halve(float* x, int64_t n) {
  for (; n > 1; n -= n / 2) {
    for (int64_t i = 0; i < n / 2; i++) x[i] += x[n / 2 + i];
    if (n % 2) x[n / 2] = x[n - 1];
  }
}

static ffi::Error Sums(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> w,
                       ffi::Result<ffi::Buffer<ffi::F32>> sums, int64_t group, bool outputs) {
  const auto shape = w.dimensions();
  if (shape.size() < 2) return ffi::Error::InvalidArgument("w (*stack, in, n) needed");
  const int64_t in = shape[shape.size() - 2], n = shape.back();
  const int64_t stack = in * n ? int64_t(w.element_count()) / (in * n) : 0;
  group = group ? group : std::max<int64_t>(in, 1);
  const int64_t groups = (in + group - 1) / group;
  if (sums->element_count() != size_t(stack * groups * (outputs ? 1 : n)) || (outputs && !n))
    return ffi::Error::InvalidArgument("sums (*stack, groups) or (*stack, groups, n) needed");
  std::vector<float> room(outputs ? stack * groups * n : 0);
  float* to = outputs ? room.data() : sums->typed_data();
  each_strip(pool, stack, n, [&](int64_t s, int64_t first, int64_t columns) {
    for (int64_t g = 0; g < groups; g++) {
      float* out = to + (s * groups + g) * n + first;
      std::fill(out, out + columns, 0.0f);
      add(w.typed_data() + (s * in + g * group) * n + first, n, std::min(group, in - g * group),
          columns, out);
    }
  });
  for (int64_t i = 0; outputs && i < stack * groups; i++) {
    halve(to + i * n, n);
    sums->typed_data()[i] = to[i * n];
  }
  return ffi::Error::Success();
}

static ffi::Error Quantise(ffi::ThreadPool pool, ffi::BufferR3<ffi::F32> w,
                           ffi::BufferR3<ffi::F32> cut, ffi::Result<ffi::BufferR3<ffi::U8>> bytes,
                           ffi::Result<ffi::BufferR3<ffi::F32>> kept,
                           ffi::Result<ffi::BufferR3<ffi::S32>> count, int64_t group, bool sums) {
  const int64_t stack = w.dimensions()[0], in = w.dimensions()[1], n = w.dimensions()[2];
  group = group ? group : std::max<int64_t>(in, 1);
  const int64_t groups = (in + group - 1) / group, packed = (in + 3) / 4;
  if (cut.element_count() != size_t(stack * groups * n) ||
      bytes->element_count() != size_t(stack * packed * n) ||
      (sums && (kept->element_count() != cut.element_count() ||
                count->element_count() != cut.element_count())))
    return ffi::Error::InvalidArgument("the shapes of w, cut, bytes, kept and count do not fit");
  each_strip(pool, stack, n, [&](int64_t s, int64_t first, int64_t columns) {
    const int64_t at = s * groups * n + first;
    for (int64_t g = 0; sums && g < groups; g++) {
      std::fill_n(kept->typed_data() + at + g * n, columns, 0.0f);
      std::fill_n(count->typed_data() + at + g * n, columns, 0);
    }
    quantise(w.typed_data() + s * in * n + first, in, n, group, columns, cut.typed_data() + at,
             bytes->typed_data() + s * packed * n + first, sums ? kept->typed_data() + at : nullptr,
             sums ? count->typed_data() + at : nullptr);
  });
  return ffi::Error::Success();
}

static ffi::Error Signs(ffi::ThreadPool pool, ffi::BufferR3<ffi::F32> w,
                        ffi::BufferR3<ffi::F32> cut, ffi::Result<ffi::BufferR3<ffi::S8>> codes) {
  const int64_t stack = w.dimensions()[0], in = w.dimensions()[1], n = w.dimensions()[2];
  const int64_t wide = stack ? int64_t(cut.element_count()) / stack : 0;
  if (codes->element_count() != w.element_count() || (wide != n && wide != 1) ||
      cut.element_count() != size_t(stack * wide))
    return ffi::Error::InvalidArgument("codes like w and a cut an output, or one, needed");
  const int64_t step = std::max<int64_t>(1, 65536 / std::max<int64_t>(n, 1));
  run(pool, (stack * in + step - 1) / step, [&](int64_t t) {
    for (int64_t i = t * step; i < std::min(stack * in, (t + 1) * step); i++)
      signs(w.typed_data() + i * n, n, cut.typed_data() + i / in * wide, wide > 1,
            codes->typed_data() + i * n);
  });
  return ffi::Error::Success();
}

static ffi::Error Codes(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                        ffi::Result<ffi::Buffer<ffi::S8>> codes,
                        ffi::Result<ffi::Buffer<ffi::F32>> scale, float smallest) {
  const int64_t rows = scale->element_count(), n = rows ? x.element_count() / rows : 0;
  if (codes->element_count() != x.element_count() || size_t(rows * n) != x.element_count())
    return ffi::Error::InvalidArgument("codes like x and a scale a row needed");
  const int64_t step = std::max<int64_t>(1, 65536 / std::max<int64_t>(n, 1));
  run(pool, (rows + step - 1) / step, [&](int64_t t) {
    for (int64_t i = t * step; i < std::min(rows, (t + 1) * step); i++)
      scale->typed_data()[i] =
          round_row(x.typed_data() + i * n, n, smallest, codes->typed_data() + i * n);
  });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_codes, Codes,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("smallest"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_signs, Signs,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR3<ffi::F32>>()
                                  .Arg<ffi::BufferR3<ffi::F32>>()
                                  .Ret<ffi::BufferR3<ffi::S8>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_sums, Sums,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("outputs"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_quantise, Quantise,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR3<ffi::F32>>()
                                  .Arg<ffi::BufferR3<ffi::F32>>()
                                  .Ret<ffi::BufferR3<ffi::U8>>()
                                  .Ret<ffi::BufferR3<ffi::F32>>()
                                  .Ret<ffi::BufferR3<ffi::S32>>()
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("sums"));
