// The product of int8 activations and packed ternary codes on the CPU, as an XLA FFI op.
//
//   out[b, m, n] = sum over k of x[b, m, k] * code[index[b], k, n]
//
// in int32, exact. The arithmetic is in native_kernels.h, and for AMX in amx.h; here it is compiled
// once for each instruction set (a variant), the work is cut into tasks, and the op is bound.
// Compiled at first use, see build.py, with the headers of the jaxlib that will load it.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string_view>
#include <type_traits>
#include <vector>

#include "tasks.h"
#include "variants.h"
#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

namespace ffi = xla::ffi;

constexpr int FEW = 16;       // at most so many rows read the codes directly
constexpr int SUMS = 131072;  // and rows times columns of a task then: the sums stay in the L2 cache
constexpr int MANY = 128;     // rows of a task above that
// And at most so many columns: their sums, 704 KB, fit an L2 cache of 1 MB, as CPUs with AVX512 have;
// other variants take half as many, for 512 KB.
constexpr int MOST_COLUMNS = 2816;
constexpr int TURN = 128;     // and inputs turned at once: whole cache lines of every row

// ---- Variants ------------------------------------------------------------------------------------

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Bytes){__VA_ARGS__})
#endif

// Compilers turn a chain of additions into a tree, which spills; this keeps the chain.
#if defined(__x86_64__)
#define KEEP(vector) asm("" : "+v"(vector))
#elif defined(__aarch64__)
#define KEEP(vector) asm("" : "+w"(vector))
#else
#define KEEP(vector)
#endif

// What a thread keeps for products of many rows.
struct Scratch {
  alignas(64) uint16_t index[8 * (MOST_COLUMNS + 32)];
  alignas(64) int16_t sums[MANY * MOST_COLUMNS];
  alignas(64) int16_t inputs[MANY * TURN];
};

static Scratch& scratch() {
  static thread_local auto mine = std::make_unique<Scratch>();
  return *mine;
}

namespace portable {  // any CPU that C++ runs on: x's two bytes apart, and two int16 products
#define BYTES 16
#define GROUP 2
#define AT_ONCE 2
#define DOT                                                        \
  Shorts both = (Shorts)codes, even = (Shorts)x << 8;              \
  return sums + (both & 255) * (even >> 8) + (both >> 8) * ((Shorts)x >> 8);
#include "native_kernels.h"
}  // namespace portable

#if defined(__x86_64__)

BEGIN("avx2")
namespace avx2 {
#define BYTES 32
#define WIDEN return (Ints8)_mm256_cvtepi16_epi32((__m128i)piece);
// A shift would take the execution units of shuffles, which are short; a multiplication does not.
#define HIGH_HALVES return (Bytes)_mm256_mulhi_epu16((__m256i)codes, _mm256_set1_epi16(1 << 12));
#define ADD_PAIRS return (Shorts)_mm256_maddubs_epi16((__m256i)weights, (__m256i)values);
#define LOOKUP                                                                  \
  return (Bytes)_mm256_shuffle_epi8(                                            \
      _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table)), (__m256i)index);
#include "native_kernels.h"
}  // namespace avx2
END

#if __GNUC__ >= 11 || __clang_major__ >= 12
#define HAS_AVXVNNI
BEGIN("avx2,avxvnni")
namespace avxvnni {
#define BYTES 32
#define GROUP 4
#define AT_ONCE 1
#define WIDEN return (Ints8)_mm256_cvtepi16_epi32((__m128i)piece);
#define DOT return (Sums)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, (__m256i)x);
#include "native_kernels.h"
}  // namespace avxvnni
END
#endif

BEGIN("avx512f,avx512bw,avx512vl,avx512vnni")
namespace avx512vnni {
#define BYTES 64
#define GROUP 4
#define AT_ONCE 2
#define WIDEN return (Ints8)_mm256_cvtepi16_epi32((__m128i)piece);
#define DOT return (Sums)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, (__m512i)x);
#include "native_kernels.h"
}  // namespace avx512vnni
END

BEGIN("avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,gfni")
namespace avx512vbmi {
#define BYTES 64
#define WIDEN return (Ints8)_mm256_cvtepi16_epi32((__m128i)piece);
#define ADD_PAIRS return (Shorts)_mm512_maddubs_epi16((__m512i)weights, (__m512i)values);
#define PERMUTE return (Bytes)_mm512_permutexvar_epi8((__m512i)index, (__m512i)table);
#define TO_BYTES return (Bytes)_mm512_packs_epi16((__m512i)a, (__m512i)b);
#define MOVE_BITS \
  return (Bytes)_mm512_gf2p8affine_epi64_epi8((__m512i)codes, _mm512_set1_epi64(matrix), 0);
#include "native_kernels.h"
}  // namespace avx512vbmi
END

#if defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define HAS_AMX
BEGIN("avx512f,avx512bw,avx512vl,avx512vnni,amx-tile,amx-int8")
namespace amx {
#include "amx.h"
}  // namespace amx
END
#endif

#elif defined(__aarch64__) && defined(__linux__)

