// The two products of native.cpp, written once in GCC's vector types and compiled once a variant.
//
// native.cpp includes this file several times, each time inside a namespace, with that variant's
// instruction set switched on, and these set:
//   VECTOR   bytes of a vector: 16, 32 or 64
//   GROUP    packed rows that one `dot` takes: 2 (sums in int16) or 4 (sums in int32)
//   AT_ONCE  rows of x that share one reading of the codes, as far as the registers go
//   DOT      dot(sums, codes, x) = sums + codes * x, added up over the GROUP neighbouring bytes
//            under each sum; codes are 0 to 15, x is signed: the only intrinsic of a variant
//
// Codes come as the library stores them, so that no second copy of a weight is ever made: byte
// (p, n) holds code + 1 of the inputs 4p .. 4p+3 of output n. In memory the neighbours of a byte
// are other outputs, but a dot instruction adds up neighbours, so it wants the inputs of one output
// there. GROUP packed rows are therefore interleaved, in registers, one instruction a vector.

#ifndef WIDEN
#define WIDEN(piece) __builtin_convertvector(piece, Wide)
#endif
#define INLINE static inline __attribute__((always_inline))

typedef uint8_t Bytes __attribute__((vector_size(VECTOR)));
typedef int16_t Shorts __attribute__((vector_size(VECTOR)));
typedef std::conditional_t<GROUP == 2, int16_t, int32_t> Sum;
typedef std::conditional_t<GROUP == 2, uint16_t, uint32_t> Word;  // GROUP bytes of x, to be spread
typedef Sum Sums __attribute__((vector_size(VECTOR)));
typedef Word Words __attribute__((vector_size(VECTOR)));

INLINE Sums dot(Sums sums, Bytes codes, Bytes x) { DOT }

