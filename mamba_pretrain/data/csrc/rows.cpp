// Rows of a split in one pass over its tokens: ids, labels and document numbers, as ../packing.py describes them.
//
// Tokens are read as unsigned numbers, of which negative ids are the largest, and each must be below `limit`. Every
// function returns -1, or the first row that it cannot make; the caller finds out why. B rows of L tokens.

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

// The same code for several widths of vectors; the loader of the library chooses. glibc has what that takes.
#if defined(__x86_64__) && defined(__GLIBC__)
#define ROWS extern "C" __attribute__((target_clones("avx2", "default"))) int64_t
#else
#define ROWS extern "C" int64_t
#endif
#define INLINED __attribute__((always_inline)) inline

namespace {

constexpr int64_t IGNORE = -100;
constexpr int64_t BLOCK = 1024;  // tokens: they stay in the innermost cache from one loop to the next

// ids[i] = tokens[i] and labels[i] = tokens[i + 1] for i < count; `last`: the last label is a token, too, else IGNORE.
// Returns the largest token read.
template <class Token>
INLINED Token widen(const Token* __restrict tokens, int64_t count, bool last, int64_t* __restrict ids,
                    int64_t* __restrict labels) {
    Token top = 0;
    const int64_t targets = last ? count : count - 1;
    for (int64_t begin = 0; begin < count; begin += BLOCK) {
        const int64_t end = std::min(count, begin + BLOCK), labelled = std::min(targets, end);
        for (int64_t i = begin; i < end; i++) top = std::max(top, tokens[i]);
        for (int64_t i = begin; i < labelled; i++) {
            ids[i] = tokens[i];
            labels[i] = tokens[i + 1];
        }
        for (int64_t i = labelled; i < end; i++) ids[i] = tokens[i];
    }
    if (!last) labels[targets] = IGNORE;
    return last ? std::max(top, tokens[count]) : top;
}

INLINED void fill(int32_t* numbers, int64_t begin, int64_t end, int32_t number) {
    for (int64_t i = begin; i < end; i++) numbers[i] = number;
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
        const bool goes_on = !std::binary_search(documents, documents + n, start + L);
        if (widen(tokens + start, L, goes_on, out.ids, out.labels) >= limit) return b;
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
        fill(out.seq_idx, column, L, number);
        out.padding[b] = 0;
    }
    return -1;
}

// An index file: byte offsets of n sequences at `offsets`, and as many documents' first sequences at `documents`.
struct Index {
    int fd;
    int64_t offsets, documents, n;
};

bool read_numbers(int fd, int64_t at, int64_t count, int64_t* numbers) {
    return pread(fd, numbers, count * sizeof *numbers, at) == static_cast<int64_t>(count * sizeof *numbers);
}

// The tokens (of `width` bytes) in [begin, end) with which documents begin. Reads a few pages of the file: documents are
// of similar lengths, so that the place of the first is guessed, and after two guesses halved once. False where each
// document is not one sequence, some are empty or out of order, or the file ends: that is for Python to look at.
bool find_documents(const Index& index, int64_t begin, int64_t end, int64_t total, int64_t width,
                    std::vector<int64_t>& found) {
    constexpr int64_t COUNT = 256;
    int64_t numbers[COUNT];
    int64_t low = 0, high = index.n;  // the first that is not below begin is one of [low, high]
    double before = 0, after = static_cast<double>(total) * width;
    const int64_t target = begin * width, stop = end * width;
    for (int step = 1; low < high; step++) {
        const double share = after > before ? (target - before) / (after - before) : 0.5;
        const int64_t guess = low + static_cast<int64_t>((high - low) * (step % 3 ? share : 0.5)) - COUNT / 2;
        const int64_t first = std::max(low, std::min(guess, high - COUNT)), count = std::min(COUNT, high - first);
        if (!read_numbers(index.fd, index.offsets + 8 * first, count, numbers)) return false;
        if (numbers[0] >= target) {
            high = first, after = numbers[0];
        } else if (numbers[count - 1] < target) {
            low = first + count, before = numbers[count - 1];
        } else {
            low = high = first + (std::lower_bound(numbers, numbers + count, target) - numbers);
        }
    }
    found.clear();
    for (bool more = true; more;) {
        const int64_t next = low + found.size(), count = std::min(COUNT, index.n - next);
        if (!read_numbers(index.fd, index.offsets + 8 * next, count, numbers)) return false;
        int64_t i = 0;
        for (; i < count && numbers[i] < stop; i++) {
            const int64_t token = numbers[i] / width;
            if (token < begin || (!found.empty() && token <= found.back())) return false;
            found.push_back(token);
        }
        more = i == COUNT;
    }
    for (int64_t i = 0; i < static_cast<int64_t>(found.size()); i += COUNT) {
        const int64_t count = std::min<int64_t>(COUNT, found.size() - i);
        if (!read_numbers(index.fd, index.documents + 8 * (low + i), count, numbers)) return false;
        for (int64_t k = 0; k < count; k++)
            if (numbers[k] != low + i + k) return false;
    }
    return true;
}

