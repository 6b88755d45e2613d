#include "control/cli/disk_option.hpp"

#include <vector>

#include "control/cli/text.hpp"

namespace ring3::control {

Result<DiskOption> parse_disk_option(const std::string& text) {
  const std::vector<std::string> words = option_words(text);
  const auto bad = [&](const std::string& why) { return Error::of(EINVAL, "--disk " + printable(words[0]) + ": " + why); };
  DiskOption disk;
  disk.path = words[0];
  if (disk.path.empty()) return Error::of(EINVAL, "--disk wants the path of an image, such as --disk disk.qcow2");
  for (std::size_t i = 1; i < words.size(); i++) {
    const std::string& w = words[i];
    const auto equals = w.find('=');
    const std::string key = w.substr(0, equals), value = equals == std::string::npos ? "" : w.substr(equals + 1);
    if (w == "ro" || w == "readonly") {
      disk.read_only = true;
    } else if (key == "format" && (value == "raw" || value == "qcow2")) {
      disk.format = value;
    } else if (key == "format") {
      return bad("there is no format '" + printable(value) + "'; there are raw and qcow2");
    } else if ((key == "serial" || key == "id") && !value.empty() && value.size() <= 20) {
      disk.serial = value;
    } else if (key == "serial" || key == "id") {
      return bad("a serial number or id has 1 to 20 characters");
    } else if (w == "discard") {
      // Always so; said for those who are used to saying it.
    } else if (key == "cache" && (value == "none" || value == "writeback")) {
      disk.direct = value == "none";
    } else if (key == "cache") {
      return bad("there is no cache '" + printable(value) + "'; there are writeback and none");
    } else if (key == "fail") {
      const auto colon = value.find(':');
      const std::string number = value.substr(0, colon), code = colon == std::string::npos ? "eio" : value.substr(colon + 1);
      if (number.empty() || number.size() > 9 || number.find_first_not_of("0123456789") != std::string::npos || std::stoul(number) == 0 ||
          (code != "eio" && code != "enospc")) {
        return bad("fail= is for tests: fail=N:eio or fail=N:enospc makes every N-th access fail");
      }
      disk.fail_every = std::stoul(number);
      disk.fail_code = code == "eio" ? EIO : ENOSPC;
    } else {
      return bad("'" + printable(w) + "' is none of ro, format=, serial=, cache= and discard (write ,, for a comma in the path)");
    }
  }
  return disk;
}

}  // namespace ring3::control
