// Which tokens of an image stay, decided by one thread block.
//
// Written against a Block, so that the device (block.cuh) and the tests on the host run the same lines:
//   threads()        how many threads work together
//   each(n, f)       f(i) for every i < n in any order, done everywhere when it returns
//   each_apart(n, f) the same, but done only for the 32 indices that share i / 32, which share a warp
//   scan(value, use) use(thread, sum of value(t) over all threads t before it), done everywhere when it returns
//   increment(c)     adds one to a shared counter
// Functions run by the whole block with equal arguments return the same to every thread.
#pragma once

#include "scores.h"

namespace edgeprune {

constexpr int kSmallTokens = 256;  // up to here one thread per token ranks by counting
constexpr int kMaxTokens = EDGEPRUNE_MAX_TOKENS;
constexpr int kDigits = 256;

struct Selection {
  int tokens, kept, order, mode;
  float threshold;
};

// Shared memory of select_small.
struct SmallStorage {
  uint32_t keys[kSmallTokens];
  uint16_t ranks[kSmallTokens];        // of each token
  uint16_t by_rank[kSmallTokens];      // all tokens, best first
  uint16_t by_position[kSmallTokens];  // kept tokens, ascending
  int counter;
};

// Shared memory of select_large.
struct LargeStorage {
  uint64_t sorted[kMaxTokens];
  int histogram[kDigits];
  int digit, above, counter;
};

// Every token with a larger key stays, and of those with this key the first `ties`.
struct Pivot {
  uint32_t key;
  int ties;
};

EDGEPRUNE_HOST_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

EDGEPRUNE_HOST_DEVICE float mass_of(float score) { return score > 0 ? score : 0; }

// How many tokens the mode keeps. `score(i)` visits all tokens, best first when the mode is mass. Prefix sums are
// double, rounded to float, as torch forms them on a CPU: a thread sums a run of tokens, then the runs are scanned.
template <class Block, class Score>
EDGEPRUNE_DEVICE int count_tokens(const Block& block, int& counter, const Selection& selection, const Score& score) {
  const int n = selection.tokens;
  const float threshold = selection.threshold;
  if (selection.mode == EDGEPRUNE_TOP_K) return selection.kept;
  if (selection.mode == EDGEPRUNE_MASS && threshold >= 1) return n;
  block.each(1, [&](int) { counter = 0; });
  if (selection.mode == EDGEPRUNE_THRESHOLD) {
    block.each(n, [&](int i) {
      if (score(i) > threshold) block.increment(counter);
    });
    return counter;
  }
  const int run = (n + block.threads() - 1) / block.threads();
  block.scan(
      [&](int thread) {
        double sum = 0;
        for (int i = thread * run; i < smaller(n, (thread + 1) * run); ++i) sum += mass_of(score(i));
        return sum;
      },
      [&](int thread, double before) {
        for (int i = thread * run; i < smaller(n, (thread + 1) * run); ++i) {
          if (static_cast<float>(before) < threshold) block.increment(counter);
          before += mass_of(score(i));
        }
      });
  return counter > 1 ? counter : 1;
}

// How many tokens go before a token.
EDGEPRUNE_HOST_DEVICE int rank_of(const uint32_t* keys, int n, int token) {
  const uint32_t own = keys[token];
  int rank = 0;
  for (int i = 0; i < token; ++i) rank += keys[i] >= own;
  for (int i = token + 1; i < n; ++i) rank += keys[i] > own;
  return rank;
}

// The kept tokens in the order asked for; at most kSmallTokens tokens, and as many threads.
template <class Block>
EDGEPRUNE_DEVICE const uint16_t* select_small(const Block& block, SmallStorage& storage, const Selection& selection,
                                              const Scores& scores) {
  const int n = selection.tokens;
  block.each(n, [&](int i) { storage.keys[i] = key_of(scores(i)); });
  block.each(n, [&](int i) {
    const int rank = rank_of(storage.keys, n, i);
    storage.ranks[i] = static_cast<uint16_t>(rank);
    storage.by_rank[rank] = static_cast<uint16_t>(i);
  });
  if (selection.order == EDGEPRUNE_RANK) return storage.by_rank;
  const auto stays = [&](int i) { return i < n && storage.ranks[i] < selection.kept; };
  block.scan([&](int i) { return stays(i) ? 1 : 0; },
             [&](int i, int slot) {
               if (stays(i)) storage.by_position[slot] = static_cast<uint16_t>(i);
             });
  return storage.by_position;
}

// The count after select_small.
template <class Block>
EDGEPRUNE_DEVICE int count_small(const Block& block, SmallStorage& storage, const Selection& selection) {
  return count_tokens(block, storage.counter, selection,
                      [&](int rank) { return score_of(storage.keys[storage.by_rank[rank]]); });
}

// The key of the last token that stays: a radix select, eight bits at a time from the top.
template <class Block>
EDGEPRUNE_DEVICE Pivot find_pivot(const Block& block, LargeStorage& storage, const Selection& selection,
                                  const Scores& scores) {
  uint32_t prefix = 0;
  int missing = selection.kept;
  for (int shift = 24; shift >= 0; shift -= 8) {
    block.each(kDigits, [&](int digit) { storage.histogram[digit] = 0; });
    block.each(selection.tokens, [&](int i) {
      const uint32_t key = key_of(scores(i));
      const bool candidate = shift == 24 || (key ^ prefix) >> (shift + 8) == 0;
      if (candidate) block.increment(storage.histogram[key >> shift & (kDigits - 1)]);
    });
    const auto tokens_at = [&](int thread) { return thread < kDigits ? storage.histogram[kDigits - 1 - thread] : 0; };
    block.scan(tokens_at, [&](int thread, int above) {
      if (above < missing && missing <= above + tokens_at(thread)) {
        storage.digit = kDigits - 1 - thread;
        storage.above = above;
      }
    });
    prefix |= static_cast<uint32_t>(storage.digit) << shift;
    missing -= storage.above;
  }
  return {prefix, missing};
}

// place(slot, token) for every token that stays, slots ascending by position.
template <class Block, class Place>
EDGEPRUNE_DEVICE void place_kept(const Block& block, const Selection& selection, const Scores& scores, Pivot pivot,
                                 const Place& place) {
  const int n = selection.tokens;
  const int run = (n + block.threads() - 1) / block.threads();
  constexpr int kTie = 1 << 16;  // two counts in one word: larger keys below, ties above
  const auto weight = [&](int i) {
    const uint32_t key = key_of(scores(i));
    return key > pivot.key ? 1 : key == pivot.key ? kTie : 0;
  };
  block.scan(
      [&](int thread) {
        int sum = 0;
        for (int i = thread * run; i < smaller(n, (thread + 1) * run); ++i) sum += weight(i);
        return sum;
      },
      [&](int thread, int before) {
        for (int i = thread * run; i < smaller(n, (thread + 1) * run); ++i) {
          const int own = weight(i);
          const int ties = before / kTie;
          if (own == 1 || (own == kTie && ties < pivot.ties)) place(before % kTie + smaller(ties, pivot.ties), i);
          before += own;
        }
      });
}

// Sorts distinct keys, none of them 0, largest first: a bitonic network over the next power of two.
template <class Block>
EDGEPRUNE_DEVICE void sort_descending(const Block& block, uint64_t* keys, int n) {
  int size = 1;
  while (size < n) size *= 2;
  block.each(size - n, [&](int i) { keys[n + i] = 0; });
  for (int span = 2; span <= size; span *= 2) {
    for (int half = span / 2; half > 0; half /= 2) {
      const auto exchange = [&](int pair) {
        const int low = 2 * pair - (pair & (half - 1));
        const int high = low + half;
        const bool descending = (low & span) == 0;
        const uint64_t a = keys[low], b = keys[high];
        if ((a < b) == descending) {
          keys[low] = b;
          keys[high] = a;
        }
      };
      // 32 neighbouring pairs stay within 64 keys while half is at most 32, and need no barrier of the whole block.
      if (half > 32 || half == 1) {
        block.each(size / 2, exchange);
      } else {
        block.each_apart(size / 2, exchange);
      }
    }
  }
}

// Writes the kept tokens in the order asked for and the count; at least kDigits threads.
template <class Block>
EDGEPRUNE_DEVICE void select_large(const Block& block, LargeStorage& storage, const Selection& selection,
                                   const Scores& scores, int32_t* indices, int32_t* count) {
  const int n = selection.tokens;
  const bool ranked = selection.order == EDGEPRUNE_RANK;
  // Mass needs the scores of all tokens in rank order, and then no pivot is needed to rank the kept ones.
  const bool rank_all = selection.mode == EDGEPRUNE_MASS || (ranked && selection.kept == n);
  if (!ranked || !rank_all) {
    const Pivot pivot = find_pivot(block, storage, selection, scores);
    place_kept(block, selection, scores, pivot, [&](int slot, int token) {
      if (ranked) {
        storage.sorted[slot] = sort_key(key_of(scores(token)), token);
      } else {
        indices[slot] = token;
      }
    });
  }
  if (rank_all) block.each(n, [&](int i) { storage.sorted[i] = sort_key(key_of(scores(i)), i); });
  if (rank_all || ranked) sort_descending(block, storage.sorted, rank_all ? n : selection.kept);
  if (ranked) block.each(selection.kept, [&](int rank) { indices[rank] = token_of(storage.sorted[rank]); });
  const int kept = count_tokens(block, storage.counter, selection, [&](int i) {
    return rank_all ? score_of(static_cast<uint32_t>(storage.sorted[i] >> 32)) : scores(i);
  });
  block.each(1, [&](int) { *count = kept; });
}

}  // namespace edgeprune
