// The products of a training step on CPUs without matrix units for integers (AVX2, AVX512-VNNI), as
// XLA FFI ops. The arithmetic is in training_kernels.h.
//
//   ternary product   out[b, m, n] = sum over k of x[b, m, k] * codes[b, k, n]
//                     int8 x to int32, exact; float32 x to float32. With `transposed`, codes are
//                     (b, n, k): grad-input reads the codes of the forward pass as they lie.
//   grad weight       out[b, k, n] = sum over m of codes[b, m, k] * scale[b, m] * g[b, m, n]
//                     with scale * g rounded to 16 bits, a scale each column and 512 rows.
//
// b stands for any number of axes, which broadcast.
//
// Compiled at first use by build.py, with the headers of the jaxlib that will load it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <type_traits>
#include <vector>

#include "tasks.h"
#include "variants.h"
#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ffi = xla::ffi;

constexpr int64_t PAST = 3;  // indices read past the last, four at a time

namespace portable {
#define BYTES 32
#define KEEP(vector)
#define DOT(sums, a, b) ((sums) + (((a) << 16) >> 16) * (((b) << 16) >> 16) + ((a) >> 16) * ((b) >> 16))
#include "training_kernels.h"
}  // namespace portable

#if defined(__x86_64__)
BEGIN("avx2,fma")
namespace avx2 {
#define BYTES 32
#define KEEP(vector) asm("" : "+x"(vector))
#define WIDEN return (Ints8)_mm256_cvtepi16_epi32((__m128i)piece);
#define DOT(sums, a, b) ((sums) + (Ints8)_mm256_madd_epi16((__m256i)(a), (__m256i)(b)))
#include "training_kernels.h"
}  // namespace avx2
END
BEGIN("avx512f,avx512bw,avx512vl,avx512vnni,fma")
namespace avx512vnni {
#define BYTES 64
#define KEEP(vector) asm("" : "+v"(vector))
#define WIDEN return (Ints8)_mm256_cvtepi16_epi32((__m128i)piece);
#define DOT(sums, a, b) ((WideInts)_mm512_dpwssd_epi32((__m512i)(sums), (__m512i)(a), (__m512i)(b)))
#include "training_kernels.h"
}  // namespace avx512vnni
END
#endif

struct Variant {
  const char* name;
  bool (*runs_here)();
  int rows_of_floats, rows_of_codes, tall, wide;
  void (*make_index)(const int8_t*, int64_t, int64_t, bool, int64_t, int64_t, int64_t, uint16_t*);
  void (*floats)(const float*, int64_t, int64_t, const uint16_t*, int64_t, int64_t, float*, int64_t);
  void (*codes)(const int8_t*, int64_t, int64_t, const uint16_t*, int64_t, int64_t, int32_t*, int64_t);
  void (*pair_codes)(const int8_t*, int64_t, int64_t, int64_t, int64_t, int32_t*);
  void (*grad_weight)(const int32_t*, const float*, const float*, int64_t, int64_t, int64_t, int64_t,
                      float*);
};

#define VARIANT(space) \
  space::ROWS<float>, space::ROWS<int16_t>, space::TALL, space::WIDE, space::make_index, \
  space::product<float, float, float>, space::product<int8_t, int16_t, int32_t>,     \
  space::pair_codes, space::grad_weight

static const Variant kVariants[] = {  // the best first
#if defined(__x86_64__)
    {"avx512vnni",
     [] {
       return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
     },
     VARIANT(avx512vnni)},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     VARIANT(avx2)},
#endif
    {"portable", [] { return true; }, VARIANT(portable)},
};

static const Variant* find(std::string_view name) { return find_in(kVariants, name); }

// ---- What Python asks before it trusts the library -----------------------------------------------

extern "C" const char* bitnet_variant(int i) { return name_in(kVariants, i); }

