// FUSE requests from a hostile guest: a sequence of messages cut out of the input, against a small tree in /tmp.
//
// What must hold beside "no finding": nothing is made or changed beside the shared directory, and the answer fits.
#include <fcntl.h>
#include <linux/fuse.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "fs/fuse/deferred.hpp"
#include "fs/fuse/server.hpp"

namespace {

namespace files = std::filesystem;
using namespace ring3;

std::string base;

void clean_up() {
  std::error_code ignored;
  files::remove_all(base, ignored);
}

void make_tree() {
  std::error_code ignored;
  files::remove_all(base + "/share", ignored);
  files::create_directories(base + "/share/d/e");
  std::ofstream(base + "/share/f") << "content";
  files::create_symlink("../outside", base + "/share/l");
  mkfifo((base + "/share/p").c_str(), 0666);
}

void check(bool fine, const char* what) {
  if (fine) return;
  std::fprintf(stderr, "fuse_fuzz: %s\n", what);
  std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  const char* shm = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
  base = std::string(shm) + "/ring3-fuse-fuzz-" + std::to_string(getpid());
  files::create_directories(base + "/outside");
  std::ofstream(base + "/outside/secret") << "secret";
  std::atexit(clean_up);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2 || size > 65536) return 0;
  static unsigned runs = 0;
  static const int proc_fds = open("/proc/self/fd", O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (runs++ % 64 == 0) make_tree();
  fs::Server::Options options;
  options.read_only = (data[0] & 1) != 0;
  options.privileged = false;
  if ((data[0] & 2) != 0) options.most_nodes = 2;  // so that most are opened again
  auto server = fs::Server::create(UniqueFd(open((base + "/share").c_str(), O_RDONLY | O_DIRECTORY)),
                                   UniqueFd(fcntl(proc_fds, F_DUPFD_CLOEXEC, 0)), options);
  check(static_cast<bool>(server), "no server");
  static std::vector<u8> reply(1 << 16);
  const auto send = [&](u32 opcode, u64 node, std::span<const u8> arguments, std::size_t room) {
    fuse_in_header h{};
    h.opcode = opcode;
    h.nodeid = node;
    h.len = static_cast<u32>(sizeof h + arguments.size());
    // Its own size exactly, so that a read past its end is seen.
    const auto bytes = std::make_unique_for_overwrite<u8[]>(h.len);
    const std::span<u8> message(bytes.get(), h.len);
    std::memcpy(message.data(), &h, sizeof h);
    if (!arguments.empty()) std::memcpy(message.data() + sizeof h, arguments.data(), arguments.size());
    // What the device answers without us.
    u8 known[16];
    const auto deferred = fs::deferred_answer(message, std::span(known).first(std::min(room, sizeof known)));
    check(!deferred || *deferred <= room, "the known answer is longer than its room");
    const std::size_t length = (*server)->handle(message, std::span(reply).first(room));
    check(length <= room, "the answer is longer than its room");
  };
  const u32 init[4] = {7, 37, 1 << 20, ~0u};
  send(FUSE_INIT, 0, {reinterpret_cast<const u8*>(init), sizeof init}, 4096);
  data++, size--;
  // A message: opcode, node (small numbers, so that they are met again), length, arguments.
  while (size >= 4) {
    const u32 opcode = data[0] % 64;
    const u64 node = data[1] % 8;
    const std::size_t room = data[2] % 4 == 0 ? data[2] : reply.size();
    std::size_t length = std::min<std::size_t>(data[3], size - 4);
    // Space is the host's: no allocation or truncation to huge sizes that would only fill the disk of the fuzzer.
    std::vector<u8> arguments(data + 4, data + 4 + length);
    if (opcode == FUSE_FALLOCATE && arguments.size() >= 24) arguments[18] = arguments[19] = arguments[20] = arguments[21] = arguments[22] = arguments[23] = 0;
    send(opcode, node, arguments, room);
    data += 4 + length;
    size -= 4 + length;
  }
  if (runs % 256 == 0) {
    check(std::distance(files::directory_iterator(base + "/outside"), {}) == 1 && files::file_size(base + "/outside/secret") == 6,
          "something beside the shared directory was changed");
    check(std::distance(files::directory_iterator(base), {}) == 2, "something was made beside the shared directory");
  }
  return 0;
}
