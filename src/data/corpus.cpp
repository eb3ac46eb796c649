// Each thread reads a batch of some unit, encodes it, and writes it when its turn comes.
#include "data/corpus.h"

#include <fcntl.h>
#include <fnmatch.h>
#include <rapidjson/document.h>
#include <rapidjson/error/en.h>
#include <sys/file.h>
#include <unistd.h>
#include <xxhash.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <deque>
#include <filesystem>
#include <map>
#include <mutex>
#include <optional>
#include <thread>

#include "core/json.h"
#include "core/log.h"
#include "core/process.h"
#include "data/tokenizer.h"

namespace pith {
namespace fs = std::filesystem;

namespace {
constexpr size_t kReadBytes = 256 << 10, kBatchBytes = 1 << 20;

struct Source {
  string path, name;
  i64 bytes = 0;
  CorpusFormat format = CorpusFormat::Auto;
};

struct Unit {
  string path, record;
  string identity;  // hash of the settings and of the sources' names, sizes, times and formats
  vector<Source> sources = {};
  i64 bytes = 0;
};

// Sets the format; returns the name without its suffixes.
string classify(Source& source, CorpusFormat wanted) {
  fs::path stem = source.name;
  if (stem.extension() == ".gz" || stem.extension() == ".zst") stem.replace_extension();
  bool jsonl = stem.extension() == ".jsonl", known = jsonl || stem.extension() == ".txt";
  if (known) stem.replace_extension();
  if (wanted == CorpusFormat::Auto && !known)
    bad_input(source.path,
        "its name does not tell its format (need .txt or .jsonl, also .gz, .zst)",
        "--format text or --format jsonl; --include '*.jsonl' to take only some files");
  source.format = wanted != CorpusFormat::Auto ? wanted
                  : jsonl                      ? CorpusFormat::Jsonl
                                               : CorpusFormat::Text;
  return stem;
}

vector<Source> find_sources(const CorpusOptions& o) {
  if (o.inputs.size() > 1 && std::ranges::count(o.inputs, "-"))
    bad_input("-", "standard input beside other inputs (need it alone)", "two runs, or files only");
  if (o.inputs[0] == "-") return {{"-", "stdin"}};
  vector<Source> found;
  for (const string& input : o.inputs)
    for (const fs::path file : find_files(input, o.output)) {
      const fs::path name = file == input ? file.filename() : file.lexically_relative(input);
      auto matches = [&](const string& pattern) {
        return fnmatch(pattern.c_str(), file.filename().c_str(), 0) == 0;
      };
      if (o.include.empty() || std::ranges::any_of(o.include, matches))
        found.push_back({file, name, i64(fs::file_size(file))});
    }
  if (found.empty())
    bad_input("--input", "no file to tokenise was found", "another folder or --include");
  return found;
}

vector<Unit> plan(const CorpusOptions& o, const string& settings) {
  if (o.join.starts_with(".") || o.join.find('/') != string::npos)
    bad_input("--join", text("is \"%s\" (need a plain file name)", o.join.c_str()), "--join c");
  vector<Unit> units;
  std::map<string, string> taken;  // name -> its source
  for (Source& source : find_sources(o)) {
    string name = classify(source, o.format);
    if (!o.join.empty()) name = o.join;
    if (o.join.empty() || units.empty()) {
      units.push_back(
          {o.output + "/" + name + ".bin", o.output + "/.pith/" + name + ".sources", settings});
      const auto [other, fresh] = taken.emplace(name, source.path);
      if (!fresh)
        bad_input(source.path,
            text("would become the same token file %s.bin as %s", name.c_str(),
                other->second.c_str()),
            "--join NAME, or one run and output folder for each");
    }
    Unit& unit = units.back();
    std::error_code none;  // standard input has no time
    i64 time = fs::last_write_time(source.path, none).time_since_epoch().count();
    string all = unit.identity + text("%s\t%ld\t%ld\t%d", source.name.c_str(), source.bytes, time,
                                     int(source.format));
    unit.identity = std::to_string(XXH3_64bits(all.data(), all.size()));
    unit.bytes += source.bytes;
    unit.sources.push_back(std::move(source));
  }
  return units;
}

class SourceStream {
 public:
  explicit SourceStream(const string& path)
      : path_(path),
        fd_(path == "-" ? dup(STDIN_FILENO) : open(path.c_str(), O_RDONLY | O_CLOEXEC)),
        gzip_(path.ends_with(".gz")),
        zstd_(path.ends_with(".zst") ? ZSTD_createDStream() : nullptr) {
    if (fd_ < 0) bad_input(path, text("cannot be opened (%s)", strerror(errno)), "another file");
    if (gzip_) inflateInit2(&inflater_, 15 + 16);
  }
  SourceStream(const SourceStream&) = delete;
  ~SourceStream() {
    inflateEnd(&inflater_);
    ZSTD_freeDStream(zstd_);
    close(fd_);
  }

