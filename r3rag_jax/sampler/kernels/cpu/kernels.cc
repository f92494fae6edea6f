// CPU kernels for the sampler: attention over the KV cache, cache updates, and matmuls with the weights. They dominate
// a decode step, and XLA's CPU backend is slow at all three.
//
// build.py compiles this file for the machine that it runs on; kernels.py documents the arguments and results.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kSums = 24;  // floats per vector; vector accumulators per inner loop
#elif defined(__AVX__)
constexpr int kLanes = 8, kSums = 12;
#else
constexpr int kLanes = 4, kSums = 12;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// Prefetches into the L2 cache, 8 KiB ahead of a sequential read at `at`.
inline void prefetch(const void* at) { __builtin_prefetch(static_cast<const char*>(at) + 8192, 0, 2); }

template <class V>
inline V loaded(const void* from) {
  V x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class V, class X>
inline V same_bits(X x) {
  static_assert(sizeof(V) == sizeof(X));
  return loaded<V>(&x);
}

// Loads kLanes elements as float32.
inline Vec load(const float* from) { return loaded<Vec>(from); }

inline Vec load(const uint16_t* from) {  // bfloat16
  return same_bits<Vec>(__builtin_convertvector(loaded<Halves>(from), Bits) << 16);
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

inline void store(uint16_t* to, Vec x) {  // rounded to bfloat16, ties to even
  const Bits bits = same_bits<Bits>(x);
  const Halves halves = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

inline Vec broadcast(float x) { return x - Vec{}; }

inline Vec larger(Vec x, Vec y) { return x > y ? x : y; }

inline float largest_of(Vec x) {
  float most = x[0];
  for (int i = 1; i < kLanes; ++i) most = std::max(most, x[i]);
  return most;
}

inline float sum_of(Vec x) {
  float sum = x[0];
  for (int i = 1; i < kLanes; ++i) sum += x[i];
  return sum;
}

// 2^x for x <= 0, and 0 for x < -126; the relative error is below 3e-7.
inline Vec exp2_of(Vec x) {
  const Vec least = broadcast(-126.0f);
  const auto is_zero = x < least;
  x = is_zero ? least : x;
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec rounded = x + magic;
  const Vec f = x - (rounded - magic);  // in [-1/2, 1/2]
  Vec y = broadcast(1.5403530e-4f);
  y = y * f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f;
  y = y * f + 5.5504109e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.0f;
  y = same_bits<Vec>(same_bits<Ints>(y) + (same_bits<Ints>(rounded) << 23));
  return is_zero ? Vec{} : y;
}

// Calls work(0) .. work(count - 1) once each, on the pool's threads and on this one. Returns when all calls are done.
template <class Work>
void parallel_for(ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  // A task that starts after this function returned finds next >= count, so it does not touch `work`, which is gone.
  auto run = [state, count, &work] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      work(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = std::min(pool.num_threads(), count); i > 1; --i) pool.Schedule([run] { run(); });
  run();
  while (state->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

// Returns run(T{}) for the C++ type T of a dtype; bfloat16 is held as uint16_t.
template <class Run>
ffi::Error with_dtype(ffi::DataType type, const Run& run) {
  if (type == ffi::F32) return run(float{});
  if (type == ffi::BF16) return run(uint16_t{});
  return ffi::Error::InvalidArgument("elements must be float32 or bfloat16");
}

template <class T>
const T* elements(const ffi::AnyBuffer& buffer) {
  return static_cast<const T*>(buffer.untyped_data());
}

// ---- Factors of a dot product ---------------------------------------------------------------------------------------

// Two bfloat16 factors. A dot product adds a.first * b.first + a.second * b.second to a float32, which AVX512-BF16 does
// in one instruction.
struct Pair {
  uint16_t first, second;
};

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

inline Vec factors(const float* from) { return load(from); }  // loads kLanes factors
inline Vec factors(const uint16_t* from) { return load(from); }
inline Bits factors(const Pair* from) { return loaded<Bits>(from); }

inline Vec factor(const float* from) { return broadcast(*from); }  // broadcasts one factor to all lanes
inline Bits factor(const Pair* from) { return loaded<uint32_t>(from) - Bits{}; }

inline void add_products(Vec& sum, Vec x, Vec y) { sum += x * y; }

inline void add_products(Vec& sum, Bits x, Bits y) {
#if defined(__AVX512BF16__)
  sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#else
  sum += same_bits<Vec>(x << 16) * same_bits<Vec>(y << 16);
  sum += same_bits<Vec>(x & 0xffff0000) * same_bits<Vec>(y & 0xffff0000);
#endif
}

// Zips two rows of `count` elements: to[i] = {firsts[i], seconds[i]}.
inline void make_pairs(const uint16_t* firsts, const uint16_t* seconds, int64_t count, Pair* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Bits low = __builtin_convertvector(loaded<Halves>(firsts + i), Bits);
    const Bits high = __builtin_convertvector(loaded<Halves>(seconds + i), Bits);
    const Bits pairs = low | high << 16;
    std::memcpy(to + i, &pairs, sizeof pairs);
  }
}

// ---- Attention ------------------------------------------------------------------------------------------------------

constexpr int kKeyBlock = KEY_BLOCK;  // build.py defines it
constexpr int kSpan = 128;     // positions per step of the online softmax
constexpr int kTile = 6;       // queries that share each load of a key
constexpr int kTask = 48;      // queries per task of the thread pool; a multiple of kTile
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct Sizes {
  int64_t B, C, N, K, H, S, num_rows;  // as in cache/base.py; q has B rows, the cache num_rows
};

// The type of the queries that keys of type Key are multiplied by, and the number of factors in `count` elements.
template <class Key>
using Query = std::conditional_t<std::is_same_v<Key, Pair>, Pair, float>;

template <class Key>
constexpr int64_t factors_of(int64_t count) {
  return std::is_same_v<Key, Pair> ? count / 2 : count;
}

// The keys and values at positions start .. start + count.
template <class Key, class Value>
struct Span {
  const Key* k;    // blocks [number of factors in H, kKeyBlock]
  const Value* v;  // [count, H]
  int64_t start;
  int count;
};

// Queries with the running state of their online softmax: weights are 2^(score - largest).
template <class Key>
struct Queries {
  const Query<Key>* q;  // [num, number of factors in H]
  const int32_t* last_seen;  // [num], the last position that each query sees
  float* largest;            // [num], largest score so far
  float* total;              // [num], sum of the weights
  float* out;                // [num, H], sum of weight * value
};

// Writes scores [M, kSpan]: dot products of M queries with the keys of `count` positions, times `scale`. The last
// vectors may extend beyond `count` into the rest of the block.
template <int M, class Key>
inline void score(const Query<Key>* q, const Key* k, int64_t num_factors, int count, float scale, float* scores) {
  for (int at = 0; at < count; at += 2 * kLanes) {
    const Key* column = k + at / kKeyBlock * num_factors * kKeyBlock + at % kKeyBlock;
    Vec sums[M][2] = {};
    for (int64_t h = 0; h < num_factors; ++h) {
      prefetch(column + h * kKeyBlock);
      const auto k0 = factors(column + h * kKeyBlock), k1 = factors(column + h * kKeyBlock + kLanes);
      for (int m = 0; m < M; ++m) {
        const auto each = factor(q + m * num_factors + h);
        add_products(sums[m][0], k0, each);
        add_products(sums[m][1], k1, each);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < 2; ++i) store(scores + m * kSpan + at + i * kLanes, sums[m][i] * scale);
  }
}

// One step of the online softmax of one query: replaces `scored` scores, a multiple of kLanes, by weights. If the
// largest score grows, the total and the output so far are rescaled.
inline void weigh(float* scores, int scored, int64_t H, float& largest, float& total, float* out) {
  Vec most = load(scores);
  for (int s = kLanes; s < scored; s += kLanes) most = larger(most, load(scores + s));
  const float before = largest;
  largest = std::max(before, largest_of(most));
  if (largest == kMinusInfinity) {
    std::memset(scores, 0, scored * sizeof *scores);
    return;
  }
  if (largest > before) {
    const float shrink = std::exp2(before - largest);
    total *= shrink;
    for (int64_t h = 0; h < H; h += kLanes) store(out + h, load(out + h) * shrink);
  }
  Vec sum{};
  for (int s = 0; s < scored; s += kLanes) {
    const Vec weight = exp2_of(load(scores + s) - largest);
    store(scores + s, weight);
    sum += weight;
  }
  total += sum_of(sum);
}

// Adds the weighted values of `count` positions to Vecs vectors of the outputs of M queries.
template <int M, int Vecs, class Value>
inline void add_values(const float* weights, const Value* v, int64_t H, int count, float* out) {
  Vec sums[M][Vecs];
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < Vecs; ++i) sums[m][i] = load(out + m * H + i * kLanes);
  for (int s = 0; s < count; ++s) {
    prefetch(v + s * H);
    Vec value[Vecs];
    for (int i = 0; i < Vecs; ++i) value[i] = load(v + s * H + i * kLanes);
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < Vecs; ++i) sums[m][i] += value[i] * weights[m * kSpan + s];
  }
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < Vecs; ++i) store(out + m * H + i * kLanes, sums[m][i]);
}

// Attends from M queries to a span of positions.
template <int M, class Key, class Value>
void attend_span(const Queries<Key>& of, const Span<Key, Value>& span, int64_t H) {
  alignas(64) float weights[M * kSpan];
  const int64_t reach = *std::max_element(of.last_seen, of.last_seen + M) + 1 - span.start;
  if (reach <= 0) return;
  const int count = std::min<int64_t>(reach, span.count);
  const int scored = (count + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  const float scale = 1.44269504f / std::sqrt(static_cast<float>(H));  // log2(e) / sqrt(H): 2^x is cheaper than e^x
  score<M>(of.q, span.k, factors_of<Key>(H), count, scale, weights);
  for (int m = 0; m < M; ++m) {
    float* mine = weights + m * kSpan;
    const int64_t end = std::clamp<int64_t>(of.last_seen[m] + 1 - span.start, 0, count);
    std::fill(mine + end, mine + scored, kMinusInfinity);
    weigh(mine, scored, H, of.largest[m], of.total[m], of.out + m * H);
  }
  int64_t h = 0;
  for (; h + 2 * kLanes <= H; h += 2 * kLanes) add_values<M, 2>(weights, span.v + h, H, count, of.out + h);
  if (h < H) add_values<M, 1>(weights, span.v + h, H, count, of.out + h);
}

// Attends from `num` queries to a span of positions, kTile queries at a time.
template <class Key, class Value>
void attend_tiles(int num, const Queries<Key>& of, const Span<Key, Value>& span, int64_t H) {
  for (int i = 0; i < num; i += kTile) {
    const Queries<Key> tile{of.q + i * factors_of<Key>(H), of.last_seen + i, of.largest + i, of.total + i,
                            of.out + i * H};
    switch (std::min(kTile, num - i)) {
      case 1: attend_span<1>(tile, span, H); break;
      case 2: attend_span<2>(tile, span, H); break;
      case 3: attend_span<3>(tile, span, H); break;
      case 4: attend_span<4>(tile, span, H); break;
      case 5: attend_span<5>(tile, span, H); break;
      default: attend_span<kTile>(tile, span, H);
    }
  }
}

template <class From, class To>
inline void copy(const From* from, int64_t count, To* to) {  // converts the type
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(from + i));
}

// Attends from queries first .. first + kTask of row b and one kv head, where query i is head i % G of token i / G.
template <class Q, class T>
void attend_task(const Sizes& z, const Q* q, const T* k, const T* v, const int32_t* positions, int64_t b, int64_t row,
                 int64_t head, int64_t first, Q* out) {
  const int64_t H = z.H, G = z.N / z.K;
  const int num = std::min<int64_t>(kTask, z.C * G - first);
  auto query_offset = [&](int i) { return ((b * z.C + (first + i) / G) * z.N + head * G + (first + i) % G) * H; };
  if (row < 0 || row >= z.num_rows) {
    for (int i = 0; i < num; ++i) std::fill_n(out + query_offset(i), H, Q{});
    return;
  }
  thread_local std::vector<float> space;  // queries, outputs, and one span's converted keys and values
  space.resize(2 * (kTask + kSpan) * H);
  float *queries = space.data(), *sums = queries + kTask * H;
  float *other_k = sums + kTask * H, *other_v = other_k + kSpan * H;
  float largest[kTask], total[kTask];
  int32_t seen[kTask];
  for (int i = 0; i < num; ++i) {
    largest[i] = kMinusInfinity;
    total[i] = 0;
    seen[i] = positions[b * z.C + (first + i) / G];
  }
  std::fill(sums, sums + num * H, 0.0f);
  const int64_t reach = std::min<int64_t>(*std::max_element(seen, seen + num) + 1, z.S);
  k += (row * z.K + head) * z.S * H;
  v += (row * z.K + head) * z.S * H;
  auto attend = [&](auto key, auto convert) {  // over all spans, which `convert` turns into keys of key's type
    using Key = decltype(key);
    using Element = std::conditional_t<std::is_same_v<Key, Pair>, uint16_t, float>;
    auto* typed_queries = reinterpret_cast<Element*>(queries);
    for (int i = 0; i < num; ++i) copy(q + query_offset(i), H, typed_queries + i * H);
    const Queries<Key> of{reinterpret_cast<Query<Key>*>(typed_queries), seen, largest, total, sums};
    for (int64_t start = 0; start < reach; start += kSpan) {
      const int count = std::min<int64_t>(kSpan, reach - start);
      attend_tiles(num, of, convert(Span<T, T>{k + start * H, v + start * H, start, count}), H);
    }
  };
  if (std::is_same_v<T, float> || num <= kTile) {
    attend(T{}, [](const Span<T, T>& span) { return span; });
  } else if constexpr (std::is_same_v<T, uint16_t>) {  // several tiles read the span: convert it once
    constexpr bool in_pairs = kHasPairs && std::is_same_v<Q, uint16_t>;
    using Key = std::conditional_t<in_pairs, Pair, float>;
    attend(Key{}, [&](const Span<T, T>& span) {
      const int64_t rows = (span.count + kKeyBlock - 1) / kKeyBlock * H;  // of kKeyBlock elements
      auto* keys = reinterpret_cast<Key*>(other_k);
      if constexpr (in_pairs)
        for (int64_t i = 0; i < rows; i += 2)
          make_pairs(span.k + i * kKeyBlock, span.k + (i + 1) * kKeyBlock, kKeyBlock, keys + i / 2 * kKeyBlock);
      else
        copy(span.k, rows * kKeyBlock, keys);
      copy(span.v, span.count * H, other_v);
      return Span<Key, float>{keys, other_v, span.start, span.count};
    });
  }
  for (int i = 0; i < num; ++i)
    for (int64_t h = 0; h < H; h += kLanes) store(out + query_offset(i) + h, load(sums + i * H + h) / total[i]);
}

ffi::Error run_attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                      ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> rows, ffi::Result<ffi::AnyBuffer> out) {
  const auto of_q = q.dimensions(), of_v = v.dimensions();
  const Sizes z{of_q[0], of_q[1], of_q[2], of_v[1], of_q[3], of_v[2], of_v[0]};
  if (k.dimensions()[4] != kKeyBlock || z.H % HEAD_MULTIPLE || k.element_type() != v.element_type() ||
      q.element_type() != out->element_type())
    return ffi::Error::InvalidArgument("attend: keys must lie in blocks of 32, heads be a multiple of 16 wide");
  const int64_t tasks = (z.C * z.N / z.K + kTask - 1) / kTask;
  return with_dtype(q.element_type(), [&](auto query) {
    return with_dtype(k.element_type(), [&](auto key) {
      using Q = decltype(query);
      using T = decltype(key);
      parallel_for(pool, z.B * z.K * tasks, [&](int64_t i) {
        const int64_t b = i / (z.K * tasks), head = i / tasks % z.K, first = i % tasks * kTask;
        attend_task(z, elements<Q>(q), elements<T>(k), elements<T>(v), positions.typed_data(), b, rows.typed_data()[b],
                    head, first, static_cast<Q*>(out->untyped_data()));
      });
      return ffi::Error::Success();
    });
  });
}

// ---- New keys and values --------------------------------------------------------------------------------------------

// Writes the C new keys and values of row b and one kv head to cache row `row`.
template <class T>
void write_head(const Sizes& z, const T* new_k, const T* new_v, const int32_t* positions, int64_t b, int64_t row,
                int64_t head, T* k, T* v) {
  k += (row * z.K + head) * z.S * z.H;
  v += (row * z.K + head) * z.S * z.H;
  for (int64_t c = 0; c < z.C; ++c) {
    const int64_t at = positions[b * z.C + c], from = ((b * z.C + c) * z.K + head) * z.H;
    if (at < 0 || at >= z.S) continue;
    T* column = k + at / kKeyBlock * z.H * kKeyBlock + at % kKeyBlock;
    for (int64_t h = 0; h < z.H; ++h) column[h * kKeyBlock] = new_k[from + h];
    std::copy(new_v + from, new_v + from + z.H, v + at * z.H);
  }
}

// kernels.py aliases the results `k` and `v` to the cache, so they already hold it; only the new entries are written.
ffi::Error run_write(ffi::ThreadPool pool, ffi::AnyBuffer new_k, ffi::AnyBuffer new_v, ffi::Buffer<ffi::S32> positions,
                     ffi::Buffer<ffi::S32> rows, ffi::AnyBuffer, ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer> k,
                     ffi::Result<ffi::AnyBuffer> v) {
  const auto of_new = new_k.dimensions(), of_v = v->dimensions();
  const Sizes z{of_new[0], of_new[1], 0, of_v[1], of_v[3], of_v[2], of_v[0]};
  if (k->dimensions()[4] != kKeyBlock || new_k.element_type() != k->element_type())
    return ffi::Error::InvalidArgument("write: keys must lie in blocks of 32, and be of the cache's type");
  return with_dtype(k->element_type(), [&](auto type) {
    using T = decltype(type);
    parallel_for(pool, z.B * z.K, [&](int64_t i) {
      const int64_t b = i / z.K, row = rows.typed_data()[b];
      if (row < 0 || row >= z.num_rows) return;
      write_head(z, elements<T>(new_k), elements<T>(new_v), positions.typed_data(), b, row, i % z.K,
                 static_cast<T*>(k->untyped_data()), static_cast<T*>(v->untyped_data()));
    });
    return ffi::Error::Success();
  });
}

// ---- Products with the rows of a matrix -----------------------------------------------------------------------------

constexpr int64_t kTaskBytes = 1 << 15;  // bytes of the matrix per task of the thread pool
constexpr int kFewRows = 8;              // up to this number of rows, x is not transposed

// Interleaves one half (0 or 1) of a and b in groups of C lanes: a0 b0 a1 b1 ...
template <int C, int Half, class V, int... I>
inline V interleaved(V a, V b, std::integer_sequence<int, I...>) {
#define LANE(i) ((i) % (2 * C) < C ? 0 : kLanes) + (i) / (2 * C) * C + (i) % C + Half * kLanes / 2
#if defined(__clang__)
  return __builtin_shufflevector(a, b, LANE(I)...);
#else
  return __builtin_shuffle(a, b, Ints{LANE(I)...});
#endif
#undef LANE
}

// Transposes kLanes vectors in place: lane j of vector i becomes lane i of vector j.
template <class V>
inline void transpose(V* x) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  for (int c = 1; c < kLanes; c *= 2) {
    V y[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = interleaved<1, 0>(x[i], x[i + kLanes / 2], lanes);
      y[2 * i + 1] = interleaved<1, 1>(x[i], x[i + kLanes / 2], lanes);
    }
    std::copy(y, y + kLanes, x);
  }
}

