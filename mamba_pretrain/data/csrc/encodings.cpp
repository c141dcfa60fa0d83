// What is stored of an encoded document, as ../encodings.py describes it.

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t AHEAD = 32;  // entries asked for before they are needed: most of the time here goes to waiting for them
constexpr int64_t HEAD = 15;  // bytes of a piece in its entry; of English one piece in thousands has more
constexpr int64_t ENTRY = HEAD + 1;
constexpr int64_t BLOCK_IDS = 256;

struct Pieces {  // as `_Pieces` in ../encodings.py
    int64_t number;
    // The first HEAD bytes of each, filled up with any, and then its length or 255, if that is less. (The tokenizer's own
    // tables push these out of the caches: an entry is one miss, `ends` and `bytes` are two.) Null: not known.
    const char* heads;
    const char* bytes;  // of all, one after the other
    const int64_t* ends;  // of each in `bytes`
    int64_t drops_space;  // whether a first byte that is a space does not count
};

// What pieces join to, held against a text.
class Comparison {
   public:
    Comparison(const Pieces& pieces, const char* text, int64_t size)
        : pieces_(pieces), drop_space_(pieces.drops_space), text_(text), left_(size) {}

    // Whether the pieces of n ids, at most BLOCK_IDS of them, go on as the text does. After a no, all is void.
    // `ahead`: how many more ids follow these.
    template <class Id>
    bool take(const Id* ids, int64_t n, int64_t ahead) {
        char joined[ENTRY * BLOCK_IDS], *end = joined;
        for (int64_t i = 0; i < n; i++) {
            if (i + AHEAD < n + ahead) __builtin_prefetch(pieces_.heads + ENTRY * ids[i + AHEAD]);
            const char* entry = pieces_.heads + ENTRY * ids[i];
            const int64_t length = static_cast<unsigned char>(entry[HEAD]);
            if (length > HEAD || drop_space_) {
                if (!equal(joined, end - joined) || !take_whole(ids[i])) return false;
                end = joined;
                continue;
            }
            std::memcpy(end, entry, ENTRY);  // as many as the processor copies at once; the next piece covers the rest
            end += length;
        }
        return equal(joined, end - joined);
    }

    bool is_at_end() const { return left_ == 0; }

   private:
    bool take_whole(int64_t id) {
        int64_t begin = id ? pieces_.ends[id - 1] : 0;
        if (drop_space_ && begin < pieces_.ends[id]) {
            begin += pieces_.bytes[begin] == ' ';
            drop_space_ = false;
        }
        return equal(pieces_.bytes + begin, pieces_.ends[id] - begin);
    }

    bool equal(const char* bytes, int64_t length) {
        if (length > left_ || std::memcmp(bytes, text_, length)) return false;
        text_ += length;
        left_ -= length;
        return true;
    }

    const Pieces& pieces_;
    bool drop_space_;
    const char* text_;
    int64_t left_;
};

// Writes n ids as Tokens. Returns 1 if all their pieces join to `text`, 0 if not or not known, and -1 - i if the i-th has
// no piece.
template <class Id, class Token>
int64_t store(const Pieces& pieces, const Id* ids, int64_t n, Token* __restrict out, const char* text, int64_t size) {
    Comparison comparison(pieces, text, size);
    bool equal = pieces.heads != nullptr;
    for (int64_t begin = 0; begin < n; begin += BLOCK_IDS) {
        const int64_t end = n - begin < BLOCK_IDS ? n : begin + BLOCK_IDS;
        int32_t least = 0, most = 0;
        for (int64_t i = begin; i < end; i++) {  // for a compiler to vectorize
            least = ids[i] < least ? ids[i] : least;
            most = ids[i] > most ? ids[i] : most;
            out[i] = static_cast<Token>(ids[i]);
        }
        if (least < 0 || most >= pieces.number)
            for (int64_t i = begin;; i++)
                if (ids[i] < 0 || ids[i] >= pieces.number) return -1 - i;
        equal = equal && comparison.take(ids + begin, end - begin, n - end);
    }
    return equal && comparison.is_at_end();
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

#define OF_TYPES(name, Id, Token)                                                                                \
    extern "C" int64_t encodings_store_##name(const Pieces* pieces, const Id* ids, int64_t n, Token* out,          \
                                              const char* text, int64_t size) {                                    \
        return store(*pieces, ids, n, out, text, size);                                                            \
    }

OF_TYPES(1_2, uint8_t, uint16_t)
OF_TYPES(1_4, uint8_t, int32_t)
OF_TYPES(4_2, int32_t, uint16_t)
OF_TYPES(4_4, int32_t, int32_t)
