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
// likely_children: the next level of a draft tree, from the draft's logits.

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <utility>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/log_softmax.h>
#include <torch/library.h>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, MOST = 14;  // 32 registers: 14 x 2 sums, 2 of the weight, 1 of the state
#else
constexpr int LANES = 8, MOST = 6;  // 16 registers: 6 x 2 sums, 2 of the weight, 1 of the state
#endif
constexpr int VECTORS = 2, WIDTH = VECTORS * LANES;
constexpr int LINE = 64 / sizeof(float);  // what a prefetch brings
constexpr int64_t GRAIN = 32768;  // weights that are worth a thread

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// One panel by ROWS rows; `stride` lies between the rows of `out`. From `ahead` on, which moves by
// `step` for each input, is prefetched.
template <int ROWS>
void tile(const float* states, int64_t inputs, const float* panel, const float* bias, float* out,
          int64_t stride, const float* ahead, int64_t step) {
  Vector sums[ROWS][VECTORS];
  for (int row = 0; row < ROWS; ++row)
    for (int v = 0; v < VECTORS; ++v) sums[row][v] = *(const Vector*)(bias + v * LANES);
  for (int64_t input = 0; input < inputs; ++input, panel += WIDTH, ahead += step) {
    Vector weights[VECTORS];
    for (int v = 0; v < VECTORS; ++v) weights[v] = *(const Vector*)(panel + v * LANES);
    for (int line = 0; line < WIDTH; line += LINE) __builtin_prefetch(ahead + line);
    for (int row = 0; row < ROWS; ++row) {
      const Vector state = states[row * inputs + input] - Vector{};
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
        const float* ahead = here + inputs * WIDTH * (tall + t) / tall;
        const auto multiplied = [&](float* out, int64_t stride) {
          TILES[count - 1](from + first * inputs, inputs, here, added + p * WIDTH, out, stride,
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

std::tuple<at::Tensor, at::Tensor, at::Tensor> children(const at::Tensor& logits,
                                                        const at::Tensor& parents, int64_t count,
                                                        double least) {
  TORCH_CHECK(logits.dim() == 2 && parents.dim() == 1 && logits.size(0) == parents.size(0) &&
                  0 < count && count <= logits.size(1) && parents.scalar_type() == at::kFloat,
              "dynatree::likely_children: logits ", logits.sizes(), ", log-probabilities ",
              parents.sizes(), ", count ", count, " do not fit, or are not float32");
  const at::Tensor scores = at::log_softmax(logits, -1, at::kFloat).contiguous();
  const at::Tensor given = parents.contiguous();
  const int64_t rows = scores.size(0), vocabulary = scores.size(1), most = rows * count;
  at::Tensor nodes = at::empty({most}, scores.options().dtype(at::kLong));
  at::Tensor tokens = at::empty_like(nodes), log_probs = at::empty({most}, scores.options());
  const float* score = scores.const_data_ptr<float>();
  const float* above = given.const_data_ptr<float>();
  int64_t *node = nodes.mutable_data_ptr<int64_t>(), *token = tokens.mutable_data_ptr<int64_t>();
  float* log_prob = log_probs.mutable_data_ptr<float>();
  const float lowest = static_cast<float>(least);
  int64_t kept = 0;
  for (int64_t row = 0; row < rows; ++row) {
    // What is kept is never ahead of what is read.
    largest(score + row * vocabulary, vocabulary, count, log_prob + kept, token + kept);
    for (int64_t child = 0, first = kept; child < count; ++child) {
      const float reached = log_prob[first + child] + above[row];
      if (reached < lowest) continue;
      node[kept] = row * count + child;
      token[kept] = token[first + child];
      log_prob[kept++] = reached;
    }
  }
  if (kept == most) return {nodes, tokens, log_probs};
  return {nodes.narrow(0, 0, kept), tokens.narrow(0, 0, kept), log_probs.narrow(0, 0, kept)};
}

}  // namespace

TORCH_LIBRARY(dynatree, library) {
  library.def("multiply_rows(Tensor states, Tensor weight, Tensor bias, int outputs) -> Tensor");
  library.def(
      "likely_children(Tensor logits, Tensor log_probs, int count, float least)"
      " -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dynatree, CPU, library) {
  library.impl("multiply_rows", &multiply);
  library.impl("likely_children", &children);
}
