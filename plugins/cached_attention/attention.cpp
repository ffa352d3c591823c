// One task: a block of tokens of one row and key/value head against a range of positions, a block at a time, with
// online softmax. Few tokens: the range is a chunk of the context, and whoever finishes a head's last chunk merges them
// all; many tokens: every token block sees its whole past. So keys and values are read once for all their query heads,
// the work is even for any number of threads, and its split, hence the result, does not depend on that number.
#include "plugins/cached_attention/attention.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

namespace glm {
namespace {

constexpr size_t kRows = 192;  // of a token block
// A context is cut into chunks of at least so many positions per new token: a partial result is a few percent of what a
// chunk reads. There are enough tasks with so many chunks for each head; what they have to prepare is then little.
constexpr size_t kChunk = 6 * kBlock;
constexpr size_t kMostChunks = 8;
constexpr size_t kAlign = 64;
constexpr double kLog2E = 1.4426950408889634;

// Lends pieces of one 64-byte aligned allocation; with no memory behind it, it only counts.
class Arena {
 public:
  explicit Arena(void* memory) : next_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(size_t count) {
    char* piece = next_ ? next_ + used_ : nullptr;
    used_ += whole_lines(count * sizeof(T));
    return reinterpret_cast<T*>(piece);
  }
  size_t used() const { return used_; }

 private:
  char* next_;
  size_t used_ = 0;
};

const AttentionLoops& loops(Isa isa, Type cache) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return attention_avx512(cache);
  if (isa == Isa::avx2) return attention_avx2(cache);
#endif
  (void)isa;
  return attention_scalar(cache);
}

class Attention {
 public:
  Attention(const CachedAttention& args, Isa isa)
      : a_(args),
        G_(args.H / args.J),
        tokens_(std::max<size_t>(1, kRows / G_)),
        blocks_(ceil_div(args.S, tokens_)),
        element_(size_of(args.type)),
        cached_(args.A * size_of(args.cache_type)),
        block_rows_(std::min(tokens_, args.S) * G_),
        loops_(loops(isa, args.cache_type)) {
    const size_t tiles = ceil_div(block_rows_, loops_.rows);
    tile_ = ceil_div(block_rows_, tiles);
    words_ = ceil_div(args.A, loops_.per_word);
    query_ = words_ * loops_.per_word;
    // A pass over all positions for the probabilities needs the final sums.
    split_ = blocks_ == 1 && !args.attentions;
    for (size_t b = 0; b < args.B; b++) chunks_ = std::max(chunks_, chunks(b));
    factor_ = static_cast<float>(args.scale * kLog2E);
  }

  size_t bytes() const {
    Shared shared(*this, nullptr);
    return shared.bytes;
  }

  // Adds the stages, which keep `self` alive.
  static Flow::Done add(std::shared_ptr<const Attention> self, Flow& flow, void* memory, Flow::Done needs) {
    const CachedAttention& a = self->a_;
    const size_t heads = a.B * a.J, chunks = self->chunks_, blocks = self->blocks_;
    if (a.k_cache_out != a.k_cache || a.v_cache_out != a.v_cache) {
      needs |= flow.stage({heads, 0, [self](size_t i) { self->copy_head(i); }});
    }
    if (blocks == 1) {
      const Shared shared(*self, memory);
      for (size_t i = 0; i < heads; i++) new (shared.finished + i) std::atomic<uint32_t>(0);
      const auto attend = [=](size_t i) { self->attend_chunk(i / chunks, i % chunks, shared); };
      return flow.stage({heads * chunks, needs, attend});
    }
    const auto write = [self](size_t i) {
      Scratch scratch(*self);
      self->write(i / self->a_.J, i % self->a_.J, 0, self->a_.S, scratch);
    };
    const Flow::Done written = flow.stage({heads, needs, write});
    // Early token blocks are cheap: one from the start, one from the end, so that every run of tasks is even.
    const auto attend = [=](size_t i) {
      const size_t n = i % blocks;
      self->attend_block(i / blocks, n % 2 ? blocks - 1 - n / 2 : n / 2);
    };
    return flow.stage({heads * blocks, written, attend});
  }

