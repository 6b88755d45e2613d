#include "control/image/image_command.hpp"

#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>

#include "storage/block/host_file.hpp"
#include "storage/block/raw.hpp"
#include "storage/image/open.hpp"

namespace ring3::control {
namespace {

using namespace storage;
using nlohmann::json;
using qcow2::Qcow2Image;

int say_error(const std::string& message) {
  std::fprintf(stderr, "ring3: %s\n", message.c_str());
  return 2;
}

std::string human(u64 bytes) {
  static constexpr const char* kUnits[] = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  double v = static_cast<double>(bytes);
  int unit = 0;
  while (v >= 1024 && unit < 6) v /= 1024, unit++;
  char text[40];
  std::snprintf(text, sizeof text, unit == 0 || v == static_cast<double>(static_cast<u64>(v)) ? "%.0f %s" : "%.2f %s", v, kUnits[unit]);
  return text;
}

/// A bar on standard error while it is a terminal, redrawn at each whole percent.
class Progress {
 public:
  Progress(std::string what, u64 total) : what_(std::move(what)), total_(total), shown_(isatty(STDERR_FILENO) == 1 && total > 0) {}
  ~Progress() {
    if (shown_ && last_ >= 0) std::fputs("\r\x1b[K", stderr);
  }
  void at(u64 done) {
    if (!shown_) return;
    const int percent = static_cast<int>(done * 100.0 / static_cast<double>(total_));
    if (percent == last_) return;
    last_ = percent;
    const std::string bar(static_cast<std::size_t>(percent) * 40 / 100, '#');
    std::fprintf(stderr, "\r%s [%-40s] %3d%% of %s", what_.c_str(), bar.c_str(), percent, human(total_).c_str());
  }