// As `windows`, with documents looked up in the file.
template <class Token>
int64_t searched(const Token* tokens, int64_t n_tokens, uint64_t limit, Index index, const int64_t* rows, int64_t B,
                 int64_t L, Outputs out) {
    std::vector<int64_t> found;
    for (int64_t b = 0; b < B; b++) {
        if (rows[b] < 0 || (rows[b] + 1) * L >= n_tokens) return b;
        if (!find_documents(index, rows[b] * L + 1, (rows[b] + 1) * L + 1, n_tokens, sizeof(Token), found)) return b;
        const Outputs at{out.ids + b * L, out.labels + b * L, out.seq_idx + b * L, out.padding + b};
        if (windows(tokens, n_tokens, limit, found.data(), found.size(), rows + b, 1, L, at) >= 0) return b;
    }
    return -1;
}

template <class Number>
Number at(const char* numbers, int64_t i) {  // of a file in which they are not aligned
    Number number;
    std::memcpy(&number, numbers + i * sizeof number, sizeof number);
    return number;
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

#define OF_WIDTH(bytes, Token)                                                                                         \
    ROWS rows_windows_##bytes(const Token* tokens, int64_t n_tokens, uint64_t limit, const int64_t* documents,         \
                              int64_t n, const int64_t* rows, int64_t B, int64_t L, int64_t* ids, int64_t* labels,     \
                              int32_t* seq_idx, int64_t* padding) {                                                    \
        return windows(tokens, n_tokens, limit, documents, n, rows, B, L, {ids, labels, seq_idx, padding});            \
    }                                                                                                                  \
    extern "C" int64_t rows_searched_##bytes(const Token* tokens, int64_t n_tokens, uint64_t limit, int64_t fd,        \
                                             int64_t offsets, int64_t documents, int64_t n, const int64_t* rows,       \
                                             int64_t B, int64_t L, int64_t* ids, int64_t* labels, int32_t* seq_idx,    \
                                             int64_t* padding) {                                                       \
        const Index index{static_cast<int>(fd), offsets, documents, n};                                                \
        return searched(tokens, n_tokens, limit, index, rows, B, L, {ids, labels, seq_idx, padding});                  \
    }                                                                                                                  \
    ROWS rows_packed_##bytes(const Token* tokens, int64_t n_tokens, uint64_t limit, const char* starts,                \
                             const char* lengths, const char* bounds, int64_t n_pieces, int64_t n_rows,                \
                             const int64_t* rows, int64_t B, int64_t L, int64_t* ids, int64_t* labels,                 \
                             int32_t* seq_idx, int64_t* padding) {                                                     \
        return packed(tokens, n_tokens, limit, starts, lengths, bounds, n_pieces, n_rows, rows, B, L,                  \
                      {ids, labels, seq_idx, padding});                                                                \
    }

OF_WIDTH(1, uint8_t)
OF_WIDTH(2, uint16_t)
OF_WIDTH(4, uint32_t)
OF_WIDTH(8, uint64_t)
