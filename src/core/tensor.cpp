#include "core/tensor.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "core/allocator.h"
#include "core/rank.h"

namespace pith {

int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::F64: return 8;
    case DType::F32:
    case DType::I32: return 4;
    case DType::BF16: return 2;
    case DType::F8:
    case DType::U8: return 1;
  }
  return 0;
}

const char* name_of(DType dtype) {
  const char* names[] = {"f32", "f64", "bf16", "f8", "i32", "u8"};
  return names[int(dtype)];
}

const char* name_of(Device device) { return device == Device::CPU ? "cpu" : "cuda"; }

const char* name_of(MemoryKind kind) {
  const char* names[] = {"activations", "weights", "gradients", "optimizer", "workspace"};
  return names[int(kind)];
}

Dims::Dims(std::initializer_list<int64_t> sizes) {
  if (sizes.size() > kMaxDims) failed("Dims", text("%zu dimensions (need <= 5)", sizes.size()));
  for (int64_t s : sizes) size[rank++] = s;
}

bool Dims::operator==(const Dims& o) const {
  return rank == o.rank && std::memcmp(size, o.size, rank * sizeof size[0]) == 0;
}

int64_t Dims::numel() const {
  int64_t n = rank > 0 ? 1 : 0;
  for (int i = 0; i < rank; i++) n *= size[i];
  return n;
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
  if (t.numel() != numel()) {
    failed(text("%s:%d: view", at.file, at.line),
           text("need as many elements as before (got %s; wanted %s)", describe(*this).c_str(),
                describe(t).c_str()));
  }
  return t;
}

Tensor Tensor::slice_rows(int64_t begin, int64_t end, At at) const {
  if (begin < 0 || begin > end || end > dim[0]) {
    failed(text("%s:%d: slice_rows", at.file, at.line),
           text("need 0 <= begin <= end <= dim[0] (got [%ld,%ld) of %s)", long(begin), long(end),
                describe(*this).c_str()));
  }
  Tensor t = *this;
  const int64_t stride = dim[0] ? numel() / dim[0] : 0;
  if (data) t.data = data + begin * stride * size_of(dtype);
  if (grad) t.grad = grad + begin * stride * (dtype == DType::F64 ? 8 : 4);
  t.dim[0] = end - begin;
  t.home_offset += begin * stride;
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
  grad = home->grad ? home->grad + home_offset * (dtype == DType::F64 ? 8 : 4) : nullptr;
}

Storage* Allocator::allocate(int64_t bytes, At at) {
  auto* s = new Storage{this, nullptr, bytes, 0};
  if (bytes) {
    s->data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!s->data) {
      delete s;
      failed(text("%s:%d", at.file, at.line),
             text("out of memory (need %ld bytes, %ld are out)", long(bytes), long(live_total())),
             "a smaller train.micro_batch_size or data.sequence_length");
    }
  }
  __atomic_add_fetch(&live_bytes[int(kind)], bytes, __ATOMIC_RELAXED);
  s->kind = kind;
  const int64_t total = live_total();
  if (total > peak_bytes) peak_bytes = total;
  return s;
}

int64_t Allocator::live_total() const {
  int64_t total = 0;
  for (const int64_t& live : live_bytes) total += __atomic_load_n(&live, __ATOMIC_RELAXED);
  return total;
}

void Allocator::reset_peak() { peak_bytes = live_total(); }

void release(Storage* s) {
  int64_t& live = s->allocator->live_bytes[int(s->kind)];
  __atomic_sub_fetch(&live, s->bytes, __ATOMIC_RELAXED);
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
