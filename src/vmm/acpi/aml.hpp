#pragma once
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/types.hpp"

namespace ring3::acpi {

/// Writes AML, the byte code of the DSDT. Each function returns the encoding of one term; terms nest
/// by concatenation.
///
/// Spec:  ACPI 6.4, chapter 20 (20.2 grammar, 20.2.4 package lengths), 6.4 (resource descriptors).
/// Names: up to four of A-Z, 0-9 and '_', padded with '_'; our own constants, never guest input.
namespace aml {

using Bytes = std::vector<u8>;

/// Terms one after another.
Bytes join(std::initializer_list<Bytes> terms);

Bytes name_seg(std::string_view name);
/// "\\_SB_" or "_S5_": a root prefix and dotted segments are understood.
Bytes name_string(std::string_view path);

Bytes integer(u64 value);
Bytes string(std::string_view text);
Bytes buffer(std::span<const u8> bytes);
Bytes package(std::span<const Bytes> elements);  ///< at most 255
inline Bytes package(std::initializer_list<Bytes> elements) { return package(std::span(elements.begin(), elements.size())); }
/// EISAID("PNP0501") as an integer (ACPI 19.6.37). Seven characters.
Bytes eisa_id(std::string_view id);

Bytes name(std::string_view path, const Bytes& object);
Bytes scope(std::string_view path, const Bytes& terms);
Bytes device(std::string_view name, const Bytes& terms);
/// A method of `args` arguments, not serialised.
Bytes method(std::string_view name, u8 args, const Bytes& terms);
Bytes return_(const Bytes& value);

/// Resource templates: join descriptors and wrap them.
Bytes io(u16 start, u8 length);
Bytes irq_edge(u8 irq);
/// [start, start + size) below 4 GiB, taken by the device itself.
Bytes memory32_fixed(u32 start, u32 size);
/// What a bridge passes on: bus numbers, memory that is not prefetchable.
Bytes bus_numbers(u16 first, u16 last);
Bytes memory32_window(u32 start, u32 size);
Bytes resource_template(std::initializer_list<Bytes> descriptors);

}  // namespace aml
}  // namespace ring3::acpi
