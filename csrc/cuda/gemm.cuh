// Matrix products from shared memory, for kernels that multiply the pixels of channels-last images
// by a weight matrix: C[i, j] = sum_c A[i, c] * B[j, c], both operands with the channels
// contiguous.
//
// Tile of an operand: rows of 128 bytes, 64 channels of 16 bits or 32 of float32. The 16-byte
// vector v of row i is in place v ^ i % 8, so that neither the rows that are copied in nor the
// eight rows of a matrix that the tensor cores take hit a bank twice.
//
// A step of the product takes 32 bytes of each row: m16n8k16 of 16-bit elements, or m16n8k8 of
// float32. The words of the fragments are the same for both.
#pragma once

#include "mma.cuh"
#include "rows.cuh"

namespace effnet::cuda {

constexpr int kTileRowBytes = 128;
constexpr int kTileVectors = kTileRowBytes / 16;  // of a row
constexpr int kStepBytes = 32;
constexpr int kTileSteps = kTileRowBytes / kStepBytes;
constexpr int kFragmentRows = 16;

template <class T>
constexpr int kTileDepth = kTileRowBytes / static_cast<int>(sizeof(T));  // channels
template <class T>
constexpr int kStepDepth = kStepBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kTileVector = 16 / static_cast<int>(sizeof(T));  // channels of a vector

// Where vector v of a row is in its tile, in bytes.
EFFNET_DEVICE int tile_offset(int row, int v) {
  return row * kTileRowBytes + ((v ^ row) & (kTileVectors - 1)) * 16;
}

// Vectors of a row that the steps of a product over `depth` channels take.
template <class T>
EFFNET_DEVICE int tile_vectors(int depth) {
  return min((depth + kStepDepth<T> - 1) / kStepDepth<T> * (kStepBytes / 16), kTileVectors);
}

// A thread's part of the first `vectors` vectors of a tile's rows: vector v of every stride-th row.
// 2, 4 or 8 threads share a row, so that the stride is a multiple of 8. Some threads may have none.
struct TileThread {
  int v, row, stride;

