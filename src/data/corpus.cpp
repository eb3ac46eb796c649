// corpus: the threads of tokenize_corpus(). Each takes whatever there is to do, in this order:
// encode (and write) what was read, read on, open another unit. Reading stops while many bytes are
// between reading and writing: memory is bounded, and no thread has a role it could wait in.
#include "data/corpus.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <thread>

#include "core/check.h"
#include "core/json.h"
#include "core/log.h"
#include "core/process.h"
#include "data/corpus_parts.h"
#include "data/durable.h"

namespace pith {
namespace {

constexpr size_t kBadListed = 20;
constexpr int64_t kBytesPerThread = 4 << 20, kBytesForAll = 8 << 20;  // between read and written

struct OpenUnit {
  OpenUnit(const CorpusUnit& u, std::unique_ptr<TokenFileWriter> w)
      : unit(u), writer(std::move(w)), reader(u) {}
  const CorpusUnit& unit;
  std::unique_ptr<TokenFileWriter> writer;
  BatchReader reader;
  bool reading = false, read_all = false, writing = false;
  int64_t batches_read = 0, batches_written = 0;
  std::map<int64_t, std::unique_ptr<CorpusBatch>> encoded;  // by sequence, not yet written
  int64_t documents = 0, tokens = 0, text_bytes = 0, bad_documents = 0;
  int64_t line = 0;  // of the source whose lines are being written
  vector<BadDocument> bad;
};

// What every file of an output folder has in common.
struct CorpusSettings {
  const CorpusOptions& options;
  string tokenizer_path;
  Tokenizer tokenizer;
  uint32_t eos = 0;
  NpyType type = NpyType::U4;
};

string final_path(const CorpusOptions& o, const CorpusUnit& unit) {
  return o.output + "/" + unit.name + ".bin";
}
string hidden_path(const CorpusOptions& o, const string& name) {
  return o.output + "/.pith/" + name;
}
string hex(uint64_t value) { return text("%016lx", value); }
bool exists(const string& path) { return access(path.c_str(), F_OK) == 0; }

// A finished file must be this run's own: made by this program, from these sources as they are.
void check_finished(const CorpusOptions& o, const CorpusUnit& unit) {
  const string path = final_path(o, unit), record = hidden_path(o, unit.name + ".json");
  if (unit.sources[0].path == "-")
    bad_input(path, "is there already, and standard input cannot be resumed",
              "--join NAME for another name");
  if (!exists(record))
    bad_input(path, "is there already, but was not made by this command", "another --output");
  if (Json::parse_file(record)["sources"].as_string() != hex(unit.identity()))
    bad_input(path, "is there already, from other sources (names, sizes, times or --format differ)",
              "deleting it to make it again, or another --output");
}

class CorpusRun {
 public:
  CorpusRun(const CorpusSettings& settings, const vector<CorpusUnit>& units, int threads,
            int64_t bytes_to_do);
  CorpusReport run();

 private:
  using Lock = std::unique_lock<std::mutex>;
  void work();
  bool step(Lock& lock, BatchEncoder& encoder);
  bool over() const { return error_ || stop_requested() || units_over_ == units_.size(); }
  OpenUnit* readable();
  void read_one(Lock& lock, OpenUnit& unit);
  void encode_one(Lock& lock, BatchEncoder& encoder);
  void write_encoded(Lock& lock, OpenUnit& unit);
  void write_batch(OpenUnit& unit, const CorpusBatch& batch);
  bool finish_file(OpenUnit& unit);
  void retire(OpenUnit& unit, bool made);
  bool may_open() const;
  void open_next(Lock& lock);
  Claim open_unit(Lock& lock, const CorpusUnit& unit);
  std::unique_ptr<CorpusBatch> take_spare();

