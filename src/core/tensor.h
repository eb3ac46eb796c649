// tensor: a contiguous view of reference-counted storage.
#pragma once

#include "core/bf16.h"

namespace pith {

#ifdef PITH_CUDA
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif

enum class DType : u8 { F32, F64, BF16, F8, I32, U8 };
enum class Device : u8 { CPU, CUDA };

i64 size_of(DType dtype);
const char* name_of(DType dtype);
inline bool is_float(DType d) { return d != DType::I32 && d != DType::U8; }
// Of statistics, routing weights and weight gradients beside values of a dtype.
inline DType wide(DType d) { return d == DType::BF16 ? DType::F32 : d; }

enum class MemoryUse : u8 { Workspace, Weights, Gradients, Optimizer, Activations };
constexpr int kMemoryUses = 5;

struct Allocator;
struct Storage {
  Allocator* allocator = nullptr;
  void* data = nullptr;
  i64 bytes = 0;
  MemoryUse use = MemoryUse::Workspace;
  int refs = 0;
};
void release(Storage* storage);

class StorageRef {
 public:
  StorageRef(Storage* s = nullptr) : s_(s) {
    if (s_) __atomic_add_fetch(&s_->refs, 1, __ATOMIC_RELAXED);
  }
  StorageRef(const StorageRef& o) : StorageRef(o.s_) {}
  StorageRef(StorageRef&& o) noexcept : s_(std::exchange(o.s_, nullptr)) {}
  StorageRef& operator=(StorageRef o) noexcept {
    std::swap(s_, o.s_);
    return *this;
  }
  ~StorageRef() {
    if (s_ && __atomic_sub_fetch(&s_->refs, 1, __ATOMIC_ACQ_REL) == 0) release(s_);
  }
  Storage* get() const { return s_; }

 private:
  Storage* s_;
};

constexpr int kMaxDims = 5;
constexpr int kIgnoreLabel = -100;  // counts nothing in the loss

struct Dims {
  Dims() = default;
  Dims(std::initializer_list<i64> sizes);
  i64 operator[](int i) const { return size[i]; }
  i64& operator[](int i) { return size[i]; }
  bool operator==(const Dims& o) const;
  i64 numel() const;
  i64 size[kMaxDims] = {};
  int rank = 0;
};

// Row-major, contiguous. Copies share storage. A default Tensor is undefined.
struct Tensor {
  StorageRef storage;
  char* data = nullptr;
  char* grad = nullptr;  // weights: accumulator of this shape, F32 (F64 when dtype is F64)
  Dims dim;
  DType dtype = DType::F32;
  Device device = Device::CPU;
  int var = -1;           // variable on its tape; -1: no gradient flows
  const char* name = "";  // weights: a Hugging Face name
  // Weights: the tensor this is a view of, from an element on; refresh() follows where it moved.
  const Tensor* home = nullptr;
  i64 home_offset = 0;
  At made;

  bool defined() const { return dim.rank > 0; }
  bool on_gpu() const { return kCuda && device == Device::CUDA; }
  bool is_weight() const { return home || grad; }
  bool needs_grad() const { return var >= 0 || is_weight(); }
  i64 numel() const { return dim.numel(); }
  i64 bytes() const { return numel() * size_of(dtype); }
  i64 cols() const { return dim[dim.rank - 1]; }
  i64 rows() const;
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
  float* f32() const { return as<float>(); }
  int* i32() const { return as<int>(); }

  // At most one dimension may be -1.
  Tensor view(Dims dims, At at = At::here()) const;
  // Of the first dimension, with a weight's gradient but without a variable.
  Tensor slice_rows(i64 begin, i64 end, At at = At::here()) const;
  Tensor meta() const;  // without the data
  void refresh();
};

// "[3,16] f32 cpu, made at qwen3_moe.cpp:10"
string describe(const Tensor& t);

Tensor empty(Rank& rank, Dims dims, DType dtype, At at = At::here());
Tensor zeros(Rank& rank, Dims dims, DType dtype, At at = At::here());
void fill_zero(Rank& rank, const Tensor& t);  // if it has data
Tensor tensor_from(Rank& rank, Dims dims, DType dtype, const void* host, At at = At::here());
Tensor on_host(Rank& rank, Tensor t, vector<char>& bytes);  // t, or its copy in `bytes`

}