BEGIN("arch=armv8.2-a+dotprod")
namespace dotprod {
#define BYTES 16
#define GROUP 4
#define AT_ONCE 2
#define DOT return (Sums)vdotq_s32((int32x4_t)sums, (int8x16_t)codes, (int8x16_t)x);
#include "native_kernels.h"
}  // namespace dotprod
END

#endif

using Product = void(const int8_t* x, int64_t rows, int64_t k, const uint8_t* codes, int64_t n,
                     int64_t columns, int32_t* out);

struct Variant {
  const char* name;
  bool (*runs_here)();
  int directly;  // up to so many rows `few` is faster than `many`; at most FEW
  int columns;   // of a task of many rows
  Product *few, *many;
};

#if defined(__x86_64__)
static bool has_avx512vnni() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

static const Variant kVariants[] = {  // the best first
#if defined(HAS_AMX)
    {"amx", [] { return has_avx512vnni() && amx::allowed(); }, FEW / 2, MOST_COLUMNS / 2,
     avx512vnni::few, amx::many},
#endif
#if defined(__x86_64__)
    {"avx512vbmi",
     [] { return has_avx512vnni() && __builtin_cpu_supports("avx512vbmi") &&
                 __builtin_cpu_supports("gfni"); },
     FEW, avx512vnni::STRIP, avx512vbmi::by_row, avx512vnni::many},
    {"avx512vnni", has_avx512vnni, FEW, avx512vnni::STRIP, avx512vnni::few, avx512vnni::many},
#if defined(HAS_AVXVNNI)
    {"avxvnni",
     [] { unsigned a, b, c, d;  // older compilers do not know it by name
          return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) &&
                 (a >> 4 & 1); },
     FEW, avxvnni::STRIP, avxvnni::few, avxvnni::many},
#endif
    {"avx2", [] { return bool(__builtin_cpu_supports("avx2")); }, FEW / 2, avx2::STRIP, avx2::by_row,
     avx2::many},
#elif defined(__aarch64__) && defined(__linux__)
    {"dotprod", [] { return bool(getauxval(AT_HWCAP) & HWCAP_ASIMDDP); }, FEW, dotprod::STRIP,
     dotprod::few, dotprod::many},
#endif
    {"portable", [] { return true; }, FEW / 2, portable::STRIP, portable::few, portable::many},
};

static const Variant* find(std::string_view name) { return find_in(kVariants, name); }

// ---- What Python asks before it trusts the library -----------------------------------------------

extern "C" const char* bitnet_variant(int i) { return name_in(kVariants, i); }

static bool equals_reference(Product* product, int64_t rows, int64_t k, int64_t n, int sign) {
  const int64_t packed = (k + 3) / 4;
  std::vector<int8_t> x(rows * k);
  std::vector<uint8_t> codes(packed * n);
  std::vector<int32_t> out(rows * n);
  uint32_t random = 1;
  auto draw = [&] { return (random = random * 1664525 + 1013904223) >> 16; };
  // sign: one where every product is as large as it gets, to meet any overflow; 0 for random ones.
  for (auto& value : x) value = sign ? sign * 128 - (sign > 0) : int8_t(draw());
  for (auto& byte : codes)
    for (int j = 0; j < 8; j += 2) byte |= (sign ? 2 : draw() % 3) << j;
  product(x.data(), rows, k, codes.data(), n, n, out.data());
  for (int64_t m = 0; m < rows; m++)
    for (int64_t c = 0; c < n; c++) {
      int32_t sum = 0;
      for (int64_t i = 0; i < k; i++)
        sum += x[m * k + i] * ((codes[i / 4 * n + c] >> i % 4 * 2 & 3) - 1);
      if (sum != out[m * n + c]) return false;
    }
  return true;
}

static bool right(const Variant& variant) {
  bool right = true;
  for (int sign : {0, 1, -1})
    for (int64_t rows : {1, 2, 5, MANY})
      for (int64_t k : {1, 77, 330})
        for (Product* product : {variant.few, variant.many})
          if (rows <= FEW || product == variant.many)
            right = right && equals_reference(product, rows, k, 83, sign);
  return right;
}

// 1 if the named variant computes what it should on this CPU, 0 if not, -1 if it cannot run here.
extern "C" int bitnet_check(const char* name) {
  const Variant* variant = find(name);
  return variant ? right(*variant) : -1;
}

// ---- The op --------------------------------------------------------------------------------------

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

static bool broadcasts(Dims result, Dims operand, size_t axes) {
  for (size_t i = 0; i < axes; i++)
    if (operand[i] != 1 && operand[i] != result[i]) return false;
  return true;
}

static int64_t size(Dims dims, size_t axes) {
  int64_t size = 1;
  for (size_t i = 0; i < axes; i++) size *= dims[i];
  return size;
}

// Columns of a task: at most `most`, whole cache lines, and if they need not be fewer than 256 so
// many that the tasks, of which each column has `others`, can be shared by the threads evenly.
static int64_t strip(int64_t n, int64_t others, int64_t threads, int64_t most) {
  int64_t strips = (n + most - 1) / most;
  while (strips * others % threads && n / (strips + 1) >= 256) strips++;
  return ((n + strips - 1) / strips + 63) / 64 * 64;
}

