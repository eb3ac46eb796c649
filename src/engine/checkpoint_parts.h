// checkpoint_parts: what writing and reading checkpoints share. Included by checkpoint*.cpp,
// weight_source.cpp and the commands that make checkpoints.
// defines: manifest_text, read_manifest, FragmentWriter, add_fragments, seal, on_threads
#pragma once
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>

#include "engine/checkpoint.h"

namespace pith {

constexpr const char* kExpAvg = ".exp_avg";  // suffixes of Adam's moments
constexpr const char* kExpAvgSq = ".exp_avg_sq";
bool is_moment(const string& name);

string step_name(int64_t step);  // "step-00000100"
// Manifests end in a checksum of themselves.
string manifest_text(const Checkpoint& checkpoint);
// Exit code 2 if it is missing, damaged or of another version.
Checkpoint read_manifest(const string& path);
// Exit code 2 unless the fragments cover each tensor exactly once.
void check_coverage(const Checkpoint& checkpoint);

// A fragment to be written.
struct FragmentPlan {
  string name;            // of the tensor
  vector<int64_t> shape;  // of the whole tensor
  FileDType dtype = FileDType::F32;
  int64_t begin = 0, count = 0;
  string entry() const { return name + "#" + std::to_string(begin); }
};

// Streams planned fragments, in order, into one file of a checkpoint under way.
class FragmentWriter {
 public:
  FragmentWriter(const string& folder, const string& file, vector<FragmentPlan> plan);
  FragmentWriter(const FragmentWriter&) = delete;
  FragmentWriter& operator=(const FragmentWriter&) = delete;
  ~FragmentWriter();
  // Bytes of the fragment at hand, in pieces that do not cross fragments.
  void write(const void* bytes, int64_t size);
  // Flushes; what was written, as a checkpoint of one file.
  Checkpoint finish();

 private:
  void next();
  string folder_, file_;
  vector<FragmentPlan> plan_;
  SafetensorsWriter writer_;
  Checkpoint written_;
  void* hash_;
  int64_t left_ = 0;  // bytes of the fragment at hand
};

// Adds the files and fragments of `part` to `all`; tensors by name and fragments by begin.
void add_fragments(Checkpoint& all, const Checkpoint& part);
// Writes the manifest into `temporary`, reads it back, and renames the folder to `folder`,
// replacing one that is there; all flushed to disk.
void seal(const Checkpoint& all, const string& temporary, const string& folder);
// Removes a folder and what is in it; a warning if that fails.
void remove_folder(const string& path);

// Calls fn(i) for each i < tasks on up to 8 threads. Of the exceptions that it throws, the one of
// the lowest i is thrown here.
template <class Fn>
void on_threads(int64_t tasks, Fn&& fn) {
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr first;
  int64_t first_at = tasks;
  auto work = [&] {
    for (int64_t i = next++; i < tasks; i = next++) {
      try {
        fn(i);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (i < first_at) first = std::current_exception();
        if (i < first_at) first_at = i;
      }
    }
  };
  vector<std::thread> threads;
  const int64_t most = std::min<int64_t>(tasks, std::thread::hardware_concurrency());
  for (int64_t t = 1; t < std::min<int64_t>(most, 8); t++) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  if (first) std::rethrow_exception(first);
}

}  // namespace pith
