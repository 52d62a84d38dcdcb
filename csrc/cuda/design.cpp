#include "design.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>

namespace fused_adaptive::cuda {
namespace {

struct Choice {
  const char* word;
  void (*choose)(Design&);
};
constexpr Choice kChoices[] = {
    {"chunks=ranges", [](Design& design) { design.chunks = Order::ranges; }},
    {"chunks=interleaved", [](Design& design) { design.chunks = Order::interleaved; }},
    {"chunks=ticket", [](Design& design) { design.chunks = Order::ticket; }},
    {"set_up=host", [](Design& design) { design.powers_are_given = true; }},
    {"set_up=device", [](Design& design) { design.powers_are_given = false; }},
    {"blocks=2", [](Design& design) { design.blocks = 2; }},
    {"blocks=3", [](Design& design) { design.blocks = 3; }},
};

}  // namespace

Design chosen_design() {
  Design design;
  const char* given = std::getenv("FUSED_ADAPTIVE_CUDA_DESIGN");
  std::istringstream words(given != nullptr ? given : "");
  for (std::string word; std::getline(words, word, ',');) {
    const auto found =
        std::find_if(std::begin(kChoices), std::end(kChoices), [&](const Choice& c) { return word == c.word; });
    if (found == std::end(kChoices)) {
      std::string all;
      for (const Choice& choice : kChoices) all += std::string(all.empty() ? "" : ", ") + choice.word;
      throw std::runtime_error("fused_adaptive: FUSED_ADAPTIVE_CUDA_DESIGN=" + std::string(given) + " has \"" + word +
                               "\"; choose among " + all + ", with commas between them");
    }
    found->choose(design);
  }
  return design;
}

}  // namespace fused_adaptive::cuda
