// What a decoder does on a CPU between and inside forwards of a few rows, where PyTorch's operators
// cost more than the work in them.
//
// multiply_rows: states [n, in] times a weight [out, in], plus a bias. A weight is cut into panels
// of WIDTH outputs, which lie input by input. So it is read once, in order and far enough ahead, for
// up to MOST rows. (Register tiling as of Goto and van de Geijn, 2008; a library's product copies
// the weight into such panels at every call, which pays for many rows only.)
//
// Every output is summed in the same order, whichever rows are multiplied with it: a token's values
// do not depend on how many nodes the tree has that it is verified in.
//
// attend: attention of a few rows with a mask that hides most of what they drafted. Here too a row
// does not depend on the others, nor on what is hidden from it: the slots that it sees are summed in
// their order, as if there were no others.
//
// grow_level: the next level of a draft tree, from the draft's logits. walk: the path that the target
// takes through it. move_slots: the path's keys and values, to where they belong.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, MOST = 14;  // 32 registers: 14 x 2 sums, 2 of the weight, 1 of the state
#else
constexpr int LANES = 8, MOST = 6;  // 16 registers: 6 x 2 sums, 2 of the weight, 1 of the state
#endif
constexpr int VECTORS = 2, WIDTH = VECTORS * LANES;
constexpr int LINE = 64 / sizeof(float);  // what a prefetch brings
constexpr int64_t PAGE = 4096 / sizeof(float);  // inputs after which a place in a cache recurs
constexpr int64_t WAYS = 10;  // how many may share that place before it costs more than a copy
// Inputs between what one tile multiplies and what it prefetches; 0 for a whole panel.
constexpr int AHEAD = LANES == 16 ? 64 : 0;
constexpr int64_t GRAIN = 32768;  // weights that are worth a thread
constexpr size_t KEPT = 1 << 20;  // numbers of a copy that rounds use again
constexpr int64_t BLOCK = 64, TURNS = 16;  // slots and queries that attend together

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// One panel by ROWS rows; `apart` lies between the rows of `states`, `stride` between those of `out`.
// From `ahead` on, which moves by `step` for each input, is prefetched.
template <int ROWS>
void tile(const float* states, int64_t apart, int64_t inputs, const float* panel, const float* bias,
          float* out, int64_t stride, const float* ahead, int64_t step) {
  Vector sums[ROWS][VECTORS];
  for (int row = 0; row < ROWS; ++row)
    for (int v = 0; v < VECTORS; ++v) sums[row][v] = *(const Vector*)(bias + v * LANES);
  for (int64_t input = 0; input < inputs; ++input, panel += WIDTH, ahead += step) {
    Vector weights[VECTORS];
    for (int v = 0; v < VECTORS; ++v) weights[v] = *(const Vector*)(panel + v * LANES);
    for (int line = 0; line < WIDTH; line += LINE) __builtin_prefetch(ahead + line);
    for (int row = 0; row < ROWS; ++row) {
      const Vector state = states[row * apart + input] - Vector{};
      for (int v = 0; v < VECTORS; ++v) sums[row][v] += state * weights[v];
    }
  }
  for (int row = 0; row < ROWS; ++row)
    for (int v = 0; v < VECTORS; ++v) *(Vector*)(out + row * stride + v * LANES) = sums[row][v];
}

using Tile = decltype(&tile<1>);

template <int... INDEX>
constexpr std::array<Tile, sizeof...(INDEX)> tiles(std::integer_sequence<int, INDEX...>) {
  return {&tile<INDEX + 1>...};
}

constexpr auto TILES = tiles(std::make_integer_sequence<int, MOST>{});  // by rows, less one

