// Rows of a split in one pass over its tokens: ids, labels and document numbers, as ../packing.py describes them.
//
// Tokens are read as unsigned numbers, of which negative ids are the largest, and each must be below `limit`. Every
// function returns -1, or the first row that it cannot make; the caller finds out why. B rows of L tokens.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// The same code for several widths of vectors; the loader of the library chooses. glibc has what that takes.
#if defined(__x86_64__) && defined(__GLIBC__) && __GNUC__ >= 12
#define ROWS extern "C" __attribute__((target_clones("arch=x86-64-v4", "avx2", "default"))) int64_t
#elif defined(__x86_64__) && defined(__GLIBC__)
#define ROWS extern "C" __attribute__((target_clones("avx2", "default"))) int64_t
#else
#define ROWS extern "C" int64_t
#endif
#define INLINED __attribute__((always_inline)) inline

namespace {

constexpr int64_t IGNORE = -100;

// How many numbers from this one on come before a cache line. They are written apart, so that all others go to whole
// lines: stores across two of them take twice the time on some processors.
template <class Number>
int64_t to_line(const Number* number) {
    return -(reinterpret_cast<uintptr_t>(number) / sizeof(Number)) % (64 / sizeof(Number));
}

// ids[i] = tokens[i] and labels[i] = tokens[i + 1] for begin <= i < end. Returns the largest of tokens[i] and `top`.
template <class Token>
INLINED Token copy(const Token* __restrict tokens, int64_t begin, int64_t end, int64_t* __restrict ids,
                   int64_t* __restrict labels, Token top) {
    for (int64_t i = begin; i < end; i++) {
        top = std::max(top, tokens[i]);
        ids[i] = tokens[i];
        labels[i] = tokens[i + 1];
    }
    return top;
}

// As `copy` from 0 to `count`; `last`: the last label is a token, too, else IGNORE.
template <class Token>
INLINED Token widen(const Token* tokens, int64_t count, bool last, int64_t* ids, int64_t* labels) {
    const int64_t targets = last ? count : count - 1, apart = std::min(targets, to_line(ids));
    const Token top = copy(tokens, apart, targets, ids, labels, copy(tokens, 0, apart, ids, labels, Token{0}));
    if (last) return top;
    ids[targets] = tokens[targets];
    labels[targets] = IGNORE;
    return std::max(top, tokens[targets]);
}

INLINED void fill(int32_t* numbers, int64_t begin, int64_t end, int32_t number) {
    const int64_t whole = std::min(end, begin + to_line(numbers + begin));
    for (int64_t i = begin; i < whole; i++) numbers[i] = number;
    for (int64_t i = whole; i < end; i++) numbers[i] = number;
}

// Where B rows go: (B, L) each, and (B) positions of padding.
struct Outputs {
    int64_t *ids, *labels;
    int32_t* seq_idx;
    int64_t* padding;
};

// Row rows[b] is tokens [rows[b] L, (rows[b] + 1) L). Documents begin at `documents` (n), ascending.
template <class Token>
INLINED int64_t windows(const Token* tokens, int64_t n_tokens, uint64_t limit, const int64_t* documents, int64_t n,
                        const int64_t* rows, int64_t B, int64_t L, Outputs out) {
    for (int64_t b = 0; b < B; b++, out.ids += L, out.labels += L, out.seq_idx += L) {
        const int64_t start = rows[b] * L;
        if (rows[b] < 0 || start + L >= n_tokens) return b;
        if (widen(tokens + start, L, true, out.ids, out.labels) >= limit) return b;
        int64_t column = 0;
        int32_t number = 0;
        for (auto next = std::upper_bound(documents, documents + n, start); next < documents + n; next++) {
            const int64_t cut = *next - start;
            if (cut > L) break;
            if (cut <= column) return b;
            out.labels[cut - 1] = IGNORE;
            fill(out.seq_idx, column, cut, number++);
            column = cut;
        }
        if (out.labels[L - 1] != IGNORE && tokens[start + L] >= limit) return b;
        fill(out.seq_idx, column, L, number);
        out.padding[b] = 0;
    }
    return -1;
}

template <class Number>
Number at(const char* numbers, int64_t i) {  // of a file in which they are not aligned
    Number number;
    std::memcpy(&number, numbers + i * sizeof number, sizeof number);
    return number;
}

// An index file in memory: byte offsets of `n_sequences`, and the first sequences of `n_documents`.
struct Index {
    const char *offsets, *documents;
    int64_t n_sequences, n_documents;

    // As many of the one as of the other: each document is one sequence, if the index is sound.
    bool plain() const { return n_sequences == n_documents; }