// Few rows of one matrix, cut by inputs: each thread reads whole rows of codes one after another, and
// its sums are added in the end; they are integers, so in any order the same. (Two threads that read
// half of every row, of 4096 x 4096, took 0.25 ms, one alone 0.22; so they take 0.16.)
static void by_inputs(ffi::ThreadPool& pool, int64_t most, Product* few, const int8_t* x,
                      int64_t rows, int64_t k, const uint8_t* codes, int64_t n, int32_t* out) {
  const int64_t packed = (k + 3) / 4, each = (packed + most - 1) / most * 4;
  const int64_t parts = (k + each - 1) / each;
  static thread_local std::vector<int32_t> memory;  // kept: fresh pages cost as much as the work
  static thread_local std::vector<int8_t> inputs;
  memory.resize((parts - 1) * rows * n);
  inputs.resize(rows * k);
  int32_t* rest = memory.data();
  int8_t* own = inputs.data();
  run(pool, parts, [&](int64_t part) {
    const int64_t from = part * each, count = std::min(k, from + each) - from;
    int8_t* to = own + rows * from;
    for (int64_t m = 0; m < rows; m++) memcpy(to + m * count, x + m * k + from, count);
    few(to, rows, count, codes + from / 4 * n, n, n, part ? rest + (part - 1) * rows * n : out);
  });
  for (int64_t part = 1; part < parts; part++, rest += rows * n)
    for (int64_t i = 0; i < rows * n; i++) out[i] += rest[i];
}

static ffi::Error PackedProduct(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> x,
                                ffi::Buffer<ffi::U8> codes, ffi::Buffer<ffi::S32> index,
                                ffi::Result<ffi::Buffer<ffi::S32>> out, std::string_view isa) {
  const Variant* variant = find(isa);
  if (!variant) return ffi::Error::InvalidArgument("this CPU does not run that variant");
  Dims xd = x.dimensions(), cd = codes.dimensions(), id = index.dimensions();
  Dims od = out->dimensions();
  const size_t axes = id.size();
  if (xd.size() != axes + 2 || cd.size() != axes + 3 || od.size() != axes + 2)
    return ffi::Error::InvalidArgument("x (*b, rows, k), codes (*b, l, k/4, n), index (*b) needed");
  int64_t rows = xd[axes], k = xd[axes + 1], n = cd[axes + 2];
  const int64_t layers = cd[axes], packed = cd[axes + 1];
  int64_t matrices = size(od, axes);
  if (packed != (k + 3) / 4 || od[axes] != rows || od[axes + 1] != n || !broadcasts(od, xd, axes) ||
      !broadcasts(od, cd, axes) || !broadcasts(od, id, axes) || (layers == 0 && matrices))
    return ffi::Error::InvalidArgument("the shapes of x, codes and index do not fit");
  if (rows == 0 || n == 0 || matrices == 0) return ffi::Error::Success();
  if (k == 0) {
    std::fill_n(out->typed_data(), matrices * rows * n, 0);
    return ffi::Error::Success();
  }
  // A batch of x for one matrix, as vmap makes it of single rows, is that many rows.
  const bool one = size(cd, axes) == 1 && size(id, axes) == 1 && size(xd, axes) == matrices;
  if (one) rows *= matrices, matrices = 1;

  const bool direct = rows <= variant->directly;
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t wide = SUMS / rows;
  if (direct && matrices == 1 && n <= wide) {
    // Eight pages of codes are worth a thread.
    const int64_t parts = std::min(threads, packed * n / 32768);
    if (parts > 1) {
      const int64_t layer = std::clamp<int64_t>(index.typed_data()[0], 0, layers - 1);
      by_inputs(pool, parts, variant->few, x.typed_data(), rows, k,
                codes.typed_data() + layer * packed * n, n, out->typed_data());
      return ffi::Error::Success();
    }
  }
  const int64_t blocks = direct ? 1 : (rows + MANY - 1) / MANY, others = matrices * blocks;
  const int64_t height = direct ? rows : ((rows + blocks - 1) / blocks + 31) / 32 * 32;
  const int64_t columns = strip(n, others, threads, direct ? wide : variant->columns);
  const int64_t strips = (n + columns - 1) / columns;
  run(pool, others * strips, [&](int64_t task) {
    const int64_t b = task / strips / blocks, m = task / strips % blocks * height;
    const int64_t first = task % strips * columns;
    int64_t layer = index.typed_data()[one ? 0 : matrix(b, od, id, axes)];
    layer = std::clamp<int64_t>(layer, 0, layers - 1);  // as every index in XLA
    const int64_t weight = (one ? 0 : matrix(b, od, cd, axes)) * layers + layer;
    const int64_t input = one ? 0 : matrix(b, od, xd, axes);
    (direct ? variant->few : variant->many)(
        x.typed_data() + (input * rows + m) * k, std::min(height, rows - m), k,
        codes.typed_data() + weight * packed * n + first, n, std::min(columns, n - first),
        out->typed_data() + (b * rows + m) * n + first);
  });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(bitnet_packed_product, PackedProduct,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<std::string_view>("isa"));
