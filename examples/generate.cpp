// Continues a text in two ways from the same place, and once more from a file.
//   generate FOLDER [PROMPT]
#include <krait/krait.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: generate FOLDER [PROMPT]\n");
    return 2;
  }
  try {
    krait::LanguageModel model = krait::LanguageModel::load(argv[1]);
    std::cout << model.info().parameters << " parameters, " << model.info().state_bytes
              << " bytes of state\n";

    // The state is all that the model remembers of a text. It is a value: a copy is a bookmark.
    krait::State state;
    model.read(state, argc > 2 ? argv[2] : "Once upon a time");
    const krait::State bookmark = state;

    krait::TextOptions options;
    options.max_tokens = 60;
    options.seed = 1;
    options.on_text = [](std::string_view text) {  // as it is written
      std::cout << text << std::flush;
      return true;
    };
    const std::string first = model.generate(state, options).text;
    std::cout << '\n';

    state = bookmark;  // back to the prompt
    options.seed = 2;
    model.generate(state, options);
    std::cout << '\n';

    // A state outlives the program in a file.
    const std::vector<std::byte> bytes = bookmark.to_bytes();
    std::ofstream("state.bin", std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
    std::ifstream file("state.bin", std::ios::binary);
    const std::vector<char> read{std::istreambuf_iterator<char>(file), {}};
    state = krait::State::from_bytes(std::as_bytes(std::span(read)));
    options.seed = 1;
    options.on_text = {};
    const bool same = model.generate(state, options).text == first;
    std::cout << (same ? "The kept state gave the same text again.\n" : "The texts differ!\n");
    return same ? 0 : 1;
  } catch (const std::exception& e) {
    std::cerr << "error: " << e.what() << '\n';
    return 1;
  }
}
