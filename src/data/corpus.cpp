// corpus: each thread reads a batch of some unit, encodes it, and writes what is next in order.
#include "data/corpus.h"

#include <fcntl.h>
#include <rapidjson/document.h>
#include <rapidjson/error/en.h>
#include <sys/file.h>
#include <unistd.h>
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
constexpr i64 kAhead = 4;  // batches of a unit encoded before their turn

// The bytes of a source, decompressed as the suffix of its name says.
class SourceStream {
 public:
  explicit SourceStream(const string& path)
      : path_(path),
        fd_(path == "-" ? dup(STDIN_FILENO) : open(path.c_str(), O_RDONLY | O_CLOEXEC)),
        gzip_(path.ends_with(".gz")) {
    if (fd_ < 0) bad_input(path, text("cannot be opened (%s)", strerror(errno)), "another file");
    if (gzip_) inflateInit2(&inflater_, 15 + 16);
    if (!path.ends_with(".zst") && !path.ends_with(".zstd")) return;
    zstd_ = ZSTD_createDStream();
    ZSTD_DCtx_setParameter(zstd_, ZSTD_d_windowLogMax, 31);  // as files made with --long=31
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
      const size_t got = inside_ || begin_ < end_ ? decompress(to, n) : 0;
      if (got) return got;
      if (begin_ < end_) continue;
      begin_ = 0;
      end_ = read_stored(buffer_.data(), kReadBytes);
      if (end_ == 0 && inside_) damaged("is truncated: its compressed data end in the middle");
      if (end_ == 0) return 0;
    }
  }
  i64 stored_bytes = 0;  // read so far

 private:
  size_t read_stored(char* to, size_t n) {
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
      const size_t code = ZSTD_decompressStream(zstd_, &out, &in);
      if (ZSTD_isError(code)) damaged(text("is not valid zstd data (%s)", ZSTD_getErrorName(code)));
      begin_ = in.pos;
      inside_ = code != 0;
      return out.pos;
    }
    if (!inside_) inflateReset(&inflater_);
    inflater_.next_in = reinterpret_cast<Bytef*>(buffer_.data() + begin_);
    inflater_.avail_in = end_ - begin_;
    inflater_.next_out = reinterpret_cast<Bytef*>(to);
    inflater_.avail_out = n;
    const int code = inflate(&inflater_, Z_NO_FLUSH);
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
  bool inside_ = true;  // of a gzip member or zstd frame
  string buffer_;       // stored bytes; [begin_, end_) are not used yet
  size_t begin_ = 0, end_ = 0;
  z_stream inflater_{};
  ZSTD_DStream* zstd_ = nullptr;
};

// Part of a unit: about a MiB, or one larger document.
struct Batch {
  // Whole lines of a source, or a whole text file: raw[begin, end).
  struct Piece {
    const CorpusSource* source;
    i64 first_line;
    size_t begin, end;
  };
  string raw;
  vector<Piece> pieces;
  i64 stored_bytes = 0;
  bool last = false;
  vector<string_view> documents;
  vector<std::pair<string, string>> bad;  // "file:line", what is wrong
  vector<u32> tokens;
  vector<u64> ends;  // of documents
};

class BatchReader {
 public:
  explicit BatchReader(const vector<CorpusSource>& sources) : sources_(sources) {}

  Batch read() {
    Batch batch;
    batch.raw.reserve(kBatchBytes + kReadBytes);
    while (next_ < sources_.size() && batch.raw.size() < kBatchBytes) read_piece(batch);
    batch.last = next_ == sources_.size();
    return batch;
  }

 private:
  // The rest of a source, or as many whole lines as fill the batch.
  void read_piece(Batch& batch) {
    const CorpusSource& source = sources_[next_];
    const bool lines = source.format == CorpusFormat::Jsonl;
    string& raw = batch.raw;
    const size_t begin = raw.size();
    if (!stream_) {
      stream_.emplace(source.path);
      line_ = 1;
    }
    raw += carry_;
    carry_.clear();
    const auto step = std::clamp<size_t>(source.bytes + 1, 16 << 10, kReadBytes);
    for (;;) {
      const size_t size = raw.size();
      raw.resize(size + step);
      const size_t got = stream_->read(&raw[size], step);
      raw.resize(size + got);
      batch.stored_bytes += std::exchange(stream_->stored_bytes, 0);
      if (got == 0) {
        if (lines) raw += '\n';  // where the last line has none
        stream_.reset();
        next_++;
        break;
      }
      const size_t newline = string_view(raw).substr(size).rfind('\n');
      if (lines && raw.size() >= kBatchBytes && newline != string::npos) {
        carry_ = raw.substr(size + newline + 1);
        raw.resize(size + newline + 1);
        break;
      }
    }
    batch.pieces.push_back({&source, line_, begin, raw.size()});
    if (!lines) return;
    for (size_t at = begin; (at = raw.find('\n', at)) != string::npos; at++) line_++;
  }