at::Tensor multiply(const at::Tensor& states, const at::Tensor& weight, const at::Tensor& bias,
                    int64_t outputs) {
  const int64_t panels = weight.size(0), inputs = weight.size(1);
  TORCH_CHECK(states.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat &&
                  bias.scalar_type() == at::kFloat && weight.is_contiguous() &&
                  bias.is_contiguous() && weight.size(2) == WIDTH &&
                  bias.numel() == panels * WIDTH && states.size(-1) == inputs &&
                  (panels - 1) * WIDTH < outputs && outputs <= panels * WIDTH,
              "dynatree::multiply_rows: states ", states.sizes(), ", panels ", weight.sizes(),
              ", bias ", bias.sizes(), ", outputs ", outputs, " do not fit, or are not float32");
  const at::Tensor given = states.contiguous();
  auto sizes = given.sizes().vec();
  sizes.back() = outputs;
  at::Tensor result = at::empty(sizes, given.options());
  const int64_t rows = given.numel() / inputs, tall = (rows + MOST - 1) / MOST;
  const float* from = given.const_data_ptr<float>();
  int64_t apart = inputs;
  const int64_t highest = tall > 0 ? (rows + tall - 1) / tall : 0;  // rows of a tile
  if (highest * std::gcd(inputs, PAGE) > WAYS * PAGE) {
    // Rows a page apart share a place in the first cache, and drive each other out of it.
    apart += LINE;
    // Kept, but for a long prefill's: the allocator would return so much to the system, and fault
    // every page in anew.
    static thread_local std::vector<float> padded;
    const size_t needed = rows * apart;
    if (needed <= KEPT && KEPT < padded.size()) std::vector<float>().swap(padded);
    padded.resize(std::max(padded.size(), needed));
    float* copy = padded.data();
    for (int64_t row = 0; row < rows; ++row)
      std::copy_n(from + row * inputs, inputs, copy + row * apart);
    from = copy;
  }
  const float* panel = weight.const_data_ptr<float>();
  const float* added = bias.const_data_ptr<float>();
  float* to = result.mutable_data_ptr<float>();
  at::parallel_for(0, panels, 1 + (GRAIN - 1) / (inputs * WIDTH), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t columns = std::min<int64_t>(WIDTH, outputs - p * WIDTH);
      for (int64_t t = 0, first = 0; t < tall; ++t) {
        // As equal as can be: a tile of few rows is waited for as long as one of many.
        const int64_t count = (rows - first + (tall - t) - 1) / (tall - t);
        // While a panel is multiplied from the cache, the memory brings the next one: each of
        // its tiles asks for an equal share.
        const float* here = panel + p * inputs * WIDTH;
        const float* ahead = tall == 1 && AHEAD > 0 ? here + AHEAD * WIDTH
                                                    : here + inputs * WIDTH * (tall + t) / tall;
        const auto multiplied = [&](float* out, int64_t stride) {
          TILES[count - 1](from + first * apart, apart, inputs, here, added + p * WIDTH, out, stride,
                           ahead, WIDTH / tall);
        };
        float* out = to + first * outputs + p * WIDTH;
        if (columns == WIDTH) {
          multiplied(out, outputs);
        } else {
          float whole[MOST * WIDTH];
          multiplied(whole, WIDTH);
          for (int64_t row = 0; row < count; ++row)
            std::copy_n(whole + row * WIDTH, columns, out + row * outputs);
        }
        first += count;
      }
    }
  });
  return result;
}

using Floats = at::vec::Vectorized<float>;

const auto plus = [](Floats& a, Floats& b) { return a + b; };

// The scores of one query with the keys of `COUNT` slots: several, so that the processor need not
// wait for one sum.
template <int COUNT>
void scored(const float* query, const float* keys, int64_t stride, const int64_t* seen,
            int64_t size, float scale, float* scores) {
  const float* key[COUNT];
  Vector sums[COUNT];
  for (int k = 0; k < COUNT; ++k) {
    key[k] = keys + seen[k] * stride;
    sums[k] = Vector{};
  }
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES)
    for (int k = 0; k < COUNT; ++k)
      sums[k] += *(const Vector*)(query + i) * *(const Vector*)(key[k] + i);
  for (int k = 0; k < COUNT; ++k) {
    float score = at::vec::vec_reduce_all<float>(plus, Floats(sums[k]));
    for (int64_t rest = i; rest < size; ++rest) score += query[rest] * key[k][rest];
    scores[k] = score * scale;
  }
}

// Adds `COUNT` vectors of the values of `seen`, weighted.
template <int COUNT>
void weighted(const float* weights, const float* values, int64_t stride, const int64_t* seen,
              int64_t count, float* out) {
  Vector sums[COUNT];
  for (int v = 0; v < COUNT; ++v) sums[v] = *(const Vector*)(out + v * LANES);
  for (int64_t at = 0; at < count; ++at) {
    const float* value = values + seen[at] * stride;
    const Vector weight = weights[at] - Vector{};
    for (int v = 0; v < COUNT; ++v) sums[v] += weight * *(const Vector*)(value + v * LANES);
  }
  for (int v = 0; v < COUNT; ++v) *(Vector*)(out + v * LANES) = sums[v];
}

// The slots that a query sees.
struct Seen {
  const int64_t* slots;
  int64_t count;
};

// What lies in one head of a tensor [1, heads, n, size]: `stride` between the rows.
struct Part {
  const float* rows;
  int64_t stride;
};