  EFFNET_DEVICE explicit TileThread(int vectors) {
    const int log_threads = vectors <= 2 ? 1 : vectors <= 4 ? 2 : 3;
    v = static_cast<int>(threadIdx.x) & ((1 << log_threads) - 1);
    row = static_cast<int>(threadIdx.x) >> log_threads;
    stride = static_cast<int>(blockDim.x) >> log_threads;
  }
};

// Calls body(row, v, tile_offset(row, v)) for this thread's part of the first `vectors` vectors of
// `rows` rows.
template <class Body>
EFFNET_DEVICE void for_tile_vectors(int rows, int vectors, const Body& body) {
  const TileThread thread(vectors);
  int row = thread.row;
  int offset = tile_offset(row, thread.v);
  if (thread.v >= vectors) return;
#pragma unroll 1
  for (; row < rows; row += thread.stride, offset += thread.stride * kTileRowBytes) {
    body(row, thread.v, offset);
  }
}

// V elements from p on, of which `count` exist; the others are zero. vectors: p is aligned to 16
// bytes (or to V elements, if those are less), and all exist or none.
template <int V, class T>
EFFNET_DEVICE Vector<T, V> load_some(const T* p, int count, bool vectors) {
  constexpr int kPart = V < kTileVector<T> ? V : kTileVector<T>;
  constexpr int kPartWords = kPart * static_cast<int>(sizeof(T)) / 4;
  Vector<T, V> x{};
  if (vectors) {
    if (count <= 0) return x;
#pragma unroll
    for (int i = 0; i < V / kPart; ++i) {
      const Vector<T, kPart> part = load_vector<kPart>(p + i * kPart);
#pragma unroll
      for (int j = 0; j < kPartWords; ++j) x.word[i * kPartWords + j] = part.word[j];
    }
    return x;
  }
  Floats<V> values;
#pragma unroll
  for (int i = 0; i < V; ++i) values[i] = i < count ? to_float(p[i]) : 0.f;
  return pack<T, V>(values);
}

template <int V, class T>
EFFNET_DEVICE void store_some(T* p, const Floats<V>& x, int count, bool vectors) {
  if (vectors) {
    constexpr int kPart = V < kTileVector<T> ? V : kTileVector<T>;
#pragma unroll
    for (int i = 0; i < V / kPart; ++i) store(p + i * kPart, slice<kPart>(x, i));
    return;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (i < count) p[i] = from_float<T>(x[i]);
  }
}

// Starts to copy channels first ... first + kTileDepth - 1 of `rows` rows into a tile. source(row)
// is where a row's channels begin. What a step of the product takes and does not exist becomes
// zero; vectors that no step takes are left as they are. Without `vectors` (rows that are not
// aligned to 16 bytes) the elements are copied one by one, at once.
template <class T, class Source>
EFFNET_DEVICE void copy_tile(char* tile, int rows, int first, int channels, bool vectors,
                             const Source& source) {
  constexpr int V = kTileVector<T>;
  const int left = channels - first;
  for_tile_vectors(rows, tile_vectors<T>(left), [&](int row, int v, int offset) {
    const T* p = source(row) + first + v * V;
    char* const to = tile + offset;
    if (vectors) {
      const bool exists = v * V < left;
      copy_async(to, exists ? p : source(row), exists ? 16 : 0);
    } else {
      *reinterpret_cast<Vector<T, V>*>(to) = load_some<V>(p, left - v * V, false);
    }
  });
}

// A row's vector in memory: the elements from p on, of which `left` exist.
template <class T>
struct SourceVector {
  const T* p;
  int left;
};

// Starts to copy a vector to shared memory; what does not exist becomes zero.
template <class T>
EFFNET_DEVICE void copy_vector(char* to, const SourceVector<T>& from) {
  copy_async(to, from.p, from.left > 0 ? 16 : 0);
}

// Copies a vector's elements at once, one after another, which takes no registers of those that
// hold accumulators.
template <class T>
EFFNET_DEVICE void copy_elements(char* to, const SourceVector<T>& from) {
#pragma unroll 1
  for (int i = 0; i < kTileVector<T>; ++i) {
    reinterpret_cast<T*>(to)[i] = i < from.left ? from.p[i] : from_float<T>(0.f);
  }
}

// Starts to copy the first `vectors` vectors of `rows` rows into a tile. source(v) is the first
// row's; the others are `pitch` elements further each. aligned: to 16 bytes.
template <class T, class Pitch, class Source>
EFFNET_DEVICE void copy_rows(char* tile, int rows, int vectors, Pitch pitch, bool aligned,
                             const Source& source) {
  const TileThread thread(vectors);
  if (thread.v >= vectors) return;
  SourceVector<T> from = source(thread.v);
  from.p += int64_t{thread.row} * pitch;
  const int64_t step = int64_t{thread.stride} * pitch;
  char* to = tile + tile_offset(thread.row, thread.v);
  int row = thread.row;
  if (aligned) {
#pragma unroll 1
    for (; row < rows; row += thread.stride, from.p += step, to += thread.stride * kTileRowBytes) {
      copy_vector(to, from);
    }
    return;
  }
#pragma unroll 1
  for (; row < rows; row += thread.stride, from.p += step, to += thread.stride * kTileRowBytes) {
    copy_elements(to, from);
  }
}

// d += a * b of one step. Float32 operands are rounded to TF32, or, `exact`, split into a TF32
// number and the TF32 number nearest to what it lacks: of the four products of such pairs the
// smallest is below the rounding of float32. The tensor cores round towards zero as they
// accumulate; the exact product keeps that out of long sums by adding each step to d itself. (An
// infinite operand makes NaN of an exact product.)
template <class T>
EFFNET_DEVICE void multiply_step(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                 bool exact) {
  if constexpr (std::is_same_v<T, float>) {
    uint32_t high_a[4], low_a[4], high_b[2], low_b[2];
    const auto split = [](uint32_t word, uint32_t& high, uint32_t& low) {
      const float x = bit_cast<float>(word);
      high = round_to_tf32(x);
      low = round_to_tf32(x - bit_cast<float>(high));
    };
#pragma unroll
    for (int i = 0; i < 4; ++i) split(a[i], high_a[i], low_a[i]);
    split(b0, high_b[0], low_b[0]);
    split(b1, high_b[1], low_b[1]);
    if (!exact) {
      multiply_matrices_tf32(d, high_a, high_b);
      return;
    }
    float step[4] = {};
    multiply_matrices_tf32(step, low_a, high_b);
    multiply_matrices_tf32(step, high_a, low_b);
    multiply_matrices_tf32(step, high_a, high_b);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += step[i];
  } else {
    multiply_matrices<T>(d, a[0], a[1], a[2], a[3], b0, b1);
  }
}

// The place of a step's vectors in the row of a tile, given that of the first step's: a tile's rows
// are aligned to their length, and their places differ in these bits only. (By way of the offset
// in shared memory, which takes one register, not two.)
EFFNET_DEVICE const char* tile_step(const char* first, int step) {
  const char* const shared = reinterpret_cast<const char*>(dynamic_shared_memory);
  return shared + (static_cast<int>(first - shared) ^ step * kStepBytes);
}

// acc[m][n] += the product of one step: of the fragments a[m] with rows 8 n ... of a tile, whose
// lanes' places in that step are `b`. kAll: all columns are wanted.
template <class T, bool kAll, int kRowFragments, int kColumnFragments>
EFFNET_DEVICE void multiply_fragments(float (&acc)[kRowFragments][kColumnFragments][4],
                                      const uint32_t (&a)[kRowFragments][4], const char* b,
                                      int columns, bool exact) {
  static_assert(kColumnFragments % 2 == 0, "fragments of b are loaded in pairs");
#pragma unroll
  for (int n = 0; n < kColumnFragments; n += 2) {
    if (!kAll && n * 8 >= columns) break;
    uint32_t words_b[4];
    load_matrices(words_b, b + n * 8 * kTileRowBytes);
#pragma unroll
    for (int m = 0; m < kRowFragments; ++m) {
      multiply_step<T>(acc[m][n], a[m], words_b[0], words_b[1], exact);
      multiply_step<T>(acc[m][n + 1], a[m], words_b[2], words_b[3], exact);
    }
  }
}

// acc[m][n] += the product of rows 16 m ... of an operand with rows 8 n ... of a tile, over `depth`
// channels of both. place_a(step, m) is the lane's place in the first operand, `b` its place in the
// tile in the first step. kAll: all of the tile's depth and all columns are wanted.
template <class T, bool kAll, int kRowFragments, int kColumnFragments, class PlaceA>
EFFNET_DEVICE void multiply_steps(float (&acc)[kRowFragments][kColumnFragments][4],
                                  const PlaceA& place_a, const char* b, int depth, int columns,
                                  bool exact) {
#pragma unroll
  for (int step = 0; step < kTileSteps; ++step) {
    if (!kAll && step * kStepDepth<T> >= depth) break;
    uint32_t words_a[kRowFragments][4];
#pragma unroll
    for (int m = 0; m < kRowFragments; ++m) load_matrices(words_a[m], place_a(step, m));
    multiply_fragments<T, kAll>(acc, words_a, tile_step(b, step), columns, exact);
  }
}

// The row and the vector of the first step that a lane gives for a fragment of a: matrices are rows
// 0 - 7 and 8 - 15 of the step's first 16 bytes, then of the second. For two fragments of b: the
// step's first and second 16 bytes of rows 0 - 7, then of 8 - 15.
struct LanePlace {
  int row, v;
};
EFFNET_DEVICE LanePlace lane_place_a(int lane) { return {lane % 16, lane / 16}; }
EFFNET_DEVICE LanePlace lane_place_b(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2}; }