  size_t read(char* to, size_t n) {
    if (!gzip_ && !zstd_) return read_stored(to, n);
    buffer_.resize(kReadBytes);
    for (;;) {
      // Asked before more is read: a decoder may hold output back.
      size_t got = inside_ || begin_ < end_ ? decompress(to, n) : 0;
      if (got) return got;
      if (begin_ < end_) continue;
      begin_ = 0;
      end_ = read_stored(buffer_.data(), kReadBytes);
      if (end_ == 0 && inside_) damaged("is truncated: its compressed data end in the middle");
      if (end_ == 0) return 0;
    }
  }
  i64 stored_bytes = 0;

 private:
  size_t read_stored(void* to, size_t n) {
    ssize_t got;
    do got = ::read(fd_, to, n);
    while (got < 0 && errno == EINTR);
    if (got < 0) failed(path_, text("cannot be read (%s)", strerror(errno)));
    stored_bytes += got;
    return got;
  }

  size_t decompress(char* to, size_t n) {
    if (zstd_) {
      ZSTD_outBuffer out{to, n, 0};
      ZSTD_inBuffer in{buffer_.data(), end_, begin_};
      size_t code = ZSTD_decompressStream(zstd_, &out, &in);
      if (ZSTD_isError(code)) damaged(text("is not valid zstd data (%s)", ZSTD_getErrorName(code)));
      begin_ = in.pos;
      inside_ = code != 0;
      return out.pos;
    }
    if (!inside_) inflateReset(&inflater_);
    inflater_.next_in = buffer_.data() + begin_;
    inflater_.avail_in = end_ - begin_;
    inflater_.next_out = reinterpret_cast<Bytef*>(to);
    inflater_.avail_out = n;
    int code = inflate(&inflater_, Z_NO_FLUSH);
    if (code != Z_OK && code != Z_STREAM_END && code != Z_BUF_ERROR)
      damaged(text("is not valid gzip data (%s)", inflater_.msg ? inflater_.msg : "damaged"));
    begin_ = end_ - inflater_.avail_in;
    inside_ = code != Z_STREAM_END;
    return n - inflater_.avail_out;
  }

  [[noreturn]] void damaged(const string& what) const {
    bad_input(path_, what, "downloading it again; gzip -t or zstd -t checks it");
  }

