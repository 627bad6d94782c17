// The two products of native.cpp, written once in GCC's vector types and compiled once a variant.
//
// native.cpp includes this file several times, each time inside a namespace, with that variant's
// instruction set switched on, BYTES of a vector (16, 32 or 64) set, and for few rows what by_row.h
// asks for, or these:
//   GROUP    packed rows that one `dot` takes: 2 (sums in int16) or 4 (sums in int32)
//   AT_ONCE  rows of x that share one reading of the codes, as far as the registers go
//   DOT      dot(sums, codes, x) = sums + codes * x, added up over the GROUP neighbouring bytes
//            under each sum; codes are 0 to 15, x is signed: the only intrinsic of a variant
//
// Codes come as the library stores them, so that no second copy of a weight is ever made: byte
// (p, n) holds code + 1 of the inputs 4p .. 4p+3 of output n. In memory the neighbours of a byte
// are other outputs, but a dot instruction adds up neighbours, so it wants the inputs of one output
// there. GROUP packed rows are therefore interleaved, in registers, one instruction a vector.

#include "lookup.h"

#define MEMBER inline __attribute__((always_inline))

typedef uint8_t Bytes __attribute__((vector_size(BYTES)));
typedef int16_t Shorts __attribute__((vector_size(BYTES)));

// Interleaving works within each 128 bits, as the instructions of all these machines do.
#define PAIR(i) i, BYTES + (i)
#define PAIRS(i) PAIR(i), PAIR(i + 1), PAIR(i + 2), PAIR(i + 3), PAIR(i + 4), PAIR(i + 5), \
                 PAIR(i + 6), PAIR(i + 7)
#define TWO(i) i, i + 1, BYTES + (i), BYTES + i + 1
#define TWOS(i) TWO(i), TWO(i + 2), TWO(i + 4), TWO(i + 6)
#if BYTES == 16
#define LANES(of, i) of(i)
#elif BYTES == 32
#define LANES(of, i) of(i), of(i + 16)
#else
#define LANES(of, i) of(i), of(i + 16), of(i + 32), of(i + 48)
#endif

#if defined(LOOKUP) || defined(PERMUTE)
#include "by_row.h"
#endif

#ifdef DOT  // where there is none, few rows are `by_row`
// ---- Few rows: the codes are read once, at the speed of memory if the arithmetic keeps up --------

typedef std::conditional_t<GROUP == 2, int16_t, int32_t> Sum;
typedef std::conditional_t<GROUP == 2, uint16_t, uint32_t> Word;  // GROUP bytes of x, to be spread
typedef Sum Sums __attribute__((vector_size(BYTES)));
typedef Word Words __attribute__((vector_size(BYTES)));

typedef int32_t Ints4 __attribute__((vector_size(16)));

INLINE Ints4 widen(Ints4 piece) { return piece; }
INLINE Sums dot(Sums sums, Bytes codes, Bytes x) { DOT }

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

// Eight packed rows are read side by side, an eighth of the matrix apart: eight streams, each from
// its first byte to its last, which is what prefetchers follow. (Eight neighbouring rows, whose
// streams break off at every row's end, took 0.35 ms for 4096 x 4096 from memory, these 0.27.)
constexpr int STREAMS = 8;
constexpr int GROUPS = STREAMS / GROUP;
constexpr int64_t AHEAD = 256;  // columns; what was asked for so early has come when it is used

// out[m][0 .. BYTES) += sum over 32 inputs of (code + 1) * x, for M rows of x.
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
    if (BYTES == 64 || column % 64 == 0)  // once a cache line
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
#pragma GCC unroll 2
  for (int m = 0; m < M; m++) {
    Sum sums[GROUP][BYTES / GROUP];
    for (int q = 0; q < GROUP; q++) store(sums[q], ones[m][q] + (fours[m][q] >> 2));
#pragma GCC unroll 16
    for (int i = 0; i < BYTES / PIECE; i++) {
      Piece piece = load<Piece>(&sums[i % GROUP][i / GROUP * PIECE]);
      int32_t* at = out + m * stride + i * PIECE;
      auto wide = widen(piece);
      store(at, load<decltype(wide)>(at) + wide);
    }
  }
}

