#include "vmm/acpi/aml.hpp"

namespace ring3::acpi::aml {
namespace {

void append(Bytes& to, const Bytes& from) { to.insert(to.end(), from.begin(), from.end()); }

// Starts with room for more: GCC 12 invents a bound when a one-byte vector grows.
Bytes starting_with(u8 first) {
  Bytes b;
  b.reserve(16);
  b.push_back(first);
  return b;
}

// PkgLength (20.2.4): counts itself, in one to four bytes.
Bytes pkg_length(std::size_t content) {
  if (content + 1 < 0x40) return {static_cast<u8>(content + 1)};
  for (std::size_t extra = 1; extra <= 3; extra++) {
    const std::size_t total = content + 1 + extra;
    if (total < (std::size_t{1} << (4 + 8 * extra))) {
      Bytes b = starting_with(static_cast<u8>(extra << 6 | (total & 0x0f)));
      for (std::size_t i = 0; i < extra; i++) b.push_back(static_cast<u8>(total >> (4 + 8 * i)));
      return b;
    }
  }
  return {0};  // over 256 MiB: nothing of ours
}

Bytes with_length(std::initializer_list<u8> op, const Bytes& content) {
  Bytes b(op);
  append(b, pkg_length(content.size()));
  append(b, content);
  return b;
}

}  // namespace

Bytes join(std::initializer_list<Bytes> terms) {
  Bytes b;
  for (const Bytes& t : terms) append(b, t);
  return b;
}

Bytes name_seg(std::string_view name) {
  Bytes b;
  for (std::size_t i = 0; i < 4; i++) b.push_back(i < name.size() ? static_cast<u8>(name[i]) : u8{'_'});
  return b;
}

Bytes name_string(std::string_view path) {
  Bytes b;
  if (!path.empty() && path[0] == '\\') {
    b.push_back('\\');
    path.remove_prefix(1);
  }
  std::vector<std::string_view> segments;
  while (!path.empty()) {
    const std::size_t dot = path.find('.');
    segments.push_back(path.substr(0, dot));
    path = dot == std::string_view::npos ? std::string_view() : path.substr(dot + 1);
  }
  if (segments.empty()) b.push_back(0);
  if (segments.size() == 2) b.push_back(0x2e);  // DualNamePrefix
  if (segments.size() > 2) {
    b.push_back(0x2f);  // MultiNamePrefix
    b.push_back(static_cast<u8>(segments.size()));
  }
  for (auto s : segments) append(b, name_seg(s));
  return b;
}

Bytes integer(u64 value) {
  if (value <= 1) return {static_cast<u8>(value)};
  Bytes b;
  std::size_t bytes;
  if (value <= 0xff) {
    b.push_back(0x0a), bytes = 1;
  } else if (value <= 0xffff) {
    b.push_back(0x0b), bytes = 2;
  } else if (value <= 0xffffffff) {
    b.push_back(0x0c), bytes = 4;
  } else {
    b.push_back(0x0e), bytes = 8;
  }
  for (std::size_t i = 0; i < bytes; i++) b.push_back(static_cast<u8>(value >> (8 * i)));
  return b;
}

Bytes string(std::string_view text) {
  Bytes b = starting_with(0x0d);
  b.insert(b.end(), text.begin(), text.end());
  b.push_back(0);
  return b;
}

Bytes buffer(std::span<const u8> bytes) {
  Bytes content = integer(bytes.size());
  content.insert(content.end(), bytes.begin(), bytes.end());
  return with_length({0x11}, content);
}

Bytes package(std::span<const Bytes> elements) {
  Bytes content = starting_with(static_cast<u8>(elements.size()));
  for (const Bytes& e : elements) append(content, e);
  return with_length({0x12}, content);
}

Bytes eisa_id(std::string_view id) {
  const auto letter = [&](std::size_t i) { return static_cast<u32>(i < id.size() ? id[i] - '@' : 0) & 31; };
  const auto hex = [&](std::size_t i) -> u32 {
    if (i >= id.size()) return 0;
    const char c = id[i];
    return static_cast<u32>(c <= '9' ? c - '0' : c - 'A' + 10) & 15;
  };
  const u32 vendor = letter(0) << 10 | letter(1) << 5 | letter(2);
  const u32 product = hex(3) << 12 | hex(4) << 8 | hex(5) << 4 | hex(6);
  const u32 swapped = (vendor >> 8) | (vendor & 0xff) << 8 | (product >> 8) << 16 | (product & 0xff) << 24;
  Bytes b = starting_with(0x0c);
  for (int i = 0; i < 4; i++) b.push_back(static_cast<u8>(swapped >> (8 * i)));
  return b;
}

Bytes name(std::string_view path, const Bytes& object) { return join({{0x08}, name_string(path), object}); }

Bytes scope(std::string_view path, const Bytes& terms) {
  return with_length({0x10}, join({name_string(path), terms}));
}

Bytes device(std::string_view device_name, const Bytes& terms) {
  return with_length({0x5b, 0x82}, join({name_string(device_name), terms}));
}

Bytes method(std::string_view method_name, u8 args, const Bytes& terms) {
  return with_length({0x14}, join({name_string(method_name), {static_cast<u8>(args & 7)}, terms}));
}

Bytes return_(const Bytes& value) { return join({{0xa4}, value}); }

Bytes io(u16 start, u8 length) {  // 6.4.2.5, 16-bit decode
  const u8 lo = static_cast<u8>(start), hi = static_cast<u8>(start >> 8);
  return {0x47, 0x01, lo, hi, lo, hi, 0x01, length};
}

Bytes irq_edge(u8 irq) {  // 6.4.2.1: without the flags byte, edge and active high
  const u16 mask = static_cast<u16>(1u << (irq & 15));
  return {0x22, static_cast<u8>(mask), static_cast<u8>(mask >> 8)};
}

Bytes memory32_fixed(u32 start, u32 size) {  // 6.4.3.4, writable
  Bytes b{0x86, 9, 0, 1};
  for (u32 v : {start, size}) {
    for (int i = 0; i < 4; i++) b.push_back(static_cast<u8>(v >> (8 * i)));
  }
  return b;
}

Bytes bus_numbers(u16 first, u16 last) {  // 6.4.3.5.3: a word address space; minimum and maximum are fixed
  Bytes b{0x88, 13, 0, 2, 0x0c, 0};
  for (u32 v : {0u, u32{first}, u32{last}, 0u, u32{last} - first + 1}) {
    for (int i = 0; i < 2; i++) b.push_back(static_cast<u8>(v >> (8 * i)));
  }
  return b;
}

Bytes memory32_window(u32 start, u32 size) {  // 6.4.3.5.2: a double word address space, read and write
  Bytes b{0x87, 23, 0, 0, 0x0c, 1};
  for (u32 v : {0u, start, start + (size - 1), 0u, size}) {
    for (int i = 0; i < 4; i++) b.push_back(static_cast<u8>(v >> (8 * i)));
  }
  return b;
}

Bytes resource_template(std::initializer_list<Bytes> descriptors) {
  Bytes b = join(descriptors);
  b.push_back(0x79);  // end tag
  b.push_back(0x00);  // checksum 0: treated as correct
  return buffer(b);
}

}  // namespace ring3::acpi::aml