static bool equals_reference(const Variant& variant, int64_t rows, int64_t k, int64_t n, int sign) {
  uint32_t random = 1;
  auto draw = [&] { return (random = random * 1664525 + 1013904223) >> 16; };
  std::vector<int8_t> x(rows * k), codes(k * n);
  std::vector<float> floats(rows * k), g(rows * n), scales(rows, 0.5f), weight(k * n);
  // sign: one where every product is as large as it gets, to meet any overflow; 0 for random ones.
  for (auto& value : x) value = sign ? sign * 128 - (sign > 0) : int8_t(draw());
  for (auto& code : codes) code = sign ? 1 : int(draw() % 3) - 1;
  for (auto& value : g) value = sign ? 1 : float(draw() % 2001) - 1000;
  std::copy(x.begin(), x.end(), floats.begin());
  const int64_t fours = (k + 15) / 16 * 4;
  std::vector<uint16_t> index(fours * n + PAST);
  variant.make_index(codes.data(), k, n, false, fours, 0, n, index.data());
  std::vector<int32_t> sums(rows * n);
  std::vector<float> products(rows * n);
  variant.codes(x.data(), rows, k, index.data(), n, n, sums.data(), n);
  const int64_t few = std::min<int64_t>(rows, variant.rows_of_floats);
  variant.floats(floats.data(), few, k, index.data(), n, n, products.data(), n);
  for (int64_t m = 0; m < rows; m++)
    for (int64_t c = 0; c < n; c++) {
      int32_t sum = 0;
      for (int64_t i = 0; i < k; i++) sum += x[m * k + i] * codes[i * n + c];
      if (sums[m * n + c] != sum || (m < few && products[m * n + c] != float(sum))) return false;
    }
  std::vector<int32_t> words((k + variant.tall - 1) / variant.tall * variant.tall * ((rows + 1) / 2));
  variant.pair_codes(x.data(), rows, k, 0, (rows + 1) / 2, words.data());
  for (int64_t c = 0; c < n; c += variant.wide)
    variant.grad_weight(words.data(), scales.data(), g.data() + c, rows, k, n,
                        std::min<int64_t>(variant.wide, n - c), weight.data() + c);
  for (int64_t i = 0; i < k; i++)
    for (int64_t c = 0; c < n; c++) {
      double sum = 0;
      for (int64_t m = 0; m < rows; m++) sum += 0.5 * x[m * k + i] * g[m * n + c];
      // Each gradient, at most 500 after its scale, is wrong by half a unit of 500 / 32767.
      if (!(std::abs(sum - weight[i * n + c]) <= 128 * rows * 0.01)) return false;
    }
  return true;
}

// 1 if the named variant computes what it should on this CPU, 0 if not, -1 if it cannot run here.
extern "C" int bitnet_check(const char* name) {
  const Variant* variant = find(name);
  if (!variant) return -1;
  bool right = true;
  for (int sign : {0, 1, -1})
    for (int64_t rows : {1, 9, variant->rows_of_codes})
      for (int64_t k : {1, 77, 330}) right = right && equals_reference(*variant, rows, k, 83, sign);
  return right;
}

// ---- The ternary product -------------------------------------------------------------------------

using Dims = ffi::Span<const int64_t>;

// Where matrix b of the result finds its own in an operand, whose axes are the result's or 1 long.
static int64_t matrix(int64_t b, Dims result, Dims operand, size_t axes) {
  int64_t at = 0, step = 1;
  for (size_t i = axes; i-- > 0; b /= result[i]) {
    if (operand[i] != 1) at += b % result[i] * step;
    step *= operand[i];
  }
  return at;
}

static bool broadcasts(Dims result, Dims operand, size_t axes, size_t own) {
  if (operand.size() != axes + own) return false;
  for (size_t i = 0; i < axes; i++)
    if (operand[i] != 1 && operand[i] != result[i]) return false;
  return true;
}

static int64_t size(Dims dims, size_t axes) {
  int64_t size = 1;
  for (size_t i = 0; i < axes; i++) size *= dims[i];
  return size;
}

template <class X, class Y, class F>
static ffi::Error product(ffi::ThreadPool& pool, const Variant& variant, const X* x,
                          const int8_t* codes, Y* out, Dims xd, Dims cd, Dims od, bool transposed,
                          int64_t height, F kernel) {
  const size_t axes = od.size() - 2;
  int64_t b = size(od, axes), rows = od[axes];
  const int64_t k = xd[axes + 1], n = od[axes + 1], fours = (k + 15) / 16 * 4;
  // A batch of x for one matrix, as vmap makes it of single rows, is that many rows.
  const bool one = size(cd, axes) == 1 && size(xd, axes) == b;
  if (one) rows *= b, b = 1;
  if (!b || !rows || !n) return ffi::Error::Success();
  if (!k) {
    std::fill_n(out, b * rows * n, Y(0));
    return ffi::Error::Success();
  }
  const int64_t blocks = (rows + height - 1) / height, wanted = 2 * pool.num_threads();
  // The sums of a strip stay in the L2 cache.
  int64_t columns = std::min<int64_t>(n, 2048);
  if (blocks < wanted) columns = std::min(columns, n * blocks / wanted / 64 * 64 + 64);
  const int64_t strips = (n + columns - 1) / columns;
  static thread_local std::vector<uint16_t> memory;  // kept: fresh pages cost as much as the work
  memory.resize(fours * n + PAST);
  uint16_t* index = memory.data();
  for (int64_t i = 0, last = -1; i < b; i++) {
    const int64_t at = one ? 0 : matrix(i, od, cd, axes), from = one ? 0 : matrix(i, od, xd, axes);
    if (at != last)
      run(pool, (n + 255) / 256, [&](int64_t task) {
        variant.make_index(codes + at * k * n, k, n, transposed, fours, 256 * task,
                           std::min(n, 256 * task + 256), index);
      });
    last = at;
    run(pool, blocks * strips, [&](int64_t task) {
      const int64_t m = task / strips * height, c = task % strips * columns;
      kernel(x + (from * rows + m) * k, std::min(height, rows - m), k, index + c, n,
             std::min(columns, n - c), out + (i * rows + m) * n + c, n);
    });
  }
  return ffi::Error::Success();
}