// The last columns, fewer than a vector: the same step on copies with room to spare.
template <int M>
static void last_step(const uint8_t* const* row, int64_t column, int64_t columns,
                      const Words (*x)[GROUPS][4], int32_t* out, int64_t stride) {
  uint8_t codes[STREAMS][BYTES] = {};
  int32_t sums[M][BYTES] = {};
  const uint8_t* copy[STREAMS];
  for (int i = 0; i < STREAMS; i++) {
    memcpy(codes[i], row[i] + column, columns);
    copy[i] = codes[i];
  }
  step<M>(copy, 0, 0, x, &sums[0][0], BYTES);
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
    for (; c + BYTES <= columns; c += BYTES) {
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
#endif  // DOT

// ---- Many rows: sums of four inputs are looked up ------------------------------------------------

// See lookup.h; a byte of codes, four inputs, chooses the sum. Eight tables are 20 KB, for the L1 cache;
// with 32 rows they are 41 KB, and yet faster on Zen 4 (L1 of 32 KB) than four or six, whose sums are
// read and written more often: a store of 64 bytes takes two cycles there.
constexpr int HEIGHT = BYTES == 64 ? 32 : 16;       // rows of x that share a table
constexpr int TABLES = 8;                           // packed rows at once
constexpr int INPUTS = 4 * TABLES;
constexpr int STRIP = BYTES == 64 ? MOST_COLUMNS : MOST_COLUMNS / 2;  // columns of a task
static_assert(TURN % INPUTS == 0);
constexpr int SPAN = 256;        // columns looked up before more of the next codes are asked for
constexpr int BLOCKS = MANY / HEIGHT;
constexpr int ROW = STRIP + 32;  // of indices: no power of two, whose lines would share a cache set
// A byte of a damaged weight may hold a code of 3, and point at most 40 sums past its table.
constexpr int ENTRIES = 81 * TABLES + 40;

// Base 4 to base 3, c0 + 4 c1 + 16 c2 + 64 c3 -> c0 + 3 c1 + 9 c2 + 27 c3: which of the 81 sums, as
// its distance from the table's first in bytes.
static void indices(const uint8_t* codes, int64_t columns, uint16_t* index) {
  for (int64_t i = 0; i < columns; i++) {
    uint16_t code = codes[i], nines = code - (code >> 2 & 0x33);
    index[i] = uint16_t(nines - 7 * (nines >> 4)) * uint16_t(2 * HEIGHT);
  }
}

// As `few`, for up to MANY rows and STRIP columns: the indices serve all rows.
static void many(const int8_t* x, int64_t rows, int64_t k, const uint8_t* codes, int64_t n,
                 int64_t columns, int32_t* out) {
  auto index = (uint16_t(*)[ROW])scratch().index;         // [TABLES][ROW]
  auto sums = (int16_t(*)[STRIP][HEIGHT])scratch().sums;  // [BLOCKS][STRIP][HEIGHT]
  auto turned = (int16_t(*)[TURN][HEIGHT])scratch().inputs;  // [BLOCKS][TURN][HEIGHT]
  alignas(64) int16_t tables[ENTRIES][HEIGHT] = {};
  const int64_t packed = (k + 3) / 4, blocks = (rows + HEIGHT - 1) / HEIGHT;
  int64_t bound[BLOCKS] = {};  // of the sums so far, until they are put
  bool started[BLOCKS] = {}, empty[BLOCKS];
  std::fill_n(empty, BLOCKS, true);
  auto put_block = [&](int64_t b) {
    const int64_t height = std::min<int64_t>(HEIGHT, rows - b * HEIGHT);
    put(started[b], sums[b], height, columns, out + b * HEIGHT * n, n);
    started[b] = empty[b] = true;
  };
  for (int64_t p = 0; p < packed; p += TABLES) {
    // Past the end any row will do: its x are 0.
    const auto row = [&](int64_t t) { return codes + std::min(p + t, packed - 1) * n; };
    for (int t = 0; t < TABLES; t++) indices(row(t), columns, index[t]);
    if (4 * p % TURN == 0)
      for (int64_t b = 0; b < blocks; b++)
        take(x + b * HEIGHT * k + 4 * p, rows - b * HEIGHT, k, k - 4 * p, turned[b]);
    for (int64_t b = 0; b < blocks; b++) {
      const auto inputs = turned[b] + 4 * p % TURN;
      if (overflows<INPUTS>(inputs, sums[b], columns, bound[b])) put_block(b);
      for (int t = 0; t < TABLES; t++) fill_table(inputs + 4 * t, tables + 81 * t);
      for (int64_t c = 0; c < columns; c += SPAN) {
        const int64_t some = std::min<int64_t>(SPAN, columns - c);
        // A few lines: codes that are asked for all at once are waited for.
        for (int64_t t = TABLES + b; t < 2 * TABLES; t += blocks)
          for (int64_t i = 0; i < some; i += 64) __builtin_prefetch(row(t) + c + i);
        look_up<TABLES>(empty[b], tables, index[0] + c, ROW, some, sums[b] + c);
      }
      empty[b] = false;
    }
  }
  for (int64_t b = 0; b < blocks; b++) put_block(b);
}

#undef INLINE
#undef MEMBER
#undef PAIR
#undef PAIRS
#undef TWO
#undef TWOS
#undef LANES
#undef BYTES
#undef GROUP
#undef AT_ONCE
#undef DOT
#undef LOOKUP
#undef HIGH_HALVES
#undef PERMUTE
#undef TO_BYTES
#undef MOVE_BITS
#undef ADD_PAIRS
