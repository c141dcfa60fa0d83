// What is stored of an encoded document, as ../encodings.py describes it.

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t AHEAD = 32;  // entries asked for before they are needed: most of the time here goes to waiting for them
constexpr int64_t HEAD = 15;  // bytes of a piece in its entry; of English one piece in thousands has more

struct Entry {
    uint64_t words[2];  // little-endian; the last byte is the length

    explicit Entry(const char* bytes) { std::memcpy(words, bytes, sizeof words); }
    int64_t length() const { return words[1] >> 56; }
};

struct Masks {  // of the first bytes of an entry, by their number
    uint64_t of[HEAD + 1][2] = {};
    Masks() {
        for (int n = 0; n <= HEAD; n++)
            for (int i = 0; i < n; i++) of[n][i / 8] |= uint64_t{0xff} << (8 * (i % 8));
    }
};

const Masks MASKS;

// Writes n ids as Tokens. `bytes` holds what each id stands for, one after the other, that of id i before ends[i];
// without `ends` it is not known. `heads` has an Entry for each id: its first HEAD bytes, and how many it
// has. (The tokenizer's own tables push these out of the caches: an entry is one miss, `ends` and `bytes` are two.)
// Returns 1 if all ids stand for `text`, 0 if not or not known, and -1 - i if the i-th is not in [0, limit).
// `drop_space`: a first byte that is a space does not count.
template <class Id, class Token>
int64_t store(const Id* ids, int64_t n, int64_t limit, Token* out, const char* heads, const char* bytes,
              const int64_t* ends, bool drop_space, const char* text, int64_t size) {
    bool equal = ends != nullptr;
    int64_t column = 0;
    for (int64_t i = 0; i < n; i++) {
        const int64_t id = ids[i];
        if (id < 0 || id >= limit) return -1 - i;
        out[i] = static_cast<Token>(id);
        if (!equal) continue;
        if (i + AHEAD < n) __builtin_prefetch(heads + sizeof(Entry) * ids[i + AHEAD]);
        const Entry piece(heads + sizeof(Entry) * id);
        if (piece.length() <= HEAD && column + int64_t{sizeof(Entry)} <= size && !drop_space) {
            const Entry found(text + column);
            const uint64_t* mask = MASKS.of[piece.length()];
            equal = (((piece.words[0] ^ found.words[0]) & mask[0]) | ((piece.words[1] ^ found.words[1]) & mask[1])) == 0;
            column += piece.length();
            continue;
        }
        int64_t begin = id ? ends[id - 1] : 0;
        if (drop_space && begin < ends[id]) {
            begin += bytes[begin] == ' ';
            drop_space = false;
        }
        const int64_t length = ends[id] - begin;
        equal = length <= size - column && std::memcmp(bytes + begin, text + column, length) == 0;
        column += length;
    }
    return equal && column == size;
}

// Bytes of the character at `c` if str.split() separates at it, else 0. Only those of two and more are looked up here.
int64_t wide_space(const unsigned char* c, const unsigned char* end) {
    if (*c == 0xc2) return end - c > 1 && (c[1] == 0x85 || c[1] == 0xa0) ? 2 : 0;
    if (end - c < 3) return 0;
    const int code = (*c & 0xf) << 12 | (c[1] & 0x3f) << 6 | (c[2] & 0x3f);
    const bool found = code == 0x1680 || (code >= 0x2000 && code <= 0x200a) || code == 0x2028 || code == 0x2029 ||
                       code == 0x202f || code == 0x205f || code == 0x3000;
    return found ? 3 : 0;
}

enum Kind : unsigned char { LETTER, SPACE, LEAD };  // LEAD: the first byte of what may be a wide space

struct Kinds {
    Kind of[256] = {};
    Kinds() {
        for (int c = 0x09; c <= 0x0d; c++) of[c] = SPACE;
        for (int c = 0x1c; c <= 0x20; c++) of[c] = SPACE;
        of[0xc2] = of[0xe1] = of[0xe2] = of[0xe3] = LEAD;
    }
};

const Kinds KINDS;

constexpr int BLOCK = 128;  // bytes

bool within(unsigned char c, unsigned char first, unsigned char last) {
    return static_cast<unsigned char>(c - first) <= last - first;
}

// Whether no byte of the block is a LEAD; then adds the words that begin in it. The loops are for a compiler to
// vectorize.
bool plain_block(const unsigned char* c, bool& apart, int64_t& words) {
    unsigned char spaces[BLOCK + 1], lead = 0, begin = 0;
    spaces[0] = apart;
    for (int i = 0; i < BLOCK; i++) {
        lead |= (c[i] == 0xc2) | within(c[i], 0xe1, 0xe3);
        spaces[i + 1] = within(c[i], 0x09, 0x0d) | within(c[i], 0x1c, 0x20);
    }
    if (lead) return false;
    for (int i = 0; i < BLOCK; i++) begin += spaces[i] & ~spaces[i + 1];
    words += begin;
    apart = spaces[BLOCK];
    return true;
}

}  // namespace

// How many words str.split() makes of a text in UTF-8.
extern "C" int64_t encodings_words(const unsigned char* text, int64_t size) {
    const unsigned char *c = text, *end = text + size;
    int64_t words = 0;
    bool apart = true;  // whether a word would begin here
    while (c < end) {
        if (end - c >= BLOCK && plain_block(c, apart, words)) {
            c += BLOCK;
            continue;
        }
        for (const unsigned char* stop = end - c < BLOCK ? end : c + BLOCK; c < stop;) {
            const Kind kind = KINDS.of[*c];
            const int64_t wide = kind == LEAD ? wide_space(c, end) : 0;
            const bool space = kind == SPACE || wide;
            words += apart & !space;
            apart = space;
            c += wide ? wide : 1;
        }
    }
    return words;
}

#define OF_TYPES(name, Id, Token)                                                                                      \
    extern "C" int64_t encodings_store_##name(const Id* ids, int64_t n, int64_t limit, Token* out, const char* heads,  \
                                              const char* bytes, const int64_t* ends, int64_t drop_space,              \
                                              const char* text, int64_t size) {                                        \
        return store(ids, n, limit, out, heads, bytes, ends, drop_space, text, size);                                  \
    }

OF_TYPES(1_2, uint8_t, uint16_t)
OF_TYPES(1_4, uint8_t, int32_t)
OF_TYPES(4_2, int32_t, uint16_t)
OF_TYPES(4_4, int32_t, int32_t)