template <class T>
INLINE T load(const void* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
INLINE void store(void* to, T value) {
  memcpy(to, &value, sizeof value);
}

// Interleaving works within each 128 bits, as the instructions of all these machines do.
#define PAIR(i) i, VECTOR + (i)
#define PAIRS(i) PAIR(i), PAIR(i + 1), PAIR(i + 2), PAIR(i + 3), PAIR(i + 4), PAIR(i + 5), \
                 PAIR(i + 6), PAIR(i + 7)
#define TWO(i) i, i + 1, VECTOR + (i), VECTOR + i + 1
#define TWOS(i) TWO(i), TWO(i + 2), TWO(i + 4), TWO(i + 6)
#if VECTOR == 16
#define LANES(of, i) of(i)
#elif VECTOR == 32
#define LANES(of, i) of(i), of(i + 16)
#else
#define LANES(of, i) of(i), of(i + 16), of(i + 32), of(i + 48)
#endif

// GROUP packed rows -> GROUP vectors in which the GROUP bytes of one output are neighbours. Of each
// 16 outputs, vector q holds the ones from 16 / GROUP * q on.
INLINE void interleave(const uint8_t* const* row, int64_t column, Bytes* part) {
  Bytes a = load<Bytes>(row[0] + column), b = load<Bytes>(row[1] + column);
  Bytes low = SHUFFLE(a, b, LANES(PAIRS, 0)), high = SHUFFLE(a, b, LANES(PAIRS, 8));
#if GROUP == 2
  part[0] = low, part[1] = high;
#else
  Bytes c = load<Bytes>(row[2] + column), d = load<Bytes>(row[3] + column);
  Bytes low2 = SHUFFLE(c, d, LANES(PAIRS, 0)), high2 = SHUFFLE(c, d, LANES(PAIRS, 8));
  part[0] = SHUFFLE(low, low2, LANES(TWOS, 0)), part[1] = SHUFFLE(low, low2, LANES(TWOS, 8));
  part[2] = SHUFFLE(high, high2, LANES(TWOS, 0)), part[3] = SHUFFLE(high, high2, LANES(TWOS, 8));
#endif
}

// ---- Few rows: the codes are read once, at the speed of memory if the arithmetic keeps up --------

// Eight packed rows are read side by side, an eighth of the matrix apart: eight streams, each from
// its first byte to its last, which is what prefetchers follow. (Eight neighbouring rows, whose
// streams break off at every row's end, took 0.35 ms for 4096 x 4096 from memory, these 0.27.)
constexpr int STREAMS = 8;
constexpr int GROUPS = STREAMS / GROUP;
constexpr int64_t AHEAD = 512;  // columns; what was asked for so early has come when it is used

// out[m][0 .. VECTOR) += sum over 32 inputs of (code + 1) * x, for M rows of x.
//
// Inputs 0 and 2 of a byte are masked to code + 1, inputs 1 and 3 to 4 (code + 1), which saves
// their shift: their sums are four times too large, and divided in the end, exactly. No sum leaves
// int16: |4 (code + 1) x| <= 8 * 128, twice a dot, two dots a group, four groups: 2 ** 14.
template <int M>
INLINE void step(const uint8_t* const* row, int64_t column, int64_t ahead,
                 const Words (*x)[GROUPS][4], int32_t* out, int64_t stride) {
  Sums ones[M][GROUP] = {}, fours[M][GROUP] = {};
#pragma GCC unroll 8
  for (int g = 0; g < GROUPS; g++) {
    Bytes part[GROUP];
    interleave(row + g * GROUP, column, part);
    if (VECTOR == 64 || column % 64 == 0)  // once a cache line
      for (int i = 0; i < GROUP; i++) __builtin_prefetch(row[g * GROUP + i] + ahead);
#pragma GCC unroll 2
    for (int j = 0; j < 4; j += 2) {
      Bytes one[GROUP], four[GROUP];
#pragma GCC unroll 8
      for (int q = 0; q < GROUP; q++) {
        one[q] = part[q] & 3, four[q] = part[q] & 12;
        // What the 16-bit shift moves across bytes stays above bit 3, where the masks drop it.
        part[q] = (Bytes)((Shorts)part[q] >> 4);
      }
#pragma GCC unroll 2
      for (int m = 0; m < M; m++) {
        const Bytes x1 = (Bytes)x[m][g][j], x4 = (Bytes)x[m][g][j + 1];
#pragma GCC unroll 8
        for (int q = 0; q < GROUP; q++) {
          ones[m][q] = dot(ones[m][q], one[q], x1);
          fours[m][q] = dot(fours[m][q], four[q], x4);
        }
      }
    }
  }
  constexpr int PIECE = 16 / GROUP;  // neighbouring outputs in one part
  typedef Sum Piece __attribute__((vector_size(PIECE * sizeof(Sum))));
  typedef int32_t Wide __attribute__((vector_size(PIECE * 4)));
#pragma GCC unroll 2
  for (int m = 0; m < M; m++) {
    Sum sums[GROUP][VECTOR / GROUP];
    for (int q = 0; q < GROUP; q++) store(sums[q], ones[m][q] + (fours[m][q] >> 2));
#pragma GCC unroll 16
    for (int i = 0; i < VECTOR / PIECE; i++) {
      Piece piece = load<Piece>(&sums[i % GROUP][i / GROUP * PIECE]);
      int32_t* at = out + m * stride + i * PIECE;
      store(at, load<Wide>(at) + WIDEN(piece));
    }
  }
}

// The last columns, fewer than a vector: the same step on copies with room to spare.
template <int M>
static void last_step(const uint8_t* const* row, int64_t column, int64_t columns,
                      const Words (*x)[GROUPS][4], int32_t* out, int64_t stride) {
  uint8_t codes[STREAMS][VECTOR] = {};
  int32_t sums[M][VECTOR] = {};
  const uint8_t* copy[STREAMS];
  for (int i = 0; i < STREAMS; i++) {
    memcpy(codes[i], row[i] + column, columns);
    copy[i] = codes[i];
  }
  step<M>(copy, 0, 0, x, &sums[0][0], VECTOR);
  for (int m = 0; m < M; m++)
    for (int64_t i = 0; i < columns; i++) out[m * stride + i] += sums[m][i];
}

// Bring x to the order of the dots: [row][block][group][input of a byte] words, 0 where inputs end;
// and start the sums at -(sum of x), because the codes are stored one too large.
static void arrange(const int8_t* x, int64_t rows, int64_t k, int64_t blocks, int64_t columns,
                    Word* words, int32_t* out, int64_t stride) {
  int8_t* to = (int8_t*)words;
  for (int64_t m = 0; m < rows; m++, x += k) {
    for (int64_t block = 0; block < blocks; block++)
      for (int g = 0; g < GROUPS; g++)
        for (int j = 0; j < 4; j++)
          for (int i = 0; i < GROUP; i++) {
            int64_t input = 4 * ((g * GROUP + i) * blocks + block) + j;
            *to++ = input < k ? x[input] : 0;
          }
    std::fill_n(out + m * stride, columns, -std::accumulate(x, x + k, int32_t(0)));
  }
}

// out (rows, columns) = x (rows, k) @ codes (k, columns); codes and out lie in matrices n wide.
static void few(const int8_t* x, int64_t rows, int64_t k, const uint8_t* codes, int64_t n,
                int64_t columns, int32_t* out) {
  const int64_t packed = (k + 3) / 4, blocks = (packed + STREAMS - 1) / STREAMS;
  static thread_local std::vector<Word> words;
  words.resize(rows * blocks * GROUPS * 4);
  arrange(x, rows, k, blocks, columns, words.data(), out, n);
  Words spread[FEW][GROUPS][4];
  for (int64_t block = 0; block < blocks; block++) {
    const uint8_t* row[STREAMS];  // past the end any row will do: its x are 0
    for (int i = 0; i < STREAMS; i++)
      row[i] = codes + std::min(i * blocks + block, packed - 1) * n;
    for (int64_t m = 0; m < rows; m++)
      for (int g = 0; g < GROUPS; g++)
        for (int j = 0; j < 4; j++)
          spread[m][g][j] = Words{} + words[((m * blocks + block) * GROUPS + g) * 4 + j];
    int64_t c = 0;
    for (; c + VECTOR <= columns; c += VECTOR) {
      // At the end of a strip the stream goes on in its next row.
      int64_t ahead = c + AHEAD < columns ? c + AHEAD : c + AHEAD - columns + n, m = 0;
      for (; m + AT_ONCE <= rows; m += AT_ONCE)
        step<AT_ONCE>(row, c, ahead, spread + m, out + m * n + c, n);
      for (; m < rows; m++) step<1>(row, c, ahead, spread + m, out + m * n + c, n);
    }
    if (c < columns)
      for (int64_t m = 0; m < rows; m++)
        last_step<1>(row, c, columns - c, spread + m, out + m * n + c, n);
  }
}

// ---- Many rows: sums of four inputs are looked up ------------------------------------------------

// Four ternary codes have 81 values. For MANY rows of x and four inputs, all 81 sums are computed
// once (one addition each) and serve every output: its byte chooses which of them is added. That is
// one addition for four products, where a multiplication of bytes needs two instructions for two,
// and it is plain C++ that any compiler turns into vectors.
constexpr int PER_ROW = VECTOR / 2;        // rows of x in a vector of int16
constexpr int PARTS = MANY / PER_ROW;      // vectors that hold one sum for MANY rows
constexpr int TABLES = 4;                  // packed rows at once: their tables fit the L1 cache
constexpr int INPUTS = 4 * TABLES;
// A byte of a damaged weight may hold a code of 3, and point at most 40 sums past its table.
constexpr int ENTRIES = 81 * TABLES + 40;

// Base 4 to base 3: code + 1 of four inputs -> which of the 81 sums.
static void indices(const uint8_t* codes, int64_t columns, uint8_t* index) {
  for (int64_t i = 0; i < columns; i++) {
    uint8_t even = codes[i] & 0x33, odd = codes[i] >> 2 & 0x33, nines = even + 3 * odd;
    index[i] = (nines & 15) + 9 * (nines >> 4);
  }
}

// tables[t][i] = sum over the four inputs of packed row t of (digit of i - 1) * x.
static void fill_tables(const int16_t (*x)[MANY], int16_t (*tables)[MANY]) {
  for (int t = 0; t < TABLES; t++, x += 4, tables += 81)
    for (int part = 0; part < MANY; part += PER_ROW) {
      Shorts times[4][3], first[9], last[9];  // an input times -1, 0 and 1; pairs of them
      for (int j = 0; j < 4; j++) {
        times[j][2] = load<Shorts>(x[j] + part);
        times[j][1] = Shorts{}, times[j][0] = -times[j][2];
      }
      for (int i = 0; i < 9; i++) {
        first[i] = times[0][i % 3] + times[1][i / 3];
        last[i] = times[2][i % 3] + times[3][i / 3];
      }
#pragma GCC unroll 9
      for (int i = 0; i < 9; i++)
#pragma GCC unroll 9
        for (int j = 0; j < 9; j++) store(tables[9 * i + j] + part, last[i] + first[j]);
    }
}

// sums[c] += the sum that output c's byte chooses, over TABLES packed rows.
static void look_up(const int16_t (*tables)[MANY], const uint8_t* index, int64_t columns,
                    int16_t* sums) {
  for (int64_t c = 0; c < columns; c++, sums += MANY) {
    Shorts sum[PARTS];
    for (int part = 0; part < PARTS; part++) sum[part] = load<Shorts>(sums + part * PER_ROW);
#pragma GCC unroll 4
    for (int t = 0; t < TABLES; t++) {
      const int16_t* entry = tables[81 * t + (size_t)index[t * columns + c]];
      for (int part = 0; part < PARTS; part++) sum[part] += load<Shorts>(entry + part * PER_ROW);
    }
    for (int part = 0; part < PARTS; part++) store(sums + part * PER_ROW, sum[part]);
  }
}

// x[r][0 .. INPUTS) of up to MANY rows to inputs[i][r], 0 where rows or inputs end. Returns whether
// the int16 sums may overflow by these inputs: `size` bounds each row's by what it has met so far.
static bool take_inputs(const int8_t* x, int64_t rows, int64_t k, int64_t left,
                        int16_t (*inputs)[MANY], int32_t* size) {
  memset(inputs, 0, sizeof(int16_t) * INPUTS * MANY);
  int32_t most = 0;
  for (int64_t r = 0; r < rows; r++, x += k) {
    for (int64_t i = 0; i < std::min<int64_t>(INPUTS, left); i++) {
      inputs[i][r] = x[i];
      size[r] += std::abs(x[i]);
    }
    most = std::max(most, size[r]);
  }
  return most > 32767;
}

static void widen(int16_t* sums, int64_t count, int32_t* wide) {
  for (int64_t i = 0; i < count; i++) wide[i] += sums[i];
  memset(sums, 0, count * sizeof *sums);
}

// As `few`, for up to MANY rows.
static void many(const int8_t* x, int64_t rows, int64_t k, const uint8_t* codes, int64_t n,
                 int64_t columns, int32_t* out) {
  static thread_local std::vector<int32_t> wide;
  static thread_local std::vector<int16_t> narrow;
  static thread_local std::vector<uint8_t> index;
  alignas(64) int16_t inputs[INPUTS][MANY], tables[ENTRIES][MANY] = {};
  int32_t size[MANY] = {};
  const int64_t count = columns * MANY, packed = (k + 3) / 4;
  wide.assign(count, 0), narrow.assign(count, 0), index.resize(TABLES * columns);
  for (int64_t p = 0; p < packed; p += TABLES) {
    int32_t before[MANY];
    memcpy(before, size, sizeof size);
    // Small activations, which most are, are widened rarely: only when an overflow is possible.
    if (take_inputs(x + 4 * p, rows, k, k - 4 * p, inputs, size)) {
      widen(narrow.data(), count, wide.data());
      for (int r = 0; r < MANY; r++) size[r] -= before[r];
    }
    fill_tables(inputs, tables);
    for (int t = 0; t < TABLES; t++)  // past the end any row will do: its x are 0
      indices(codes + std::min(p + t, packed - 1) * n, columns, &index[t * columns]);
    look_up(tables, index.data(), columns, narrow.data());
  }
  widen(narrow.data(), count, wide.data());
  for (int64_t c = 0; c < columns; c += 16)  // 16 at a time: both sides stay in the L1 cache
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = c; i < std::min(columns, c + 16); i++) out[r * n + i] = wide[i * MANY + r];
}

#undef INLINE
#undef PAIR
#undef PAIRS
#undef TWO
#undef TWOS
#undef LANES
#undef VECTOR
#undef GROUP
#undef AT_ONCE
#undef DOT
#undef WIDEN