  const string path_;
  const int fd_;
  const bool gzip_;
  ZSTD_DStream* const zstd_;
  bool inside_ = true;  // of a gzip member or zstd frame
  vector<u8> buffer_;   // stored bytes; [begin_, end_) are not used yet
  size_t begin_ = 0, end_ = 0;
  z_stream inflater_{};
};

// Whole lines, about a MiB, or a whole text file.
struct Batch {
  const Source* source;
  i64 first_line;
  string raw;
  i64 stored_bytes = 0;
  bool last = false;                      // of its unit
  vector<std::pair<string, string>> bad;  // "file:line", what is wrong
  i64 text_bytes = 0;
  vector<u32> tokens;
  vector<u64> ends;  // of documents
};

// Overwrites line[0, n); line[n] is 0. `document` points into it. Returns what is wrong.
string parse_line(char* line, size_t n, const string& key, string_view& document) {
  // Python's json writes NaN and Infinity. Iterative: deep nesting must not use up the stack.
  constexpr unsigned kFlags = rapidjson::kParseIterativeFlag | rapidjson::kParseNanAndInfFlag;
  if (n > UINT32_MAX) return "longer than 4 GiB";
  if (!is_valid_utf8({line, n})) return "not valid UTF-8";
  if (size_t zero = strlen(line); zero < n)
    return text("not valid JSON: a zero byte at %zu", zero + 1);
  rapidjson::Document json;
  json.ParseInsitu<kFlags>(line);
  if (json.HasParseError())
    return text("not valid JSON at byte %zu of the line: %s", json.GetErrorOffset() + 1,
        rapidjson::GetParseError_En(json.GetParseError()));
  if (!json.IsObject()) return "not a JSON object";
  const rapidjson::Value* found = nullptr;  // the last, as in Python
  for (const auto& member : json.GetObject())
    if (key == string_view(member.name.GetString(), member.name.GetStringLength()))
      found = &member.value;
  if (!found) return text("no key \"%s\"", key.c_str());
  if (!found->IsString()) return text("the value of \"%s\" is not a string", key.c_str());
  document = {found->GetString(), found->GetStringLength()};
  // As U+DC00, which only an escape can write: ED B0 80.
  if (document.find('\xed') != string::npos && !is_valid_utf8(document))
    return text("half of a surrogate pair in \"%s\"", key.c_str());
  return "";
}

void each_document(Batch& batch, const string& key, const auto& use) {
  i64 line = batch.first_line;
  auto add = [&](string_view document, const string& wrong) {
    if (wrong.empty())
      use(document);
    else
      batch.bad.push_back({batch.source->path + ":" + std::to_string(line), wrong});
  };
  char *at = batch.raw.data(), *const end = at + batch.raw.size();
  if (line == 1 && batch.raw.starts_with("\xef\xbb\xbf")) at += 3;  // byte order mark
  if (batch.source->format == CorpusFormat::Text) {
    size_t valid = valid_utf8_prefix({at, end});
    line += std::count(at, at + valid, '\n');
    if (at < end) add({at, end}, at + valid < end ? "not valid UTF-8" : "");
    return;
  }
  for (char* next; at < end; at = next, line++) {
    next = static_cast<char*>(memchr(at, '\n', end - at)) + 1;
    string_view whole(at, next - 1);
    if (whole.find_first_not_of(" \t\r") == string::npos) continue;
    string_view document;
    next[-1] = '\0';
    string wrong = parse_line(at, whole.size(), key, document);
    add(document, wrong);
  }
}

// Claimed by the lock on its record: ends of documents, at last the unit's identity.
struct OpenUnit {
  OpenUnit(const Unit& u, FileDType ids)
      : unit(u), type(ids), record(u.record, LOCK_EX | LOCK_NB) {}

  Batch read() {
    const Source& source = unit.sources[next];
    bool lines = source.format == CorpusFormat::Jsonl;
    if (!stream) {
      stream.emplace(source.path);
      line = 1;
    }
    Batch batch{&source, line, std::exchange(carry, "")};
    string& raw = batch.raw;
    auto step = std::clamp<size_t>(source.bytes + 1, 16 << 10, kReadBytes);
    for (;;) {
      size_t size = raw.size();
      raw.resize(size + step);
      size_t got = stream->read(&raw[size], step);
      raw.resize(size + got);
      batch.stored_bytes += std::exchange(stream->stored_bytes, 0);
      if (got == 0) {
        if (lines) raw += '\n';  // where the last line has none
        stream.reset();
        batch.last = ++next == unit.sources.size();
        return batch;
      }
      size_t newline = string_view(raw).substr(size).rfind('\n');
      if (!lines || raw.size() < kBatchBytes || newline == string::npos) continue;
      carry = raw.substr(size + newline + 1);
      raw.resize(size + newline + 1);
      line += std::ranges::count(raw, '\n');
      return batch;
    }
  }

