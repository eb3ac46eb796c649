#include <functional>
#include <numeric>

#include "ops/gradcheck.h"
#include "ops/ops.h"

#if !defined(__SANITIZE_THREAD__)
extern "C" void omp_set_num_threads(int);  // of libgomp, which pith_ops brings
#endif

namespace pith {
namespace {

using Index = std::vector<int64_t>;

std::string shown(const Dims& dims) {
  std::string s = "[";
  for (int i = 0; i < dims.rank; i++) s += (i ? "," : "") + std::to_string(dims[i]);
  return s + "]";
}

Index index_of(const Dims& dims, int64_t flat) {
  Index at(dims.rank);
  for (int i = dims.rank - 1; i >= 0; i--) {
    at[i] = flat % dims[i];
    flat /= dims[i];
  }
  return at;
}

// Element `at` of x broadcast to a shape that `at` indexes.
double element(const Tensor& x, const Index& at) {
  int64_t flat = 0;
  for (int i = 0; i < x.dim.rank; i++)
    flat = flat * x.dim[i] + (x.dim[i] == 1 ? 0 : at[at.size() - x.dim.rank + i]);
  return x.dtype == DType::F64   ? x.as<double>()[flat]
         : x.dtype == DType::I32 ? x.i32()[flat]
                                 : x.as<uint8_t>()[flat];
}

// y has shape `dims`, and element `at` of it is want(at).
template <class F>
void expect_elements(
    const std::string& name, const Tensor& y, const Dims& dims, F want, double limit = 1e-12) {
  ASSERT_TRUE(y.dim == dims) << name << ": got " << describe(y) << ", want " << shown(dims);
  const std::vector<double> got = values_of(y);
  for (size_t i = 0; i < got.size(); i++) {
    const double w = want(index_of(dims, i));
    ASSERT_LE(std::fabs(got[i] - w), limit * std::max(1.0, std::fabs(w)))
        << name << shown(dims) << ", element " << i << ": got " << got[i] << ", want " << w;
  }
}

// Fewer elements of a large input are differenced.
GradcheckOptions options_for(const Dims& dims) {
  return {.max_elements = dims.numel() > 1000 ? 12 : 200};
}

const Dims kShapes[] = {
    {1}, {3, 7}, {2, 3, 5}, {33, 31}, {2, 1, 3, 1, 2}, {0, 5}, {4, 0}, {20, 1030}};

TEST(Elementwise, OneInput) {
  struct Row {
    const char* name;
    Tensor (*op)(Rank&, Tensor);
    double (*formula)(double);
    double std = 1, mean = 0;
  };
  const Row rows[] = {
      {"exp", [](Rank& r, Tensor x) { return exp(r, x); }, [](double x) { return std::exp(x); }},
      {"log", [](Rank& r, Tensor x) { return log(r, x); }, [](double x) { return std::log(x); },
          0.5, 4},
      {"sqrt", [](Rank& r, Tensor x) { return sqrt(r, x); }, [](double x) { return std::sqrt(x); },
          0.5, 4},
      {"tanh", [](Rank& r, Tensor x) { return tanh(r, x); }, [](double x) { return std::tanh(x); }},
      {"sigmoid", [](Rank& r, Tensor x) { return sigmoid(r, x); },
          [](double x) { return 1 / (1 + std::exp(-x)); }, 3},
      {"silu", [](Rank& r, Tensor x) { return silu(r, x); },
          [](double x) { return x / (1 + std::exp(-x)); }, 3},
      {"softplus", [](Rank& r, Tensor x) { return softplus(r, x); },
          [](double x) { return std::log(1 + std::exp(x)); }, 3},
      {"relu", [](Rank& r, Tensor x) { return relu(r, x); },
          [](double x) { return x > 0 ? x : 0; }},
      {"clamp", [](Rank& r, Tensor x) { return clamp(r, x, -0.5, 0.75); },
          [](double x) { return std::min(std::max(x, -0.5), 0.75); }},
      {"add 0.5", [](Rank& r, Tensor x) { return add(r, x, 0.5); },
          [](double x) { return x + 0.5; }},
      {"mul -3", [](Rank& r, Tensor x) { return mul(r, x, -3); }, [](double x) { return x * -3; }},
  };
  for (const Row& row : rows)
    for (const Dims& dims : kShapes) {
      TestRank t;
      const Tensor x = t.random(dims, 1, row.std, row.mean);
      expect_elements(row.name, row.op(t.rank, x), dims,
          [&](const Index& at) { return row.formula(element(x, at)); });
      gradcheck(
          row.name + shown(dims), {x}, [&](Rank& r, TensorList xs) { return row.op(r, xs[0]); },
          options_for(dims));
    }
}

TEST(Elementwise, ExtremesAndKinks) {
  TestRank t;
  const double inf = INFINITY;
  for (DType dtype : {DType::F32, DType::F64}) {
    const Tensor big = t.floats({4}, {-1000, 1000, -inf, inf}, dtype);
    EXPECT_EQ(values_of(sigmoid(t.rank, big)), (std::vector<double>{0, 1, 0, 1}));
    EXPECT_EQ(values_of(softplus(t.rank, big)), (std::vector<double>{0, 1000, 0, inf}));
    EXPECT_EQ(values_of(relu(t.rank, big)), (std::vector<double>{0, 1000, 0, inf}));
    const Tensor none = t.floats({2}, {NAN, 1}, dtype);
    for (const Tensor& y :
        {relu(t.rank, none), clamp(t.rank, none, 0, 2), max(t.rank, none, 0), silu(t.rank, none)})
      EXPECT_TRUE(std::isnan(values_of(y)[0])) << describe(y);
  }
  // At the kinks themselves.
  struct Row {
    const char* name;
    Tensor (*op)(Rank&, Tensor);
    std::vector<double> x, slope;
  };
  for (const Row& row :
      {Row{"relu", [](Rank&r, Tensor x) { return relu(r, x); }, {-1, 0, 2}, {0, 0, 1}},
          Row{"clamp", [](Rank&r, Tensor x) { return clamp(r, x, -1, 1); }, {-1, 1, 1.5},
              {1, 1, 0}}}) {
    TestRank k;
    Tensor x = k.floats({3}, row.x);
    make_leaf(k.rank, x);
    add_grad(k.rank, row.op(k.rank, x), k.floats({3}, {1, 1, 1}));
    backward(k.rank, 0, k.tape.size());
    EXPECT_EQ(values_of(grad_of(k.tape, x)), row.slope) << row.name;
  }
}

struct Pair {
  Dims a, b, y;
};
const Pair kPairs[] = {
    {{1}, {1}, {1}},
    {{3, 4}, {3, 4}, {3, 4}},
    {{3, 4}, {4}, {3, 4}},
    {{5}, {2, 3, 5}, {2, 3, 5}},
    {{3, 1}, {1, 4}, {3, 4}},
    {{2, 1, 4}, {3, 1}, {2, 3, 4}},
    {{2, 3, 1, 5}, {1, 1, 4, 1}, {2, 3, 4, 5}},
    {{2, 1, 3, 1, 2}, {1, 5, 1, 4, 1}, {2, 5, 3, 4, 2}},
    {{1, 1}, {3, 7}, {3, 7}},
    {{0, 3}, {3}, {0, 3}},
    {{1, 3}, {0, 3}, {0, 3}},
    {{4, 0}, {4, 1}, {4, 0}},
    {{20, 1030}, {1030}, {20, 1030}},
    {{150, 65}, {150, 1}, {150, 65}},
};

TEST(Elementwise, TwoInputsBroadcast) {
  struct Row {
    const char* name;
    Tensor (*op)(Rank&, Tensor, Tensor);
    double (*formula)(double, double);
  };
  const Row rows[] = {
      {"add", [](Rank& r, Tensor a, Tensor b) { return add(r, a, b); },
          [](double a, double b) { return a + b; }},
      {"sub", [](Rank& r, Tensor a, Tensor b) { return sub(r, a, b); },
          [](double a, double b) { return a - b; }},
      {"mul", [](Rank& r, Tensor a, Tensor b) { return mul(r, a, b); },
          [](double a, double b) { return a * b; }},
      {"div", [](Rank& r, Tensor a, Tensor b) { return div(r, a, b); },
          [](double a, double b) { return a / b; }},
  };
  for (const Row& row : rows)
    for (const Pair& p : kPairs) {
      TestRank t;
      const std::string name = row.name + shown(p.a) + shown(p.b);
      const Tensor a = t.random(p.a, 1), b = t.random(p.b, 2, 0.3, 2);
      expect_elements(name, row.op(t.rank, a, b), p.y,
          [&](const Index& at) { return row.formula(element(a, at), element(b, at)); });
      gradcheck(
          name, {a, b}, [&](Rank& r, TensorList x) { return row.op(r, x[0], x[1]); },
          options_for(p.y));
    }
  // One tensor as both inputs.
  TestRank t;
  gradcheck(
      "mul x x", {t.random({3, 4})}, [](Rank& r, TensorList x) { return mul(r, x[0], x[0]); });
  gradcheck("sub x 2x", {t.random({1, 4})},
      [](Rank& r, TensorList x) { return sub(r, repeat(r, mul(r, x[0], 2), 0, 3), x[0]); },
      {.bf16_tolerance = 1e-2});  // several roundings
}

TEST(Elementwise, Where) {
  struct Row {
    Dims mask, a, b, y;
  };
  for (const Row& row : {Row{{1}, {1}, {1}, {1}}, Row{{3, 4}, {3, 4}, {3, 4}, {3, 4}},
           Row{{4}, {3, 1}, {1}, {3, 4}}, Row{{2, 3, 1}, {5}, {3, 1}, {2, 3, 5}},
           Row{{0, 2}, {2}, {1, 1}, {0, 2}}, Row{{70, 1}, {70, 600}, {600}, {70, 600}}}) {
    TestRank t;
    std::vector<uint8_t> bits(row.mask.numel());
    for (size_t i = 0; i < bits.size(); i++) bits[i] = uniform_at(7, i) < 0.5;
    const Tensor m = t.mask(row.mask, bits), a = t.random(row.a, 1), b = t.random(row.b, 2);
    expect_elements("where", where(t.rank, m, a, b), row.y,
        [&](const Index& at) { return element(m, at) != 0 ? element(a, at) : element(b, at); });
    gradcheck(
        "where" + shown(row.y), {m, a, b},
        [](Rank& r, TensorList x) { return where(r, x[0], x[1], x[2]); }, options_for(row.y));
  }
}

TEST(Reductions, OverEachDimension) {
  struct Row {
    const char* name;
    Tensor (*op)(Rank&, Tensor, int);
    bool keeps_shape, empty_dim;
    // Of the numbers along the dimension, and the place of the result's element among them.
    double (*formula)(const std::vector<double>&, int64_t);
  };
  const Row rows[] = {
      {"sum", [](Rank& r, Tensor x, int d) { return sum(r, x, d); }, false, true,
          [](const std::vector<double>& v, int64_t) {
            return std::accumulate(v.begin(), v.end(), 0.0);
          }},
      {"mean", [](Rank& r, Tensor x, int d) { return mean(r, x, d); }, false, false,
          [](const std::vector<double>& v, int64_t) {
            return std::accumulate(v.begin(), v.end(), 0.0) / double(v.size());
          }},
      {"max", [](Rank& r, Tensor x, int d) { return max(r, x, d); }, false, false,
          [](const std::vector<double>& v, int64_t) {
            return *std::max_element(v.begin(), v.end());
          }},
      {"cumsum", [](Rank& r, Tensor x, int d) { return cumsum(r, x, d); }, true, true,
          [](const std::vector<double>& v, int64_t at) {
            return std::accumulate(v.begin(), v.begin() + at + 1, 0.0);
          }},
      {"softmax", [](Rank& r, Tensor x, int d) { return softmax(r, x, d); }, true, true,
          [](const std::vector<double>& v, int64_t at) {
            double total = 0;
            for (double x : v) total += std::exp(x);
            return std::exp(v[at]) / total;
          }},
  };
  const Dims shapes[] = {{1}, {9}, {3, 7}, {2, 3, 5}, {2, 130, 3}, {3, 2, 70}, {2, 1, 3, 1, 4},
      {0, 5}, {4, 0}, {4, 1030}, {131, 66}};
  for (const Row& row : rows)
    for (const Dims& dims : shapes)
      for (int dim = -dims.rank; dim < dims.rank; dim++) {
        const int d = dim < 0 ? dim + dims.rank : dim;
        if (dims[d] == 0 && !row.empty_dim) continue;
        if (dim < 0 && dims.rank > 2) continue;
        TestRank t;
        const std::string name = text("%s over %d of ", row.name, dim) + shown(dims);
        const Tensor x = t.random(dims, 1, 2);
        Dims y_dims = dims;
        if (!row.keeps_shape) y_dims[d] = 1;
        expect_elements(name, row.op(t.rank, x, dim), y_dims, [&](Index at) {
          const int64_t place = at[d];
          std::vector<double> v;
          for (at[d] = 0; at[d] < dims[d]; at[d]++) v.push_back(element(x, at));
          return row.formula(v, place);
        });
        GradcheckOptions options = options_for(dims);
        options.bf16_tolerance = 1e-2;  // a mean rounds twice
        gradcheck(
            name, {x}, [&](Rank& r, TensorList xs) { return row.op(r, xs[0], dim); }, options);
      }
}

TEST(Reductions, TiesGoToTheFirst) {
  struct Row {
    Dims dims;
    int dim;
    std::vector<double> x, slope;
  };
  for (const Row& row : {Row{{5}, 0, {1, 3, 3, 2, 3}, {0, 1, 0, 0, 0}},
           Row{{3, 2}, 0, {4, 1, 4, 2, 0, 2}, {1, 0, 0, 1, 0, 0}},
           Row{{2, 2}, -1, {0, 0, -1, -1}, {1, 0, 1, 0}}}) {
    TestRank t;
    Tensor x = t.floats(row.dims, row.x);
    make_leaf(t.rank, x);
    const Tensor y = max(t.rank, x, row.dim);
    add_grad(t.rank, y, t.floats(y.dim, std::vector<double>(y.numel(), 1.0)));
    backward(t.rank, 0, t.tape.size());
    EXPECT_EQ(values_of(grad_of(t.tape, x)), row.slope) << shown(row.dims);
  }
}

TEST(Reductions, LongF32SumsStayAccurate) {
  TestRank t;
  for (const Dims& dims : {Dims{1, 200001}, Dims{20001, 3}}) {
    const Tensor x = t.random(dims, 3, 1, 5, DType::F32);
    const int d = dims[0] == 1 ? 1 : 0;
    EXPECT_LE(relative_error(sum(t.rank, x, d), sum(t.rank, t.cast(x, DType::F64), d)), 1e-6);
  }
}

TEST(Matmul, ShapesAndBroadcast) {
  const Pair rows[] = {
      {{1, 1}, {1, 1}, {1, 1}},
      {{3, 5}, {5, 4}, {3, 4}},
      {{2, 3, 5}, {2, 5, 4}, {2, 3, 4}},
      {{2, 3, 5}, {5, 4}, {2, 3, 4}},
      {{2, 3, 5}, {1, 5, 4}, {2, 3, 4}},
      {{3, 5}, {2, 2, 5, 4}, {2, 2, 3, 4}},
      {{2, 1, 3, 5}, {1, 3, 5, 2}, {2, 3, 3, 2}},
      {{2, 1, 2, 3, 5}, {3, 1, 5, 1}, {2, 3, 2, 3, 1}},
      {{1, 3, 5}, {1, 5, 4}, {1, 3, 4}},
      {{0, 3, 5}, {5, 4}, {0, 3, 4}},
      {{3, 0}, {0, 4}, {3, 4}},
      {{2, 3, 5}, {2, 5, 0}, {2, 3, 0}},
      {{0, 5}, {5, 4}, {0, 4}},
      {{4, 6, 64, 32}, {4, 6, 32, 64}, {4, 6, 64, 64}},
      {{2, 130, 70}, {70, 400}, {2, 130, 400}},
  };
  for (const Pair& p : rows) {
    TestRank t;
    const std::string name = "matmul" + shown(p.a) + shown(p.b);
    const Tensor a = t.random(p.a, 1), b = t.random(p.b, 2);
    expect_elements(name, matmul(t.rank, a, b), p.y, [&](const Index& at) {
      Index in_a = at, in_b = at;
      double total = 0;
      for (int64_t k = 0; k < a.cols(); k++) {
        in_a[at.size() - 1] = in_b[at.size() - 2] = k;
        total += element(a, in_a) * element(b, in_b);
      }
      return total;
    });
    gradcheck(
        name, {a, b}, [](Rank& r, TensorList x) { return matmul(r, x[0], x[1]); },
        options_for(p.y));
  }
}

TEST(Shapes, Permute) {
  struct Row {
    Dims dims, order;
  };
  for (const Row& row :
      {Row{{4}, {0}}, Row{{3, 5}, {1, 0}}, Row{{2, 3, 4}, {2, 0, 1}}, Row{{2, 3, 4}, {0, 2, 1}},
          Row{{2, 3, 2, 5}, {0, 2, 1, 3}}, Row{{2, 1, 3, 2, 2}, {4, 2, 0, 3, 1}},
          Row{{0, 3}, {1, 0}}, Row{{2, 128, 4, 16}, {0, 2, 1, 3}}, Row{{600, 33}, {1, 0}}}) {
    TestRank t;
    const Tensor x = t.random(row.dims);
    Dims dims = row.dims;
    for (int i = 0; i < dims.rank; i++) dims[i] = row.dims[row.order[i]];
    expect_elements("permute", permute(t.rank, x, row.order), dims, [&](const Index& at) {
      Index from(at.size());
      for (size_t i = 0; i < at.size(); i++) from[row.order[i]] = at[i];
      return element(x, from);
    });
    gradcheck(
        "permute" + shown(row.dims) + shown(row.order), {x},
        [&](Rank& r, TensorList xs) { return permute(r, xs[0], row.order); }, options_for(dims));
  }
}

TEST(Shapes, Reshape) {
  TestRank t;
  Tensor x = t.random({2, 6});
  make_leaf(t.rank, x);
  const Tensor y = reshape(t.rank, x, {3, -1});
  EXPECT_TRUE((y.dim == Dims{3, 4}));
  EXPECT_EQ(y.data, x.data);
  EXPECT_EQ(t.tape.size(), 0);
  EXPECT_TRUE((reshape(t.rank, t.random({0, 4}), {-1, 2}).dim == Dims{0, 2}));
  gradcheck("reshape", {t.random({2, 6}), t.random({4}, 2)}, [](Rank& r, TensorList xs) {
    return mul(r, reshape(r, xs[0], {3, 4}), xs[1]);
  });
}

struct Cut {
  Dims dims;
  int dim;
  Dims sizes;
};
const Cut kCuts[] = {
    {{1}, 0, {1}},
    {{7}, -1, {3, 4}},
    {{3, 7}, 1, {1, 4, 2}},
    {{3, 7}, 0, {2, 1}},
    {{2, 5, 3}, -2, {2, 0, 3}},
    {{2, 3, 2, 2, 3}, 4, {1, 2}},
    {{0, 4}, 1, {3, 1}},
    {{3, 2}, 1, {1, 1}},
    {{64, 300}, 1, {100, 200}},
};

TEST(Shapes, SliceSplitAndConcat) {
  for (const Cut& c : kCuts) {
    TestRank t;
    const int d = c.dim < 0 ? c.dim + c.dims.rank : c.dim;
    const Tensor x = t.random(c.dims);
    const std::string name = shown(c.dims) + " at " + shown(c.sizes);
    const TensorList pieces = split(t.rank, x, c.dim, c.sizes);
    ASSERT_EQ(pieces.count, c.sizes.rank) << name;
    int64_t begin = 0;
    std::vector<Tensor> parts;
    for (int k = 0; k < pieces.count; k++) {
      const int64_t end = begin + c.sizes[k];
      Dims dims = c.dims;
      dims[d] = c.sizes[k];
      auto moved = [&](Index at) {
        at[d] += begin;
        return element(x, at);
      };
      expect_elements("split " + name, pieces[k], dims, moved);
      expect_elements("slice " + name, slice(t.rank, x, c.dim, begin, end), dims, moved);
      gradcheck(
          "slice " + name, {x},
          [&](Rank& r, TensorList xs) { return slice(r, xs[0], c.dim, begin, end); },
          options_for(c.dims));
      parts.push_back(t.random(dims, k));
      begin = end;
    }
    EXPECT_EQ(values_of(concat(t.rank, pieces, c.dim)), values_of(x)) << "concat " << name;
    gradcheck(
        "split " + name, {x},
        [&](Rank& r, TensorList xs) { return split(r, xs[0], c.dim, c.sizes); },
        options_for(c.dims));
    gradcheck(
        "concat " + name, parts, [&](Rank& r, TensorList xs) { return concat(r, xs, c.dim); },
        options_for(c.dims));
  }
}

TEST(Shapes, Repeat) {
  struct Row {
    Dims dims;
    int dim;
    int64_t times;
  };
  for (const Row& row :
      {Row{{1}, 0, 1}, Row{{3, 4}, 0, 2}, Row{{3, 4}, -1, 3}, Row{{2, 3, 2, 2, 2}, 2, 2},
          Row{{3, 4}, 1, 0}, Row{{0, 4}, 0, 3}, Row{{3, 1}, 1, 5}, Row{{4, 32, 64}, 1, 8}}) {
    TestRank t;
    const int d = row.dim < 0 ? row.dim + row.dims.rank : row.dim;
    const Tensor x = t.random(row.dims);
    Dims dims = row.dims;
    dims[d] *= row.times;
    expect_elements("repeat", repeat(t.rank, x, row.dim, row.times), dims, [&](Index at) {
      at[d] %= row.dims[d];
      return element(x, at);
    });
    gradcheck(
        "repeat" + shown(row.dims), {x},
        [&](Rank& r, TensorList xs) { return repeat(r, xs[0], row.dim, row.times); },
        options_for(dims));
  }
}

TEST(Indexing, SelectAndScatter) {
  struct Row {
    Dims dims;
    std::vector<int32_t> ids;  // into dims[0] rows
  };
  for (const Row& row :
      {Row{{1}, {0}}, Row{{4}, {3, 3, 0}}, Row{{5, 3}, {4, 0, 4, 2, 4, 1}}, Row{{3, 2, 2}, {}},
          Row{{2, 0}, {1, 1}}, Row{{0, 3}, {}}, Row{{20, 1030}, {19, 0, 5, 5, 17, 19, 19}}}) {
    TestRank t;
    const int64_t n = row.ids.size();
    const Tensor x = t.random(row.dims), ids = t.ints({n}, row.ids);
    Dims taken = row.dims;
    taken[0] = n;
    const std::string name = shown(row.dims) + text(", %ld ids", long(n));
    expect_elements("index_select " + name, index_select(t.rank, x, ids), taken, [&](Index at) {
      at[0] = row.ids[at[0]];
      return element(x, at);
    });
    gradcheck(
        "index_select " + name, {x, ids},
        [](Rank& r, TensorList xs) { return index_select(r, xs[0], xs[1]); },
        options_for(row.dims));
    const Tensor src = t.random(taken, 2);
    const int64_t rows = row.dims[0];
    expect_elements(
        "scatter_add " + name, scatter_add(t.rank, src, ids, rows), row.dims, [&](Index at) {
          const int64_t to = at[0];
          double total = 0;
          for (at[0] = 0; at[0] < n; at[0]++)
            if (row.ids[at[0]] == to) total += element(src, at);
          return total;
        });
    gradcheck(
        "scatter_add " + name, {src, ids},
        [&](Rank& r, TensorList xs) { return scatter_add(r, xs[0], xs[1], rows); },
        options_for(row.dims));
  }
}

TEST(Indexing, TopK) {
  struct Row {
    Dims dims;
    int k;
  };
  for (const Row& row : {Row{{1}, 1}, Row{{7}, 3}, Row{{5, 4}, 4}, Row{{2, 3, 9}, 2},
           Row{{0, 4}, 2}, Row{{70, 128}, 8}}) {
    TestRank t;
    const Tensor x = t.random(row.dims);
    const TopK top = top_k(t.rank, x, row.k);
    const int64_t n = row.dims[row.dims.rank - 1];
    Dims dims = row.dims;
    dims[dims.rank - 1] = row.k;
    auto sorted = [&](Index at) {  // the row's indices, by value
      std::vector<int64_t> order(n);
      std::iota(order.begin(), order.end(), 0);
      auto value = [&](int64_t j) {
        at.back() = j;
        return element(x, at);
      };
      std::stable_sort(
          order.begin(), order.end(), [&](int64_t i, int64_t j) { return value(i) > value(j); });
      return order;
    };
    expect_elements(
        "top_k ids", top.ids, dims, [&](const Index& at) { return sorted(at)[at.back()]; });
    expect_elements("top_k", top.values, dims, [&](Index at) {
      at.back() = sorted(at)[at.back()];
      return element(x, at);
    });
    gradcheck(
        "top_k" + shown(row.dims), {x},
        [&](Rank& r, TensorList xs) { return top_k(r, xs[0], row.k).values; },
        options_for(row.dims));
  }
  TestRank t;
  const TopK ties = top_k(t.rank, t.floats({2, 4}, {1, 3, 3, 3, 0, 0, 0, 0}), 3);
  EXPECT_EQ(values_of(ties.ids), (std::vector<double>{1, 2, 3, 0, 1, 2}));
}

TEST(General, ErrorsNameTheCaller) {
  TestRank t;
  Rank& r = t.rank;
  const Tensor x = t.random({3, 4}), y = t.random({4, 3}), f32 = t.cast(x, DType::F32);
  const Tensor empty_dim = t.random({3, 0}), ids = t.ints({2}, {0, 3}), minus = t.ints({1}, {-1});
  const Tensor bits = t.mask({4}, {1, 0, 1, 0}), undefined;
  struct Row {
    int line;
    std::function<void()> f;
    std::vector<std::string> parts;
  };
  const Row rows[] = {
      {__LINE__, [&] { add(r, x, y); }, {"add: need sizes equal or 1", "[3,4] f64", "[4,3] f64"}},
      {__LINE__, [&] { mul(r, x, f32); }, {"mul: need equal dtypes", "[3,4] f32"}},
      {__LINE__, [&] { div(r, x, undefined); }, {"div: need defined", "undefined tensor"}},
      {__LINE__, [&] { exp(r, ids); }, {"exp: need dtype f32 or f64", "[2] i32"}},
      {__LINE__, [&] { clamp(r, x, 2, 1); }, {"clamp: need low <= high"}},
      {__LINE__, [&] { where(r, x, x, x); }, {"where: need a mask of dtype u8"}},
      {__LINE__, [&] { where(r, bits, x, y); }, {"where: need sizes equal or 1", "[4] u8"}},
      {__LINE__, [&] { sum(r, x, 2); }, {"sum: need dimension 2 of x", "[3,4] f64"}},
      {__LINE__, [&] { softmax(r, x, -3); }, {"softmax: need dimension -3 of x"}},
      {__LINE__, [&] { mean(r, empty_dim, 1); }, {"mean: need elements", "[3,0]"}},
      {__LINE__, [&] { max(r, empty_dim, -1); }, {"max: need elements"}},
      {__LINE__, [&] { cumsum(r, undefined, 0); }, {"cumsum: need a defined tensor"}},
      {__LINE__, [&] { matmul(r, x, x); }, {"matmul: need a.dim[-1] == b.dim[-2]", "[3,4] f64"}},
      {__LINE__, [&] { matmul(r, reshape(r, x, {12}), x); }, {"matmul: need two dimensions"}},
      {__LINE__,
          [&] {
            permute(r, x, {0, 0});
          },
          {"permute: need each dimension once"}},
      {__LINE__, [&] { permute(r, x, {0}); }, {"permute: need one entry of order"}},
      {__LINE__,
          [&] {
            reshape(r, x, {5, -1});
          },
          {"need as many elements", "[3,4] f64"}},
      {__LINE__,
          [&] {
            reshape(r, x, {-1, -1});
          },
          {"reshape: need sizes >= 0"}},
      {__LINE__, [&] { slice(r, x, 1, 2, 5); }, {"slice: need 0 <= begin", "[2,5) of dimension 1"}},
      {__LINE__,
          [&] {
            split(r, x, 1, {1, 2});
          },
          {"split: need sizes that sum"}},
      {__LINE__,
          [&] {
            concat(r, {x, y}, 0);
          },
          {"concat: need equal sizes but", "[4,3]"}},
      {__LINE__, [&] { concat(r, {}, 0); }, {"concat: need at least one"}},
      {__LINE__, [&] { repeat(r, x, 0, -1); }, {"repeat: need times >= 0"}},
      {__LINE__, [&] { index_select(r, x, ids); },
          {"index_select: need ids in [0,3), not 3 at element 1"}},
      {__LINE__, [&] { index_select(r, x, minus); },
          {"index_select: need ids in [0,3), not -1 at element 0"}},
      {__LINE__, [&] { index_select(r, x, x); }, {"index_select: need ids of dtype i32"}},
      {__LINE__, [&] { scatter_add(r, x, ids, 2); },
          {"scatter_add: need ids in [0,2), not 3 at element 1"}},
      {__LINE__, [&] { scatter_add(r, x, ids, 4); }, {"scatter_add: need an id a row"}},
      {__LINE__, [&] { top_k(r, x, 5); }, {"top_k: need 1 <= k", "k = 5", "[3,4] f64"}},
  };
  for (const Row& row : rows) {
    try {
      row.f();
      ADD_FAILURE() << "no error, expected: " << row.parts[0];
    } catch (const Error& e) {
      EXPECT_EQ(e.exit_code, kExitFailed);
      // The row's own lines, whichever way it was wrapped.
      int line = 0;
      const std::string place = std::string(At::here().file) + ":%d:";
      EXPECT_EQ(std::sscanf(e.what(), place.c_str(), &line), 1) << e.what();
      EXPECT_TRUE(line >= row.line && line <= row.line + 3) << e.what();
      for (const std::string& part : row.parts)
        EXPECT_NE(std::string(e.what()).find(part), std::string::npos)
            << "no '" << part << "' in: " << e.what();
    }
  }
  EXPECT_EQ(t.tape.size(), 0);
}

TEST(General, DebugNamesTheOpThatMadeTheNaN) {
  TestRank t;
  t.rank.debug = true;
  const Tensor zero = t.floats({2}, {0, 1});
  const int line = __LINE__ + 1;
  expect_error([&] { exp(t.rank, div(t.rank, zero, zero)); },
      {text("general_test.cpp:%d: div", line).c_str(), "non-finite", "element 0"});
}

TEST(General, KeepsOnlyWhatBackwardNeeds) {
  TestRank t;
  Tensor x = t.random({4, 8});
  make_leaf(t.rank, x);
  const Tensor other = t.random({4, 8}, 2);
  auto kept = [&](const Tensor&) {
    int64_t bytes = 0;
    for (const Node& n : t.tape.nodes)
      for (const TensorList* list : {&n.bx_keep, &n.bw_keep})
        for (int i = 0; i < list->count; i++)
          if ((*list)[i].storage.get()) bytes += (*list)[i].bytes();
    t.tape.nodes.clear();
    return bytes;
  };
  const int64_t one = x.bytes();
  EXPECT_EQ(kept(add(t.rank, x, other)), 0);
  EXPECT_EQ(kept(sub(t.rank, x, x)), 0);
  EXPECT_EQ(kept(mul(t.rank, x, other)), one);
  EXPECT_EQ(kept(div(t.rank, x, other)), one);
  EXPECT_EQ(kept(div(t.rank, other, x)), 2 * one);
  EXPECT_EQ(kept(mul(t.rank, x, 3)), 0);
  EXPECT_EQ(kept(exp(t.rank, x)), one);
  EXPECT_EQ(kept(sum(t.rank, x, 0)), 0);
  EXPECT_EQ(kept(cumsum(t.rank, x, 0)), 0);
  EXPECT_EQ(kept(softmax(t.rank, x, 1)), one);
  EXPECT_EQ(kept(matmul(t.rank, x, reshape(t.rank, other, {8, 4}))), one);
  EXPECT_EQ(kept(permute(t.rank, x, {1, 0})), 0);
  EXPECT_EQ(kept(slice(t.rank, x, 0, 1, 3)), 0);
}

#if !defined(__SANITIZE_THREAD__)
TEST(General, SameBitsForAnyNumberOfThreads) {
  auto run = [](int threads) {
    omp_set_num_threads(threads);
    TestRank t;
    Tensor x = t.random({37, 1500}, 1, 1, 0, DType::F32), w = t.random({1500}, 2, 1, 2, DType::F32);
    Tensor m = t.random({2, 1500, 700}, 3, 1, 0, DType::F32);
    make_leaf(t.rank, x);
    make_leaf(t.rank, w);
    make_leaf(t.rank, m);
    Rank& r = t.rank;
    Tensor y = softmax(r, silu(r, div(r, x, w)), 0);
    y = matmul(r, add(r, cumsum(r, y, 1), max(r, x, -1)), m);
    y = permute(r, sub(r, y, mean(r, y, 1)), {2, 0, 1});
    add_grad(r, y, t.random(y.dim, 4, 1, 0, DType::F32));
    // One factor of many small products: their gradients meet in one place.
    Tensor shared = t.random({48, 32}, 5, 1, 0, DType::F32);
    make_leaf(t.rank, shared);
    const Tensor small = matmul(r, shared, t.random({32, 32, 40}, 6, 1, 0, DType::F32));
    add_grad(r, small, t.random(small.dim, 7, 1, 0, DType::F32));
    const std::vector<double> out = values_of(y);
    backward(r, 0, t.tape.size());
    return std::vector<std::vector<double>>{out, values_of(grad_of(t.tape, x)),
        values_of(grad_of(t.tape, w)), values_of(grad_of(t.tape, m)),
        values_of(grad_of(t.tape, shared))};
  };
  const auto one = run(1);
  for (int threads : {2, 3, 5}) EXPECT_EQ(run(threads), one) << threads << " threads";
  omp_set_num_threads(2);
}
#endif

}  // namespace
}  // namespace pith