 private:
  // What the chunks of a head leave for the one that merges them.
  struct Shared {
    Shared(const Attention& self, void* memory) {
      Arena arena(memory);
      const size_t partials = self.chunks_ > 1 ? self.a_.B * self.a_.J * self.chunks_ * self.block_rows_ : 0;
      finished = arena.take<std::atomic<uint32_t>>(self.a_.B * self.a_.J);
      max = arena.take<float>(partials);
      sum = arena.take<float>(partials * self.loops_.lanes);
      out = arena.take<float>(partials * self.a_.A);
      bytes = arena.used();
    }
    std::atomic<uint32_t>* finished;  // [B, J] chunks
    float* max;                       // [B, J, chunks, block rows]
    float* sum;                       // [B, J, chunks, block rows, lanes]
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
      Arena arena(reinterpret_cast<void*>(whole_lines(reinterpret_cast<uintptr_t>(memory.data()))));
      take(self, arena);
    }
    void take(const Attention& self, Arena& arena) {
      const size_t A = self.a_.A, rows = self.block_rows_;
      head = arena.take<float>(self.query_);
      q = arena.take<float>(rows * self.query_);
      keys = arena.take<float>(self.loops_.strip * self.words_);
      scores = arena.take<float>(rows * kBlock);
      seen = arena.take<int32_t>(self.tile_);
      decay = arena.take<float>(self.tile_);
      max = arena.take<float>(rows);
      sum = arena.take<float>(rows * self.loops_.lanes);
      out = arena.take<float>(rows * A);
    }
    float* head;    // [per word, words]
    float* q;       // [tiles, per word, words, tile], rotated and scaled
    float* keys;    // [words, strip]
    float* scores;  // [block rows, kBlock]
    int32_t* seen;  // [tile]
    float* decay;   // [tile]
    float* max;     // [block rows]
    float* sum;     // [block rows, lanes]
    float* out;     // [block rows, A]
  };

  // The rows of tokens first .. first + count - 1 of (b, j).
  struct Rows {
    size_t b, j, first, count;
  };

  static void copy(const void* from, void* to, size_t offset, size_t bytes) {
    if (from != to) std::memcpy(static_cast<char*>(to) + offset, static_cast<const char*>(from) + offset, bytes);
  }

  void copy_head(size_t i) const {
    const size_t bytes = a_.C * cached_;
    copy(a_.k_cache, a_.k_cache_out, i * bytes, bytes);
    copy(a_.v_cache, a_.v_cache_out, i * bytes, bytes);
  }

  size_t start(size_t b) const { return static_cast<size_t>(a_.write_index[b]); }
  // New tokens of row b that are not padding.
  size_t valid(size_t b) const {
    if (a_.length[b] <= a_.write_index[b]) return 0;
    return std::min(a_.S, static_cast<size_t>(a_.length[b] - a_.write_index[b]));
  }
  // Positions that row b sees.
  size_t context(size_t b) const { return valid(b) ? start(b) + valid(b) : 0; }
  // Positions of its chunks: whole blocks.
  size_t chunk(size_t b) const { return std::max(kChunk * a_.S, ceil_div(context(b), kMostChunks * kBlock) * kBlock); }
  size_t chunks(size_t b) const { return split_ ? std::max<size_t>(1, ceil_div(context(b), chunk(b))) : 1; }
  char* cache(void* cache, size_t b, size_t j, size_t position) const {
    return static_cast<char*>(cache) + ((b * a_.J + j) * a_.C + position) * cached_;
  }
  // Row b's token s, head j * G.
  char* out(size_t b, size_t j, size_t s) const {
    return static_cast<char*>(a_.out) + ((b * a_.S + s) * a_.H + j * G_) * a_.A * element_;
  }