// acc[m][n] += the product of rows 16 m ... of the tile a and rows 8 n ... of the tile b, over
// `depth` channels of both. `a` and `b` point at the warp's first rows, multiples of 8. Of the
// columns (rows of b) only `columns` are wanted: pairs of fragments beyond are left out.
// Lane (r, q) = (lane / 4, lane % 4) gets the rows r and r + 8, columns 2q and 2q + 1 of a
// fragment.
template <class T, int kRowFragments, int kColumnFragments>
EFFNET_DEVICE void multiply_tiles(float (&acc)[kRowFragments][kColumnFragments][4], char* a,
                                  char* b, int depth, int columns, bool exact) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const LanePlace of_a = lane_place_a(lane), of_b = lane_place_b(lane);
  const char* const lane_a = a + tile_offset(of_a.row, of_a.v);
  multiply_steps<T, false>(
      acc,
      [&](int step, int m) { return tile_step(lane_a, step) + m * kFragmentRows * kTileRowBytes; },
      b + tile_offset(of_b.row, of_b.v), depth, columns, exact);
}

// A warp's results on their way to memory: 16 rows by up to 64 columns of float32 go through shared
// memory, so that a lane has 8 neighbouring columns of a row. The first four of every eight columns
// lie there, then the second four, so that neither the lanes that write two columns of eight rows
// nor those that read four columns hit a bank twice.
constexpr int kResultColumns = 64;
constexpr int kLaneColumns = 8;
constexpr int kResultHalf = kResultColumns / 2 + 4;  // floats
constexpr int kResultPitch = 72;
static_assert(kResultPitch >= kResultHalf + kResultColumns / 2 && kResultPitch % 32 == 8);
constexpr int kResultFloats = kFragmentRows * kResultPitch;  // of a warp