// A few queries with those of the `slots` that each sees, in one head. They take turns at each BLOCK
// of slots, which stays in the first cache meanwhile. `weights` has `slots` numbers for each query,
// and `apart` lies between the rows of `out`.
void attend_rows(Part queries, Part keys, Part values, const Seen* seen, int64_t rows, int64_t size,
                 float scale, int64_t slots, float* weights, float* out, int64_t apart) {
  for (int64_t begin = 0; begin < slots; begin += BLOCK)
    for (int64_t row = 0; row < rows; ++row) {
      const auto score = [&](auto scored, int64_t at) {
        scored(queries.rows + row * queries.stride, keys.rows, keys.stride, seen[row].slots + at,
               size, scale, weights + row * slots + at);
      };
      const int64_t end = std::min(seen[row].count, begin + BLOCK);
      int64_t at = begin;
      for (; at + 4 <= end; at += 4) score(scored<4>, at);
      for (; at < end; ++at) score(scored<1>, at);
    }
  for (int64_t row = 0; row < rows; ++row) {
    float* own = weights + row * slots;
    const int64_t count = seen[row].count;
    const float top = at::vec::reduce_all<float>(
        [](Floats& a, Floats& b) { return at::vec::maximum(a, b); }, own, count);
    at::vec::map([top](Floats score) { return (score - Floats(top)).exp(); }, own, own, count);
    const float factor = 1.0f / at::vec::reduce_all<float>(plus, own, count);
    at::vec::map([factor](Floats weight) { return weight * Floats(factor); }, own, own, count);
    // Zeros, and not a number where nothing is seen.
    std::fill_n(out + row * apart, size, 0.0f * factor);
  }
  for (int64_t begin = 0; begin < slots; begin += BLOCK)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t count = std::min(seen[row].count - begin, BLOCK);
      const float* own = weights + row * slots + begin;
      const int64_t* places = seen[row].slots + begin;
      float* to = out + row * apart;
      int64_t i = 0;
      for (; i + 8 * LANES <= size; i += 8 * LANES)
        weighted<8>(own, values.rows + i, values.stride, places, count, to + i);
      for (; i + 4 * LANES <= size; i += 4 * LANES)
        weighted<4>(own, values.rows + i, values.stride, places, count, to + i);
      for (; i + LANES <= size; i += LANES)
        weighted<1>(own, values.rows + i, values.stride, places, count, to + i);
      for (; i < size; ++i)
        for (int64_t at = 0; at < count; ++at)
          to[i] += own[at] * values.rows[places[at] * values.stride + i];
    }
}

at::Tensor attend(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
                  const at::Tensor& mask, double scale) {
  const auto fits = [](const at::Tensor& tensor) {
    return tensor.dim() == 4 && tensor.size(0) == 1 && tensor.scalar_type() == at::kFloat &&
           tensor.stride(3) == 1;
  };
  TORCH_CHECK(fits(queries) && fits(keys) && fits(values) && keys.sizes() == values.sizes() &&
                  queries.size(3) == keys.size(3) && queries.size(1) % keys.size(1) == 0 &&
                  mask.scalar_type() == at::kBool && mask.numel() == queries.size(2) * keys.size(2) &&
                  mask.numel() > 0,
              "dynatree::attend: queries ", queries.sizes(), ", keys ", keys.sizes(), ", values ",
              values.sizes(), ", mask ", mask.sizes(), " do not fit, or are not float32 and bool");
  const int64_t heads = queries.size(1), rows = queries.size(2), size = queries.size(3);
  const int64_t slots = keys.size(2), shared = heads / keys.size(1);
  at::Tensor result = at::empty({1, rows, heads, size}, queries.options());
  const at::Tensor shown = mask.contiguous();
  const bool* shows = shown.const_data_ptr<bool>();
  std::vector<int64_t> listed(rows * slots);
  std::vector<Seen> seen(rows);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t* list = listed.data() + row * slots;
    int64_t count = 0;
    for (int64_t slot = 0; slot < slots; ++slot)
      if (shows[row * slots + slot]) list[count++] = slot;
    seen[row] = {list, count};
  }
  const float* query = queries.const_data_ptr<float>();
  const float* key = keys.const_data_ptr<float>();
  const float* value = values.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  // Each head's queries in equal parts of at most TURNS, so many that every thread has some.
  const int64_t threads = (at::get_num_threads() + heads - 1) / heads;  // for each head
  const int64_t wanted = std::max(threads, (rows + TURNS - 1) / TURNS);
  const int64_t most = (rows + wanted - 1) / wanted, parts = (rows + most - 1) / most;
  const int64_t worth = 1 + GRAIN / (slots * size * most);
  at::parallel_for(0, heads * parts, worth, [&](int64_t begin, int64_t end) {
    std::vector<float> weights(most * slots);
    for (int64_t each = begin; each < end; ++each) {
      const int64_t head = each / parts, first = each % parts * most;
      attend_rows({query + head * queries.stride(1) + first * queries.stride(2), queries.stride(2)},
                  {key + head / shared * keys.stride(1), keys.stride(2)},
                  {value + head / shared * values.stride(1), values.stride(2)},
                  seen.data() + first, std::min(most, rows - first), size, scale, slots,
                  weights.data(), out + (first * heads + head) * size, heads * size);
    }
  });
  return result;
}