    // Where document i begins, in bytes; -1 where the index is damaged.
    int64_t start(int64_t i, int64_t end) const {
        const int64_t sequence = plain() ? i : at<int64_t>(documents, i);
        if (sequence < 0 || sequence > n_sequences) return -1;
        return sequence == n_sequences ? end : at<int64_t>(offsets, sequence);
    }
};

// The Tokens in [begin, end) with which documents begin. False where some are empty or out of order: that is for Python
// to look at.
//
// Documents are of similar lengths, so that the place of the first is guessed, from both sides in turn: as many documents
// off as such a guess is wrong by, the next one is likely to be on the other side. Each look at another place is a cache
// miss, if not a page that is not there; the last steps are close together.
template <class Token>
bool find_documents(const Index& index, int64_t begin, int64_t end, int64_t total, std::vector<int64_t>& found) {
    constexpr int64_t CLOSE = 32, width = sizeof(Token);
    const int64_t target = begin * width, stop = end * width, all = total * width;
    int64_t low = 0, high = index.n_documents;  // the first that is not below the target is one of [low, high]
    double before = 0, after = all, side = -1;
    for (int step = 1; low < high; step++) {
        const int64_t span = high - low;
        int64_t guess = low + span / 2;
        if (span > CLOSE && step % 4 && after > before) {  // else the plain middle, which ends whatever the numbers are
            const double share = std::min(1.0, std::max(0.0, (target - before) / (after - before)));
            const double off = 1 + 1.5 * std::sqrt(span * share * (1 - share));
            guess = low + static_cast<int64_t>(std::min(span - 1.0, std::max(0.0, span * share + side * off)));
        }
        const int64_t number = index.start(guess, all);
        if (number < target)
            low = guess + 1, before = number, side = 1;
        else
            high = guess, after = number, side = -1;
    }
    found.clear();
    for (int64_t i = low; i < index.n_documents; i++) {
        const int64_t number = index.start(i, all), token = number / width;
        if (number >= stop) break;
        if (token < begin || (!found.empty() && token <= found.back())) return false;
        if (index.plain() && at<int64_t>(index.documents, i) != i) return false;
        found.push_back(token);
    }
    return true;
}

// As `windows`, with documents looked up in the index.
template <class Token>
INLINED int64_t searched(const Token* tokens, int64_t n_tokens, uint64_t limit, Index index, const int64_t* rows,
                         int64_t B, int64_t L, Outputs out) {
    std::vector<int64_t> found;
    for (int64_t b = 0; b < B; b++) {
        if (rows[b] < 0 || (rows[b] + 1) * L >= n_tokens) return b;
        if (!find_documents<Token>(index, rows[b] * L + 1, (rows[b] + 1) * L + 1, n_tokens, found)) return b;
        const Outputs at{out.ids + b * L, out.labels + b * L, out.seq_idx + b * L, out.padding + b};
        if (windows(tokens, n_tokens, limit, found.data(), found.size(), rows + b, 1, L, at) >= 0) return b;
    }
    return -1;
}

// Row r of a pack is pieces [bounds[r], bounds[r + 1]), as ../packs.py describes them.
template <class Token>
INLINED int64_t packed(const Token* tokens, int64_t n_tokens, uint64_t limit, const char* starts, const char* lengths,
                       const char* bounds, int64_t n_pieces, int64_t n_rows, const int64_t* rows, int64_t B, int64_t L,
                       Outputs out) {
    for (int64_t b = 0; b < B; b++, out.ids += L, out.labels += L, out.seq_idx += L) {
        if (rows[b] < 0 || rows[b] >= n_rows) return b;
        const int64_t first = at<int64_t>(bounds, rows[b]), stop = at<int64_t>(bounds, rows[b] + 1);
        if (first < 0 || first > stop || stop > n_pieces) return b;
        int64_t column = 0;
        int32_t number = 0;
        for (int64_t i = first; i < stop; i++) {
            const int64_t start = at<int64_t>(starts, i), length = at<int32_t>(lengths, i);
            const bool goes_on = length < 0;
            const int64_t count = goes_on ? -length : length;
            if (start < 0 || count == 0 || start > n_tokens - count - goes_on || column + count > L) return b;
            if (widen(tokens + start, count, goes_on, out.ids + column, out.labels + column) >= limit) return b;
            if (goes_on && tokens[start + count] >= limit) return b;
            fill(out.seq_idx, column, column + count, number);
            number += !goes_on;
            column += count;
        }
        out.padding[b] = L - column;
        for (int64_t i = column; i < L; i++) out.ids[i] = 0, out.labels[i] = IGNORE;
        fill(out.seq_idx, column, L, number);
    }
    return -1;
}

}  // namespace

// What all rows of a split are read from, as ../packing.py says it: one pointer for a call, each argument of which takes
// Python a tenth of a microsecond.
struct Source {
    const void* tokens;
    int64_t n_tokens;
    uint64_t limit;
    int64_t length;  // of a row
    const void* tables[3];
    int64_t counts[2];
};

#define ARGUMENTS                                                                                                      \
    const Source *s, const int64_t *rows, int64_t B, int64_t *ids, int64_t *labels, int32_t *seq_idx, int64_t *padding
#define OF_WIDTH(bytes, Token)                                                                                         \
    ROWS rows_windows_##bytes(ARGUMENTS) {                                                                             \
        return windows(static_cast<const Token*>(s->tokens), s->n_tokens, s->limit,                                    \
                       static_cast<const int64_t*>(s->tables[0]), s->counts[0], rows, B, s->length,                    \
                       {ids, labels, seq_idx, padding});                                                               \
    }                                                                                                                  \
    ROWS rows_searched_##bytes(ARGUMENTS) {                                                                            \
        const Index index{static_cast<const char*>(s->tables[0]), static_cast<const char*>(s->tables[1]),              \
                          s->counts[0], s->counts[1]};                                                                 \
        return searched(static_cast<const Token*>(s->tokens), s->n_tokens, s->limit, index, rows, B, s->length,        \
                        {ids, labels, seq_idx, padding});                                                              \
    }                                                                                                                  \
    ROWS rows_packed_##bytes(ARGUMENTS) {                                                                              \
        return packed(static_cast<const Token*>(s->tokens), s->n_tokens, s->limit,                                     \
                      static_cast<const char*>(s->tables[0]), static_cast<const char*>(s->tables[1]),                  \
                      static_cast<const char*>(s->tables[2]), s->counts[0], s->counts[1], rows, B, s->length,          \
                      {ids, labels, seq_idx, padding});                                                                \
    }

OF_WIDTH(1, uint8_t)
OF_WIDTH(2, uint16_t)
OF_WIDTH(4, uint32_t)
OF_WIDTH(8, uint64_t)