  void begin() {
    record.replace("");
    make_folders(folder_of(unit.path));
    file.emplace(unit.path);
    file->write(npy_header(type, {0}));  // until the number of tokens is known
  }

  void append(Batch& batch) {
    if (type == FileDType::U32)
      file->write(batch.tokens);
    else
      file->write(vector<u16>(batch.tokens.begin(), batch.tokens.end()));
    for (u64& end : batch.ends) end += num_tokens;
    record.append(batch.ends.data(), batch.ends.size() * 8);
    num_tokens += batch.tokens.size();
    num_documents += batch.ends.size();
  }

  void finish() {
    const MappedFile ends(unit.record);
    file->write(npy_header(FileDType::U64, {num_documents}));
    file->write(ends.data(), ends.size());
    file->write_begin(npy_header(type, {num_tokens}));
    record.replace(unit.identity);
    file->finish();
  }

  const Unit& unit;
  const FileDType type;
  size_t next = 0;  // of the sources
  std::optional<SourceStream> stream;
  i64 line = 1;
  string carry;
  bool reading = false;
  i64 batches_read = 0, batches_written = 0;
  LockedFile record;
  std::optional<DurableFile> file;
  i64 num_tokens = 0, num_documents = 0;
};

class CorpusRun {
 public:
  explicit CorpusRun(const CorpusOptions& options)
      : options_(options),
        tokenizer_(Tokenizer::load(options.tokenizer)),
        eos_(options.eos.empty() ? tokenizer_.eos_id : tokenizer_.id_of(options.eos)),
        type_(tokenizer_.vocab_size() < UINT16_MAX ? FileDType::U16 : FileDType::U32),
        units_(plan(options, text("%d\t%d\t%s", eos_ ? int(*eos_) : -1, options.special_as_text,
                                 options.key.c_str()))),
        threads_(
            options.threads ? options.threads : max<i64>(1, std::thread::hardware_concurrency())),
        progress_("tokenize", find_work() / 1e6, "MB of files") {
    if (!eos_)
      bad_input("--eos",
          text("no such token (got %s, need a token of %s)",
              options.eos.empty() ? "none" : options.eos.c_str(), options.tokenizer.c_str()),
          "a token as the vocabulary writes it");
  }

  CorpusReport run() {
    open_folder();
    double start_s = now_s();
    vector<std::jthread> others;
    for (int i = 1; i < threads_; i++) others.emplace_back([this] { work(); });
    work();
    others.clear();
    if (error_) std::rethrow_exception(error_);
    report_.stopped = !to_do_.empty() || !open_.empty();
    report_.files_total = units_.size();
    report_.seconds = now_s() - start_s;
    if (report_.stopped) return report_;
    if (report_.files + report_.files_done_before == 0)
      bad_input("--input", "no file holds a document that can be used", "other inputs or --key");
    fs::remove(mark_);
    return report_;
  }

 private:
  using Lock = std::unique_lock<std::mutex>;

  i64 find_work() {
    i64 bytes = 0;
    for (const Unit& unit : units_) {
      if (is_finished(unit)) continue;
      to_do_.push_back(&unit);
      bytes += unit.bytes;
    }
    return bytes;
  }

  bool is_finished(const Unit& unit) {
    if (!fs::exists(unit.path)) return false;
    const char* why = unit.sources[0].path == "-" ? "and standard input cannot be resumed"
                      : !fs::exists(unit.record)  ? "but was not made by this command"
                      : read_text_file(unit.record) != unit.identity
                          ? "from other sources or options (names, sizes, times, --format, "
                            "--key, --eos or --special-as-text differ)"
                          : nullptr;
    if (why)
      bad_input(unit.path, text("is there already, %s", why),
          "deleting it to make it again, or another --output");
    report_.files_done_before++;
    return true;
  }

