#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>

#include "base/log.hpp"
#include "base/split_mix.hpp"
#include "engine/decode/decoder.hpp"
#include "engine/translate/kept_code.hpp"

/// The file of kept code: opening, reading, replacing.
namespace ring3::engine {
namespace {

constexpr std::size_t kPiece = 256u << 10;  ///< read at once

/// What is wrong with using or replacing this file, or null.
const char* not_ours(const struct stat& st) {
  if (!S_ISREG(st.st_mode)) return "it is no regular file";
  if (st.st_uid != ::geteuid()) return "it belongs to another user";
  if ((st.st_mode & 022) != 0) return "others may write it";
  return nullptr;
}

bool write_all(int fd, std::span<const u8> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    bytes = bytes.subspan(static_cast<std::size_t>(n));
  }
  return true;
}

/// Of all that the module of this function maps without the right to write: code, tables, its build id.
/// (ASan's: it reads what lies between the constants too.)
__attribute__((no_sanitize("address"))) int hash_module(dl_phdr_info* info, std::size_t, void* data) {
  u64* hash = static_cast<u64*>(data);
  const u64 here = reinterpret_cast<u64>(&hash_module);
  bool ours = false;
  for (unsigned n = 0; n < info->dlpi_phnum; n++) {
    const auto& p = info->dlpi_phdr[n];
    const u64 start = info->dlpi_addr + p.p_vaddr;
    ours |= p.p_type == PT_LOAD && here >= start && here < start + p.p_memsz;
  }
  if (!ours) return 0;
  for (unsigned n = 0; n < info->dlpi_phnum; n++) {
    const auto& p = info->dlpi_phdr[n];
    if (p.p_type != PT_LOAD || (p.p_flags & PF_W) != 0 || (p.p_flags & PF_R) == 0) continue;
    // SAFETY: the loader has mapped these bytes readable, for as long as this code is there.
    using Word [[gnu::may_alias]] = u64;
    const u64 start = (info->dlpi_addr + p.p_vaddr + 7) & ~u64{7}, end = info->dlpi_addr + p.p_vaddr + p.p_filesz;
    u64 h = p.p_filesz;
    for (u64 at = start; at + 8 <= end; at += 8) {
      h = (h ^ *reinterpret_cast<const Word*>(at)) * 0x9e3779b97f4a7c15;
      h ^= h >> 32;
    }
    *hash = SplitMix64::mix(*hash ^ h);
  }
  return 1;
}

}  // namespace

u64 KeptCode::build_identity() {
  u64 hash = decoder_version();
  ::dl_iterate_phdr(hash_module, &hash);
  return hash;
}

Result<std::shared_ptr<KeptCode>> KeptCode::create(const std::string& path) {
  std::string refused;
  if (path.empty()) return parse({}, 0, &refused);
  const std::size_t slash = path.rfind('/');
  const std::string directory = slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
  const std::string name = slash == std::string::npos ? path : path.substr(slash + 1);
  if (name.empty() || name == "." || name == "..") return Error::of(EINVAL, "code-cache: " + path + " names no file");
  UniqueFd in(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!in) return Error::from_errno("code-cache: cannot open " + directory);
  RawBytes bytes;
  FileSum sum;
  const u64 build = build_identity();
  UniqueFd fd(::openat(in.get(), name.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  const bool there = static_cast<bool>(fd);
  if (!there && errno == ELOOP) return Error::of(EPERM, "code-cache: " + path + " is a symbolic link: name the file itself");
  if (!there && errno != ENOENT) return Error::from_errno("code-cache: cannot open " + path);
  if (there) {
    struct stat st;
    if (::fstat(fd.get(), &st) != 0) return Error::from_errno("code-cache: " + path);
    if (const char* why = not_ours(st)) return Error::of(EPERM, "code-cache: " + path + " is not used: " + why);
    const u64 size = std::min<u64>(static_cast<u64>(st.st_size), kMaxBytes + 1);
    bytes.resize(size);
    std::size_t got = 0;
    while (got < size) {
      const ssize_t n = ::read(fd.get(), bytes.data() + got, std::min<std::size_t>(size - got, kPiece));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) break;
      got += static_cast<std::size_t>(n);
      if (got > FileSum::kHeader) sum.add(std::span<const u8>(bytes).first(got).subspan(FileSum::kHeader));
    }
    bytes.resize(got);
  }
  std::shared_ptr<KeptCode> k = parse(std::move(bytes), build, &refused, sum);
  if (there && !refused.empty()) log::warn("code-cache: {} is begun anew: {}", path, refused);
  k->path_ = path;
  k->name_ = name;
  k->directory_ = std::move(in);
  return k;
}

void KeptCode::save() {
  if (name_.empty()) return;
  // A run seldom finds nothing new: for a fiftieth the file is not written again.
  if (fresh_.bytes.empty() || fresh_.bytes.size() * 50 < kept_.bytes.size()) return;
  struct stat st;
  if (::fstatat(directory_.get(), name_.c_str(), &st, AT_SYMLINK_NOFOLLOW) == 0 && not_ours(st) != nullptr) {
    log::warn("code-cache: {} is not written: {}", path_, not_ours(st));
    return;
  }
  std::random_device random;
  const std::string temporary = "." + name_ + "." + std::to_string(random()) + ".tmp";
  UniqueFd fd(::openat(directory_.get(), temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
  bool ok = static_cast<bool>(fd) && write_all(fd.get(), file(build_));
  ok = ok && ::renameat(directory_.get(), temporary.c_str(), directory_.get(), name_.c_str()) == 0;
  if (ok) return;
  log::warn("code-cache: cannot write {}: {}", path_, std::strerror(errno));
  if (fd) ::unlinkat(directory_.get(), temporary.c_str(), 0);
}

}  // namespace ring3::engine
