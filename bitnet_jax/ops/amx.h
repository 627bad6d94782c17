// The product for more than a few rows on CPUs with AMX, whose tiles multiply 16 x 64 by 64 x 16
// bytes an instruction. native.cpp includes this file inside a namespace.
//
// A row of a tile of weights holds 16 outputs, the four inputs of each as neighbours. A packed byte
// holds four inputs of one output too, so 16 packed bytes, each spread over four, are such a row and
// nothing need be interleaved. Codes stay one too large, for which the sum of x is taken off.

constexpr int SIDE = 16, CHUNK = 64;      // rows and columns of a tile; its inputs
constexpr int TILE = SIDE * CHUNK;        // bytes
constexpr int WIDTH = 64;                 // columns at once: a cache line of packed bytes
constexpr int DEPTH = 8;                  // chunks at once: their tiles of weights are 32 KB, for L1

struct Tiles {  // as the CPU reads it: all eight of them 16 rows of 64 bytes
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The intrinsics do not tell the compiler that they read memory (nor GCC 12's that a configuration
// is more than 8 bytes).
#define WRITTEN asm volatile("" ::: "memory")

// CPUID's word, and Linux's permission, which a process must ask for.
static bool allowed() {
  unsigned a, b, c, d;
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1) &&
         syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// x (rows, k) -> [chunk][tile of rows][16][64], 0 where rows or inputs end; and the sums of rows.
static void take_rows(const int8_t* x, int64_t rows, int64_t k, int64_t chunks, int64_t tiles,
                      int8_t* to, int32_t* sums) {
  for (int64_t m = 0; m < tiles * SIDE; m++) {
    __m512i sum = {};
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const int64_t left = m < rows ? std::min<int64_t>(k - chunk * CHUNK, CHUNK) : 0;
      const __mmask64 mask = left == CHUNK ? ~0ull : (1ull << left) - 1;
      const __m512i part = _mm512_maskz_loadu_epi8(mask, x + m * k + chunk * CHUNK);
      _mm512_store_si512(to + (chunk * tiles + m / SIDE) * TILE + m % SIDE * CHUNK, part);
      // Unsigned bytes of 1 times x: four products a sum.
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), part);
    }
    sums[m] = _mm512_reduce_add_epi32(sum);
  }
}

// Packed rows from `p` on, up to WIDTH columns -> [chunk][4 tiles][16][64] bytes of code + 1.
static void spread(const uint8_t* codes, int64_t n, int64_t p, int64_t packed, int64_t columns,
                   int64_t depth, uint8_t* to) {
  const __m512i two_bits = _mm512_set1_epi8(3);
  __mmask16 mask[WIDTH / SIDE];
  for (int i = 0; i < WIDTH / SIDE; i++)
    mask[i] = (1u << std::clamp<int64_t>(columns - i * SIDE, 0, SIDE)) - 1;
  for (int64_t row = 0; row < depth * SIDE; row++) {
    // Past the end any row will do: its x are 0.
    const uint8_t* from = codes + std::min(p + row, packed - 1) * n;
    _mm_prefetch((const char*)(codes + std::min(p + row + DEPTH * SIDE, packed - 1) * n),
                 _MM_HINT_T0);
    uint8_t* tile = to + row / SIDE * (WIDTH / SIDE) * TILE + row % SIDE * CHUNK;
#pragma GCC unroll 4
    for (int i = 0; i < WIDTH / SIDE; i++) {
      // Bits 0-7 to 0-7 and 12-19, then those to 6 bits further too: bits 0-1, 8-9, 16-17, 24-25.
      __m512i word = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask[i], from + i * SIDE));
      word = _mm512_or_si512(word, _mm512_slli_epi32(word, 12));
      word = _mm512_and_si512(_mm512_or_si512(word, _mm512_slli_epi32(word, 6)), two_bits);
      _mm512_store_si512(tile + i * TILE, word);
    }
  }
}

// sums (R tiles of rows, 32 of WIDTH columns) += x * codes, over `depth` chunks.
template <int R>
static void multiply(const int8_t* x, int64_t stride, const uint8_t* codes, int64_t depth,
                     int32_t* sums) {
  constexpr int ROW = WIDTH * sizeof(int32_t);
  _tile_loadd(0, sums, ROW);
  _tile_loadd(1, sums + SIDE, ROW);
  if (R == 2) {
    _tile_loadd(2, sums + SIDE * WIDTH, ROW);
    _tile_loadd(3, sums + SIDE * WIDTH + SIDE, ROW);
  }
  for (int64_t i = 0; i < depth; i++, x += stride, codes += WIDTH / SIDE * TILE) {
    _tile_loadd(6, codes, CHUNK);
    _tile_loadd(4, x, CHUNK);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, codes + TILE, CHUNK);
    _tile_dpbsud(1, 4, 7);
    if (R == 2) {
      _tile_loadd(5, x + TILE, CHUNK);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, sums, ROW);
  _tile_stored(1, sums + SIDE, ROW);
  if (R == 2) {
    _tile_stored(2, sums + SIDE * WIDTH, ROW);
    _tile_stored(3, sums + SIDE * WIDTH + SIDE, ROW);
  }
}

// out (rows, columns) = x (rows, k) @ codes (k, columns); codes and out lie in matrices n wide.
static void many(const int8_t* x, int64_t rows, int64_t k, const uint8_t* codes, int64_t n,
                 int64_t columns, int32_t* out) {
  const int64_t packed = (k + 3) / 4, chunks = (k + CHUNK - 1) / CHUNK;
  const int64_t tiles = (rows + SIDE - 1) / SIDE;
  static thread_local std::vector<int8_t> room;
  room.resize(chunks * tiles * TILE + 64);
  int8_t* inputs = room.data() + (-(uintptr_t)room.data() & 63);
  alignas(64) uint8_t weights[DEPTH * WIDTH / SIDE * TILE];
  alignas(64) int32_t sums[MANY][WIDTH], sum_of_x[MANY];
  take_rows(x, rows, k, chunks, tiles, inputs, sum_of_x);
  const Tiles shape;
  asm volatile("ldtilecfg %0" ::"m"(shape));
  for (int64_t c = 0; c < columns; c += WIDTH) {
    memset(sums, 0, tiles * SIDE * sizeof *sums);
    for (int64_t chunk = 0; chunk < chunks; chunk += DEPTH) {
      const int64_t depth = std::min<int64_t>(DEPTH, chunks - chunk);
      spread(codes + c, n, chunk * SIDE, packed, columns - c, depth, weights);
      WRITTEN;
      for (int64_t t = 0; t < tiles; t += 2)
        for (int half = 0; half < 2; half++)
          (tiles - t > 1 ? multiply<2> : multiply<1>)(
              inputs + (chunk * tiles + t) * TILE, tiles * TILE, weights + half * 2 * TILE, depth,
              sums[t * SIDE] + half * 2 * SIDE);
    }
    for (int64_t m = 0; m < rows; m++)
      for (int64_t i = 0; i < WIDTH; i += SIDE) {
        const int64_t left = std::clamp<int64_t>(columns - c - i, 0, SIDE);
        const __m512i sum = _mm512_load_si512(&sums[m][i]);
        _mm512_mask_storeu_epi32(out + m * n + c + i, __mmask16((1u << left) - 1),
                                 _mm512_sub_epi32(sum, _mm512_set1_epi32(sum_of_x[m])));
      }
  }
  _tile_release();
}

#undef WRITTEN
