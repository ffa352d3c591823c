// One task: a block of tokens of one row and key/value head against a range of positions, 64 at a time, with online
// softmax. Few tokens: the range is a chunk of the context, and whoever finishes a head's last chunk merges them all;
// many tokens: every token block sees its whole past. So keys and values are read once for all their query heads, the
// work is even for any number of threads, and its split, hence the result, does not depend on that number.
#include "plugins/cached_attention/attention.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <new>
#include <vector>

namespace glm {
namespace {

constexpr size_t kBlock = 64;   // positions: keys and values of a block stay in the first two caches
constexpr size_t kRows = 192;   // of a token block
constexpr size_t kChunk = 512;  // positions per new token: a partial result is a few percent of what a chunk reads
constexpr size_t kAlign = 64;
constexpr double kLog2E = 1.4426950408889634;

size_t padded(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Lends pieces of one 64-byte aligned allocation; with no memory behind it, it only counts.
class Arena {
 public:
  explicit Arena(void* memory) : next_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(size_t count) {
    char* piece = next_ ? next_ + used_ : nullptr;
    used_ += padded(count * sizeof(T));
    return reinterpret_cast<T*>(piece);
  }
  size_t used() const { return used_; }

 private:
  char* next_;
  size_t used_ = 0;
};

class Attention {
 public:
  Attention(const CachedAttention& args, Isa isa)
      : a_(args),
        G_(args.H / args.J),
        tokens_(std::max<size_t>(1, kRows / G_)),
        blocks_((args.S + tokens_ - 1) / tokens_),
        element_(size_of(args.type)),
        row_(args.A * element_),
        block_rows_(std::min(tokens_, args.S) * G_),
        loops_(loops(isa)),
        lane_rows_((block_rows_ + loops_.lanes - 1) / loops_.lanes * loops_.lanes) {
    // A pass over all positions for the probabilities needs the final sums.
    bool split = blocks_ == 1 && !args.attentions;
    chunk_ = split ? kChunk * args.S : std::max<size_t>(1, args.C);
    for (size_t b = 0; b < args.B; b++) chunks_ = std::max(chunks_, chunks(b));
    factor_ = static_cast<float>(std::fabs(args.scale) * kLog2E);
  }

  size_t bytes() const {
    Shared shared(*this, nullptr);
    return shared.bytes;
  }

  void run(const Parallel& parallel, void* memory) const {
    const size_t heads = a_.B * a_.J;
    if (a_.k_cache_out != a_.k_cache || a_.v_cache_out != a_.v_cache) {
      const size_t bytes = a_.C * row_;
      parallel(heads, [&](size_t i) {
        copy(a_.k_cache, a_.k_cache_out, i * bytes, bytes);
        copy(a_.v_cache, a_.v_cache_out, i * bytes, bytes);
      });
    }
    if (blocks_ == 1) {
      Shared shared(*this, memory);
      for (size_t i = 0; i < heads; i++) new (shared.finished + i) std::atomic<uint32_t>(0);
      parallel(heads * chunks_, [&](size_t i) { attend_chunk(i / chunks_, i % chunks_, shared); });
    } else {
      parallel(heads, [&](size_t i) { write(i / a_.J, i % a_.J, 0, a_.S); });
      // Early token blocks are cheap: one from the start, one from the end, so that every run of tasks is even.
      parallel(heads * blocks_, [&](size_t i) {
        size_t n = i % blocks_;
        attend_block(i / blocks_, n % 2 ? blocks_ - 1 - n / 2 : n / 2);
      });
    }
  }

 private:
  // What the chunks of a head leave for the one that merges them.
  struct Shared {
    Shared(const Attention& self, void* memory) {
      Arena arena(memory);
      const size_t partials = self.chunks_ > 1 ? self.a_.B * self.a_.J * self.chunks_ : 0;
      finished = arena.take<std::atomic<uint32_t>>(self.a_.B * self.a_.J);
      max = arena.take<float>(partials * self.lane_rows_);
      sum = arena.take<float>(partials * self.lane_rows_);
      out = arena.take<float>(partials * self.block_rows_ * self.a_.A);
      bytes = arena.used();
    }
    std::atomic<uint32_t>* finished;  // [B, J] chunks
    float* max;                       // [B, J, chunks, lane rows]
    float* sum;                       // [B, J, chunks, lane rows]
    float* out;                       // [B, J, chunks, block rows, A]
    size_t bytes;
  };

  // A task's own memory, kept by its thread.
  struct Scratch {
    explicit Scratch(const Attention& self) {
      static thread_local std::vector<char> memory;
      Arena count(nullptr);
      take(self, count);
      if (memory.size() < count.used() + kAlign) memory.resize(count.used() + kAlign);
      Arena arena(reinterpret_cast<void*>(padded(reinterpret_cast<uintptr_t>(memory.data()))));
      take(self, arena);
    }
    void take(const Attention& self, Arena& arena) {
      const size_t A = self.a_.A, lanes = self.loops_.lanes;
      q = arena.take<char>(self.block_rows_ * self.row_);
      packed = arena.take<float>(self.lane_rows_ * A);
      scores = arena.take<float>(kBlock * lanes);
      keys = arena.take<float>(self.loops_.wide_keys ? kBlock * A : 0);
      values = arena.take<float>(self.loops_.wide_values ? kBlock * A : 0);
      decay = arena.take<float>(lanes);
      seen = arena.take<int32_t>(lanes);
      max = arena.take<float>(self.lane_rows_);
      sum = arena.take<float>(self.lane_rows_);
      out = arena.take<float>(self.block_rows_ * A);
    }
    char* q;        // [block rows, A], rotated
    float* packed;  // [tiles, A, lanes]
    float* scores;  // [kBlock, lanes]
    float* keys;    // [kBlock, A]
    float* values;  // [kBlock, A]
    float* decay;   // [lanes]
    int32_t* seen;  // [lanes]
    float* max;     // [lane rows]
    float* sum;     // [lane rows]
    float* out;     // [block rows, A]
  };

  // The rows of tokens first .. first + count - 1 of (b, j).
  struct Rows {
    size_t b, j, first, count;
  };

  const AttentionLoops& loops(Isa isa) const {
    return isa == Isa::avx2 ? attention_avx2(a_.type, block_rows_) : attention_scalar(a_.type);
  }

  static void copy(const void* from, void* to, size_t offset, size_t bytes) {
    if (from != to) std::memcpy(static_cast<char*>(to) + offset, static_cast<const char*>(from) + offset, bytes);
  }

  size_t start(size_t b) const { return static_cast<size_t>(a_.write_index[b]); }
  // New tokens of row b that are not padding.
  size_t valid(size_t b) const {
    if (a_.length[b] <= a_.write_index[b]) return 0;
    return std::min(a_.S, static_cast<size_t>(a_.length[b] - a_.write_index[b]));
  }
  size_t chunks(size_t b) const {
    size_t end = valid(b) ? start(b) + valid(b) : 0;
    return std::max<size_t>(1, (end + chunk_ - 1) / chunk_);
  }
  char* cache(void* cache, size_t b, size_t j, size_t position) const {
    return static_cast<char*>(cache) + ((b * a_.J + j) * a_.C + position) * row_;
  }
  // Row b's token s, head j * G.
  char* out(size_t b, size_t j, size_t s) const {
    return static_cast<char*>(a_.out) + ((b * a_.S + s) * a_.H + j * G_) * row_;
  }

  // Writes tokens first .. last - 1 into the caches of (b, j), padding too.
  void write(size_t b, size_t j, size_t first, size_t last) const {
    for (size_t s = first; s < last; s++) {
      const size_t token = b * a_.S + s, from = (token * a_.J + j) * row_;
      loops_.rotate(static_cast<const char*>(a_.k) + from, a_.cos + token * a_.R, a_.sin + token * a_.R, a_.R, a_.A,
                    cache(a_.k_cache_out, b, j, start(b) + s));
      std::memcpy(cache(a_.v_cache_out, b, j, start(b) + s), static_cast<const char*>(a_.v) + from, row_);
    }
  }

  void attend_chunk(size_t head, size_t chunk, const Shared& shared) const {
    const size_t b = head / a_.J, j = head % a_.J, of = chunks(b);
    if (chunk >= of) return;
    // Every chunk writes the new tokens that it is going to read; the last one the padding, too.
    const size_t first = chunk * chunk_, last = chunk + 1 == of ? start(b) + a_.S : first + chunk_;
    write(b, j, std::max(first, start(b)) - start(b), std::max(last, start(b)) - start(b));
    if (chunk == 0) clear_padding(b, j, 0, a_.S);
    const Rows rows{b, j, 0, valid(b)};
    if (rows.count == 0) return;

    Scratch scratch(*this);
    if (of == 1) {
      attend(rows, 0, last, scratch);
      finish(rows, scratch.sum, scratch.out);
      if (a_.attentions) probabilities(rows, scratch);
      return;
    }
    const size_t partial = head * chunks_;
    scratch.max = shared.max + (partial + chunk) * lane_rows_;
    scratch.sum = shared.sum + (partial + chunk) * lane_rows_;
    scratch.out = shared.out + (partial + chunk) * block_rows_ * a_.A;
    attend(rows, first, last, scratch);
    if (shared.finished[head].fetch_add(1, std::memory_order_acq_rel) + 1 < of) return;
    merge(rows.count * G_, of, shared.max + partial * lane_rows_, shared.sum + partial * lane_rows_,
          shared.out + partial * block_rows_ * a_.A);
    finish(rows, shared.sum + partial * lane_rows_, shared.out + partial * block_rows_ * a_.A);
  }

  void attend_block(size_t head, size_t block) const {
    const size_t b = head / a_.J, j = head % a_.J, first = block * tokens_, last = std::min(a_.S, first + tokens_);
    clear_padding(b, j, first, last);
    if (valid(b) <= first) return;
    const Rows rows{b, j, first, std::min(valid(b), last) - first};
    Scratch scratch(*this);
    attend(rows, 0, start(b) + last, scratch);
    finish(rows, scratch.sum, scratch.out);
    if (a_.attentions) probabilities(rows, scratch);
  }

  // Tokens first .. last - 1 as far as they are padding.
  void clear_padding(size_t b, size_t j, size_t first, size_t last) const {
    for (size_t s = std::max(first, valid(b)); s < last; s++) {
      std::memset(out(b, j, s), 0, G_ * row_);
      for (size_t g = 0; a_.attentions && g < G_; g++) {
        std::fill_n(a_.attentions + ((b * a_.H + j * G_ + g) * a_.S + s) * a_.C, a_.C, 0.0f);
      }
    }
  }

  // Attention of the rows to positions from .. to - 1, causal: sums in scratch.max, sum, out.
  void attend(const Rows& rows, size_t from, size_t to, Scratch& scratch) const {
    const size_t lanes = loops_.lanes, count = rows.count * G_;
    const size_t origin = start(rows.b) + rows.first;  // position of the first token
    to = std::min(to, origin + rows.count);
    prepare(rows, scratch);
    std::fill_n(scratch.max, lane_rows_, -FLT_MAX);
    std::fill_n(scratch.sum, lane_rows_, 0.0f);
    std::fill_n(scratch.out, count * a_.A, 0.0f);
    for (size_t p = from; p < to; p += kBlock) {
      const size_t n = std::min(kBlock, to - p);
      const char* keys = cache(a_.k_cache_out, rows.b, rows.j, p);
      const char* values = cache(a_.v_cache_out, rows.b, rows.j, p);
      const char* next = p + n < to ? keys + n * row_ : keys;
      const void* k = loops_.wide_keys ? widened(keys, n, scratch.keys) : keys;
      const void* v = loops_.wide_values ? widened(values, n, scratch.values) : values;
      for (size_t row = 0; row < count; row += lanes) {
        const size_t height = std::min(lanes, count - row);
        const size_t first = origin + row / G_, last = origin + (row + height - 1) / G_;
        if (last < p) continue;
        const size_t visible = std::min(n, last + 1 - p);
        const bool masked = first + 1 < p + visible;
        for (size_t i = 0; masked && i < lanes; i++) {
          const size_t end = origin + (row + std::min(i, height - 1)) / G_ + 1;
          scratch.seen[i] = static_cast<int32_t>(end > p ? std::min(end - p, visible) : 0);
        }
        // The values of this block arrive while its scores are computed, the next keys while its values are used.
        loops_.scores(scratch.packed + row * a_.A, k, visible, a_.A, values, scratch.scores);
        loops_.softmax(scratch.scores, visible, masked ? scratch.seen : nullptr, factor_, scratch.max + row,
                       scratch.sum + row, scratch.decay);
        loops_.accumulate(scratch.scores, scratch.decay, v, height, visible, a_.A, next, scratch.out + row * a_.A);
      }
    }
  }

  const void* widened(const void* rows, size_t n, float* to) const {
    loops_.widen(rows, n * a_.A, to);
    return to;
  }

  // Rotated queries, packed.
  void prepare(const Rows& rows, Scratch& scratch) const {
    const size_t count = rows.count * G_;
    for (size_t row = 0; row < count; row++) {
      const size_t token = rows.b * a_.S + rows.first + row / G_;
      const char* q = static_cast<const char*>(a_.q) + (token * a_.H + rows.j * G_ + row % G_) * row_;
      loops_.rotate(q, a_.cos + token * a_.R, a_.sin + token * a_.R, a_.R, a_.A, scratch.q + row * row_);
    }
    if (a_.scale < 0) {
      // Softmax looks for the largest score: the sign moves into the queries.
      for (size_t byte = element_ - 1; byte < count * row_; byte += element_) scratch.q[byte] ^= '\x80';
    }
    for (size_t row = 0; row < count; row += loops_.lanes) {
      loops_.pack(scratch.q + row * row_, std::min(loops_.lanes, count - row), a_.A, scratch.packed + row * a_.A);
    }
  }

  // The sums of all chunks, into those of the first.
  void merge(size_t count, size_t of,
             float* max,          // [chunks, lane rows]
             float* sum,          // [chunks, lane rows]
             float* out) const {  // [chunks, block rows, A]
    for (size_t row = 0; row < count; row++) {
      float top = max[row];
      for (size_t c = 1; c < of; c++) top = std::max(top, max[c * lane_rows_ + row]);
      float* total = out + row * a_.A;
      for (size_t c = 0; c < of; c++) {
        const float weight = std::exp2((max[c * lane_rows_ + row] - top) * factor_);
        const float* part = out + (c * block_rows_ + row) * a_.A;
        for (size_t i = 0; i < a_.A; i++) total[i] = c ? total[i] + weight * part[i] : weight * part[i];
        sum[row] = c ? sum[row] + weight * sum[c * lane_rows_ + row] : weight * sum[row];
      }
    }
  }

  // out from sums, rounded.
  void finish(const Rows& rows, const float* sum, const float* sums) const {
    for (size_t row = 0; row < rows.count * G_; row++) {
      char* to = out(rows.b, rows.j, rows.first + row / G_) + row % G_ * row_;
      loops_.narrow(sums + row * a_.A, 1.0f / sum[row], a_.A, to);
    }
  }

  // The optional output: all scores once more, with the final maximum and sum.
  void probabilities(const Rows& rows, Scratch& scratch) const {
    const size_t lanes = loops_.lanes, origin = start(rows.b) + rows.first;
    for (size_t row = 0; row < rows.count * G_; row++) {
      const size_t token = rows.first + row / G_, head = rows.j * G_ + row % G_, end = origin + row / G_ + 1;
      float* to = a_.attentions + ((rows.b * a_.H + head) * a_.S + token) * a_.C;
      for (size_t p = 0; p < end; p += kBlock) {
        const size_t n = std::min(kBlock, end - p);
        const char* keys = cache(a_.k_cache_out, rows.b, rows.j, p);
        const void* k = loops_.wide_keys ? widened(keys, n, scratch.keys) : keys;
        loops_.scores(scratch.packed + row / lanes * lanes * a_.A, k, n, a_.A, keys, scratch.scores);
        for (size_t i = 0; i < n; i++) {
          const float score = scratch.scores[i * lanes + row % lanes];
          to[p + i] = std::exp2((score - scratch.max[row]) * factor_) / scratch.sum[row];
        }
      }
      std::fill(to + end, to + a_.C, 0.0f);
    }
  }

  const CachedAttention& a_;
  const size_t G_;
  const size_t tokens_;      // of a token block
  const size_t blocks_;      // of tokens
  const size_t element_;     // bytes
  const size_t row_;         // bytes of a head
  const size_t block_rows_;  // rows of a token block
  const AttentionLoops& loops_;
  const size_t lane_rows_;  // the same, up to whole tiles
  size_t chunk_;            // positions
  size_t chunks_ = 1;       // of the longest row
  float factor_;            // of the scores, as powers of 2
};

}  // namespace

size_t CachedAttention::scratch_bytes(Isa isa) const { return Attention(*this, isa).bytes(); }

void CachedAttention::run(Isa isa, const Parallel& parallel, void* scratch) const {
  Attention(*this, isa).run(parallel, scratch);
}

}  // namespace glm
