#include "ops/op.h"

#include <algorithm>

namespace pith {

bool one_dtype(std::initializer_list<const Tensor*> ts) {
  for (const Tensor* a : ts)
    for (const Tensor* b : ts)
      if (a->defined() && b->defined() && a->dtype != b->dtype) return false;
  return true;
}

void Op::check_alike(std::initializer_list<const Tensor*> ts) const {
  const Tensor& first = **ts.begin();
  for (const Tensor* t : ts)
    check({{"defined tensors", t->defined()}, {"equal dtypes", t->dtype == first.dtype},
              {"tensors on one device", t->device == first.device}},
        ts);
}

void Op::check_ids(const char* what, const Tensor& ids, i64 limit, int also) const {
  vector<char> bytes;
  if (ids.on_gpu() && !rank.debug) return;
  Tensor host = on_host(rank, ids, bytes);
  const int* id = host.i32();
  for (i64 i = 0, n = ids.numel(); i < n; i++) {
    if ((id[i] >= 0 && id[i] < limit) || (also && id[i] == also)) continue;
    check({{text("%s in [0,%ld), not %d at element %ld", what, limit, id[i], i).c_str(), false}},
        {&ids});
  }
}

void Op::check_offsets(const char* what, const Tensor& offsets, i64 last) const {
  vector<char> bytes;
  if (offsets.on_gpu() && !rank.debug) return;
  Tensor host = on_host(rank, offsets, bytes);
  const int *begin = host.i32(), *end = begin + host.numel();
  bool good = begin != end && *begin == 0 && end[-1] == last && std::is_sorted(begin, end);
  check({{text("%s ascending from 0 to P", what).c_str(), good}}, {&offsets});
}

int Op::dim_of(const Tensor& x, int dim) const {
  check({{"a defined tensor", x.defined()}}, {&x});
  int d = dim < 0 ? dim + x.dim.rank : dim;
  check({{text("dimension %d of x", dim).c_str(), d >= 0 && d < x.dim.rank}}, {&x});
  return d;
}

Dims Op::broadcast(std::initializer_list<const Tensor*> ts) const {
  Dims all;
  for (const Tensor* t : ts) all.rank = max(all.rank, t->dim.rank);
  std::fill_n(all.size, all.rank, 1);
  for (const Tensor* t : ts)
    for (int i = 0; i < t->dim.rank; i++) {
      i64& size = all[all.rank - t->dim.rank + i];
      if (size == 1) size = t->dim[i];
      bool fits = t->dim[i] == 1 || t->dim[i] == size;
      check({{"sizes equal or 1, aligned at the last dimension", fits}}, ts);
    }
  return all;
}

}
