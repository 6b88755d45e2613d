#include "control/cli/share_option.hpp"

#include <algorithm>
#include <cctype>

#include "control/cli/text.hpp"

namespace ring3::control {

Result<ShareOption> parse_share_option(const std::string& text) {
  const std::vector<std::string> words = option_words(text);
  ShareOption share;
  share.directory = words[0];
  if (const auto colon = words[0].rfind(':'); colon != std::string::npos) {
    const std::string tag = words[0].substr(colon + 1);
    if (tag.find('/') == std::string::npos) {
      const bool good = !tag.empty() && tag.size() <= 36 && std::all_of(tag.begin(), tag.end(), [](char c) {
        return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '-' || c == '_' || c == '.';
      });
      if (!good) return Error::of(EINVAL, "--share: '" + printable(tag) + "' is no tag: 1 to 36 letters, digits, '-', '_' and '.'");
      share.tag = tag;
      share.directory = words[0].substr(0, colon);
    }
  }
  if (share.directory.empty()) return Error::of(EINVAL, "--share wants a directory, such as --share src or --share src:work,ro");
  for (std::size_t i = 1; i < words.size(); i++) {
    const std::string& w = words[i];
    if (w == "ro" || w == "readonly") {
      share.read_only = true;
    } else if (w.rfind("owner=", 0) == 0) {
      auto id = parse_count(w.substr(6), "--share " + printable(share.directory) + ": owner", 0, 0xfffffffe);
      if (!id) return id.error();
      share.own_id = static_cast<u32>(*id);
    } else if (w.rfind("cache=", 0) == 0) {
      auto seconds = parse_count(w.substr(6), "--share " + printable(share.directory) + ": cache", 0, 86400);
      if (!seconds) return seconds.error();
      share.cache_ms = static_cast<u32>(*seconds * 1000);
    } else {
      return Error::of(EINVAL, "--share " + printable(share.directory) + ": '" + printable(w) +
                                   "' is none of ro, owner= and cache= (write ,, for a comma in the path)");
    }
  }
  return share;
}

}  // namespace ring3::control
