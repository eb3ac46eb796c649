// held_out: what a loss on held-out documents means in words everybody can compare.
// defines: HeldOutText, held_out_text, bits_per_byte, find_tokenizer
#pragma once

#include "data/dataset.h"

namespace pith {

// The tokenizer.json in the folder of `path` (or in `path` itself), or in one above; empty if none.
string find_tokenizer(const string& path);

struct HeldOutText {
  int64_t labels = 0;  // predicted tokens
  int64_t bytes = 0;   // of text behind them; 0: the data has no tokenizer beside it
};
HeldOutText held_out_text(const Dataset& data, const string& tokenizer);

// nats a label -> bits a byte of text; 0 when the bytes are not known.
double bits_per_byte(double nats, const HeldOutText& text);

}  // namespace pith
