// Forward passes and draws of a Llama, Qwen2 or Qwen3 decoder on a CPU, in float32.
//
// Compiled for the machine that it runs on and called through ctypes; `_compiled.py` is the other
// half. The unit of work is a row: one token of one sequence. All rows of a call go through a layer
// together, so that its weights are read once, and no row's arithmetic depends on another's: sums
// run in one order however many rows there are, so a row's result is the same bits in any batch
// and on any number of threads, each of which takes rows of its own.
//
// Weights [out, in] are held as panels [out / PANEL][in][PANEL]; gate and up share a panel, half of
// it each. Keys and values lie in pages of 16 positions, for each layer and key-value head
//
//     keys [head dim][16], values [16][head dim, rounded up to whole vectors]
//
// A sequence has the pages of its prompt, which its group shares, and then pages of its own.
// Dimensions i and i + D/2 of a head rotate together, as in transformers.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace {

// Vectors of the machine, and rows of a tile: as many as leave registers for two vectors of weights.
#if defined(__AVX512F__)
constexpr long LANES = 16, TILE = 12, PARTS = 4;
#elif defined(__AVX__)
constexpr long LANES = 8, TILE = 6, PARTS = 2;
#else
constexpr long LANES = 4, TILE = 6, PARTS = 2;
#endif
constexpr long PANEL = 2 * LANES;
constexpr long PAGE = 16;   // positions
constexpr long SHARE = 4;   // rows of one prompt that meet it together
constexpr long CHUNK = 128; // rows of a pass: more would not stay in a core's cache

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef double Wide __attribute__((vector_size(8 * LANES)));
typedef float Loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Vec load(const float *from) { return *reinterpret_cast<const Loose *>(from); }
inline void store(float *to, Vec value) { *reinterpret_cast<Loose *>(to) = value; }
inline Vec all(float value) { return value - Vec{}; }
inline long rounded(long count, long of) { return (count + of - 1) / of * of; }

typedef float Four __attribute__((vector_size(16)));

// Quarters of a vector first: fewer steps wait for each other.
template <class Join> inline float joined(Vec value, Join join) {
    Four parts[LANES / 4];
    std::memcpy(parts, &value, sizeof value);
    Four four = parts[0];
    for (long i = 1; i < LANES / 4; i++) four = join(four, parts[i]);
    return join(join(four[0], four[1]), join(four[2], four[3]));
}

inline float sum(Vec value) {
    return joined(value, [](auto a, auto b) { return a + b; });
}