  // Head n of q or k of a token, rotated, in scratch.head.
  void rotated(const void* x, size_t heads, size_t n, size_t token, Scratch& scratch) const {
    loops_.widen(a_.type, static_cast<const char*>(x) + (token * heads + n) * a_.A * element_, a_.A, scratch.head);
    loops_.rotate(a_.cos + token * a_.R, a_.sin + token * a_.R, a_.R, scratch.head);
  }

  // Writes tokens first .. last - 1 into the caches of (b, j), padding too.
  void write(size_t b, size_t j, size_t first, size_t last, Scratch& scratch) const {
    for (size_t s = first; s < last; s++) {
      const size_t token = b * a_.S + s;
      rotated(a_.k, a_.J, j, token, scratch);
      loops_.narrow(a_.cache_type, scratch.head, a_.A, cache(a_.k_cache_out, b, j, start(b) + s));
      const char* v = static_cast<const char*>(a_.v) + (token * a_.J + j) * a_.A * element_;
      char* to = cache(a_.v_cache_out, b, j, start(b) + s);
      if (a_.type == a_.cache_type) {
        std::memcpy(to, v, cached_);
      } else {
        loops_.widen(a_.type, v, a_.A, scratch.head);
        loops_.narrow(a_.cache_type, scratch.head, a_.A, to);
      }
    }
  }

  void attend_chunk(size_t head, size_t at, const Shared& shared) const {
    const size_t b = head / a_.J, j = head % a_.J, of = chunks(b);
    if (at >= of) return;
    Scratch scratch(*this);
    // Every chunk writes the new tokens that it is going to read; the last one the padding, too.
    const size_t first = at * chunk(b), last = at + 1 == of ? start(b) + a_.S : first + chunk(b);
    write(b, j, std::max(first, start(b)) - start(b), std::max(last, start(b)) - start(b), scratch);
    if (at == 0) clear_padding(b, j, 0, a_.S);
    const Rows rows{b, j, 0, valid(b)};
    if (rows.count == 0) return;

    if (of == 1) {
      attend(rows, 0, last, scratch);
      finish(rows, scratch.sum, scratch.out, scratch);
      if (a_.attentions) probabilities(rows, scratch);
      return;
    }
    const size_t whole = head * chunks_ * block_rows_, part = whole + at * block_rows_;
    scratch.max = shared.max + part;
    scratch.sum = shared.sum + part * loops_.lanes;
    scratch.out = shared.out + part * a_.A;
    attend(rows, first, last, scratch);
    if (shared.finished[head].fetch_add(1, std::memory_order_acq_rel) + 1 < of) return;
    float* sum = shared.sum + whole * loops_.lanes;
    merge(rows.count * G_, of, shared.max + whole, sum, shared.out + whole * a_.A);
    finish(rows, sum, shared.out + whole * a_.A, scratch);
  }

  void attend_block(size_t head, size_t block) const {
    const size_t b = head / a_.J, j = head % a_.J, first = block * tokens_, last = std::min(a_.S, first + tokens_);
    clear_padding(b, j, first, last);
    if (valid(b) <= first) return;
    const Rows rows{b, j, first, std::min(valid(b), last) - first};
    Scratch scratch(*this);
    attend(rows, 0, start(b) + last, scratch);
    finish(rows, scratch.sum, scratch.out, scratch);
    if (a_.attentions) probabilities(rows, scratch);
  }

  // Tokens first .. last - 1 as far as they are padding.
  void clear_padding(size_t b, size_t j, size_t first, size_t last) const {
    for (size_t s = std::max(first, valid(b)); s < last; s++) {
      std::memset(out(b, j, s), 0, G_ * a_.A * element_);
      for (size_t g = 0; a_.attentions && g < G_; g++) {
        std::fill_n(a_.attentions + ((b * a_.H + j * G_ + g) * a_.S + s) * a_.C, a_.C, 0.0f);
      }
    }
  }

