// Files of a checkpoint, and its sealing.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "core/log.h"
#include "engine/checkpoint_parts.h"

namespace pith {
namespace fs = std::filesystem;

static vector<TensorDecl> declarations(const vector<FragmentPlan>& plan) {
  vector<TensorDecl> list;
  for (const FragmentPlan& f : plan) list.push_back({f.entry(), f.dtype, {f.count}});
  return list;
}

FragmentWriter::FragmentWriter(const string& folder, const string& file, vector<FragmentPlan> plan)
    : folder_(folder),
      file_(file),
      plan_(std::move(plan)),
      writer_(folder + "/" + file, declarations(plan_)),
      hash_(XXH3_createState()) {
  written_.files.push_back({file, 0});
  next();
}

FragmentWriter::~FragmentWriter() { XXH3_freeState(static_cast<XXH3_state_t*>(hash_)); }

// Begins the next fragment.
void FragmentWriter::next() {
  const size_t i = written_.tensors.size();
  if (i == plan_.size()) return;
  const FragmentPlan& f = plan_[i];
  written_.tensors.push_back({f.name, f.dtype, f.shape, {{f.begin, f.count, 0, writer_.size()}}});
  left_ = f.count * size_of(f.dtype);
  XXH3_64bits_reset(static_cast<XXH3_state_t*>(hash_));
}

void FragmentWriter::write(const void* bytes, int64_t size) {
  if (size > left_) failed(folder_ + "/" + file_, "a write crosses fragments");
  XXH3_64bits_update(static_cast<XXH3_state_t*>(hash_), bytes, size_t(size));
  writer_.write(bytes, size);
  left_ -= size;
  if (left_ > 0) return;
  written_.tensors.back().fragments[0].checksum =
      XXH3_64bits_digest(static_cast<XXH3_state_t*>(hash_));
  next();
}

Checkpoint FragmentWriter::finish() {
  written_.files[0].bytes = writer_.size();
  writer_.finish();
  return std::move(written_);
}

void add_fragments(Checkpoint& all, const Checkpoint& part) {
  const int first_file = int(all.files.size());
  all.files.insert(all.files.end(), part.files.begin(), part.files.end());
  all.tensors.insert(all.tensors.end(), part.tensors.begin(), part.tensors.end());
  for (size_t i = all.tensors.size() - part.tensors.size(); i < all.tensors.size(); i++)
    for (StoredFragment& f : all.tensors[i].fragments) f.file += first_file;
}

// One entry a tensor, by name, its fragments by begin.
static void merge_tensors(vector<StoredTensor>& tensors) {
  std::stable_sort(tensors.begin(), tensors.end(),
                   [](auto& a, auto& b) { return a.name < b.name; });
  vector<StoredTensor> merged;
  for (StoredTensor& tensor : tensors) {
    if (merged.empty() || merged.back().name != tensor.name) {
      merged.push_back(std::move(tensor));
      continue;
    }
    vector<StoredFragment>& list = merged.back().fragments;
    list.insert(list.end(), tensor.fragments.begin(), tensor.fragments.end());
  }
  for (StoredTensor& tensor : merged)
    std::sort(tensor.fragments.begin(), tensor.fragments.end(),
              [](auto& a, auto& b) { return a.begin < b.begin; });
  tensors = std::move(merged);
}

void remove_folder(const string& path) {
  std::error_code error;
  fs::remove_all(path, error);
  if (error) log_warning("%s: cannot be removed (%s)", path.c_str(), error.message().c_str());
}

[[noreturn]] static void cannot_place(const string& folder) {
  failed(folder, text("cannot be put in place (%s)", strerror(errno)),
         "check the permissions of the folder");
}

// `temporary` takes the place of `folder`, at no moment of which there is neither.
static void put_in_place(const string& temporary, const string& folder) {
  if (rename(temporary.c_str(), folder.c_str()) == 0) return;
  if (errno != ENOTEMPTY && errno != EEXIST) cannot_place(folder);
  if (renameat2(AT_FDCWD, temporary.c_str(), AT_FDCWD, folder.c_str(), RENAME_EXCHANGE) == 0) {
    sync_folder(folder_of(folder));
    remove_folder(temporary);
    return;
  }
  // A file system that cannot exchange.
  const string old = folder + ".old.tmp";
  remove_folder(old);
  if (rename(folder.c_str(), old.c_str()) != 0) cannot_place(folder);
  if (rename(temporary.c_str(), folder.c_str()) != 0) cannot_place(folder);
  sync_folder(folder_of(folder));
  remove_folder(old);
}

void seal(const Checkpoint& all, const string& temporary, const string& folder) {
  Checkpoint sealed = all;
  merge_tensors(sealed.tensors);
  write_file_durably(temporary + "/manifest.json", manifest_text(sealed));
  open_checkpoint(temporary);
  sync_folder(temporary);
  put_in_place(temporary, folder);
  sync_folder(folder_of(folder));
}

}  // namespace pith
