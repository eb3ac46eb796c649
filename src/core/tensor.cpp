#include "core/tensor.h"

#include <cstdlib>
#include <cstring>

#include "core/allocator.h"
#include "core/rank.h"

namespace pith {

struct DTypeInfo {
  const char* name;
  int64_t size;
};
static constexpr DTypeInfo kDTypes[] = {{"f32", 4}, {"f64", 8}, {"bf16", 2},
                                        {"f8", 1},  {"i32", 4}, {"u8", 1}};

int64_t size_of(DType dtype) { return kDTypes[int(dtype)].size; }
const char* name_of(DType dtype) { return kDTypes[int(dtype)].name; }
const char* name_of(Device device) { return device == Device::CPU ? "cpu" : "cuda"; }

Dims::Dims(std::initializer_list<int64_t> sizes) {
  if (sizes.size() > kMaxDims) failed("Dims", text("%zu dimensions (need <= 5)", sizes.size()));
  for (const int64_t s : sizes) size[rank++] = s;
}

bool Dims::operator==(const Dims& o) const {
  return rank == o.rank && std::memcmp(size, o.size, rank * sizeof size[0]) == 0;
}

int64_t Dims::numel() const {
  int64_t n = rank > 0 ? 1 : 0;
  for (int i = 0; i < rank; i++) n *= size[i];
  return n;
}

string describe(const Tensor& t) {
  if (!t.defined()) return "undefined tensor";
  string s = "[";
  for (int i = 0; i < t.dim.rank; i++) s += (i ? "," : "") + std::to_string(t.dim[i]);
  s += text("] %s %s, ", name_of(t.dtype), name_of(t.device));
  return s + (t.name[0] ? t.name : text("made at %s:%d", t.made.file, t.made.line));
}

int64_t Tensor::rows() const {
  int64_t n = 1;
  for (int i = 0; i + 1 < dim.rank; i++) n *= dim[i];
  return n;
}

Tensor Tensor::view(Dims dims, At at) const {
  int64_t known = 1;
  int open = -1;
  for (int i = 0; i < dims.rank; i++) {
    if (dims[i] == -1)
      open = i;
    else
      known *= dims[i];
  }
  if (open >= 0) dims[open] = known ? numel() / known : 0;
  Tensor t = *this;
  t.dim = dims;
  t.made = at;
  if (t.numel() != numel())
    failed(text("%s:%d: view", at.file, at.line), "need as many elements as before (got " +
                                                      describe(*this) + "; wanted " + describe(t) +
                                                      ")");
  return t;
}

// Bytes of an element of a weight's gradient.
static int64_t grad_size(DType dtype) { return dtype == DType::F64 ? 8 : 4; }

Tensor Tensor::slice_rows(int64_t begin, int64_t end, At at) const {
  if (begin < 0 || begin > end || end > dim[0])
    failed(text("%s:%d: slice_rows", at.file, at.line),
           text("need 0 <= begin <= end <= dim[0] (got [%ld,%ld) of ", begin, end) +
               describe(*this) + ")");
  Tensor t = *this;
  const int64_t skipped = dim[0] ? numel() / dim[0] * begin : 0;
  if (data) t.data = data + skipped * size_of(dtype);
  if (grad) t.grad = grad + skipped * grad_size(dtype);
  t.dim[0] = end - begin;
  t.home_offset += skipped;
  t.var = -1;
  t.made = at;
  return t;
}

Tensor Tensor::meta() const {
  Tensor t = *this;
  t.storage = {};
  t.data = nullptr;
  return t;
}

void Tensor::refresh() {
  if (!home) return;
  data = home->data ? home->data + home_offset * size_of(dtype) : nullptr;
  grad = home->grad ? home->grad + home_offset * grad_size(dtype) : nullptr;
}

Storage* Allocator::allocate(int64_t bytes, At at) {
  void* data = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
  if (bytes && !data)
    failed(text("%s:%d", at.file, at.line),
           text("out of memory (need %ld bytes, %ld are out)", bytes, live_bytes),
           "a smaller train.micro_batch_size or data.sequence_length");
  const int64_t live = __atomic_add_fetch(&live_bytes, bytes, __ATOMIC_RELAXED);
  if (live > peak_bytes) peak_bytes = live;
  return new Storage{this, data, bytes};
}

void Allocator::reset_peak() { peak_bytes = __atomic_load_n(&live_bytes, __ATOMIC_RELAXED); }

void release(Storage* s) {
  __atomic_sub_fetch(&s->allocator->live_bytes, s->bytes, __ATOMIC_RELAXED);
  std::free(s->data);
  delete s;
}

Tensor empty(Rank& rank, Dims dims, DType dtype, At at) {
  Tensor t;
  t.dim = dims;
  t.dtype = dtype;
  t.device = rank.device;
  t.made = at;
  t.storage = StorageRef(rank.allocator->allocate(t.bytes(), at));
  t.data = static_cast<char*>(t.storage.get()->data);
  return t;
}

Tensor zeros(Rank& rank, Dims dims, DType dtype, At at) {
  Tensor t = empty(rank, dims, dtype, at);
  if (t.bytes()) std::memset(t.data, 0, t.bytes());
  return t;
}

Tensor tensor_from(Rank& rank, Dims dims, DType dtype, const void* host, At at) {
  Tensor t = empty(rank, dims, dtype, at);
  if (t.bytes()) std::memcpy(t.data, host, t.bytes());
  return t;
}

}  // namespace pith