  // Attention of the rows to positions from .. to - 1, causal: sums in scratch.max, sum, out.
  void attend(const Rows& rows, size_t from, size_t to, Scratch& scratch) const {
    const size_t lanes = loops_.lanes, count = rows.count * G_, tiles = ceil_div(count, tile_);
    const size_t origin = start(rows.b) + rows.first;  // position of the first token
    to = std::min(to, origin + rows.count);
    pack(rows, from, scratch);
    std::fill_n(scratch.max, count, -FLT_MAX);
    std::fill_n(scratch.sum, count * lanes, 0.0f);
    std::fill_n(scratch.out, count * a_.A, 0.0f);
    for (size_t p = from; p < to; p += kBlock) {
      const size_t n = std::min(kBlock, to - p);
      const char* values = cache(a_.v_cache_out, rows.b, rows.j, p);
      score(rows, p, n, values, scratch);
      // The next block's keys arrive while values are summed, every tile fetching its part of them.
      const char* next = cache(a_.k_cache_out, rows.b, rows.j, std::min(p + kBlock, a_.C));
      const size_t part = std::min(kBlock, a_.C - std::min(p + kBlock, a_.C)) * cached_ / tiles;
      for (size_t row = first_tile(origin, p); row < count; row += tile_, next += part) {
        const size_t height = std::min(tile_, count - row);
        const size_t first = origin + row / G_, last = origin + (row + height - 1) / G_;
        const size_t visible = std::min(n, last + 1 - p);
        const bool masked = first + 1 < p + visible;
        for (size_t i = 0; masked && i < height; i++) {
          const size_t end = origin + (row + i) / G_ + 1;
          scratch.seen[i] = static_cast<int32_t>(end > p ? std::min(end - p, visible) : 0);
        }
        float* scores = scratch.scores + row * kBlock;
        loops_.softmax(scores, masked ? scratch.seen : nullptr, height, visible, scratch.max + row,
                       scratch.sum + row * lanes, scratch.decay);
        loops_.accumulate(scores, scratch.decay, values, height, visible, a_.A, next, part, scratch.out + row * a_.A);
      }
    }
  }

  // The first row of the first tile that sees a position, if the first token is at `origin`.
  size_t first_tile(size_t origin, size_t position) const {
    return position > origin ? (position - origin) * G_ / tile_ * tile_ : 0;
  }

  // Scores of n positions from p for the tiles that see them, a strip at a time: it is transposed for all of them.
  // Meanwhile as many values arrive from `values` on.
  void score(const Rows& rows, size_t p, size_t n, const char* values, Scratch& scratch) const {
    const size_t count = rows.count * G_, tiles = ceil_div(count, tile_), origin = start(rows.b) + rows.first;
    const size_t part = loops_.strip * cached_ / tiles;
    for (size_t s = 0; s < n; s += loops_.strip) {
      const char* keys = cache(a_.k_cache_out, rows.b, rows.j, p + s);
      loops_.transpose(keys, std::min(loops_.strip, n - s), a_.A, scratch.keys);
      for (size_t row = first_tile(origin, p + s); row < count; row += tile_, values += part) {
        loops_.scores(scratch.q + row * query_, scratch.keys, std::min(tile_, count - row), words_, values, part,
                      scratch.scores + row * kBlock + s);
      }
    }
  }

  // Queries, rotated, rounded and scaled, element by element for a tile of rows. Meanwhile a block's keys arrive,
  // from position `from` on.
  void pack(const Rows& rows, size_t from, Scratch& scratch) const {
    const size_t count = rows.count * G_, part = std::min(kBlock, a_.C - from) * cached_ / count;
    const char* keys = cache(a_.k_cache_out, rows.b, rows.j, from);
    for (size_t row = 0; row < count; row++, keys += part) {
      for (size_t i = 0; i < part; i += kAlign) __builtin_prefetch(keys + i);
      rotated(a_.q, a_.H, rows.j * G_ + row % G_, rows.b * a_.S + rows.first + row / G_, scratch);
      loops_.round(a_.type, scratch.head, a_.A);
      const size_t tile = row / tile_ * tile_, height = std::min(tile_, count - tile);
      float* to = scratch.q + tile * query_ + row % tile_;
      for (size_t i = a_.A; i < query_; i++) scratch.head[i] = 0;
      for (size_t part = 0; part < loops_.per_word; part++) {
        for (size_t i = part; i < query_; i += loops_.per_word, to += height) *to = factor_ * scratch.head[i];
      }
    }
  }

