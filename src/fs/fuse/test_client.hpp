#pragma once
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdlib.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "base/temporary_directory.hpp"
#include "fs/fuse/server.hpp"

/// The kernel's side of FUSE, for tests: messages made by hand.
namespace ring3::fs::test {

using Bytes = std::vector<u8>;

template <class T>
void append(Bytes& to, const T& value) {
  const u8* p = reinterpret_cast<const u8*>(&value);
  to.insert(to.end(), p, p + sizeof value);
}
inline void append_text(Bytes& to, const std::string& text) {
  to.insert(to.end(), text.begin(), text.end());
  to.push_back(0);
}

/// A directory with a directory beside it that nothing may reach.
struct Tree {
  Tree() {
    std::filesystem::create_directories(base + "/share");
    std::filesystem::create_directories(base + "/outside");
    root = base + "/share";
  }
  const TemporaryDirectory directory;
  const std::string base = directory.path();
  std::string root;
};

class Client {
 public:
  explicit Client(const std::string& root, Server::Options options = {}) {
    auto made = Server::create(UniqueFd(open(root.c_str(), O_RDONLY | O_DIRECTORY)),
                               UniqueFd(open("/proc/self/fd", O_PATH | O_DIRECTORY)), options);
    if (made) server = std::move(*made);
  }
  /// Sends; returns the error. The answer's body is in `body`.
  int call(u32 opcode, u64 node, const Bytes& arguments = {}) {
    fuse_in_header h{};
    h.len = static_cast<u32>(sizeof h + arguments.size());
    h.opcode = opcode;
    h.unique = ++unique;
    h.nodeid = node;
    h.uid = uid;
    h.gid = gid;
    Bytes message;
    append(message, h);
    message.insert(message.end(), arguments.begin(), arguments.end());
    Bytes reply(room);
    const std::size_t length = server->handle(message, reply);
    body.clear();
    if (length == 0) return 0;
    fuse_out_header answer;
    std::memcpy(&answer, reply.data(), sizeof answer);
    if (answer.unique != unique || answer.len != length) return -1000;
    body.assign(reply.begin() + sizeof answer, reply.begin() + static_cast<std::ptrdiff_t>(length));
    return answer.error;
  }
  template <class T>
  T get(std::size_t offset = 0) const {
    T value{};
    if (body.size() >= offset + sizeof value) std::memcpy(&value, body.data() + offset, sizeof value);
    return value;
  }
  int init(u32 minor = 37) {
    Bytes in;
    for (const u32 word : {u32{7}, minor, u32{1} << 20, ~u32{0}}) append(in, word);
    return call(FUSE_INIT, 0, in);
  }
  /// The node of that name; 0 when there is none.
  u64 lookup(u64 parent, const std::string& name, int* error = nullptr) {
    Bytes in;
    append_text(in, name);
    const int result = call(FUSE_LOOKUP, parent, in);
    if (error != nullptr) *error = result;
    return result == 0 ? get<fuse_entry_out>().nodeid : 0;
  }
  int open_node(u64 node, u32 flags, u64& handle, bool directory = false) {
    Bytes in;
    append(in, fuse_open_in{flags, 0});
    const int result = call(directory ? FUSE_OPENDIR : FUSE_OPEN, node, in);
    handle = result == 0 ? get<fuse_open_out>().fh : 0;
    return result;
  }
  int create(u64 parent, const std::string& name, u32 flags, u32 mode, u64& handle) {
    Bytes in;
    append(in, fuse_create_in{flags, mode, 0, 0});
    append_text(in, name);
    const int result = call(FUSE_CREATE, parent, in);
    handle = result == 0 ? get<fuse_open_out>(sizeof(fuse_entry_out)).fh : 0;
    return result;
  }
  std::string read(u64 handle, u64 offset, u32 size) {
    fuse_read_in want{};
    want.fh = handle;
    want.offset = offset;
    want.size = size;
    Bytes in;
    append(in, want);
    return call(FUSE_READ, 1, in) == 0 ? std::string(body.begin(), body.end()) : "<error>";
  }
  int write(u64 handle, u64 offset, const std::string& data) {
    fuse_write_in want{};
    want.fh = handle;
    want.offset = offset;
    want.size = static_cast<u32>(data.size());
    Bytes in;
    append(in, want);
    in.insert(in.end(), data.begin(), data.end());
    const int result = call(FUSE_WRITE, 1, in);
    return result == 0 ? static_cast<int>(get<fuse_write_out>().size) : result;
  }
  int named(u32 opcode, u64 parent, const std::string& name) {
    Bytes in;
    append_text(in, name);
    return call(opcode, parent, in);
  }
  int mkdir(u64 parent, const std::string& name, u32 mode = 0755) {
    Bytes in;
    append(in, fuse_mkdir_in{mode, 0});
    append_text(in, name);
    return call(FUSE_MKDIR, parent, in);
  }
  int mknod(u64 parent, const std::string& name, u32 mode) {
    Bytes in;
    append(in, fuse_mknod_in{mode, 0, 0, 0});
    append_text(in, name);
    return call(FUSE_MKNOD, parent, in);
  }
  int symlink(u64 parent, const std::string& name, const std::string& target) {
    Bytes in;
    append_text(in, name);
    append_text(in, target);
    return call(FUSE_SYMLINK, parent, in);
  }
  int rename(u64 from, const std::string& name, u64 to, const std::string& new_name, u32 flags = 0) {
    Bytes in;
    fuse_rename2_in want{};
    want.newdir = to;
    want.flags = flags;
    append(in, want);
    append_text(in, name);
    append_text(in, new_name);
    return call(FUSE_RENAME2, from, in);
  }
  int link(u64 node, u64 parent, const std::string& name) {
    Bytes in;
    append(in, fuse_link_in{node});
    append_text(in, name);
    return call(FUSE_LINK, parent, in);
  }
  int setattr(u64 node, const fuse_setattr_in& want) {
    Bytes in;
    append(in, want);
    return call(FUSE_SETATTR, node, in);
  }
  int getattr(u64 node) {
    Bytes in;
    append(in, fuse_getattr_in{});
    return call(FUSE_GETATTR, node, in);
  }
  /// All names of a directory, by READDIR or READDIRPLUS in answers of so many bytes.
  std::vector<std::string> names(u64 node, bool plus, u32 size = 4096) {
    u64 handle = 0;
    std::vector<std::string> all;
    if (open_node(node, O_RDONLY, handle, true) != 0) return {"<error>"};
    const std::size_t fixed = plus ? FUSE_NAME_OFFSET_DIRENTPLUS : FUSE_NAME_OFFSET;
    for (u64 offset = 0;;) {
      fuse_read_in want{};
      want.fh = handle;
      want.offset = offset;
      want.size = size;
      Bytes in;
      append(in, want);
      if (call(plus ? FUSE_READDIRPLUS : FUSE_READDIR, node, in) != 0) return {"<error>"};
      if (body.empty()) break;
      for (std::size_t at = 0; at < body.size();) {
        const auto record = get<fuse_dirent>(at + fixed - FUSE_NAME_OFFSET);
        all.emplace_back(body.begin() + static_cast<std::ptrdiff_t>(at + fixed),
                         body.begin() + static_cast<std::ptrdiff_t>(at + fixed + record.namelen));
        if (plus) looked_up += get<fuse_entry_out>(at).nodeid != 0;
        offset = record.off;
        at += FUSE_DIRENT_ALIGN(fixed + record.namelen);
      }
    }
    Bytes in;
    fuse_release_in done{};
    done.fh = handle;
    append(in, done);
    call(FUSE_RELEASEDIR, node, in);
    return all;
  }

  std::unique_ptr<Server> server;
  Bytes body;
  std::size_t room = Server::kMostMessage;
  u32 uid = 0, gid = 0;
  u64 unique = 0;
  int looked_up = 0;
};

}  // namespace ring3::fs::test