inline float largest(Vec value) {
    return joined(value, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x: 2^n times Cephes' polynomial (expf) of the rest, which is within 2 units in the last place.
// 0 below -87, where float32 loses digits.
inline Vec exponential(Vec x) {
    x = x > 88.0f ? all(88.0f) : x;
    const Vec magic = all(12582912.0f); // 1.5 * 2^23: adding it leaves round(x) in the low bits
    Vec shifted = x * 1.44269504f + magic;
    Vec n = shifted - magic;
    Vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Vec y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r;
    y = y + 1.0f;
    Vec power = reinterpret_cast<Vec>((reinterpret_cast<Ints>(shifted) + 127) << 23);
    return x < -87.0f ? Vec{} : y * power;
}

// Memory of a thread, kept for its next call.
class Arena {
  public:
    ~Arena() { std::free(memory); }
    // Makes room for so many numbers; false where there is none.
    bool reset(long floats) {
        used = 0;
        if (floats <= size) return true;
        std::free(memory);
        memory = static_cast<float *>(std::aligned_alloc(64, rounded(4 * floats, 64)));
        size = memory ? floats : 0;
        return memory;
    }
    float *take(long floats) {
        float *part = memory + used;
        used += floats;
        return part;
    }

  private:
    float *memory = nullptr;
    long size = 0, used = 0;
};
thread_local Arena activations, last_logits;

} // namespace

extern "C" {

struct Layer {
    const float *norm, *qkv, *qkv_bias, *q_norm, *k_norm, *out, *norm2, *gate_up, *down;
};

struct Model {
    int64_t layers, width, heads, kv_heads, head_dim, inner, vocabulary;
    const float *embedding, *norm, *head, *cosines, *sines;
    const Layer *layer;
    float epsilon;
};

// Of `_rows.Rows`: state [7, capacity], tokens and logprobs [capacity + 1, columns].
struct Rows {
    int64_t *state;
    int64_t capacity;
    float *const *pages; // [capacity, pages_stride]
    int64_t pages_stride;
    int64_t *tokens;
    float *logprobs;
    int64_t columns;
    const bool *is_end;
    double temperature;
};
}

namespace {

enum { TOKEN, LENGTH, COUNT, BUDGET, HOME, ALIVE, HASH };

// One token: where it stands, and the positions of prompt and completion that it sees.
struct Row {
    int64_t token, position, prompt, own;
    long own_page; // index in `pages`
    float *const *pages;
    float *logits; // where they go, in whole panels; null: not wanted
};

// Products -------------------------------------------------------------------------------------

// out [M, PANEL] = a [M, depth] panel [depth, PANEL]
template <long M>
void tile(const float *a, long stride, long depth, const float *panel, float *out) {
    Vec sums[M][2];
    for (long m = 0; m < M; m++) sums[m][0] = sums[m][1] = Vec{};
    for (long k = 0; k < depth; k++, panel += PANEL) {
        const Vec left = load(panel), right = load(panel + LANES);
#pragma GCC unroll 16
        for (long m = 0; m < M; m++) {
            const float x = a[m * stride + k];
            sums[m][0] += left * x;
            sums[m][1] += right * x;
        }
    }
    for (long m = 0; m < M; m++) {
        store(out + m * PANEL, sums[m][0]);
        store(out + m * PANEL + LANES, sums[m][1]);
    }
}

typedef void (*Tile)(const float *, long, long, const float *, float *);
template <long... M> struct Tiles { static constexpr Tile of[] = {tile<M + 1>...}; };
template <long... M> constexpr Tiles<M...> tiles(std::integer_sequence<long, M...>);
constexpr auto &TILES = decltype(tiles(std::make_integer_sequence<long, TILE>{}))::of;

// a [n, depth] times panels; finish(row, panel, values [PANEL]) takes what comes out.
template <class Finish>
void product(const float *a, long stride, long n, long depth, const float *panels, long outputs,
             Finish finish) {
    alignas(64) float out[TILE * PANEL];
    const long blocks = (n + TILE - 1) / TILE;
    for (long panel = 0; panel * PANEL < outputs; panel++) {
        for (long block = 0; block < blocks; block++) {
            const long first = n * block / blocks, end = n * (block + 1) / blocks;
            TILES[end - first - 1](a + first * stride, stride, depth,
                                   panels + panel * depth * PANEL, out);
            for (long row = first; row < end; row++) finish(row, panel, out + (row - first) * PANEL);
        }
    }
}

// Element by element ---------------------------------------------------------------------------

// out = x / sqrt(mean(x^2) + epsilon) * weight
void normalise(const float *x, const float *weight, long count, float epsilon, float *out) {
    Vec squares = {};
    long i = 0;
    for (; i + LANES <= count; i += LANES) squares += load(x + i) * load(x + i);
    float whole = sum(squares);
    for (; i < count; i++) whole += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(whole / count + epsilon);
    for (i = 0; i < count; i++) out[i] = x[i] * scale * weight[i];
}

void rotate(float *head, long half, const float *cosines, const float *sines) {
    float *__restrict x = head, *__restrict y = head + half;
    for (long i = 0; i < half; i++) {
        const float a = x[i], b = y[i];
        x[i] = a * cosines[i] - b * sines[i];
        y[i] = b * cosines[i] + a * sines[i];
    }
}

// Attention ------------------------------------------------------------------------------------

struct Shape {
    long size, padded; // of a head: numbers, and whole vectors
    long keys, values; // where a layer's head has them in a page
    float scale;
};

// Scores of R queries at `count` pages; -inf at positions from a query's limit on.
template <long R>
void score(const float *const *queries, float *const *pages, long count, const long *limits,
           const Shape &shape, float *const *out) {
    Ints lane;
    for (long i = 0; i < LANES; i++) lane[i] = i;
    for (long page = 0; page < count; page++) {
        for (long part = 0; part < PAGE; part += LANES) {
            const float *keys = pages[page] + shape.keys + part;
            Vec sums[R][PARTS];
            for (long r = 0; r < R; r++)
                for (long p = 0; p < PARTS; p++) sums[r][p] = Vec{};
            long d = 0;
            for (; d + PARTS <= shape.size; d += PARTS) {
#pragma GCC unroll 4
                for (long p = 0; p < PARTS; p++) {
                    const Vec key = load(keys + (d + p) * PAGE);
#pragma GCC unroll 4
                    for (long r = 0; r < R; r++) sums[r][p] += key * queries[r][d + p];
                }
            }
            for (; d < shape.size; d++)
                for (long r = 0; r < R; r++)
                    sums[r][0] += load(keys + d * PAGE) * queries[r][d];
            const long first = page * PAGE + part;
            for (long r = 0; r < R; r++) {
                Vec whole = sums[r][0];
                for (long p = 1; p < PARTS; p++) whole += sums[r][p];
                const Ints there = lane < static_cast<int32_t>(limits[r] - first);
                store(out[r] + first, there ? whole * shape.scale : all(-INFINITY));
            }
        }
    }
}

// out [R][padded] += weights [R][positions] values, C vectors of a head at a time.
template <long R, long C>
void gather(const float *const *weights, float *const *pages, long positions, const Shape &shape,
            long first, float *const *out) {
    Vec sums[R][C];
    for (long r = 0; r < R; r++)
        for (long c = 0; c < C; c++) sums[r][c] = load(out[r] + first + c * LANES);
    for (long j = 0; j < positions; j++) {
        const float *values = pages[j / PAGE] + shape.values + j % PAGE * shape.padded + first;
        for (long c = 0; c < C; c++) {
            const Vec value = load(values + c * LANES);
            for (long r = 0; r < R; r++) sums[r][c] += value * weights[r][j];
        }
    }
    for (long r = 0; r < R; r++)
        for (long c = 0; c < C; c++) store(out[r] + first + c * LANES, sums[r][c]);
}

template <long R>
void weigh(const float *const *weights, float *const *pages, long positions, const Shape &shape,
           float *const *out) {
    long first = 0;
    for (; first + 2 * LANES <= shape.padded; first += 2 * LANES)
        gather<R, 2>(weights, pages, positions, shape, first, out);
    if (first < shape.padded) gather<R, 1>(weights, pages, positions, shape, first, out);
}

// Scores to e^(score - largest), in place; returns their sum.
float soften(float *scores, long count) {
    Vec top = all(-INFINITY);
    for (long i = 0; i < count; i += LANES) {
        const Vec x = load(scores + i);
        top = x > top ? x : top;
    }
    top = all(largest(top));
    Vec whole = {};
    for (long i = 0; i < count; i += LANES) {
        const Vec x = exponential(load(scores + i) - top);
        store(scores + i, x);
        whole += x;
    }
    return sum(whole);
}

// One layer's attention of R rows that share a prompt: o = sum_j softmax(q k_j / sqrt(D))_j v_j
template <long R>
void attend(const Model &model, const Row *rows, long layer, const float *joint, long stride,
            float *out, long out_stride, float *scratch, long span) {
    const long size = model.head_dim, repeats = model.heads / model.kv_heads;
    const long padded = rounded(size, LANES);
    const long head_floats = PAGE * (size + padded);
    long seen = 0, limits[R];
    for (long r = 0; r < R; r++) {
        limits[r] = rows[r].prompt;
        seen = rows[r].prompt > seen ? rows[r].prompt : seen;
    }
    const long prompt_pages = (seen + PAGE - 1) / PAGE;
    float *weights[R], *own[R], *found[R];
    for (long r = 0; r < R; r++) {
        weights[r] = scratch + r * span;
        own[r] = weights[r] + prompt_pages * PAGE;
        found[r] = scratch + R * span + r * padded;
    }
    for (long head = 0; head < model.heads; head++) {
        Shape shape{size, padded, 0, 0, 1.0f / std::sqrt(static_cast<float>(size))};
        shape.keys = (layer * model.kv_heads + head / repeats) * head_floats;
        shape.values = shape.keys + PAGE * size;
        const float *queries[R];
        for (long r = 0; r < R; r++) queries[r] = joint + r * stride + head * size;
        score<R>(queries, rows[0].pages, prompt_pages, limits, shape, weights);
        float totals[R];
        for (long r = 0; r < R; r++) {
            const long own_pages = (rows[r].own + PAGE - 1) / PAGE, count = rows[r].own;
            score<1>(queries + r, rows[r].pages + rows[r].own_page, own_pages, &count, shape, own + r);
            totals[r] = soften(weights[r], (prompt_pages + own_pages) * PAGE);
            std::memset(found[r], 0, padded * sizeof(float));
        }
        weigh<R>(weights, rows[0].pages, seen, shape, found);
        for (long r = 0; r < R; r++) {
            weigh<1>(own + r, rows[r].pages + rows[r].own_page, rows[r].own, shape, found + r);
            const float share = 1.0f / totals[r];
            float *to = out + r * out_stride + head * size;
            for (long d = 0; d < size; d++) to[d] = found[r][d] * share;
        }
    }
}

// The forward pass -----------------------------------------------------------------------------

// Writes a row's keys and values where it stands: behind what it sees of its own, or of the prompt.
void keep(const Model &model, const Row &row, long layer, const float *keys, const float *values) {
    const long size = model.head_dim, padded = rounded(size, LANES);
    const long last = (row.own ? row.own : row.prompt) - 1;
    float *page = row.pages[(row.own ? row.own_page : 0) + last / PAGE];
    for (long head = 0; head < model.kv_heads; head++) {
        float *to = page + (layer * model.kv_heads + head) * PAGE * (size + padded);
        for (long d = 0; d < size; d++) to[d * PAGE + last % PAGE] = keys[head * size + d];
        std::memcpy(to + PAGE * size + last % PAGE * padded, values + head * size, size * 4);
    }
}

// Runs up to CHUNK rows through the model; those that want logits get them. False: no memory.
bool pass(const Model &m, Row *rows, long n) {
    const long queries = m.heads * m.head_dim, joined = queries + 2 * m.kv_heads * m.head_dim;
    // Strides are never multiples of 4 KiB, where all rows of a tile would meet in one cache set.
    const auto padded = [](long count) { return rounded(count, PANEL) + LANES; };
    const long wide = padded(m.width), joint_wide = padded(joined), inner_wide = padded(m.inner);
    const long query_wide = padded(queries);
    long span = 0;
    for (long i = 0; i < n; i++) {
        const long length = rounded(rows[i].prompt, PAGE) + rounded(rows[i].own, PAGE);
        span = length > span ? length : span;
    }
    const long scratch_size = SHARE * (span + rounded(m.head_dim, LANES));
    const long row_size = 2 * wide + joint_wide + query_wide + inner_wide;
    if (!activations.reset(n * row_size + scratch_size)) return false;
    float *x = activations.take(n * wide), *normed = activations.take(n * wide);
    float *joint = activations.take(n * joint_wide), *attended = activations.take(n * query_wide);
    float *hidden = activations.take(n * inner_wide), *scratch = activations.take(scratch_size);

    const auto add = [&](long row, long panel, const float *values) {
        float *to = x + row * wide + panel * PANEL;
        store(to, load(to) + load(values));
        store(to + LANES, load(to + LANES) + load(values + LANES));
    };
    const auto normalise_all = [&](const float *weight) {
        for (long i = 0; i < n; i++)
            normalise(x + i * wide, weight, m.width, m.epsilon, normed + i * wide);
    };
    for (long i = 0; i < n; i++) {
        std::memcpy(x + i * wide, m.embedding + rows[i].token * m.width, m.width * 4);
        std::memset(x + i * wide + m.width, 0, (wide - m.width) * 4);
    }
    for (long index = 0; index < m.layers; index++) {
        const Layer &layer = m.layer[index];
        normalise_all(layer.norm);
        product(normed, wide, n, m.width, layer.qkv, joined,
                [&](long row, long panel, const float *values) {
                    float *to = joint + row * joint_wide + panel * PANEL;
                    const float *bias = layer.qkv_bias + panel * PANEL;
                    for (long i = 0; i < PANEL; i += LANES)
                        store(to + i, load(values + i) + load(bias + i));
                });
        for (long i = 0; i < n; i++) {
            float *row = joint + i * joint_wide;
            const long half = m.head_dim / 2;
            for (long head = 0; head < m.heads + m.kv_heads; head++) {
                float *part = row + head * m.head_dim;
                const float *weight = head < m.heads ? layer.q_norm : layer.k_norm;
                if (weight) normalise(part, weight, m.head_dim, m.epsilon, part);
                rotate(part, half, m.cosines + rows[i].position * half,
                       m.sines + rows[i].position * half);
            }
            keep(m, rows[i], index, row + queries, row + queries + m.kv_heads * m.head_dim);
        }
        if (index == m.layers - 1) {
            // From here on only rows whose logits are wanted matter.
            long left = 0;
            for (long i = 0; i < n; i++) {
                if (!rows[i].logits) continue;
                if (left < i) {
                    rows[left] = rows[i];
                    std::memcpy(x + left * wide, x + i * wide, wide * 4);
                    std::memcpy(joint + left * joint_wide, joint + i * joint_wide, joint_wide * 4);
                }
                left++;
            }
            n = left;
        }
        for (long i = 0; i < n;) {
            long share = 1;
            while (share < SHARE && i + share < n && rows[i + share].pages[0] == rows[i].pages[0])
                share++;
            const auto way = share == 4   ? attend<4>
                             : share == 3 ? attend<3>
                             : share == 2 ? attend<2>
                                          : attend<1>;
            way(m, rows + i, index, joint + i * joint_wide, joint_wide, attended + i * query_wide,
                query_wide, scratch, span);
            i += share;
        }
        product(attended, query_wide, n, queries, layer.out, m.width, add);
        normalise_all(layer.norm2);
        product(normed, wide, n, m.width, layer.gate_up, 2 * rounded(m.inner, LANES),
                [&](long row, long panel, const float *values) {
                    const Vec gate = load(values), up = load(values + LANES);
                    store(hidden + row * inner_wide + panel * LANES,
                          gate / (exponential(-gate) + 1.0f) * up);
                });
        product(hidden, inner_wide, n, m.inner, layer.down, m.width, add);
    }
    normalise_all(m.norm);
    product(normed, wide, n, m.width, m.head, m.vocabulary,
            [&](long row, long panel, const float *values) {
                std::memcpy(rows[row].logits + panel * PANEL, values, PANEL * 4);
            });
    return true;
}

// Draws ----------------------------------------------------------------------------------------

inline uint64_t finalise(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// As `_random.uniforms`.
inline double uniform(uint64_t state, uint64_t counter) {
    const uint64_t z = finalise(state ^ ((counter + 1) * 0x9E3779B97F4A7C15u));
    return static_cast<double>(z >> 11) * 0x1p-53;
}

// The sum of up to 8 vectors, in float64: in float32 a large vocabulary's tail would be lost.
constexpr long BLOCK = 8 * LANES;
double mass(const float *p, long count) {
    Wide lanes = {};
    for (long i = 0; i < count; i += LANES) lanes += __builtin_convertvector(load(p + i), Wide);
    double whole = 0.0;
    for (long i = 0; i < LANES; i++) whole += lanes[i];
    return whole;
}

// As `_sampler.Sampler.draw` without truncation: the token at which the cumulative sum of
// probabilities passes `point` of the whole; the most probable one at temperature 0. Overwrites
// the logits, whose memory goes on to a whole panel.
int64_t draw(float *logits, long count, double temperature, double point, float *logprob) {
    const float divisor = temperature > 0.0 ? static_cast<float>(temperature) : 1.0f;
    const long end = rounded(count, LANES);
    for (long i = count; i < end; i++) logits[i] = -INFINITY;
    Vec top = all(-INFINITY);
    for (long i = 0; i < end; i += LANES) {
        const Vec z = load(logits + i) / divisor;
        store(logits + i, z);
        top = z > top ? z : top;
    }
    const float best = largest(top);
    int64_t token = 0;
    if (temperature == 0.0)
        while (token < count - 1 && logits[token] != best) token++;
    double total = 0.0;
    for (long first = 0; first < end; first += BLOCK) {
        const long size = end - first < BLOCK ? end - first : BLOCK;
        for (long i = first; i < first + size; i += LANES)
            store(logits + i, exponential(load(logits + i) - best));
        total += mass(logits + first, size);
    }
    if (temperature > 0.0) {
        const double threshold = point * total;
        double passed = 0.0;
        token = -1;
        for (long first = 0; first < end && token < 0; first += BLOCK) {
            const long size = end - first < BLOCK ? end - first : BLOCK;
            const double block = mass(logits + first, size);
            double inside = passed;
            if (passed + block > threshold)
                for (long i = first; i < first + size && token < 0; i++) {
                    inside += static_cast<double>(logits[i]);
                    if (inside > threshold) token = i;
                }
            passed += block;
        }
        // A threshold that rounds up to the whole mass falls on the last token that has any.
        if (token < 0) token = count - 1;
        while (token > 0 && logits[token] == 0.0f) token--;
    }
    *logprob = static_cast<float>(std::log(static_cast<double>(logits[token]) / total));
    return token;
}

// Draws a row's next token and takes note of it, as `_rows.Rows.draw` does; whether it goes on.
bool draw_next(const Model &model, const Rows &all, int64_t index, float *logits) {
    const auto state = [&](long field) -> int64_t & {
        return all.state[field * all.capacity + index];
    };
    const int64_t count = state(COUNT)++;
    const int64_t where = state(HOME) * all.columns + count;
    const int64_t token = draw(logits, model.vocabulary, all.temperature,
                               uniform(state(HASH), count), all.logprobs + where);
    state(TOKEN) = all.tokens[where] = token;
    const bool goes_on = !all.is_end[token] && count + 1 < state(BUDGET);
    state(ALIVE) = goes_on;
    return goes_on;
}

Row row_of(const Rows &all, int64_t index, float *logits) {
    const int64_t *state = all.state + index;
    const int64_t length = state[LENGTH * all.capacity], count = state[COUNT * all.capacity];
    return Row{state[TOKEN * all.capacity], length + count - 1,
               length, count, (length + PAGE - 1) / PAGE,
               all.pages + index * all.pages_stride, logits};
}

// Runs the last token of the rows at `index`; logits [n, whole panels].
bool run(const Model &model, const Rows &all, const int64_t *index, long n, float *logits) {
    const long stride = rounded(model.vocabulary, PANEL);
    Row rows[CHUNK];
    for (long i = 0; i < n; i++) rows[i] = row_of(all, index[i], logits + i * stride);
    return pass(model, rows, n);
}

} // namespace

// What follows is called from Python; 0 says that there was no memory.
extern "C" {

// Columns of a panel: the caller packs weights, and rows of logits have whole panels.
int64_t panel() { return PANEL; }

// Numbers in a page.
int64_t page_size(const Model *model) {
    const long size = model->head_dim;
    return model->layers * model->kv_heads * PAGE * (size + rounded(size, LANES));
}

// Runs prompts; logits [prompts, whole panels] after the last token of each.
//
// Prompt i has the tokens starts[i] to starts[i + 1] of ids, and pages + i * pages_stride.
int64_t prefill(const Model *model, const int64_t *ids, const int64_t *starts, int64_t prompts,
                float *const *pages, int64_t pages_stride, float *logits) {
    const long stride = rounded(model->vocabulary, PANEL);
    Row rows[CHUNK];
    long n = 0;
    for (long i = 0; i < prompts; i++) {
        const long length = starts[i + 1] - starts[i];
        for (long j = 0; j < length; j++) {
            float *wanted = j == length - 1 ? logits + i * stride : nullptr;
            rows[n++] = Row{ids[starts[i] + j], j, j + 1, 0, 0, pages + i * pages_stride, wanted};
            if (n == CHUNK || (i == prompts - 1 && wanted)) {
                if (!pass(*model, rows, n)) return 0;
                n = 0;
            }
        }
    }
    return 1;
}

// Runs the last token of the rows at `index`; logits [n, whole panels].
int64_t step(const Model *model, const Rows *all, const int64_t *index, int64_t n, float *logits) {
    const long stride = rounded(model->vocabulary, PANEL);
    for (long first = 0; first < n; first += CHUNK) {
        const long count = n - first < CHUNK ? n - first : CHUNK;
        if (!run(*model, *all, index + first, count, logits + first * stride)) return 0;
    }
    return 1;
}

// Draws up to `steps` more tokens of the rows at `index`, of each until it ends; overwrites `index`.
int64_t decode(const Model *model, const Rows *all, int64_t *index, int64_t n, int64_t steps) {
    const long stride = rounded(model->vocabulary, PANEL);
    if (!last_logits.reset(CHUNK * stride)) return 0;
    float *logits = last_logits.take(CHUNK * stride);
    while (steps-- && n) {
        const long passes = (n + CHUNK - 1) / CHUNK;
        long left = 0;
        for (long part = 0; part < passes; part++) {
            const long first = n * part / passes, count = n * (part + 1) / passes - first;
            if (!run(*model, *all, index + first, count, logits)) return 0;
            for (long i = 0; i < count; i++) {
                const int64_t row = index[first + i];
                if (draw_next(*model, *all, row, logits + i * stride)) index[left++] = row;
            }
        }
        n = left;
    }
    return 1;
}
}