  const vector<CorpusSource>& sources_;
  size_t next_ = 0;
  std::optional<SourceStream> stream_;
  i64 line_ = 1;
  string carry_;  // the begin of a line
};

// Overwrites line[0, n), where line[n] is 0; `document` points into it. Returns what is wrong.
string parse_line(char* line, size_t n, const string& key, string_view& document) {
  // Python's json writes NaN and Infinity. Iterative: deep nesting must not use up the stack.
  constexpr unsigned kFlags = rapidjson::kParseIterativeFlag | rapidjson::kParseNanAndInfFlag;
  if (n > UINT32_MAX) return "longer than 4 GiB";
  if (!is_valid_utf8({line, n})) return "not valid UTF-8";
  if (const size_t zero = strlen(line); zero < n)
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

// Returns what is wrong, and moves `line` on to it.
string check_text(string_view document, i64& line) {
  if (document.empty()) return "is empty";
  if (is_valid_utf8(document)) return "";
  for (;; line++) {
    const size_t newline = document.find('\n');
    if (newline == string::npos || !is_valid_utf8(document.substr(0, newline)))
      return "not valid UTF-8";
    document.remove_prefix(newline + 1);
  }
}

void find_documents(Batch& batch, const string& key) {
  constexpr string_view kBom = "\xef\xbb\xbf";
  for (const Batch::Piece& piece : batch.pieces) {
    i64 line = piece.first_line;
    const auto add = [&](string_view document, const string& wrong) {
      if (wrong.empty())
        batch.documents.push_back(document);
      else
        batch.bad.push_back({piece.source->path + ":" + std::to_string(line), wrong});
    };
    char *at = &batch.raw[piece.begin], *const end = &batch.raw[piece.end];
    if (line == 1 && string_view(at, end).starts_with(kBom)) at += kBom.size();
    if (piece.source->format == CorpusFormat::Text) {
      const string_view document(at, end);
      add(document, check_text(document, line));
      continue;
    }
    for (char* next; at < end; at = next, line++) {
      next = static_cast<char*>(memchr(at, '\n', end - at)) + 1;
      const string_view whole(at, next - 1);
      if (whole.find_first_not_of(" \t\r") == string::npos) continue;
      string_view document;
      next[-1] = '\0';
      const string wrong = parse_line(at, whole.size(), key, document);
      add(document, wrong);
    }
  }
}

void need_io(bool good, const string& path, const char* what) {
  if (!good)
    failed(path, text("%s (%s)", what, strerror(errno)),
           "free space, permissions, another --output");
}

// The kernel lets go of the lock however the process ends.
struct LockedFile {
  LockedFile(const string& file, int operation)
      : path(file), fd(open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666)) {
    need_io(fd >= 0, path, "cannot be opened");
    held = flock(fd, operation) == 0;
    need_io(held || errno == EWOULDBLOCK, path, "cannot be locked");
  }
  LockedFile(const LockedFile&) = delete;
  ~LockedFile() { close(fd); }

  void clear() const { need_io(ftruncate(fd, 0) == 0, path, "cannot be emptied"); }
  void append(string_view bytes) const {
    while (!bytes.empty()) {
      const ssize_t n = write(fd, bytes.data(), bytes.size());
      need_io(n > 0, path, "cannot be written");
      bytes.remove_prefix(n);
    }
  }
  // On disk, with `begin` at its begin.
  void complete(const string& begin) const {
    need_io(pwrite(fd, begin.data(), begin.size(), 0) == ssize_t(begin.size()) && fsync(fd) == 0,
            path, "cannot be completed");
  }
  const string path;
  const int fd;
  bool held;
};

// A unit at work, claimed by the lock on its record, which holds the ends of its documents and at
// last what the token file was made of.
struct OpenUnit {
  explicit OpenUnit(const CorpusUnit& u)
      : unit(u), reader(u.sources), record(u.record, LOCK_EX | LOCK_NB) {}
  ~OpenUnit() {
    if (file) unlink(unit.part.c_str());
  }

  void begin(NpyType type) {
    file.emplace(unit.part, LOCK_EX);
    file->clear();
    record.clear();
    file->append(npy_header(type, {0}));  // until the number of tokens is known
  }