// Returns a vector whose lane i is the sum of the lanes of x[i], for kLanes vectors. At level C = 1, 2, 4, .. every
// vector holds partial sums of C inputs, in groups of C lanes. Two vectors are merged by adding their interleaved lower
// halves to their interleaved upper halves.
template <int C = 1>
inline Vec sums_of(Vec* x) {
  if constexpr (C == kLanes) {
    return x[0];
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
    for (int i = 0; i < kLanes / C; i += 2)
      x[i / 2] = interleaved<C, 0>(x[i], x[i + 1], lanes) + interleaved<C, 1>(x[i], x[i + 1], lanes);
    return sums_of<2 * C>(x);
  }
}

// A matmul x [num_x, in] @ w.T, w [num_w, in], into `to` [num_x, num_w] with row stride `out`; `in` counts factors.
template <class T>
struct Product {
  const T* x;
  int64_t num_x;
  const T* w;
  int64_t num_w;
  int64_t in;
  float* to;
  int64_t out;
};

// Multiplies R rows of x with O rows of w, where O * R = kLanes.
template <int O, int R, class T>
void multiply_tile(const Product<T>& of) {
  const T *xs[R], *ws[O];
  for (int r = 0; r < R; ++r) xs[r] = of.x + std::min<int64_t>(r, of.num_x - 1) * of.in;
  for (int o = 0; o < O; ++o) ws[o] = of.w + std::min<int64_t>(o, of.num_w - 1) * of.in;
  Vec sums[O * R] = {};
  for (int64_t i = 0; i < of.in; i += kLanes)
    for (int o = 0; o < O; ++o) {
      prefetch(ws[o] + i);
      for (int r = 0; r < R; ++r) add_products(sums[o * R + r], factors(xs[r] + i), factors(ws[o] + i));
    }
  const Vec all_sums = sums_of(sums);
  for (int o = 0; o < std::min<int64_t>(O, of.num_w); ++o)
    for (int r = 0; r < std::min<int64_t>(R, of.num_x); ++r) of.to[r * of.out + o] = all_sums[o * R + r];
}

