// The product of int8 activations and 8-bit codes on the CPU, as an XLA FFI op.
//
//   out[m, n] = sum over k of x[m, k] * (code[n, k] - 128),  or code[k, n]
//
// in int32, exact, for the few rows of decoding, where all that counts is to read the codes once.
// It is plain C++ that compilers turn into vectors, compiled once for each instruction set (a
// variant), with the headers of the jaxlib that will load it; see build.py.

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <vector>

#include "tasks.h"
#include "variants.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#define INLINE static inline __attribute__((always_inline))

// ---- Codes (n, k): the bytes of an output are neighbours -----------------------------------------

constexpr int STREAMS = 4;  // outputs read side by side, far apart, which prefetchers follow
constexpr int ROWS = 2;     // rows of x that share one reading: as far as 16 registers go

// out[m][s] = sum over k of x[m][k] * (code[s][k] - 128). Widened to int16, two products are one
// instruction, and no sum of two can overflow: 2 * 255 * 128 < 2 ** 31.
template <int M>
INLINE void dots(const int16_t* x, const int32_t* total, int64_t k, const uint8_t* code,
                 int64_t apart, int32_t* out, int64_t stride, int64_t out_apart) {
  int32_t sums[M][STREAMS] = {};
  for (int64_t i = 0; i < k; i++)
#pragma GCC unroll 4
    for (int s = 0; s < STREAMS; s++)
#pragma GCC unroll 2
      for (int m = 0; m < M; m++) sums[m][s] += int16_t(code[s * apart + i]) * x[m * k + i];
  for (int m = 0; m < M; m++)
    for (int s = 0; s < STREAMS; s++) out[m * stride + s * out_apart] = sums[m][s] - 128 * total[m];
}

INLINE void along(const int16_t* x, const int32_t* total, int64_t rows, int64_t k,
                  const uint8_t* codes, int64_t n, int64_t first, int64_t count, int32_t* out) {
  const int64_t apart = count / STREAMS;
  for (int64_t i = 0; i < apart; i++) {
    const uint8_t* code = codes + (first + i) * k;
    int64_t m = 0;
    for (; m + ROWS <= rows; m += ROWS)
      dots<ROWS>(x + m * k, total + m, k, code, apart * k, out + m * n + first + i, n, apart);
    if (m < rows)
      dots<1>(x + m * k, total + m, k, code, apart * k, out + m * n + first + i, n, apart);
  }
  for (int64_t i = apart * STREAMS; i < count; i++)  // the last outputs, fewer than the streams
    for (int64_t m = 0; m < rows; m++) {
      int32_t sum = 0;
      for (int64_t j = 0; j < k; j++) sum += int16_t(codes[(first + i) * k + j]) * x[m * k + j];
      out[m * n + first + i] = sum - 128 * total[m];
    }
}

// ---- Codes (k, n): the bytes of an output are a row apart ----------------------------------------

constexpr int TOGETHER = 8;  // rows of codes for which a sum is loaded and stored once

// out[0 .. count) += sum over TOGETHER rows of x * code. Sums of two products fit int16, for codes
// are at most 127: 2 * 127 * 128 < 2 ** 15.
INLINE void add_rows(const int16_t* x, const uint8_t* const* code, int64_t count, int32_t* out) {
  for (int64_t i = 0; i < count; i++) {
    int32_t sum = out[i];
#pragma GCC unroll 4
    for (int j = 0; j < TOGETHER; j += 2)
      sum += int16_t(int16_t(int8_t(code[j][i] ^ 128)) * x[j] +
                     int16_t(int8_t(code[j + 1][i] ^ 128)) * x[j + 1]);
    out[i] = sum;
  }
}

INLINE void across(const int16_t* x, int64_t rows, int64_t k, const uint8_t* codes, int64_t n,
                   int64_t first, int64_t count, int32_t* out) {
  for (int64_t m = 0; m < rows; m++) std::fill_n(out + m * n + first, count, 0);
  for (int64_t i = 0; i < k; i += TOGETHER)
    for (int64_t m = 0; m < rows; m++) {
      int16_t inputs[TOGETHER] = {};  // past the end any row will do: its x are 0
      const uint8_t* code[TOGETHER];
      for (int64_t j = 0; j < TOGETHER; j++) {
        if (i + j < k) inputs[j] = x[m * k + i + j];
        code[j] = codes + std::min(i + j, k - 1) * n + first;
      }
      add_rows(inputs, code, count, out + m * n + first);
    }
}

// ---- Variants ------------------------------------------------------------------------------------

// Outputs first .. first + count of all rows; codes are (n, k) if `table`, else (k, n).
using Product = void(const int8_t* x, int64_t rows, int64_t k, const uint8_t* codes, int64_t n,
                     bool table, int64_t first, int64_t count, int32_t* out);