// The `count` largest of `scores`, the largest first; not a number counts as larger than all.
void largest(const float* scores, int64_t size, int64_t count, float* best, int64_t* index) {
  for (int64_t at = 0, held = 0; at < size; ++at) {
    const float score = scores[at];
    if (held == count && score <= best[count - 1]) continue;
    int64_t place = held < count ? held++ : count - 1;
    for (; place > 0 && !(score <= best[place - 1]); --place) {
      best[place] = best[place - 1];
      index[place] = index[place - 1];
    }
    best[place] = score;
    index[place] = at;
  }
}

// The logarithm of the sum of exp(logit - top) over `logits`, in PyTorch's order.
float log_of_sum(const float* logits, int64_t size, float top) {
  const float sum = at::vec::map_reduce_all<float>(
      [top](Floats logit) { return (logit - Floats(top)).exp(); }, plus, logits, size);
  float logarithm[Floats::size()];
  Floats(sum).log().store(logarithm);
  return logarithm[0];
}

int64_t grow_level(const at::Tensor& logits, const std::optional<at::Tensor>& chosen, int64_t first,
                   int64_t size, int64_t count, double least, int64_t width, int64_t budget,
                   const at::Tensor& tokens, const at::Tensor& parents, const at::Tensor& depths,
                   const at::Tensor& log_probs, const at::Tensor& attends) {
  const int64_t rows = logits.size(0), vocabulary = logits.size(-1), capacity = tokens.numel();
  const auto holds = [&](const at::Tensor& tensor, at::ScalarType type, int64_t columns) {
    return tensor.scalar_type() == type && tensor.numel() == capacity * columns &&
           tensor.is_contiguous();
  };
  TORCH_CHECK(logits.dim() == 2 && 0 < count && count <= vocabulary && 0 < budget && 0 <= first &&
                  first + (chosen ? 1 : rows) <= size && (!chosen || chosen->numel() == rows) &&
                  size + std::min(width, rows * count) < capacity &&
                  holds(tokens, at::kLong, 1) && holds(parents, at::kLong, 1) &&
                  holds(depths, at::kLong, 1) && holds(log_probs, at::kFloat, 1) &&
                  holds(attends, at::kBool, capacity + 1),
              "dynatree::grow_level: logits ", logits.sizes(), ", count ", count, ", nodes ", size,
              " of ", capacity, " do not fit");
  const at::Tensor given = logits.to(at::kFloat).contiguous();
  const at::Tensor read = chosen ? chosen->contiguous() : at::Tensor();
  const int64_t* which = chosen ? read.const_data_ptr<int64_t>() : nullptr;
  const float* score = given.const_data_ptr<float>();
  int64_t *token = tokens.mutable_data_ptr<int64_t>(), *parent = parents.mutable_data_ptr<int64_t>(),
          *depth = depths.mutable_data_ptr<int64_t>();
  float* log_prob = log_probs.mutable_data_ptr<float>();
  bool* attend = attends.mutable_data_ptr<bool>();
  std::vector<int64_t> from(rows), found(rows * count);
  // The probabilities of the nodes that there are, and after them those of the candidates.
  std::vector<float> reached(log_prob, log_prob + size);
  reached.resize(size + rows * count);
  for (int64_t row = 0; row < rows; ++row) {
    from[row] = first + (which ? which[row] : row);
    TORCH_CHECK(first <= from[row] && from[row] < size, "dynatree::grow_level: no node ",
                from[row] - first, " in the level");
    float* best = reached.data() + size + row * count;
    largest(score + row * vocabulary, vocabulary, count, best, found.data() + row * count);
    const float top = best[0], rest = log_of_sum(score + row * vocabulary, vocabulary, top);
    for (int64_t child = 0; child < count; ++child)
      best[child] = best[child] - top - rest + log_prob[from[row]];
  }
  float over = -std::numeric_limits<float>::infinity();
  if (size + rows * count > budget) {
    // What a final selection would drop is not grown any further.
    std::vector<float> all = reached;
    std::nth_element(all.begin(), all.begin() + (budget - 1), all.end(), [](float a, float b) {
      return a > b || (std::isnan(a) && !std::isnan(b));
    });
    over = all[budget - 1];
  }
  const float lowest = static_cast<float>(least);
  int64_t kept = 0;
  for (int64_t each = 0; each < rows * count && kept < width; ++each) {
    const float value = reached[size + each];
    if (value < lowest || value < over) continue;
    const int64_t node = size + kept++, before = from[each / count];
    token[node] = found[each];
    parent[node] = before;
    depth[node] = depth[before] + 1;
    log_prob[node] = value;
    std::copy_n(attend + before * (capacity + 1), capacity + 1, attend + node * (capacity + 1));
    attend[node * (capacity + 1) + 1 + node] = true;
  }
  return kept;
}