 private:
  std::string what_;
  u64 total_;
  bool shown_;
  int last_ = -1;
};

Result<u64> size_of(const std::string& text) {
  char* end = nullptr;
  errno = 0;
  const bool digit = !text.empty() && text[0] >= '0' && text[0] <= '9';
  const u64 n = std::strtoull(text.c_str(), &end, 10);
  int shift = 0;
  const std::string unit = end == nullptr ? "" : end;
  static const char* kLetters = "KMGTPE";
  if (!unit.empty()) {
    const char* p = std::strchr(kLetters, std::toupper(static_cast<unsigned char>(unit[0])));
    const std::string rest = unit.substr(1);
    if (p != nullptr && (rest.empty() || rest == "B" || rest == "iB")) shift = 10 * static_cast<int>(p - kLetters + 1);
    else shift = -1;
  }
  if (!digit || errno != 0 || shift < 0 || (shift > 0 && n >> (63 - shift) != 0)) {
    return Error::of(EINVAL, "'" + text.substr(0, 40) + "' is no size; say 512M or 20G");
  }
  return n << shift;
}

struct Wanted {
  std::string path, other, format, out_format, size, backing, backing_format, name, snapshot;
  std::vector<std::string> options;
  bool json = false, compress = false, shrink = false, no_backing = false, list = false, chain = false;
  std::string repair, create, apply, erase;
};

struct FormatOptions {
  qcow2::CreateOptions create;
  Qcow2Image::Preallocation preallocation = Qcow2Image::Preallocation::kOff;
};

Status on_off(const std::string& key, const std::string& value, bool& to) {
  if (value != "on" && value != "off") return Error::of(EINVAL, "-o " + key + " is on or off");
  to = value == "on";
  return Ok{};
}

Status format_option(const std::string& key, const std::string& value, FormatOptions& o, bool raw) {
  using P = Qcow2Image::Preallocation;
  if (key == "preallocation") {
    if (value == "off") o.preallocation = P::kOff;
    else if (value == "metadata" && !raw) o.preallocation = P::kMetadata;
    else if (value == "falloc") o.preallocation = P::kFalloc;
    else if (value == "full") o.preallocation = P::kFull;
    else return Error::of(EINVAL, raw ? "-o preallocation is off, falloc or full" : "-o preallocation is off, metadata, falloc or full");
    return Ok{};
  }
  if (raw) return Error::of(EINVAL, "raw images have no option '" + key + "' (there is preallocation)");
  if (key == "cluster_size" || key == "refcount_bits") {
    auto n = size_of(value);
    if (!n) return Error::of(EINVAL, "-o " + key + ": " + n.error().message);
    if (*n == 0 || (*n & (*n - 1)) != 0) return Error::of(EINVAL, "-o " + key + " is a power of two");
    (key == "cluster_size" ? o.create.cluster_bits : o.create.refcount_order) = static_cast<u32>(__builtin_ctzll(*n));
    return Ok{};
  }
  if (key == "compat") {
    if (value == "0.10" || value == "v2") o.create.version = 2;
    else if (value == "1.1" || value == "v3") o.create.version = 3;
    else return Error::of(EINVAL, "-o compat is 1.1 or 0.10");
    return Ok{};
  }
  if (key == "lazy_refcounts") return on_off(key, value, o.create.lazy_refcounts);
  if (key == "extended_l2") return on_off(key, value, o.create.extended_l2);
  if (key == "compression_type") {
    if (value != "zlib" && value != "zstd") return Error::of(EINVAL, "-o compression_type is zlib or zstd");
    o.create.zstd = value == "zstd";
    return Ok{};
  }
  return Error::of(EINVAL, "there is no option '" + key + "'; there are cluster_size, preallocation, compat, lazy_refcounts, refcount_bits, extended_l2 and compression_type");
}

Result<FormatOptions> parse_options(const std::vector<std::string>& list, bool raw) {
  FormatOptions o;
  for (const std::string& text : list) {
    for (std::size_t at = 0; at <= text.size();) {
      const auto comma = std::min(text.find(',', at), text.size());
      const std::string pair = text.substr(at, comma - at);
      at = comma + 1;
      const auto equals = pair.find('=');
      if (equals == std::string::npos) return Error::of(EINVAL, "-o wants KEY=VALUE, not '" + pair + "'");
      if (auto r = format_option(pair.substr(0, equals), pair.substr(equals + 1), o, raw); !r) return r.error();
    }
  }
  return o;
}

Result<std::optional<Format>> format_given(const std::string& text) {
  if (text.empty()) return std::optional<Format>();
  auto f = parse_format(text);
  if (!f) return f.error();
  return std::optional<Format>(*f);
}

/// What to do about an error, behind its message.
const char* advice(int code) { return code == ENOSPC || code == EDQUOT ? "; free some room on the host and try again" : ""; }

/// Makes an empty image of that size and opens it for writing.
Result<std::unique_ptr<Image>> make_image(const std::string& path, Format format, u64 size, FormatOptions o) {
  HostFile::Options host;
  host.writable = host.create = true;
  auto file = HostFile::open(path, host);
  if (!file) return file.error();
  if (format == Format::kRaw) {
    if (const int r = (*file)->truncate(size); r < 0) return Error::from_errno("'" + path + "'", -r);
    if (o.preallocation != Qcow2Image::Preallocation::kOff) {
      if (const int r = (*file)->reserve(0, size); r < 0) return Error::of(-r, "reserving space for '" + path + "': " + std::strerror(-r) + advice(-r));
    }
    return std::unique_ptr<Image>(std::make_unique<RawImage>(std::move(*file), size, true));
  }
  o.create.size = size;
  if (auto r = Qcow2Image::create(**file, o.create); !r) {
    return Error::of(r.error().code, "'" + path + "': " + r.error().message + advice(r.error().code));
  }
  auto image = Qcow2Image::open(std::move(*file), "'" + path + "'", {true, false});
  if (!image) return image.error();
  if (o.preallocation != Qcow2Image::Preallocation::kOff) {
    Progress bar("allocating", size);
    if (const int r = (*image)->preallocate(o.preallocation, 0, size, [&](u64 n) { bar.at(n); }); r < 0) {
      return Error::of(-r, "reserving space for '" + path + "': " + std::strerror(-r) + advice(-r));
    }
  }
  return std::unique_ptr<Image>(std::move(*image));
}

json describe(const std::string& path, Format format, Status& status) {
  json out;
  HostFile::Options host;
  auto file = HostFile::open(path, host);
  if (!file) {
    status = file.error();
    return out;
  }
  const u64 allocated = (*file)->allocated();
  out["filename"] = path;
  out["actual-size"] = allocated;
  if (format == Format::kRaw) {
    const i64 size = (*file)->size();
    out["format"] = "raw";
    out["virtual-size"] = size < 0 ? 0 : size;
    return out;
  }
  auto image = Qcow2Image::open(std::move(*file), "'" + path + "'", {false, true});
  if (!image) {
    status = image.error();
    return out;
  }
  const qcow2::Header& h = (*image)->header();
  out["format"] = "qcow2";
  out["virtual-size"] = h.size;
  out["cluster-size"] = h.cluster_size();
  out["dirty-flag"] = (h.incompatible & qcow2::kDirty) != 0;
  if (!h.backing_file.empty()) {
    out["backing-filename"] = h.backing_file;
    out["full-backing-filename"] = resolve_backing(path, h.backing_file);
    if (!h.backing_format.empty()) out["backing-filename-format"] = h.backing_format;
  }
  json data;
  data["compat"] = h.version == 2 ? "0.10" : "1.1";
  data["compression-type"] = h.compression == 1 ? "zstd" : "zlib";
  if (h.version >= 3) {
    data["lazy-refcounts"] = (h.compatible & qcow2::kLazyRefcounts) != 0;
    data["refcount-bits"] = 1u << h.refcount_order;
    data["corrupt"] = (h.incompatible & qcow2::kCorrupt) != 0;
    data["extended-l2"] = h.extended_l2();
  }
  out["format-specific"] = {{"type", "qcow2"}, {"data", data}};
  auto list = (*image)->snapshots();
  if (!list) {
    status = list.error();
    return out;
  }
  for (const auto& s : *list) {
    out["snapshots"].push_back({{"id", s.id}, {"name", s.name}, {"vm-state-size", s.vm_state_size},
                                {"date-sec", s.seconds}, {"date-nsec", s.nanoseconds}, {"disk-size", s.disk_size}});
  }
  return out;
}

std::string pretty(const json& value) { return value.dump(4, ' ', true, json::error_handler_t::replace); }

/// What a verb that made or changed an image, and closed it, ends with: with --json, the image as `info --json` shows it.
int done(const Wanted& w, const std::string& path, Format format) {
  if (!w.json) return 0;
  Status status = Ok{};
  const json image = describe(path, format, status);
  if (!status) return say_error(status.error().message);
  std::printf("%s\n", pretty(image).c_str());
  return 0;
}

int create(const Wanted& w) {
  auto given = format_given(w.format);
  if (!given) return say_error(given.error().message);
  const Format format = given->value_or(format_of_name(w.path));
  auto o = parse_options(w.options, format == Format::kRaw);
  if (!o) return say_error(o.error().message);
  u64 size = 0;
  if (!w.backing.empty()) {
    if (format == Format::kRaw) return say_error("raw images have no backing file; use qcow2");
    if (!qcow2::plain_path(w.backing)) return say_error("--backing wants a plain local file");
    if (w.backing_format.empty()) return say_error("say what the backing file is: --backing-format raw or qcow2");
    auto f = parse_format(w.backing_format);
    if (!f) return say_error(f.error().message);
    o->create.backing_file = w.backing;
    o->create.backing_format = w.backing_format;
    OpenOptions below;
    below.format = *f;
    auto image = open_image(resolve_backing(w.path, w.backing), below);
    if (!image) return say_error("backing file: " + image.error().message);
    size = (*image)->size();
  } else if (w.size.empty()) {
    return say_error("say how large the disk is: ring3 image create " + w.path + " 20G");
  }
  if (!w.size.empty()) {
    auto n = size_of(w.size);
    if (!n) return say_error(n.error().message);
    size = *n;
  }
  if (size % 512 != 0) return say_error("a disk's size is a multiple of 512 bytes");
  auto image = make_image(w.path, format, size, *o);
  if (!image) return say_error(image.error().message);
  if (const int r = (*image)->close(); r < 0) return say_error("'" + w.path + "': " + std::strerror(-r));
  image->reset();
  return done(w, w.path, format);
}

std::string safe(const json& value) { return value.dump(-1, ' ', true, json::error_handler_t::replace); }

int info(const Wanted& w) {
  auto given = format_given(w.format);
  if (!given) return say_error(given.error().message);
  std::string path = w.path;
  Format format = given->value_or(format_of_name(path));
  json all = json::array();
  for (int depth = 0; depth < 65; depth++) {
    Status status = Ok{};
    json one = describe(path, format, status);
    if (!status) return say_error(status.error().message);
    all.push_back(one);
    if (!w.chain || !one.contains("full-backing-filename")) break;
    path = one["full-backing-filename"];
    auto f = one.contains("backing-filename-format") ? parse_format(one["backing-filename-format"]) : Result<Format>(format_of_name(path));
    if (!f) return say_error(f.error().message);
    format = *f;
    if (depth == 64) return say_error("more than 64 backing files");
  }
  if (w.json) {
    std::printf("%s\n", pretty(w.chain ? all : all[0]).c_str());
    return 0;
  }
  for (const json& one : all) {
    std::printf("image:          %s\nformat:         %s\ndisk size:      %s (%llu bytes)\non the host:    %s\n",
                safe(one["filename"]).c_str(), one["format"].get<std::string>().c_str(), human(one["virtual-size"]).c_str(),
                static_cast<unsigned long long>(one["virtual-size"].get<u64>()), human(one["actual-size"]).c_str());
    if (one.contains("cluster-size")) std::printf("cluster size:   %s\n", human(one["cluster-size"]).c_str());
    if (one.contains("backing-filename")) std::printf("backing file:   %s\n", safe(one["backing-filename"]).c_str());
    if (one.contains("format-specific")) std::printf("details:        %s\n", safe(one["format-specific"]["data"]).c_str());
    if (one.contains("snapshots")) {
      for (const json& s : one["snapshots"]) {
        std::printf("snapshot:       %s %s (%s)\n", safe(s["id"]).c_str(), safe(s["name"]).c_str(), human(s["disk-size"]).c_str());
      }
    }
  }
  return 0;
}

bool all_zero(std::span<const u8> b) { return b.empty() || (b[0] == 0 && std::memcmp(b.data(), b.data() + 1, b.size() - 1) == 0); }

int copy(Image& from, Image& to, bool compress, Progress& bar) {
  auto* packed = compress ? dynamic_cast<Qcow2Image*>(&to) : nullptr;
  const u64 unit = packed != nullptr ? to.cluster_size() : u64{1} << 20;
  std::vector<u8> buffer(unit);
  for (u64 at = 0; at < from.size();) {
    Image::Extent e;
    const u64 left = from.size() - at;
    if (const int r = from.map(at, left, e); r < 0) return r;
    if ((e.kind == Image::Kind::kAbsent || e.kind == Image::Kind::kZero) && (e.length == left || e.length >= unit)) {
      at += packed != nullptr && e.length != left ? e.length / unit * unit : e.length;
      bar.at(at);
      continue;
    }
    const u64 n = std::min(left, unit);
    if (n < unit && packed != nullptr) std::fill(buffer.begin(), buffer.end(), u8{0});
    if (const int r = from.read(at, std::span(buffer).first(n)); r < 0) return r;
    if (packed != nullptr) {
      if (!all_zero(buffer)) {
        const int r = n == unit ? packed->write_compressed(at, buffer) : to.write(at, std::span<const u8>(buffer).first(n));
        if (r < 0) return r;
      }
    } else {
      // Runs of zeroes are left out, 64 KiB at a time.
      for (u64 i = 0; i < n; i += 65536) {
        const auto piece = std::span<const u8>(buffer).subspan(i, std::min<u64>(65536, n - i));
        if (all_zero(piece)) continue;
        if (const int r = to.write(at + i, piece); r < 0) return r;
      }
    }
    at += n;
    bar.at(at);
  }
  return to.close();
}

int convert(const Wanted& w) {
  auto in = format_given(w.format);
  auto out = format_given(w.out_format);
  if (!in) return say_error(in.error().message);
  if (!out) return say_error(out.error().message);
  OpenOptions o;
  o.format = *in;
  o.backing = !w.no_backing;
  auto from = open_image(w.path, o);
  if (!from) return say_error(from.error().message);
  if (!w.snapshot.empty()) {
    auto* q = dynamic_cast<Qcow2Image*>(from->get());
    if (q == nullptr) return say_error("raw images have no snapshots");
    if (auto r = q->show_snapshot(w.snapshot); !r) return say_error(r.error().message);
  }
  const Format format = out->value_or(format_of_name(w.other));
  if (w.compress && format == Format::kRaw) return say_error("raw images are not compressed; add --to qcow2");
  auto options = parse_options(w.options, format == Format::kRaw);
  if (!options) return say_error(options.error().message);
  auto to = make_image(w.other, format, ((*from)->size() + 511) & ~u64{511}, *options);
  if (!to) return say_error(to.error().message);
  Progress bar("converting", (*from)->size());
  if (const int r = copy(**from, **to, w.compress, bar); r < 0) {
    return say_error("converting '" + w.path + "' to '" + w.other + "': " + std::strerror(-r) + "; the new image is not complete" + advice(-r));
  }
  to->reset();
  return done(w, w.other, format);
}

int check(const Wanted& w) {
  using qcow2::Repair;
  Repair repair = Repair::kNone;
  if (w.repair == "leaks") repair = Repair::kLeaks;
  else if (w.repair == "all") repair = Repair::kAll;
  else if (!w.repair.empty()) return say_error("--repair is all or leaks");
  auto image = open_qcow2_alone(w.path, repair != Repair::kNone, true);
  if (!image) return say_error(image.error().message);
  auto report = [&] {
    Progress bar("checking", (*image)->size());
    return (*image)->check(repair, [&bar](u64 done) { bar.at(done); });
  }();
  if (!report) return say_error(report.error().message);
  if (w.json) {
    const json out = {{"filename", w.path}, {"format", "qcow2"}, {"corruptions", report->corruptions_left()},
                      {"leaks", report->leaks_left()}, {"corruptions-fixed", report->corruptions_fixed},
                      {"leaks-fixed", report->leaks_fixed}, {"image-end-offset", report->image_end},
                      {"total-clusters", report->total_clusters}, {"allocated-clusters", report->allocated_clusters},
                      {"compressed-clusters", report->compressed_clusters}, {"fragmented-clusters", report->fragmented_clusters},
                      {"check-errors", 0}, {"messages", report->messages}};
    std::printf("%s\n", pretty(out).c_str());
  } else {
    for (const auto& m : report->messages) std::printf("%s\n", m.c_str());
    if (report->corruptions_fixed + report->leaks_fixed != 0) {
      std::printf("repaired: %llu errors, %llu leaks\n", static_cast<unsigned long long>(report->corruptions_fixed),
                  static_cast<unsigned long long>(report->leaks_fixed));
    }
    if (report->corruptions_left() + report->leaks_left() == 0) std::printf("no errors\n");
    else std::printf("%llu errors, %llu leaked clusters%s\n", static_cast<unsigned long long>(report->corruptions_left()),
                     static_cast<unsigned long long>(report->leaks_left()),
                     repair == Repair::kNone ? " (repair with: ring3 image check --repair all)" : "");
  }
  return report->corruptions_left() != 0 ? 4 : report->leaks_left() != 0 ? 3 : 0;
}

int resize(const Wanted& w) {
  auto given = format_given(w.format);
  if (!given) return say_error(given.error().message);
  const char sign = w.size.empty() ? ' ' : w.size[0];
  auto n = size_of(sign == '+' || sign == '-' ? w.size.substr(1) : w.size);
  if (!n) return say_error(n.error().message);
  OpenOptions o;
  o.format = *given;
  o.writable = true;
  auto image = open_image(w.path, o);
  if (!image) return say_error(image.error().message);
  const u64 now = (*image)->size();
  if (sign == '-' && *n > now) return say_error("the disk is smaller than that: " + human(now));
  const u64 size = sign == '+' ? now + *n : sign == '-' ? now - *n : *n;
  if (size % 512 != 0) return say_error("a disk's size is a multiple of 512 bytes");
  if (size < now && !w.shrink) return say_error("this makes the disk smaller and loses what stands at its end; add --shrink if that is meant");
  if (auto* q = dynamic_cast<Qcow2Image*>(image->get())) {
    std::optional<Progress> bar;
    const auto progress = [&](u64 finished, u64 total) {
      if (!bar) bar.emplace("resizing", total);
      bar->at(finished);
    };
    if (auto r = q->resize(size, progress); !r) return say_error(r.error().message);
  } else if (auto* raw = dynamic_cast<RawImage*>(image->get())) {
    if (const int r = raw->file().truncate(size); r < 0) return say_error("'" + w.path + "': " + std::strerror(-r));
  }
  const int r = (*image)->close();
  image->reset();
  return r < 0 ? say_error("'" + w.path + "': " + std::strerror(-r)) : done(w, w.path, given->value_or(format_of_name(w.path)));
}

int snapshot(const Wanted& w) {
  const int actions = !w.create.empty() + !w.apply.empty() + !w.erase.empty() + w.list;
  if (actions > 1) return say_error("one of --list, --create, --apply and --delete at a time");
  OpenOptions o;
  o.format = Format::kQcow2;
  o.writable = actions == 1 && !w.list;
  auto image = open_image(w.path, o);
  if (!image) return say_error(image.error().message);
  auto& q = dynamic_cast<Qcow2Image&>(**image);
  if (!o.writable) {
    auto list = q.snapshots();
    if (!list) return say_error(list.error().message);
    json out = json::array();
    for (const auto& s : *list) {
      out.push_back({{"id", s.id}, {"name", s.name}, {"date-sec", s.seconds}, {"disk-size", s.disk_size}, {"vm-state-size", s.vm_state_size}});
      if (!w.json) std::printf("%s\t%s\t%s\n", safe(s.id).c_str(), safe(s.name).c_str(), human(s.disk_size).c_str());
    }
    if (w.json) std::printf("%s\n", pretty(out).c_str());
    return 0;
  }
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  Status r = Ok{};
  if (!w.create.empty()) r = q.create_snapshot(w.create, static_cast<u64>(now.tv_sec), static_cast<u32>(now.tv_nsec));
  else if (!w.apply.empty()) r = q.apply_snapshot(w.apply);
  else r = q.delete_snapshot(w.erase);
  if (!r) return say_error(r.error().message);
  const int closed = q.close();
  return closed < 0 ? say_error("'" + w.path + "': " + std::strerror(-closed)) : 0;
}

int map(const Wanted& w) {
  auto given = format_given(w.format);
  if (!given) return say_error(given.error().message);
  OpenOptions o;
  o.format = *given;
  auto image = open_image(w.path, o);
  if (!image) return say_error(image.error().message);
  json out = json::array();
  for (u64 at = 0; at < (*image)->size();) {
    Image::Extent e;
    if (const int r = (*image)->map(at, (*image)->size() - at, e); r < 0) return say_error("'" + w.path + "': " + std::strerror(-r));
    const bool data = e.kind == Image::Kind::kData || e.kind == Image::Kind::kCompressed;
    json one = {{"start", at}, {"length", e.length}, {"depth", e.depth}, {"present", e.kind != Image::Kind::kAbsent},
                {"zero", !data}, {"data", data}, {"compressed", e.kind == Image::Kind::kCompressed}};
    if (e.has_offset && data) one["offset"] = e.host_offset;
    json* last = out.empty() ? nullptr : &out.back();
    bool joined = last != nullptr;
    for (const char* key : {"depth", "present", "zero", "data", "compressed"}) joined = joined && (*last)[key] == one[key];
    if (joined && last->contains("offset") != one.contains("offset")) joined = false;
    if (joined && one.contains("offset")) joined = (*last)["offset"].get<u64>() + (*last)["length"].get<u64>() == e.host_offset;
    if (joined) (*last)["length"] = (*last)["length"].get<u64>() + e.length;
    else out.push_back(one);
    at += e.length;
  }
  if (w.json) {
    std::printf("%s\n", out.dump(1).c_str());
    return 0;
  }
  std::printf("%-18s %-18s %-6s %s\n", "start", "length", "depth", "what");
  for (const json& e : out) {
    std::printf("%#-18llx %#-18llx %-6u %s\n", static_cast<unsigned long long>(e["start"].get<u64>()),
                static_cast<unsigned long long>(e["length"].get<u64>()), e["depth"].get<u32>(),
                e["compressed"].get<bool>() ? "compressed" : e["data"].get<bool>() ? "data" : e["present"].get<bool>() ? "zeroes" : "nothing");
  }
  return 0;
}

}  // namespace

int image_command(const std::vector<std::string>& arguments) {
  CLI::App app{"Makes, inspects, converts and repairs disk images (raw, qcow2).", "ring3 image"};
  app.set_help_flag("-h,--help", "show this help");
  app.require_subcommand(1);
  app.footer("Examples:\n"
             "  ring3 image create disk.qcow2 20G\n"
             "  ring3 image create -b base.raw -F raw overlay.qcow2\n"
             "  ring3 image convert -c disk.raw disk.qcow2\n"
             "  ring3 image check --repair all disk.qcow2\n"
             "  ring3 image snapshot --create before-upgrade disk.qcow2\n"
             "  ring3 image info --json disk.qcow2 | jq .\"virtual-size\"\n"
             "A format is never guessed from an image's content: it is what --format says, or the name's extension.");
  Wanted w;
  struct Verb {
    CLI::App* app;
    int (*run)(const Wanted&);
  };
  const auto verb = [&](const char* name, const char* what) {
    CLI::App* v = app.add_subcommand(name, what);
    v->set_help_flag("-h,--help", "show this help");
    return v;
  };
  CLI::App* c = verb("create", "make an empty image");
  c->add_option("-f,--format", w.format, "raw or qcow2 [by the name]");
  c->add_option("-o,--option", w.options, "KEY=VALUE[,...]: cluster_size, preallocation, compat, ...")->allow_extra_args(false);
  c->add_option("-b,--backing", w.backing, "what the disk holds at first: an image that is only read");
  c->add_option("-F,--backing-format", w.backing_format, "its format");
  c->add_flag("--json", w.json, "print what the image is, for programs");
  c->add_option("FILE", w.path)->required();
  c->add_option("SIZE", w.size, "512M, 20G");
  CLI::App* i = verb("info", "what an image is");
  i->add_option("-f,--format", w.format, "raw or qcow2 [by the name]");
  i->add_flag("--json", w.json, "for programs");
  i->add_flag("--backing-chain", w.chain, "the files below it too");
  i->add_option("FILE", w.path)->required();
  CLI::App* v = verb("convert", "copy an image, in another format or more compact");
  v->add_option("-f,--format", w.format, "format of FILE [by the name]");
  v->add_option("-O,--to", w.out_format, "format of OUTPUT [by the name]");
  v->add_option("-o,--option", w.options, "as for create")->allow_extra_args(false);
  v->add_option("-l,--snapshot", w.snapshot, "copy this snapshot");
  v->add_flag("-c,--compress", w.compress, "compress each cluster");
  v->add_flag("--no-backing", w.no_backing, "refuse an image that names a backing file");
  v->add_flag("--json", w.json, "print what the image is, for programs");
  v->add_option("FILE", w.path)->required();
  v->add_option("OUTPUT", w.other)->required();
  CLI::App* k = verb("check", "look for errors in a qcow2 image (status 3: leaks, 4: corrupt)");
  k->add_option("-r,--repair", w.repair, "all or leaks")->expected(0, 1)->default_str("all");
  k->add_flag("--json", w.json, "for programs");
  k->add_option("FILE", w.path)->required();
  CLI::App* z = verb("resize", "change a disk's size");
  z->add_option("-f,--format", w.format, "raw or qcow2 [by the name]");
  z->add_flag("--shrink", w.shrink, "allow a smaller size");
  z->add_flag("--json", w.json, "print what the image is, for programs");
  z->add_option("FILE", w.path)->required();
  z->add_option("SIZE", w.size, "30G, +10G, -5G")->required();
  CLI::App* s = verb("snapshot", "the snapshots in a qcow2 image");
  s->add_flag("-l,--list", w.list, "list them");
  s->add_flag("--json", w.json, "for programs");
  s->add_option("-c,--create", w.create, "keep the present state under this NAME");
  s->add_option("-a,--apply", w.apply, "go back to it");
  s->add_option("-d,--delete", w.erase, "forget it");
  s->add_option("FILE", w.path)->required();
  CLI::App* m = verb("map", "where the disk's bytes stand");
  m->add_option("-f,--format", w.format, "raw or qcow2 [by the name]");
  m->add_flag("--json", w.json, "for programs");
  m->add_option("FILE", w.path)->required();
  const Verb verbs[] = {{c, create}, {i, info}, {v, convert}, {k, check}, {z, resize}, {s, snapshot}, {m, map}};

  std::vector<std::string> words(arguments.rbegin(), arguments.rend());
  // "-5G" is a size here, no option.
  try {
    if (arguments.empty()) throw CLI::CallForHelp();
    app.parse(words);
  } catch (const CLI::CallForHelp&) {
    for (const Verb& x : verbs) {
      if (x.app->parsed()) return std::fputs(x.app->help("ring3 image").c_str(), stdout) < 0 ? 2 : 0;
    }
    return std::fputs(app.help().c_str(), stdout) < 0 ? 2 : 0;
  } catch (const CLI::ParseError& e) {
    std::string text = e.what();
    std::replace(text.begin(), text.end(), '\n', ' ');
    return say_error(text + "; see ring3 image --help");
  }
  for (const Verb& x : verbs) {
    if (!x.app->parsed()) continue;
    const int r = x.run(w);
    return std::fflush(stdout) != 0 ? say_error("cannot write to standard output") : r;
  }
  return say_error("see ring3 image --help");
}

}  // namespace ring3::control
