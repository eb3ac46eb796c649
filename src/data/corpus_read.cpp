// corpus_read: plain, gzip and zstd files as batches of documents.
#include <fcntl.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "core/check.h"
#include "data/corpus_parts.h"

namespace pith {

Bytes::~Bytes() { free(data); }

void Bytes::reserve(size_t more) {
  const size_t need = size + more + kPadding;
  if (need <= capacity) return;
  const size_t grown = std::max(need, capacity + capacity / 2);
  char* moved = static_cast<char*>(realloc(data, grown));
  if (!moved) failed("corpus", text("no memory for a document of %zu bytes", need));
  data = moved;
  capacity = grown;
}

void Bytes::append(const char* from, size_t n) {
  reserve(n);
  if (n) memcpy(data + size, from, n);
  size += n;
}

struct SourceStream::State {
  string path;
  Packing packing;
  int fd = -1;
  int64_t stored = 0;
  bool ended = false;         // of the file
  bool inside = false;        // a gzip member or zstd frame that has begun and not ended
  string buffer;              // stored bytes
  size_t begin = 0, end = 0;  // of those not yet used
  z_stream gzip{};
  ZSTD_DStream* zstd = nullptr;

  explicit State(const CorpusSource& source) : path(source.path), packing(source.packing) {
    fd = path == "-" ? dup(0) : open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) bad_input(path, text("cannot be opened (%s)", strerror(errno)), "another file");
    posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL);
  }
  ~State() {
    if (gzip.state) inflateEnd(&gzip);
    ZSTD_freeDStream(zstd);
    close(fd);
  }
  size_t read_stored(char* to, size_t n) {
    ssize_t got;
    do got = ::read(fd, to, n);
    while (got < 0 && errno == EINTR);
    if (got < 0) failed(path, text("cannot be read (%s)", strerror(errno)));
    stored += got;
    ended = got == 0;
    return got;
  }
  void fill() {
    buffer.resize(256 << 10);
    begin = 0;
    end = read_stored(buffer.data(), buffer.size());
  }
  [[noreturn]] void damaged(const string& what) {
    bad_input(path, what, "downloading it again; gzip -t or zstd -t checks it");
  }
  // Standard input: the first bytes tell how it is packed. Neither magic is valid UTF-8.
  void detect() {
    fill();
    while (end < 4 && !ended) end += read_stored(buffer.data() + end, buffer.size() - end);
    const string_view head(buffer.data(), std::min<size_t>(end, 4));
    packing = head.starts_with("\x1f\x8b")              ? Packing::Gzip
              : head == string_view("\x28\xb5\x2f\xfd") ? Packing::Zstd
                                                        : Packing::None;
  }
  size_t read_plain(char* to, size_t n) {
    if (begin == end) return read_stored(to, n);
    n = std::min(n, end - begin);
    memcpy(to, buffer.data() + begin, n);
    begin += n;
    return n;
  }
  size_t read_gzip(char* to, size_t n) {
    if (!inside && (gzip.state ? inflateReset(&gzip) : inflateInit2(&gzip, 15 + 16)) != Z_OK)
      failed(path, "zlib cannot be initialised");
    inside = true;
    gzip.next_in = reinterpret_cast<Bytef*>(buffer.data() + begin);
    gzip.avail_in = end - begin;
    gzip.next_out = reinterpret_cast<Bytef*>(to);
    gzip.avail_out = std::min<size_t>(n, 1 << 30);
    const size_t room = gzip.avail_out;
    const int code = inflate(&gzip, Z_NO_FLUSH);
    begin = end - gzip.avail_in;
    if (code == Z_STREAM_END)
      inside = false;  // another member may follow
    else if (code != Z_OK && code != Z_BUF_ERROR)
      damaged(text("is not valid gzip data (%s)", gzip.msg ? gzip.msg : "damaged"));
    return room - gzip.avail_out;
  }
  size_t read_zstd(char* to, size_t n) {
    if (!zstd) {
      zstd = ZSTD_createDStream();
      ZSTD_DCtx_setParameter(zstd, ZSTD_d_windowLogMax, 31);  // as files made with --long=31
    }
    ZSTD_outBuffer out{to, n, 0};
    ZSTD_inBuffer in{buffer.data(), end, begin};
    const size_t code = ZSTD_decompressStream(zstd, &out, &in);
    if (ZSTD_isError(code)) damaged(text("is not valid zstd data (%s)", ZSTD_getErrorName(code)));
    begin = in.pos;
    inside = code != 0;
    return out.pos;
  }
};