at::Tensor walk(const at::Tensor& tokens, const at::Tensor& parents, const at::Tensor& choices) {
  const int64_t rows = choices.numel();
  for (const at::Tensor* each : {&tokens, &parents, &choices})
    TORCH_CHECK(each->dim() == 1 && each->scalar_type() == at::kLong && each->is_contiguous() &&
                    0 < rows && rows <= each->numel(),
                "dynatree::walk: tokens ", tokens.sizes(), ", parents ", parents.sizes(),
                ", choices ", choices.sizes(), " do not fit, or are not int64");
  const int64_t *token = tokens.const_data_ptr<int64_t>(),
                *parent = parents.const_data_ptr<int64_t>(),
                *choice = choices.const_data_ptr<int64_t>();
  std::vector<int64_t> path{0};
  // A parent comes before its children, so what is on the path already is not looked at again.
  for (int64_t node = 1; node < rows; ++node)
    if (parent[node] == path.back() && token[node] == choice[path.back()]) path.push_back(node);
  at::Tensor result = at::empty({static_cast<int64_t>(path.size())}, choices.options());
  std::copy(path.begin(), path.end(), result.mutable_data_ptr<int64_t>());
  return result;
}

void move_slots(const at::Tensor& storage, const at::Tensor& sources,
                const at::Tensor& destinations) {
  const int64_t count = sources.numel(), slots = storage.size(-2);
  const auto lie_in = [&](const at::Tensor& places) {
    const int64_t* place = places.const_data_ptr<int64_t>();
    return std::all_of(place, place + count, [&](int64_t p) { return 0 <= p && p < slots; });
  };
  TORCH_CHECK(storage.is_contiguous() && sources.is_contiguous() && destinations.is_contiguous() &&
                  destinations.numel() == count && lie_in(sources) && lie_in(destinations),
              "dynatree::move_slots: storage ", storage.sizes(), ", sources ", sources.sizes(),
              ", destinations ", destinations.sizes(), " do not fit");
  const int64_t bytes = storage.size(-1) * storage.element_size();
  const int64_t *from = sources.const_data_ptr<int64_t>(),
                *to = destinations.const_data_ptr<int64_t>();
  std::vector<char> moved(count * bytes);
  char* entries = static_cast<char*>(storage.mutable_data_ptr());
  for (int64_t left = storage.numel() / (slots * storage.size(-1)); left > 0; --left) {
    // All are read before one is written: slots may overlap.
    for (int64_t k = 0; k < count; ++k)
      std::copy_n(entries + from[k] * bytes, bytes, moved.data() + k * bytes);
    for (int64_t k = 0; k < count; ++k)
      std::copy_n(moved.data() + k * bytes, bytes, entries + to[k] * bytes);
    entries += slots * bytes;
  }
}

}  // namespace

TORCH_LIBRARY(dynatree, library) {
  library.def("multiply_rows(Tensor states, Tensor weight, Tensor bias, int outputs) -> Tensor");
  library.def(
      "attend(Tensor queries, Tensor keys, Tensor values, Tensor mask, float scale) -> Tensor");
  library.def(
      "grow_level(Tensor logits, Tensor? chosen, int first, int size, int count, float least,"
      " int width, int budget, Tensor(a!) tokens, Tensor(b!) parents, Tensor(c!) depths,"
      " Tensor(d!) log_probs, Tensor(e!) attends) -> int");
  library.def("walk(Tensor tokens, Tensor parents, Tensor choices) -> Tensor");
  library.def("move_slots(Tensor(a!) storage, Tensor sources, Tensor destinations) -> ()");
}

TORCH_LIBRARY_IMPL(dynatree, CPU, library) {
  library.impl("multiply_rows", &multiply);
  library.impl("attend", &attend);
  library.impl("grow_level", &grow_level);
  library.impl("walk", &walk);
  library.impl("move_slots", &move_slots);
}