static ffi::Error TernaryProduct(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S8> codes,
                                 ffi::Result<ffi::AnyBuffer> out, bool transposed,
                                 std::string_view isa) {
  const Variant* variant = find(isa);
  if (!variant) return ffi::Error::InvalidArgument("this CPU does not run that variant");
  Dims xd = x.dimensions(), cd = codes.dimensions(), od = out->dimensions();
  const size_t axes = od.size() - 2;
  if (od.size() < 2 || !broadcasts(od, xd, axes, 2) || !broadcasts(od, cd, axes, 2) ||
      xd[axes] != od[axes] || cd[transposed ? axes + 1 : axes] != xd[axes + 1] ||
      cd[transposed ? axes : axes + 1] != od[axes + 1])
    return ffi::Error::InvalidArgument("the shapes of x and codes do not fit");
  if (x.element_type() == ffi::S8 && out->element_type() == ffi::S32)
    return product(pool, *variant, x.typed_data<int8_t>(), codes.typed_data(),
                   out->typed_data<int32_t>(), xd, cd, od, transposed, variant->rows_of_codes,
                   variant->codes);
  if (x.element_type() == ffi::F32 && out->element_type() == ffi::F32)
    return product(pool, *variant, x.typed_data<float>(), codes.typed_data(),
                   out->typed_data<float>(), xd, cd, od, transposed, variant->rows_of_floats,
                   variant->floats);
  return ffi::Error::InvalidArgument("int8 to int32 or float32 to float32");
}

// ---- Grad-weight ---------------------------------------------------------------------------------

static ffi::Error GradWeight(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> codes,
                             ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> g,
                             ffi::Result<ffi::Buffer<ffi::F32>> out, std::string_view isa) {
  const Variant* variant = find(isa);
  if (!variant) return ffi::Error::InvalidArgument("this CPU does not run that variant");
  Dims cd = codes.dimensions(), sd = scale.dimensions(), gd = g.dimensions(), od = out->dimensions();
  const size_t axes = od.size() - 2;
  if (od.size() < 2 || !broadcasts(od, cd, axes, 2) || !broadcasts(od, sd, axes, 1) ||
      !broadcasts(od, gd, axes, 2) || sd[axes] != cd[axes] || gd[axes] != cd[axes] ||
      od[axes] != cd[axes + 1] || od[axes + 1] != gd[axes + 1])
    return ffi::Error::InvalidArgument("the shapes of codes, scale and g do not fit");
  const int64_t m = cd[axes], k = cd[axes + 1], n = gd[axes + 1], b = size(od, axes);
  if (!b || !k || !n) return ffi::Error::Success();
  if (!m) {
    std::fill_n(out->typed_data(), b * k * n, 0.0f);
    return ffi::Error::Success();
  }
  const int64_t tall = variant->tall, wide = variant->wide, pairs = (m + 1) / 2;
  static thread_local std::vector<int32_t> memory;  // kept: fresh pages cost as much as the work
  memory.resize((k + tall - 1) / tall * tall * pairs);
  int32_t* words = memory.data();
  for (int64_t i = 0; i < b; i++) {
    const int8_t* own = codes.typed_data() + matrix(i, od, cd, axes) * m * k;
    const float* scales = scale.typed_data() + matrix(i, od, sd, axes) * m;
    const float* from = g.typed_data() + matrix(i, od, gd, axes) * m * n;
    float* to = out->typed_data() + i * k * n;
    run(pool, (pairs + 15) / 16, [&](int64_t task) {
      variant->pair_codes(own, m, k, 16 * task, std::min(pairs, 16 * task + 16), words);
    });
    run(pool, (n + wide - 1) / wide, [&](int64_t task) {
      const int64_t c = task * wide;
      variant->grad_weight(words, scales, from + c, m, k, n, std::min(wide, n - c), to + c);
    });
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_ternary_product, TernaryProduct,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("transposed")
                                  .Attr<std::string_view>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_grad_weight, GradWeight,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<std::string_view>("isa"));