  // Marks the folder as not whole.
  void open_folder() const {
    const string &folder = options_.output, path = folder + "/tokenizer.json";
    string own = read_text_file(options_.tokenizer);
    make_folders(folder + "/.pith");
    const LockedFile lock(folder + "/.pith/.lock", LOCK_EX);
    if (!fs::exists(path)) write_file_durably(path, own);
    if (read_text_file(path) != own)
      bad_input(path, "the folder was made with another tokenizer", "another --output");
    const LockedFile mark(mark_, LOCK_SH);
  }

  void work() {
    Lock lock(mutex_);
    try {
      EncodeScratch scratch;
      while (const std::shared_ptr<OpenUnit> unit = next_unit(lock)) {
        unit->reading = true;
        lock.unlock();
        Batch batch = unit->read();
        lock.lock();
        unit->reading = false;
        i64 turn = unit->batches_read++;
        if (batch.last) std::erase(open_, unit);
        changed_.notify_all();
        lock.unlock();
        each_document(batch, options_.key, [&](string_view document) {
          tokenizer_.encode(document, batch.tokens, options_.special_as_text, scratch);
          batch.tokens.push_back(*eos_);
          batch.ends.push_back(batch.tokens.size());
          batch.text_bytes += i64(document.size());
        });
        lock.lock();
        changed_.wait(lock, [&] { return error_ || unit->batches_written == turn; });
        if (!error_) write(lock, *unit, batch);
      }
    } catch (...) {
      if (!lock.owns_lock()) lock.lock();
      if (!error_) error_ = std::current_exception();
    }
    changed_.notify_all();
  }

  std::shared_ptr<OpenUnit> next_unit(Lock& lock) {
    while (!error_ && !stop_requested() && !(to_do_.empty() && open_.empty())) {
      claim_units();
      auto unit = std::ranges::min_element(open_, {}, [](const auto& u) {
        return u->reading ? INT64_MAX : u->batches_read - u->batches_written;
      });
      if (unit != open_.end() && !(*unit)->reading) return *unit;
      changed_.wait_for(lock, std::chrono::milliseconds(100));
    }
    return nullptr;
  }

  void claim_units() {
    for (size_t left = to_do_.size(); left > 0 && i64(open_.size()) < threads_; left--) {
      const Unit& next = *to_do_.front();
      make_folders(folder_of(next.record));
      auto unit = std::make_shared<OpenUnit>(next, type_);
      to_do_.pop_front();
      if (!unit->record.held) {
        to_do_.push_back(&next);
      } else if (!is_finished(next)) {
        unit->begin();
        open_.push_back(unit);
      }
    }
  }

  void write(Lock& lock, OpenUnit& unit, Batch& batch) {
    for (const auto& [place, what] : batch.bad) leave_out(place, what);
    lock.unlock();
    unit.append(batch);
    bool make = batch.last && unit.num_documents > 0;
    if (make) unit.finish();
    lock.lock();
    if (batch.last && !make) leave_out(unit.unit.sources[0].path, "holds no document");
    unit.batches_written++;
    report_.files += make;
    report_.documents += batch.ends.size();
    report_.tokens += batch.tokens.size();
    report_.text_bytes += batch.text_bytes;
    report_.bad_documents += batch.bad.size();
    bytes_done_ += batch.stored_bytes;
    progress_.update(bytes_done_ / 1e6);
    changed_.notify_all();
  }

  void leave_out(const string& place, const string& what) const {
    if (!options_.skip_bad) bad_input(place, what, "--skip-bad to leave such documents out");
    log_warning("left out: %s: %s", place.c_str(), what.c_str());
  }

  const CorpusOptions& options_;
  const Tokenizer tokenizer_;
  const std::optional<u32> eos_;
  const FileDType type_;
  const vector<Unit> units_;
  const i64 threads_;
  const string mark_ = options_.output + "/.pith/.run";
  std::mutex mutex_;  // guards all below
  std::condition_variable changed_;
  std::deque<const Unit*> to_do_;
  vector<std::shared_ptr<OpenUnit>> open_;
  i64 bytes_done_ = 0;
  CorpusReport report_;
  std::exception_ptr error_;
  Progress progress_;
};
}

CorpusReport tokenize_corpus(const CorpusOptions& options) { return CorpusRun(options).run(); }

}
