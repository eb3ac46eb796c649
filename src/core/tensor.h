// tensor: a contiguous view of reference-counted storage.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "core/check.h"

namespace pith {

enum class DType : uint8_t { F32, F64, BF16, F8, I32, U8 };
enum class Device : uint8_t { CPU, CUDA };

int64_t size_of(DType dtype);  // bytes of one element
const char* name_of(DType dtype);
const char* name_of(Device device);
inline bool is_float(DType d) { return d != DType::I32 && d != DType::U8; }

// One allocation. It returns to its allocator when the last StorageRef goes.
struct Allocator;
struct Storage {
  Allocator* allocator = nullptr;
  void* data = nullptr;
  int64_t bytes = 0;
  int refs = 0;
};
void release(Storage* storage);

// Counts atomically. Intrusive, because <memory> is heavy.
class StorageRef {
 public:
  StorageRef() = default;
  explicit StorageRef(Storage* s) : s_(s) { add(); }
  StorageRef(const StorageRef& o) : s_(o.s_) { add(); }
  StorageRef(StorageRef&& o) noexcept : s_(o.s_) { o.s_ = nullptr; }
  StorageRef& operator=(StorageRef o) noexcept {
    Storage* mine = s_;
    s_ = o.s_;
    o.s_ = mine;
    return *this;
  }
  ~StorageRef() {
    if (s_ && __atomic_sub_fetch(&s_->refs, 1, __ATOMIC_ACQ_REL) == 0) release(s_);
  }
  Storage* get() const { return s_; }

 private:
  void add() {
    if (s_) __atomic_add_fetch(&s_->refs, 1, __ATOMIC_RELAXED);
  }
  Storage* s_ = nullptr;
};

constexpr int kMaxDims = 5;
constexpr int32_t kIgnoreLabel = -100;  // a label that counts nothing in the loss

struct Dims {
  Dims() = default;
  Dims(std::initializer_list<int64_t> sizes);
  int64_t operator[](int i) const { return size[i]; }
  int64_t& operator[](int i) { return size[i]; }
  bool operator==(const Dims& o) const;
  int64_t numel() const;
  int64_t size[kMaxDims] = {};
  int rank = 0;
};

// Row-major, contiguous. A Tensor is a value: copies share storage. A default Tensor is undefined.
struct Tensor {
  StorageRef storage;
  char* data = nullptr;  // first element; null in a meta tensor or an empty one
  char* grad = nullptr;  // weights only: accumulator of this shape, F32 (F64 when dtype is F64)
  Dims dim;
  DType dtype = DType::F32;
  Device device = Device::CPU;
  int32_t var = -1;       // variable on the tape that recorded it; -1: no gradient flows
  const char* name = "";  // weights: a Hugging Face name
  // Weights: the bound tensor this one is a view of, `home_offset` elements in. Its memory may be
  // elsewhere in the backward; refresh() follows it.
  const Tensor* home = nullptr;
  int64_t home_offset = 0;
  At made;  // the caller's line that made it

  bool defined() const { return dim.rank > 0; }
  bool is_weight() const { return home || grad; }
  bool needs_grad() const { return var >= 0 || is_weight(); }
  int64_t numel() const { return dim.numel(); }
  int64_t bytes() const { return numel() * size_of(dtype); }
  int64_t cols() const { return dim[dim.rank - 1]; }  // size of the last dimension
  int64_t rows() const;                               // product of all the others
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
  float* f32() const { return as<float>(); }
  int32_t* i32() const { return as<int32_t>(); }

  // The same elements and variable under another shape; at most one dimension may be -1.
  Tensor view(Dims dims, At at = At::here()) const;
  // Rows [begin, end) of the first dimension, without a variable; a weight's gradient is sliced
  // along.
  Tensor slice_rows(int64_t begin, int64_t end, At at = At::here()) const;
  // Without the storage: what a tape node remembers of a tensor whose values it does not need.
  Tensor meta() const;
  void refresh();
};

// "[3,16] f32 cpu, made at qwen3_moe.cpp:10" or, for a weight, its name.
string describe(const Tensor& t);

// Uninitialised, zeroed, or copied from host memory of `dtype`; on rank.device.
Tensor empty(Rank& rank, Dims dims, DType dtype, At at = At::here());
Tensor zeros(Rank& rank, Dims dims, DType dtype, At at = At::here());
Tensor tensor_from(Rank& rank, Dims dims, DType dtype, const void* host, At at = At::here());

}  // namespace pith