// Multiplies up to kFewRows rows of x.
template <class T>
void multiply_few(const Product<T>& of) {
  auto each = [&](int rows, int wide, auto tile) {
    for (int64_t r = 0; r < of.num_x; r += rows)
      for (int64_t o = 0; o < of.num_w; o += wide)
        tile(Product<T>{of.x + r * of.in, of.num_x - r, of.w + o * of.in, of.num_w - o, of.in, of.to + r * of.out + o,
                        of.out});
  };
  constexpr int kMost = std::min(kFewRows, kLanes);
  if (of.num_x == 1)
    each(1, kLanes, multiply_tile<kLanes, 1, T>);
  else if (of.num_x == 2)
    each(2, kLanes / 2, multiply_tile<kLanes / 2, 2, T>);
  else if (of.num_x <= 4)
    each(4, kLanes / 4, multiply_tile<kLanes / 4, 4, T>);
  else
    each(kMost, kLanes / kMost, multiply_tile<kLanes / kMost, kMost, T>);
}

constexpr int64_t kGroup = 2;  // vectors of rows of x per inner loop

template <class T>
using VecOf = decltype(factors(static_cast<const T*>(nullptr)));

// Transposes x so that each row occupies one lane: for each group of n <= kGroup vectors of rows, vectors [in, n].
template <class T>
std::vector<VecOf<T>> transposed_rows(const T* x, int64_t num_x, int64_t in) {
  const int64_t num_vecs = (num_x + kLanes - 1) / kLanes;
  std::vector<VecOf<T>> transposed(num_vecs * in);
  for (int64_t v = 0; v < num_vecs; ++v) {
    const int64_t group = v / kGroup * kGroup, n = std::min(kGroup, num_vecs - group);
    for (int64_t i = 0; i < in; i += kLanes) {
      VecOf<T> block[kLanes];
      for (int r = 0; r < kLanes; ++r) block[r] = factors(x + std::min(v * kLanes + r, num_x - 1) * in + i);
      transpose(block);
      for (int j = 0; j < kLanes; ++j) transposed[group * in + (i + j) * n + v - group] = block[j];
    }
  }
  return transposed;
}

