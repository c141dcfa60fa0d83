// What is stored of an encoded document, as ../encodings.py describes it.

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t LOAD = 8;  // bytes: most pieces have fewer, and are compared by one load each

uint64_t load(const char* bytes) {
    uint64_t loaded;
    std::memcpy(&loaded, bytes, LOAD);
    return loaded;
}

// Whether two runs of bytes are the same; LOAD of both can be read.
bool same_head(const char* a, const char* b, int64_t length) {
    const uint64_t differ = load(a) ^ load(b);
    return length == 0 || (differ << (8 * (LOAD - length))) == 0;
}

// Writes n ids as Tokens. `bytes` holds what each id stands for, one after the other, that of id i before ends[i], and
// LOAD more; without `ends` it is not known. Returns 1 if all ids stand for `text`, 0 if not or not known, and -1 - i if
// the i-th is not in [0, limit). `drop_space`: a first byte that is a space does not count.
template <class Id, class Token>
int64_t store(const Id* ids, int64_t n, int64_t limit, Token* out, const char* bytes, const int64_t* ends,
              bool drop_space, const char* text, int64_t size) {
    bool equal = ends != nullptr;
    int64_t column = 0;
    for (int64_t i = 0; i < n; i++) {
        const int64_t id = ids[i];
        if (id < 0 || id >= limit) return -1 - i;
        out[i] = static_cast<Token>(id);
        if (!equal) continue;
        int64_t begin = id ? ends[id - 1] : 0;
        if (drop_space && begin < ends[id]) {
            begin += bytes[begin] == ' ';
            drop_space = false;
        }
        const int64_t length = ends[id] - begin;
        if (length <= LOAD && column + LOAD <= size)
            equal = same_head(bytes + begin, text + column, length);
        else
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

}  // namespace

// How many words str.split() makes of a text in UTF-8.
extern "C" int64_t encodings_words(const unsigned char* text, int64_t size) {
    const unsigned char *c = text, *end = text + size;
    int64_t words = 0;
    bool apart = true;  // whether a word would begin here
    while (c < end) {
        const Kind kind = KINDS.of[*c];
        const int64_t wide = kind == LEAD ? wide_space(c, end) : 0;
        const bool space = kind == SPACE || wide;
        words += apart & !space;
        apart = space;
        c += wide ? wide : 1;
    }
    return words;
}

#define OF_TYPES(name, Id, Token)                                                                                      \
    extern "C" int64_t encodings_store_##name(const Id* ids, int64_t n, int64_t limit, Token* out, const char* bytes,  \
                                              const int64_t* ends, int64_t drop_space, const char* text,               \
                                              int64_t size) {                                                          \
        return store(ids, n, limit, out, bytes, ends, drop_space, text, size);                                         \
    }

OF_TYPES(1_2, uint8_t, uint16_t)
OF_TYPES(1_4, uint8_t, int32_t)
OF_TYPES(4_2, int32_t, uint16_t)
OF_TYPES(4_4, int32_t, int32_t)
