#include "core/tensor.h"

#include <cstdlib>

#include "core/cuda.h"

namespace pith {

struct DTypeInfo {
  const char* name;
  i64 size;
};
static constexpr DTypeInfo kDTypes[] = {
    {"f32", 4}, {"f64", 8}, {"bf16", 2}, {"f8", 1}, {"i32", 4}, {"u8", 1}};

i64 size_of(DType dtype) { return kDTypes[int(dtype)].size; }
const char* name_of(DType dtype) { return kDTypes[int(dtype)].name; }

Dims::Dims(std::initializer_list<i64> sizes) {
  if (sizes.size() > kMaxDims) failed("Dims", text("%zu dimensions (need <= 5)", sizes.size()));
  for (const i64 s : sizes) size[rank++] = s;
}

bool Dims::operator==(const Dims& o) const {
  return rank == o.rank && std::memcmp(size, o.size, rank * sizeof size[0]) == 0;
}

i64 Dims::numel() const {
  i64 n = rank > 0 ? 1 : 0;
  for (int i = 0; i < rank; i++) n *= size[i];
  return n;
}

string describe(const Tensor& t) {
  if (!t.defined()) return "undefined tensor";
  string s = "[";
  for (int i = 0; i < t.dim.rank; i++) s += (i ? "," : "") + std::to_string(t.dim[i]);
  s += text("] %s %s, ", name_of(t.dtype), t.device == Device::CPU ? "cpu" : "cuda");
  return s + (t.name[0] ? t.name : text("made at %s:%d", t.made.file, t.made.line));
}

i64 Tensor::rows() const {
  i64 n = 1;
  for (int i = 0; i + 1 < dim.rank; i++) n *= dim[i];
  return n;
}

Tensor Tensor::view(Dims dims, At at) const {
  i64 known = 1;
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
static i64 grad_size(DType dtype) { return size_of(wide(dtype)); }

Tensor Tensor::slice_rows(i64 begin, i64 end, At at) const {
  if (begin < 0 || begin > end || end > dim[0])
    failed(text("%s:%d: slice_rows", at.file, at.line),
        text("need 0 <= begin <= end <= dim[0] (got [%ld,%ld) of ", begin, end) + describe(*this) +
            ")");
  Tensor t = *this;
  i64 skipped = dim[0] ? numel() / dim[0] * begin : 0;
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

string describe_memory(const i64* bytes_of) {
  const char* names[] = {"workspace", "weights", "gradients", "optimizer", "activations"};
  string all;
  for (int i = 0; i < kMemoryUses; i++)
    all += text("%s%s %.2f GiB", i ? ", " : "", names[i], double(bytes_of[i]) / (1 << 30));
  return all;
}

Storage* Allocator::allocate(i64 bytes, At at) {
  void* data = nullptr;
  if (kCuda && cuda && bytes) data = cuda_allocate(*cuda, bytes);
  if (!cuda && bytes) data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (bytes && !data)
    failed(text("%s:%d", at.file, at.line),
        text("out of memory (need %ld bytes beside %s)", bytes, describe_memory(live_of).c_str()),
        "a smaller train.micro_batch_size, data.sequence_length or parallel.weight_grad_batch");
  i64 live = __atomic_add_fetch(&live_bytes, bytes, __ATOMIC_RELAXED);
  __atomic_add_fetch(&live_of[int(use)], bytes, __ATOMIC_RELAXED);
  if (live > peak_bytes) {
    peak_bytes = live;
    std::memcpy(peak_of, live_of, sizeof peak_of);
  }
  return new Storage{this, data, bytes, use};
}

void release(Storage* s) {
  Allocator& a = *s->allocator;
  __atomic_sub_fetch(&a.live_bytes, s->bytes, __ATOMIC_RELAXED);
  __atomic_sub_fetch(&a.live_of[int(s->use)], s->bytes, __ATOMIC_RELAXED);
  if (kCuda && a.cuda)
    cuda_free(*a.cuda, s->data);
  else
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

void fill_zero(Rank& rank, const Tensor& t) {
  if (!t.data) return;
  if (t.on_gpu()) return cuda_zero(rank, t.data, t.bytes());
  std::memset(t.data, 0, t.bytes());
}

Tensor zeros(Rank& rank, Dims dims, DType dtype, At at) {
  Tensor t = empty(rank, dims, dtype, at);
  fill_zero(rank, t);
  return t;
}

Tensor tensor_from(Rank& rank, Dims dims, DType dtype, const void* host, At at) {
  Tensor t = empty(rank, dims, dtype, at);
  if (t.on_gpu() && t.bytes())
    cuda_copy(rank, t.data, host, t.bytes());
  else if (t.bytes())
    std::memcpy(t.data, host, t.bytes());
  return t;
}

Tensor on_host(Rank& rank, Tensor t, vector<char>& bytes) {
  if (t.on_gpu()) {
    bytes.resize(t.data ? t.bytes() : 0);
    if (!bytes.empty()) cuda_copy(rank, bytes.data(), t.data, t.bytes());
    t.device = Device::CPU;
    t.data = bytes.data();
  }
  return t;
}

}