// Multiplies a group of N vectors of rows of x with O rows of w into vectors `to` [O, N], with row stride `stride`.
template <int O, int N, class T>
inline void multiply_transposed(const VecOf<T>* x, const T* w, int64_t in, Vec* to, int64_t stride) {
  constexpr int kLine = 16;  // factors per cache line
  Vec sums[O][N] = {};
  for (int64_t start = 0; start < in; start += kLine) {
    for (int o = 0; o < O; ++o) prefetch(w + o * in + start);
    for (int64_t i = start; i < start + kLine; ++i, x += N)
#pragma GCC unroll 16
      for (int o = 0; o < O; ++o) {
        const auto each = factor(w + o * in + i);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) add_products(sums[o][n], x[n], each);
      }
  }
  for (int o = 0; o < O; ++o)
    for (int n = 0; n < N; ++n) to[o * stride + n] = sums[o][n];
}

// The largest power of two that is at most `most`, and at least 1.
constexpr int power_of_two(int most) { return most < 2 ? 1 : 2 * power_of_two(most / 2); }

// Multiplies a group of N vectors of rows of x with all rows of w.
template <int N, class T>
void multiply_group(const VecOf<T>* x, const T* w, int64_t num_w, int64_t in, Vec* to, int64_t stride) {
  constexpr int O = power_of_two(std::min(kSums / N, kLanes));  // rows of w per inner loop
  int64_t o = 0;
  for (; o + O <= num_w; o += O) multiply_transposed<O, N>(x, w + o * in, in, to + o * stride, stride);
  for (; o < num_w; ++o) multiply_transposed<1, N>(x, w + o * in, in, to + o * stride, stride);
}