  const CorpusSettings& settings_;
  const CorpusOptions& options_;
  const vector<CorpusUnit>& units_;
  const int threads_;
  std::mutex mutex_;
  std::condition_variable changed_;
  // All below is guarded by the mutex. Of an OpenUnit, the thread that set `reading` owns the
  // reader, and the one that set `writing` the writer and the counts.
  vector<std::unique_ptr<OpenUnit>> open_;
  std::deque<std::pair<OpenUnit*, std::unique_ptr<CorpusBatch>>> ready_;  // read, not encoded
  vector<std::unique_ptr<CorpusBatch>> spare_;
  vector<const CorpusUnit*> elsewhere_;  // claimed by another process
  double ask_again_s_ = 0;
  size_t next_unit_ = 0, units_over_ = 0;
  int opening_ = 0;
  int64_t bytes_held_ = 0, bytes_done_ = 0, text_bytes_ = 0;
  vector<std::pair<const CorpusUnit*, BadDocument>> bad_;
  CorpusReport report_;
  std::exception_ptr error_;
  const double start_s_ = now_s();
  Progress progress_;
};

CorpusRun::CorpusRun(const CorpusSettings& settings, const vector<CorpusUnit>& units, int threads,
                     int64_t bytes_to_do)
    : settings_(settings),
      options_(settings.options),
      units_(units),
      threads_(threads),
      progress_("tokenize", bytes_to_do / 1e6, "MB of files") {}

CorpusReport CorpusRun::run() {
  vector<std::jthread> others;
  for (int i = 1; i < threads_; i++) others.emplace_back([this] { work(); });
  work();
  others.clear();
  if (error_) std::rethrow_exception(error_);
  report_.stopped = units_over_ < units_.size();
  report_.files_total = units_.size();
  report_.seconds = now_s() - start_s_;
  for (auto& [unit, bad] : bad_) report_.bad.push_back(std::move(bad));
  return std::move(report_);
}

void CorpusRun::work() {
  Lock lock(mutex_);
  try {
    lock.unlock();
    BatchEncoder encoder(settings_.tokenizer, options_, settings_.eos);
    lock.lock();
    while (!over())
      if (!step(lock, encoder)) changed_.wait_for(lock, std::chrono::milliseconds(100));
  } catch (...) {
    if (!lock.owns_lock()) lock.lock();
    if (!error_) error_ = std::current_exception();
  }
  changed_.notify_all();
}

// Does one piece of work, with the lock released while it lasts; false if there was none.
bool CorpusRun::step(Lock& lock, BatchEncoder& encoder) {
  if (!ready_.empty()) return encode_one(lock, encoder), true;
  if (bytes_held_ >= kBytesForAll + threads_ * kBytesPerThread) return false;
  if (OpenUnit* unit = readable()) return read_one(lock, *unit), true;
  if (may_open()) return open_next(lock), true;
  return false;
}

OpenUnit* CorpusRun::readable() {
  for (auto& unit : open_)
    if (!unit->reading && !unit->read_all) return unit.get();
  return nullptr;
}

std::unique_ptr<CorpusBatch> CorpusRun::take_spare() {
  if (spare_.empty()) return std::make_unique<CorpusBatch>();
  auto batch = std::move(spare_.back());
  spare_.pop_back();
  return batch;
}

void CorpusRun::read_one(Lock& lock, OpenUnit& unit) {
  unit.reading = true;
  auto batch = take_spare();
  lock.unlock();
  const bool any = unit.reader.read(*batch);
  lock.lock();
  unit.reading = false;
  unit.read_all = !any;
  if (!any) return write_encoded(lock, unit);
  batch->sequence = unit.batches_read++;
  bytes_held_ += batch->raw.size;
  ready_.emplace_back(&unit, std::move(batch));
  changed_.notify_all();
}

void CorpusRun::encode_one(Lock& lock, BatchEncoder& encoder) {
  auto [unit, batch] = std::move(ready_.front());
  ready_.pop_front();
  lock.unlock();
  encoder.encode(*batch);
  lock.lock();
  unit->encoded[batch->sequence] = std::move(batch);
  write_encoded(lock, *unit);
}

// Writes what is next in order, and finishes the unit behind its last batch.
void CorpusRun::write_encoded(Lock& lock, OpenUnit& unit) {
  if (unit.writing) return;  // that thread takes these batches too
  unit.writing = true;
  while (unit.encoded.count(unit.batches_written)) {
    auto batch = std::move(unit.encoded.extract(unit.batches_written).mapped());
    lock.unlock();
    write_batch(unit, *batch);
    lock.lock();
    unit.batches_written++;
    bytes_held_ -= batch->raw.size;
    bytes_done_ += batch->stored_bytes;
    text_bytes_ += batch->text_bytes;
    if (batch->raw.capacity <= 4 * BatchReader::kBatchBytes) spare_.push_back(std::move(batch));
    const double rate = text_bytes_ / 1e6 / std::max(now_s() - start_s_, 1e-3);
    progress_.update(bytes_done_ / 1e6,
                     text("%.1f MB/s of text, %zu/%zu files", rate, units_over_, units_.size()));
    changed_.notify_all();
  }
  if (unit.read_all && unit.batches_written == unit.batches_read) {
    lock.unlock();
    const bool made = finish_file(unit);
    lock.lock();
    retire(unit, made);
    return;
  }
  unit.writing = false;
}

void CorpusRun::write_batch(OpenUnit& unit, const CorpusBatch& batch) {
  if (batch.first_lines) unit.line = 0;
  for (const BadLine& bad : batch.bad) {
    const int64_t line = bad.line + (batch.lines_of ? unit.line : 0);
    BadDocument document{bad.source->path + ":" + std::to_string(line), bad.what};
    if (!options_.skip_bad)
      bad_input(document.place, document.what, "--skip-bad to leave such documents out");
    unit.bad_documents++;
    if (unit.bad.size() < kBadListed) unit.bad.push_back(std::move(document));
  }
  unit.line += batch.lines;
  unit.writer->append(batch.tokens, batch.ends);
  unit.documents += batch.ends.size();
  unit.tokens += batch.tokens.size();
  unit.text_bytes += batch.text_bytes;
}

// False if the unit had no document, and so becomes no file.
bool CorpusRun::finish_file(OpenUnit& unit) {
  if (unit.documents == 0) {
    BadDocument nothing{unit.unit.sources[0].path, "holds no document"};
    if (!options_.skip_bad)
      bad_input(nothing.place, nothing.what, "removing it from the inputs, or --skip-bad");
    unit.bad.push_back(std::move(nothing));
    return false;
  }
  JsonWriter record;
  record.object().key("sources").value(hex(unit.unit.identity()));
  record.key("documents").value(unit.documents).key("tokens").value(unit.tokens);
  record.key("text_bytes").value(unit.text_bytes);
  record.key("bad_documents").value(unit.bad_documents).end();
  write_file_durably(hidden_path(options_, unit.unit.name + ".json"), record.str() + "\n");
  unit.writer->finish();
  return true;
}

void CorpusRun::retire(OpenUnit& unit, bool made) {
  units_over_++;
  report_.files += made;
  report_.documents += unit.documents;
  report_.tokens += unit.tokens;
  report_.text_bytes += unit.text_bytes;
  report_.bad_documents += unit.bad_documents;
  report_.empty_files += unit.unit.empty_files;
  for (BadDocument& bad : unit.bad) bad_.emplace_back(&unit.unit, std::move(bad));
  std::stable_sort(bad_.begin(), bad_.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  if (bad_.size() > kBadListed) bad_.resize(kBadListed);
  std::erase_if(open_, [&](const auto& open) { return open.get() == &unit; });
  changed_.notify_all();
}

bool CorpusRun::may_open() const {
  if (int(open_.size()) + opening_ >= threads_) return false;
  return next_unit_ < units_.size() || (!elsewhere_.empty() && now_s() >= ask_again_s_);
}

// Opens the next unit of the list; after its end, one whose process let go of it.
void CorpusRun::open_next(Lock& lock) {
  if (next_unit_ < units_.size()) {
    const CorpusUnit& unit = units_[next_unit_++];
    if (open_unit(lock, unit) == Claim::Elsewhere) elsewhere_.push_back(&unit);
    return;
  }
  vector<const CorpusUnit*> asked = std::move(elsewhere_);
  elsewhere_.clear();
  Claim claim = Claim::Elsewhere;
  for (const CorpusUnit* unit : asked) {
    if (claim != Claim::Mine)
      claim = open_unit(lock, *unit);
    else
      elsewhere_.push_back(unit);
    if (claim == Claim::Elsewhere) elsewhere_.push_back(unit);
  }
  if (claim != Claim::Mine) ask_again_s_ = now_s() + 0.2;
}

Claim CorpusRun::open_unit(Lock& lock, const CorpusUnit& unit) {
  opening_++;
  lock.unlock();
  auto writer = std::make_unique<TokenFileWriter>(
      final_path(options_, unit), hidden_path(options_, unit.name + ".part"), settings_.type);
  const Claim claim = writer->claim();
  if (claim == Claim::Finished) check_finished(options_, unit);
  lock.lock();
  opening_--;
  if (claim == Claim::Mine) open_.push_back(std::make_unique<OpenUnit>(unit, std::move(writer)));
  if (claim == Claim::Finished) units_over_++, report_.files_done_before++;
  changed_.notify_all();
  return claim;
}

uint32_t find_eos(const Tokenizer& tokenizer, const CorpusOptions& o, const string& path) {
  if (o.eos.empty()) {
    if (!tokenizer.eos_id()) bad_input(path, "names no end-of-text token", "--eos TOKEN");
    return *tokenizer.eos_id();
  }
  if (const auto id = tokenizer.id_of(o.eos)) return *id;
  const bool digits = o.eos.find_first_not_of("0123456789") == string::npos;
  if (!digits || o.eos.size() > 9 || std::stoul(o.eos) >= tokenizer.vocab_size())
    bad_input("--eos",
              text("no such token (got %s, need a token of %s or an id < %u)", o.eos.c_str(),
                   path.c_str(), tokenizer.vocab_size()),
              "a token as the vocabulary writes it");
  return std::stoul(o.eos);
}

CorpusSettings load_settings(const CorpusOptions& o) {
  struct stat s;
  string path = o.tokenizer;
  if (stat(path.c_str(), &s) == 0 && S_ISDIR(s.st_mode)) path += "/tokenizer.json";
  CorpusSettings settings{o, path, Tokenizer::load(path)};
  settings.eos = find_eos(settings.tokenizer, o, path);
  const uint64_t size = settings.tokenizer.vocab_size();
  settings.type = size < UINT8_MAX ? NpyType::U1 : size < UINT16_MAX ? NpyType::U2 : NpyType::U4;
  return settings;
}

string settings_json(const CorpusSettings& s) {
  JsonWriter w(2);
  w.object().key("format").value(1);
  w.key("tokenizer").value("tokenizer.json").key("tokenizer_from").value(s.tokenizer_path);
  w.key("tokenizer_xxh3").value(hex(s.tokenizer.fingerprint()));
  w.key("vocab_size").value(s.tokenizer.vocab_size()).key("dtype").value(name_of(s.type));
  w.key("eos_id").value(s.eos).key("eos").value(string(s.tokenizer.token_text(s.eos)));
  w.key("key").value(s.options.key);
  w.key("special_as_text").value(s.options.special_as_text).end();
  return w.str() + "\n";
}

struct FileLock {
  FileLock(const string& p, int operation)
      : path(p), fd(open(p.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666)) {
    if (fd < 0 || flock(fd, operation) != 0) failed(path, "cannot be locked");
  }
  FileLock(const FileLock&) = delete;
  ~FileLock() { close(fd); }
  string path;
  int fd;
};

// Writes corpus.json and tokenizer.json, or finds that they say the same; under a lock, because
// several processes may begin at once. The result marks the folder as not whole: each run holds it
// while at work, and one that does not end well leaves it behind.
FileLock open_folder(const CorpusSettings& s) {
  const string &folder = s.options.output, path = folder + "/corpus.json";
  make_folders(folder + "/.pith");
  const FileLock lock(hidden_path(s.options, ".lock"), LOCK_EX);
  if (exists(path)) {
    const Json old = Json::parse_file(path), mine = Json::parse(settings_json(s), "this run");
    for (const char* key : {"tokenizer_xxh3", "eos_id", "dtype", "key", "special_as_text"})
      if (old[key].dump() != mine[key].dump())
        bad_input(path,
                  text("the folder was made with another %s (got %s, need %s)", key,
                       mine[key].dump().c_str(), old[key].dump().c_str()),
                  "another --output");
  } else {
    write_file_durably(folder + "/tokenizer.json", read_text_file(s.tokenizer_path));
    write_file_durably(path, settings_json(s));
  }
  return FileLock(hidden_path(s.options, ".run"), LOCK_SH);
}

// The last of several runs at work takes the mark away.
void close_folder(const CorpusOptions& o, const FileLock& mark) {
  const FileLock lock(hidden_path(o, ".lock"), LOCK_EX);
  if (flock(mark.fd, LOCK_EX | LOCK_NB) == 0) unlink(mark.path.c_str());
}

}  // namespace

CorpusReport tokenize_corpus(const CorpusOptions& o) {
  const vector<CorpusUnit> units = plan_corpus(o);
  const CorpusSettings settings = load_settings(o);
  int64_t bytes_to_do = 0;
  for (const CorpusUnit& unit : units) {
    if (exists(final_path(o, unit)))
      check_finished(o, unit);
    else
      bytes_to_do += unit.bytes;
  }
  const FileLock mark = open_folder(settings);
  const int cores = std::max(1u, std::thread::hardware_concurrency());
  CorpusReport report =
      CorpusRun(settings, units, o.threads > 0 ? o.threads : cores, bytes_to_do).run();
  if (report.stopped) return report;
  if (report.files + report.files_done_before == 0)
    bad_input("--input", "no file holds a document that can be used", "other inputs or --key");
  close_folder(o, mark);
  return report;
}

}  // namespace pith
