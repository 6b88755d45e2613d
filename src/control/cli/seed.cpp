#include "control/cli/seed.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <memory>
#include <sstream>

#include "control/cli/text.hpp"
#include "devices/virtio/blk/block_device.hpp"
#include "storage/block/memory_file.hpp"
#include "storage/block/raw.hpp"
#include "storage/iso/iso.hpp"

namespace ring3::control {
namespace {

constexpr std::size_t kMostFile = 16 << 20;

Result<std::string> read_all(const std::string& option, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return Error::from_errno(option + " " + printable(path));
  std::string text(kMostFile + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<std::size_t>(std::max<std::streamsize>(file.gcount(), 0)));
  if (file.bad() || (text.empty() && !file.eof())) return Error::of(EIO, option + " " + printable(path) + " cannot be read: is it a file?");
  if (text.size() > kMostFile) return Error::of(EFBIG, option + " " + printable(path) + " is larger than 16 MiB");
  return text;
}

/// The kinds of user-data by which cloud-init knows them (its documentation, "User-data formats").
bool is_user_data(const std::string& text) {
  for (const char* start : {"#cloud-config", "#!", "#include", "#cloud-boothook", "#part-handler", "## template:", "#upstart-job",
                            "Content-Type:", "MIME-Version:", "\x1f\x8b"}) {
    if (text.rfind(start, 0) == 0) return true;
  }
  return false;
}

Result<std::vector<std::string>> public_keys(const std::string& path) {
  auto text = read_all("--ssh-key", path);
  if (!text) return text.error();
  if (text->find("PRIVATE KEY") != std::string::npos) {
    return Error::of(EINVAL, "--ssh-key " + printable(path) + " is a private key; give the public one: " + printable(path) + ".pub");
  }
  std::vector<std::string> keys;
  std::istringstream lines(*text);
  for (std::string line; std::getline(lines, line);) {
    while (!line.empty() && (line.back() == '\r' || line.back() == ' ')) line.pop_back();
    if (line.empty() || line[0] == '#') continue;
    const bool good = (line.rfind("ssh-", 0) == 0 || line.rfind("ecdsa-", 0) == 0 || line.rfind("sk-", 0) == 0) && line.find(' ') != std::string::npos &&
                      std::all_of(line.begin(), line.end(), [](char c) { return c >= 32 && c < 127 && c != '"' && c != '\\'; });
    if (!good) return Error::of(EINVAL, "--ssh-key " + printable(path) + ": '" + printable(line.substr(0, 40)) + "' is no public key");
    keys.push_back(line);
  }
  if (keys.empty()) return Error::of(EINVAL, "--ssh-key " + printable(path) + " holds no key");
  return keys;
}

/// FNV-1a: only so that another content is another instance.
u64 digest(u64 hash, const std::string& text) {
  for (const char c : text) hash = (hash ^ static_cast<u8>(c)) * 1099511628211u;
  return hash;
}

}  // namespace

Status parse_cloud_init(const std::string& text, SeedOptions& seed) {
  std::vector<std::string> words(1);
  for (std::size_t i = 0; i < text.size(); i++) {
    if (text[i] != ',') words.back() += text[i];
    else if (i + 1 < text.size() && text[i + 1] == ',') words.back() += text[i++];
    else words.emplace_back();
  }
  if (words.size() > 3 || words[0].empty()) {
    return Error::of(EINVAL, "--cloud-init wants USER-DATA[,META-DATA[,NETWORK-CONFIG]] (write ,, for a comma in a name)");
  }
  words.resize(3);
  seed.user_data = words[0];
  seed.meta_data = words[1];
  seed.network_config = words[2];
  return Ok{};
}

Result<std::vector<u8>> make_seed(const SeedOptions& options, const std::string& name) {
  std::string user = "#cloud-config\n{}\n", meta, network;
  if (!options.user_data.empty()) {
    auto text = read_all("--cloud-init", options.user_data);
    if (!text) return text.error();
    if (!is_user_data(*text)) {
      return Error::of(EINVAL, "--cloud-init " + printable(options.user_data) + " does not begin with #cloud-config or #!, so cloud-init would ignore it");
    }
    user = std::move(*text);
  }
  std::string keys;
  for (const std::string& path : options.ssh_keys) {
    auto some = public_keys(path);
    if (!some) return some.error();
    for (const std::string& key : *some) keys += "  - \"" + key + "\"\n";
  }
  if (!options.network_config.empty()) {
    auto text = read_all("--cloud-init", options.network_config);
    if (!text) return text.error();
    network = std::move(*text);
  }
  if (!options.meta_data.empty()) {
    auto text = read_all("--cloud-init", options.meta_data);
    if (!text) return text.error();
    meta = std::move(*text);
    if (!meta.empty() && meta.back() != '\n') meta += '\n';
    if (!keys.empty() && meta.find("public-keys") != std::string::npos) {
      return Error::of(EINVAL, "--ssh-key: " + printable(options.meta_data) + " has public-keys of its own; put the key there");
    }
  } else {
    char id[17];
    std::snprintf(id, sizeof id, "%016llx", static_cast<unsigned long long>(digest(digest(digest(14695981039346656037u, user), keys), network)));
    meta = "instance-id: " + name + "-" + id + "\nlocal-hostname: " + name + "\n";
  }
  if (!keys.empty()) meta += "public-keys:\n" + keys;
  std::vector<iso::File> files{{"user-data", user}, {"meta-data", meta}};
  if (!network.empty()) files.push_back({"network-config", network});
  auto image = iso::build("cidata", files, std::time(nullptr));
  if (!image) return Error::of(image.error().code, "--cloud-init: " + image.error().message);
  return image;
}

void add_seed(std::vector<u8> image, vmm::MachineConfig& config) {
  virtio::BlockDevice::Config c;
  const u64 size = image.size();
  c.image = std::make_shared<storage::RawImage>(std::make_unique<storage::MemoryFile>(std::move(image)), size, false);
  c.serial = "cidata";
  c.queues = 1;
  c.read_only = true;
  config.devices.push_back([c]() -> Result<std::shared_ptr<virtio::Device>> {
    return std::shared_ptr<virtio::Device>(std::make_shared<virtio::BlockDevice>(c));
  });
}

}  // namespace ring3::control