  // The sums of all chunks, into those of the first.
  void merge(size_t count, size_t of,
             float* max,          // [chunks, block rows]
             float* sum,          // [chunks, block rows, lanes]
             float* out) const {  // [chunks, block rows, A]
    const auto add = [](float* total, const float* part, size_t n, float weight, bool first) {
      for (size_t i = 0; i < n; i++) total[i] = first ? weight * part[i] : total[i] + weight * part[i];
    };
    const size_t lanes = loops_.lanes;
    for (size_t row = 0; row < count; row++) {
      float top = max[row];
      for (size_t c = 1; c < of; c++) top = std::max(top, max[c * block_rows_ + row]);
      for (size_t c = 0; c < of; c++) {
        const size_t part = c * block_rows_ + row;
        const float weight = std::exp2(max[part] - top);
        add(out + row * a_.A, out + part * a_.A, a_.A, weight, c == 0);
        add(sum + row * lanes, sum + part * lanes, lanes, weight, c == 0);
      }
    }
  }

  // out from sums, rounded.
  void finish(const Rows& rows, const float* sum, const float* sums, Scratch& scratch) const {
    for (size_t row = 0; row < rows.count * G_; row++) {
      loops_.finish(sums + row * a_.A, sum + row * loops_.lanes, a_.A, scratch.head);
      char* to = out(rows.b, rows.j, rows.first + row / G_) + row % G_ * a_.A * element_;
      loops_.narrow(a_.type, scratch.head, a_.A, to);
    }
  }

  // The optional output: all scores once more, with the final maximum and sum.
  void probabilities(const Rows& rows, Scratch& scratch) const {
    const size_t lanes = loops_.lanes, count = rows.count * G_, origin = start(rows.b) + rows.first;
    const auto to = [&](size_t row) {
      const size_t head = rows.j * G_ + row % G_, token = rows.first + row / G_;
      return a_.attentions + ((rows.b * a_.H + head) * a_.S + token) * a_.C;
    };
    for (size_t p = 0; p < origin + rows.count; p += kBlock) {
      const size_t n = std::min(kBlock, origin + rows.count - p);
      score(rows, p, n, cache(a_.v_cache_out, rows.b, rows.j, p), scratch);
      for (size_t row = 0; row < count; row++) {
        const float* scores = scratch.scores + row * kBlock;
        float sum = 0;
        for (size_t i = 0; i < lanes; i++) sum += scratch.sum[row * lanes + i];
        for (size_t i = 0; i < n && p + i <= origin + row / G_; i++) {
          to(row)[p + i] = std::exp2(scores[i] - scratch.max[row]) / sum;
        }
      }
    }
    for (size_t row = 0; row < count; row++) {
      std::fill(to(row) + origin + row / G_ + 1, to(row) + a_.C, 0.0f);
    }
  }

  const CachedAttention a_;
  const size_t G_;
  const size_t tokens_;      // of a token block
  const size_t blocks_;      // of tokens
  const size_t element_;     // bytes
  const size_t cached_;      // bytes of a head in a cache
  const size_t block_rows_;  // rows of a token block
  const AttentionLoops& loops_;
  size_t tile_;        // rows
  size_t words_;       // of a key
  size_t query_;       // elements of a query, up to whole words
  bool split_;         // into chunks
  size_t chunks_ = 1;  // of the longest row
  float factor_;       // of the queries: scores are powers of 2
};

}  // namespace

size_t CachedAttention::scratch_bytes(Isa isa) const { return Attention(*this, isa).bytes(); }

Flow::Done CachedAttention::add(Flow& flow, Isa isa, void* scratch, Flow::Done needs) const {
  return Attention::add(std::make_shared<const Attention>(*this, isa), flow, scratch, needs);
}

}  // namespace glm
