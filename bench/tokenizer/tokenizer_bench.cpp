// tokenizer_bench: the tokenizer alone, for measuring it and for comparing it with others.
//
//   tokenizer_bench encode TOKENIZER [text]  documents on standard input, ids on standard output:
//       each as a 4-byte little-endian count and that many bytes (ids, 4 bytes each); `text` takes
//       special tokens' text as ordinary text
//   tokenizer_bench decode TOKENIZER     the way back
//   tokenizer_bench time TOKENIZER REPEATS FILE...   on one thread: MB/s of the text of the files,
//       documents of 4 KB to 64 KB cut at line ends; cold is the first pass, with an empty cache,
//       warm the best of the others; and an XXH3 of the ids
//
// Built beside the project, with B its build folder:
//   g++ -std=c++20 -O2 -Isrc bench/tokenizer/tokenizer_bench.cpp $B/libpith_data.a
//   $B/libpith_core.a
//       -lpcre2-8 -lutf8proc -lzstd -lz -lxxhash -lpthread -o tokenizer_bench
#include <xxhash.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include "core/check.h"
#include "core/json.h"
#include "data/tokenizer.h"

namespace pith {

// Processor time of this thread, which other programs on the machine do not lengthen.
static double seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

static bool read_block(std::vector<char>& block, size_t unit) {
  uint32_t count = 0;
  if (fread(&count, 4, 1, stdin) != 1) return false;
  block.resize(count * unit);
  if (fread(block.data(), unit, count, stdin) != count) failed("standard input", "is cut short");
  return true;
}

static void write_block(const void* data, size_t count, size_t unit) {
  const auto size = static_cast<uint32_t>(count);
  fwrite(&size, 4, 1, stdout);
  fwrite(data, unit, count, stdout);
}

static void encode(const Tokenizer& tokenizer, bool as_text) {
  EncodeScratch scratch;
  std::vector<char> block;
  std::vector<uint32_t> ids;
  while (read_block(block, 1)) {
    ids.clear();
    tokenizer.encode({block.data(), block.size()}, ids, as_text, scratch);
    write_block(ids.data(), ids.size(), 4);
  }
}

static void decode(const Tokenizer& tokenizer) {
  std::vector<char> block;
  while (read_block(block, 4)) {
    const auto* ids = reinterpret_cast<const uint32_t*>(block.data());
    const std::string text = tokenizer.decode({ids, block.size() / 4}, SpecialTokens::Keep);
    write_block(text.data(), text.size(), 1);
  }
}

static std::vector<std::string_view> documents_of(std::string_view text) {
  std::vector<std::string_view> documents;
  for (size_t size = 4096; !text.empty(); size = size >= 65536 ? 4096 : 2 * size) {
    size_t end = text.size() <= size ? text.size() : text.rfind('\n', size);
    end = end == std::string_view::npos ? text.find('\n', size) : end;
    end = std::min(end, text.size() - 1) + 1;
    documents.push_back(text.substr(0, end));
    text.remove_prefix(end);
  }
  return documents;
}

static void time_files(const Tokenizer& tokenizer, int repeats, int count, char** paths) {
  for (int i = 0; i < count; i++) {
    const std::string text = replace_invalid_utf8(read_text_file(paths[i]));
    const std::vector<std::string_view> documents = documents_of(text);
    EncodeScratch scratch;
    std::vector<uint32_t> ids;
    double cold = 0, warm = 0;
    size_t tokens = 0;
    XXH3_state_t* hash = XXH3_createState();
    XXH3_64bits_reset(hash);
    for (int pass = 0; pass <= repeats; pass++) {
      double spent = 0;
      for (const std::string_view document : documents) {
        ids.clear();
        const double begin = seconds();
        tokenizer.encode(document, ids, false, scratch);
        spent += seconds() - begin;
        if (pass) continue;
        tokens += ids.size();
        XXH3_64bits_update(hash, ids.data(), 4 * ids.size());
      }
      const double speed = static_cast<double>(text.size()) / 1e6 / spent;
      (pass ? warm : cold) = pass ? std::max(warm, speed) : speed;
    }
    printf("%-24s %9zu bytes %9zu ids  cold %6.1f  warm %6.1f MB/s  %016llx\n", paths[i],
        text.size(), tokens, cold, warm, static_cast<unsigned long long>(XXH3_64bits_digest(hash)));
    XXH3_freeState(hash);
  }
}

static int run(int argc, char** argv) {
  const std::string mode = argc > 2 ? argv[1] : "";
  if (mode != "encode" && mode != "decode" && !(mode == "time" && argc > 4))
    bad_input("tokenizer_bench", "has other arguments", "see the top of its source");
  const double begin = seconds();
  const Tokenizer tokenizer = Tokenizer::load(argv[2]);
  fprintf(stderr, "loaded in %.3f s\n", seconds() - begin);
  if (mode == "encode") encode(tokenizer, argc > 3 && !strcmp(argv[3], "text"));
  if (mode == "decode") decode(tokenizer);
  if (mode == "time") time_files(tokenizer, atoi(argv[3]), argc - 4, argv + 4);
  return kExitDone;
}

}  // namespace pith

int main(int argc, char** argv) {
  try {
    return pith::run(argc, argv);
  } catch (const pith::Error& error) {
    fprintf(stderr, "error: %s\n", error.what());
    return error.exit_code;
  }
}