INLINE void product(const int8_t* x, int64_t rows, int64_t k, const uint8_t* codes, int64_t n,
                    bool table, int64_t first, int64_t count, int32_t* out) {
  static thread_local std::vector<int16_t> wide;
  static thread_local std::vector<int32_t> total;
  wide.assign(x, x + rows * k), total.assign(rows, 0);
  for (int64_t m = 0; m < rows; m++)
    for (int64_t i = 0; i < k; i++) total[m] += x[m * k + i];
  if (table) along(wide.data(), total.data(), rows, k, codes, n, first, count, out);
  else across(wide.data(), rows, k, codes, n, first, count, out);
}

#define VARIANT(name, ...)                                                                      \
  __VA_ARGS__ static void name(const int8_t* x, int64_t rows, int64_t k, const uint8_t* codes, \
                               int64_t n, bool table, int64_t first, int64_t count,            \
                               int32_t* out) {                                                 \
    product(x, rows, k, codes, n, table, first, count, out);                                   \
  }

VARIANT(portable, )
#if defined(__x86_64__)
VARIANT(avx2, __attribute__((target("avx2"))))
VARIANT(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,prefer-vector-width=512"))))
#endif

struct Variant {
  const char* name;
  bool (*runs_here)();
  Product* product;
};

static const Variant kVariants[] = {  // the best first
#if defined(__x86_64__)
    {"avx512",
     [] { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl"); },
     avx512},
    {"avx2", [] { return bool(__builtin_cpu_supports("avx2")); }, avx2},
#endif
    {"portable", [] { return true; }, portable},
};

static const Variant* find(std::string_view name) { return find_in(kVariants, name); }

// ---- What Python asks before it trusts the library -----------------------------------------------

extern "C" const char* bitnet_variant(int i) { return name_in(kVariants, i); }

static bool equals_reference(Product* product, int64_t rows, int64_t k, bool table, int sign) {
  const int64_t n = 83, first = 3, count = 77;
  std::vector<int8_t> x(rows * k);
  std::vector<uint8_t> codes(k * n);
  std::vector<int32_t> out(rows * n);
  uint32_t random = 1;
  auto draw = [&] { return (random = random * 1664525 + 1013904223) >> 16; };
  // sign: one where every product is as large as it gets, to meet any overflow; 0 for random ones.
  for (auto& value : x) value = sign ? sign * 128 - (sign > 0) : int8_t(draw());
  for (auto& code : codes) code = sign ? 255 : 1 + draw() % 255;
  product(x.data(), rows, k, codes.data(), n, table, first, count, out.data());
  for (int64_t m = 0; m < rows; m++)
    for (int64_t c = first; c < first + count; c++) {
      int32_t sum = 0;
      for (int64_t i = 0; i < k; i++)
        sum += x[m * k + i] * (codes[table ? c * k + i : i * n + c] - 128);
      if (sum != out[m * n + c]) return false;
    }
  return true;
}

// 1 if the named variant computes what it should on this CPU, 0 if not, -1 if it cannot run here.
extern "C" int bitnet_check(const char* name) {
  const Variant* variant = find(name);
  if (!variant) return -1;
  bool right = true;
  for (int sign : {0, 1, -1})
    for (int64_t rows : {1, 2, 5})
      for (int64_t k : {1, 77, 330})
        for (bool table : {false, true})
          right = right && equals_reference(variant->product, rows, k, table, sign);
  return right;
}

// ---- The op --------------------------------------------------------------------------------------

// Outputs of a task: whole cache lines, at least enough to be worth a thread.
static int64_t strip(int64_t n, int64_t threads, int64_t most) {
  int64_t count = std::min(most, std::max<int64_t>(64, (n + threads - 1) / threads));
  return (count + 63) / 64 * 64;
}

static ffi::Error Int8Product(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> x,
                              ffi::Buffer<ffi::U8> codes, ffi::Result<ffi::Buffer<ffi::S32>> out,
                              std::string_view isa, bool table) {
  const Variant* variant = find(isa);
  if (!variant) return ffi::Error::InvalidArgument("this CPU does not run that variant");
  auto xd = x.dimensions(), cd = codes.dimensions(), od = out->dimensions();
  if (xd.size() != 2 || cd.size() != 2 || od.size() != 2 || xd[1] != cd[table] ||
      od[0] != xd[0] || od[1] != cd[!table])
    return ffi::Error::InvalidArgument("the shapes of x and codes do not fit");
  const int64_t rows = xd[0], k = xd[1], n = od[1];
  if (rows == 0 || n == 0) return ffi::Error::Success();
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t count = strip(n, threads, table ? n : 4096);
  run(pool, (n + count - 1) / count, [&](int64_t task) {
    const int64_t first = task * count;
    variant->product(x.typed_data(), rows, k, codes.typed_data(), n, table, first,
                     std::min(count, n - first), out->typed_data());
  });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_int8_product, Int8Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<std::string_view>("isa")
                                  .Attr<bool>("table"));