// Multiplies more than kFewRows rows of x, which `transposed_rows` has transposed.
template <class T>
void multiply_many(const VecOf<T>* x, const Product<T>& of) {
  const int64_t num_vecs = (of.num_x + kLanes - 1) / kLanes;
  thread_local std::vector<Vec> products;  // [num_w rounded up to kLanes, num_vecs]
  products.resize((of.num_w + kLanes - 1) / kLanes * kLanes * num_vecs);
  for (int64_t v = 0; v < num_vecs; v += kGroup) {
    auto multiply = num_vecs - v >= kGroup ? multiply_group<kGroup, T> : multiply_group<1, T>;
    multiply(x + v * of.in, of.w, of.num_w, of.in, &products[v], num_vecs);
  }
  for (int64_t o = 0; o < of.num_w; o += kLanes)
    for (int64_t v = 0; v < num_vecs; ++v) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = products[(o + i) * num_vecs + v];
      transpose(block);
      const int64_t num = std::min<int64_t>(kLanes, of.num_w - o);
      for (int64_t r = v * kLanes; r < std::min(of.num_x, (v + 1) * kLanes); ++r)
        std::memcpy(of.to + r * of.out + o, &block[r - v * kLanes], num * sizeof(float));
    }
}

// Splits the rows of w into tasks for the thread pool.
template <class T>
void multiply_all(ffi::ThreadPool& pool, const Product<T>& of) {
  const int64_t rows = std::max<int64_t>(kTaskBytes / (of.in * sizeof(T)) / kLanes, 1) * kLanes;
  std::vector<VecOf<T>> transposed;
  if (of.num_x > kFewRows) transposed = transposed_rows(of.x, of.num_x, of.in);
  parallel_for(pool, (of.num_w + rows - 1) / rows, [&](int64_t i) {
    const int64_t o = i * rows;
    const Product<T> task{of.x,  of.num_x,  of.w + o * of.in, std::min(rows, of.num_w - o),
                          of.in, of.to + o, of.out};
    if (of.num_x > kFewRows)
      multiply_many(transposed.data(), task);
    else
      multiply_few(task);
  });
}

ffi::Error run_multiply(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::ResultBuffer<ffi::F32> to) {
  const int64_t num_x = x.dimensions()[0], in = x.dimensions()[1], out = w.dimensions()[0];
  if (x.element_type() != w.element_type() || in % PRODUCT_MULTIPLE)
    return ffi::Error::InvalidArgument("multiply: x and w must have one type, and an inner size divisible by 32");
  return with_dtype(x.element_type(), [&](auto type) {
    using T = std::conditional_t<std::is_same_v<decltype(type), uint16_t>, Pair, float>;
    const int64_t num_factors = in * sizeof(type) / sizeof(T);
    multiply_all(pool, Product<T>{elements<T>(x), num_x, elements<T>(w), out, num_factors, to->typed_data(), out});
    return ffi::Error::Success();
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(multiply, run_multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(attend, run_attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(write_new, run_write,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