  void append(Batch& batch, NpyType type) {
    const auto append_ids = [&](const auto& ids) {
      file->append({reinterpret_cast<const char*>(ids.data()), ids.size() * sizeof ids[0]});
    };
    if (type == NpyType::U4)
      append_ids(batch.tokens);
    else
      append_ids(vector<u16>(batch.tokens.begin(), batch.tokens.end()));
    for (u64& end : batch.ends) end += num_tokens;
    record.append({reinterpret_cast<const char*>(batch.ends.data()), batch.ends.size() * 8});
    num_tokens += batch.tokens.size();
    num_documents += batch.ends.size();
  }

  void finish(NpyType type) {
    file->append(npy_header(NpyType::U8, {num_documents}));
    string block(1 << 20, '\0');
    for (i64 at = 0; at < num_documents * 8;) {
      const ssize_t got = pread(record.fd, block.data(), block.size(), at);
      need_io(got > 0, record.path, "cannot be read back");
      file->append({block.data(), size_t(got)});
      at += got;
    }
    file->complete(npy_header(type, {num_tokens}));
    record.clear();
    record.complete(unit.identity);
    make_folders(folder_of(unit.path));
    need_io(rename(unit.part.c_str(), unit.path.c_str()) == 0, unit.path, "cannot be renamed to");
    sync_folder(folder_of(unit.path));
  }

  // Batches not written yet.
  i64 load() const { return reading ? INT64_MAX : batches_read - batches_written; }

  const CorpusUnit& unit;
  BatchReader reader;
  bool reading = false, writing = false;
  std::map<i64, Batch> encoded;
  i64 batches_read = 0, batches_written = 0;
  LockedFile record;
  std::optional<LockedFile> file;
  i64 num_tokens = 0, num_documents = 0;
};

class CorpusRun {
 public:
  explicit CorpusRun(const CorpusOptions& options)
      : options_(options),
        units_(plan_corpus(options)),
        tokenizer_(Tokenizer::load(options.tokenizer)),
        threads_(options.threads ? int(options.threads)
                                 : max<int>(1, std::thread::hardware_concurrency())),
        progress_("tokenize", find_work() / 1e6, "MB of files") {
    auto eos = options.eos.empty() ? tokenizer_.eos_id() : tokenizer_.id_of(options.eos);
    const bool is_id = !options.eos.empty() && options.eos.size() < 10 &&
                       options.eos.find_first_not_of("0123456789") == string::npos;
    if (!eos && is_id && std::stoul(options.eos) < tokenizer_.vocab_size())
      eos = std::stoul(options.eos);
    if (!eos)
      bad_input("--eos",
                text("no such token (got %s, need a token of %s or an id < %u)",
                     options.eos.empty() ? "none" : options.eos.c_str(), options.tokenizer.c_str(),
                     tokenizer_.vocab_size()),
                "a token as the vocabulary writes it");
    eos_ = *eos;
    type_ = tokenizer_.vocab_size() < UINT16_MAX ? NpyType::U2 : NpyType::U4;
  }

  CorpusReport run() {
    open_folder();
    const double start_s = now_s();
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
    unlink(mark_.c_str());
    return report_;
  }

 private:
  using Lock = std::unique_lock<std::mutex>;

  i64 find_work() {
    i64 bytes = 0;
    for (size_t i = 0; i < units_.size(); i++) {
      if (is_finished(units_[i])) continue;
      to_do_.push_back(i);
      bytes += units_[i].bytes;
    }
    return bytes;
  }

  bool is_finished(const CorpusUnit& unit) {
    if (!fs::exists(unit.path)) return false;
    const char* why = unit.sources[0].path == "-" ? "and standard input cannot be resumed"
                      : !fs::exists(unit.record)  ? "but was not made by this command"
                      : read_text_file(unit.record) != unit.identity
                          ? "from other sources (names, sizes, times or --format differ)"
                          : nullptr;
    if (why)
      bad_input(unit.path, text("is there already, %s", why),
                "deleting it to make it again, or another --output");
    report_.files_done_before++;
    return true;
  }