// Fragments kFirst ... of acc, to columns 0 ...
template <int kFirst, int N>
EFFNET_DEVICE void store_fragments(float* results, const float (&acc)[N][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float* const write =
      results + lane / 4 * kResultPitch + lane % 4 / 2 * kResultHalf + lane % 2 * 2;
#pragma unroll
  for (int n = kFirst; n < N && n < kFirst + kResultColumns / 8; ++n) {
    const auto two = [&](int i) { return Floats<2>{{acc[n][i], acc[n][i + 1]}}; };
    store<float, 2>(write + 4 * (n - kFirst), two(0));
    store<float, 2>(write + 4 * (n - kFirst) + 8 * kResultPitch, two(2));
  }
}

EFFNET_DEVICE Floats<kLaneColumns> load_results(const float* results, int row, int column) {
  const float* const read = results + row * kResultPitch + column / 2;
  Floats<kLaneColumns> x;
  set_slice(x, 0, load<4>(read));
  set_slice(x, 1, load<4>(read + kResultHalf));
  return x;
}

// Waits until at most `pending` of the thread's last groups of copies are on their way.
EFFNET_DEVICE void wait_for_copies(int pending) {
  switch (pending) {
    case 0:
      return wait_for_copy_groups<0>();
    case 1:
      return wait_for_copy_groups<1>();
    case 2:
      return wait_for_copy_groups<2>();
    case 3:
      return wait_for_copy_groups<3>();
    default:
      return wait_for_copy_groups<4>();
  }
}

// Walks a block through its chunks, `stages` of them in shared memory (two or more, one if there is
// but one chunk): the next ones are on their way while one is multiplied.
//   load(chunk, stage)      starts to copy a chunk to a stage
//   arrived(chunk, stage)   the thread's own copies of it are there
//   multiply(chunk, stage)  the copies of all threads are
// One barrier a chunk. Ends without one: others may still read the last stage.
constexpr int kMostStages = 6;

template <class Load, class Arrived, class Multiply>
EFFNET_DEVICE void for_chunks(int chunks, int stages, const Load& load, const Arrived& arrived,
                              const Multiply& multiply) {
  static_assert(kMostStages - 2 <= 4, "as many groups as wait_for_copies knows");
  const int ahead = max(stages - 1, 1);
  for (int chunk = 0; chunk < ahead; ++chunk) {
    if (chunk < chunks) load(chunk, chunk);
    commit_copies();
  }
  int stage = 0;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    wait_for_copies(ahead - 1);
    arrived(chunk, stage);
    __syncthreads();
    // The stage of the chunk before, which every thread is done with.
    const int free = stage == 0 ? stages - 1 : stage - 1;
    if (chunk + ahead < chunks) load(chunk + ahead, free);
    commit_copies();
    multiply(chunk, stage);
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
}

}  // namespace effnet::cuda