SourceStream::SourceStream(const CorpusSource& source) : state_(new State(source)) {}
SourceStream::~SourceStream() = default;
int64_t SourceStream::stored_bytes() const { return state_->stored; }

size_t SourceStream::read(char* to, size_t n) {
  State& s = *state_;
  if (s.packing == Packing::ByContent) s.detect();
  if (s.packing == Packing::None) return s.read_plain(to, n);
  for (;;) {
    // A decoder may hold output back while it needs no more input, so it is asked first.
    if (s.inside || s.begin < s.end) {
      const size_t got = s.packing == Packing::Gzip ? s.read_gzip(to, n) : s.read_zstd(to, n);
      if (got) return got;
    }
    if (s.begin < s.end) continue;
    if (s.ended || (s.fill(), s.ended)) {
      if (s.inside || s.stored == 0)
        s.damaged("is truncated: its compressed data end in the middle");
      return 0;
    }
  }
}

void CorpusBatch::clear() {
  sequence = stored_bytes = lines = text_bytes = 0;
  raw.size = 0;
  lines_of = nullptr;
  first_lines = false;
  texts.clear(), tokens.clear(), ends.clear(), bad.clear();
}

bool BatchReader::read(CorpusBatch& batch) {
  batch.clear();
  while (next_ < sources_.size() && batch.raw.size == 0 && batch.texts.empty()) {
    if (sources_[next_].format == CorpusFormat::Jsonl)
      read_lines(batch);
    else
      read_text(batch);
  }
  if (batch.raw.capacity) memset(batch.raw.data + batch.raw.size, 0, Bytes::kPadding);
  return batch.raw.size > 0 || !batch.texts.empty();
}

// Whole files, until the batch is full or one in lines follows.
void BatchReader::read_text(CorpusBatch& batch) {
  while (next_ < sources_.size() && batch.raw.size < kBatchBytes &&
         sources_[next_].format != CorpusFormat::Jsonl) {
    const CorpusSource& source = sources_[next_++];
    SourceStream stream(source);
    const size_t begin = batch.raw.size;
    batch.raw.reserve(source.bytes + 1);
    for (size_t got = 1; got; batch.raw.size += got) {
      if (batch.raw.capacity - batch.raw.size <= Bytes::kPadding) batch.raw.reserve(64 << 10);
      got = stream.read(batch.raw.data + batch.raw.size,
                        batch.raw.capacity - batch.raw.size - Bytes::kPadding);
    }
    batch.texts.push_back({&source, begin, batch.raw.size - begin});
    batch.stored_bytes += stream.stored_bytes();
  }
}

// Whole lines of one source: at least one, at most what a batch holds.
void BatchReader::read_lines(CorpusBatch& batch) {
  const CorpusSource& source = sources_[next_];
  batch.lines_of = &source;
  batch.first_lines = !stream_;
  if (!stream_) stream_ = std::make_unique<SourceStream>(source);
  const int64_t stored_before = stream_->stored_bytes();
  Bytes& raw = batch.raw;
  raw.append(carry_.data, carry_.size);
  carry_.size = 0;
  for (size_t searched = raw.size;;) {
    const size_t want = raw.size < kBatchBytes ? kBatchBytes - raw.size : kBatchBytes;
    raw.reserve(want);
    const size_t got = stream_->read(raw.data + raw.size, want);
    raw.size += got;
    if (!got) {
      batch.stored_bytes += stream_->stored_bytes() - stored_before;
      stream_.reset();
      next_++;
      return;
    }
    if (raw.size < kBatchBytes) continue;
    const void* newline = memrchr(raw.data + searched, '\n', raw.size - searched);
    if (newline) {
      const size_t keep = static_cast<const char*>(newline) + 1 - raw.data;
      carry_.append(raw.data + keep, raw.size - keep);
      raw.size = keep;
      break;
    }
    searched = raw.size;
  }
  batch.stored_bytes += stream_->stored_bytes() - stored_before;
}

}  // namespace pith