  // Under a lock, because several processes may begin at once. Marks the folder as not whole.
  void open_folder() const {
    const string &folder = options_.output, path = folder + "/corpus.json";
    JsonWriter w;
    w.object().key("tokenizer_xxh3").value(tokenizer_.fingerprint());
    w.key("eos_id").value(eos_).key("key").value(options_.key);
    w.key("special_as_text").value(options_.special_as_text).end();
    make_folders(folder + "/.pith");
    const LockedFile lock(folder + "/.pith/.lock", LOCK_EX);
    if (fs::exists(path)) {
      const Json old = Json::parse_file(path), mine = Json::parse(w.str(), "this run");
      for (const string& key : mine.keys())
        if (old[key].dump() != mine[key].dump())
          bad_input(path,
                    text("the folder was made with another %s (got %s, need %s)", key.c_str(),
                         mine[key].dump().c_str(), old[key].dump().c_str()),
                    "another --output");
    } else {
      write_file_durably(folder + "/tokenizer.json", read_text_file(options_.tokenizer));
      write_file_durably(path, w.str() + "\n");
    }
    const LockedFile mark(mark_, LOCK_SH);
  }

  void work() {
    Lock lock(mutex_);
    try {
      EncodeScratch scratch;
      while (const std::shared_ptr<OpenUnit> unit = next_unit(lock)) {
        unit->reading = true;
        lock.unlock();
        Batch batch = unit->reader.read();
        lock.lock();
        unit->reading = false;
        const i64 turn = unit->batches_read++;
        if (batch.last) std::erase(open_, unit);
        changed_.notify_all();
        lock.unlock();
        find_documents(batch, options_.key);
        encode(batch, scratch);
        lock.lock();
        unit->encoded.emplace(turn, std::move(batch));
        write_encoded(lock, *unit);
        changed_.wait(lock, [&] { return error_ || turn < unit->batches_written + kAhead; });
      }
    } catch (...) {
      if (!lock.owns_lock()) lock.lock();
      if (!error_) error_ = std::current_exception();
    }
    changed_.notify_all();
  }

  // Null when nothing is left to read.
  std::shared_ptr<OpenUnit> next_unit(Lock& lock) {
    while (!error_ && !stop_requested() && !(to_do_.empty() && open_.empty())) {
      if (!to_do_.empty() && int(open_.size()) < threads_ && claim_next()) continue;
      const auto unit = std::ranges::min_element(open_, {}, &OpenUnit::load);
      if (unit != open_.end() && !(*unit)->reading) return *unit;
      changed_.wait_for(lock, std::chrono::milliseconds(100));
    }
    return nullptr;
  }

  // False when other processes hold all that are left.
  bool claim_next() {
    const size_t i = to_do_.front();
    to_do_.pop_front();
    make_folders(folder_of(units_[i].record));
    const auto unit = std::make_shared<OpenUnit>(units_[i]);
    if (!unit->record.held) {
      to_do_.push_back(i);
      return ++refused_ < to_do_.size();
    }
    refused_ = 0;
    if (is_finished(units_[i])) return true;
    unit->begin(type_);
    open_.push_back(unit);
    return true;
  }

  void encode(Batch& batch, EncodeScratch& scratch) const {
    const EncodeOptions options = {.parse_special = !options_.special_as_text};
    for (const string_view document : batch.documents) {
      tokenizer_.encode(document, batch.tokens, options, scratch);
      batch.tokens.push_back(eos_);
      batch.ends.push_back(batch.tokens.size());
    }
  }

  void write_encoded(Lock& lock, OpenUnit& unit) {
    if (std::exchange(unit.writing, true)) return;  // by a thread that goes on
    while (auto next = unit.encoded.extract(unit.batches_written)) write(lock, unit, next.mapped());
    unit.writing = false;
  }

  void write(Lock& lock, OpenUnit& unit, Batch& batch) {
    for (const auto& [place, what] : batch.bad) leave_out(place, what);
    lock.unlock();
    unit.append(batch, type_);
    const bool make = batch.last && unit.num_documents > 0;
    if (make) unit.finish(type_);
    lock.lock();
    if (batch.last && !make) leave_out(unit.unit.sources[0].path, "holds no document");
    unit.batches_written++;
    report_.files += make;
    report_.documents += batch.documents.size();
    report_.tokens += batch.tokens.size();
    for (const string_view document : batch.documents) report_.text_bytes += document.size();
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
  const vector<CorpusUnit> units_;
  const string mark_ = options_.output + "/.pith/.run";
  const Tokenizer tokenizer_;
  const int threads_;
  u32 eos_;
  NpyType type_;
  std::mutex mutex_;  // guards all below
  std::condition_variable changed_;
  std::deque<size_t> to_do_;
  size_t refused_ = 0;                      // claims in a row
  vector<std::shared_ptr<OpenUnit>> open_;  // not read to the end
  i64 bytes_done_ = 0;
  CorpusReport report_;
  std::exception_ptr error_;
  Progress progress_;
};
}

CorpusReport tokenize_corpus(const CorpusOptions& options) { return CorpusRun(options).run(); }

}
